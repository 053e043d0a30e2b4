import csv
import gzip
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from conftest import launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.cli import ConfigError
from data import prepare, stream_writer, tokenizer
from data.dataset import DataError, Mixture, TokenStream
from data.mixture import read
from data.prepare import find_files, tokenize
from data.tokenizer import Tokenizer
from data.workers import Options

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

BYTES = {bytes([b]): b + 4 for b in range(256)}
OURS = Tokenizer(BYTES)
TEXTS = ["Bonjour à tous.", "mot", "", "  ", "Zwei\nZeilen", "<s> is text", "e\u0301", "a\x00b"]
SUFFIXES = ("bin", "idx", "valid.bin", "valid.idx", "json", "csv", "valid.csv")


def documents_of(path, code="H"):
    """Documents of a stream: Megatron's format, from its description.

    The index: 9 bytes of magic, the version (8 bytes), the type of tokens (1 byte; 8 is uint16, 4
    int32), the number of sequences and of document boundaries (8 bytes each); then the sequences'
    lengths (int32) and offsets in bytes (int64), and the boundaries (int64), all little-endian.
    """
    with open(f"{path}.idx", "rb") as f:
        index = f.read()
    with open(f"{path}.bin", "rb") as f:
        tokens = f.read()
    magic, version, kind, count, boundaries = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, boundaries) == (b"MMIDIDX\0\0", 1, count + 1)
    assert kind == {"H": 8, "i": 4}[code]
    values = struct.unpack_from(f"<{count}i{count}q{count + 1}q", index, 34)
    assert len(index) == 34 + 12 * count + 8 * (count + 1)
    lengths, offsets = values[:count], values[count : 2 * count]
    assert values[2 * count :] == tuple(range(count + 1))
    size = struct.calcsize(f"<{code}")
    assert len(tokens) == size * sum(lengths)
    return [list(struct.unpack_from(f"<{n}{code}", tokens, o)) for n, o in zip(lengths, offsets)]


def texts_of(path):
    return [bytes(t - 4 for t in document[1:-1]).decode() for document in documents_of(path)]


def write_lines(path, texts, **fields):
    rows = [json.dumps({"text": text, **fields}) + "\n" for text in texts]
    path.write_text("".join(rows), encoding="utf-8")
    return find_files([path])


def add_up(report):
    """All that is read is written or has a reason; streams hold what is said to be written."""
    assert report["documents_in"] == report["documents"] + sum(report["left_out"].values())
    assert report["documents"] == sum(s["documents"] for s in report["streams"].values())
    assert len(report["errors"]) == min(100, report["left_out"]["error"])


def bytes_of(out):
    names = sorted(f for f in os.listdir(out.parent) if f.startswith(f"{out.name}."))
    assert not [name for name in names if name.endswith((".tmp", ".parts"))]
    return {name: (out.parent / name).read_bytes() for name in names}


def test_one_document_is_bos_text_eos(tmp_path):
    report = tokenize(write_lines(tmp_path / "t.jsonl", TEXTS), OURS, tmp_path / "x")
    expected = ["Bonjour à tous.", "mot", "Zwei\nZeilen", "<s> is text", "é", "ab"]
    found = documents_of(tmp_path / "x")
    assert found == [[0, *(b + 4 for b in text.encode()), 1] for text in expected]
    assert report == json.loads((tmp_path / "x.json").read_text())
    assert report["left_out"] == {"error": 0, "empty": 2, "short": 0, "duplicate": 0}
    assert report["changed"] == {"surrogates": 0, "control": 1, "nfc": 1}
    assert (report["documents_in"], report["documents"], report["errors"]) == (8, 6, [])
    lengths = sorted(map(len, found))
    sha = {s: hashlib.sha256((tmp_path / f"x.{s}").read_bytes()) for s in ("bin", "idx")}
    assert report["streams"] == {
        "x": {
            "documents": 6,
            "tokens": sum(lengths),
            "characters": sum(map(len, expected)),
            "bytes": sum(len(text.encode()) for text in expected),
            # the smallest that so large a share does not exceed
            "tokens_per_document": dict(
                zip(
                    ("0%", "5%", "25%", "50%", "75%", "95%", "100%"),
                    (lengths[i] for i in (0, 0, 1, 2, 4, 5, 5)),
                )
            ),
            "sha256": {suffix: digest.hexdigest() for suffix, digest in sha.items()},
        }
    }
    assert sum(lengths) == TokenStream(tmp_path / "x").tokens
    assert sorted(os.listdir(tmp_path)) == ["t.jsonl", "x.bin", "x.csv", "x.idx", "x.json"]


