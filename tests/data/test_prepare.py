"""Files of every kind, whole, broken and cut short, against streams decoded by hand."""

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_cases import lucie_json

from config.cli import lock, run_cli
from data import prepare, tokenizer
from data.dataset import DataError, Mixture
from data.prepare import Options, clean, find_files, read_documents, records, tokenize
from data.tokenizer import ByteLevelBPE, LucieBPE, Tokenizer

fsspec = pytest.importorskip("fsspec")
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


def write_lines(path, texts, **fields):
    return write(path, json_lines(texts, **fields))


def run(inputs, out, on_error="stop", processes=1, **options):
    """tokenize, and that all that is read is written or left out for a reason."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    report = tokenize(find_files(inputs), OURS, out, Options(**options), processes, on_error)
    assert report["documents_in"] == report["documents"] + sum(report["left_out"].values())
    if report["held_out"] == "documents":
        assert report["documents"] == sum(s["documents"] for s in report["streams"].values())
    assert len(report["errors"]) == min(100, report["left_out"]["error"])
    return report


def files_of(out):
    """The results of a run, {name: bytes}; a run that has ended leaves nothing else."""
    names = [name for name in os.listdir(out.parent) if name.startswith(f"{out.name}.")]
    assert not [name for name in names if name.endswith((".tmp", ".progress"))]
    return {name: (out.parent / name).read_bytes() for name in sorted(names)}


def test_a_document_is_bos_text_eos_and_the_report_describes_the_streams(tmp_path):
    texts = ["Bonjour à tous.", "mot", "", "  ", "Zwei\nZeilen", "<s> is text", "e\u0301", "a\x00b"]
    report = run(write_lines(tmp_path / "t.jsonl", texts), tmp_path / "x")
    expected = ["Bonjour à tous.", "mot", "Zwei\nZeilen", "<s> is text", "é", "ab"]
    found = documents_of(tmp_path / "x")
    assert found == [[0, *(b + 4 for b in text.encode()), 1] for text in expected]
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "x.json").read_text())
    assert (report["documents_in"], report["documents"]) == (8, 6)
    described = {"split_by": {}, "length": "", "held_out": False, "documents": 6}
    described |= {"tokens": sum(map(len, found)), "longest": max(map(len, found))}
    described |= {"characters": sum(map(len, expected)), "bytes": len("".join(expected).encode())}
    digests = {s: sha256((tmp_path / f"x.{s}").read_bytes()).hexdigest() for s in ("bin", "idx")}
    assert report["streams"] == {"x": described | {"sha256": digests}}
    assert files_of(tmp_path / "x").keys() == {"x.bin", "x.csv", "x.idx", "x.json"}


def test_end_tokens_in_texts_cut_no_document_whatever_is_indexed_at_once(tmp_path, monkeypatch):
    """A small vocabulary is stored in two bytes, a large one in four."""
    pytest.importorskip("tokenizers")
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    large = ByteLevelBPE(RANKS | {pair: n for n, pair in enumerate(pairs, start=260)})
    lucie = LucieBPE(json.dumps(lucie_json()).encode())
    texts = [f"{n} </s> <s></s>" * (n % 5 + 1) for n in range(23)] + ["</s>"]
    file = write_lines(tmp_path / "t.jsonl", texts)
    for tokens, code in ((OURS, "H"), (Tokenizer(lucie), "H"), (Tokenizer(large), "i")):
        for chunk in (1, 23, 1 << 20):
            monkeypatch.setattr(prepare, "CHUNK", chunk)
            tokenize([file], tokens, tmp_path / f"{chunk}")
            documents = documents_of(tmp_path / f"{chunk}", code)
            assert [tokens.decode(d[1:-1], skip_special=False) for d in documents] == texts
            assert all((d[0], d[-1], min(d[1:-1]) > 3) == (0, 1, True) for d in documents)


def test_the_bytes_do_not_depend_on_processes_or_batches(tmp_path, monkeypatch):
    for number in range(3):
        texts = [f"document {n % 1400} " * (n % 40) for n in range(number, 1500, 3)]
        write_lines(tmp_path / f"in/{number}.jsonl", texts)
    options = dict(validation=0.1, deduplicate=True, split_length=300)
    written = []
    for processes, batch, save_every in ((1, 1 << 18, 5), (1, 3000, 0), (2, 20_000, 0)):
        monkeypatch.setattr(prepare, "BATCH", batch)
        monkeypatch.setattr(prepare, "SAVE_EVERY", save_every)
        run(tmp_path / "in", tmp_path / f"{processes}{batch}/x", processes=processes, **options)
        written.append(files_of(tmp_path / f"{processes}{batch}/x"))
    assert len(written[0]) == 11 and written[1] == written[0] and written[2] == written[0]


def cut_short(monkeypatch, how, moment, *files, **options):
    """Whether run(...) reaches the call of this number that changes a file, where it is cut short.

    "kill": the process ends there, a fork of this one. "full": the disk has no space, once.
    """
    left = moment

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal left
            left -= call is not open or "r" not in args[1]
            if left == 0 and how == "kill":
                os._exit(9)
            if left == 0:
                left -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return counting

    child = os.fork() if how == "kill" else 0
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "truncate"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(os, "fsync", counted(lambda _: None))
            patch.setattr(prepare, "open", counted(open), raising=False)
            run(*files, **options)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        if how == "kill":
            os._exit(0)
    return left < 0


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_run_cut_short_at_any_write_goes_on(tmp_path, monkeypatch, capfd, how):
    """Before it began there was a stream of other options, which never mixes with the new one.

    Whichever of both commands comes next, it ends as if nothing had happened.
    """
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
    for name in "ab":  # with texts that both have
        write_lines(tmp_path / f"in/{name}.jsonl", [f"{name * (n > 2)} {n}" for n in range(20)])
    options = {"old": {}, "new": dict(validation=0.3, deduplicate=True, min_characters=3)}
    expected = {}
    for name in ("new", "old"):
        run(tmp_path / "in", tmp_path / "whole/x", **options[name])
        expected[name] = files_of(tmp_path / "whole/x")
    for moment in range(1, 200):
        out = tmp_path / str(moment) / "new"
        shutil.copytree(tmp_path / "whole", out)
        files = (tmp_path / "in", out / "x")
        reached = cut_short(monkeypatch, how, moment, *files, **options["new"])
        found = {file.name: file.read_bytes() for file in out.glob("x*")}
        for index in {"x.idx", "x.valid.idx"} & found.keys():
            pair = {name: found[name] for name in (index, index.replace("idx", "bin"))}
            assert any(pair.items() <= made.items() for made in expected.values()), moment
        assert how == "kill" or "x.progress" in found or not list(out.glob("*.tmp")), moment
        shutil.copytree(out, out.with_name("old"))
        run(*files, **options["new"])
        assert files_of(out / "x") == expected["new"], moment
        run(tmp_path / "in", out.with_name("old") / "x")
        for name, content in expected["old"].items():
            assert (out.with_name("old") / name).read_bytes() == content, moment
        if not reached:
            break
    assert not reached and moment > 30
    assert "input files are done; going on" in capfd.readouterr().err


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


def test_finished_files_are_not_read_again_and_other_inputs_begin_anew(tmp_path, read, capsys):
    for name in "abc":
        write_lines(tmp_path / f"in/{name}.jsonl", ["the same", f"of {name}"], language=name)
    with open(tmp_path / "in/c.jsonl", "a") as f:
        f.write("{broken\n")

    def again(on_error, said, **options):
        read.clear()
        if on_error == "skip":
            run(tmp_path / "in", tmp_path / "x", "skip", **options)
        else:
            with pytest.raises(DataError, match=r"c\.jsonl, line 3: not JSON.*--on_error skip"):
                run(tmp_path / "in", tmp_path / "x", **options)
        assert said in capsys.readouterr().err
        return "".join(name[0] for name in read)

    assert again("stop", "", deduplicate=True) == "abc"
    assert again("stop", "2 input files are done; going on", deduplicate=True) == "c"
    assert again("stop", "begun anew", split_by=("language",)) == "abc"
    os.utime(tmp_path / "in/a.jsonl", (1, 1))
    assert again("stop", "begun anew", split_by=("language",)) == "abc"
    assert again("stop", "begun anew", deduplicate=True) == "abc"
    # What the first files gave is still known: of "the same" there is one.
    assert again("skip", "going on", deduplicate=True) == "c"
    assert texts_of(tmp_path / "x") == ["the same", "of a", "of b", "of c"]
    assert again("skip", "is made of these files already", deduplicate=True) == ""
    # What was held out before would be in the training stream now.
    for options in (dict(validation=0.3), dict(split_by=("language",)), {}):
        again("skip", "", **options)
    assert files_of(tmp_path / "x").keys() == {"x.bin", "x.csv", "x.idx", "x.json"}


def test_what_is_of_others_or_being_written_is_left_alone(tmp_path):
    file = write_lines(tmp_path / "t.jsonl", ["some text"])
    for name in ("x.json", "x.csv", "x.valid.csv", "x.bin", "x.idx"):
        other = write(tmp_path / name, '[{"text": "hello"}]')
        with pytest.raises(DataError, match=rf"{name}: .* would be lost"):
            run([file, other], tmp_path / "x")
        assert files_of(tmp_path / "x") == {name: b'[{"text": "hello"}]'}
        other.unlink()
    for options in ({}, dict(min_characters=5)):
        before = files_of(tmp_path / "x")
        with lock(tmp_path / "x"), pytest.raises(DataError, match="another process is writing"):
            run(file, tmp_path / "x", **options)
        assert files_of(tmp_path / "x") == before
        run(file, tmp_path / "x", **options)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not JSON"),
        ("x.txt", b"  \n", "no document for training: of 1 read 0 were kept .*empty 1"),
        ("x.json.xz", lzma.compress(b'[{"text": 3}]'), r"x\.json\.xz, item 1: its field 'text' is"),
        ("x.arrow", b"ARROW1", r"x\.arrow, row 1: cannot be read further"),
    ],
)
def test_a_run_that_fails_in_its_first_file_leaves_nothing(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name, tmp_path / "out/x")
    assert files_of(tmp_path / "out/x") == {}


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on(tmp_path):
    rng, progress, before = random.Random(1), tmp_path / "x.progress", ""
    for number in range(30):
        texts = [rng.randbytes(2000).hex() for _ in range(40)]
        write_lines(tmp_path / f"in/{number:02}.jsonl", texts)
    script = "import sys\nfrom data import prepare\nprepare.SAVE_EVERY = 0\n"
    script += "if __name__ == '__main__':\n    prepare.main(sys.argv[1:])\n"
    tokenizer.save(RANKS, tmp_path / "r.tiktoken")
    args = [sys.executable, write(tmp_path / "run.py", script), "tokens", tmp_path / "in"]
    args += ["--deduplicate", "--processes=2", "--tokenizer", tmp_path / "r.tiktoken", "--out"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    for _ in range(3):
        process = subprocess.Popen([*args, tmp_path / "x"], env=environment, stderr=subprocess.PIPE)
        while not progress.exists() or progress.read_text() == before:
            time.sleep(0.01)
        process.kill()
        # Its processes hold its stderr: it ends only when they have.
        printed, before = process.communicate(timeout=60)[1], progress.read_text()
        assert process.returncode == -signal.SIGKILL, printed
    assert b"input files are done; going on" in printed
    for out in ("x", "whole/x"):
        run(tmp_path / "in", tmp_path / out, deduplicate=True)
    assert files_of(tmp_path / "x") == files_of(tmp_path / "whole/x")


SPLITS = ["train", "valid", "short", "long", "%76alid", "a.b", "a", "fr/é", "fr", "../x", "a,b"]


def test_streams_by_fields_length_and_held_out_have_names_of_their_own(tmp_path):
    rows = [(split, year, n) for split in SPLITS for year in (20, "b.20") for n in range(1, 30)]
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
        assert {row["split"] for row in table} == set(SPLITS)
        mixture = Mixture(f"{out}{suffix}.csv", 16, 42, OURS.vocab_size)
        # Every token is read as often as any other.
        tokens = [stream.tokens for stream in mixture.streams]
        assert mixture.weights == pytest.approx([n / sum(tokens) for n in tokens])
        for row in table:
            words = row["name"].split(".")
            assert streams[row["name"]]["held_out"] == held_out == ("valid" in words)
            for text in texts_of(out.parent / row["path"]):
                assert tuple(map(str, texts[text])) == (row["split"], row["year"])
                lengths = ["long" if len(text.encode()) + 2 > 30 else "short"]
                assert [word for word in words if word in ("short", "long")] == lengths
                seen[text] += 1
    assert seen == Counter(texts.keys())


def test_a_value_that_cannot_be_part_of_a_name_is_an_error(tmp_path):
    values = ["fr", 2019, "", "a\nb", "\ud800", "y" * 101, "é" * 17, 3.5, True, None, ["fr"]]
    lines = [json.dumps({"text": "a", "language": value}) for value in values]
    file = write(tmp_path / "t.jsonl", "\n".join([*lines, '{"text": "lost"}']))
    report = run(file, tmp_path / "d", "skip", split_by=("language",))
    assert report["streams"].keys() == {"d.fr", "d.2019"} and report["left_out"]["error"] == 10
    assert "line 3: its field 'language' cannot be part of a file's name" in report["errors"][0]
    assert "line 12: no field 'language'" in report["errors"][-1]
    write(file, "\n".join(json.dumps({"text": "x", "language": str(n)}) for n in range(1001)))
    with pytest.raises(DataError, match="over 1,000 streams: the fields to split by"):
        run(file, tmp_path / "x", split_by=("language",))


def test_held_out_documents_are_a_share_and_the_text_decides(tmp_path):
    texts = [f"text number {n}" for n in range(2000)]
    report = run(write_lines(tmp_path / "t.jsonl", texts), tmp_path / "x", validation=0.1)
    assert report["held_out"] == "documents"
    train, valid = texts_of(tmp_path / "x"), texts_of(tmp_path / "x.valid")
    # 200 within five standard deviations, of which one is (2000 * 0.1 * 0.9) ** 0.5.
    assert 133 < len(valid) < 267 and {*train, *valid} == set(texts)
    assert [*train, *valid] == sorted(train, key=texts.index) + sorted(valid, key=texts.index)
    run(write_lines(tmp_path / "u.jsonl", texts[::-3]), tmp_path / "y", validation=0.1)
    assert set(texts_of(tmp_path / "y.valid")) == set(valid) & set(texts[::-3])


@pytest.mark.parametrize("files, share", [(1, 0.1), (3, 0.02), (5, 0.3)])
def test_of_few_documents_chunks_are_held_out(tmp_path, capsys, files, share):
    texts = []
    for name in range(files):
        lines = [f"In book {name} this is line {n}." + "\n" * (n % 7 == 0) for n in range(2000)]
        texts.append("\n".join(lines))
        write(tmp_path / f"in/{name}.txt", texts[-1])
    report = run(tmp_path / "in", tmp_path / "x", validation=share)
    described = re.fullmatch(r"chunks of (\d+) characters", report["held_out"])
    assert f"with {files} documents, chunks of about" in capsys.readouterr().err
    train, valid = texts_of(tmp_path / "x"), texts_of(tmp_path / "x.valid")
    assert len(valid) >= 1 and max(map(len, valid)) <= 1.5 * int(described[1])
    assert len("".join(valid)) == pytest.approx(share * len("".join(texts)), rel=0.35)
    rest = "".join(texts)
    for _ in range(len(train) + len(valid)):  # every part once, in order; no line is there twice
        part = next(parts for parts in (train, valid) if parts and rest.startswith(parts[0])).pop(0)
        rest = rest[len(part) :]
        assert part.endswith("\n") or not rest.startswith("In book 0")
    assert (rest, train, valid) == ("", [], [])


@pytest.mark.parametrize(
    "size, marked",
    [
        (16, "one two three\n\n|four five\n|six seven eight"),  # at a paragraph, then at a line
        (8, "aaa bbb |ccc ddd |eee fff"),  # at a word
        (10, "abcdefghij|klmnopqrst|uvwxyz"),  # where there is no border
        (4, "abcd|    |efgh"),  # a chunk of blanks is in no stream
    ],
)
def test_chunks_end_at_the_best_border(size, marked):
    chunks = [(chunk, True) for chunk in marked.split("|") if chunk.strip()]
    assert prepare.held_out_parts(marked.replace("|", ""), 1.0, size) == chunks


TEXTS = ["Bonjour à tous.", "Zwei\nZeilen", "<s> is text", "\x00", "🙂" * 300, "x\u2028y", "z"]
ROWS = [{"text": text, "language": "fr", "n": n} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def forms():
    """The same documents in every form: {form: {name: bytes}}."""
    objects = [json.dumps({"n": n, "text": text}).encode() for n, text in enumerate(TEXTS)]
    found = {
        "lines": {"a.jsonl": LINES},
        "upper": {"a.JSONL": LINES},
        "dos": {"a.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")},
        "cut": {"a.jsonl": LINES.rstrip()},
        "lines of json": {"a.json": LINES},
        "blank": {"a.json": b"\xef\xbb\xbf\n \n" + LINES},
        "array": {"a.json": json.dumps(ROWS, indent=2).encode()},
        "a line": {"a.json": json.dumps(ROWS).encode()},
        "row a line": {"a.json": json.dumps(ROWS).encode().replace(b"}, {", b"},\n{")},
        "txt": {f"deep/{n}.txt": text.encode() for n, text in enumerate(TEXTS)},
        "md": {f"{n}.md": b"\xef\xbb\xbf" + text.encode() for n, text in enumerate(TEXTS)},
        "object": {f"{n}.json": content for n, content in enumerate(objects)},
        "goes on": {f"{n}.json": c.replace(b", ", b",\n", 1) for n, c in enumerate(objects)},
    }
    for form, files in list(found.items()):
        for suffix, pack in PACK.items():  # in two frames, or members
            packed = {f"{n}{suffix}": pack(c[:50]) + pack(c[50:]) for n, c in files.items()}
            found[f"{form}{suffix}"] = packed
    plain, dictionary = pa.Table.from_pylist(ROWS), pa.dictionary(pa.int32(), pa.string())
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.string_view(), dictionary):
        table = plain.set_column(0, "text", plain["text"].cast(kind))
        for suffix in ("parquet", "file.arrow", "stream.arrow"):
            content = io.BytesIO()
            if suffix == "parquet":
                pq.write_table(table, content, row_group_size=3)
            else:
                create = pa.ipc.new_file if suffix == "file.arrow" else pa.ipc.new_stream
                with create(content, table.schema) as sink:
                    sink.write_table(table, max_chunksize=2)
            found[f"{kind} {suffix}"] = {f"a.{suffix}": content.getvalue()}
    return found


@pytest.fixture
def store():
    """fsspec's store in memory, which tests fill below bucket/."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/.keep", b"")
    yield files
    files.rm("/bucket", recursive=True)


