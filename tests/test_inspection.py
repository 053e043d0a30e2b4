"""Samples shown, streams verified and counted: as a user would, on files changed in every way."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import inspection, prepare, tokenizer
from data.dataset import DataError, Mixture, TokenStream
from data.inspection import Index, pieces
from data.prepare import StreamWriter, write_mixture

TEXTS = ["Un deux trois.", "été à Noël", "x = 1\n", "a longer document of many words, " * 9, "fin"]


@pytest.fixture
def text_data(tmp_path):
    """Two streams of real text in a vocabulary of bytes, and its ranks file."""
    tokenizer.save({bytes([k]): k + 4 for k in range(256)}, tmp_path / "ranks.tiktoken")
    encoder = tokenizer.load(tmp_path / "ranks.tiktoken")
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        with StreamWriter(tmp_path / name, encoder.vocab_size) as stream:
            for text in texts:
                stream.add(np.array(encoder.encode_document(text)))
    write_mixture(tmp_path / "mixture.csv", {"a": 0.7, "b": 0.3})
    return tmp_path


def run(capsys, command, folder, *args):
    """(stdout, the error raised or None); lines about single streams are on stderr."""
    args = [command, folder / "mixture.csv", *args]
    if command != "count":
        args += ["--tokenizer", folder / "ranks.tiktoken"]
    error = None
    try:
        inspection.main(list(map(str, args)))
    except DataError as raised:
        error = str(raised)
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").split("\n")
    return out, [x for x in lines if x.strip() and "B/s]" not in x], error


# --- show


def test_pieces_are_the_sample_cut_where_documents_meet(tiny_data):
    """The documents from the lengths as they are in the file; the index's offsets not used."""
    mixture = Mixture(tiny_data / "mixture.csv", 23, 42, 97)
    documents = []
    for stream in mixture.streams:
        lengths = np.fromfile(stream.idx, np.int32, stream.documents, offset=34)
        documents.append(np.split(np.fromfile(stream.bin, np.uint16), np.cumsum(lengths)[:-1]))
    for i in range(300):
        found = pieces(mixture, i)
        source = mixture.locate(i).source
        assert np.array_equal(np.concatenate([p.tokens for p in found]), mixture[i])
        for k, piece in enumerate(found):
            whole = documents[source][piece.document]
            assert piece.length == len(whole)
            assert np.array_equal(piece.tokens, whole[piece.start : piece.end])
            assert piece.start == 0 or k == 0
            assert piece.end == len(whole) or k == len(found) - 1


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=8))
def test_documents_of_several_sequences_and_empty_ones(tmp_path_factory, documents):
    """Megatron may cut a document into sentences; written here byte by byte."""
    path = tmp_path_factory.mktemp("m") / "m"
    lengths = [n for document in documents for n in document]
    owner = np.repeat(range(len(documents)), [sum(document) for document in documents])
    np.arange(len(owner), dtype=np.int32).tofile(f"{path}.bin")
    boundaries = np.cumsum([0] + [len(document) for document in documents])
    with open(f"{path}.idx", "wb") as f:
        f.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(lengths), len(boundaries)))
        f.write(np.array(lengths, np.int32).tobytes())
        f.write(np.cumsum([0] + lengths)[:-1].astype(np.int64).tobytes() * bool(lengths))
        f.write(boundaries.astype(np.int64).tobytes())
    text = open(f"{path}.idx", "rb").read()
    with open(f"{path}.idx", "wb") as f:  # offsets are in bytes
        at = 34 + 4 * len(lengths)
        offsets = np.frombuffer(text, np.int64, len(lengths), at) * 4
        f.write(text[:at] + offsets.tobytes() + text[at + 8 * len(lengths) :])
    stream = TokenStream(path)
    index = Index(stream)
    assert list(index.faults()) == [] and stream.documents == len(documents)
    for token, document in enumerate(owner):
        start, end = np.searchsorted(owner, document), np.searchsorted(owner, document, "right")
        assert index.document_at(token) == (document, start, end)


