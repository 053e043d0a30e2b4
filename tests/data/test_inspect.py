"""What the commands print, against published figures, counting, and files changed in every way."""

import csv
import hashlib
import json
import math
import os
import struct
from collections import Counter

import numpy as np
import pytest
from conftest import SHARED, needs_shared, write_stream, write_weights

from config.cli import ConfigError
from data import inspect, tokenizer
from data.dataset import DataError, Mixture
from data.inspect import read_sources, shares


def run(capsys, *args):
    """(lines of stdout, lines of stderr but for progress bars, the error raised or None)"""
    error = None
    try:
        inspect.main(list(map(str, args)))
    except (ConfigError, DataError) as raised:
        error = str(raised)
        assert "\n" not in error
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return out.splitlines(), [x for x in lines if x.strip() and "B/s]" not in x], error


# --- shares

MODEL_CARD = {
    "en": "33.2", "fr": "32.4", "de": "6.9", "es": "6.6", "it": "3.8", "parallel": "2.5",
    "code": "14.7",
}  # fmt: skip


def rows_of(path):
    """{name: row}"""
    with open(path, encoding="utf-8", newline="") as f:
        return {row["name"]: row for row in csv.DictReader(f)}


@pytest.mark.parametrize("name", ["pretraining", "extension"])
def test_shares_by_language_are_the_model_cards_to_the_printed_digit(name, capsys):
    lines, _, _ = run(capsys, "shares", f"data/mixtures/{name}.csv")
    printed = {line.split()[0]: line.split()[-2] for line in lines if line.endswith(" %")}
    assert MODEL_CARD.items() <= printed.items()


@needs_shared
def test_the_published_columns_are_in_the_mixtures():
    folder, columns = SHARED / "lucie", ["language", "category", "tokens", "documents", "epochs"]
    parts = {
        f"{name}--{kind}": row
        for kind in ("long", "short")
        for name, row in rows_of(folder / f"mixture_documents_{kind}.csv").items()
    }
    main = rows_of(folder / "mixture_pretraining.csv")
    for mixture, theirs, of_both in (
        ("pretraining", main, [*columns, "weight"]),
        ("extension", parts, columns),
        ("annealing", rows_of(folder / "mixture_annealing.csv"), ["weight"]),
    ):
        ours = rows_of(f"data/mixtures/{mixture}.csv")
        assert ours.keys() == theirs.keys()
        for name, row in ours.items():
            assert [row[c] for c in of_both] == [theirs[name][c] for c in of_both]


def write(folder, text):
    (folder / "m.csv").write_text(text)
    return folder / "m.csv"


def test_a_run_by_arithmetic_is_the_run_counted(tiny_data):
    for name in ("c", "d"):
        write_stream(tiny_data / name, [np.zeros(100)], 97)
    path = write(tiny_data, "name,path,weight\na,a,1\nb,b,2\nc,c,3\nd,d,2\n")
    mixture = Mixture(path, 7, 42, 97)
    for n in (1, 2, 999, 1000):
        seen = Counter(mixture.locate(i).source for i in range(n))
        found = [source.samples for source in read_sources(path, samples=n)]
        assert found == [seen[k] for k in range(4)]
    assert found == [125, 250, 375, 250]


def test_sizes_are_those_of_the_streams_and_else_of_the_csv(tiny_data, capsys):
    rows = ["a,a,1,5,fr-en,aligned", "b,b,3,5,en,web", "c,c,4,123,,", "d,d,2,,fr,web"]
    path = write(tiny_data, "\n".join(["name,path,weight,tokens,language,category", *rows]))
    (tiny_data / "c.idx").write_bytes((tiny_data / "a.idx").read_bytes())  # half a stream is none
    a, b = (stream.tokens for stream in Mixture(tiny_data / "mixture.csv", 7, 42, 97).streams)
    sources = read_sources(path, samples=100)
    assert [s.tokens for s in sources] == [a, b, 123, None]
    assert [s.on_disk for s in sources] == [True, True, False, False]
    assert [s.weight for s in sources] == [0.1, 0.3, 0.4, 0.2]
    assert [math.isnan(s.epochs(7)) for s in sources] == [False] * 3 + [True]
    # Parallel texts are a language of their own; the largest comes first.
    after = {"unknown": 0.4, "en": 0.3, "fr": 0.2, "parallel": 0.1}
    found = shares(sources, "language")
    assert list(found.items()) == [(kind, (None, share)) for kind, share in after.items()]
    lines, _, _ = run(capsys, "shares", path, "--samples", 100)
    assert [line.split()[0] for line in lines if line.endswith("missing")] == ["c", "d"]
    assert lines[-1].startswith("2 sources lack files")
    left = read_sources(path, partial=True)
    assert [(s.name, s.weight) for s in left] == [("a", 0.25), ("b", 0.75)]
    before = {"en": (b / (a + b), 0.75), "parallel": (a / (a + b), 0.25)}
    assert shares(left, "language") == before


def test_epochs_of_sources_that_are_not_there_are_weights(tmp_path, capsys):
    path = write(tmp_path, "name,path,epochs,tokens\na,a,3,1000\nb,b,4.01,2000\n")
    sources = read_sources(path, samples=1102)
    assert [source.samples for source in sources] == [300, 802]
    assert [source.epochs(10) for source in sources] == [3, 4.01]
    lines, _, _ = run(capsys, "shares", path, "--samples", 1102, "--seq_len", 10)
    assert [x for x in lines if "warning" in x] == ["warning: b is seen 4.0 times"]
    for rows in ("name,path,epochs\na,a,3\n", "name,path,weight,tokens\na,a,1,many\n"):
        assert "in the column tokens is not" in run(capsys, "shares", write(tmp_path, rows))[2]


