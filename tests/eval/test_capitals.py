import pytest
import torch
from conftest import TINY, launch

import checkpoint
from data import demo
from data import tokenizer as tokenizers
from data.tokenizer import ByteLevelBPE, Tokenizer
from eval import capitals
from eval.capitals import right
from generate import Completion, Sampling, complete
from model import Lucie, LucieConfig

BYTES = {bytes([b]): b + 4 for b in range(256)}


def test_agrees_with_greedy_generation():
    """What a model answers greedily is right, anything else wrong, whatever its neighbours."""
    config = LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=100)
    model, tokenizer = Lucie(config), Tokenizer(ByteLevelBPE(BYTES))
    with torch.no_grad():
        model.lm_head.weight[: 32 + 4] = 0  # printable ASCII only, and a space to begin with
        model.lm_head.weight[127 + 4 :] = 0
    questions, expected = [], []
    for prompt in ("A?", "Was ist das?", "a much longer question, is it?"):
        # what follows " " greedily; whether the space itself is likeliest decides
        both = complete(model, tokenizer, [f"{prompt} ", prompt], 1, Sampling(temperature=0))
        answer, space = (completion.text for completion in both)
        questions.append((prompt, answer))
        expected.append(space == " ")
    assert right(model, tokenizer, questions) == expected


def test_counts_only_exact_answers():
    class Parrot(Lucie):
        """Always predicts the next byte of one fixed text."""

        text = [0, *(b + 4 for b in b"Q? Paris\n")]

        def forward(self, tokens, **_):
            logits = torch.zeros(*tokens.shape, 260)
            for t in range(tokens.shape[1]):
                logits[:, t, self.text[min(t + 1, len(self.text) - 1)]] = 1
            return logits

    model = Parrot(LucieConfig(**(TINY | {"vocab_size": 260})))
    tokenizer = Tokenizer(ByteLevelBPE(BYTES))
    questions = [("Q?", "Paris"), ("Q?", "Par"), ("Q?", "London"), ("Q?", "Parisian")]
    assert right(model, tokenizer, questions) == [True, True, False, False]


@pytest.fixture
def run(tmp_path):
    """The run of a model that knows nothing, under the name `phase`."""
    folder = tmp_path / "phase"
    config = LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=200)
    model = Lucie(config)
    options = TINY | {"vocab_size": 260, "seq_len": 200, "rope_theta": config.rope_theta}
    options |= {"tokenizer": str(tmp_path / "bytes.tiktoken"), "seed": 7, "dtype": "float32"}
    tokenizers.save(BYTES, options["tokenizer"])
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, tokens).backward()
    optimizer.step()
    state = {"step": 1, "samples": 4, "tokens": 800, "config": options}
    checkpoint.save(folder / "checkpoints" / "step0000001", model, optimizer, state)
    return str(folder)


def test_a_low_quality_is_no_error(run, capsys):
    assert capitals.main([run, run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["greedy", "completion", "after", "phase", "phase"]
    assert lines[1].startswith("What is the capital of China? ")
    assert lines[2].startswith("Quelle est la capitale de la Chine ? ")
    assert [line.split() for line in lines if "of 60" in line] == [
        [language, "0.0%", "0.0%", "of", "60"] for language in demo.LANGUAGES
    ]
    assert lines[-1] == "worst language: recalled 0.0%, transferred 0.0% (seed 7, float32)"


def test_the_bar_is_the_worst_language(run, capsys, monkeypatch):
    shares = dict.fromkeys(demo.LANGUAGES, (1.0, 0.5)) | {"es": (0.95, 0.9)}
    monkeypatch.setattr(capitals, "examine", lambda model, tokenizer: shares)
    assert capitals.main([run, "--at_least=0.95"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("worst language: recalled 95.0%, transferred 50.0% (seed 7, float32)\n")
    assert capitals.main([run, "--at_least", "0.96"]) == 1


def test_a_completion_is_shown_to_the_end_of_its_line(monkeypatch):
    found = [Completion("", [], text=text) for text in (" Pékin\nQuelle", " none ends")]
    monkeypatch.setattr(capitals, "complete", lambda *args: found)
    assert capitals.first_lines(None, None, ["a", "b"]) == ["Pékin", "none ends"]


@pytest.mark.slow
def test_the_demo_has_room_to_spare(tmp_path):
    """All three phases of `make demo`, and the bar that its documentation promises."""
    demo.prepare(tmp_path)
    before = ""
    for phase, mixture in (
        ("demo_pretrain", "pretraining"),
        ("demo_extension", "extension"),
        ("demo_annealing", "annealing"),
    ):
        options = {
            "out_dir": tmp_path,
            "tokenizer": tmp_path / "ranks.tiktoken",
            "mixture": tmp_path / f"{mixture}.csv",
            "validation": tmp_path / "validation.csv",
            "init_from": before or "scratch",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        done = launch("train.py", f"config/{phase}.py", *arguments, timeout=1800)
        assert done.returncode == 0, done.stderr
        before = tmp_path / phase
    model, config = checkpoint.from_run(before)
    shares = capitals.examine(model, tokenizers.load(config["tokenizer"]))
    assert min(recalled for recalled, _ in shares.values()) >= 0.97, shares
    assert min(transferred for _, transferred in shares.values()) >= 0.9, shares
