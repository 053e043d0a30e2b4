"""Streams decoded by hand, however the run that wrote them was interrupted."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from text_cases import lucie_json

import config.cli
from config.cli import lock
from data import files as reading
from data import streams, tokenizer
from data.dataset import DataError
from data.files import find_files
from data.streams import Due, Options, clean, tokenize
from data.tokenizer import ByteLevelBPE, LucieBPE, Tokenizer

zstd = reading.zstd or pytest.skip("needs backports.zstd", allow_module_level=True)

RANKS = {bytes([b]): b + 4 for b in range(256)}
OURS = Tokenizer(ByteLevelBPE(RANKS))
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}


def documents_of(path, code="H"):
    """The documents of a stream, by the description of Megatron's format."""
    index, tokens = (Path(f"{path}.{suffix}").read_bytes() for suffix in ("idx", "bin"))
    *head, count, boundaries = struct.unpack_from("<9sQBQQ", index)
    assert head == [b"MMIDIDX\0\0", 1, {"H": 8, "i": 4}[code]] and boundaries == count + 1
    values = struct.unpack(f"<{count}i{count}q{boundaries}q", index[34:])
    lengths, offsets = values[:count], values[count : 2 * count]
    assert values[2 * count :] == tuple(range(boundaries))
    assert len(tokens) == struct.calcsize(f"<{code}") * sum(lengths)
    return [list(struct.unpack_from(f"<{n}{code}", tokens, o)) for n, o in zip(lengths, offsets)]


def texts_of(path):
    return [bytes(t - 4 for t in document[1:-1]).decode() for document in documents_of(path)]


def json_lines(texts, **fields):
    return "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def run(inputs, out, on_error="stop", processes=1, overwrite=False, **options):
    """tokenize, and that all that is read is written or left out for a reason."""
    files = find_files(inputs if isinstance(inputs, list) else [inputs])
    report = tokenize(files, OURS, out, Options(**options), processes, on_error, overwrite)
    assert report["documents_in"] == report["documents"] + sum(report["left_out"].values())
    if report["held_out"] == "whole documents":
        assert report["documents"] == sum(s["documents"] for s in report["streams"].values())
    assert len(report["errors"]) == min(100, report["left_out"]["error"])
    return report


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def files_of(out):
    """The results of a run, {name: bytes}; a run that has ended leaves nothing else."""
    names = [name for name in os.listdir(out.parent) if name.startswith(f"{out.name}.")]
    assert not [name for name in names if name.endswith(("unfinished", "tmp"))]
    return {name: (out.parent / name).read_bytes() for name in sorted(names)}


def test_a_document_is_bos_text_eos_and_the_report_counts_what_is_not_written(tmp_path):
    texts = ["Bonjour à tous.", "mot", "", "  ", "Zwei\r\0\nZeilen", "<s> is text", "mot", "m\0ot"]
    texts += ["e\u0301 e", "é e", "a", "b\ud800c", " \n\u00a0", "ab"]
    file = write(tmp_path / "t.jsonl", json_lines(texts) + b"{\n" * 250)
    report = run(file, tmp_path / "x", "skip")
    expected = ["Bonjour à tous.", "mot", "Zwei\nZeilen", "<s> is text", "mot", "mot"]
    expected += ["é e", "é e", "a", "b\ufffdc", "ab"]
    found = documents_of(tmp_path / "x")
    assert found == [[0, *(b + 4 for b in text.encode()), 1] for text in expected]
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "x.json").read_text())
    assert report["left_out"] == {"error": 250, "empty": 3}
    assert "line 114: not JSON" in report["errors"][99]
    described = {"split_by": {}, "held_out": False, "documents": 11}
    described |= {"bytes": len("".join(expected).encode()), "tokens": sum(map(len, found))}
    digests = {s: sha256((tmp_path / f"x.{s}").read_bytes()).hexdigest() for s in ("bin", "idx")}
    assert report["streams"] == {"x": described | {"sha256": digests}}
    assert files_of(tmp_path / "x").keys() == {"x.bin", "x.csv", "x.idx", "x.json"}


