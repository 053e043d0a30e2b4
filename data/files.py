"""Finding text files and reading their documents, here or in an object store.

A .txt or .md is a document; a .jsonl has a JSON object per line, a .json the same, or one object,
or an array of them; a .parquet has a document per row. All but tables may be compressed: .gz .bz2
.xz .zst. Other files are read as text where they are named. An address is any that fsspec knows:
s3://, gs://, https://, hf://datasets/NAME ...
"""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from config.cli import in_one_line
from data.dataset import DataError, open_store, size_of, store_errors

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


class NoFiles(DataError):
    """An input that matches no file."""


def find_files(inputs: Iterable[str | Path]) -> list[Source]:
    """The files named, matched by a glob or found in folders, each once, in a fixed order.

    Raises NoFiles for an input that matches no file, and for a folder without data.
    """
    found: dict[str, Source] = {}
    for given in map(str, inputs):
        files = _find_remote(given) if "://" in given else _find_local(given)
        if not files:
            kinds = f"no {', '.join(KINDS)} file in it"
            raise NoFiles(f"{given}: {kinds if os.path.isdir(given) else 'no such file'}")
        for file in files:  # one that is reached by two paths, or by a link, is read once
            found.setdefault(file if isinstance(file, str) else os.path.realpath(file), file)
    return list(found.values())


def _find_local(given: str) -> list[Path]:
    names = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    files: list[Path] = []
    for name in map(Path, names):
        if name.is_dir():
            inside = (path for path in sorted(name.rglob("*")) if path.is_file())
            files += _data_among(
                [p for p in inside if "/." not in f"/{p.relative_to(name).as_posix()}"], name
            )
        elif name.is_file():  # no pipe, and no link to nowhere
            files.append(name)
    return files


def _data_among(files: list[Any], folder: str | Path) -> list[Any]:
    """The files of a folder that are data. Prints the kinds of the others."""
    names = {f: f.name if isinstance(f, Path) else f.rpartition("/")[2] for f in files}
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
        # Else the whole column of a group of rows is fetched before its first row, and a file that
        # pandas wrote has one group of up to a million.
        table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        if lacking := {*columns} - {*table.schema_arrow.names}:
            raise ValueError(f"no column {min(lacking)!r}")
        for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
            batch.validate(full=True)  # or else pyarrow reads where a damaged file points
            for row in batch.to_pylist():
                number += 1
                text = row[columns[0]]
                yield Record(number, row, len(text) if isinstance(text, str | bytes) else 0)
