"""From raw text to token streams, and to a vocabulary.

    python -m data.prepare vocabulary INPUTS... --vocab_size 8000 --out out/mine/ranks.tiktoken
    python -m data.prepare tokens INPUTS... --tokenizer out/mine/ranks.tiktoken --out out/mine/fr

INPUTS are files, globs and folders, on this machine or at any address that fsspec knows: s3://,
gs://, https://, hf://datasets/NAME ... A .txt or .md is a document, a .jsonl has a JSON object per
line, a .json the same, or one object, or one array of them; a .parquet has a document per row. All
but tables may be compressed: .gz .bz2 .xz .zst. Other files are read as text where they are named.

`tokens` writes each document, cleaned, as `<s> text </s>` to OUT.bin and OUT.idx (the format of
data/dataset.py), and a report, OUT.json. --validation holds out documents in OUT.valid; --split_by
language makes streams OUT.fr, OUT.en ...; --split_length 4096 makes OUT.short and OUT.long. OUT.csv
and OUT.valid.csv are mixtures of them to train on, every token as often as any other.

The same command, given again, skips the input files that are finished. The bytes written are the
same for any number of processes. Results are replaced only with --overwrite.

`vocabulary` learns a byte-level BPE from the texts, whole or each in a share of the bytes, as in
`vocabulary french/ english/ --shares 0.6 0.4`.

Filtering web text by language, quality or similarity is out of scope: see Hugging Face's datatrove.
"""

import argparse
import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain, islice, repeat
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from tqdm import tqdm

from config.cli import ConfigError, Parser, in_one_line, lock, run_cli, write_file
from data import tokenizer as tokenizers
from data.dataset import (
    DTYPES,
    EOS,
    HEADER,
    MAGIC,
    DataError,
    open_store,
    size_of,
    store_errors,
    token_dtype,
)
from data.tokenizer import LucieBPE, Tokenizer

try:
    from compression import zstd  # from Python 3.14 on
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

Source = Path | str  # a string is an address of fsspec

PLAIN = (".txt", ".md")
KINDS = (*PLAIN, ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What people and `datasets` put beside data, read only where it is named.
BESIDE_DATA = re.compile(
    r"(readme|licen[cs]e|changelog|citation|notice)(\.|$)|(dataset_info|dataset_dict|state)\.json$"
)

MAX_DOCUMENT = 1 << 26  # bytes of one document
ROWS = 64  # of a table, made Python objects at a time
BATCH_BYTES = 1 << 18  # bytes handed to a process at a time
OVERHEAD = 512  # bytes of memory that a document takes besides its text
IN_FLIGHT = 4  # batches read in advance, for each process
SAVE_EVERY = 5.0  # seconds after which a finished input file is worth noting down
CHUNK = 1 << 20  # tokens looked at together
OTHER = "other inputs or options: choose another --out, or give --overwrite"
ERRORS = 100  # listed in the report; all are counted
STREAMS = 1000  # that one run may write
HELD_OUT = 10  # documents that should be held out; where fewer would be, tails are
REASONS = ("error", "empty")  # for leaving a document out
# Of a StreamWriter, in progress.json:
SAVED = ("run", "tails", "files_done", "counts", "errors", "sizes", "stored", "report")


@dataclass(frozen=True)
class Options:
    """How documents are processed."""

    text_field: str = "text"
    split_by: tuple[str, ...] = ()  # fields, whose every combination of values is a stream
    validation: float = 0.0  # share of the text held out; a document's text alone decides
    split_length: int | None = None  # documents of more tokens, <s> and </s> included, are apart


# --- finding files -------------------------------------------------------------------------------


def kind_of(source: Source) -> str:
    """Which of KINDS a file is, by its suffix; "" for none."""
    kind = _suffixes(source)[0]
    return kind if kind in KINDS else ""


def _suffixes(source: Source) -> tuple[str, str]:
    """The suffix of a file's kind, and that of its compression or ""."""
    name = Path(source.partition("?")[0] if isinstance(source, str) else source.name)
    compression = name.suffix.lower() if name.suffix.lower() in COMPRESSED else ""
    return (Path(name.stem) if compression else name).suffix.lower(), compression


def find_files(inputs: Iterable[str | Path]) -> list[Source]:
    """The files named, matched by a glob or found in folders, each once, in a fixed order.

    Raises DataError for an input that matches no file, and for a folder without data.
    """
    found: dict[str, Source] = {}
    for given in map(str, inputs):
        files = _find_remote(given) if "://" in given else _find_local(given)
        if not files:
            kinds = f"no {', '.join(KINDS)} file in it"
            raise DataError(f"{given}: {kinds if os.path.isdir(given) else 'no such file'}")
        for file in files:  # one that is reached by two paths, or by a link, is read once
            found.setdefault(file if isinstance(file, str) else os.path.realpath(file), file)
    return list(found.values())


def _find_local(given: str) -> list[Path]:
    names = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    files: list[Path] = []
    for name in map(Path, names):
        if name.is_dir():
            inside = (path for path in sorted(name.rglob("*")) if path.is_file())
            files += _data_among([p for p in inside if "/." not in f"/{p.relative_to(name)}"], name)
        elif name.is_file():  # no pipe, and no link to nowhere
            files.append(name)
    return files


def _data_among(files: list[Any], folder: str | Path) -> list[Any]:
    """The files of a folder that are data. Prints the kinds of the others."""
    names = {file: str(file).rpartition("/")[2] for file in files}
    data = [f for f in files if kind_of(f) and not BESIDE_DATA.match(names[f].lower())]
    others = Counter(Path(names[f]).suffix or names[f] for f in set(files).difference(data))
    if others:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in others.most_common(5))
        print(f"{folder}: not read: {kinds}", file=sys.stderr)
    return data


