import base64
import codecs
import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import reading, tokenizer
from data.bpe_training import read_texts
from data.dataset import DataError, read_rows
from data.reading import find_files, parse, place, read_documents, records

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = ["Bonjour à tous.", "Zwei\nZeilen", "<s> is text", "\x00", "🙂" * 300, "x\u2028y", "z"]
ROWS = [{"text": text, "language": "fr", "n": n} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def packed(suffix, content):
    if suffix == ".gz":
        return gzip.compress(content[:50]) + gzip.compress(content[50:])  # two members
    if suffix == ".zst":
        frames = (zstandard.compress(piece) for piece in (content[:50], content[50:]))
        return b"".join(frames)
    return content


def written(folder):
    """The same documents in every form: {name: its file or folder}."""
    found = {}
    for suffix in ("", ".gz", ".zst"):
        forms = {
            "lines.jsonl": LINES,
            "dos.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),
            "cut.jsonl": LINES.rstrip(),
            "lines.json": LINES,
            "array.json": json.dumps(ROWS, indent=2).encode(),
        }
        for name, content in forms.items():
            found[name + suffix] = folder / (name + suffix)
            found[name + suffix].write_bytes(packed(suffix, content))
        for form in ("txt", "md"):
            inside = folder / f"{form}{suffix}" / "deeper"
            inside.mkdir(parents=True)
            for number, text in enumerate(TEXTS):
                file = inside / f"{number}.{form}{suffix}"
                file.write_bytes(packed(suffix, text.encode()))
            (inside / "other.csv").write_text("no text")
            found[inside.parent.name] = inside.parent
    plain = pa.Table.from_pylist(ROWS)
    kinds = {"plain": pa.string(), "large": pa.large_string(), "binary": pa.binary()}
    kinds |= {"words": pa.dictionary(pa.int32(), pa.string())}
    for name, kind in kinds.items():
        table = plain.set_column(0, "text", plain["text"].cast(kind))
        found[f"{name}.parquet"] = folder / f"{name}.parquet"
        pq.write_table(table, found[f"{name}.parquet"], row_group_size=3)
    saved = folder / "saved"  # as datasets does
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    (saved / "dataset_info.json").write_text('{"features": []}')
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", plain.schema) as sink:
        sink.write_table(plain, max_chunksize=2)
    found["saved"] = saved
    with pa.ipc.new_file(folder / "file.arrow", plain.schema) as sink:
        sink.write_table(plain, max_chunksize=2)
    found["file.arrow"] = folder / "file.arrow"
    return found


def test_all_forms_of_input_give_the_same(tmp_path):
    found = written(tmp_path)
    assert len(found) == 3 * 7 + 6
    for name, path in found.items():
        assert list(read_documents(find_files([path]))) == TEXTS, name


def test_reading_goes_on_after_any_record(tmp_path):
    for name, path in written(tmp_path).items():
        for file in find_files([path]):
            whole = list(records(file, "text", ("language",)))
            assert [r.number for r in whole] == sorted({r.number for r in whole}), name
            for n, record in enumerate(whole):
                rest = list(records(file, "text", ("language",), record.number, record.position))
                assert rest == whole[n + 1 :], name
            positions = [record.position for record in whole]
            assert positions == sorted(positions) and positions[-1] <= os.path.getsize(file)
            # Of this form, Arrow does not tell where it reads.
            assert positions[-1] > 0 or name == "file.arrow"


def test_a_plain_file_is_not_read_again_to_go_on(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" * 5)
    first, *rest = records(tmp_path / "x.jsonl", "text")
    (tmp_path / "x.jsonl").write_bytes(b"???" + b"{}\n" * 4)
    assert list(records(tmp_path / "x.jsonl", "text", (), 1, first.position)) == rest


def test_files_are_found_once_and_in_order(tmp_path, monkeypatch):
    for name in ("b.txt", "a.jsonl.zst", "sub/c.md", "sub/d.pdf", "sub/e.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    everything = ["a.jsonl.zst", "b.txt", "sub/c.md", "sub/e.parquet"]
    assert find_files(["."]) == list(map(Path, everything))
    assert find_files(["sub/*.md", "**/*.t?t"]) == [Path("sub/c.md"), Path("b.txt")]
    assert find_files(["b.txt", ".", "b.txt"])[0] == Path("b.txt")
    assert len(find_files(["b.txt", "."])) == 4
    for nothing in ("sub/d.pdf", "*.xyz", "none.txt"):
        with pytest.raises(DataError, match="not a folder, a glob nor"):
            find_files([nothing])


def test_a_folder_as_the_hub_or_datasets_keep_it_is_read_in_order(tmp_path):
    """Of .parquet files, as downloaded, and of .arrow files by split, as save_to_disk writes."""
    (tmp_path / "hub" / "fr").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("the card")
    for split in ("train", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / "saved" / split / name).write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for n in range(3):
        table = pa.table({"text": TEXTS[2 * n : 2 * n + 2], "n": [n, n]})
        pq.write_table(table, tmp_path / "hub" / "fr" / f"train-0000{n}-of-00003.parquet")
        file = tmp_path / "saved" / "train" / f"data-0000{n}-of-00003.arrow"
        with pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table)
    assert list(read_documents(find_files([tmp_path / "hub" / "fr"]))) == TEXTS[:6]
    assert list(read_documents(find_files([tmp_path / "saved"]))) == TEXTS[:6]


def failures(path, *fields):
    """{number: reason} of the records that are no documents, and how many are."""
    bad, good = {}, 0
    for record in records(path, *(fields or ("text",))):
        try:
            if record.error:
                raise ValueError(record.error)
            parse(record.content, *(fields or ("text",)))
            good += 1
        except ValueError as error:
            bad[record.number] = str(error)
    return bad, good


BAD_LINES = {
    b'{"text": ': "not JSON: Expecting value at character",
    b'{"body": "a"}': "no field 'text'",
    b'{"text": null}': "no field 'text'",
    b'{"text": 3}': "its field 'text' is not a string",
    b'["text"]': "no field 'text'",
    b'"text"': "no field 'text'",
    b'{"text": "\xff"}': "not UTF-8 at byte 10",
    b"[" * 100_000: "JSON nested too deep",
    b'{"n": ' + b"9" * 5000 + b"}": "Exceeds the limit",
    b"\0\0": "not JSON",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    lines = [line for bad in BAD_LINES for line in (b'{"text": "a"}', bad, b"")]
    path.write_bytes(packed(suffix, b"\n".join(lines)))
    bad, good = failures(path)
    assert good == len(BAD_LINES)
    assert list(bad) == list(range(2, len(lines), 3))
    for found, expected in zip(bad.values(), BAD_LINES.values()):
        assert found.startswith(expected) and "\n" not in found
    with pytest.raises(DataError, match=rf"x\.jsonl{suffix}, line 2: not JSON"):
        list(read_documents([path]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_short_anywhere_is_an_error_and_what_is_whole_is_read(tmp_path, suffix):
    """Cuts between two members or frames cannot be seen in the file, only in what it holds."""
    path = tmp_path / f"x.jsonl{suffix}"
    random = np.random.default_rng(0)
    lines = b"".join(b'{"text": "%s"}\n' % random.bytes(99).hex().encode() for _ in range(3000))
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    whole = compress(lines)
    for size in [*range(20), *range(20, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        bad, good = failures(path)
        assert list(bad) == [good + 1] and "cannot be read further" in bad[good + 1]
    assert good > 1000
    path.write_bytes(whole + b"and more")
    bad, good = failures(path)
    assert good == 3000 and list(bad) == [3001]


def test_broken_tables(tmp_path):
    table = pa.table({"text": ["a" * 99] * 500, "n": range(500), "none": pa.nulls(500)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100, compression="none")
    whole = (tmp_path / "x.parquet").read_bytes()
    for field, reason in (("body", "no column 'body'; it has text, n"), ("n", "of int64, not")):
        bad, good = failures(tmp_path / "x.parquet", field)
        assert good == 0 and list(bad) == [1] and reason in bad[1]
    bad, good = failures(tmp_path / "x.parquet", "none")
    assert good == 0 and len(bad) == 500 and bad[500] == "no field 'none'"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.parquet").write_bytes(whole[:size])
        assert failures(tmp_path / "x.parquet")[1] == 0 and failures(tmp_path / "x.parquet")[0]
    column = pa.array([b"a", b"\xff", None], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, column.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "y.parquet")
    bad, good = failures(tmp_path / "y.parquet")
    assert good == 1 and bad == {2: "not UTF-8 at byte 0", 3: "no field 'text'"}
    with pa.ipc.new_stream(tmp_path / "z.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=100)
    whole = (tmp_path / "z.arrow").read_bytes()
    (tmp_path / "z.arrow").write_bytes(whole[: len(whole) // 2])
    bad, good = failures(tmp_path / "z.arrow")
    assert good == 200 and list(bad) == [201]


def test_documents_over_the_limit_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST", 1000)
    line = json.dumps({"text": "x" * 988}) + "\n"  # 1,001 bytes with its end
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"):
        suffix = "".join(Path(name).suffixes[1:])
        over = b"y" * 5000 + b"\n" + line.encode() + line.replace("xx", "x").encode() + b"z" * 1001
        (tmp_path / name).write_bytes(packed(suffix, over))
        bad, good = failures(tmp_path / name)
        assert good == 1 and bad == {n: "a line over 1,000 bytes" for n in (1, 2, 4)}
    (tmp_path / "x.txt").write_text("x" * 1001)
    assert failures(tmp_path / "x.txt") == ({1: "over 1,000 bytes: cut it into several"}, 0)
    (tmp_path / "y.txt").write_text("x" * 1000)
    assert failures(tmp_path / "y.txt") == ({}, 1)
    (tmp_path / "x.json").write_text("[" + " " * 1000 + "]")
    assert failures(tmp_path / "x.json") == ({1: "over 1,000 bytes: make it a .jsonl"}, 0)


def test_what_a_compressed_file_unpacks_to_is_not_held_whole(tmp_path, monkeypatch):
    """256 MiB of one line in a few kB: only what is over the limit is passed over."""
    with zstandard.open(tmp_path / "x.jsonl.zst", "wb") as f:
        for _ in range(256):
            f.write(b" " * (1 << 20))
    monkeypatch.setattr(reading, "LARGEST", 1 << 20)
    tracemalloc.start()
    bad, good = failures(tmp_path / "x.jsonl.zst")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good == 0 and list(bad) == [1]
    assert peak < 80 << 20, peak


def test_places_and_files_that_cannot_be_opened(tmp_path):
    places = {"x.txt.gz": "x.txt.gz", "x.jsonl": "x.jsonl, line 1,234"}
    places |= {"x.parquet": "x.parquet, row 1,234", "x.json.zst": "x.json.zst, item 1,234"}
    for name, expected in places.items():
        assert place(Path(name), 1234) == expected
    bad, good = failures(tmp_path / "gone.jsonl")
    assert good == 0 and "No such file" in bad[1]
    (tmp_path / "empty.jsonl").touch()
    assert failures(tmp_path / "empty.jsonl") == ({}, 0)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert failures(tmp_path / "latin.txt") == ({1: "not UTF-8 at byte 3"}, 0)
    assert failures(tmp_path / "latin.txt", "text", ("language",))[1] == 0
    (tmp_path / "a.txt").write_text("a")
    bad, _ = failures(tmp_path / "a.txt", "text", ("language",))
    assert bad == {1: "no field 'language'"}


def test_the_values_to_split_by_come_along():
    content = json.dumps({"body": "x", "language": "fr", "year": 2019}).encode()
    assert parse(content, "body", ("language", "year")) == ("x", "fr", "2019")
    assert parse({"body": b"x", "language": "fr"}, "body") == ("x",)
    for wrong in (b'{"text": 3}', b'{"text": "x", "year": true}', b'{"text": "x", "year": 1.5}'):
        with pytest.raises(ValueError, match="is not a string"):
            parse(wrong, "text", ("year",))


def test_folders_by_links_are_read_and_what_is_not_is_said(tmp_path, capsys):
    (tmp_path / "else").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "else" / "b.txt").write_text("b")
    for name in ("a.txt", "c.TXT", "d.html", "e.html"):
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "back").symlink_to(tmp_path / "in")
    found = find_files([tmp_path / "in"])
    assert [file.name for file in found] == ["a.txt", "b.txt"]
    assert "not read: .html 2, .TXT 1" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: no \.txt, .* file in it"):
        find_files([tmp_path / "none"])
    assert len(find_files([f"{tmp_path}/[in]*"])) == 2  # a glob is not to blame for what it meets


RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), b + 4) for b in range(256))
BYTES = tokenizer.to_tokenizer_json(tokenizer.Tokenizer({bytes([b]): b + 4 for b in range(256)}))


def tokens_of(file):
    loaded = tokenizer.load(file)
    return loaded.vocab_size, loaded.encode("un été")


@pytest.mark.parametrize(
    "name, content, read",
    [
        ("m.csv", b"name,path,weight\na,s3://a,1\n", read_rows),
        ("r.tiktoken", RANKS, tokens_of),
        ("tokenizer.json", json.dumps(BYTES).encode(), tokens_of),
        ("a.txt", b"text", lambda file: list(read_documents([file]))),
        ("a.jsonl", LINES, lambda file: list(read_documents([file]))),
        ("a.json", b'[{"text": "x"},\n{"text": "y"}]', lambda file: list(read_documents([file]))),
        ("a.py", b"x = 1\n", lambda file: list(read_texts([file]))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_byte_order_mark_changes_nothing(tmp_path, name, content, read):
    """Excel and Windows' editors begin a file in UTF-8 with one."""
    (tmp_path / name).write_bytes(content)
    expected = read(tmp_path / name)
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
    assert read(tmp_path / name) == expected


@pytest.mark.parametrize("form", ["arrow", "stream", "parquet"])
def test_damaged_tables_are_an_error_and_no_crash(tmp_path, form):
    """pyarrow itself follows offsets that point outside the file."""
    table, whole = pa.table({"text": [f"text {n}" for n in range(40)]}), tmp_path / "whole"
    if form == "parquet":
        pq.write_table(table, whole)
    else:
        new = pa.ipc.new_file if form == "arrow" else pa.ipc.new_stream
        with new(str(whole), table.schema) as writer:
            writer.write_table(table)
    content, chance = whole.read_bytes(), random.Random(5)
    file = tmp_path / ("x.parquet" if form == "parquet" else "x.arrow")
    failed = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged)
        failed += bool(failures(file)[0])
    assert failed > 20