def test_all_kinds_of_files_give_the_same_on_disk_and_in_a_store(tmp_path, store):
    for form, files in forms().items():
        for name, content in files.items():
            write(tmp_path / form / name, content)
            store.pipe_file(f"/bucket/{form}/{name}", content)
        for inputs in (tmp_path / form, f"{tmp_path}/{form}/**", f"memory://bucket/{form}"):
            found = find_files([inputs])
            assert list(read_documents(found)) == TEXTS, (form, inputs)
    run(tmp_path / "lines/a.jsonl", tmp_path / "x")
    run("memory://bucket/string parquet", tmp_path / "y")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == (tmp_path / f"y.{suffix}").read_bytes()


def failures(path, *fields):
    """{number: reason} of the records that are no documents, and how many are."""
    bad, good = {}, 0
    for record in records(path, list(fields or ("text",))):
        try:
            if record.error:
                raise ValueError(record.error)
            prepare.parse(record.content, list(fields or ("text",)))
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
    bad, good = failures(write(tmp_path / f"x.jsonl{suffix}", whole + b"?" + whole))
    assert (good, list(bad)) == (rows, [rows + 1])


def test_broken_tables(tmp_path):
    table = pa.table({"text": ["a" * 99] * 500, "n": range(500)})
    file = tmp_path / "x.parquet"
    pq.write_table(table, file, row_group_size=100, compression="none")
    for field, reason in (("body", "no column 'body'; it has text, n"), ("n", "of int64, not")):
        bad, good = failures(file, field)
        assert good == 0 and list(bad) == [1] and reason in bad[1]
    whole = file.read_bytes()
    assert list(failures(write(file, whole[:-1]))[0]) == [1]
    strings = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", None]).buffers())
    pq.write_table(pa.table({"text": strings}), file)
    assert failures(file) == ({2: "not UTF-8 at byte 0", 3: "no field 'text'"}, 1)
    with pa.ipc.new_stream(tmp_path / "z.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=100)
    whole = (tmp_path / "z.arrow").read_bytes()
    bad, good = failures(write(tmp_path / "z.arrow", whole[: len(whole) // 2]))
    assert good == 200 and list(bad) == [201]


@pytest.mark.parametrize("form", ["parquet", "file.arrow", "stream.arrow"])
def test_damaged_tables_are_an_error_and_no_crash(tmp_path, form):
    """pyarrow itself follows offsets that point outside the file, and asks for any memory."""
    ((name, content),) = forms()[f"string {form}"].items()
    chance, failed = random.Random(5), 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        failed += bool(failures(write(tmp_path / name, damaged))[0])
    assert failed > 20


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "zstd", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, package in (("a.txt.zst", r"backports\.zstd"), ("a.parquet", "pyarrow")):
        write(tmp_path / name, b"content")
        with pytest.raises(DataError, match=rf"{name}: reading .* needs: pip install {package}"):
            run(tmp_path / name, tmp_path / "x", "skip")


def test_a_folder_gives_its_data_once_and_says_what_is_not_read(tmp_path, monkeypatch, capsys):
    names = ["b.txt", "a.jsonl.zst", "sub/c.MD", "sub/e.parquet", "code.py", "g.html", "h.html"]
    for name in (*names, ".ipynb_checkpoints/x.md", "._a.jsonl", "../else/z.txt"):
        write(tmp_path / "in" / name, b"")
    (tmp_path / "in/link").symlink_to(tmp_path / "else")
    (tmp_path / "else/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/same.txt").symlink_to(tmp_path / "in/b.txt")
    monkeypatch.chdir(tmp_path / "in")
    inside = ["a.jsonl.zst", "b.txt", "link/z.txt", "sub/c.MD", "sub/e.parquet"]
    for inputs, expected in (
        (["."], inside),
        (["b.txt", ".", tmp_path / "in", "../else"], ["b.txt", inside[0], *inside[2:]]),
        (["sub/*.MD", "*.t?t"], ["sub/c.MD", "b.txt"]),
        ([".ipynb_checkpoints", "._a.jsonl"], [".ipynb_checkpoints/x.md", "._a.jsonl"]),
        (["code.py", "*.html"], ["code.py", "g.html", "h.html"]),
    ):
        assert find_files(inputs) == list(map(Path, expected))
    assert re.search(r"^\.: not read: \.html 2, \.py 1$", capsys.readouterr().err, re.MULTILINE)
    for nothing in ("*.xyz", "none.txt", write(tmp_path / "pdf/a.pdf", b"").parent):
        with pytest.raises(DataError, match=f"{re.escape(str(nothing))}: no "):
            find_files([nothing])


@pytest.mark.parametrize(
    "names, data",
    [
        (["README.md", "a.parquet", "LICENSE.txt", "reader.txt"], ["a.parquet", "reader.txt"]),
        (["README.md", "book.md"], ["README.md", "book.md"]),
        (["dataset_dict.json", "train/a.arrow", "train/state.json"], ["train/a.arrow"]),
    ],
)
def test_what_lies_beside_data_is_no_document(tmp_path, store, names, data):
    for name in names:
        write(tmp_path / "in" / name, b"")
        store.pipe_file(f"/bucket/in/{name}", b"")
    assert find_files([tmp_path / "in"]) == [tmp_path / "in" / name for name in data]
    assert find_files(["memory://bucket/in"]) == [f"memory:///bucket/in/{name}" for name in data]
    assert find_files([tmp_path / "in" / names[0]]) == [tmp_path / "in" / names[0]]


def test_the_report_of_a_run_is_no_input_of_the_next(tmp_path, monkeypatch):
    write_lines(tmp_path / "t.jsonl", ["text"])
    monkeypatch.chdir(tmp_path)
    for inputs in (".", ".", tmp_path):
        assert run(inputs, "d", "skip")["documents_in"] == 1


def test_files_folders_and_globs_of_a_store_are_found_in_order(store):
    names = ["a.jsonl", "b/a.json", "b/a.txt.gz", "b/c/a.parquet", "b/c/x.csv", "b/.h/a.jsonl"]
    store.pipe({f"/bucket/{name}": b"" for name in names})

    def found(*addresses):
        return [re.sub("^memory://(/?)bucket/", "", file) for file in find_files(addresses)]

    assert found("memory://bucket") == names[:4]
    assert found("memory://bucket/b/*.json*", "memory://bucket/a.jsonl") == ["b/a.json", "a.jsonl"]
    assert found("memory://bucket/**/*.parquet") == ["b/c/a.parquet"]
    assert found("memory://bucket/b/c/x.csv") == ["b/c/x.csv"]
    for nothing in ("memory://bucket/none.jsonl", "memory://bucket/b/d", "nope://bucket/a.jsonl"):
        with pytest.raises(DataError, match=f"^{nothing}: (no such file|.*Protocol not known)"):
            find_files([nothing])
    assert found("memory://bucket/b/", "memory://bucket/b/a.json") == names[1:4]
    assert found("memory://bucket/b/c/*.csv") == ["b/c/x.csv"]
    assert found("memory://bucket/**/*.jsonl") == ["a.jsonl"]


class Lost(Exception):
    """What a store raises when a connection is lost: not an OSError."""


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.json", "b.parquet"])
def test_a_lost_connection_ends_the_run_and_the_next_one_goes_on(
    store, tmp_path, monkeypatch, read, name
):
    content = {"b.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "b.json": LINES}
    content |= {"b.parquet": forms()["string parquet"]["a.parquet"]}
    store.pipe({"/bucket/a.jsonl": json_lines(["one"]), f"/bucket/{name}": content[name]})
    run("memory://bucket", tmp_path / "whole/x")
    plain = type(store).open

    class Failing(io.BytesIO):
        def read(self, *args):
            raise Lost("gone\nfor ever")

    def open_(self, path, *args, **kwargs):
        file = plain(self, path, *args, **kwargs)
        return Failing(file.getvalue()) if path.endswith(name) else file

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "open", open_)
        with pytest.raises(DataError, match=rf"^memory:///bucket/{name}: Lost: gone$"):
            run("memory://bucket", tmp_path / "x", "skip")
    for expected in ([name], [], ["a.jsonl", name]):
        read.clear()
        run("memory://bucket", tmp_path / "x", "skip")
        assert read == expected
        if not read:  # a file that is written again is another
            assert files_of(tmp_path / "x") == files_of(tmp_path / "whole/x")
            store.pipe("/bucket/a.jsonl", json_lines(["one"]))


DIGITS = b'"n": ' + b"9" * 5000
BAD_LINES = {
    b'{"text": ': "not JSON: Expecting value at character",
    b'{"body": "a"}': "no field 'text'",
    b'{"text": 3}': "its field 'text' is not a string",
    b'{"text": NaN}': "its field 'text' is not a string",
    b'["text"]': "no field 'text'",
    b'{"text": "\xff"}': "not UTF-8 at byte 10",
    b"[" * 100_000: "JSON nested too deep",
    b"{" + DIGITS + b', "m": ' + b"[" * 100_000: "JSON nested too deep",
    b'{"text": "code' + b" " * 1_100_000 + b'x"}': "cannot be tokenized: ",
}
GOOD_LINES = {
    b'{"text": "a", ' + DIGITS + b', "x": NaN}': "a",
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
    monkeypatch.setattr(prepare, "LARGEST", 1000)
    line = json.dumps({"text": "x" * 988}).encode() + b"\n"  # 1,001 bytes with its end
    content = b"y" * 5000 + b"\n" + line + line.replace(b"xx", b"x") + b"z" * 1001
    for suffix in ("", *PACK):
        file = write(tmp_path / f"x.jsonl{suffix}", PACK.get(suffix, bytes)(content))
        assert failures(file) == ({n: "a line over 1,000 bytes" for n in (1, 2, 4)}, 1)
    file = write(tmp_path / "x.json", "[" + " " * 1000 + "]")
    assert failures(file) == ({1: "over 1,000 bytes: make it a .jsonl"}, 0)


@pytest.mark.parametrize("length", [0, 1, 1000, 1001, 1002, 2002, 5003])
def test_a_long_text_is_cut_at_line_ends_or_between_characters(tmp_path, monkeypatch, length):
    monkeypatch.setattr(prepare, "LARGEST", 1001)
    for unit, ends in (("a line\n", b"\n"), ("é", b"\xa9"), ("🙂", b"\x82"), ("\n", b"\n")):
        text = (unit * 5003)[:length]
        for suffix in ("", ".gz"):
            content = PACK.get(suffix, bytes)(text.encode())
            found = list(records(write(tmp_path / f"x.txt{suffix}", content), ["text"]))
            pieces = [record.content["text"] for record in found]
            assert b"".join(pieces).decode() == text
            assert all(len(piece) <= 1001 and piece.endswith(ends) for piece in pieces[:-1])
            assert not length or all(pieces)
            assert [record.number for record in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_damage_is_counted(tmp_path, cases):
    """Files of every kind, cut, with bits flipped, or joined with others."""
    chance, lines = random.Random(cases), [b"", b"\0" * 9, b"\n{", *BAD_LINES, *GOOD_LINES]
    contents = [(name, content) for files in forms().values() for name, content in files.items()]
    good = write(tmp_path / "good.txt", "one that is good")
    for case in range(cases):
        name, content = chance.choice(contents)
        damaged = bytearray(content)
        start, end = sorted(chance.choices(range(len(damaged) + 1), k=2))
        if case % 4 == 0:
            del damaged[start:]
        elif case % 4 == 1:
            damaged[start:start] = chance.choice(contents)[1]
        elif case % 4 == 2:
            damaged[start:end] = b"\n".join(chance.sample(lines, 3))
        for _ in range(chance.randint(0, 4) if damaged else 0):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        file = write(tmp_path / "in" / Path(name).name, damaged)
        run([file, good], tmp_path / f"out/{case}", "skip")
        assert texts_of(tmp_path / f"out/{case}")[-1] == "one that is good"
        file.unlink()


@pytest.mark.parametrize(
    "text, cleaned, rules",
    [
        ("Déjà vu.\r\n\tOui\n", "Déjà vu.\r\n\tOui\n", ()),
        ("a\x00b\x1bc\x7fd\x9fe", "abcde", ("control",)),
        ("one\ftwo\vthree\x85four", "one\ntwo\nthree\nfour", ("control",)),
        ("\ud83d\ude42 \ud83d", "🙂 \ufffd", ("surrogates",)),
        ("e\x00\u0301\udc00", "é\ufffd", ("surrogates", "control", "nfc")),
    ],
)
def test_each_rule(text, cleaned, rules):
    assert clean(text) == (cleaned, rules)


@given(st.text(st.characters() | st.sampled_from("\x00\n\t\u0301e\ud83d\ude42\x85")))
def test_any_text_comes_out_clean_and_loses_only_what_the_rules_name(text):
    cleaned, rules = clean(text)
    cleaned.encode()  # raises for a surrogate
    assert unicodedata.is_normalized("NFC", cleaned) and clean(cleaned) == (cleaned, ())
    assert {c for c in cleaned if unicodedata.category(c) == "Cc"} <= set("\t\n\r")
    assert bool(rules) == (cleaned != text)
    if "surrogates" not in rules:
        kept = text.translate({ord(c): "\n" for c in "\v\f\x85"})
        kept = "".join(c for c in kept if c in "\t\n\r" or unicodedata.category(c) != "Cc")
        assert cleaned == unicodedata.normalize("NFC", kept)


def test_what_is_left_out_and_changed_is_counted(tmp_path):
    texts = ["one", "two", "one", "o\x00ne", "e\u0301 e", "é e", "a", "", "two", "b\ud800c"]
    texts += [" \n\u00a0", "ab", "three"]
    file = write(tmp_path / "t.jsonl", json_lines(texts) + b"{\n" * 250)
    report = run(file, tmp_path / "x", "skip", min_characters=3, deduplicate=True)
    assert texts_of(tmp_path / "x") == ["one", "two", "é e", "b\ufffdc", "three"]
    assert report["left_out"] == {"error": 250, "empty": 2, "short": 2, "duplicate": 4}
    assert "line 113: " in report["errors"][99]
    assert report["changed"] == {"surrogates": 1, "control": 0, "nfc": 1}


@pytest.mark.parametrize("size, most", [(prepare.BATCH, 9), (100 * prepare.BATCH, 2)])
def test_no_more_is_read_in_advance_than_fits_in_memory(size, most):
    """Four batches for each of two processes, or one that is larger, and the one being read."""
    handed, worker = [], prepare.Worker(OURS, Options(), 0)

    def batches():
        for number in range(30):
            handed.append(prepare.Batch([b'{"text": "a"}'], [(0, number)], size, 0, None))
            yield handed[-1]

    for taken, (batch, (_, tokens)) in enumerate(prepare.process(batches(), worker, 2)):
        assert len(handed) - taken <= most and batch.places == [(0, taken)]
        assert tokens.tolist() == [0, ord("a") + 4, 1]


def test_a_process_that_dies_is_one_line():
    with pytest.raises(DataError, match=r"^a process died, .* try --processes 1$"):
        list(prepare.process([prepare.Batch(3, [], 1, 0, None)], os._exit, 2))


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
        texts = [
            f"{name} {n}\0 " + " ".join(rng.choices(words, k=n * n % 67)) for n in range(count)
        ]
        write(folder / f"{name}.jsonl.gz", gzip.compress(json_lines(texts, language=name)))
    for n in range(40):
        write(folder / f"src/{'deep/' * (n % 2)}{n}.py", f"code {n}\n" * (n % 50 + 1))
    tokenizer.save(RANKS, folder / "r.tiktoken")
    return folder


def test_tokens_are_made_and_the_same_command_again_does_nothing(folder, tmp_path, command):
    bad = write(tmp_path / "bad.jsonl", b'{"text": "\xff"}\n')
    args = ["tokens", f"{folder}/*.gz", bad, "--tokenizer", folder / "r.tiktoken", "--processes=2"]
    args += ["--out", tmp_path / "d", "--split-by=language", "--validation=0.1", "--on_error=skip"]
    module = [sys.executable, "-m", "data.prepare", *args]
    done = subprocess.run(module, capture_output=True, text=True, check=True)
    for code, out, err in ((0, done.stdout, done.stderr), command(*args)):
        assert code == 0 and "documents 900 of 901; left out: error 1, empty 0, short 0" in out
        assert re.search(r"^d\.fr\.valid: documents \d+, tokens [\d,]+$", out, re.MULTILINE)
        assert re.search(r"^left out: .*bad\.jsonl, line 1: not UTF-8", err, re.MULTILINE)
    assert "whole documents are held out" in done.stderr
    assert "is made of these files already" in err


TOKENS = ("tokens", "{0}/fr.jsonl.gz", "--tokenizer={0}/r.tiktoken", "--out={0}/y", "--processes=1")
WORDS = ("vocabulary", "--out={0}/y", "{0}/fr.jsonl.gz")
SHARES = ("vocabulary", "fr={0}/fr.jsonl.gz", "--out={0}/y", "--shares", "fr=3")


@pytest.mark.parametrize(
    "args, said",
    [
        (("tokens", "none.txt", *TOKENS[2:]), "none.txt: no such file"),
        ((*TOKENS, "--validation=1"), "a share from 0 to under 1, not 1.0"),
        ((*TOKENS, "--text_field=b"), "fr.jsonl.gz, line 1: no field 'b' (--on_error skip"),
        ((*TOKENS, "--tokenizer={0}/fr.jsonl.gz"), "fr.jsonl.gz: not a ranks file"),
        ((*TOKENS, "--out=/"), ""),
        ((*WORDS, "--out={0}/src"), "src: is a folder"),
        ((*WORDS, "--shares", "fr=1"), "fr.jsonl.gz: write NAME=PATH, with a name that --shares"),
        ((*SHARES, "en=1"), "--shares en: no text has this name"),
        ((*SHARES, "en=-1"), "en=-1: write --shares NAME=NUMBER"),
        (("vocabulary", "nl={0}/fr.jsonl.gz", *SHARES[1:]), "nl={0}/fr.jsonl.gz: write NAME=PATH"),
        ((*SHARES, "--megabytes=1"), "fr: its text and share allow 0.0"),
    ],
)
def test_a_wrong_command_is_one_line(folder, command, args, said):
    pytest.importorskip("tokenizers")
    code, _, err = command(*(arg.format(folder) for arg in args))
    lines = [line for line in err.splitlines() if line.startswith("prepare: ")]
    assert code == 2 and len(lines) == 1 and said.format(folder) in lines[0], err
    assert "Traceback" not in err and not list(folder.glob("y*"))


@pytest.mark.parametrize("megabytes", [None, 0.02])
def test_a_vocabulary_is_learnt_from_texts_in_their_shares(folder, tmp_path, command, megabytes):
    pytest.importorskip("tokenizers")
    texts = {name: list(read_documents([folder / f"{name}.jsonl.gz"])) for name in ("fr", "en")}
    texts = {name: [text.replace("\0", "") for text in texts[name]] for name in texts}
    texts["code"] = [file.read_text() for file in folder.rglob("*.py")]
    sizes = {name: sum(len(text) for text in texts[name]) for name in texts}
    shares = {"fr": 0.5, "en": 0.3, "code": 0.2}
    total = megabytes * 1e6 if megabytes else min(sizes[name] / shares[name] for name in sizes)
    args = ["vocabulary", *(f"{name}={folder}/{name}.jsonl.gz" for name in ("fr", "en"))]
    args += [f"code={folder}/src/*.py", f"code={folder}/src/deep/*.py", "--vocab_size=280"]
    args += ["--shares", "fr=5", "en=3", "code=2", "--out", tmp_path / "new/r.tiktoken"]
    args += [f"--folder={tmp_path}/json", *([f"--megabytes={megabytes}"] if megabytes else [])]
    sample, train = [], tokenizer.train

    def listening(texts, vocab_size):
        sample.extend(texts)
        return train(sample, vocab_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "train", listening)
        code, out, err = command(*args)
    assert code == 0 and f"{tmp_path}/new/r.tiktoken: 280 tokens" in out, err
    assert len(set(sample)) == len(sample)
    for name, share in shares.items():
        keep = share * total / sizes[name]
        variance = sum(len(text) ** 2 for text in texts[name]) * max(0, keep * (1 - keep))
        drawn = sum(len(text) for text in sample if text in texts[name])
        assert abs(drawn - share * total) <= 5 * variance**0.5 + 1e-6, name
        assert f"{name}: {keep:.1%} of {sizes[name] / 1e6:,.3f} MB are drawn" in out
    ranks = tokenizer.load(tmp_path / "new/r.tiktoken").bpe.ranks
    assert ranks == tokenizer.load(tmp_path / "json").bpe.ranks == train(sample, 280)
    # Without shares all is read.
    command("vocabulary", f"{folder}/fr*.gz", "--vocab_size=280", "--out", tmp_path / "v")
    assert tokenizer.load(tmp_path / "v").bpe.ranks == train(texts["fr"], 280)