def _find_remote(address: str) -> list[str]:
    with store_errors(address):
        store, path = open_store(address)
        if "*" in path or "[" in path:
            found = store.glob(path, detail=True).items()
            found = [f for f, info in found if info["type"] == "file" and "/." not in f]
        elif store.isfile(path):
            found = [path]
        else:
            start = len(path.rstrip("/"))
            found = [file for file in store.find(path) if "/." not in file[start:]]
            found = _data_among(sorted(found), address)
        return [store.unstrip_protocol(file) for file in sorted(found)]


# --- reading files -------------------------------------------------------------------------------


class Record(NamedTuple):
    """What a document is made of, not yet parsed, or the error that stands in its place."""

    number: int  # of its line, row or item, from 1
    content: Any  # bytes of a JSON object, or the object; values may be bytes of UTF-8
    size: int  # bytes of it, about
    error: str = ""


def records(source: Source, columns: list[str]) -> Iterator[Record]:
    """The records of a file. columns: names of the fields to read, that of the text first.

    A file on disk that breaks ends in a record with the error. Raises DataError where a package for
    this kind of file is not installed, and for a file of a store that breaks: the connection may be
    lost, and what it would have given must not be left out.
    """
    number = 0
    try:
        for record in _records(source, columns):
            number = record.number
            yield record
    except DataError:
        raise
    except Exception as error:  # what damaged files make their readers raise has no class in common
        if isinstance(source, str):
            with store_errors(source):
                raise
        yield Record(number + 1, None, 0, f"cannot be read further: {in_one_line(error)}")


def read_documents(
    files: Iterable[Source],
    progress: tqdm | None = None,
    text_field: str = "text",
    on_error: str = "stop",
) -> Iterator[str]:
    """The texts of the files, one by one. progress: a bar of bytes, moved on after each file.

    Raises DataError with file and line for a bad one, or says so and skips it.
    """
    for source in files:
        for record in records(source, [text_field]):
            try:
                yield parse(record, [text_field])[0]
            except ValueError as error:
                message = f"{location(source, record.number)}: {error}"
                if on_error == "stop":
                    raise DataError(message) from None
                tqdm.write(f"left out: {ascii(message)[1:-1]}", file=sys.stderr)
        if progress is not None:
            progress.update(size_of(source) or 0)


def location(source: Source, number: int) -> str:
    """Where a record is, in words."""
    word = {".jsonl": "line", ".json": "item", ".parquet": "row"}.get(kind_of(source))
    return f"{source}, {word} {number:,}" if word else str(source)


