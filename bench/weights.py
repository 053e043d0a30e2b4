"""Writing and reading the weights of a full-size Lucie-7B, beside what the disk itself can do.

    python -m bench.weights [--folder out/weights] [--layers 32] [--keep]

Random bf16 weights are made tensor by tensor and written by the export (hf_export.write_folder);
the folder is read back by the import (hf_layout.from_hf) into a bf16 model and compared bit for
bit. Beside each, the same number of bytes is written (and synced) or read in plain sequence, pages
of the system's cache dropped before reading. The floor is the bytes over the disk's speed: 13.4 GB
each way. Making and comparing the weights is not in the times.

Memory is the peak of the resident set above what it was before: one tensor to write, the model and
one tensor to read. Files that the system keeps in memory are not in it.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hf_export import write_folder
from hf_layout import from_hf, rows_of, shapes_of
from model import LucieConfig
from tensor_files import CheckpointError, new_folder, size_of

PIECE = 1 << 24  # bytes of a plain read or write


def weight(name: str, start: int, shape: tuple[int, ...]) -> Tensor:
    """bf16 `shape`, a function of (name, start): random sign and fraction, 2^-7 <= |w| < 2^-6."""
    seed = hashlib.sha256(f"{name} {start}".encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    bits = torch.empty(shape, dtype=torch.int16)
    bits.random_(-(1 << 15), 1 << 15, generator=generator)
    sign_and_fraction, exponent = -(1 << 15) + 0x7F, 120 << 7
    return bits.bitwise_and_(sign_and_fraction).bitwise_or_(exponent).view(torch.bfloat16)


@contextmanager
def seconds(into: dict, name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    into[name] = into.get(name, 0.0) + time.perf_counter() - begin


def plain_write(file: Path, nbytes: int) -> None:
    piece = os.urandom(PIECE)
    with open(file, "wb", buffering=0) as f:
        for start in range(0, nbytes, PIECE):
            f.write(piece[: nbytes - start])
        os.fsync(f.fileno())


def plain_read(file: Path) -> None:
    buffer = bytearray(PIECE)
    with open(file, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def drop_cached(file: Path) -> None:
    """Ask the system to forget a file that it keeps in memory (Linux)."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak. 0 where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure(config: LucieConfig, folder: Path) -> dict[str, float]:
    """Seconds and bytes, by name; the exported folder is folder/model.

    Raises CheckpointError if what is read is not what was written, or there is no room.
    """
    figures: dict[str, float] = {}
    shapes, rows = shapes_of(config), rows_of(config)
    shape_of = {rows[n][:2]: shape for n, shape in shapes.items()}
    entries = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    figures["bytes"] = nbytes = size_of(entries)
    figures["largest tensor"] = max(size_of({name: entries[name]}) for name in entries)
    plain = folder / "plain"
    before = resident("VmRSS")

    def read(name: str, start: int, end: int) -> Tensor:
        name = name.removeprefix("model.")
        with seconds(figures, "making"):
            return weight(name, start, shape_of[name, start])

    with new_folder(plain, 2 * nbytes) as unfinished:
        with seconds(figures, "plain write"):
            plain_write(unfinished / "bytes", nbytes)
    with seconds(figures, "export"):
        write_folder(config, read, folder / "model", torch.bfloat16)
    figures["export"] -= figures["making"]
    figures["export memory"] = resident("VmHWM") - before

    drop_cached(plain / "bytes")
    with seconds(figures, "plain read"):
        plain_read(plain / "bytes")
    shutil.rmtree(plain)
    for file in (folder / "model").iterdir():
        drop_cached(file)
    with seconds(figures, "import"):
        model = from_hf(str(folder / "model"), dtype=torch.bfloat16)
    figures["import memory"] = resident("VmHWM") - before
    parameters = dict(model.named_parameters())
    for ours, start, end in rows.values():
        exact = weight(ours, start, shape_of[ours, start])
        if not torch.equal(parameters[ours][start:end], exact):
            raise CheckpointError(f"{ours}, rows {start} to {end}: other bits than were written")
    return figures


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("out/weights"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="the exported folder")
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise CheckpointError(f"{args.folder}: there is something of this name already")
    done = False
    try:
        f = measure(LucieConfig(num_hidden_layers=args.layers), args.folder)
        done = True
    finally:
        if not (done and args.keep):
            shutil.rmtree(args.folder, ignore_errors=True)
    print(f"{f['bytes'] / 1e9:.2f} GB of bf16 weights, bit for bit what was written")
    print(
        f"{'':8} {'seconds':>8} {'GB/s':>6} {'plain':>8} {'ratio':>6} {'peak GB':>8} {'bound':>7}"
    )
    model = {"export": 0, "import": f["bytes"]}
    for name, other in (("export", "plain write"), ("import", "plain read")):
        bound = model[name] + f["largest tensor"]
        print(
            f"{name:8} {f[name]:8.1f} {f['bytes'] / 1e9 / f[name]:6.2f} {f[other]:8.1f} "
            f"{f[name] / f[other]:6.2f} {f[f'{name} memory'] / 1e9:8.2f} {bound / 1e9:7.2f}"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (CheckpointError, ValueError, OSError) as error:
        print(f"bench.weights: {error}", file=sys.stderr)
        sys.exit(2)
