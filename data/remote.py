"""Inputs that are not on this machine: files in an object store, data sets of the Hugging Face Hub.

    s3://bucket/folder  gs://bucket/*.jsonl.gz  https://host/x.parquet   what fsspec reads
    hf:NAME[@REVISION][#SUBSET]   the train split, streamed by the package `datasets`

A connection that fails is a DataError and ends the run, whatever is to be done with bad documents:
the same command goes on where it was.
"""

import glob
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data.token_stream import NO_SIZE, DataError, failures, open_store

HUB = "hf:"
BUFFER = 1 << 20  # bytes of a file asked for at a time
# What tells that a file is another than it was, as the stores call it.
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "created",
)


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address of fsspec, fetched piece by piece as it is read."""

    name: str  # the whole address
    size: int  # bytes, as stored
    version: str = field(compare=False)  # changes with the content, where the store tells

    def __str__(self) -> str:
        return self.name

    def open(self) -> io.BufferedReader:
        with failures(self, "fsspec"):
            store, path = open_store(self.name)
            return io.BufferedReader(_Fetched(self.name, store.open(path, "rb")), BUFFER)


def find_remote(address: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    """The files at an address, which names a file, a folder or a glob that matches files."""
    with failures(address, "fsspec"):
        store, path = open_store(address)
        if glob.has_magic(path):
            found = store.glob(path, detail=True)
        elif path.endswith(suffixes):
            found = {path: store.info(path)}
        else:
            found = store.find(path, detail=True)
        files = []
        for path, info in sorted(found.items()):
            if info["type"] == "file" and path.endswith(suffixes):
                name = store.unstrip_protocol(path)
                if info["size"] is None:
                    raise DataError(f"{name}: {NO_SIZE}")
                files.append(RemoteFile(name, info["size"], version(info)))
        if not files:
            raise DataError(f"{address}: no {', '.join(suffixes)} file there")
        return files


def version(info: dict) -> str:
    """What is known of a file that changes with its content; "" for nothing."""
    return next((str(info[key]) for key in VERSIONS if info.get(key)), "")


class _Fetched(io.RawIOBase):
    """An open file of fsspec, whose every failure is a DataError."""

    def __init__(self, name: str, file: Any) -> None:
        self.name, self.file = name, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        with failures(self.name, "fsspec"):
            piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with failures(self.name, "fsspec"):
            return self.file.seek(offset, whence)

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True)
class HubDataset:
    """The train split of a data set of the Hugging Face Hub."""

    name: str
    revision: str | None = None
    subset: str | None = None

    @classmethod
    def parse(cls, address: str) -> "HubDataset":
        """From "hf:NAME[@REVISION][#SUBSET]"."""
        name, _, subset = address.removeprefix(HUB).partition("#")
        name, _, revision = name.partition("@")
        if not name:
            raise DataError(f"{address}: a data set of the Hub is hf:NAME[@REVISION][#SUBSET]")
        return cls(name, revision or None, subset or None)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.name}{revision}" + (f"#{self.subset}" if self.subset else "")

    def pinned(self) -> "HubDataset":
        """The same at the commit that its revision is now."""
        with failures(self, "datasets"):
            from huggingface_hub import HfApi

            info = HfApi().dataset_info(self.name, revision=self.revision)
            return replace(self, revision=info.sha)

    def tables(self, done: int, size: int) -> Iterator[Any]:
        """Its rows after the first `done`, as tables of pyarrow of `size` rows."""
        with failures(self, "datasets"):
            import datasets

            options = {"split": "train", "revision": self.revision, "streaming": True}
            rows = datasets.load_dataset(self.name, self.subset, **options)
            yield from rows.skip(done).with_format("arrow").iter(size)