def parse(record: Record, columns: list[str]) -> list[str]:
    """The text of a record, and the other values asked for; whole numbers among them as text.

    Raises ValueError with the reason for what is not JSON in UTF-8 or lacks a field.
    """
    if record.error:
        raise ValueError(record.error)
    content, values = record.content, []
    if isinstance(content, bytes):
        content = _parse_json(content)
    for name in columns:
        value = content.get(name) if isinstance(content, dict) else None
        if value is None:
            raise ValueError(f"no field {name!r}")
        if type(value) is int and values:
            value = str(value)
        if not isinstance(value, str | bytes):
            raise ValueError(f"its field {name!r} is not a string")
        values.append(_decode(value) if isinstance(value, bytes) else value)
    return values


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start:,}") from None


def _parse_json(content: bytes) -> Any:
    text = _decode(content)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos:,}") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def _records(source: Source, columns: list[str]) -> Iterator[Record]:
    kind = kind_of(source)
    if isinstance(source, Path):
        raw = open(source, "rb", 0)
    else:
        store, path = open_store(source)
        raw = store.open(path, "rb")
    with io.BufferedReader(raw, 1 << 20) as stored, _unpacked(source, stored) as stream:
        if kind == ".parquet":
            yield from _table(source, stream, columns)
        elif kind == ".jsonl":
            yield from _lines(stream)
        elif kind == ".json":
            yield from _json(stream)
        else:
            for number, content in enumerate(_pieces(stream), start=1):
                yield Record(number, {columns[0]: content}, len(content))


def _unpacked(source: Source, stored: io.BufferedReader) -> BinaryIO:
    _, compression = _suffixes(source)
    if not compression:
        return stored
    if not stored.peek(1):
        raise EOFError("an empty file is not compressed")
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stored)
    if compression == ".zst":
        # fsspec might take zstandard, which reads one frame only, and reads half a file as whole.
        if zstd is None:
            raise DataError(f"{source}: reading .zst needs: pip install backports.zstd")
        # The largest window that zstd --long=31 makes; a frame takes what it asks for.
        return zstd.ZstdFile(stored, options={zstd.DecompressionParameter.window_log_max: 31})
    return (bz2.BZ2File if compression == ".bz2" else lzma.LZMAFile)(stored)


def _lines(stream: BinaryIO, number: int = 0) -> Iterator[Record]:
    while line := stream.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield Record(number, None, 0, f"a line over {MAX_DOCUMENT:,} bytes")
        elif line.strip():
            yield Record(number, line, len(line))


def _json(stream: BinaryIO) -> Iterator[Record]:
    """An object a line, where the first line is a whole one; or else one array or one object."""
    first, whole = stream.readline(MAX_DOCUMENT + 1), False
    with suppress(ValueError):
        whole = isinstance(_parse_json(first), dict)
    if whole:
        yield Record(1, first, len(first))
        yield from _lines(stream, 1)
    elif first:
        content = first + stream.read(max(0, MAX_DOCUMENT + 1 - len(first)))
        if len(content) > MAX_DOCUMENT:
            raise ValueError(f"over {MAX_DOCUMENT:,} bytes: make it a .jsonl")
        found = _parse_json(content)
        items = found if isinstance(found, list) else [found]
        for number, item in enumerate(items, start=1):
            yield Record(number, item, len(content) // len(items))


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    """A text; one longer than MAX_DOCUMENT is cut at line ends."""
    block = stream.read(MAX_DOCUMENT)
    while len(block) == MAX_DOCUMENT:
        # Without a line end, before a character that is not whole.
        end = block.rfind(b"\n") + 1 or codecs.utf_8_decode(block, "replace", False)[1]
        yield block[:end]
        block = block[end:] + stream.read(end)
        if not block:
            return
    yield block


def _table(source: Source, stream: BinaryIO, columns: list[str]) -> Iterator[Record]:
    """The rows of a .parquet file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{source}: reading tables needs: pip install pyarrow") from None
    number = 0
    with pa.PythonFile(stream) as file:
        table = pq.ParquetFile(file)
        if lacking := {*columns} - {*table.schema_arrow.names}:
            raise ValueError(f"no column {min(lacking)!r}")
        for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
            batch.validate(full=True)  # or else pyarrow reads where a damaged file points
            for row in batch.to_pylist():
                number += 1
                text = row[columns[0]]
                yield Record(number, row, len(text) if isinstance(text, str | bytes) else 0)


# --- what is done to a document ------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
LINE_ENDS = {"\v": "\n", "\f": "\n", "\x85": "\n"}


def clean(text: str) -> str:
    """The text as it is trained on.

    Halves of UTF-16 pairs, as JSON may write them, become their character, single ones U+FFFD.
    Windows line ends become a line feed, as do control characters that end a line or a page
    (vertical tab, form feed, next line); other control characters go, except tab, line feed and
    carriage return. Unicode is composed (NFC), as the tokenizers see it.
    """
    text = CONTROL.sub(lambda found: LINE_ENDS.get(found[0], ""), tokenizers.whole(text))
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def hash_fraction(text: str, salt: bytes = b"") -> float:
    """A number from 0 to under 1, even over texts, that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode() + salt).digest()[:8], "big") / 2**64


