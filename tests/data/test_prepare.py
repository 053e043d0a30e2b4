"""Files of every kind, whole, broken and cut short, against streams decoded by hand."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
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
from config.cli import lock, run_cli
from data import prepare, tokenizer
from data.dataset import DataError
from data.prepare import Options, clean, find_files, read_documents, records, tokenize
from data.tokenizer import ByteLevelBPE, LucieBPE, Tokenizer

fsspec = pytest.importorskip("fsspec")
MemoryFile = pytest.importorskip("fsspec.implementations.memory").MemoryFile
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstd = prepare.zstd or pytest.skip("needs backports.zstd", allow_module_level=True)

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
        monkeypatch.setattr(prepare, "CHUNK", chunk)
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
        monkeypatch.setattr(prepare, "BATCH_BYTES", batch)
        monkeypatch.setattr(prepare, "SAVE_EVERY", save_every)
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
        for module in (prepare, config.cli):
            monkeypatch.setattr(module, "open", counted_open, raising=False)
        run(*args, **options)
    finally:
        os._exit(0)


def test_a_run_that_is_killed_at_any_write_goes_on(tmp_path, monkeypatch, capfd):
    """Old streams never mix with the new ones, and whichever command comes next ends as ever."""
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
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


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    names, whole = [], prepare.records

    def listed(source, columns):
        names.append(str(source).rpartition("/")[2])
        return whole(source, columns)

    monkeypatch.setattr(prepare, "records", listed)
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
    return names


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
    script = "from sys import argv; from data import prepare; prepare.SAVE_EVERY = 0; "
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
    parts, end = prepare.split_tail(text, share), len(text) - len(text.rstrip())
    assert "".join(part for part, _ in parts) == text
    assert [held_out for part, held_out in parts if part.strip()] == [False, True]
    assert len(parts[1][0]) <= 2 * max(1, round(share * len(text))) + end


TEXTS = ["Bonjour à tous.", "Zwei\nZeilen", "<s> is text", "\x00", "🙂" * 300, "x\u2028y", "z"]
ROWS = [{"text": text, "language": "fr", "n": n} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def forms():
    """The same documents in every form: {form: {name: bytes}}."""
    objects = [json.dumps({"n": n, "text": text}).encode() for n, text in enumerate(TEXTS)]
    found = {
        "lines": {"a.jsonl": LINES},
        "dos": {"a.JSONL": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")},
        "lines of json": {"a.json": LINES.rstrip()},
        "marked": {"a.json": b"\xef\xbb\xbf" + LINES},
        "array": {"a.json": json.dumps(ROWS, indent=2).encode()},
        "txt": {f"deep/{n}.txt": text.encode() for n, text in enumerate(TEXTS)},
        "md": {f"{n}.md": b"\xef\xbb\xbf" + text.encode() for n, text in enumerate(TEXTS)},
        "goes on": {f"{n}.json": c.replace(b", ", b",\n", 1) for n, c in enumerate(objects)},
    }
    for form, files in list(found.items()):
        for suffix, pack in PACK.items():  # in two frames, or members
            packed = {f"{n}{suffix}": pack(c[:50]) + pack(c[50:]) for n, c in files.items()}
            found[f"{form}{suffix}"] = packed
    plain, dictionary = pa.Table.from_pylist(ROWS), pa.dictionary(pa.int32(), pa.string())
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.string_view(), dictionary):
        table = plain.set_column(0, "text", plain["text"].cast(kind))
        content = io.BytesIO()
        pq.write_table(table, content, row_group_size=3)
        found[f"{kind} parquet"] = {"a.parquet": content.getvalue()}
    return found


@pytest.fixture
def store():
    """fsspec's store in memory, which tests fill below bucket/."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def test_all_kinds_of_files_give_the_same_on_disk_and_in_a_store(tmp_path, store):
    for form, files in forms().items():
        for name, content in files.items():
            write(tmp_path / form / name, content)
            store.pipe_file(f"/bucket/{form}/{name}", content)
        for inputs in (tmp_path / form, f"{tmp_path}/{form}/**", f"memory://bucket/{form}"):
            assert list(read_documents(find_files([inputs]))) == TEXTS, (form, inputs)


