"""What the commands print, against published figures, counting, and files changed in every way."""

import csv
import gzip
import hashlib
import json
import os
import struct
from collections import Counter

import numpy as np
import pytest
from conftest import SHARED, needs_shared, write_stream, write_weights

from config.cli import ConfigError
from data import inspect, tokenizer
from data.dataset import DataError, Mixture, TokenStream
from data.inspect import index_faults, read_sources, shares, token_counter


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


def published(name):
    return rows_of(SHARED / f"lucie/{name}.csv")


@pytest.mark.parametrize("name", ["pretraining", "pretraining_by_year", "extension"])
def test_shares_by_language_are_the_model_cards_to_the_printed_digit(name, capsys):
    lines, _, _ = run(capsys, "shares", f"data/mixtures/{name}.csv")
    printed = {line.split()[0]: line.split()[-2] for line in lines if line.endswith(" %")}
    assert MODEL_CARD.items() <= printed.items()


@needs_shared
def test_the_published_columns_are_in_the_mixtures():
    columns = ["language", "category", "tokens", "documents", "epochs"]
    main, annealing = published("mixture_pretraining"), published("mixture_annealing")
    parts = {
        f"{name}--{kind}": row
        for kind in ("long", "short")
        for name, row in published(f"mixture_documents_{kind}").items()
    }
    for mixture, theirs, of_both in (
        ("pretraining", main, [*columns, "weight"]),
        ("pretraining_by_year", main, [*columns, "weight"]),
        ("extension", parts, columns),
        ("annealing", annealing, ["weight"]),
    ):
        ours = rows_of(f"data/mixtures/{mixture}.csv")
        assert ours.keys() == theirs.keys()
        for name, row in ours.items():
            assert [row[c] for c in of_both] == [theirs[name][c] for c in of_both]


@needs_shared
@pytest.mark.parametrize("name", ["pretraining", "pretraining_by_year"])
def test_the_full_run_sees_each_source_its_published_epochs(name):
    """Within 0.1 % of them, or within the one sample that cannot be cut."""
    sources = read_sources(f"data/mixtures/{name}.csv", samples=762_144_586)
    rows = published("mixture_pretraining")
    assert sum(source.samples for source in sources) == 762_144_586
    for source in sources:
        epochs = float(rows[source.name]["epochs"])
        samples = epochs * source.tokens / 4096
        assert source.samples == pytest.approx(samples, abs=1)
        if samples >= 500:
            assert source.epochs(4096) == pytest.approx(epochs, rel=1e-3)


def write(folder, text):
    (folder / "m.csv").write_text(text)
    return folder / "m.csv"


def test_a_run_by_arithmetic_is_the_run_counted(tiny_data, capsys):
    for name in ("c", "d"):
        write_stream(tiny_data / name, [np.zeros(100)], 97)
    path = write(tiny_data, "name,path,weight,series\na,a,1,x\nb,b,2,\nc,c,3,x\nd,d,2,y\n")
    for n in (1, 2, 999, 1000):
        mixture = Mixture(path, 7, 42, 97, samples=n)
        seen = Counter(mixture.locate(i).source for i in range(n))
        found = [source.samples for source in read_sources(path, samples=n)]
        assert found == [seen[k] for k in range(4)]
    assert found == [125, 250, 375, 250]
    lines, _, _ = run(capsys, "shares", path)
    assert [line for line in lines if line.startswith("one after")] == ["one after the other: a, c"]


def test_sizes_are_those_of_the_streams_and_else_of_the_csv(tiny_data, capsys):
    path = write(tiny_data, "name,path,weight,tokens\na,a,1,5\nb,b,1,5\nc,c,2,123\nd,d,1,\n")
    (tiny_data / "c.idx").write_bytes((tiny_data / "a.idx").read_bytes())  # half a stream is none
    streams = Mixture(tiny_data / "mixture.csv", 7, 42, 97).streams
    sources = read_sources(path, samples=100)
    assert [s.tokens for s in sources] == [*(stream.tokens for stream in streams), 123, None]
    assert [s.on_disk for s in sources] == [True, True, False, False]
    assert [s.weight for s in sources] == [0.2, 0.2, 0.4, 0.2]
    assert [s.epochs(7) is None for s in sources] == [False] * 3 + [True]
    assert shares(sources, "language") == {"unknown": (None, 1)}
    lines, _, _ = run(capsys, "shares", path, "--samples", 100)
    assert "without files, 2 of 4: c, d" in lines
    assert "of unknown size (no files, no column tokens): d" in lines
    left = read_sources(path, partial=True)
    assert [(s.name, s.weight) for s in left] == [("a", 0.5), ("b", 0.5)]


