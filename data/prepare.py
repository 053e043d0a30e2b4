"""From raw text to token streams, and to a vocabulary.

    python -m data.prepare vocabulary INPUTS... --vocab_size 8000 --out out/mine/ranks.tiktoken
    python -m data.prepare tokens INPUTS... --tokenizer out/mine/ranks.tiktoken --out out/mine/fr

INPUTS are files, globs and folders, on this machine or at any address that fsspec knows: s3://,
gs://, https://, hf://datasets/NAME ... A .txt or .md is a document, a .jsonl has a JSON object a
line, a .json the same, or one object, or one array of them; a .parquet or .arrow has a document a
row. All but the tables may be compressed: .gz .bz2 .xz .zst. A file of another kind that is named,
or matched by a glob, is read as text.

`tokens` writes each document, cleaned, as `<s> text </s>` to OUT.bin and OUT.idx (the format of
data/dataset.py), and a report, OUT.json, which counts what was left out by its reason. Documents
held out by --validation go to OUT.valid; --split_by language makes streams OUT.fr, OUT.en ...;
--split_length 4096 makes OUT.short and OUT.long; together OUT.fr.short and OUT.fr.long.valid.
OUT.csv and OUT.valid.csv are mixtures of them to train on, every token as often as any other.

The same command, given again, skips the input files that are finished. The bytes written are the
same for any number of processes. What other inputs or options gave is replaced only with
--overwrite. Memory: some batches for each process, one document, the column of a .parquet's row
group, the window of a .zst (up to 2 GB); at the end 4 bytes for each document of a stream.

`vocabulary` learns a byte-level BPE from the texts, whole or each in a share of the bytes: with
--shares fr=0.6 en=0.4 the inputs are NAME=PATH.

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
import signal
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from config.cli import ConfigError, Parser, lock, run_cli, write_file
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
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    zstd = None

Source = Path | str  # a string is an address of fsspec

PLAIN, TABLES = (".txt", ".md"), (".parquet", ".arrow")
KINDS = (*PLAIN, ".jsonl", ".json", *TABLES)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What people and `datasets` put beside data, read only where it is named.
BESIDE_DATA = re.compile(r"(readme|licen[cs]e|changelog|citation|notice)(\.|$)")
DATASETS_OWN = ("dataset_info.json", "dataset_dict.json", "state.json")
BYTES_OF = {"string": "binary", "large_string": "large_binary"}  # types of pyarrow
# What a damaged file makes its reader raise.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))

MAX_DOCUMENT = 1 << 26  # bytes of one document
ROWS = 64  # of a table, made Python objects at a time
BATCH_BYTES = 1 << 18  # bytes handed to a process at a time
OVERHEAD = 512  # bytes of memory that a document takes besides its text
IN_FLIGHT = 4  # batches read in advance, for each process
BUFFERED = 1 << 24  # bytes of tokens kept before they are written
SAVE_EVERY = 5.0  # seconds after which a finished input file is worth noting down
CHUNK = 1 << 20  # entries of an index, or tokens, looked at together
OTHER = "other inputs or options: choose another --out, or give --overwrite"
ERRORS = 100  # listed in the report; all are counted
STREAMS = 1000  # that one run may write
HELD_OUT = 10  # documents that should be held out; where fewer would be, tails are
REASONS = ("error", "empty", "short", "duplicate")  # for leaving a document out
RESERVED = ("name", "path", "weight", "epochs", "order", "series", "tokens")  # in a mixture


@dataclass(frozen=True)
class Options:
    """How documents are processed."""

    text_field: str = "text"
    split_by: tuple[str, ...] = ()  # fields, whose every combination of values is a stream
    validation: float = 0.0  # share of the text held out; a document's text alone decides
    min_characters: int = 0  # shorter documents are left out
    deduplicate: bool = False  # all but the first of equal texts are; 100 bytes of memory for each
    split_length: int | None = None  # documents of more tokens, <s> and </s> included, are apart


DEFAULTS = Options()


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
        if "://" in given:
            files = _find_remote(given)
        else:
            exists = os.path.exists(given)
            paths = map(Path, [given] if exists else sorted(glob.glob(given, recursive=True)))
            files = []
            for path in paths:  # what is neither is a pipe, or a link to nowhere
                files += _files_in(path) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            kinds = f"no {', '.join(KINDS)} file in it"
            raise DataError(f"{given}: {kinds if os.path.isdir(given) else 'no such file'}")
        for file in files:  # one that is reached by two paths, or by a link, is read once
            found.setdefault(file if isinstance(file, str) else os.path.realpath(file), file)
    return list(found.values())


def _files_in(folder: Path) -> list[Path]:
    """The data in a folder, and in folders that it links to. Says what is not read."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a link back to where it came from
            folders.clear()
            continue
        seen.add(real)
        # Sorted, so that of two ways to one folder the same is taken everywhere.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(here, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]  # no pipe, no link to nowhere
    return _data_among(sorted(found), folder)


def _data_among(files: list[Any], folder: Path | str) -> list[Any]:
    """Those of a folder's files that are data. Says what the others are.

    A README is a document only among other texts.
    """
    names = {file: str(file).rpartition("/")[2] for file in files}
    data = [file for file in files if kind_of(file) and names[file] not in DATASETS_OWN]
    if any(kind_of(file) not in PLAIN for file in data):
        data = [file for file in data if not BESIDE_DATA.match(names[file].lower())]
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
        elif address.startswith("http"):
            if not kind_of(address):
                known = ", ".join(KINDS)
                raise DataError(f"{address}: a web server has no folders; name {known} files")
            found = [path] if size_of(address) is not None else []
        elif store.isfile(path):
            found = [path]
        else:
            start = len(path.rstrip("/"))
            found = [file for file in store.find(path) if "/." not in file[start:]]
            found = _data_among(sorted(found), address)
        return [store.unstrip_protocol(file) for file in sorted(found)]