def test_end_tokens_in_texts_cut_no_document_whatever_is_indexed_at_once(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    large = ByteLevelBPE(RANKS | {pair: n for n, pair in enumerate(pairs, start=260)})
    lucie = LucieBPE(json.dumps(lucie_json()).encode())
    texts = [f"{n} </s> <s></s>" * (n % 5 + 1) for n in range(23)] + ["</s>"]
    file = write(tmp_path / "t.jsonl", json_lines(texts))
    cases = (OURS, "H", 1), (Tokenizer(lucie), "H", 23), (Tokenizer(large), "i", 7)
    for tokens, code, chunk in cases:
        monkeypatch.setattr(streams, "CHUNK", chunk)
        tokenize([file], tokens, tmp_path / f"{chunk}")
        documents = documents_of(tmp_path / f"{chunk}", code)
        assert [tokens.decode(d[1:-1], skip_special=False) for d in documents] == texts
        assert all((d[0], d[-1], min(d[1:-1]) > 3) == (0, 1, True) for d in documents)


def test_neither_the_bytes_nor_what_is_held_out_depend_on_how_it_is_read(tmp_path, monkeypatch):
    texts = [f"text number {n}" for n in range(2100)]
    for number in range(3):
        write(tmp_path / f"in/{number}.jsonl", json_lines(texts[number * 700 : number * 700 + 700]))
    write(tmp_path / "other.jsonl", json_lines(texts[::-3]))
    written, chosen = [], dict(validation=0.1, split_length=17)
    for processes, batch, save_every in ((1, 1 << 18, 5), (1, 3000, 0), (2, 20_000, 0)):
        monkeypatch.setattr(streams, "BATCH_BYTES", batch)
        monkeypatch.setattr(streams, "SAVE_EVERY", save_every)
        out = tmp_path / f"{processes}{batch}/x"
        assert run(tmp_path / "in", out, "stop", processes, **chosen)["held_out"][:5] == "whole"
        written.append(files_of(out))
    assert len(written[0]) == 11 and written[1] == written[0] and written[2] == written[0]
    train = texts_of(f"{out}.short") + texts_of(f"{out}.long")  # numbers under 1,000, and others
    valid = texts_of(f"{out}.short.valid") + texts_of(f"{out}.long.valid")
    # 210 within five standard deviations, of which one is (2100 * 0.1 * 0.9) ** 0.5.
    assert 141 < len(valid) < 279 and sorted(train + valid) == sorted(texts)
    assert train + valid == sorted(train, key=texts.index) + sorted(valid, key=texts.index)
    run(tmp_path / "other.jsonl", tmp_path / "y", validation=0.1)
    assert set(texts_of(tmp_path / "y.valid")) == set(valid) & set(texts[::-3])


def killed_at(moment, monkeypatch, *args, **options):
    """Whether run(...) reaches the change of a file that has this number, where it is killed.

    It runs in a fork of this process.
    """
    left = moment

    def counted(call, *args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)
        return call(*args, **kwargs)

    def counted_open(file, mode, *args):
        return open(file, mode, *args) if "r" in mode else counted(open, file, mode)

    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        for name in ("mkdir", "replace", "rmdir", "truncate", "unlink"):
            monkeypatch.setattr(os, name, partial(counted, getattr(os, name)))
        for module in (streams, config.cli):
            monkeypatch.setattr(module, "open", counted_open, raising=False)
        run(*args, **options)
    finally:
        os._exit(0)


def test_a_run_that_is_killed_at_any_write_goes_on(tmp_path, monkeypatch, capfd):
    """Old streams never mix with the new ones, and whichever command comes next ends as ever."""
    monkeypatch.setattr(streams, "SAVE_EVERY", 0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in "ab":
        write(tmp_path / f"in/{name}.jsonl", json_lines(f"{name} {n}" for n in range(20)))
    options = {"old": {}, "new": dict(validation=0.3, split_length=7)}
    expected, reached, moment = {}, True, 0
    for name in ("new", "old"):
        run(tmp_path / "in", tmp_path / "whole/x", overwrite=True, **options[name])
        expected[name] = files_of(tmp_path / "whole/x")
    write(tmp_path / "whole/x.unfinished/progress.json", '{"run": "unfinished"}')  # a third one
    write(tmp_path / "whole/x.unfinished/x.bin", "unfinished")
    while reached:
        moment += 1
        folders = {name: tmp_path / f"{moment}/{name}" for name in options}
        shutil.copytree(tmp_path / "whole", folders["new"])
        new = dict(overwrite=True, **options["new"])
        reached = killed_at(moment, monkeypatch, tmp_path / "in", folders["new"] / "x", **new)
        shutil.copytree(folders["new"], folders["old"])
        found = {file.name: file.read_bytes() for file in folders["new"].glob("x*.*[nx]")}
        for index in {"x.idx", "x.valid.idx"} & found.keys():
            pair = {name: found[name] for name in (index, index.replace("idx", "bin"))}
            assert any(pair.items() <= made.items() for made in expected.values()), moment
        for name, folder in folders.items():
            run(tmp_path / "in", folder / "x", overwrite=True, **options[name])
            # What the other run had begun may go on later.
            shutil.rmtree(folder / "x.unfinished", ignore_errors=True)
            # A stream that had its place may stay there, but in no report and in no mixture.
            assert files_of(folder / "x").items() >= expected[name].items(), (moment, name)
    assert moment > 30 and "input files are done; going on" in capfd.readouterr().err


def test_finished_files_are_not_read_again_and_other_inputs_are_refused(tmp_path, read, capsys):
    """The output lies among the inputs, and is not one of them."""
    inputs, out, language = tmp_path / "in", tmp_path / "in/x", dict(split_by=("language",))
    for name in "abc":
        write(inputs / f"{name}.jsonl", json_lines(["the same", f"of {name}"], language=name))
    write(inputs / "c.jsonl", (inputs / "c.jsonl").read_bytes() + b"{broken")

    def again(said, error=None, **options):
        read.clear()
        if error:
            with pytest.raises(DataError, match=error):
                run(inputs, out, **options)
        else:
            run(inputs, out, "skip", **options)
        assert said in capsys.readouterr().err
        return "".join(name[0] for name in read)

    def refused(error, **options):
        before = contents(inputs)
        assert again("", error, **options) == "" and contents(inputs) == before

    chosen = dict(validation=0.3)
    broken = r"c\.jsonl, line 3: not JSON.*--on_error skip"
    others = "other inputs or options: .*--overwrite"
    # First it is counted whether there are few documents.
    assert again("documents are few; the tail of each", broken, **chosen) == "abcabc"
    assert again("2 input files are done; going on", broken, **chosen) == "c"
    refused(f"holds an unfinished run of {others}", **language)
    whole = (inputs / "x.unfinished/x.bin").read_bytes()
    write(inputs / "x.unfinished/x.bin", whole[:1])
    refused(r"x\.bin: truncated; remove .*x\.unfinished$", **chosen)
    write(inputs / "x.unfinished/x.bin", whole)
    assert again("going on", **chosen) == "c"
    parts = zip(texts_of(out), texts_of(f"{out}.valid"), strict=True)
    expected = [text for name in "abc" for text in ("the same", f"of {name}")]
    assert ["".join(pair) for pair in parts] == expected
    assert again("already up to date", **chosen) == ""
    refused(f"was made from {others}", **language)
    os.utime(inputs / "a.jsonl", (1, 1))
    refused(f"was made from {others}", **chosen)
    assert again("", broken, overwrite=True, **language) == "abc"
    again("", overwrite=True, **language)
    assert set(files_of(out)).isdisjoint({"x.bin", "x.valid.bin", "x.valid.csv"})
    again("", overwrite=True)
    assert files_of(out).keys() == {"x.bin", "x.csv", "x.idx", "x.json"}


def test_what_is_of_others_or_being_written_is_left_alone(tmp_path):
    out, file = tmp_path / "x", write(tmp_path / "t.jsonl", '{"text": "a", "split": "train"}')
    for name in ("x.json", "x.bin"):
        other = write(tmp_path / name, '[{"text": "hello"}]')
        with pytest.raises(DataError, match=rf"{name}: was made from"):
            run([file, other], out)
        assert other.read_bytes() == b'[{"text": "hello"}]'
        other.unlink()
    run(file, tmp_path / "x.train")
    train = files_of(tmp_path / "x.train")
    with pytest.raises(DataError, match=r"x\.train\.bin: was made from .*--overwrite"):
        run(file, out, split_by=("split",))
    assert files_of(tmp_path / "x.train") == train
    before = contents(tmp_path)
    with lock(out), pytest.raises(DataError, match="another process is writing"):
        run(file, out, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on(tmp_path, capsys):
    for number in range(40):
        texts = [f"{n} of {number} " * 300 for n in range(40)]
        write(tmp_path / f"in/{number:02}.jsonl", json_lines(texts))
    tokenizer.save(RANKS, tmp_path / "r.tiktoken")
    script = "from sys import argv; from data import prepare, streams; streams.SAVE_EVERY = 0; "
    args = [sys.executable, "-c", script + "prepare.main(argv[1:])", "tokens", tmp_path / "in"]
    args += ["--tokenizer", tmp_path / "r.tiktoken", "--processes=2", "--out", tmp_path / "x"]
    progress = tmp_path / "x.unfinished/progress.json"
    process = subprocess.Popen(args, stderr=subprocess.PIPE)
    while not progress.exists() or '"files_done": 0' in progress.read_text():
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # its processes hold its stderr: it ends only when they have
    for out in ("x", "whole/x"):
        run(tmp_path / "in", tmp_path / out)
    assert "input files are done; going on" in capsys.readouterr().err
    assert files_of(tmp_path / "x") == files_of(tmp_path / "whole/x")


def test_streams_by_fields_length_and_held_out_have_names_of_their_own(tmp_path):
    splits = ["train", "valid", "short", "long", "%76alid", "a.b", "a", "fr/é", "fr", "../x", "a,b"]
    rows = [(split, year, n) for split in splits for year in (20, "b.20") for n in range(1, 30)]
    texts = {f"{split} {year} {n} " + "x" * n: (split, year) for split, year, n in rows}
    lines = [json.dumps({"body": t, "split": s, "year": y}) for t, (s, y) in texts.items()]
    file, out = write(tmp_path / "t.jsonl", "\n".join(lines)), tmp_path / "out/d"
    options = dict(text_field="body", split_by=("split", "year"), split_length=30, validation=0.3)
    streams, seen = run(file, out, **options)["streams"], Counter()
    assert streams.keys() >= {"d.fr.20.short", "d.fr.20.long", "d.fr.20.long.valid"}
    assert len(files_of(out)) == 2 * len(streams) + 3  # and no folder is made
    for suffix, held_out in (("", False), (".valid", True)):
        with open(f"{out}{suffix}.csv", newline="", encoding="utf-8") as f:
            table = list(csv.DictReader(f))
        assert {row["split"] for row in table} == set(splits)
        for row in table:
            words, weight = row["name"].split("."), streams[row["name"]]["tokens"]
            assert row["weight"] == str(weight)  # every token is read as often as any other
            assert streams[row["name"]]["held_out"] == held_out == ("valid" in words)
            for text in texts_of(out.parent / row["path"]):
                assert tuple(map(str, texts[text])) == (row["split"], row["year"])
                lengths = ["long" if len(text.encode()) + 2 > 30 else "short"]
                assert [word for word in words if word in ("short", "long")] == lengths
                seen[text] += 1
    assert seen == Counter(texts.keys())


def test_a_value_that_cannot_be_part_of_a_name_is_an_error(tmp_path):
    values = ["fr", 2019, "", "a\nb", "\ud800", "y" * 101, "é" * 17, 3.5, True, None]
    file = write(
        tmp_path / "t.jsonl", "".join(json_lines(["a"], language=v).decode() for v in values)
    )
    report = run(file, tmp_path / "d", "skip", split_by=("language",))
    assert report["streams"].keys() == {"d.fr", "d.2019"} and report["left_out"]["error"] == 8
    assert "line 3: its field 'language' cannot be part of a file's name" in report["errors"][0]
    assert "line 10: no field 'language'" in report["errors"][-1]
    write(file, "\n".join(json.dumps({"text": "x", "language": str(n)}) for n in range(1001)))
    with pytest.raises(DataError, match="over 1,000 streams: the fields to split by"):
        run(file, tmp_path / "x", split_by=("language",))


@given(st.text(" \nab", min_size=2), st.floats(0.001, 0.5))
def test_a_part_of_every_document_is_held_out(text, share):
    assume(len(text) - len(re.sub("[ab]", "", text)) >= 2)
    parts, end = streams.split_tail(text, share), len(text) - len(text.rstrip())
    assert "".join(part for part, _ in parts) == text
    assert [held_out for part, held_out in parts if part.strip()] == [False, True]
    assert len(parts[1][0]) <= 2 * max(1, round(share * len(text))) + end


@given(st.text(st.characters(max_codepoint=0xA0) | st.sampled_from("\r\n\u0301e\ud83d\ude42")))
def test_any_text_comes_out_clean_and_loses_only_what_the_rules_name(text):
    cleaned = clean(text)
    cleaned.encode()  # raises for a surrogate
    if not re.search("[\ud800-\udfff]", text):
        kept = text.translate({ord(c): "\n" for c in "\v\f\x85"})
        kept = "".join(c for c in kept if c in "\t\n\r" or unicodedata.category(c) != "Cc")
        assert cleaned == unicodedata.normalize("NFC", kept.replace("\r\n", "\n"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_source_ends_with_the_document_nearest_to_what_is_due(tmp_path, read, processes):
    """A file that has given its part is left; what one lacks is made up by the next; and a source
    has one document at least."""
    lengths = {"a": (8, 8, 50, 8), "b": (8, 30, 8), "c": (8, 8), "d": (90, 90)}
    for name, sizes in lengths.items():
        texts = [f"{name}{n}".ljust(size, ".") for n, size in enumerate(sizes)]
        write(tmp_path / f"{name}.jsonl", json_lines(texts))
    inputs = [tmp_path / f"{name}.jsonl" for name in lengths]
    dues = [Due("x", 30), Due("x", 60), Due("x", 60), Due("y", 40)]
    tokenize(inputs, OURS, tmp_path / "t", Options(), processes, dues=dues)
    taken = {name: [text[:2] for text in texts_of(tmp_path / f"t.{name}")] for name in "xy"}
    # In tokens, with <s> and </s>: 10 and 10 of 30, since 52 more lead further away than none; then
    # 10 and 32, which make 62 of 60.
    assert taken == {"x": ["a0", "a1", "b0", "b1"], "y": ["d0"]}
    if processes == 1:  # several are given batches in advance
        assert read == ["a.jsonl", "b.jsonl", "d.jsonl"]


def test_a_process_that_dies_is_one_line():
    with pytest.raises(DataError, match=r"^a process died, .* try --processes 1$"):
        list(streams.process([(3, 1, False)], os._exit, 2))