def failures(path, field="text"):
    """{number: reason} of the records that are no documents, and how many are."""
    bad, good = {}, 0
    for record in records(path, [field]):
        try:
            prepare.parse(record, [field])
            good += 1
        except ValueError as error:
            bad[record.number] = str(error)
    return bad, good


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_cut_short_anywhere_is_an_error_and_what_is_whole_is_read(tmp_path, suffix):
    """Cuts between two members or frames cannot be seen in the file, only in what it holds."""
    rng, level = random.Random(0), {".bz2": {"compresslevel": 1}}  # in blocks of 100 kB
    for rows, steps in ((1, 1000), (800, 9)):
        content = json_lines(rng.randbytes(99).hex() for _ in range(rows))
        whole, most = PACK[suffix](content, **level.get(suffix, {})), 0
        for size in [*range(0, len(whole), max(1, len(whole) // steps)), len(whole) - 1]:
            bad, good = failures(write(tmp_path / f"x.jsonl{suffix}", whole[:size]))
            assert list(bad) == [good + 1] and good >= most
            assert bad[good + 1].startswith("cannot be read further")
            most = good
        assert failures(write(tmp_path / f"x.jsonl{suffix}", whole)) == ({}, rows)
    assert most > 300


def test_broken_tables(tmp_path):
    table = pa.table({"text": ["a", None, "b"], "n": [0, 1, 1]})
    file = tmp_path / "x.parquet"
    pq.write_table(table, file)
    assert failures(file) == ({2: "no field 'text'"}, 2)
    assert failures(file, "body") == ({1: "cannot be read further: no column 'body'"}, 0)
    assert failures(file, "n")[0][3] == "its field 'n' is not a string"
    report = run(file, tmp_path / "x", "skip", split_by=("n",))  # whole numbers
    assert report["streams"].keys() == {"x.0", "x.1"}
    strings = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    pq.write_table(pa.table({"text": strings}), file)
    assert "Invalid UTF8" in failures(file)[0][1]


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "zstd", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, package in (("a.txt.zst", r"backports\.zstd"), ("a.parquet", "pyarrow")):
        write(tmp_path / name, b"content")
        with pytest.raises(DataError, match=rf"{name}: reading .* needs: pip install {package}"):
            run(tmp_path / name, tmp_path / "x", "skip")


def test_a_folder_gives_its_data_once_and_says_what_is_not_read(tmp_path, monkeypatch, capsys):
    names = ["b.txt", "a.jsonl.zst", "sub/c.MD", "sub/e.parquet", "code.py", "g.html", "h.html"]
    names += ["LICENSE.txt", "README.md", "sub/state.json"]  # beside data, and no documents
    for name in (*names, ".ipynb_checkpoints/x.md", "._a.jsonl", "../else/z.txt", "../else/x.txt"):
        write(tmp_path / "in" / name, b"")
    (tmp_path / "link").symlink_to(tmp_path / "else")
    (tmp_path / "in/same.txt").symlink_to(tmp_path / "in/b.txt")
    (tmp_path / "in/gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in/pipe.txt")
    monkeypatch.chdir(tmp_path / "in")
    inside, others = ["a.jsonl.zst", "b.txt", "sub/c.MD", "sub/e.parquet"], ["x.txt", "z.txt"]
    for inputs, expected in (
        (["."], inside),
        (["b.txt", ".", tmp_path / "in"], ["b.txt", inside[0], *inside[2:]]),
        (["../link", "../else"], [f"../link/{name}" for name in others]),
        (["README.md"], ["README.md"]),
        (["sub/*.MD", "b.t?t"], ["sub/c.MD", "b.txt"]),
        ([".ipynb_checkpoints", "._a.jsonl"], [".ipynb_checkpoints/x.md", "._a.jsonl"]),
        (["code.py", "*.html"], ["code.py", "g.html", "h.html"]),
    ):
        assert find_files(inputs) == list(map(Path, expected))
    assert re.search(r"^\.: not read: .*\.html 2, .*\.py 1", capsys.readouterr().err, re.MULTILINE)
    for nothing in ("*.xyz", "none.txt", write(tmp_path / "pdf/a.pdf", b"").parent):
        with pytest.raises(DataError, match=f"{re.escape(str(nothing))}: no "):
            find_files([nothing])


def test_files_folders_and_globs_of_a_store_are_found_in_order(store):
    names = ["a.jsonl", "b/a.json", "b/a.txt.gz", "b/c/a.parquet", "b/c/x.csv", "b/.h/a.jsonl"]
    store.pipe({f"/bucket/{name}": b"" for name in names})

    def found(*addresses):
        return [re.sub("^memory://(/?)bucket/", "", file) for file in find_files(addresses)]

    assert found("memory://bucket") == names[:4]
    assert found("memory://bucket/b/", "memory://bucket/b/a.json") == names[1:4]
    assert found("memory://bucket/b/*.json*", "memory://bucket/a.jsonl") == ["b/a.json", "a.jsonl"]
    assert found("memory://bucket/b/c/x.csv", "memory://bucket/**/*.jsonl") == [names[4], names[0]]
    for nothing in ("memory://bucket/none.jsonl", "memory://bucket/b/d", "nope://bucket/a.jsonl"):
        with pytest.raises(DataError, match=f"^{nothing}: (no such file|.*Protocol not known)"):
            find_files([nothing])


@pytest.mark.parametrize("form", ["lines", "lines.gz", "string parquet"])
def test_a_lost_connection_ends_the_run(store, tmp_path, monkeypatch, read, form):
    ((name, content),) = forms()[form].items()
    store.pipe({"/bucket/1.jsonl": json_lines(["one"]), f"/bucket/{name}": content})
    run("memory://bucket", tmp_path / "whole/x")
    plain = MemoryFile.readinto

    def lost(file, *args):
        if file.path.endswith(name):
            raise RuntimeError("gone\nfor ever")  # what it is has no class in common
        return plain(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFile, "readinto", lost)
        with pytest.raises(DataError, match=rf"^memory:///bucket/{name}: RuntimeError: gone$"):
            run("memory://bucket", tmp_path / "x", "skip")
    read.clear()
    run("memory://bucket", tmp_path / "x", "skip")
    assert read == [name] and files_of(tmp_path / "x") == files_of(tmp_path / "whole/x")
    store.pipe("/bucket/1.jsonl", json_lines(["one"]))  # a file that is written again is another
    with pytest.raises(DataError, match="was made from other inputs"):
        run("memory://bucket", tmp_path / "x", "skip")


BAD_LINES = {
    b'{"text": ': "not JSON: Expecting value at character",
    b'{"body": "a"}': "no field 'text'",
    b'{"text": 3}': "its field 'text' is not a string",
    b'["text"]': "no field 'text'",
    b'{"text": "\xff"}': "not UTF-8 at byte 10",
    b"[" * 100_000: "JSON nested too deep",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "Exceeds the limit (4300 digits)",
    b'{"text": "code' + b" " * 1_100_000 + b'x"}': "Regex error while tokenizing",
}
GOOD_LINES = {
    b'{"text": "a", "x": NaN}': "a",
    b'\xef\xbb\xbf{"text": "\\ud83d\\ude42\\ud83d"}': "🙂\ufffd",
}


@pytest.mark.parametrize("suffix, processes", [("", 1), (".zst", 2)])
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path, suffix, processes):
    lines = [line for bad in BAD_LINES for line in (b'{"text": "a"}', bad, b"")]
    content = b"\n".join([*lines, *GOOD_LINES])
    file = write(tmp_path / f"x.jsonl{suffix}", PACK.get(suffix, bytes)(content))
    report = run(file, tmp_path / "x", "skip", processes)
    assert texts_of(tmp_path / "x") == ["a"] * len(BAD_LINES) + list(GOOD_LINES.values())
    for number, (found, said) in enumerate(zip(report["errors"], BAD_LINES.values()), start=1):
        assert found.startswith(f"{file}, line {3 * number - 1}: {said}") and "\n" not in found
    assert report["left_out"]["error"] == len(BAD_LINES)


def test_documents_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_DOCUMENT", 1000)
    line = json.dumps({"text": "x" * 988}).encode() + b"\n"  # 1,001 bytes with its end
    content = b"y" * 5000 + b"\n" + line + line.replace(b"xx", b"x") + b"z" * 1001
    for suffix in ("", *PACK):
        file = write(tmp_path / f"x.jsonl{suffix}", PACK.get(suffix, bytes)(content))
        assert failures(file) == ({n: "a line over 1,000 bytes" for n in (1, 2, 4)}, 1)
    file = write(tmp_path / "x.json", "[" + " " * 1000 + "]")
    said = "cannot be read further: over 1,000 bytes: make it a .jsonl"
    assert failures(file) == ({1: said}, 0)


@pytest.mark.parametrize("length", [0, 1, 1000, 1001, 1002, 2002, 5003])
def test_a_long_text_is_cut_at_line_ends_or_between_characters(tmp_path, monkeypatch, length):
    monkeypatch.setattr(prepare, "MAX_DOCUMENT", 1001)
    for unit, ends in (("a line\n", b"\n"), ("é", b"\xa9"), ("🙂", b"\x82"), ("\n", b"\n")):
        text = (unit * 5003)[:length]
        found = list(records(write(tmp_path / "x.txt", text), ["text"]))
        pieces = [record.content["text"] for record in found]
        assert b"".join(pieces).decode() == text
        assert all(len(piece) <= 1001 and piece.endswith(ends) for piece in pieces[:-1])
        assert (not length or all(pieces)) and found[-1].number == len(found)


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_damage_is_counted(tmp_path, cases):
    """pyarrow itself follows offsets that point outside the file, and asks for any memory."""
    chance, lines = random.Random(cases), [b"", b"\0" * 9, b"\n{", *BAD_LINES, *GOOD_LINES]
    every = [file for files in forms().values() for file in files.items()]
    tables = [file for file in every if file[0].endswith("parquet")]
    good, failed = write(tmp_path / "good.txt", "one that is good"), 0
    for case in range(cases):
        name, content = chance.choice(every if case % 4 == 1 else tables)
        damaged = bytearray(content)
        start, end = sorted(chance.choices(range(len(damaged) + 1), k=2))
        if case % 2:
            more = [b"", chance.choice(every)[1], b"\n".join(chance.sample(lines, 3))]
            damaged[start : chance.choice([end, len(damaged)])] = chance.choice(more)
        for _ in range(chance.randint(1, 4) if damaged else 0):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        file, out = write(tmp_path / "in" / Path(name).name, damaged), tmp_path / f"out/{case}"
        failed += run([file, good], out, "skip")["left_out"]["error"] > 0
        assert texts_of(out)[-1] == "one that is good"
    assert cases / 3 < failed < cases


@given(st.text(st.characters(max_codepoint=0xA0) | st.sampled_from("\r\n\u0301e\ud83d\ude42")))
def test_any_text_comes_out_clean_and_loses_only_what_the_rules_name(text):
    cleaned = clean(text)
    cleaned.encode()  # raises for a surrogate
    if not re.search("[\ud800-\udfff]", text):
        kept = text.translate({ord(c): "\n" for c in "\v\f\x85"})
        kept = "".join(c for c in kept if c in "\t\n\r" or unicodedata.category(c) != "Cc")
        assert cleaned == unicodedata.normalize("NFC", kept.replace("\r\n", "\n"))


def test_a_process_that_dies_is_one_line():
    with pytest.raises(DataError, match=r"^a process died, .* try --processes 1$"):
        list(prepare.process([(3, None)], os._exit, 2))


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