def split_tail(text: str, share: float) -> list[tuple[str, bool]]:
    """The text in two, each part with whether it is held out: about `share` of it at the end.

    The tail begins where a paragraph does, or else a line or a word.
    """
    tail = max(1, round(len(text) * share))
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    at = max(first + 1, last - tail)  # so that neither part is blank
    for border in ("\n\n", "\n", " "):
        if (found := text.rfind(border, max(first + 1, at - tail), at)) >= 0:
            at = found + len(border)
            break
    return [(part, held_out) for part, held_out in ((text[:at], False), (text[at:], True)) if part]


def suffix_of(values: list[str], length: str, held_out: bool) -> str:
    """What follows OUT in the name of a stream. length: "short", "long" or ""."""
    words = [*map(_escaped, values), length, "valid" if held_out else ""]
    return "".join(f".{word}" for word in words if word)


def _escaped(value: str) -> str:
    # No value makes a folder, or one of the words that may follow it.
    name = quote(value, safe="").replace(".", "%2E")
    return f"%{ord(name[0]):02X}{name[1:]}" if name in ("short", "long", "valid") else name


class Result(NamedTuple):
    """What became of a batch of records."""

    counts: Counter[str]  # of "out" and the REASONS
    errors: list[str]
    documents: list[tuple[str, int, int]]  # the suffix of its stream, bytes, tokens
    tokens: np.ndarray  # one array, because many small ones are sent slowly between processes


def to_documents(
    batch: list[tuple[Source, Record]], tokenizer: Tokenizer, options: Options, tails: bool
) -> Result:
    """Parse, clean and tokenize records, each with its file. tails: see `holds_out_tails`."""
    empty = np.empty(0, token_dtype(tokenizer.vocab_size))
    counts, errors, documents, tokens = Counter(), [], [], [empty]
    for source, record in batch:
        reason, parts, ids = "error", [], []
        try:
            text, *values = parse(record, [options.text_field, *options.split_by])
            for name, value in zip(options.split_by, values):
                if not value or not value.isprintable() or len(_escaped(value)) > 100:
                    raise ValueError(f"its field {name!r} cannot be part of a file's name")
            text = clean(text)
            if not text.strip():
                reason = "empty"
            else:
                if tails:
                    parts = split_tail(text, options.validation)
                else:
                    parts = [(text, hash_fraction(text) < options.validation)]
                ids = [tokenizer.encode_document(part) for part, _ in parts]
                reason = "out"
        except ValueError as error:  # tiktoken's regex gives up on a million spaces in a row, too
            errors.append(f"{location(source, record.number)}: {error}")
        counts[reason] += 1
        tokens += ids
        for (part, held_out), document in zip(parts, ids):
            length = ""
            if options.split_length is not None:
                length = "long" if len(document) > options.split_length else "short"
            suffix = suffix_of(values, length, held_out)
            documents.append((suffix, len(part.encode()), len(document)))
    return Result(counts, errors, documents, np.concatenate(tokens))


# --- processes -----------------------------------------------------------------------------------


Batch = tuple[list[tuple[Source, Record]], int | None]


