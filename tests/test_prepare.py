import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data import prepare, tokenizer
from data.dataset import DataError, Mixture, TokenStream
from data.prepare import find_files, read_documents, tokenize
from data.tokenizer import Tokenizer

BYTES = {bytes([b]): b + 4 for b in range(256)}
TEXTS = ["Bonjour à tous.", "mot", "", "  ", "Zwei\nZeilen", "<s> is text", "e\u0301"]


def documents_of(path):
    """Documents of a stream, by its own index."""
    raw = np.fromfile(f"{path}.bin", np.uint16)
    with open(f"{path}.idx", "rb") as f:
        head = f.read(34)
        count = int.from_bytes(head[18:26], "little")
        lengths = np.frombuffer(f.read(4 * count), np.int32)
        offsets = np.frombuffer(f.read(8 * count), np.int64)
        boundaries = np.frombuffer(f.read(), np.int64)
    assert boundaries.tolist() == list(range(count + 1))
    return [raw[o // 2 : o // 2 + n].tolist() for o, n in zip(offsets, lengths)]


def test_one_document_is_bos_text_eos(tmp_path):
    ours = Tokenizer(BYTES)
    counts = tokenize(TEXTS, ours, tmp_path / "x")
    assert counts["documents"] == 5 and counts["empty"] == 2
    expected = ["Bonjour à tous.", "mot", "Zwei\nZeilen", "<s> is text", "é"]  # NFC
    found = documents_of(tmp_path / "x")
    assert found == [[0, *(b + 4 for b in text.encode()), 1] for text in expected]
    assert counts["tokens"] == sum(map(len, found)) == TokenStream(tmp_path / "x").tokens
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.valid*"))


def test_all_forms_of_input_give_the_same(tmp_path):
    texts = [text for text in TEXTS if text.strip()]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "in" / "ignored.csv").write_text("x")
    lines = "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts) + "\n"
    (tmp_path / "lines.jsonl").write_text(lines)
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(lines)
    for given in ("in", "lines.jsonl", "lines.jsonl.gz"):
        read = list(read_documents(find_files([tmp_path / given])))
        assert [text for text in read if text] == texts


def test_output_does_not_depend_on_the_number_of_processes(tmp_path):
    texts = [f"document {n} " * (n % 40) for n in range(1500)]
    for workers in (1, 3):
        tokenize(texts, Tokenizer(BYTES), tmp_path / f"w{workers}", 0.1, workers)
    for suffix in (".bin", ".idx", ".valid.bin", ".valid.idx"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w3{suffix}").read_bytes()


def test_held_out_documents_are_a_share_and_nothing_is_lost(tmp_path):
    texts = [f"text number {n}" for n in range(2000)]
    counts = tokenize(texts, Tokenizer(BYTES), tmp_path / "x", 0.1)
    train, valid = documents_of(tmp_path / "x"), documents_of(tmp_path / "x.valid")
    assert len(train) + len(valid) == 2000 and 140 < len(valid) < 260
    assert counts["validation"] == len(valid)
    both = {bytes(t - 4 for t in d[1:-1]).decode() for d in train + valid}
    assert both == set(texts)


def test_large_vocabularies_are_int32(tmp_path):
    for size, dtype in ((65_024, np.uint16), (65_536, np.int32), (128_256, np.int32)):
        with prepare.StreamWriter(tmp_path / "x", size) as stream:
            stream.add(np.array([0, size - 1]))
        stream = TokenStream(tmp_path / "x")
        assert stream.dtype == dtype
        assert stream.read(0, 2, size).tolist() == [0, size - 1]


def test_a_stream_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    """Whatever moment the writing of a second version dies at, no mixture of both is read."""
    tokenize(["first version"], Tokenizer(BYTES), tmp_path / "x")
    before = documents_of(tmp_path / "x")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.os.fsync", die)
        with pytest.raises(Killed):
            tokenize(["another"], Tokenizer(BYTES), tmp_path / "x")
    assert documents_of(tmp_path / "x") == before
    replace, calls = os.replace, []

    def second_dies(*names):
        calls.append(names)
        if len(calls) == 2:
            raise Killed
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.os.replace", second_dies)
        with pytest.raises(Killed):
            tokenize(["another"], Tokenizer(BYTES), tmp_path / "x")
    with pytest.raises(DataError, match=r"x\.idx: no such file"):
        TokenStream(tmp_path / "x")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2"),
        ("x.jsonl", b'{"body": "a"}\n', r"line 1: no text field"),
        ("x.jsonl", b'{"text": 3}\n', r"line 1: its text is not a string"),
        ("x.jsonl", b'["text"]\n', r"line 1: no text field"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"line 1: .*utf-8"),
        ("x.txt", b"caf\xe9", r"x\.txt, line 1: .*utf-8"),
        ("x.jsonl.gz", b"not gzip", r"x\.jsonl\.gz: "),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], r"x\.jsonl\.gz: "),
        ("x.txt", b"  \n", "the corpus is empty"),
        ("x.pdf", b"%PDF", r"x\.pdf: not a folder nor a \.txt"),
        (None, None, "not a folder"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, name, content, message):
    path = tmp_path / (name or "nowhere")
    if name:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokenize(read_documents(find_files([path])), Tokenizer(BYTES), tmp_path / "out" / "x")
    assert not list(tmp_path.glob("out/*"))