def test_epochs_of_sources_that_are_not_there_are_weights(tmp_path, capsys):
    path = write(tmp_path, "name,path,epochs,tokens\na,a,3,1000\nb,b,4.01,2000\n")
    sources = read_sources(path, samples=1102)
    assert [source.samples for source in sources] == [300, 802]
    assert [source.epochs(10) for source in sources] == [3, 4.01]
    lines, _, _ = run(capsys, "shares", path, "--samples", 1102, "--seq_len", 10)
    assert [x for x in lines if "warning" in x] == ["warning: b is seen 4.0 times"]


def test_parallel_texts_are_a_language_of_their_own(tmp_path):
    text = "name,path,weight,language,category,tokens\n"
    text += "a,a,1,fr-en,aligned,5\nb,b,3,en,web,15\nc,c,4,,,0\n"
    found = shares(read_sources(write(tmp_path, text)), "language")
    expected = {"unknown": (0, 0.5), "en": (0.75, 0.375), "parallel": (0.25, 0.125)}
    assert list(found.items()) == list(expected.items())  # the largest first


def test_the_charts(tmp_path, capsys):
    imread = pytest.importorskip("matplotlib.image").imread
    png = tmp_path / "new/chart.png"
    run(capsys, "shares", "data/mixtures/pretraining.csv", "--png", png)
    image = imread(png)[..., :3]
    # In the first pie, left of its legend, the largest slice is blue: English.
    blue = (abs(image - (0.122, 0.467, 0.706)).max(axis=-1) < 0.02)[:, :520].sum()
    disc = (image.min(axis=-1) < 0.99)[:, :520].sum()
    assert blue / disc == pytest.approx(0.332, abs=0.02)


@pytest.mark.parametrize(
    "text, said",
    [
        ("name,path,weight,tokens\na,a,1,many\n", "'many' tokens"),
        ("name,path,epochs\na,a,3\n", "the weight of a follows from its epochs"),
    ],
)
def test_shares_that_cannot_be_computed(tmp_path, capsys, text, said):
    _, _, error = run(capsys, "shares", write(tmp_path, text))
    assert said in error


# --- samples and streams

TEXTS = ["Un deux trois.", "été à Noël", "x = 1\n", "a longer document of many words, " * 9, "fin"]


@pytest.fixture
def texts(tmp_path):
    """A folder with two streams of text in a vocabulary of bytes, and its ranks file."""
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
    digests = {
        kind: hashlib.sha256((folder / f"{name}.{kind}").read_bytes()).hexdigest()
        for kind in ("bin", "idx")
    }
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
        (lambda d: patch(d / "b.idx", 34 + 4 * 5 + 16, struct.pack("<q", 3)), "sequence 2 does"),
        (lambda d: patch(d / "b.idx", 34 + 12 * 5 + 8, struct.pack("<q", 4)), "boundaries do not"),
        (lambda d: patch(d / "b.idx", 34 + 12 * 5 + 40, struct.pack("<q", 6)), "boundaries do not"),
        (lambda d: open(d / "b.idx", "ab").write(b"x"), "where its header says"),
        (lambda d: open(d / "b.bin", "ab").write(b"xx"), "where its index says"),
        (lambda d: os.truncate(d / "b.bin", 50), "truncated, 50 bytes"),
        (lambda d: (d / "b.json").write_text('{"streams": {"b": {}}}'), "with sha256 of bin, idx"),
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
    assert error == f"{texts}/mixture.csv: {len(faults)} faults"


def test_streams_are_checked_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "CHUNK", 8)
    ids = np.random.default_rng(0).integers(0, 97, 1000)
    ids[[40, 41, 890]] = 97, 200, 98
    lengths = [k % 4 for k in range(600)]
    write_stream(tmp_path / "s", np.split(ids, np.cumsum(lengths))[:600], 97)
    stream, seen = TokenStream(tmp_path / "s"), []
    (fault,) = inspect.verify(stream, 97, seen.append)
    assert "3 ids are past the vocabulary of 97, first token 40 with id 97" in fault
    assert sum(seen) == 2 * sum(lengths) and len(seen) > 30
    boundary_8, offset_16 = 34 + 12 * 600 + 8 * 8, 34 + 4 * 600 + 8 * 16  # each begins a chunk
    for place, said in ((boundary_8, "boundaries do"), (offset_16, "sequence 16 does")):
        patch(tmp_path / "s.idx", place, struct.pack("<q", 6))
        (fault,) = index_faults(stream)
        assert said in fault
    stream.idx = "memory://s.idx"
    with pytest.raises(DataError, match="verify reads files on this machine only"):
        inspect.verify(stream, 97, seen.append)


def test_documents_and_tokens_are_counted(texts, capsys):
    lines, _, _ = run(capsys, *command_on(texts, "count"))
    tokens = sum(len(text.encode()) + 2 for text in TEXTS)
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["a"] == rows["b"] == ["5", f"{tokens}", f"{tokens / 5:,.1f}"]
    assert rows["all"] == ["10", f"{2 * tokens}", f"{tokens / 5:,.1f}"]


