"""Files to documents.

.txt and .md are a document a file. .jsonl is a JSON object a line; .json the same, or one object,
or one array of them. All may be compressed, .gz or .zst. .parquet and .arrow (a datasets folder)
are a document a row and need pyarrow; .zst needs zstandard.

Memory: one document is held whole, and is at most LARGEST bytes, as is a .json that is one array. A
longer line or file is an error with its place, and the line after it is read. Of a .parquet, a row
group's column is held besides.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.dataset import DataError

LARGEST = 1 << 26  # bytes of one document
PLAIN, LINES, WHOLE = (".txt", ".md"), (".jsonl",), (".json",)
COMPRESSED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
SUFFIXES = (*(s + c for s in PLAIN + LINES + WHOLE for c in ("", *COMPRESSED)), *TABLES)
# What `datasets` puts beside its .arrow files.
DATASETS_OWN = {"dataset_info.json", "dataset_dict.json", "state.json"}
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


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files named, matched by a glob or found in folders, each once, in a fixed order."""
    files = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            files += [p for p in found if p.name not in DATASETS_OWN]
        elif path.is_file() and path.name.endswith(SUFFIXES):
            files.append(path)
        elif not path.exists() and (matches := sorted(glob.glob(str(given), recursive=True))):
            files += find_files(matches)
        else:
            raise DataError(f"{path}: not a folder, a glob nor a {', '.join(SUFFIXES)} file")
    return list(dict.fromkeys(files))


def read_documents(
    files: Iterable[Path], progress: tqdm | None = None, text_field: str = "text"
) -> Iterator[str]:
    """The texts of the files, one by one. Raises DataError with file and line for a bad one."""
    for path in files:
        done = 0
        for record in records(path, text_field):
            try:
                if record.error:
                    raise ValueError(record.error)
                yield parse(record.content, text_field)[0]
            except ValueError as error:
                raise DataError(f"{place(path, record.number)}: {error}") from None
            if progress is not None:
                progress.update(record.position - done)
                done = record.position


def place(path: Path, number: int) -> str:
    """Where a record is, in words."""
    kind = _kind(path)
    if kind in PLAIN:
        return str(path)
    return f"{path}, {'row' if kind in TABLES else 'item' if kind in WHOLE else 'line'} {number:,}"


def records(
    path: Path, text_field: str, split_by: str | None = None, done: int = 0, position: int = 0
) -> Iterator[Record]:
    """The records of a file after number `done`, which ended at byte `position`.

    A file that breaks ends in a record with the error. Raises DataError only where a library for
    this form of file is not installed.
    """
    number = done
    try:
        for record in _all_records(path, text_field, split_by, done, position):
            if record.number > done:
                number = record.number
                yield record
    except (OSError, EOFError, zlib.error) as error:
        reason = (str(getattr(error, "strerror", "") or error).splitlines() or ["broken"])[0]
        size = path.stat().st_size if path.is_file() else 0
        yield Record(number + 1, size, None, 0, f"cannot be read further: {reason}")


def parse(content: Any, text_field: str, split_by: str | None = None) -> tuple[str, str]:
    """The text of a record, and the value it is split by ("" if by nothing).

    Raises ValueError with the reason for what is not JSON in UTF-8 or lacks a field.
    """
    if isinstance(content, bytes):
        content = _parse_json(content)
    values = []
    for field in (text_field, split_by):
        if field is None:
            continue
        value = content.get(field) if isinstance(content, dict) else None
        if value is None:
            raise ValueError(f"no field {field!r}")
        if not isinstance(value, str | bytes):
            raise ValueError(f"its field {field!r} is not a string")
        values.append(_decode(value) if isinstance(value, bytes) else value)
    return values[0], values[1] if split_by is not None else ""


def _kind(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    return inner.suffix


def _all_records(
    path: Path, text_field: str, split_by: str | None, done: int, position: int
) -> Iterator[Record]:
    kind = _kind(path)
    if kind in TABLES:
        yield from _rows(path, [text_field] + [split_by] * (split_by is not None))
        return
    one = kind in WHOLE and _is_one_json(path)
    with ExitStack() as stack:
        stream, raw = _open(path, stack)
        if kind not in PLAIN and not one:
            if stream is raw:
                raw.seek(position)
                yield from _lines(stream, raw, done)
            else:
                yield from _lines(stream, raw, 0)
            return
        content, size = stream.read(LARGEST + 1), path.stat().st_size
        if len(content) > LARGEST:
            advice = "make it a .jsonl" if one else "cut it into several"
            yield Record(1, size, None, 0, f"over {LARGEST:,} bytes: {advice}")
        elif one:
            yield from _items(content, size)
        else:
            yield Record(1, size, {text_field: content}, len(content))


def _open(path: Path, stack: ExitStack) -> tuple[io.BufferedIOBase, io.BufferedReader]:
    """The file as it is unpacked, and as it is stored: one and the same if it is not packed."""
    raw = stack.enter_context(open(path, "rb", buffering=1 << 20))
    if path.suffix in COMPRESSED and not raw.peek(1):
        raise EOFError("an empty file is not compressed")
    if path.suffix == ".gz":
        return stack.enter_context(gzip.open(raw)), raw
    if path.suffix == ".zst":
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
        self.new, self.error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError

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


def _lines(stream: io.BufferedIOBase, raw: io.BufferedReader, number: int) -> Iterator[Record]:
    # Of a file that is not packed, raw.tell() is where the next line begins.
    while line := stream.readline(LARGEST + 1):
        number += 1
        if len(line) > LARGEST:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield Record(number, raw.tell(), None, 0, f"a line over {LARGEST:,} bytes")
        elif line.strip():
            yield Record(number, raw.tell(), line, len(line))


def _is_one_json(path: Path) -> bool:
    """Whether a .json is one array or one object over several lines, and not an object a line."""
    with ExitStack() as stack:
        stream, _ = _open(path, stack)
        while line := stream.readline(1 << 20):
            if line.strip():
                return line.lstrip().startswith(b"[") or line.strip() == b"{"
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


def _rows(path: Path, fields: list[str]) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading tables needs: pip install pyarrow") from None
    size, number = path.stat().st_size, 0
    try:
        with pa.OSFile(str(path)) as source:
            if path.suffix == ".parquet":
                table = pq.ParquetFile(source)
                rows, names = table.metadata.num_rows, table.schema_arrow.names
                present = [field for field in fields if field in names]
                batches = table.iter_batches(ROWS, columns=present, use_threads=False)
            else:
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                table = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
                rows, names = 0, table.schema.names
                # A file of Arrow's other form is asked for its batches by number.
                batches = (
                    map(table.get_batch, range(table.num_record_batches)) if is_file else table
                )
            if lacking := [field for field in fields if field not in names]:
                raise OSError(f"no column {lacking[0]!r}; it has {', '.join(names)}")
            for batch in batches:
                columns = [_values(batch.column(field), field, pa) for field in fields]
                for values in zip(*columns):
                    number += 1
                    at = size * number // rows if rows else source.tell()
                    length = sum(len(value) for value in values if value is not None)
                    yield Record(number, at, dict(zip(fields, values)), length)
    except pa.ArrowException as error:
        raise OSError(str(error)) from None


def _values(column: Any, field: str, pa: Any) -> list[bytes | None]:
    """A column's strings as bytes: whether they are UTF-8, pyarrow does not see to."""
    kind = column.type
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