def test_forms_of_input_give_the_same_bytes(tmp_path):
    texts = [f"texte numéro {n} " * (n % 7 + 1) for n in range(500)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=99)
    written = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        tokenize(find_files([tmp_path / name]), OURS, tmp_path / "x", part_size=20_000)
        written.append(bytes_of(tmp_path / "x"))
    assert all(one == written[0] for one in written) and texts_of(tmp_path / "x") == texts


def test_output_does_not_depend_on_processes_or_parts(tmp_path):
    texts = [f"document {n % 1400} " * (n % 40) for n in range(1500)]
    files = write_lines(tmp_path / "t.jsonl", texts)
    options = Options(validation=0.1, deduplicate=True, split_length=300)
    written = []
    for workers, part_size in ((1, 1 << 26), (1, 3000), (2, 50_000)):
        report = tokenize(files, OURS, tmp_path / "x", options, workers, part_size=part_size)
        written.append(bytes_of(tmp_path / "x"))
        add_up(report)
    assert len(written[0]) == 11 and all(one == written[0] for one in written)


def test_held_out_documents_are_a_share_and_nothing_is_lost(tmp_path):
    texts = [f"text number {n}" for n in range(2000)]
    files = write_lines(tmp_path / "t.jsonl", texts)
    report = tokenize(files, OURS, tmp_path / "x", Options(validation=0.1))
    train, valid = texts_of(tmp_path / "x"), texts_of(tmp_path / "x.valid")
    assert len(train) + len(valid) == 2000 and 140 < len(valid) < 260
    assert report["streams"]["x.valid"]["documents"] == len(valid)
    assert {*train, *valid} == set(texts)
    assert sorted(train, key=texts.index) == train
    # The text alone decides, not what else is there.
    tokenize(
        write_lines(tmp_path / "t.jsonl", texts[::-3]),
        OURS,
        tmp_path / "y",
        Options(validation=0.1),
    )
    assert set(texts_of(tmp_path / "y.valid")) == set(valid) & set(texts[::-3])


@pytest.mark.parametrize("part_size", [1, prepare.PART])
def test_cleaning_is_counted(tmp_path, part_size):
    texts = ["one", "two", "one", "o\x00ne", "e\u0301 e", "é e", "a", "", "two", "b\ud800c"]
    files = write_lines(tmp_path / "t.jsonl", texts)
    options = Options(min_characters=2, deduplicate=True)
    # Duplicates lie in one part, and in several.
    report = tokenize(files, OURS, tmp_path / "x", options, part_size=part_size)
    assert texts_of(tmp_path / "x") == ["one", "two", "é e", "b\ufffdc"]
    assert report["left_out"] == {"error": 0, "empty": 1, "short": 1, "duplicate": 4}
    assert report["changed"] == {"surrogates": 1, "control": 0, "nfc": 1}
    add_up(report)


def test_streams_by_a_field_and_by_length(tmp_path):
    rows = [("fr", 10), ("en", 10), ("fr", 11), ("a/b", 5), ("../x", 5), ("a.valid", 5), ("é", 5)]
    with open(tmp_path / "t.jsonl", "w") as f:
        for language, length in rows:
            print(json.dumps({"body": "x" * (length - 2), "language": language}), file=f)
        for wrong in ("", "a\nb", "\ud800", "y" * 101, 3.5, None):
            print(json.dumps({"body": "lost", "language": wrong}), file=f)
        print(json.dumps({"body": "lost"}), file=f)
    options = Options("body", ("language",), split_length=10)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "d"
    report = tokenize(find_files([tmp_path / "t.jsonl"]), OURS, out, options, 1, "skip")
    names = {"fr.short", "fr.long", "en.short", "a%2Fb.short", "%2E%2E%2Fx.short"}
    names |= {"a%2Evalid.short", "%C3%A9.short"}
    assert report["streams"].keys() == {f"d.{name}" for name in names}
    assert len(os.listdir(tmp_path / "out")) == 2 * len(names) + 2
    assert texts_of(f"{out}.fr.long") == ["x" * 9] and texts_of(f"{out}.fr.short") == ["x" * 8]
    assert report["left_out"]["error"] == 7
    add_up(report)


