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


@pytest.mark.parametrize("name", ["pretraining", "pretraining_by_year", "extension"])
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
        ("pretraining_by_year", main, [*columns, "weight"]),
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
    rows = ["a,a,1,5,fr-en,aligned", "b,b,3,5,en,web", "c,c,4,123,,", "d,d,2,,fr,web"]
    path = write(tiny_data, "\n".join(["name,path,weight,tokens,language,category", *rows]))
    (tiny_data / "c.idx").write_bytes((tiny_data / "a.idx").read_bytes())  # half a stream is none
    a, b = (stream.tokens for stream in Mixture(tiny_data / "mixture.csv", 7, 42, 97).streams)
    sources = read_sources(path, samples=100)
    assert [s.tokens for s in sources] == [a, b, 123, None]
    assert [s.on_disk for s in sources] == [True, True, False, False]
    assert [s.weight for s in sources] == [0.1, 0.3, 0.4, 0.2]
    assert [s.epochs(7) is None for s in sources] == [False] * 3 + [True]
    # Parallel texts are a language of their own; the largest comes first, one alone is unknown.
    after = {"unknown": 0.4, "en": 0.3, "fr": 0.2, "parallel": 0.1}
    found = shares(sources, "language")
    assert list(found.items()) == [(kind, (None, share)) for kind, share in after.items()]
    lines, _, _ = run(capsys, "shares", path, "--samples", 100)
    assert "without files, 2 of 4: c, d" in lines
    assert "of unknown size (no files, no column tokens): d" in lines
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
    error = run(capsys, "shares", write(tmp_path, "name,path,epochs\na,a,3\n"))[2]
    assert "the weight of a follows from its epochs" in error
    error = run(capsys, "shares", write(tmp_path, "name,path,weight,tokens\na,a,1,many\n"))[2]
    assert "'many' tokens" in error


def test_the_charts(tmp_path, capsys):
    imread = pytest.importorskip("matplotlib.image").imread
    png = tmp_path / "new/chart.png"
    run(capsys, "shares", "data/mixtures/pretraining.csv", "--png", png)
    image = imread(png)[..., :3]
    # In the first pie, left of its legend, the largest slice is blue: English.
    blue = (abs(image - (0.122, 0.467, 0.706)).max(axis=-1) < 0.02)[:, :520].sum()
    disc = (image.min(axis=-1) < 0.99)[:, :520].sum()
    assert blue / disc == pytest.approx(0.332, abs=0.02)


# --- samples and streams

TEXTS = ["Un deux trois.", "été à Noël", "x = 1\n", "a longer document of many words, " * 9, "fin"]


@pytest.fixture
def texts(tmp_path):
    """A folder with a vocabulary of bytes, two streams of text in it, and files of text."""
    tokenizer.save({bytes([k]): k + 4 for k in range(256)}, tmp_path / "ranks.tiktoken")
    encoder = tokenizer.load(tmp_path / "ranks.tiktoken")
    for name, documents in (("a", TEXTS), ("b", TEXTS[::-1])):
        write_stream(tmp_path / name, map(encoder.encode_document, documents), 260)
    write_weights(tmp_path / "mixture.csv", {"a": 0.7, "b": 0.3})
    with gzip.open(tmp_path / "fr.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[1::3])
    (tmp_path / "a.py").write_text(TEXTS[2])
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
        (lambda d: patch(d / "b.idx", 34 + 12 * 5 + 40, struct.pack("<q", 6)), "boundaries do not"),
        (lambda d: open(d / "b.idx", "ab").write(b"x"), "where its header says"),
        (lambda d: open(d / "b.bin", "ab").write(b"xx"), "where its index says"),
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
    assert error == f"{texts}/mixture.csv: {len(faults)} fault{'s' * (len(faults) > 1)}"


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


def test_a_vocabulary_of_bytes_has_one_byte_a_token(texts, capsys):
    args = ["--texts", f"fr={texts}/fr.jsonl.gz", f"code={texts}/*.py"]
    args += ["--tokenizers", f"bytes={texts}/ranks.tiktoken"]
    lines, _, _ = run(capsys, "compare", *args)
    # 14 + 3 bytes in 3 + 1 words; 6 in 3
    assert lines[1].split() == ["bytes", "fr", "0.00", "4.250", "1.000"]
    assert lines[2].split() == ["bytes", "code", "0.00", "2.000", "1.000"]
    lines, _, _ = run(capsys, "compare", *args, "--megabytes", 14e-6)  # the first document alone
    assert lines[1].split() == ["bytes", "fr", "0.00", "4.667", "1.000"]


def test_tiktokens_own(monkeypatch):
    import tiktoken

    # A failed download raises an OSError, too.
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("/none/there"))
    with pytest.raises(DataError, match="tiktoken:gpt2: not cached"):
        token_counter("tiktoken:gpt2")
    letters = {bytes([k]): k for k in range(256)}
    encoding = tiktoken.Encoding(
        "letters", pat_str=".", mergeable_ranks=letters, special_tokens={"<|x|>": 256}
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
    "named, tokenizers, options, said",
    [
        ("fr=none.txt", "{0}/ranks.tiktoken", [], "none.txt: no such file"),
        ("fr=", "{0}/ranks.tiktoken", [], "fr=: write --texts NAME=PATH"),
        ("{0}/a.py", "tiktoken:gpt", [], "tiktoken:gpt: there is gpt2"),
        ("{0}/empty.txt", "{0}/ranks.tiktoken", [], "empty.txt: no words"),
        ("{0}/a.py", "{0}/ranks.tiktoken", ["--tokenizers", "x=1", "x=2"], "a name of its own"),
        ("{0}/a.py", "{0}/ranks.tiktoken", ["--megabytes=0"], "--megabytes must be over 0"),
        # tiktoken's regex has no stack for a million spaces in a row.
        ("code={0}/long.jsonl", "b={0}/ranks.tiktoken", [], "code: b cannot tokenize it"),
    ],
)
def test_what_cannot_be_compared_is_named(texts, capsys, named, tokenizers, options, said):
    (texts / "long.jsonl").write_text(json.dumps({"text": "code" + " " * 1_100_000 + "x"}))
    (texts / "empty.txt").write_text(" \n")
    given = ["--texts", named.format(texts), "--tokenizers", tokenizers.format(texts)]
    _, _, error = run(capsys, "compare", *given, *options)
    assert said in error
