"""Files to documents.

.txt and .md are a document a file. .jsonl is a JSON object a line; .json the same, or one object,
or one array of them. All may be compressed, .gz or .zst. .parquet and .arrow (a datasets folder)
are a document a row and need pyarrow; .zst needs zstandard. Files may be elsewhere, and there are
data sets of the Hugging Face Hub (data/remote.py).

Memory: one document is held whole, and is at most LARGEST bytes, as is a .json that is one array. A
longer line or file is an error with its place, and the line after it is read. JSON that is all
brackets takes some 30 times its bytes as Python objects. Of a .parquet, a row group's column is
held besides; of a .zst, the window that it was packed with, up to 2 GB.
"""

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.dataset import DataError
from data.remote import HUB, HubDataset, RemoteFile, find_remote

LARGEST = 1 << 26  # bytes of one document
PLAIN, LINES, WHOLE = (".txt", ".md"), (".jsonl",), (".json",)
COMPRESSED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
SUFFIXES = (*(s + c for s in PLAIN + LINES + WHOLE for c in ("", *COMPRESSED)), *TABLES)
# What `datasets` puts beside its .arrow files.
DATASETS_OWN = {"dataset_info.json", "dataset_dict.json", "state.json"}
Source = Path | RemoteFile | HubDataset
BYTES_OF = {"string": "binary", "large_string": "large_binary"}
ROWS = 64  # of a table, made Python objects at a time
# Compressed bytes unpacked at a time. zstd gives up to 32,768 bytes for one: 32 MiB for these.
PIECE = 1024


class Record(NamedTuple):
    """What a document is made of, not yet parsed, or the error that stands in its place."""

    number: int  # of its line, row or item, from 1
    position: int  # bytes of the file, as stored, read so far
    content: Any  # bytes of a JSON object, or the object; values may be bytes of UTF-8
    size: int  # bytes of it, about
    error: str = ""


def find_files(inputs: Iterable[str | Path]) -> list[Source]:
    """The files named, matched by a glob or found in folders, each once, in a fixed order.

    A data set of the Hub counts as a file. Raises DataError for an input that is nothing.
    """
    files: list[Source] = []
    for given in inputs:
        path = Path(given)
        if str(given).startswith(HUB):
            files.append(HubDataset.parse(str(given)))
        elif "://" in str(given):
            found = find_remote(str(given), SUFFIXES)
            files += [f for f in found if f.name.rpartition("/")[2] not in DATASETS_OWN]
        elif path.is_dir():
            found = files_in(path)
            if not found:
                raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in it")
            files += found
        elif path.is_file() and path.name.endswith(SUFFIXES):
            files.append(path)
        elif not path.exists() and (matches := sorted(glob.glob(str(given), recursive=True))):
            for match in map(Path, matches):
                files += files_in(match) if match.is_dir() else find_files([match])
        else:
            raise DataError(f"{path}: not a folder, a glob nor a {', '.join(SUFFIXES)} file")
    return list(dict.fromkeys(files))


def files_in(folder: Path) -> list[Path]:
    """The files of a folder in forms that are read, those of linked folders too. Says how many
    others there are."""
    found, others, seen = [], Counter(), set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a link back to where it came from
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two ways to one folder the same is taken everywhere
        for name in names:
            if not name.endswith(SUFFIXES):
                others[Path(name).suffix or name] += 1
            elif name not in DATASETS_OWN:
                found.append(Path(here, name))
    if others:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in others.most_common(5))
        print(f"{folder}: not read: {kinds}", file=sys.stderr)
    return sorted(found)


def size_of(source: Source) -> int | None:
    """Bytes, as stored; None for a data set of the Hub."""
    if isinstance(source, Path):
        return source.stat().st_size if source.is_file() else 0
    return source.size if isinstance(source, RemoteFile) else None


def version_of(source: Source) -> int | str | None:
    """What changes with the content: the time it was written, a checksum, a commit."""
    if isinstance(source, Path):
        return source.stat().st_mtime_ns
    return source.version if isinstance(source, RemoteFile) else source.revision


def read_documents(
    files: Iterable[Source], progress: tqdm | None = None, text_field: str = "text"
) -> Iterator[str]:
    """The texts of the files, one by one. Raises DataError with file and line for a bad one."""
    for source in files:
        done = 0
        for record in records(source, text_field):
            try:
                if record.error:
                    raise ValueError(record.error)
                yield parse(record.content, text_field)[0]
            except ValueError as error:
                raise DataError(f"{place(source, record.number)}: {error}") from None
            if progress is not None:
                progress.update(record.position - done)
                done = record.position