def test_the_streams_are_a_mixture_at_once(tmp_path):
    """Every token as often as any other, training and validation apart."""
    with open(tmp_path / "t.jsonl", "w") as f:
        for k in range(400):
            language = "fr" if k % 4 else "en"
            print(json.dumps({"text": f"{k} " * 20, "language": language}), file=f)
    options = Options(split_by=("language",), validation=0.3)
    out = tmp_path / "d"
    report = tokenize(find_files([tmp_path / "t.jsonl"]), OURS, out, options)
    for suffix in ("", ".valid"):
        mixture = Mixture(f"{out}{suffix}.csv", 16, 42, OURS.vocab_size)
        assert sorted(mixture.names) == [f"d.en{suffix}", f"d.fr{suffix}"]
        tokens = [report["streams"][name]["tokens"] for name in mixture.names]
        assert [stream.tokens for stream in mixture.streams] == tokens
        assert mixture.weights == [count / sum(tokens) for count in tokens]
        assert sorted(s.language for s in read(f"{out}{suffix}.csv")) == ["en", "fr"]


def test_streams_by_two_fields(tmp_path):
    with open(tmp_path / "t.jsonl", "w") as f:
        for language, year in (("fr", 2019), ("fr", 2020), ("en", 2019), ("f.r", 2019)):
            print(json.dumps({"text": "x" * 30, "language": language, "year": year}), file=f)
    options = Options(split_by=("language", "year"))
    tokenize(find_files([tmp_path / "t.jsonl"]), OURS, tmp_path / "d", options)
    with open(tmp_path / "d.csv", newline="") as f:
        rows = [(row["name"], row["language"], row["year"]) for row in csv.DictReader(f)]
    assert rows == [
        ("d.fr.2019", "fr", "2019"),
        ("d.fr.2020", "fr", "2020"),
        ("d.en.2019", "en", "2019"),
        ("d.f%2Er.2019", "f.r", "2019"),
    ]
    assert all((tmp_path / f"{row[0]}.bin").is_file() for row in rows)


def test_no_file_of_another_is_lost(tmp_path):
    """Results have names that an input, or anything else, may have already."""
    texts = write_lines(tmp_path / "t.jsonl", ["some text"])
    for name in ("corpus.json", "corpus.csv", "corpus.valid.csv"):
        (tmp_path / name).write_text('[{"text": "hello"}]')
        with pytest.raises(DataError, match=rf"{name}: .* would be lost"):
            tokenize([*texts, tmp_path / name], OURS, tmp_path / "corpus")
        assert (tmp_path / name).read_text() == '[{"text": "hello"}]'
        (tmp_path / name).unlink()
    (tmp_path / "corpus.parts").mkdir()
    (tmp_path / "corpus.parts" / "thesis.doc").write_text("precious")
    with pytest.raises(DataError, match=r"corpus\.parts: holds thesis\.doc"):
        tokenize(texts, OURS, tmp_path / "corpus")
    assert (tmp_path / "corpus.parts" / "thesis.doc").read_text() == "precious"


