"""Token streams in Megatron's indexed format, and the finished parts they are joined from."""

import json
import os
import re
import shutil
import zipfile
from array import array
from pathlib import Path

import numpy as np

from data.token_stream import DTYPES, HEADER, MAGIC, DataError

OWN = re.compile(r"(run|\d{6,})\.(record|npz)(\.tmp)?")  # the names of files in a folder of parts
CHUNK = 1 << 20  # entries of an index written at a time


class StreamWriter:
    """Writes PATH.bin and PATH.idx in Megatron's indexed format, complete or not at all.

    Memory: 4 bytes a document.
    """

    def __init__(self, path: str | Path, vocab_size: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # uint16 holds ids to 65,535; past that Megatron's own choice is int32.
        self.dtype = np.dtype(np.uint16 if vocab_size <= 65_535 else np.int32)
        self.lengths = array("i")
        self._bin = open(f"{path}.bin.tmp", "wb")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document."""
        self.add_many(tokens, np.array([len(tokens)]))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie back to back in `tokens`."""
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.lengths.frombytes(lengths.astype(np.int32).tobytes())

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        try:
            with self._bin as f:
                f.flush()
                os.fsync(f.fileno())
            if not failed:
                self._finish()
        finally:
            for suffix in (".bin.tmp", ".idx.tmp"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _finish(self) -> None:
        lengths = np.frombuffer(self.lengths, np.int32) if self.lengths else np.empty(0, np.int32)
        count, end = len(lengths), 0
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(f"{self.path}.idx.tmp", "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
            f.write(lengths.tobytes())
            for start in range(0, count, CHUNK):
                ends = end + np.cumsum(lengths[start : start + CHUNK], dtype=np.int64)
                f.write((np.concatenate(([end], ends[:-1])) * self.dtype.itemsize).tobytes())
                end = ends[-1]
            for start in range(0, count + 1, CHUNK):
                f.write(np.arange(start, min(start + CHUNK, count + 1), dtype=np.int64).tobytes())
            f.flush()
            os.fsync(f.fileno())
        # Never an old index beside new tokens: without its index a stream is not there.
        Path(f"{self.path}.idx").unlink(missing_ok=True)
        os.replace(f"{self.path}.bin.tmp", f"{self.path}.bin")
        os.replace(f"{self.path}.idx.tmp", f"{self.path}.idx")


class Parts:
    """The finished parts of a run, in a folder: arrays and a record each, numbered from 0.

    A part is there when its record is, which is written last. `run` says what the parts were made
    of; those of another run are removed, and `begun_anew` is true.
    """

    def __init__(self, folder: Path, run: dict) -> None:
        self.folder, self.records, self.begun_anew = folder, [], False
        run = json.loads(json.dumps(run))
        before = _read(folder / "run.record")
        if before != run:
            self.begun_anew = before is not None
            found = sorted(os.listdir(folder)) if folder.is_dir() else []
            if foreign := [name for name in found if not OWN.fullmatch(name)]:
                raise DataError(f"{folder}: holds {foreign[0]}, not of data.prepare: another --out")
            # Without its run.record a folder's parts count for nothing, should this be cut short.
            (folder / "run.record").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.record", run)
        while (record := _read(self._name(len(self.records), "record"))) is not None:
            self.records.append(record)

    def add(self, record: dict, arrays: dict[str, np.ndarray]) -> None:
        """Keep one more part."""
        number = len(self.records)
        file = self._name(number, "npz")
        with open(f"{file}.tmp", "wb") as f:
            np.savez(f, **arrays)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{file}.tmp", file)
        write_json(self._name(number, "record"), record)
        self.records.append(record)

    def arrays(self, number: int, *names: str) -> list[np.ndarray]:
        """Arrays of a part by their names. Raises DataError if the file was damaged."""
        file = self._name(number, "npz")
        try:
            with np.load(file) as kept:
                return [kept[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: damaged ({error}); remove {self.folder}") from None

    def remove(self) -> None:
        # The run first, so that what is left of a removal cut short is never continued.
        (self.folder / "run.record").unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _name(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06}.{suffix}"


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)  # in ASCII: names of files may be no UTF-8
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
