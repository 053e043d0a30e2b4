import subprocess
import sys

import pytest
import torch
from conftest import TINY

import checkpoint
from data import tokenizer
from data.tokenizer import EOS, Tokenizer
from generate import generate, sample, stream
from model import Lucie, LucieConfig

BYTES = {bytes([b]): b + 4 for b in range(256)}
PROMPT = "Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?"


@pytest.fixture
def model():
    config = LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=200)
    return Lucie(config)


def test_greedy_equals_recomputing_the_whole_sequence(model):
    prompt = Tokenizer(BYTES).encode(PROMPT)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(30):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    expected = ids[len(prompt) :]
    if EOS in expected:
        expected = expected[: expected.index(EOS)]
    assert list(generate(model, prompt, 30, temperature=0)) == expected
    assert len(expected) > 5


def test_greedy_equals_transformers(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    checkpoint.to_hf(model, tmp_path, torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    prompt = Tokenizer(BYTES).encode(PROMPT)
    out = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=EOS, pad_token_id=3
    )
    expected = [i for i in out[0, len(prompt) :].tolist() if i != EOS]
    assert list(generate(model, prompt, 40, temperature=0)) == expected


class Always(Lucie):
    """Predicts one id, whatever it has read."""

    def forward(self, tokens, **kwargs):
        logits = super().forward(tokens, **kwargs)
        logits[..., self.answer] = 100.0
        return logits


def test_stops_at_eos_at_the_limit_and_at_the_end_of_the_context(model):
    endless = Always(model.config)
    endless.answer = 9
    assert list(generate(endless, [0, 5], 7, temperature=0)) == [9] * 7
    assert list(generate(endless, [0] * 190, 100, temperature=0)) == [9] * 10
    endless.answer = EOS
    assert list(generate(endless, [0, 5], 7, temperature=0)) == []


@pytest.mark.parametrize("prompt", [[], [0] * 200, [0] * 5000])
def test_empty_and_too_long_prompts(model, prompt):
    with pytest.raises(ValueError, match="1 to 199 tokens"):
        next(generate(model, prompt, 5))


def test_sampling_follows_the_distribution():
    """Chi-square of 20,000 draws against the exact truncated distribution."""
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    generator = torch.Generator().manual_seed(1)
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 6, 0.5)):
        p = (logits.double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        keep = order[: top_k or 12]
        q = p[keep] / p[keep].sum()
        keep = keep[: int((q.cumsum(0) - q < top_p).sum())]
        expected = torch.zeros(12, dtype=torch.float64)
        expected[keep] = p[keep] / p[keep].sum()
        draws = [sample(logits, temperature, top_k, top_p, generator) for _ in range(20_000)]
        counts = torch.bincount(torch.tensor(draws), minlength=12).double()
        assert not counts[expected == 0].any()
        e = 20_000 * expected[keep]
        chi2 = ((counts[keep] - e) ** 2 / e).sum().item()
        freedom = max(1, len(keep) - 1)
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_edges_of_sampling():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, 0) == sample(logits, 1e-45) == 1
    assert {sample(logits, 1.0, top_k=1) for _ in range(20)} == {1}
    assert {sample(logits, 1.0, top_p=1e-9) for _ in range(20)} == {1}
    assert sample(logits, 1.0, top_k=500) in (0, 1, 2)


def test_text_streams_without_broken_characters():
    ours = Tokenizer(BYTES)
    ids = ours.encode_ordinary("été 🙂 ok")
    pieces = list(stream(iter(ids), ours))
    assert "".join(pieces) == "été 🙂 ok"
    assert "\ufffd" not in "".join(pieces) and "" in pieces
    assert "".join(stream(iter(ids[:1]), ours)) == "\ufffd"  # cut in the middle of a character


@pytest.fixture
def run(tmp_path, model):
    tokenizer.save(BYTES, tmp_path / "r.tiktoken")
    options = TINY | {"vocab_size": 260, "seq_len": 200, "tokenizer": str(tmp_path / "r.tiktoken")}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    optimizer.step()
    state = {"step": 1, "config": options}
    checkpoint.save(tmp_path / "checkpoints" / "step0000001", model, optimizer, state)
    return tmp_path


def command(*args):
    return subprocess.run(
        [sys.executable, "generate.py", *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.slow
def test_command_line(run):
    args = (run, "--prompt", PROMPT.replace("\n", "\\n"), "--max-new-tokens=5")
    done = command(*args, "--num-return-sequences=3", "--seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(PROMPT) == 3
    texts = done.stdout.split(PROMPT)[1:]
    assert len(set(texts)) > 1  # sequences differ
    assert command(*args, "--num-return-sequences=3", "--seed=1").stdout == done.stdout
    assert command(*args, "--num-return-sequences=3", "--seed=2").stdout != done.stdout


@pytest.mark.parametrize(
    "args,message",
    [
        (["--prompt=x", "--temperature=-1"], "temperature"),
        (["--prompt=x", "--temperature=nan"], "temperature"),
        (["--prompt=x", "--top-p=0"], "top_p"),
        (["--prompt=x", "--device=abacus"], "device abacus is not to be had"),
        (["--prompt=x", "--max-new-tokens=0"], "max_new_tokens"),
        (["--prompt=" + "x" * 300], "1 to 199 tokens, not 301"),
        (["--prompt=x", "--tokenizer=none.tiktoken"], "none.tiktoken: No such file"),
    ],
)
def test_bad_arguments_are_one_line(run, args, message):
    done = command(run, *args)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_run_is_one_line(tmp_path):
    done = command(tmp_path / "none", "--prompt=x")
    assert done.returncode == 2
    assert "no complete checkpoint" in done.stderr and "Traceback" not in done.stderr
