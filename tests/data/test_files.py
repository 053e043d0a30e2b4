"""Files of every kind, whole, broken and cut short, here and in a store."""

import io
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
from test_streams import PACK, files_of, json_lines, run, texts_of, write

from data import files as reading
from data.dataset import DataError
from data.files import find_files, read_documents, records

fsspec = pytest.importorskip("fsspec")
MemoryFile = pytest.importorskip("fsspec.implementations.memory").MemoryFile
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

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
            reading.parse(record, [field])
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
    monkeypatch.setattr(reading, "zstd", None)
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
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 1000)
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
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 1001)
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