def test_streams_of_other_options_do_not_stay(tmp_path):
    """What was held out before would be in the training stream now."""
    files = write_lines(tmp_path / "t.jsonl", [f"text {n}" for n in range(100)], language="fr")
    for options in (Options(validation=0.3), Options(split_by=("language",)), Options()):
        tokenize(files, OURS, tmp_path / "x", options)
    assert sorted(os.listdir(tmp_path)) == ["t.jsonl", "x.bin", "x.csv", "x.idx", "x.json"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_no_tokenizer_takes_is_an_error_with_its_place(tmp_path, workers):
    """The regex of tiktoken gives up on a million blanks in a row."""
    texts = ["one", "code" + " " * 1_100_000 + "x", "two"]
    files = write_lines(tmp_path / "t.jsonl", texts)
    report = tokenize(files, OURS, tmp_path / "x", workers=workers, on_error="skip")
    assert texts_of(tmp_path / "x") == ["one", "two"]
    (error,) = report["errors"]
    assert "t.jsonl, line 2: cannot be tokenised: " in error
    add_up(report)


def test_a_file_that_breaks_is_counted_once_by_a_run_that_goes_on(tmp_path, monkeypatch):
    texts = [f"text number {n}" for n in range(900)]
    write_lines(tmp_path / "t.jsonl", texts)
    packed = gzip.compress((tmp_path / "t.jsonl").read_bytes())
    (tmp_path / "t.jsonl.gz").write_bytes(packed[:-400])
    files = [tmp_path / "t.jsonl.gz"]

    def run(name):
        return tokenize(files, OURS, tmp_path / name, on_error="skip", part_size=200_000)

    whole = run("x")
    assert whole["left_out"]["error"] == 1 and whole["documents"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_join", raises_killed)
        with pytest.raises(Killed):
            run("y")
    cut = run("y")
    assert cut["errors"] == whole["errors"] and cut["documents_in"] == whole["documents_in"]
    assert (tmp_path / "y.bin").read_bytes() == (tmp_path / "x.bin").read_bytes()


def raises_killed(*_):
    raise Killed


def test_too_many_streams_are_refused(tmp_path):
    with open(tmp_path / "t.jsonl", "w") as f:
        f.writelines(json.dumps({"text": "x", "id": str(n)}) + "\n" for n in range(5000))
    with pytest.raises(DataError, match="over 1,000 streams: id has too many values"):
        tokenize(
            find_files([tmp_path / "t.jsonl"]), OURS, tmp_path / "x", Options(split_by=("id",))
        )
    assert not list(tmp_path.glob("x*"))


def test_large_vocabularies_are_int32(tmp_path):
    for size, dtype in ((65_024, np.uint16), (65_536, np.int32), (128_256, np.int32)):
        with prepare.StreamWriter(tmp_path / "x", size) as stream:
            stream.add(np.array([0, size - 1]))
        stream = TokenStream(tmp_path / "x")
        assert stream.dtype == dtype
        assert stream.read(0, 2, size).tolist() == [0, size - 1]
        code = "H" if dtype == np.uint16 else "i"
        assert documents_of(tmp_path / "x", code) == [[0, size - 1]]


def test_an_index_written_in_pieces_is_the_same(tmp_path, monkeypatch):
    documents = [list(range(n % 5)) for n in range(23)]
    for chunk in (1, 4, 23, 24, 100):
        monkeypatch.setattr(stream_writer, "CHUNK", chunk)
        with prepare.StreamWriter(tmp_path / "x", 97) as stream:
            for document in documents[:9]:
                stream.add(np.array(document, np.int64))
            rest = documents[9:]
            stream.add_many(np.concatenate(rest), np.array(list(map(len, rest))))
        assert documents_of(tmp_path / "x") == documents
    with prepare.StreamWriter(tmp_path / "x", 97):
        pass
    assert documents_of(tmp_path / "x") == []


@pytest.mark.parametrize("code,kind", [("H", 8), ("i", 4)])
def test_a_stream_of_another_writer_is_read(tmp_path, code, kind):
    documents = [[5, 6, 7], [], [1], [96] * 40]
    lengths = [len(document) for document in documents]
    offsets = [struct.calcsize(f"<{code}") * sum(lengths[:n]) for n in range(4)]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, kind, 4, 5)
    index += struct.pack("<4i4q5q", *lengths, *offsets, *range(5))
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<44{code}", *chain.from_iterable(documents)))
    stream = TokenStream(tmp_path / "x")
    assert stream.tokens == 44 and stream.read(0, 44, 97).tolist() == list(
        chain.from_iterable(documents)
    )
    assert documents_of(tmp_path / "x", code) == documents


class Killed(BaseException):
    pass


def test_a_stream_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    """Whatever moment the writing of a second version dies at, no mixture of both is read."""

    def write(token):
        with prepare.StreamWriter(tmp_path / "x", 97) as stream:
            stream.add(np.array([token]))

    def die(*_):
        raise Killed

    write(1)
    with monkeypatch.context() as patch:
        patch.setattr("data.stream_writer.os.fsync", die)
        with pytest.raises(Killed):
            write(2)
    assert documents_of(tmp_path / "x") == [[1]]
    replace, calls = os.replace, []

    def second_dies(*names):
        calls.append(names)
        if len(calls) == 2:
            raise Killed
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr("data.stream_writer.os.replace", second_dies)
        with pytest.raises(Killed):
            write(2)
    with pytest.raises(DataError, match=r"x\.idx: no such file"):
        TokenStream(tmp_path / "x")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_cut_short_at_any_write_goes_on(tmp_path, monkeypatch, capsys):
    """It dies before, or at, every single fsync, rename and removal that it makes."""
    texts = [f"number {n % 35}" for n in range(40)]
    files = write_lines(tmp_path / "t.jsonl", texts)
    options = Options(deduplicate=True, validation=0.3)

    def run():
        return tokenize(files, OURS, tmp_path / "x", options, part_size=6000)

    run()
    expected, left = bytes_of(tmp_path / "x"), 0
    calls = {name: getattr(os, name) for name in ("fsync", "replace", "rmdir", "unlink")}

    def counted(name):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return calls[name](*args, **kwargs)

        return call

    for moment in range(1, 200):
        for file in expected:
            (tmp_path / file).unlink(missing_ok=True)
        left = moment
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, counted(name))
            try:
                run()
                assert left > 0
                break
            except Killed:
                pass
        run()
        assert bytes_of(tmp_path / "x") == expected, moment
    assert moment > 30
    assert "parts are done; going on" in capsys.readouterr().err