def read_batches(files: list[Source], columns: list[str], first: int = 0) -> Iterator[Batch]:
    """The records of the files from number `first` on, each with its file, in batches.

    Now and then a batch ends with a file, and with it comes how many files are finished then.
    """
    batch, size, saved = [], 0, time.monotonic()
    for number, file in enumerate(files[first:], start=first + 1):
        for record in records(file, columns):
            weight = record.size + OVERHEAD
            if batch and size + weight > BATCH_BYTES:
                yield batch, None
                batch, size = [], 0
            batch.append((file, record))
            size += weight
        if number == len(files) or time.monotonic() - saved >= SAVE_EVERY:
            yield batch, number
            batch, size, saved = [], 0, time.monotonic()


def process(
    batches: Iterable[Batch], work: Callable[[list], Result], processes: int
) -> Iterator[tuple[Result, int | None]]:
    """What becomes of each batch, in order; IN_FLIGHT for each process are read ahead."""
    if processes == 1:
        yield from ((work(batch), files_done) for batch, files_done in batches)
        return
    pending: deque = deque()
    # spawn: a forked child of a process that runs threads can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (work,)) as pool:
        try:
            for batch, files_done in chain(batches, repeat(([], None), IN_FLIGHT * processes)):
                pending.append((pool.submit(_to_documents, batch), files_done))
                if len(pending) > IN_FLIGHT * processes:
                    future, files_done = pending.popleft()
                    yield future.result(), files_done
        except BrokenProcessPool:
            raise DataError("a process died, perhaps out of memory; try --processes 1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_process(work: Callable[[list], Result]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _to_documents(batch: list) -> Result:
    return _work(batch)


# --- writing streams -----------------------------------------------------------------------------


class StreamWriter:
    """The streams of a run, in the folder OUT.unfinished, whose progress.json counts what is done.

    A run goes on after the last input file that is counted; what later files gave is cut off. `run`
    identifies inputs and options. Raises DataError where another run has begun, unless `overwrite`.
    """

    def __init__(self, out: Path, run: str, overwrite: bool) -> None:
        self.out, self.overwrite = out, overwrite
        self.folder = Path(f"{out}.unfinished")
        self.run, self.tails, self.files_done = run, False, 0
        self.counts: Counter[str] = Counter()  # of "out" and the REASONS
        self.errors: list[str] = []
        self.sizes: Counter[str] = Counter()  # bytes of the text of each stream, by its suffix
        self.stored: Counter[str] = Counter()  # bytes of tokens in its file
        self.report: dict = {}  # once all is done
        known = read_json(self.folder / "progress.json")
        if known.get("run") != run:
            if known.get("files_done") and not overwrite:
                raise DataError(f"{out}: holds an unfinished run of {OTHER}")
            self.discard()
            self.folder.mkdir()
            self.save()
            return
        for name in SAVED:
            setattr(self, name, type(getattr(self, name))(known[name]))
        for suffix, size in self.stored.items() if not self.report else ():
            if (size_of(self.file(suffix)) or 0) < size:
                raise DataError(f"{self.file(suffix)}: truncated; remove {self.folder}")
            os.truncate(self.file(suffix), size)
        print(f"{out}: {self.files_done} input files are done; going on", file=sys.stderr)

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.out.name}{suffix}.bin"

    def discard(self) -> None:
        # progress.json first: without it nothing goes on from a folder that is half removed.
        (self.folder / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> None:
        """Note down how far the run is, once what is counted is on disk."""
        for suffix in self.stored:
            with open(self.file(suffix), "ab") as f:
                os.fsync(f.fileno())
        write_json(self.folder / "progress.json", {name: getattr(self, name) for name in SAVED})

    def add(self, result: Result) -> None:
        """Append what a batch became to its streams.

        Raises DataError for over STREAMS streams, and for one that has the name of another that is
        there, unless `overwrite`.
        """
        self.counts.update(result.counts)
        self.errors += result.errors[: ERRORS - len(self.errors)]
        parts, start = defaultdict(list), 0
        for suffix, size, length in result.documents:
            parts[suffix].append(result.tokens[start : start + length])
            self.sizes[suffix] += size
            start += length
        for suffix, tokens in parts.items():
            there = self.out.with_name(self.file(suffix).name)
            if suffix not in self.stored and there.exists() and not self.overwrite:
                raise DataError(f"{there}: was made from {OTHER}")
            with open(self.file(suffix), "ab" if suffix in self.stored else "wb") as f:
                f.write(np.concatenate(tokens).tobytes())
                self.stored[suffix] = f.tell()
        if len(self.stored) > STREAMS:
            raise DataError(f"over {STREAMS:,} streams: the fields to split by have many values")

    def fill(self, results: Iterable[tuple[Result, int | None]], on_error: str) -> None:
        """Append all batches. Raises DataError for an error in one, unless on_error is "skip"."""
        done = sum(self.counts.values())
        with tqdm(initial=done, unit=" documents", desc="tokens", smoothing=0.05) as bar:
            for result, files_done in results:
                self.add(result)
                if self.errors and on_error == "stop":
                    raise DataError(f"{self.errors[0]} (--on_error skip leaves it out and goes on)")
                if files_done is not None:
                    self.files_done = files_done
                    self.save()
                bar.update(sum(result.counts.values()))

    def index(self, split_by: tuple[str, ...], dtype: np.dtype) -> dict[str, dict]:
        """Write an .idx beside each .bin, and return what the report says of the streams."""
        found = {}
        for suffix, stored in tqdm(self.stored.items(), desc="index", leave=False):
            lengths, digest, begun, file = array("i"), hashlib.sha256(), 0, self.file(suffix)
            with open(file, "rb") as f:
                while content := f.read(CHUNK * dtype.itemsize):
                    digest.update(content)
                    tokens = np.frombuffer(content, dtype)
                    # Every document ends with </s>, which no text gives.
                    ends = np.flatnonzero(tokens == EOS) + 1
                    lengths.frombytes(np.diff(ends, prepend=-begun).astype(np.int32).tobytes())
                    begun = len(tokens) - int(ends[-1]) if len(ends) else begun + len(tokens)
            index = write_index(file.with_suffix(".idx"), np.frombuffer(lengths, np.int32), dtype)
            found[file.stem] = {
                "split_by": dict(zip(split_by, map(unquote, suffix.split(".")[1:]))),
                "held_out": suffix.endswith(".valid"),
                "documents": len(lengths),
                "tokens": stored // dtype.itemsize,
                "bytes": self.sizes[suffix],
                "sha256": {"bin": digest.hexdigest(), "idx": index},
            }
        return found


def write_index(file: Path | str, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Write an .idx of Megatron's format, and return its SHA-256.

    lengths: tokens of each document, int32.
    """
    count = len(lengths)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sizes = lengths.astype(np.int64) * dtype.itemsize
    offsets, boundaries = np.cumsum(sizes) - sizes, np.arange(count + 1, dtype=np.int64)
    arrays = (array.tobytes() for array in (lengths, offsets, boundaries))
    content = HEADER.pack(MAGIC, 1, code, count, count + 1) + b"".join(arrays)
    write_file(file, content)
    return hashlib.sha256(content).hexdigest()


def write_mixture(path: Path, rows: list[dict]) -> None:
    """A mixture CSV; the columns are the keys of the first row: name, path, weight ..."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def write_json(path: str | Path, content: dict) -> None:
    # In ASCII, because names of files may not be UTF-8.
    write_file(path, json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: str | Path) -> dict:
    """What a report or a progress file says; {} where it is not there or something else."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(Path(path).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


# --- tokens --------------------------------------------------------------------------------------


def tokenize(
    files: list[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    options: Options | None = None,
    processes: int = 1,
    on_error: str = "stop",
    overwrite: bool = False,
) -> dict:
    """Write the documents of the files to the streams `out`..., and return what OUT.json says.

    Every byte written is the same for any number of processes and of interruptions. Raises
    DataError for a document that cannot be read, unless on_error is "skip", for a connection that
    fails, where another process writes to `out`, and where the results of other inputs or options
    would be lost, unless `overwrite`.
    """
    options, out = options or Options(), Path(out)
    if not 0 <= options.validation < 1:
        raise DataError(f"validation is a share from 0 to under 1, not {options.validation}")
    if (lock_file := lock(out)) is None:
        raise DataError(f"{out}: another process is writing to it")
    with lock_file:
        # The results may lie among the inputs.
        own = re.compile(re.escape(os.path.realpath(out)) + r"(\.json$|\.unfinished/)")
        files = [file for file in files if not own.match(os.path.realpath(file))]
        run, report = _identity(files, tokenizer, options), Path(f"{out}.json")
        before = read_json(report)
        if before.get("run") == run:
            print(f"{out}: already up to date", file=sys.stderr)
            return before
        if report.exists() and not overwrite:
            raise DataError(f"{report}: was made from {OTHER}")
        writer = StreamWriter(out, run, overwrite)
        if not writer.report:
            if options.validation and not writer.files_done:
                writer.tails = holds_out_tails(files, options)
            work = partial(to_documents, tokenizer=tokenizer, options=options, tails=writer.tails)
            columns = [options.text_field, *options.split_by]
            batches = read_batches(files, columns, writer.files_done)
            writer.fill(process(batches, work, processes), on_error)
            _finish(writer, options, token_dtype(tokenizer.vocab_size))
        _put_in_place(writer, before.get("streams", ()))
        return writer.report


def _identity(files: list[Source], tokenizer: Tokenizer, options: Options) -> str:
    """A digest of all that the streams depend on."""
    bpe = tokenizer.bpe
    ranks = bpe.source if isinstance(bpe, LucieBPE) else repr(bpe.ranks).encode()
    versions = []
    for file in files:  # what changes with its content: a time or a checksum
        if isinstance(file, Path):
            version = file.stat().st_mtime_ns
        else:
            with store_errors(file):
                store, path = open_store(file)
                version = store.ukey(path)
        versions.append((str(file), size_of(file), version))
    known = ("format 3", hashlib.sha256(ranks).hexdigest(), options, versions)
    return hashlib.sha256(ascii(known).encode()).hexdigest()


def _put_in_place(writer: StreamWriter, old: Iterable[str]) -> None:
    """Replace the streams of an earlier run by those in OUT.unfinished.

    The report goes first and comes last: where it is, there is all that it describes.
    """
    out = writer.out
    names = [f"{out.name}.{suffix}" for suffix in ("json", "csv", "valid.csv") if old]
    for name in names + [f"{name}.{suffix}" for name in old for suffix in ("idx", "bin")]:
        out.with_name(name).unlink(missing_ok=True)
    for file in sorted(writer.folder.iterdir()):
        if file.suffix in (".bin", ".idx", ".csv"):
            os.replace(file, out.with_name(file.name))
    write_json(f"{out}.json", writer.report)
    writer.discard()


def holds_out_tails(files: list[Source], options: Options) -> bool:
    """Whether the tail of each document is held out, and not whole documents. Says which.

    Tails are for a single book, or a folder with three files: where fewer documents than HELD_OUT
    would be expected in the validation stream, there might be none.
    """
    enough = math.ceil(HELD_OUT / options.validation)
    every = (record for file in files for record in records(file, [options.text_field]))
    tails = sum(1 for _ in islice(every, enough)) < enough
    chosen = "documents are few; the tail of each is" if tails else "whole documents are"
    print(f"validation: {chosen} held out", file=sys.stderr)
    return tails


def _finish(writer: StreamWriter, options: Options, dtype: np.dtype) -> None:
    """Write indexes, mixtures and the report. Raises DataError for a run without documents."""
    counts = writer.counts
    tails = "the tail of each document" if writer.tails else "whole documents"
    report = {
        "run": writer.run,
        "held_out": tails if options.validation else "nothing",
        "documents_in": sum(counts.values()),
        "documents": counts["out"],
        "left_out": {reason: counts[reason] for reason in REASONS},
        "errors": writer.errors,
    }
    if not counts["out"]:
        writer.discard()
        raise DataError(f"{writer.out}: no document was kept; left out: {_left_out(report)}")
    report["streams"] = streams = writer.index(options.split_by, dtype)
    for held_out, suffix in ((False, ".csv"), (True, ".valid.csv")):
        rows = []
        for name, stream in streams.items():
            if stream["held_out"] == held_out:
                row = {"name": name, "path": name, "weight": stream["tokens"]}
                rows.append(row | {k: v for k, v in stream["split_by"].items() if k not in row})
        if rows:
            write_mixture(writer.folder / f"{writer.out.name}{suffix}", rows)
    writer.report = report
    writer.save()


def _left_out(report: dict) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in report["left_out"].items())


# --- a vocabulary --------------------------------------------------------------------------------


def sample_texts(
    texts: list[list[Source]], shares: list[float], text_field: str, on_error: str
) -> Iterator[str]:
    """Texts, cleaned, of each list of files its share of the bytes.

    A document is drawn or not by its text alone, so a share is met up to chance. The sample is as
    large as the text with the least for its share allows. Every text is read twice: measured, then
    drawn from. Raises DataError for a text that is empty.
    """

    def read(files: list[Source]) -> Iterator[str]:
        return map(clean, read_documents(files, None, text_field, on_error))

    bar = tqdm(texts, desc="measure")
    sizes = [sum(len(text.encode()) for text in read(files)) for files in bar]
    most = min(size / share for size, share in zip(sizes, shares))
    if not most:
        raise DataError(f"{texts[sizes.index(0)][0]}: no text")
    for files, size, share in zip(texts, sizes, shares):
        keep = share * most / size
        print(f"{files[0]}: {keep:.1%} of {size / 1e6:,.3f} MB are drawn")
        for text in read(files):
            if keep > 1 - 1e-9 or hash_fraction(text, b"sample") < keep:
                yield text


def _vocabulary(args: argparse.Namespace) -> None:
    if args.out.is_dir():
        raise ConfigError(f"{args.out}: is a folder; --out is the ranks file to write")
    if args.shares:
        if len(args.shares) != len(args.inputs) or min(args.shares) <= 0:
            raise ConfigError("--shares has a number over 0 for each of the inputs")
        texts = [find_files([given]) for given in args.inputs]
        sample = sample_texts(texts, args.shares, args.text_field, args.on_error)
    else:
        files = tqdm(find_files(args.inputs), desc="read")
        sample = map(clean, read_documents(files, None, args.text_field, args.on_error))
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    ranks = tokenizers.train(sample, args.vocab_size)
    tokenizers.save(ranks, args.out)
    print(f"{args.out}: {args.vocab_size:,} tokens")


# --- the command ---------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m data.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text files to token streams")
    train = commands.add_parser("vocabulary", help="text files to a vocabulary")
    for command in (tokens, train):
        add = command.add_argument
        add("inputs", nargs="+", help="files, folders, globs, addresses")
        add("--text_field", default="text", help="field or column that holds the text (text)")
        said = "stop at an unreadable document (default), or skip and report it"
        add("--on_error", choices=("stop", "skip"), default="stop", help=said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = tokens.add_argument
    add("--tokenizer", required=True, help="ranks file, tokenizer.json or its folder")
    add("--out", required=True, help="stream to write, without suffix")
    add("--split_by", nargs="+", default=(), metavar="FIELD", help="a stream for each value")
    add("--validation", type=float, default=0.0, help="share of the text to hold out (0)")
    add("--split_length", type=int, help="put documents of more tokens into OUT.long")
    add("--processes", type=int, default=cores, help="worker processes (all cores)")
    add("--overwrite", action="store_true", help="replace what other inputs or options gave")
    add = train.add_argument
    add("--out", type=Path, required=True, help="ranks file to write")
    add("--vocab_size", type=int, default=65_024, help="special tokens included (65,024)")
    add("--shares", nargs="+", type=float, help="share of the bytes for each of the inputs")
    args = parser.parse_args(argv)
    (_vocabulary if args.command == "vocabulary" else _tokens)(args)


def _tokens(args: argparse.Namespace) -> None:
    if min(args.processes, 1 if args.split_length is None else args.split_length) < 1:
        raise ConfigError("--processes and --split_length must be 1 or more")
    if args.out.endswith("/") or not Path(args.out).name:
        raise ConfigError(f"--out {args.out}: must end in a name, such as out/mine/all")
    chosen = {option.name: getattr(args, option.name) for option in fields(Options)}
    options = Options(**chosen | {"split_by": tuple(args.split_by)})
    tokenizer, files = tokenizers.load(args.tokenizer), find_files(args.inputs)
    how = (options, args.processes, args.on_error, args.overwrite)
    report = tokenize(files, tokenizer, args.out, *how)
    for name, stream in report["streams"].items():
        print(f"{name}: documents {stream['documents']:,}, tokens {stream['tokens']:,}")
    read = f"{report['documents']:,} of {report['documents_in']:,}"
    print(f"documents {read}; left out: {_left_out(report)}; see {args.out}.json")
    for error in report["errors"]:
        print(f"left out: {ascii(error)[1:-1]}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main, DataError)