def test_command_line(tmp_path):
    texts = [{"text": f"le texte numéro {n} est ici"} for n in range(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")

    def command(*args):
        return subprocess.run(
            [sys.executable, "-m", "data.prepare", *map(str, args)], capture_output=True, text=True
        )

    ranks = tmp_path / "r.tiktoken"
    done = command("tokenizer", tmp_path / "t.jsonl", "--vocab-size=275", "--out", ranks)
    assert done.returncode == 0, done.stderr
    assert tokenizer.load(ranks).vocab_size == 275
    args = ("tokens", tmp_path / "t.jsonl", "--tokenizer", ranks, "--out", tmp_path / "d" / "fr")
    done = command(*args, "--validation=0.2", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert "documents 300" in done.stdout
    held_out = len(documents_of(tmp_path / "d" / "fr.valid"))
    assert len(documents_of(tmp_path / "d" / "fr")) + held_out == 300

    done = command("tokenizer", tmp_path / "t.jsonl", "--vocab-size=-5", "--out", tmp_path / "n")
    assert done.returncode == 2 and "at least 260 tokens, not -5" in done.stderr
    args = ("tokens", tmp_path / "t.jsonl", "--tokenizer", ranks, "--out", "/dev/null/x")
    done = command(*args)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = command("tokens", tmp_path / "none.txt", "--tokenizer", ranks, "--out", tmp_path / "y")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "none.txt: not a folder" in done.stderr


@pytest.mark.slow
def test_demo_data_is_complete(tmp_path):
    prepare.prepare_demo(tmp_path)
    for name in (*prepare.DEMO_MIXTURES, "validation"):
        mixture = Mixture(tmp_path / f"{name}.csv", 1024, 42, prepare.DEMO_VOCAB_SIZE)
        assert sum(mixture.weights) == pytest.approx(1)
    main = Mixture(tmp_path / "pretraining.csv", 256, 42, prepare.DEMO_VOCAB_SIZE)
    published = {"en": 0.332, "fr": 0.324, "code": 0.147, "de": 0.069, "es": 0.066, "it": 0.038}
    for name, share in (published | {"parallel": 0.025}).items():
        assert main.weights[main.names.index(name)] == pytest.approx(share, abs=0.001)
    assert tokenizer.load(tmp_path / "ranks.tiktoken").vocab_size == prepare.DEMO_VOCAB_SIZE
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]