def test_finished_parts_are_not_made_again_and_other_options_begin_anew(tmp_path, capsys):
    texts = [f"number {n}" for n in range(40)]
    files = write_lines(tmp_path / "t.jsonl", [*texts, "\x00"])
    with open(files[0], "a") as f:
        f.write("{broken\n")

    class Counting(Tokenizer):
        encoded = 0

        def encode_batch(self, texts, processes=1):
            Counting.encoded += len(texts)
            return super().encode_batch(texts, processes)

    one, kept_short = Counting(BYTES), Options(min_characters=1)

    def run(options, on_error, encoder=one):
        Counting.encoded = 0
        with pytest.raises(DataError) if on_error == "stop" else open(os.devnull):
            tokenize(files, encoder, tmp_path / "x", options, on_error=on_error, part_size=6000)
        return Counting.encoded, capsys.readouterr().err

    encoded, printed = run(Options(), "stop")
    assert encoded == 40 and "parts are" not in printed
    encoded, printed = run(Options(), "stop")  # what was finished was kept
    assert 0 < encoded < 20 and "parts are done; going on" in printed
    parts = len(list((tmp_path / "x.parts").glob("*.record"))) - 1
    assert parts == 3
    encoded, printed = run(kept_short, "stop")
    assert encoded == 40 and "inputs or options are others now; begun anew" in printed
    other = Counting({bytes([b]): 259 - b for b in range(256)})
    encoded, printed = run(kept_short, "stop", other)
    assert encoded == 40 and "begun anew" in printed
    os.utime(files[0], (1, 1))
    encoded, printed = run(kept_short, "stop", other)
    assert encoded == 40 and "begun anew" in printed
    encoded, printed = run(kept_short, "skip", other)
    assert 0 < encoded < 20
    assert not (tmp_path / "x.parts").exists()


