"""The commands of data.prepare."""

import gzip
import random
import re
import subprocess
import sys

import pytest
from test_streams import RANKS, json_lines, write

from config.cli import run_cli
from data import prepare, tokenizer
from data.dataset import DataError
from data.files import find_files, read_documents
from data.streams import clean


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m data.prepare ARGS`, and returns (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            run_cli(prepare.main, DataError)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """600 documents in French, 300 in English, 40 files of code, and a ranks file."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices("aeiourstlnmd", k=rng.randint(1, 6))) for _ in range(200)]
    for name, count in (("fr", 600), ("en", 300)):
        sizes = [n * n % 67 for n in range(count)]
        texts = [f"{name} {n}\0 {' '.join(rng.choices(words, k=k))}" for n, k in enumerate(sizes)]
        write(folder / f"{name}.jsonl.gz", gzip.compress(json_lines(texts, language=name)))
    for n in range(40):
        write(folder / f"src/{'deep/' * (n % 2)}{n}.py", f"code {n}\n" * (n % 50 + 1))
    tokenizer.save(RANKS, folder / "r.tiktoken")
    write(folder / "blank.md", b" \0\n")
    write(folder / "empty.md", b"")
    return folder


def test_tokens_are_made_and_the_same_command_again_does_nothing(folder, tmp_path, command):
    bad = write(tmp_path / "bad.jsonl", b'{"text": "\xff"}\n')
    args = ["tokens", f"{folder}/*.gz", bad, "--tokenizer", folder / "r.tiktoken", "--processes=2"]
    args += ["--out", tmp_path / "d", "--split-by=language", "--validation=0.1", "--on_error=skip"]
    call = dict(capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-m", "data.prepare", *args], **call)
    for code, out, err in ((0, done.stdout, done.stderr), command(*args)):
        assert code == 0 and "documents 900 of 901; left out: error 1, empty 0;" in out
        assert re.search(r"^d\.fr\.valid: documents \d+, tokens [\d,]+$", out, re.MULTILINE)
        assert re.search(r"^left out: .*bad\.jsonl, line 1: not UTF-8", err, re.MULTILINE)
    assert "whole documents are held out" in done.stderr and "already up to date" in err


TOKENS = ("tokens", "{0}/fr.jsonl.gz", "--tokenizer={0}/r.tiktoken", "--out={0}/y", "--processes=1")
SHARES = ("vocabulary", "{0}/fr.jsonl.gz", "{0}/en.jsonl.gz", "--out={0}/y", "--shares", "0.5")


@pytest.mark.parametrize(
    "args, said",
    [
        ((*TOKENS, "--validation=1"), "a share from 0 to under 1, not 1.0"),
        ((*TOKENS, "--text_field=b"), "fr.jsonl.gz, line 1: no field 'b' (--on_error skip"),
        ((*TOKENS, "--out=/"), "--out /: must end in a name"),
        ((*TOKENS, "--split_length=0"), "--processes and --split_length must be 1 or more"),
        (("tokens", "{0}/blank.md", *TOKENS[2:]), "y: no document was kept; left out: error 0,"),
        ((*SHARES, "0.5", "--out={0}/src"), "src: is a folder"),
        (SHARES, "--shares has a number over 0 for each of the inputs"),
        (("vocabulary", "{0}/empty.md", *SHARES[2:], "0.5"), "empty.md: no text"),
    ],
)
def test_a_wrong_command_is_one_line(folder, command, args, said):
    pytest.importorskip("tokenizers")
    code, _, err = command(*(arg.format(folder) for arg in args))
    lines = [line for line in err.splitlines() if line.startswith("prepare: ")]
    assert code == 2 and len(lines) == 1 and said.format(folder) in lines[0], err
    assert "Traceback" not in err and not list(folder.glob("y*.*n"))


def test_a_vocabulary_is_learnt_from_texts_in_their_shares(folder, tmp_path, command, monkeypatch):
    pytest.importorskip("tokenizers")
    paths = {f"{folder}/fr.jsonl.gz": 5, f"{folder}/en.jsonl.gz": 3, f"{folder}/src/**/*.py": 2}
    texts = {path: list(map(clean, read_documents(find_files([path])))) for path in paths}
    sizes = {path: sum(len(text) for text in texts[path]) for path in paths}
    most = min(sizes[path] / share for path, share in paths.items())
    sample, train = [], tokenizer.train

    def listening(texts, vocab_size):
        sample[:] = texts
        return train(sample, vocab_size)

    monkeypatch.setattr(tokenizer, "train", listening)
    args = ["vocabulary", "--vocab_size=280", f"--out={tmp_path}/new/r"]
    shares = ["--shares", *paths.values()]
    code, out, err = command(*args, *paths, *shares)
    assert code == 0 and f"{tmp_path}/new/r: 280 tokens" in out, err
    assert len(set(sample)) == len(sample)
    for path, share in paths.items():
        keep = share * most / sizes[path]
        variance = sum(len(text) ** 2 for text in texts[path]) * max(0, keep * (1 - keep))
        drawn = sum(len(text) for text in sample if text in texts[path])
        assert abs(drawn - share * most) <= 5 * variance**0.5 + 1e-6, path
    ranks = tokenizer.load(tmp_path / "new/r").bpe.ranks
    assert ranks == train(sample, 280)
    # Without shares all is read.
    bad = write(tmp_path / "bad.jsonl", b"{")
    code, _, err = command(*args, f"{folder}/fr*.gz", bad, "--on_error=skip")
    assert code == 0 and re.search(r"^left out: .*bad.jsonl, line 1: not JSON", err, re.MULTILINE)
    assert sample == texts[f"{folder}/fr.jsonl.gz"]