@pytest.mark.parametrize("command", ["sample", "verify", "count"])
def test_missing_files_are_named_and_partial_does_without(texts, capsys, command):
    os.remove(texts / "b.bin")
    _, _, error = run(capsys, *command_on(texts, command))
    assert "b.bin: no such file" in error
    lines, _, error = run(capsys, *command_on(texts, command, "--partial"))
    assert error is None and (command == "sample" or "without files: b" in lines)


# --- tokenizers


@pytest.fixture
def compared(tmp_path):
    """A vocabulary of bytes; two documents in French, one of code."""
    tokenizer.save({bytes([k]): k + 4 for k in range(256)}, tmp_path / "bytes.tiktoken")
    with gzip.open(tmp_path / "fr.jsonl.gz", "wt", encoding="utf-8") as f:
        for text in ("Un été à Noël.", "un deux trois"):
            f.write(json.dumps({"text": text}) + "\n")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "code" + " " * 1_100_000 + "x"}))
    (tmp_path / "empty.txt").write_text(" \n")
    return tmp_path


def test_a_vocabulary_of_bytes_has_one_byte_a_token(compared, capsys):
    args = ["--texts", f"fr={compared}/fr.jsonl.gz", f"code={compared}/*.py"]
    args += ["--tokenizers", f"bytes={compared}/bytes.tiktoken"]
    lines, _, _ = run(capsys, "compare", *args)
    # 18 + 13 bytes in 4 + 3 words; 6 in 3
    assert lines[1].split() == ["bytes", "fr", "0.00", "4.429", "1.000"]
    assert lines[2].split() == ["bytes", "code", "0.00", "2.000", "1.000"]
    lines, _, _ = run(capsys, "compare", *args, "--megabytes", 18e-6)  # the first document alone
    assert lines[1].split() == ["bytes", "fr", "0.00", "4.500", "1.000"]


def test_tiktokens_own(monkeypatch):
    import tiktoken

    # A failed download raises an OSError, too.
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("/none/there"))
    with pytest.raises(DataError, match="tiktoken:gpt2: not cached"):
        token_counter("tiktoken:gpt2")
    letters = {bytes([k]): k for k in range(256)} | {b"<|end|>": 256}
    encoding = tiktoken.Encoding(
        "letters", pat_str=".", mergeable_ranks=letters, special_tokens={"<|x|>": 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    assert token_counter("tiktoken:gpt2")("é<|x|>") == 7  # it is text, not a special token


def test_a_tokenizer_that_is_not_ours_counts_clean_texts(tmp_path, capsys):
    """It takes no halves of UTF-16 pairs, and would add special tokens and cut long texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    foreign = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.post_processor = processors.TemplateProcessing("a $A b", None, [("a", 0), ("b", 1)])
    foreign.enable_truncation(2)
    foreign.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(r'{"text": "", "body": "a\ud83d\ude42 \ud800\u0000"}')
    args = ["--texts", f"x={tmp_path}/a.jsonl", "--text_field=body", f"--tokenizers=w={tmp_path}"]
    lines, _, _ = run(capsys, "compare", *args)
    # a, an emoji of four bytes, a space, U+FFFD of three: 9 bytes, 2 words, 3 tokens
    assert lines[1].split() == ["w", "x", "0.00", "1.500", "3.000"]
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer.json: not the tokenizer.json of a BPE" in run(capsys, "compare", *args)[2]


@pytest.mark.parametrize(
    "texts, tokenizers, options, said",
    [
        ("fr=none.txt", "{0}/bytes.tiktoken", [], "none.txt: no such file"),
        ("fr=", "{0}/bytes.tiktoken", [], "fr=: write --texts NAME=PATH"),
        ("{0}/a.py", "tiktoken:gpt", [], "tiktoken:gpt: there is gpt2"),
        ("{0}/empty.txt", "{0}/bytes.tiktoken", [], "empty.txt: no words"),
        ("{0}/a.py", "{0}/bytes.tiktoken", ["--tokenizers", "x=1", "x=2"], "a name of its own"),
        ("{0}/a.py", "{0}/bytes.tiktoken", ["--megabytes=0"], "--megabytes must be over 0"),
        # tiktoken's regex has no stack for a million spaces in a row.
        ("code={0}/long.jsonl", "b={0}/bytes.tiktoken", [], "code: b cannot cut it"),
    ],
)
def test_what_cannot_be_compared_is_named(compared, capsys, texts, tokenizers, options, said):
    given = ["--texts", texts.format(compared), "--tokenizers", tokenizers.format(compared)]
    _, _, error = run(capsys, "compare", *given, *options)
    assert said in error