def test_a_damaged_part_is_named(tmp_path):
    files = write_lines(tmp_path / "t.jsonl", ["text"] * 40)
    with open(files[0], "a") as f:
        f.write("{broken\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"line 41: not JSON.*--on_error skip"):
            tokenize(files, OURS, tmp_path / "x", part_size=6000)
    (tmp_path / "x.parts" / "000001.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"000001\.npz: damaged .*; remove .*x\.parts"):
        tokenize(files, OURS, tmp_path / "x", on_error="skip", part_size=6000)


def test_an_error_in_a_finished_part_stops_the_next_run_too(tmp_path, monkeypatch):
    files = write_lines(tmp_path / "t.jsonl", ["text"] * 40)
    files[0].write_text("{broken\n" + files[0].read_text())

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepare, "_join", die)
        tokenize(files, OURS, tmp_path / "x", on_error="skip", part_size=6000)
    with pytest.raises(DataError, match="line 1: not JSON"):
        tokenize(files, OURS, tmp_path / "x", part_size=6000)


@pytest.mark.slow
def test_killed_and_restarted(tmp_path, kills=6):
    """A run that is killed so many times, its processes with it, ends as one that is not."""
    rng = random.Random(1)
    words = [rng.randbytes(4).hex() for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=2000)) for _ in range(500)]
    write_lines(tmp_path / "t.jsonl", texts)
    tokenizer.save(BYTES, tmp_path / "r.tiktoken")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from data import prepare\n"
        "prepare.tokenize.__defaults__ = (*prepare.tokenize.__defaults__[:-1], 1 << 18)\n"
        "if __name__ == '__main__':\n"
        "    prepare.main(sys.argv[1:])\n"
    )
    args = [sys.executable, script, "tokens", tmp_path / "t.jsonl", "--validation=0.1"]
    args += ["--deduplicate", "--tokenizer", tmp_path / "r.tiktoken", "--processes=2", "--out"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}

    def start(out):
        line = [*map(str, args), str(tmp_path / out)]
        return subprocess.Popen(
            line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    assert start("whole").wait() == 0
    done = continued = 0
    while done < kills:
        run = start("cut")
        parts, more = tmp_path / "cut.parts", rng.randint(1, 3)
        before = len(list(parts.glob("0*.record")))
        while run.poll() is None and len(list(parts.glob("0*.record"))) < before + more:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        if run.poll() is None:
            run.kill()
            done += 1
        # Its workers hold its stderr: it ends only when they have.
        printed = run.communicate(timeout=60)[1]
        assert run.returncode in (0, -signal.SIGKILL), printed
        continued += "parts are done; going on" in printed
    last = start("cut")
    printed = last.communicate()[1]
    assert last.returncode == 0, printed
    assert continued + ("parts are done; going on" in printed) > kills // 2
    for suffix in SUFFIXES:
        whole, cut = (tmp_path / f"{name}.{suffix}" for name in ("whole", "cut"))
        named = suffix.endswith(("json", "csv"))
        same = whole.read_text().replace("whole", "cut") if named else None
        assert (cut.read_bytes() == whole.read_bytes()) if same is None else cut.read_text() == same
    assert not (tmp_path / "cut.parts").exists() and not list(tmp_path.glob("*.tmp"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(max_size=40)),
    st.builds(lambda value: json.dumps(value).encode(), VALUES),
    st.builds(lambda value: json.dumps({"text": value}).encode(), VALUES),
    st.builds(lambda depth: b'{"text":' + b"[" * depth, st.integers(0, 100_000)),
    st.sampled_from(
        [b"", b" ", b"\0" * 99, b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"\xef\xbb\xbf"]
    ),
)
FILE = st.tuples(
    st.sampled_from(["jsonl", "json", "txt", "parquet", "arrow"]),
    st.sampled_from(["", ".gz", ".zst"]),
    st.lists(LINES, max_size=6),
    st.none() | st.floats(0, 1),  # where it is cut
    st.none() | st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=3)),  # what is damaged
)


TABLES = ("parquet", "arrow")


def build(folder, number, case):
    form, suffix, lines, cut, damage = case
    if form in TABLES:
        path = folder / f"{number}.{form}"
        table = pa.table({"text": pa.array(lines, pa.binary())})
        if form == "parquet":
            pq.write_table(table, path, row_group_size=2)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        content = path.read_bytes()
    else:
        path = folder / f"{number}.{form}{suffix}"
        pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
        content = pack(b"\n".join(lines))
    if damage is not None:
        at = int(damage[0] * len(content))
        content = content[:at] + damage[1] + content[at + len(damage[1]) :]
    if cut is not None:
        content = content[: int(cut * len(content))]
    path.write_bytes(content)


def counted_by_hand(case):
    """(documents in) of lines that are whole, by the plainest of readers."""
    form, _, lines, cut, damage = case
    if form in TABLES and cut is None and damage is None:
        return len(lines)
    if form == "txt":
        return 1  # a document or an error
    if form == "jsonl" and cut is None and damage is None:
        return sum(bool(line.strip()) for line in b"\n".join(lines).split(b"\n"))
    return None