def test_the_text_of_a_sample_is_shown_with_its_documents(text_data, capsys):
    # 16 bytes of text with <s> and </s>: a sample of 20 and one more begins the second document
    mixture = Mixture(text_data / "mixture.csv", 20, 42, 260)
    i = next(i for i in range(500) if mixture.locate(i)[::2] == (0, 0))
    out, _, _ = run(capsys, "show", text_data, "--sample", i, "--seq_len", 20)
    assert f"sample {i}: a, epoch {mixture.locate(i).epoch}, its sample 0 of" in out
    assert "tokens 0 to 20 of" in out
    first, second = out.split("\n--- ")[1:]
    assert first == "a, document 0 of 5: tokens 0 to 15 of 16\n<s>Un deux trois.</s>\n"
    assert second == "a, document 1 of 5: tokens 0 to 4 of 16\n<s>ét\ufffd\n"  # half an é


def test_another_seed_shows_another_sample(text_data, capsys):
    shown = {
        run(capsys, "show", text_data, "--sample", 3, "--seq_len", 5, "--seed", seed)[0]
        for seed in range(4)
    }
    assert len(shown) > 1


# --- verify


def checksum(folder, name):
    digests = {
        kind: hashlib.sha256((folder / f"{name}.{kind}").read_bytes()).hexdigest()
        for kind in ("bin", "idx")
    }
    report = {"documents": 5, "streams": {"other": {}, name: {"sha256": digests}}}
    (folder / f"{name.split('.')[0]}.json").write_text(json.dumps(report))


def test_whole_streams_are_whole(text_data, capsys):
    checksum(text_data, "a")
    out, faults, error = run(capsys, "verify", text_data)
    assert not faults and error is None
    a, b = [line for line in out.splitlines() if "whole" in line]
    assert a.startswith("a: whole, 5 documents,") and a.endswith("checksums hold")
    assert b.startswith("b: whole, 5 documents,") and b.endswith("no checksums to compare")


def test_one_report_holds_the_checksums_of_all_its_streams(text_data):
    for suffix in ("bin", "idx"):
        os.rename(text_data / f"b.{suffix}", text_data / f"b.long.valid.{suffix}")
    stream = TokenStream(text_data / "b.long.valid")
    assert inspection.checksums(stream) == {}
    checksum(text_data, "b.long.valid")
    assert (text_data / "b.json").is_file()
    found = inspection.checksums(stream)
    assert found["bin"] == hashlib.sha256(stream.bin.read_bytes()).hexdigest()
    (text_data / "b.long.json").write_text('{"streams": {"b.long": {}}}')  # of another command
    assert inspection.checksums(stream) == found