def size_and_version(source: Source) -> tuple[int, str]:
    """Bytes of a file, as stored, and what changes with its content: a time or a checksum."""
    if isinstance(source, Path):
        found = source.stat()
        return found.st_size, str(found.st_mtime_ns)
    with store_errors(source):
        store, path = open_store(source)
        info = store.info(path)
    known = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified")
    known += ("last_modified", "mtime", "created")
    return info["size"] or 0, next((str(info[key]) for key in known if info.get(key)), "")


# --- reading files -------------------------------------------------------------------------------


class Record(NamedTuple):
    """What a document is made of, not yet parsed, or the error that stands in its place."""

    number: int  # of its line, row or item, from 1
    content: Any  # bytes of a JSON object, or the object; values may be bytes of UTF-8
    size: int  # bytes of it, about
    position: int  # bytes of the file, as stored, read so far
    error: str = ""


def records(source: Source, columns: list[str]) -> Iterator[Record]:
    """The records of a file. columns: names of the fields to read, that of the text first.

    A file that breaks ends in a record with the error. Raises DataError only where a package for
    this kind of file is not installed, and where a connection fails.
    """
    number = 0
    try:
        for record in _records(source, columns):
            number = record.number
            yield record
    except READ_ERRORS as error:
        reason = (str(getattr(error, "strerror", "") or error).splitlines() or ["broken"])[0]
        yield Record(number + 1, None, 0, size_of(source) or 0, f"cannot be read further: {reason}")


def read_documents(
    files: Iterable[Source],
    progress: tqdm | None = None,
    text_field: str = "text",
    on_error: str = "stop",
) -> Iterator[str]:
    """The texts of the files, one by one.

    Raises DataError with file and line for a bad one, or says so and skips it.
    """
    for source in files:
        done = 0
        for record in records(source, [text_field]):
            try:
                if record.error:
                    raise ValueError(record.error)
                yield parse(record.content, [text_field])[0]
            except ValueError as error:
                message = f"{location(source, record.number)}: {error}"
                if on_error == "stop":
                    raise DataError(message) from None
                tqdm.write(f"left out: {ascii(message)[1:-1]}", file=sys.stderr)
            if progress is not None:
                progress.update(record.position - done)
                done = record.position


def location(source: Source, number: int) -> str:
    """Where a record is, in words."""
    words = {".jsonl": "line", ".json": "item", ".parquet": "row", ".arrow": "row"}
    word = words.get(kind_of(source))
    return f"{source}, {word} {number:,}" if word else str(source)


def parse(content: Any, columns: list[str]) -> list[str]:
    """The text of a record, and the other values asked for; whole numbers among them as text.

    Raises ValueError with the reason for what is not JSON in UTF-8 or lacks a field.
    """
    if isinstance(content, bytes):
        content = _parse_json(content)
    values = []
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
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # Python refuses to make a number of over 4,300 digits
            return json.loads(text, parse_int=lambda n: int(n) if len(n) < 99 else float(n))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos:,}") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def _records(source: Source, columns: list[str]) -> Iterator[Record]:
    kind = kind_of(source)
    with ExitStack() as stack:
        raw = open(source, "rb", 0) if isinstance(source, Path) else _RemoteFile(source)
        stored = stack.enter_context(io.BufferedReader(raw, 1 << 20))
        stream = _unpacked(source, stored, stack)
        if kind in TABLES:
            yield from _table(source, stream, columns)
        elif kind == ".jsonl":
            yield from _lines(stream, stored)
        elif kind == ".json":
            yield from _json(stream, stored)
        else:
            for number, content in enumerate(_pieces(stream), start=1):
                yield Record(number, {columns[0]: content}, len(content), stored.tell())


class _RemoteFile(io.RawIOBase):
    """A file of a store. Whatever fails in reading it is a DataError, and ends the run."""

    def __init__(self, address: str) -> None:
        self.address = address
        with store_errors(address):
            store, path = open_store(address)
            self.file = store.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        with store_errors(self.address):
            piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with store_errors(self.address):
            return self.file.seek(offset, whence)


def _unpacked(source: Source, stored: BinaryIO, stack: ExitStack) -> BinaryIO:
    _, compression = _suffixes(source)
    if not compression:
        return stored
    if not stored.read(1):
        raise EOFError("an empty file is not compressed")
    stored.seek(0)
    if compression == ".gz":
        return stack.enter_context(gzip.GzipFile(fileobj=stored))
    if compression == ".zst":
        # fsspec might take zstandard, which reads one frame only, and reads half a file as whole.
        if zstd is None:
            raise DataError(f"{source}: reading .zst needs: pip install backports.zstd")
        # The largest window that zstd --long=31 makes; a frame takes what it asks for.
        options = {zstd.DecompressionParameter.window_log_max: 31}
        return stack.enter_context(zstd.ZstdFile(stored, options=options))
    new = bz2.BZ2Decompressor if compression == ".bz2" else lzma.LZMADecompressor
    return stack.enter_context(io.BufferedReader(_Members(stored, new), 1 << 18))


