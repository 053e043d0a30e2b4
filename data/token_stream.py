"""Token streams: the tokens of one source on disk or in an object store, read by position.

The format is Megatron's indexed one: `NAME.bin` holds the tokens of all documents back to back,
`NAME.idx` their type and the documents' lengths. Files made for Megatron, GPT-NeoX or NeMo load. A
stream may lie in an object store: s3://bucket/NAME, or whatever address fsspec knows. Written by
data/stream_writer.py.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
NO_SIZE = "its server does not tell its size: download it"


class DataError(Exception):
    """Data that cannot be used; the message names the file and what is wrong, in one line."""


class TokenStream:
    """The tokens of one source, `path` being the common part of its .bin and .idx.

    Tokens are read, not mapped: a mapped page counts as the process's own memory once touched, and
    140 sources of a trillion tokens would seem to fill any machine.
    Raises DataError for a missing, truncated or foreign file.
    """

    def __init__(self, path: str | Path) -> None:
        self.idx, self.bin = idx, _ = stream_files(path)
        self.path = path if isinstance(idx, str) else Path(path)
        sizes = [size_of(file) for file in (idx, self.bin)]
        for file, size in zip((idx, self.bin), sizes):
            if size is None:
                raise DataError(f"{file}: no such file (python -m data.prepare makes it)")
        head = read_bytes(idx, 0, HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise DataError(f"{idx}: not an index of Megatron's format")
        _, version, code, count, boundaries = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise DataError(f"{idx}: version {version} or token type {code} is not known")
        self.dtype = np.dtype(DTYPES[code])
        # lengths (int32) and offsets (int64) of the sequences, then the documents' boundaries
        if sizes[0] < HEADER.size + 12 * count + 8 * boundaries:
            raise DataError(f"{idx}: truncated")
        if not boundaries:
            raise DataError(f"{idx}: lists no documents")
        end = 0
        if count:  # where the last sequence ends, from its own length and offset
            length = read_bytes(idx, HEADER.size + 4 * (count - 1), 4)
            offset = read_bytes(idx, HEADER.size + 4 * count + 8 * (count - 1), 8)
            end = int.from_bytes(length, "little") * self.dtype.itemsize
            end += int.from_bytes(offset, "little")
        if sizes[1] < end:
            raise DataError(f"{self.bin}: truncated, {sizes[1]:,} bytes, its index says {end:,}")
        self.tokens = end // self.dtype.itemsize
        # Megatron may cut a document into sequences; data.prepare makes one of each.
        self.sequences, self.documents = count, boundaries - 1

    def read(self, start: int, count: int, vocab_size: int) -> np.ndarray:
        """Tokens start .. start + count as int64 `[count]`, all checked to be under vocab_size."""
        size = self.dtype.itemsize
        raw = read_bytes(self.bin, start * size, count * size)
        tokens = np.frombuffer(raw, self.dtype, len(raw) // size)
        if len(tokens) < count:
            raise DataError(f"{self.bin}: truncated after {start + len(tokens):,} tokens")
        if tokens.max() >= vocab_size or tokens.min() < 0:
            at = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
            raise DataError(
                f"{self.bin}: token {start + at:,} has id {tokens[at]}, "
                f"past the vocabulary of {vocab_size}"
            )
        return tokens.astype(np.int64)


def stream_files(path: str | Path) -> tuple[Path, Path] | tuple[str, str]:
    """The index and the tokens of the stream `path`; strings for an address in an object store."""
    files = f"{path}.idx", f"{path}.bin"
    return files if "://" in files[0] else (Path(files[0]), Path(files[1]))


def size_of(file: Path | str) -> int | None:
    """The bytes of a file of a stream, None if it is not there. Raises DataError as read_bytes."""
    if isinstance(file, Path):
        return file.stat().st_size if file.is_file() else None
    with failures(file, "fsspec"):
        store, path = open_store(file)
        try:
            size = store.info(path)["size"]
        except FileNotFoundError as error:
            # fsspec says so too of a server that is down.
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from None
            return None
    if size is None:
        raise DataError(f"{file}: {NO_SIZE}")
    return size


def read_bytes(file: Path | str, start: int, count: int) -> bytes:
    """Bytes start .. start + count of a file of a stream, fewer at its end.

    Raises DataError for what cannot be read.
    """
    if isinstance(file, str):
        with failures(file, "fsspec"):
            store, path = open_store(file)
            piece = store.cat_file(path, start=start, end=start + count)
        if len(piece) > count:  # a web server may pass over the range and send everything
            raise DataError(
                f"{file}: its server sends whole files only (no byte ranges): download it"
            )
        return piece
    try:
        with open(file, "rb") as f:
            f.seek(start)
            return f.read(count)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


# --- packages that reach other machines ----------------------------------------------------------


def open_store(address: str) -> tuple[Any, str]:
    """The file system of fsspec that an address lies in, and its path there.

    To be called, and the file system to be used, within `failures`.
    """
    from fsspec.core import url_to_fs

    return url_to_fs(address)


@contextmanager
def failures(source: object, package: str) -> Iterator[None]:
    """What an optional package raises, as a DataError that names the source in one line.

    package: what to install where it is not there.
    """
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        # fsspec tells what else a protocol needs.
        needed = f"pip install {package}" if isinstance(error, ModuleNotFoundError) else error
        raise DataError(f"{source}: reading it needs: {needed}") from None
    except Exception as error:  # they have no class in common
        if type(error) is FileNotFoundError:  # the path alone; its subclasses say more
            raise DataError(f"{source}: no such file") from None
        first_line = str(error).strip().splitlines()[:1]
        raise DataError(": ".join([str(source), type(error).__name__, *first_line])) from None