def test_the_chart(tmp_path, capsys):
    imread = pytest.importorskip("matplotlib.image").imread
    png = tmp_path / "new/chart.png"
    run(capsys, "shares", "data/mixtures/pretraining.csv", "--png", png)
    image = imread(png)[..., :3]
    # Left, by language: the longest blue bar is English after upsampling, the longest grey one
    # French before it.
    longest = []
    for color in ((0, 0x72, 0xB2), (0xA6, 0xA6, 0xA6)):
        bars = abs(255 * image[:560, : image.shape[1] // 2] - color).max(axis=-1) < 3
        longest.append(bars.sum(axis=1).max())
    assert longest[0] / longest[1] == pytest.approx(33.2 / 40.3, abs=0.02)


# --- samples and streams

TEXTS = ["Un deux trois.", "été à Noël", "x = 1\n", "a longer document of many words, " * 9, "fin"]


@pytest.fixture
def texts(tmp_path):
    """A folder with a vocabulary of bytes, and two streams of text in it."""
    tokenizer.save({bytes([k]): k + 4 for k in range(256)}, tmp_path / "ranks.tiktoken")
    encoder = tokenizer.load(tmp_path / "ranks.tiktoken")
    for name, documents in (("a", TEXTS), ("b", TEXTS[::-1])):
        write_stream(tmp_path / name, map(encoder.encode_document, documents), 260)
    write_weights(tmp_path / "mixture.csv", {"a": 0.7, "b": 0.3})
    return tmp_path


def command_on(folder, command, *args):
    extra = () if command == "count" else ("--tokenizer", folder / "ranks.tiktoken")
    extra += ("--number", 3, "--seq_len", 20) if command == "sample" else ()
    return (command, folder / "mixture.csv", *extra, *args)


def test_a_sample_is_shown_as_text_with_its_place(texts, capsys):
    # 14 letters, <s> and </s>: a sample of 20 and its last target begin the second document.
    mixture = Mixture(texts / "mixture.csv", 20, 43, 260)
    i = next(i for i in range(500) if mixture.locate(i)[::2] == (0, 0))
    lines, _, _ = run(capsys, *command_on(texts, "sample", "--number", i, "--seed", 43))
    assert f"sample {i}: a, epoch {mixture.locate(i).epoch}, its sample 0 of" in lines[0]
    assert "a.bin, tokens 0 to 20 of" in lines[1]
    assert lines[3:] == ["<s>Un deux trois.</s><s>ét\ufffd"]  # half of the second é


def note_checksums(folder, name, report, **wrong):
    contents = {kind: (folder / f"{name}.{kind}").read_bytes() for kind in ("bin", "idx")}
    digests = {kind: hashlib.sha256(content).hexdigest() for kind, content in contents.items()}
    (folder / report).write_text(json.dumps({"streams": {name: {"sha256": digests | wrong}}}))


def test_whole_streams_are_whole(texts, capsys):
    for suffix in ("bin", "idx"):
        os.rename(texts / f"b.{suffix}", texts / f"b.long.valid.{suffix}")
    write_weights(texts / "mixture.csv", {"a": 1, "b.long.valid": 1})
    # One report has the checksums of all streams of a command.
    note_checksums(texts, "b.long.valid", "b.json")
    (texts / "b.long.json").write_text('{"streams": {"b.long": {}}}')  # of another command
    lines, faults, error = run(capsys, *command_on(texts, "verify"))
    assert not faults and error is None
    a, b = [line for line in lines if "whole" in line]
    assert a.startswith("a: whole, 5 documents,") and a.endswith("no sha256 to compare")
    assert b.startswith("b.long.valid: whole") and b.endswith("sha256 as written down")


def patch(path, at, content):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(content)


@pytest.mark.parametrize(
    "change, said",
    [
        # The ids are those of 256 bytes and 4 special tokens.
        (lambda d: patch(d / "b.bin", 20, struct.pack("<H", 260)), "first token 10 with id 260"),
        (lambda d: patch(d / "b.idx", 34, struct.pack("<i", 4)), "sequence 1 does not follow"),
        (lambda d: patch(d / "b.idx", 34 + 12 * 5 + 40, struct.pack("<q", 6)), "boundaries do not"),
        (lambda d: open(d / "b.idx", "ab").write(b"x"), "where its header says"),
        (lambda d: open(d / "b.bin", "ab").write(b"xx"), "where its index says"),
        (lambda d: note_checksums(d, "b", "b.json", bin="0"), "b.bin: not the file whose sha256"),
        (lambda d: note_checksums(d, "b", "b.json", idx="0"), "b.idx: not the file whose sha256"),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_still_checked(texts, capsys, change, said):
    change(texts)
    lines, faults, error = run(capsys, *command_on(texts, "verify"))
    assert any(x.startswith("a: whole") for x in lines)
    assert not any(x.startswith("b: whole") for x in lines)
    assert faults[0].startswith("b: ") and said in faults[0]
    assert error == f"{texts}/mixture.csv: {len(faults)} fault{'s' * (len(faults) > 1)}"


def test_documents_and_tokens_are_counted(texts, capsys):
    lines, _, _ = run(capsys, *command_on(texts, "count"))
    tokens = sum(len(text.encode()) + 2 for text in TEXTS)
    assert lines == [f"{name}: documents 5, tokens {tokens}" for name in "ab"]


def test_missing_files_are_named_and_partial_does_without(texts, capsys):
    os.remove(texts / "b.bin")
    _, _, error = run(capsys, *command_on(texts, "verify"))
    assert "mixture.csv: 1 of 2 sources lack files: b" in error
    lines, _, error = run(capsys, *command_on(texts, "verify", "--partial"))
    assert error is None and "without files: b" in lines