def test_what_prepare_writes_is_verified(text_data, capsys):
    (text_data / "fr.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    options = ["--tokenizer", str(text_data / "ranks.tiktoken"), "--out", str(text_data / "a")]
    prepare.main(["tokens", str(text_data / "fr.jsonl"), *options])
    capsys.readouterr()
    out, _, _ = run(capsys, "verify", text_data)
    (line,) = [line for line in out.splitlines() if line.startswith("a: ")]
    assert line.startswith("a: whole, 5 documents") and line.endswith("checksums hold")


def patch(path, at, content):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(content)


@pytest.mark.parametrize(
    "change, said",
    [
        # ids are of bytes: 256 and 4 special ones
        (lambda d: patch(d / "b.bin", 20, struct.pack("<H", 260)), "first token 10 with id 260"),
        (lambda d: patch(d / "b.idx", 34, struct.pack("<i", 4)), "sequence 1 does not follow"),
        (lambda d: patch(d / "b.idx", 34 + 4 * 5 + 16, struct.pack("<q", 3)), "sequence 2 does"),
        (lambda d: set_length(d, -3), "sequence 1 does not follow"),
        (lambda d: patch(d / "b.idx", 34 + 12 * 5 + 8, struct.pack("<q", 4)), "boundaries do not"),
        (lambda d: patch(d / "b.idx", 34 + 12 * 5, struct.pack("<q", 1)), "boundaries do not"),
        (lambda d: patch(d / "b.idx", 34 + 12 * 5 + 40, struct.pack("<q", 6)), "boundaries do not"),
        (lambda d: open(d / "b.idx", "ab").write(b"x"), "where its header says"),
        (lambda d: open(d / "b.bin", "ab").write(b"xx"), "where its index says"),
        (lambda d: os.truncate(d / "b.bin", 50), "truncated, 50 bytes"),
        (lambda d: (d / "b.json").write_text("{}"), "not a report of data.prepare"),
        (lambda d: (d / "b.json").write_text("{"), "not a report of data.prepare"),
        (
            lambda d: (d / "b.json").write_text('{"streams": {"b": {"sha256": {"bin": "0"}}}}'),
            "with sha256 of bin, idx",
        ),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_still_checked(text_data, capsys, change, said):
    change(text_data)
    out, faults, error = run(capsys, "verify", text_data)
    assert "a: whole" in out and "b: whole" not in out
    assert faults[0].startswith("b: ") and said in faults[0]
    assert error == f"{text_data}/mixture.csv: {len(faults)} faults"


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_changed_byte_breaks_the_checksum(text_data, capsys, kind):
    checksum(text_data, "b")
    # one letter for another; an index that agrees with itself
    patch(text_data / "b.bin", 2, b"\x42") if kind == "bin" else set_length(text_data, 7)
    _, (fault,), error = run(capsys, "verify", text_data)
    assert f"b.{kind}: not the file whose sha256 was written down" in fault
    assert error == f"{text_data}/mixture.csv: 1 faults"


def set_length(folder, length):
    """An index that agrees with itself: document 1 has this length, document 2 the rest of both."""
    lengths = np.fromfile(folder / "b.idx", np.int32, 3, offset=34)
    lengths[1:] = length, lengths[1] + lengths[2] - length
    patch(folder / "b.idx", 34, lengths.tobytes())
    patch(folder / "b.idx", 34 + 4 * 5 + 16, struct.pack("<q", 2 * int(lengths[:2].sum())))


def test_every_id_past_the_vocabulary_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 64)
    ids = np.random.default_rng(0).integers(0, 97, 1000)
    ids[[40, 41, 900]] = 97, 200, 98
    with StreamWriter(tmp_path / "s", 97) as stream:
        for part in np.split(ids, 100):
            stream.add(part)
    seen = []
    (fault,) = inspection.verify(TokenStream(tmp_path / "s"), 97, seen.append)
    assert "3 ids are past the vocabulary of 97, first token 40 with id 97" in fault
    assert sum(seen) == 2000 and len(seen) > 30


def test_an_index_is_checked_across_its_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 8)
    with StreamWriter(tmp_path / "s", 97) as stream:
        for k in range(50):
            stream.add(np.full(k % 4, 3))
    assert list(Index(TokenStream(tmp_path / "s")).faults()) == []
    for at, said in ((34 + 4 * 50 + 8 * 16, "sequence 16 does"), (34 + 12 * 50 + 56, "boundaries")):
        whole = (tmp_path / "s.idx").read_bytes()
        patch(tmp_path / "s.idx", at, struct.pack("<q", 49))
        (fault,) = Index(TokenStream(tmp_path / "s")).faults()
        assert said in fault
        (tmp_path / "s.idx").write_bytes(whole)


# --- count, and what all share


def test_counts(text_data, capsys):
    out, _, _ = run(capsys, "count", text_data)
    tokens = sum(len(text.encode()) + 2 for text in TEXTS)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    mean = f"{tokens / 5:,.1f}"
    assert rows["a"] == rows["b"] == ["5", f"{tokens}", mean]
    assert rows["all"] == ["10", f"{2 * tokens}", mean]


@pytest.mark.parametrize("command", ["show", "verify", "count"])
def test_missing_files_are_named_and_partial_does_without(text_data, capsys, command):
    args = ["--sample", "1", "--seq_len", "5"] if command == "show" else []
    os.remove(text_data / "b.bin")
    _, _, error = run(capsys, command, text_data, *args)
    assert "b.bin: no such file" in error and "\n" not in error
    out, _, error = run(capsys, command, text_data, *args, "--partial")
    assert error is None
    assert command == "show" or "without files: b" in out


def test_a_vocabulary_that_is_not_there(text_data, capsys):
    os.remove(text_data / "ranks.tiktoken")
    _, _, error = run(capsys, "verify", text_data)
    assert "ranks.tiktoken" in error and "\n" not in error
