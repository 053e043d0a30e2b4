"""Safetensors files, read and written a tensor at a time; folders that appear whole or not at all.

A file is 8 bytes with the length of its header, the header (JSON: of every tensor its dtype, shape
and place), then the bytes of the tensors. Libraries map such files into memory, and the pages count
as used. Here the bytes of one tensor are read to where they are wanted, and written from where they
are: the disk is the floor, and memory holds one tensor at a time.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# uint8 holds packed weights: written here, no weight of a model that is read
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}
CHUNK = 1 << 20  # bytes converted, hashed and written at a time, while they are in the cache
SHARD_BYTES = 5 * 10**9 - CHUNK  # of the tensors of a file; the header has the rest


class CheckpointError(Exception):
    """A checkpoint, ours or theirs, that cannot be written or read; the message is one line."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors names it: F32
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    nbytes: int


Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # {name: (dtype, shape)} to be written


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """({name: its entry}, metadata) of a safetensors file, in the order of its bytes.

    Raises CheckpointError for a file that is missing, cut short, too long or no safetensors.
    """
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                raise CheckpointError(f"{file}: not a safetensors file, or cut short")
            header = json.loads(f.read(length))
        metadata = header.pop("__metadata__", {})
        entries, end = {}, 8 + length
        items = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, facts in items:
            shape, (start, stop) = tuple(facts["shape"]), facts["data_offsets"]
            known, nbytes = DTYPES.get(facts["dtype"]), stop - start
            fits = known is None or nbytes == prod(shape) * known.itemsize
            if 8 + length + start != end or nbytes < 0 or not fits or min(shape, default=0) < 0:
                raise ValueError(name)
            entries[name] = Entry(file, facts["dtype"], shape, end, nbytes)
            end += nbytes
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: not a safetensors file, or its header is damaged") from None
    if end != size:
        raise CheckpointError(f"{file}: cut short? {size:,} bytes, its header tells of {end:,}")
    return entries, metadata


def read_tensor(entry: Entry, out: Tensor | None = None, first_row: int = 0) -> Tensor:
    """Read a tensor, or into `out` as many rows as that has from `first_row` on."""
    if out is None:
        out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    content = memoryview(out.view(-1).view(torch.uint8).numpy())
    try:
        with open(entry.file, "rb", buffering=0) as f:
            f.seek(entry.start + first_row * prod(entry.shape[1:]) * out.itemsize)
            while content:  # a system reads at most 2 GiB at once
                if not (count := f.readinto(content)):
                    raise CheckpointError(f"{entry.file}: cut short while it was read")
                content = content[count:]
    except OSError as error:
        raise CheckpointError(f"{entry.file}: {error.strerror}") from None
    return out


def write(
    file: Path,
    entries: Entries,
    tensors: Iterable[Tensor],
    metadata: dict[str, str],
    digest: "hashlib._Hash | None" = None,
    bar: tqdm | None = None,
) -> int:
    """Write and sync a safetensors file; its size in bytes.

    tensors: the content of `entries` in their order, in as many pieces as suits the caller; each is
    rounded to the dtype of its entry on the way. digest: is fed what is written.
    Raises OSError, and CheckpointError if the pieces are more or less than the entries.
    """
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:

        def put(content: bytes | memoryview) -> None:
            if digest is not None:
                digest.update(content)
            f.write(content)
            if bar is not None:
                bar.update(len(content))

        put(len(text).to_bytes(8, "little"))
        put(text)
        tensors = (tensor.reshape(-1) for tensor in tensors if tensor.numel())
        for name, (dtype, shape) in entries.items():
            left = prod(shape)
            while left:
                flat = next(tensors, ())
                if not 0 < len(flat) <= left:
                    raise CheckpointError(f"{file}: {name} is not of shape {list(shape)}")
                for part in flat.split(CHUNK // dtype.itemsize):
                    rounded = part.to("cpu", dtype)
                    put(memoryview(rounded.view(torch.uint8).numpy()))
                left -= len(flat)
        if next(tensors, None) is not None:
            raise CheckpointError(f"{file}: more tensors than it was to hold")
        sync(f)
        return f.tell()


def shards(entries: Entries, limit: int = 0) -> list[Entries]:
    """Entries in their order, divided among files of at most `limit` bytes (0: SHARD_BYTES)."""
    files: list[Entries] = [{}]
    room = limit = limit or SHARD_BYTES
    for name, (dtype, shape) in entries.items():
        nbytes = prod(shape) * dtype.itemsize
        if nbytes > room and files[-1]:
            files.append({})
            room = limit
        files[-1][name] = (dtype, shape)
        room -= nbytes
    return files


def size_of(entries: Entries) -> int:
    """The bytes of tensors that are to be written."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in entries.values())


@contextmanager
def new_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """A folder to write to, which gets the name `path` when all that is in it is on the disk.

    Raises CheckpointError before anything is written if there is something of that name, or no room
    for nbytes; later if a file cannot be written. Nothing of it is left then.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise CheckpointError(f"{path}: there is something of this name already")
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if nbytes > free:
            raise CheckpointError(
                f"{path}: takes {nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there"
            )
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_dir():
                sync_directory(file)
            else:
                with open(file, "r+b") as f:
                    sync(f)
        sync_directory(unfinished)
        with suppress(FileNotFoundError):
            path.rmdir()  # an empty one
        os.replace(unfinished, path)
        sync_directory(path.parent)
    except OSError as error:
        place = error.filename or path
        raise CheckpointError(f"{place}: not written ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(file: object) -> None:
    """Wait until a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make names in a directory survive a power cut, where the system can do that."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # of some network file systems
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU or of main memory, for this process; 0 where that cannot be known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        facts = Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1]
        free = 1024 * int(facts.split()[0])
    except (OSError, IndexError):
        return 0
    try:  # of a job or container that has a limit of its own
        group = Path("/sys/fs/cgroup", *Path("/proc/self/cgroup").read_text().split("::/")[1:2])
        group = Path(str(group).strip())
        limit, used = ((group / f"memory.{n}").read_text() for n in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no limit reads "max"
        return free