class _Members(io.RawIOBase):
    """The members of a .bz2 or .xz, unpacked one after the other.

    Python's own readers ignore a member that is damaged where it begins, and all that follows it.
    """

    def __init__(self, stored: BinaryIO, new: Callable[[], Any]) -> None:
        self.stored, self.new, self.member = stored, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = b""
        while not piece:
            packed = b""
            if self.member.eof:
                packed = self.member.unused_data.lstrip(b"\0")  # .xz may be padded with zeros
                while not packed:
                    if not (more := self.stored.read(1 << 16)):
                        return 0
                    packed = more.lstrip(b"\0")
                self.member = self.new()
            elif self.member.needs_input:
                packed = self.stored.read(1 << 16)
                if not packed:
                    raise EOFError("compressed data is cut short")
            piece = self.member.decompress(packed, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _lines(stream: BinaryIO, stored: BinaryIO, number: int = 0) -> Iterator[Record]:
    while line := stream.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield Record(number, None, 0, stored.tell(), f"a line over {MAX_DOCUMENT:,} bytes")
        elif line.strip():
            yield Record(number, line, len(line), stored.tell())


def _json(stream: BinaryIO, stored: BinaryIO) -> Iterator[Record]:
    """An object a line; or one array, or one object, whose first line shows that it goes on."""
    number, line = 0, b"\n"
    while line and not (first := line.removeprefix(b"\xef\xbb\xbf").strip()):
        number, line = number + 1, stream.readline(MAX_DOCUMENT + 1)
    if line and len(line) <= MAX_DOCUMENT and not _goes_on(first):
        yield Record(number, line, len(line), stored.tell())
        yield from _lines(stream, stored, number)
    elif line:
        content = line + stream.read(max(0, MAX_DOCUMENT + 1 - len(line)))
        try:
            if len(content) > MAX_DOCUMENT:
                raise ValueError(f"over {MAX_DOCUMENT:,} bytes: make it a .jsonl")
            found = _parse_json(content)
        except ValueError as error:
            yield Record(1, None, 0, stored.tell(), str(error))
            return
        items = found if isinstance(found, list) else [found]
        for number, item in enumerate(items, start=1):
            yield Record(number, item, len(content) // len(items), stored.tell())


def _goes_on(line: bytes) -> bool:
    """Whether a line of JSON begins an array, or an object of several lines."""
    try:
        text = line.decode()
        json.loads(text, parse_int=float)  # any number of digits
    except json.JSONDecodeError as error:
        return text.startswith("[") or (text.startswith("{") and error.pos >= len(text))
    except (ValueError, RecursionError):
        pass
    return line.startswith(b"[")


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    """A text; one longer than MAX_DOCUMENT is cut at line ends."""
    block = stream.read(MAX_DOCUMENT)
    while len(block) == MAX_DOCUMENT:
        end = block.rfind(b"\n") + 1
        if not end:  # then before a character that is not whole
            _, end = codecs.utf_8_decode(block, "replace", False)
        yield block[:end]
        block = block[end:] + stream.read(end)
        if not block:
            return
    yield block


def _table(source: Source, stream: BinaryIO, columns: list[str]) -> Iterator[Record]:
    """The rows of a .parquet or .arrow file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{source}: reading tables needs: pip install pyarrow") from None
    size, number = size_of(source) or 0, 0
    try:
        with pa.PythonFile(stream) as file:
            if kind_of(source) == ".parquet":
                table = pq.ParquetFile(file)
                rows = table.metadata.num_rows
                _require(columns, table.schema_arrow.names)
                batches = table.iter_batches(ROWS, columns=columns, use_threads=False)
            else:
                is_file, rows = file.read(6) == b"ARROW1", 0
                file.seek(0)
                batches = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
                if is_file:
                    batches = map(batches.get_batch, range(batches.num_record_batches))
            for batch in batches:
                _require(columns, batch.schema.names)
                found = [_values(batch.column(name), name, name == columns[0]) for name in columns]
                for values in zip(*found):
                    number += 1
                    length = sum(len(value) for value in values if value is not None)
                    position = size * number // rows if rows else file.tell()
                    yield Record(number, dict(zip(columns, values)), length, position)
    # A damaged file makes pyarrow raise any of them.
    except (pa.ArrowException, ValueError, LookupError, SystemError, MemoryError) as error:
        raise OSError(str(error)) from None


def _require(columns: list[str], names: list[str]) -> None:
    if lacking := [column for column in columns if column not in names]:
        raise OSError(f"no column {lacking[0]!r}; it has {', '.join(names)}")


def _values(column: Any, name: str, is_text: bool) -> list[bytes | None]:
    """A column's strings as bytes, for pyarrow does not check that they are UTF-8.

    Whole numbers become strings where the column is not the text.
    """
    import pyarrow as pa

    kind = column.type
    # pyarrow reads where a damaged file points, outside it too. As bytes: not its UTF-8.
    column = column.view(BYTES_OF[str(kind)]) if str(kind) in BYTES_OF else column
    column.validate(full=True)
    if pa.types.is_dictionary(kind):
        kind, column = kind.value_type, column.dictionary_decode()
    if pa.types.is_null(kind):
        return [None] * len(column)
    if pa.types.is_integer(kind) and not is_text:
        return column.cast(pa.string()).cast(pa.binary()).to_pylist()
    if str(kind) not in (*BYTES_OF, *BYTES_OF.values(), "string_view"):
        raise OSError(f"column {name!r} has type {kind}, not string")
    return column.cast(pa.large_binary()).to_pylist()


# --- what is done to a document ------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# The same in UTF-8, one byte or two: to look for these takes a third of the time.
CONTROL_BYTES = bytes(b for b in range(128) if CONTROL.match(chr(b)))
CONTROL_PAIRS = re.compile(b"\xc2[\x80-\x9f]")
LINE_ENDS = {"\v": "\n", "\f": "\n", "\x85": "\n"}


def clean(text: str) -> str:
    """The text as it is trained on.

    Halves of UTF-16 pairs, as JSON may write them, become their character, single ones U+FFFD.
    Windows line ends become a line feed, as do control characters that end a line or a page
    (vertical tab, form feed, next line); other control characters go, except tab, line feed and
    carriage return. Unicode is composed (NFC), as the tokenizers see it.
    """
    try:
        data = text.encode()  # the cheapest test for a surrogate: only they cannot be encoded
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        data = text.encode()
    if len(data.translate(None, CONTROL_BYTES)) < len(data) or CONTROL_PAIRS.search(data):
        text = CONTROL.sub(lambda found: LINE_ENDS.get(found[0], ""), text)
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


class Key(NamedTuple):
    """Which stream a document belongs to."""

    values: tuple[str, ...]  # of the fields that documents are split by
    length: str  # "short", "long", or "" where they are not split by length
    held_out: bool

    def name(self, out: str) -> str:
        """The name of the stream. No two keys have the same."""
        words = [out, *map(_escaped, self.values), self.length, "valid" if self.held_out else ""]
        return ".".join(filter(None, words))


def _escaped(value: str) -> str:
    # No value makes a folder, or one of the words that may follow it.
    name = quote(value, safe="", errors="replace").replace(".", "%2E")
    return f"%{ord(name[0]):02X}{name[1:]}" if name in ("short", "long", "valid") else name


class Document(NamedTuple):
    key: Key
    characters: int
    size: int  # bytes
    length: int  # tokens


class Result(NamedTuple):
    """What became of a record: nothing, a document, or the two parts that it was cut into."""

    documents: Sequence[Document] = ()
    digest: bytes = b""  # of the text, where duplicates are left out
    left_out: str = ""  # the reason
    error: str = ""


class Worker:
    """Records to documents: parsed, cleaned and tokenized. tails: see `holds_out_tails`."""

    def __init__(self, tokenizer: Tokenizer, options: Options, tails: bool) -> None:
        self.tokenizer, self.options, self.tails = tokenizer, options, tails
        self.columns = [options.text_field, *options.split_by]

    def __call__(self, contents: list) -> tuple[list[Result], np.ndarray]:
        """The results, and the tokens of their documents, one after the other, in `token_dtype`.

        In one array, because sending many small ones between processes is slow.
        """
        results, tokens = [], [np.empty(0, token_dtype(self.tokenizer.vocab_size))]
        for content in contents:
            try:
                if isinstance(content, Result):
                    results.append(content)
                else:
                    result, ids = self._document(content)
                    results.append(result)
                    tokens += ids
            except ValueError as error:
                results.append(Result(left_out="error", error=str(error)))
        return results, np.concatenate(tokens)

    def _document(self, content: object) -> tuple[Result, list[np.ndarray]]:
        options = self.options
        text, *values = parse(content, self.columns)
        for name, value in zip(options.split_by, values):
            if not value or not value.isprintable() or len(_escaped(value)) > 100:
                raise ValueError(f"its field {name!r} cannot be part of a file's name")
        text = clean(text)
        if not text.strip():
            return Result(left_out="empty"), []
        if len(text) < options.min_characters:
            return Result(left_out="short"), []
        if self.tails:
            parts = split_tail(text, options.validation)
        else:
            held_out = bool(options.validation) and hash_fraction(text) < options.validation
            parts = [(text, held_out)]
        digest = hashlib.sha256(text.encode()).digest()[:16] if options.deduplicate else b""
        documents, tokens = [], []
        for part, held_out in parts:
            try:
                ids = self.tokenizer.encode_document(part)
            except ValueError as error:  # tiktoken's regex gives up on a million spaces in a row
                raise ValueError(f"cannot be tokenized: {error}") from None
            length = ""
            if options.split_length is not None:
                length = "long" if len(ids) > options.split_length else "short"
            key = Key(tuple(values), length, held_out)
            documents.append(Document(key, len(part), len(part.encode()), len(ids)))
            tokens.append(ids)
        return Result(documents, digest), tokens


# --- processes -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    contents: list  # of records; a Result for one that has an error
    places: list[tuple[int, int]]  # file, record
    size: int  # bytes of memory
    position: int  # bytes of the last file that are read
    files_done: int | None  # where the batch ends with a file: how many are finished after it


def read_batches(files: list[Source], columns: list[str], first: int = 0) -> Iterator[Batch]:
    """The records of the files from number `first` on. Now and then a batch ends with a file."""
    contents, places, size, position, cut = [], [], 0, 0, time.monotonic()
    for file in range(first, len(files)):
        for record in records(files[file], columns):
            weight = record.size + OVERHEAD
            if contents and size + weight > BATCH_BYTES:
                yield Batch(contents, places, size, position, None)
                contents, places, size = [], [], 0
            error = record.error and Result(left_out="error", error=record.error)
            contents.append(error or record.content)
            places.append((file, record.number))
            size, position = size + weight, record.position
        if file == len(files) - 1 or time.monotonic() - cut >= SAVE_EVERY:
            yield Batch(contents, places, size, position, file + 1)
            contents, places, size, cut = [], [], 0, time.monotonic()


def process(
    batches: Iterable[Batch], worker: Worker, processes: int
) -> Iterator[tuple[Batch, tuple[list[Result], np.ndarray]]]:
    """The batches and what the worker makes of their contents, in order.

    Read in advance are IN_FLIGHT batches for each process, or one batch, whatever its size.
    """
    if processes == 1:
        for batch in batches:
            yield batch, worker(batch.contents)
        return
    pending: deque[tuple[Batch, Future]] = deque()
    # spawn: a forked child of a process that runs threads can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (worker,)) as pool:
        held = 0
        try:
            for batch in batches:
                while pending and held + batch.size > IN_FLIGHT * processes * BATCH_BYTES:
                    done, future = pending.popleft()
                    yield done, future.result()
                    held -= done.size
                # The contents are the process's now.
                future = pool.submit(_work, batch.contents)
                pending.append((batch._replace(contents=[]), future))
                held += batch.size
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise DataError("a process died, perhaps out of memory; try --processes 1") from None
        finally:
            for _, future in pending:
                future.cancel()


def _start_process(worker: Worker) -> None:
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(contents: list) -> tuple[list[Result], np.ndarray]:
    return _worker(contents)


# --- writing streams -----------------------------------------------------------------------------


@dataclass
class Stream:
    """A stream being written."""

    file: Path
    characters: int = 0
    size: int = 0  # bytes of the text
    stored: int = 0  # bytes in the file
    buffer: bytearray = field(default_factory=bytearray)  # what goes there next


class StreamWriter:
    """The streams of a run, written to a folder OUT.tmp, whose progress.json says how far they are.

    A run goes on after the last input file that progress.json counts; what later files gave is cut
    off. `run` identifies inputs and options. Raises DataError where the progress is another run's,
    unless `overwrite`, and for a stream that would replace one that is not in `replaced`.
    """

    def __init__(
        self, out: Path, run: str, deduplicate: bool, overwrite: bool, replaced: Container[str]
    ) -> None:
        self.out, self.run, self.replaced = out, run, replaced
        self.folder = Path(f"{out}.tmp")
        self.counts: Counter[str] = Counter()  # of "in", "out" and the REASONS
        self.errors: list[str] = []
        self.streams: dict[Key, Stream] = {}
        self.digests = Stream(self.folder / "digests")  # of the texts seen, 16 bytes each
        self.seen: set[bytes] | None = set() if deduplicate else None
        self.tails = False
        self.files_done = 0
        known = _progress(out)
        found = os.listdir(self.folder) if self.folder.exists() else []
        if not known and set(found) - {"progress.json.tmp"}:
            raise DataError(f"{self.folder}: not written by data.prepare; choose another --out")
        if known and known["run"] != run:
            if not overwrite:
                raise DataError(f"{out}: holds an unfinished run of {OTHER}")
            known = {}
        if not known:
            self.discard()
            self.folder.mkdir()
            self.save(0)
            return
        self.tails, self.files_done = known["tails"], known["files_done"]
        self.errors, self.digests.stored = known["errors"], known["digests"]
        self.counts.update(known["counts"])
        for values, length, held_out, *numbers in known["streams"]:
            self._stream(Key(tuple(values), length, held_out), *numbers)
        for stream in [*self.streams.values(), self.digests]:
            if (size_of(stream.file) or 0) < stream.stored:
                raise DataError(f"{stream.file}: truncated; remove {self.folder} to start over")
            if stream.stored:
                os.truncate(stream.file, stream.stored)
        if self.digests.stored:
            data = self.digests.file.read_bytes()
            self.seen = {data[at : at + 16] for at in range(0, len(data), 16)}
        print(f"{out}: {self.files_done} input files are done; going on", file=sys.stderr)

    def discard(self) -> None:
        """Remove the folder, progress.json last: without it the folder would be a stranger's."""
        if self.folder.exists():
            for file in sorted(self.folder.iterdir(), key=lambda f: f.name == "progress.json"):
                file.unlink()
            self.folder.rmdir()

    def _stream(self, key: Key, *numbers: int) -> Stream:
        if key not in self.streams:
            name = key.name(self.out.name)
            for suffix in ("bin", "idx"):
                file = self.out.with_name(f"{name}.{suffix}")
                if file.exists() and name not in self.replaced:
                    raise DataError(f"{file}: not of this --out, and would be overwritten")
            self.streams[key] = Stream(self.folder / f"{name}.bin", *numbers)
        return self.streams[key]

    def add(self, results: list[Result], tokens: np.ndarray) -> None:
        """Take over what a batch became. Raises DataError for over STREAMS streams."""
        end = 0
        for result in results:
            start = end
            end += sum(document.length for document in result.documents)
            reason = result.left_out
            if not reason and self.seen is not None:
                reason = "duplicate" if result.digest in self.seen else ""
                self.seen.add(result.digest)
                self.digests.buffer += b"" if reason else result.digest
            self.counts.update(("in", reason or "out"))
            if reason:
                continue
            for key, characters, size, length in result.documents:
                stream = self._stream(key)
                stream.buffer += tokens[start : start + length].tobytes()
                stream.characters += characters
                stream.size += size
                start += length
        if len(self.streams) > STREAMS:
            raise DataError(f"over {STREAMS:,} streams: the fields to split by have many values")
        if sum(len(stream.buffer) for stream in self.streams.values()) > BUFFERED:
            self._write(sync=False)

    def _write(self, sync: bool) -> None:
        for stream in [*self.streams.values(), self.digests]:
            if stream.buffer or (sync and stream.stored):
                with open(stream.file, "ab" if stream.stored else "wb") as f:
                    f.write(stream.buffer)
                    if sync:
                        f.flush()
                        os.fsync(f.fileno())
                stream.stored += len(stream.buffer)
                stream.buffer = bytearray()

    def save(self, files_done: int) -> None:
        """Count these input files as finished, once what they gave is on disk."""
        self._write(sync=True)
        streams = [[*k, s.characters, s.size, s.stored] for k, s in self.streams.items()]
        known = {"run": self.run, "files_done": files_done, "counts": self.counts}
        known |= {"errors": self.errors, "streams": streams, "digests": self.digests.stored}
        write_json(self.folder / "progress.json", known | {"tails": self.tails})
        self.files_done = files_done

    def index(self, split_by: tuple[str, ...], dtype: np.dtype) -> dict[str, dict]:
        """Write an .idx beside each .bin, and return what the report says of the streams."""
        found = {}
        total = sum(stream.stored for stream in self.streams.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="index", leave=False) as bar:
            for key, stream in self.streams.items():
                lengths, digest, begun = array("i"), hashlib.sha256(), 0
                with open(stream.file, "rb") as f:
                    while content := f.read(CHUNK * dtype.itemsize):
                        digest.update(content)
                        tokens = np.frombuffer(content, dtype)
                        # Every document ends with </s>, which no text gives.
                        ends = np.flatnonzero(tokens == EOS) + 1
                        lengths.frombytes(np.diff(ends, prepend=-begun).astype(np.int32).tobytes())
                        begun = len(tokens) - int(ends[-1]) if len(ends) else begun + len(tokens)
                        bar.update(len(content))
                name = key.name(self.out.name)
                index = self.folder / f"{name}.idx"
                write_index(index, np.frombuffer(lengths, np.int32), dtype)
                with open(index, "rb") as f:
                    index_digest = hashlib.file_digest(f, "sha256").hexdigest()
                found[name] = {
                    "split_by": dict(zip(split_by, key.values)),
                    "length": key.length,
                    "held_out": key.held_out,
                    "documents": len(lengths),
                    "tokens": stream.stored // dtype.itemsize,
                    "characters": stream.characters,
                    "bytes": stream.size,
                    "sha256": {"bin": digest.hexdigest(), "idx": index_digest},
                }
        return found


def write_index(file: Path | str, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an .idx of Megatron's format. lengths: tokens of each document, int32."""
    count, end = len(lengths), 0
    code = next(code for code, known in DTYPES.items() if known == dtype)
    with open(file, "wb") as f:
        f.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        f.write(lengths.tobytes())
        for start in range(0, count, CHUNK):
            ends = end + np.cumsum(lengths[start : start + CHUNK], dtype=np.int64)
            f.write((np.concatenate(([end], ends[:-1])) * dtype.itemsize).tobytes())
            end = ends[-1]
        for start in range(0, count + 1, CHUNK):
            f.write(np.arange(start, min(start + CHUNK, count + 1), dtype=np.int64).tobytes())
        f.flush()
        os.fsync(f.fileno())


def write_mixture(path: Path, rows: list[dict]) -> None:
    """A mixture CSV; the columns are the keys of the first row: name, path, weight ..."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def write_json(path: Path, content: dict) -> None:
    # In ASCII, because names of files may not be UTF-8.
    write_file(path, json.dumps(content, indent=1).encode() + b"\n")


# --- tokens --------------------------------------------------------------------------------------


def tokenize(
    files: list[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    options: Options = DEFAULTS,
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
    if not 0 <= options.validation < 1:
        raise DataError(f"validation is a share from 0 to under 1, not {options.validation}")
    out = Path(out)
    if (lock_file := lock(out)) is None:
        raise DataError(f"{out}: another process is writing to it")
    with lock_file:
        own = os.path.realpath(out)
        real = {file: os.path.realpath(file) for file in files if isinstance(file, Path)}
        mine = {
            f for f, r in real.items() if r == f"{own}.json" or r.startswith(f"{own}.tmp{os.sep}")
        }
        files = [file for file in files if file not in mine]
        stats = [size_and_version(file) for file in files]
        run, before = _identity(files, stats, tokenizer, options), _report(out)
        if before and before.get("run") == run:
            if _progress(out).get("run") == run:  # it was cut short when it was finished
                return _put_in_place(out, before)
            if all(out.with_name(f"{name}.idx").exists() for name in before["streams"]):
                _stop_at(before["errors"], on_error)
                with suppress(OSError):
                    Path(f"{out}.tmp").rmdir()  # an empty one
                print(f"{out}: already up to date", file=sys.stderr)
                return before
        elif before and not overwrite:
            raise DataError(f"{out}: was made from {OTHER}")
        replaced = before["streams"] if before else ()
        writer = StreamWriter(out, run, options.deduplicate, overwrite, replaced)
        try:
            _stop_at(writer.errors, on_error)
            if options.validation and not writer.files_done:
                writer.tails = holds_out_tails(files, options)
            worker = Worker(tokenizer, options, writer.tails)
            _fill(writer, files, [size for size, _ in stats], worker, processes, on_error)
        except BaseException:
            if not writer.files_done:
                writer.discard()
            raise
        report = _summary(writer, options) | {"run": run}
        report["streams"] = writer.index(options.split_by, token_dtype(tokenizer.vocab_size))
        _write_mixtures(writer.folder / out.name, report["streams"])
        write_json(writer.folder / "report.json", report)
        for name in replaced:
            for suffix in ("idx", "bin"):
                out.with_name(f"{name}.{suffix}").unlink(missing_ok=True)
        for suffix in ("csv", "valid.csv"):
            Path(f"{out}.{suffix}").unlink(missing_ok=True)
        os.replace(writer.folder / "report.json", f"{out}.json")  # now the run is finished
        return _put_in_place(out, report)


def _identity(files: list[Source], stats: list, tokenizer: Tokenizer, options: Options) -> str:
    """A digest of all that the streams depend on."""
    bpe = tokenizer.bpe
    ranks = bpe.source if isinstance(bpe, LucieBPE) else repr(bpe.ranks).encode()
    known = ("format 2", hashlib.sha256(ranks).hexdigest(), options, list(map(str, files)), stats)
    return hashlib.sha256(ascii(known).encode()).hexdigest()


def _report(out: Path) -> dict | None:
    """What OUT.json says, None where it is not there.

    Raises DataError where a file that this command did not write has the name of a result.
    """
    report, found = Path(f"{out}.json"), None
    if report.exists():
        with suppress(ValueError, RecursionError):
            found = json.loads(report.read_bytes())
        if not isinstance(found, dict) or not found.keys() >= {"documents_in", "streams"}:
            raise DataError(f"{report}: not written by data.prepare; choose another --out")
    for file in (Path(f"{out}.csv"), Path(f"{out}.valid.csv")):
        if file.exists() and not found:
            raise DataError(f"{file}: not written by data.prepare; choose another --out")
    return found


def _progress(out: Path) -> dict:
    """What OUT.tmp/progress.json says, {} where it is not there."""
    with suppress(OSError, ValueError):
        return json.loads(Path(f"{out}.tmp/progress.json").read_text(encoding="utf-8"))
    return {}


def _write_mixtures(path: Path, streams: dict[str, dict]) -> None:
    """PATH.csv and PATH.valid.csv, where there are streams for them."""
    for held_out, suffix in ((False, ".csv"), (True, ".valid.csv")):
        rows = []
        for name, stream in streams.items():
            if stream["held_out"] == held_out:
                row = {"name": name, "path": name, "weight": stream["tokens"]}
                # A field may not take the meaning that its name has in a mixture.
                values = {k: v for k, v in stream["split_by"].items() if k not in RESERVED}
                rows.append(row | values)
        if rows:
            write_mixture(Path(f"{path}{suffix}"), rows)


def _put_in_place(out: Path, report: dict) -> dict:
    """Move the streams of a finished run, and the mixtures of them, beside their report."""
    names = [f"{name}.{suffix}" for name in report["streams"] for suffix in ("bin", "idx")]
    for name in [*names, f"{out.name}.csv", f"{out.name}.valid.csv"]:
        file = Path(f"{out}.tmp", name)  # .bin before .idx: without its index a stream is not there
        if file.exists():
            os.replace(file, out.with_name(name))
    for name in ("digests", "progress.json"):
        Path(f"{out}.tmp", name).unlink(missing_ok=True)
    Path(f"{out}.tmp").rmdir()
    return report


def holds_out_tails(files: list[Source], options: Options) -> bool:
    """Whether the tail of each document is held out, and not whole documents. Says which.

    Tails are for a single book, or a folder with three files: where fewer documents than HELD_OUT
    would be expected in the validation stream, there might be none.
    """
    documents = 0
    for file in files:
        for _ in records(file, [options.text_field]):
            documents += 1
            if documents * options.validation >= HELD_OUT:
                print("validation: whole documents are held out", file=sys.stderr)
                return False
    print(
        f"validation: {documents} documents are few; the tail of each is held out", file=sys.stderr
    )
    return True


def _fill(
    writer: StreamWriter,
    files: list[Source],
    sizes: list[int],
    worker: Worker,
    processes: int,
    on_error: str,
) -> None:
    begins = list(accumulate(sizes, initial=0))
    with tqdm(
        total=begins[-1] or None, initial=begins[writer.files_done], unit="B", unit_scale=True,
        desc="tokens", smoothing=0.05,
    ) as bar:  # fmt: skip
        batches = read_batches(files, worker.columns, writer.files_done)
        for batch, (results, tokens) in process(batches, worker, processes):
            writer.add(results, tokens)
            for (file, number), result in zip(batch.places, results):
                if result.error and len(writer.errors) < ERRORS:
                    writer.errors.append(f"{location(files[file], number)}: {result.error}")
                    _stop_at(writer.errors, on_error)
            if batch.files_done is None:
                bar.update(begins[batch.places[-1][0]] + batch.position - bar.n)
            else:
                writer.save(batch.files_done)
                bar.update(begins[batch.files_done] - bar.n)


def _stop_at(errors: list[str], on_error: str) -> None:
    if errors and on_error == "stop":
        raise DataError(f"{errors[0]} (--on_error skip leaves it out and goes on)")


def _summary(writer: StreamWriter, options: Options) -> dict:
    """What the report says of the run as a whole. Raises DataError for a run without documents."""
    counts = writer.counts
    reasons = {reason: counts[reason] for reason in REASONS}
    assert counts["in"] == counts["out"] + sum(reasons.values()), counts
    for held_out in (False, True) if options.validation else (False,):
        if not any(key.held_out == held_out for key in writer.streams):
            part = "validation" if held_out else "training"
            kept = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            writer.discard()
            raise DataError(
                f"{writer.out}: no document for {part}: of {counts['in']:,} read "
                f"{counts['out']:,} were kept ({kept})"
            )
    held_out = "the tail of each document" if writer.tails else "whole documents"
    return {
        "options": asdict(options),
        "held_out": held_out if options.validation else "nothing",
        "documents_in": counts["in"],
        "documents": counts["out"],
        "left_out": reasons,
        "errors": writer.errors,
    }


# --- a vocabulary --------------------------------------------------------------------------------


def sample_texts(
    texts: dict[str, list[Source]],
    shares: dict[str, float],
    megabytes: float | None,
    text_field: str,
    on_error: str,
) -> Iterator[str]:
    """The texts of {name: files}, cleaned, each with its share of the bytes.

    A document is drawn or not by its text alone, so a share is met up to chance. The sample is as
    large as the text with the least for its share allows, or `megabytes`. Every text is read twice:
    measured, then drawn from. Raises DataError for a text that is too small.
    """
    sizes, stored = dict.fromkeys(texts, 0), sum(size_of(f) or 0 for t in texts.values() for f in t)
    with tqdm(total=stored, unit="B", unit_scale=True, desc="measure") as bar:
        for name, files in texts.items():
            for text in read_documents(files, bar, text_field, on_error):
                sizes[name] += len(clean(text).encode())
    total = sum(shares.values())
    scarce = min(shares, key=lambda name: sizes[name] / shares[name])
    most = sizes[scarce] / shares[scarce] * total
    size = megabytes * 1e6 if megabytes else most
    if not 0 < size <= most:
        raise DataError(f"{scarce}: its text and share allow {most / 1e6:.3f} MB in all, not more")
    for name, files in texts.items():
        keep = shares[name] / total * size / sizes[name]
        print(f"{name}: {keep:.1%} of {sizes[name] / 1e6:,.3f} MB are drawn")
        for text in read_documents(files, None, text_field, on_error):
            text = clean(text)
            if keep >= 1 or hash_fraction(text, b"sample") < keep:
                yield text


def _vocabulary(args: argparse.Namespace) -> None:
    if args.out.is_dir():
        raise ConfigError(f"{args.out}: is a folder; --out is the ranks file to write")
    shares: dict[str, float] = {} if args.shares else {"all": 1.0}
    for given in args.shares or ():
        name, _, number = given.partition("=")
        known = shares.setdefault(name, 0.0)
        with suppress(ValueError):
            shares[name] = float(number)
        if known or not 0 < shares[name] < math.inf:
            raise ConfigError(f"{given}: write --shares NAME=NUMBER, over 0, each name once")
    inputs: dict[str, list[str]] = {}
    for given in args.inputs:
        name, _, path = given.partition("=") if args.shares else ("all", "", given)
        if name not in shares or not path:
            raise ConfigError(f"{given}: write NAME=PATH, with a name that --shares has")
        inputs.setdefault(name, []).append(path)
    if lacking := shares.keys() - inputs.keys():
        raise ConfigError(f"--shares {min(lacking)}: no text has this name")
    texts = {name: find_files(paths) for name, paths in inputs.items()}
    if args.shares or args.megabytes:
        sample = sample_texts(texts, shares, args.megabytes, args.text_field, args.on_error)
    else:
        found = read_documents(texts["all"], None, args.text_field, args.on_error)
        sample = map(clean, found)
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    ranks = tokenizers.train(sample, args.vocab_size)
    tokenizers.save(ranks, args.out)
    print(f"{args.out}: {args.vocab_size:,} tokens")
    if args.folder:
        tokenizers.save_folder(Tokenizer(tokenizers.ByteLevelBPE(ranks)), args.folder)
        print(f"{args.folder}: tokenizer.json, tokenizer_config.json")


# --- the command ---------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text files to token streams")
    train = commands.add_parser("vocabulary", help="text files to a vocabulary")
    for command in (tokens, train):
        command.add_argument("inputs", nargs="+", help="files, folders, globs, addresses")
        add = command.add_argument
        add("--text_field", default="text", help="field or column that holds the text (text)")
        add(
            "--on_error", choices=("stop", "skip"), default="stop",
            help="stop at an unreadable document (default), or skip and report it",
        )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = tokens.add_argument
    add("--tokenizer", required=True, help="ranks file, tokenizer.json or its folder")
    add("--out", required=True, help="stream to write, without suffix")
    add("--split_by", nargs="+", default=(), metavar="FIELD", help="a stream for each value")
    add("--validation", type=float, default=0.0, help="share of the text to hold out (0)")
    add("--min_characters", type=int, default=0, help="leave out documents shorter than this (0)")
    add("--deduplicate", action="store_true", help="keep only the first of equal texts")
    add("--split_length", type=int, help="put documents of more tokens into OUT.long")
    add("--processes", type=int, default=cores, help="worker processes (all cores)")
    add("--overwrite", action="store_true", help="replace what other inputs or options gave")
    add = train.add_argument
    add("--out", type=Path, required=True, help="ranks file to write")
    add("--folder", help="folder to write a tokenizer.json to as well")
    add("--vocab_size", type=int, default=65_024, help="special tokens included (65,024)")
    add("--shares", nargs="+", metavar="NAME=NUMBER", help="of the inputs, which are NAME=PATH")
    add("--megabytes", type=float, help="size of a sample to train on (all the text)")
    args = parser.parse_args(argv)
    if args.command == "vocabulary":
        _vocabulary(args)
    else:
        _tokens(args)


def _tokens(args: argparse.Namespace) -> None:
    lengths = [args.processes, 1 if args.split_length is None else args.split_length]
    if min(lengths) < 1 or args.min_characters < 0:
        raise ConfigError(
            "--processes and --split_length are 1 or more, --min_characters 0 or more"
        )
    if args.out.endswith("/") or not Path(args.out).name:
        raise ConfigError(f"--out {args.out}: must end in a name, such as out/mine/all")
    chosen = {option.name: getattr(args, option.name) for option in fields(Options)}
    options = Options(**chosen | {"split_by": tuple(args.split_by)})
    tokenizer, files = tokenizers.load(args.tokenizer), find_files(args.inputs)
    began = time.monotonic()
    how = (options, args.processes, args.on_error, args.overwrite)
    report = tokenize(files, tokenizer, args.out, *how)
    seconds = time.monotonic() - began
    for name, stream in report["streams"].items():
        print(f"{name}: documents {stream['documents']:,}, tokens {stream['tokens']:,}")
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in report["left_out"].items())
    print(f"documents {report['documents']:,} of {report['documents_in']:,}; left out: {left_out}")
    for error in report["errors"]:
        print(f"left out: {ascii(error)[1:-1]}", file=sys.stderr)
    size = tqdm.format_sizeof(sum(stream["bytes"] for stream in report["streams"].values()))
    print(f"{size}B of text, {seconds:,.1f} s; see {args.out}.json")


if __name__ == "__main__":
    run_cli(main, DataError)