def place(source: Source, number: int) -> str:
    """Where a record is, in words."""
    kind = _kind(source)
    if kind in PLAIN:
        return str(source)
    word = "item" if kind in WHOLE else "line" if kind in LINES else "row"
    return f"{source}, {word} {number:,}"


def records(
    source: Source,
    text_field: str,
    split_by: tuple[str, ...] = (),
    done: int = 0,
    position: int = 0,
) -> Iterator[Record]:
    """The records of a file after number `done`, which ended at byte `position`.

    A file that breaks ends in a record with the error. Raises DataError only where a package for
    this form of file is not installed, or a connection fails.
    """
    number = done
    try:
        for record in _all_records(source, text_field, split_by, done, position):
            if record.number > done:
                number = record.number
                yield record
    except (OSError, EOFError, zlib.error) as error:
        reason = (str(getattr(error, "strerror", "") or error).splitlines() or ["broken"])[0]
        reason = f"cannot be read further: {reason}"
        yield Record(number + 1, size_of(source) or 0, None, 0, reason)


def parse(content: Any, text_field: str, split_by: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The text of a record, and the values it is split by; whole numbers among them as text.

    Raises ValueError with the reason for what is not JSON in UTF-8 or lacks a field.
    """
    if isinstance(content, bytes):
        content = _parse_json(content)
    values = []
    for field in (text_field, *split_by):
        value = content.get(field) if isinstance(content, dict) else None
        if value is None:
            raise ValueError(f"no field {field!r}")
        if type(value) is int and values:
            value = str(value)
        if not isinstance(value, str | bytes):
            raise ValueError(f"its field {field!r} is not a string")
        values.append(_decode(value) if isinstance(value, bytes) else value)
    return tuple(values)


def _kind(source: Source) -> str:
    """A file's suffix without that of its compression, "" for a data set of the Hub."""
    if isinstance(source, HubDataset):
        return ""
    inner = Path(source.name)
    return (inner.with_suffix("") if inner.suffix in COMPRESSED else inner).suffix


def _all_records(
    source: Source, text_field: str, split_by: tuple[str, ...], done: int, position: int
) -> Iterator[Record]:
    kind, fields = _kind(source), [text_field, *split_by]
    if isinstance(source, HubDataset):
        yield from _rows(source.tables(done, ROWS), fields, done)
        return
    if kind in TABLES:
        yield from _table(source, fields)
        return
    one = kind in WHOLE and _is_one_json(source)
    with ExitStack() as stack:
        stream, raw = _open(source, stack)
        if kind not in PLAIN and not one:
            if stream is raw:
                raw.seek(position)
                yield from _lines(stream, raw, done, position)
            else:
                yield from _lines(stream, raw, 0, 0)
            return
        content, size = stream.read(LARGEST + 1), size_of(source)
        if len(content) > LARGEST:
            advice = "make it a .jsonl" if one else "cut it into several"
            yield Record(1, size, None, 0, f"over {LARGEST:,} bytes: {advice}")
        elif one:
            yield from _items(content, size)
        else:
            yield Record(1, size, {text_field: content}, len(content))


def _open(
    source: Path | RemoteFile, stack: ExitStack
) -> tuple[io.BufferedIOBase, io.BufferedReader]:
    """The file as it is unpacked, and as it is stored: one and the same if it is not packed."""
    local = isinstance(source, Path)
    raw = stack.enter_context(open(source, "rb", buffering=1 << 20) if local else source.open())
    if source.name.endswith(COMPRESSED) and not raw.peek(1):
        raise EOFError("an empty file is not compressed")
    if source.name.endswith(".gz"):
        return stack.enter_context(gzip.open(raw)), raw
    if source.name.endswith(".zst"):
        return stack.enter_context(io.BufferedReader(_Zstd(raw), 1 << 18)), raw
    return raw, raw


class _Zstd(io.RawIOBase):
    """Unpacks zstd's frames. zstandard's own reader takes a file cut short for one that ends."""

    def __init__(self, raw: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError("reading .zst needs: pip install zstandard") from None
        self.raw, self.frame, self.unpacked = raw, None, memoryview(b"")
        # The largest window that zstd --long=31 makes; a frame takes what it asks for.
        unpack = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.new, self.error = unpack.decompressobj, zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.unpacked:
            piece = self.raw.read(PIECE)
            if not piece:
                if self.frame is not None:
                    raise EOFError("zstd data is cut short")
                return 0
            self.frame = self.frame or self.new()
            try:
                self.unpacked = memoryview(self.frame.decompress(piece))
            except self.error as error:
                raise OSError(f"zstd: {error}") from None
            if self.frame.eof:
                # What follows is the next frame; it is read again, for it may be long.
                self.raw.seek(-len(self.frame.unused_data), io.SEEK_CUR)
                self.frame = None
        count = min(len(buffer), len(self.unpacked))
        buffer[:count] = self.unpacked[:count]
        self.unpacked = self.unpacked[count:]
        return count


def _lines(
    stream: io.BufferedIOBase, raw: io.BufferedReader, number: int, position: int
) -> Iterator[Record]:
    # Of a file that is not packed, position is where the next line begins.
    packed, asked = stream is not raw, number
    while line := stream.readline(LARGEST + 1):
        number, size = number + 1, len(line)
        if size > LARGEST:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
                size += len(line)
        if not packed:
            position += size
        elif number >= asked:
            # To ask costs a call of the system; it is for a progress bar.
            position, asked = raw.tell(), number + 50
        if size > LARGEST:
            yield Record(number, position, None, 0, f"a line over {LARGEST:,} bytes")
        elif line.strip():
            yield Record(number, position, line, size)


def _is_one_json(source: Path | RemoteFile) -> bool:
    """Whether a .json is one array or one object over several lines, and not an object a line."""
    with ExitStack() as stack:
        stream, _ = _open(source, stack)
        while line := stream.readline(1 << 20):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                return line.startswith(b"[") or line == b"{"
    return False


def _items(content: bytes, size: int) -> Iterator[Record]:
    try:
        found = _parse_json(content)
    except ValueError as error:
        yield Record(1, size, None, 0, str(error))
        return
    items = found if isinstance(found, list) else [found]
    for number, item in enumerate(items, start=1):
        yield Record(number, size * number // len(items), item, len(content) // len(items))


def _table(source: Path | RemoteFile, fields: list[str]) -> Iterator[Record]:
    """The rows of a .parquet or .arrow file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{source}: reading tables needs: pip install pyarrow") from None
    local, size = isinstance(source, Path), size_of(source)
    try:
        with pa.OSFile(str(source)) if local else pa.PythonFile(source.open()) as file:
            if _kind(source) == ".parquet":
                table = pq.ParquetFile(file)
                rows, names = table.metadata.num_rows, table.schema_arrow.names
                _require(fields, names)
                batches = table.iter_batches(ROWS, columns=fields, use_threads=False)
            else:
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                table = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
                rows = 0
                # A file of Arrow's other form is asked for its batches by number.
                batches = (
                    map(table.get_batch, range(table.num_record_batches)) if is_file else table
                )
            for record in _rows(batches, fields, 0):
                at = size * record.number // rows if rows else file.tell()
                yield record._replace(position=at)
    # A damaged file makes pyarrow raise any of them.
    except (pa.ArrowException, ValueError, LookupError, SystemError) as error:
        raise OSError(str(error)) from None


def _rows(batches: Iterable[Any], fields: list[str], number: int) -> Iterator[Record]:
    """The rows of tables of pyarrow, or of its record batches, numbered from `number` + 1."""
    for batch in batches:
        _require(fields, batch.schema.names)
        for values in zip(*(_values(batch.column(field), field) for field in fields)):
            number += 1
            length = sum(len(value) for value in values if value is not None)
            yield Record(number, 0, dict(zip(fields, values)), length)


def _require(fields: list[str], names: list[str]) -> None:
    if lacking := [field for field in fields if field not in names]:
        raise OSError(f"no column {lacking[0]!r}; it has {', '.join(names)}")


def _values(column: Any, field: str) -> list[bytes | None]:
    """A column's strings as bytes: whether they are UTF-8, pyarrow does not see to."""
    import pyarrow as pa

    kind = column.type
    if isinstance(column, pa.Array):
        # pyarrow reads where a damaged file points, outside it too. As bytes: not its UTF-8.
        column = column.view(BYTES_OF[str(kind)]) if str(kind) in BYTES_OF else column
        column.validate(full=True)
    if pa.types.is_dictionary(kind):
        kind, column = kind.value_type, column.dictionary_decode()
    if pa.types.is_null(kind):
        return [None] * len(column)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        if str(kind) not in ("string_view", "binary", "large_binary"):
            raise OSError(f"column {field!r} is of {kind}, not of strings")
    return column.cast(pa.large_binary()).to_pylist()


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start:,}") from None


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(_decode(content))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos:,}") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