def fuzz(folder, cases):
    for file in folder.iterdir():
        file.unlink()
    for number, case in enumerate(cases):
        build(folder, number, case)
    (folder / "z.txt").write_text("one that is good")
    expected = list(map(counted_by_hand, cases))
    files = find_files([folder])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # nothing is killed here
        reports = [
            tokenize(files, OURS, folder / "x", Options(), 1, "skip", part_size=size)
            for size in (1 << 26, 600)
        ]
    assert reports[0] == reports[1]
    add_up(reports[0])
    if None not in expected:
        assert reports[0]["documents_in"] == 1 + sum(expected)
    assert texts_of(folder / "x")[-1] == "one that is good"
    per_file = Counter(error.split(",")[0].split(": ")[0] for error in reports[0]["errors"])
    for number, (form, suffix, _, cut, _) in enumerate(cases):
        # A packed file or table that was cut says so.
        if (suffix or form == "parquet") and form != "arrow" and cut is not None and cut < 0.99:
            name = f"{number}.{form}" if form in TABLES else f"{number}.{form}{suffix}"
            assert per_file[str(folder / name)] >= 1


QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


@QUIET
@given(st.lists(FILE, min_size=1, max_size=3))
def test_broken_input_is_counted(tmp_path, cases):
    fuzz(tmp_path, cases)


@pytest.mark.slow
@settings(QUIET, max_examples=400)
@given(st.lists(FILE, min_size=1, max_size=3))
def test_broken_input_is_counted_at_length(tmp_path, cases):
    fuzz(tmp_path, cases)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not JSON"),
        ("x.txt", b"caf\xe9", r"x\.txt: not UTF-8 at byte 3"),
        ("x.jsonl.gz", b"not gzip", r"x\.jsonl\.gz, line 1: cannot be read further"),
        ("x.txt", b"  \n", "no document for training: of 1 read 0 were kept .*empty 1"),
        ("x.jsonl", b"", "no document for training: of 0 read"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=message):
        tokenize(find_files([tmp_path / name]), OURS, tmp_path / "out" / "x")
    assert not list(tmp_path.glob("out/*.bin")) and not list(tmp_path.glob("out/*.tmp"))


def test_command_line(tmp_path):
    texts = [f"le texte numéro {n} est ici" for n in range(300)]
    write_lines(tmp_path / "t.jsonl", texts, language="fr")
    ranks = tmp_path / "r.tiktoken"
    tokenizer.save(BYTES, ranks)
    # The output lies in the folder that is read, and is not read when it is made once more.
    args = ("tokens", tmp_path, "--tokenizer", ranks, "--out", tmp_path / "d")
    for _ in range(2):
        done = launch("data.prepare", *args, "--validation=0.2", "--processes=2", "--on_error=skip")
        assert done.returncode == 0, done.stderr
        assert "documents 300 of 300; left out: error 0" in done.stdout
        assert "d.valid: documents" in done.stdout and "peak memory" in done.stdout
    assert len(documents_of(tmp_path / "d.valid")) + len(documents_of(tmp_path / "d")) == 300
    with open(tmp_path / "t.jsonl", "a") as f:
        f.write('{"text": "sans langue"}\n')
    done = launch(
        "data.prepare", *args, "--split_by=language", "--min_characters=3", "--processes=1"
    )
    assert done.returncode == 2 and "t.jsonl, line 301: no field 'language'" in done.stderr
    done = launch(
        "data.prepare", *args, "--split_by=language", "--on_error=skip", "--split_length=9"
    )
    assert done.returncode == 0 and "left out: " in done.stderr, done.stderr
    assert "d.fr.long: documents 300" in done.stdout and "left out: error 1," in done.stdout


@pytest.mark.parametrize(
    "args,message",
    [
        (("tokens", "{t}", "--tokenizer={r}", "--out=/dev/null/x"), "Not a directory"),
        (("tokens", "none.txt", "--tokenizer={r}", "--out={d}/y"), "none.txt: not a folder"),
        (("tokens", "{t}", "--tokenizer={r}", "--out={d}/y", "--validation=1"), "under 1, not 1.0"),
        (("tokens", "{t}", "--tokenizer={r}", "--out={d}/y", "--text_field=b"), "no field 'b'"),
        (("tokens", "{t}", "--tokenizer={t}", "--out={d}/y"), "t.jsonl: not the tokenizer.json"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, args, message):
    write_lines(tmp_path / "t.jsonl", ["some text"])
    tokenizer.save(BYTES, tmp_path / "r.tiktoken")
    given = {"t": tmp_path / "t.jsonl", "r": tmp_path / "r.tiktoken", "d": tmp_path}
    with pytest.raises((ConfigError, DataError, OSError), match=message) as error:
        prepare.main([arg.format(**given) for arg in args])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("y*"))


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
