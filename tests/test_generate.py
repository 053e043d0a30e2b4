import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY

import checkpoint
import generate
from completion import Completion, Sampling
from data import tokenizer
from data.tokenizer import Tokenizer
from model import Lucie, LucieConfig

BYTES = {bytes([b]): b + 4 for b in range(256)}
PROMPT = "Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step of a tiny model, whose vocabulary are the bytes."""
    folder = tmp_path_factory.mktemp("run")
    model = Lucie(LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=200))
    tokenizer.save(BYTES, folder / "r.tiktoken")
    options = TINY | {"vocab_size": 260, "seq_len": 200, "tokenizer": str(folder / "r.tiktoken")}
    options["rope_theta"] = model.config.rope_theta
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    optimizer.step()
    state = {"step": 1, "samples": 4, "tokens": 800, "config": options}
    checkpoint.save(folder / "checkpoints" / "step0000001", model, optimizer, state)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """generate.py with these arguments, in this process: (exit code, stdout, stderr)."""

    def call(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = generate.command_line(list(map(str, args)))
        return code, *capsys.readouterr()

    return call


FEW = "--max-new-tokens=5"


def test_the_prompt_is_echoed_or_not(run, command):
    code, out, err = command(run, "--prompt", PROMPT.replace("\n", "\\n"), FEW, "--temperature=0")
    assert code == 0 and out.startswith(PROMPT) and out.endswith("\n")
    read = len(PROMPT.encode()) + 1
    assert f"{read} tokens read, 5 generated" in err and "peak memory" in err
    alone = command(run, "--prompt", PROMPT, FEW, "--temperature=0", "--no-echo")[1]
    assert PROMPT + alone == out


def test_seeds_and_sequences(run, command):
    args = (run, "--prompt", PROMPT, FEW, "--num-return-sequences=3")
    first = command(*args, "--seed=1")[1]
    texts = first.split(PROMPT)[1:]
    assert len(texts) == 3 and len(set(texts)) > 1
    assert command(*args, "--seed=1")[1] == first
    assert command(*args, "--seed=2")[1] != first


def test_prompts_from_everywhere_as_lines_of_json(run, command, tmp_path):
    (tmp_path / "whole.txt").write_text("Zwei\nZeilen é", encoding="utf-8")
    raw = json.dumps({"prompt": "b\nc\u2028d", "other": 1}, ensure_ascii=False)
    lines = [json.dumps({"prompt": "première"}), "", raw]
    (tmp_path / "many.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = [f"--prompt-file={tmp_path / 'whole.txt'}", f"--prompt-file={tmp_path / 'many.jsonl'}"]
    args = (run, "--prompt=ab", *files, "--prompt-file=-", "--json", "--temperature=0", FEW)
    code, out, _ = command(*args, "--batch-size=2", stdin="del corazón".encode())
    found = [Completion(**json.loads(line)) for line in out.rstrip("\n").split("\n")]
    assert code == 0
    assert [x.prompt for x in found] == [
        "ab",
        "Zwei\nZeilen é",
        "première",
        "b\nc\u2028d",
        "del corazón",
    ]
    for x in found:
        assert x.prompt_ids == Tokenizer(BYTES).encode(x.prompt)
        assert len(x.ids) == len(x.logprobs) == 5 or x.finish_reason == "stop"
        alone = command(run, FEW, "--temperature=0", stdin=x.prompt.encode())[1]
        assert alone == x.prompt + x.text + "\n"


def test_a_lone_completion_streams_what_a_batch_gives(run, command):
    model, _ = checkpoint.from_run(run)
    ours = Tokenizer(BYTES)
    lone = Completion("été", ours.encode("été"))
    generator = torch.Generator().manual_seed(3)
    pieces = list(generate.stream(model, ours, lone, 60, Sampling(), generator))
    _, out, _ = command(run, "--prompt=été", "--json", "--seed=3", "--max-new-tokens=60")
    batched = Completion(**json.loads(out))
    assert (lone.text, lone.ids) == (batched.text, batched.ids) and "".join(pieces) == lone.text
    assert len(pieces) > 5


def test_interactive(run, command):
    """Prompts until the input ends; one that is too long is told, and the next goes on."""
    typed = f"ab\n\n{'x' * 300}\ncd\n".encode()
    code, out, err = command(run, "--interactive", FEW, "--temperature=0", stdin=typed)
    assert code == 0 and out.count("> ") == 5
    assert err.splitlines() == ["the prompt is empty", "a prompt has 1 to 199 tokens here, not 301"]
    alone = [
        command(run, "--prompt", p, FEW, "--no-echo", "--temperature=0")[1] for p in ("ab", "cd")
    ]
    assert all(text in out for text in alone)


def test_four_bits_are_saved_and_loaded(run, command, tmp_path):
    common = ("--prompt=ab", "--temperature=0", "--json", "--max-new-tokens=20")
    code, direct, err = command(
        run, *common, "--quantize=int4", f"--save-quantized={tmp_path / 'int4'}"
    )
    assert code == 0, err
    assert command(tmp_path / "int4", *common)[1] == direct  # with its tokenizer beside it
    assert command(f"hf:{tmp_path / 'int4'}", *common)[1] == direct
    code, _, err = command(tmp_path / "int4", *common, "--dtype=bfloat16")
    assert code == 2 and "4-bit weights are for float32" in err


def test_a_hugging_face_folder_brings_its_tokenizer(run, command, tmp_path):
    model, options = checkpoint.from_run(run)
    checkpoint.to_hf(model, tmp_path / "hf", torch.float32)
    tokenizer.save_folder(tokenizer.load(options["tokenizer"]), tmp_path / "hf")
    common = ("--prompt=ab", "--temperature=0", FEW)
    expected = command(run, *common)[1]
    assert command(f"hf:{tmp_path / 'hf'}", *common)[1] == expected
    assert command(tmp_path / "hf", *common)[1] == expected


@pytest.mark.parametrize(
    "args,message",
    [
        (["--prompt=x", "--temperature=-1"], "temperature"),
        (["--prompt=x", "--temperature=nan"], "temperature"),
        (["--prompt=x", "--top-p=0"], "top_p"),
        (["--prompt=x", "--top-k=300"], "top_k is 0 to the vocabulary's 260, not 300"),
        (["--prompt=x", "--device=abacus"], "device abacus is not to be had"),
        (["--prompt=x", "--max-new-tokens=0"], "max_new_tokens"),
        (["--prompt=" + "x" * 300], "1 to 199 tokens here, not 301"),
        (["--prompt=a", "--prompt=" + "x" * 300], "1 to 199 tokens here, not 301"),
        (["--prompt="], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--prompt=x", "--tokenizer=none.tiktoken"], "none.tiktoken: No such file"),
        (["--prompt-file=none.txt"], "none.txt: No such file"),
        (["--prompt-file=LATIN"], "latin.txt: not UTF-8 at byte 2"),
        (["--prompt-file=LINES"], "lines.jsonl, line 2: a line is"),
        (["--prompt=x", "--save-quantized=d"], "--save-quantized needs --quantize"),
        (["--quantize=int4", "--save-quantized=tests"], "tests: there is something of this name"),
        (["--prompt=a", "--prompt-file=HALF"], "not valid Unicode: the prompt 'x\\ud83d'"),
        (["--prompt=x", "--interactive"], "--interactive takes its prompts from you"),
    ],
)
def test_bad_input_is_one_line(run, command, tmp_path, args, message):
    (tmp_path / "latin.txt").write_bytes("caé".encode("latin-1"))
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "x\\ud83d"}')
    places = {name.upper(): tmp_path / f"{name}.jsonl" for name in ("lines", "half")}
    places["LATIN"] = tmp_path / "latin.txt"
    for name, place in places.items():
        args = [arg.replace(name, str(place)) for arg in args]
    code, out, err = command(run, *args)
    assert code == 2 and not out
    assert message in err and len(err.splitlines()) == 1


def test_a_vocabulary_of_another_size_and_a_missing_model(run, command, tmp_path):
    tokenizer.save(BYTES | {b"ab": 260}, tmp_path / "other.tiktoken")
    code, _, err = command(run, "--prompt=x", f"--tokenizer={tmp_path / 'other.tiktoken'}")
    assert code == 2 and "has 261 tokens, the model 260" in err
    code, _, err = command(tmp_path / "none", "--prompt=x")
    assert code == 2 and "no complete checkpoint" in err and len(err.splitlines()) == 1


def test_as_a_command_of_its_own(run):
    """Through a shell: text arrives as it is made, Ctrl-C ends it."""
    args = [sys.executable, "generate.py", str(run), "--prompt=été", "--temperature=0"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        begun = os.read(process.stdout.fileno(), 4)
        assert begun.decode(errors="replace").startswith("ét")
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)  # it may have been done
        assert b"Traceback" not in process.stderr.read()
