"""What the compiler makes of every kernel at Lucie's shapes, found without a GPU.

    python -m bench.static [op ...] [--chip 80 86 90 100] [--check] [--json FILE]

Calls the public operations as model.py does, forward and backward, under a driver that compiles for
the chip and runs nothing, and reads the machine code. --check exits 1 with a line for each kernel
that misses a requirement of the table below. A kernel that passes is not yet right or fast; one
that spills, or has lost its tensor cores or its wide loads, is slow on any shape.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from config.cli import ConfigError, Parser, run_cli
from kernels import launch

try:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    from gpuless.compiler import CHIPS, Launch, fake_gpu, occupancy
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"bench.static: needs pip install triton, which is for Linux ({error})", file=sys.stderr)
    sys.exit(2)

HOPPER = (90, 100)  # and what came after: the chips with a tensor memory accelerator


@dataclass(frozen=True)
class Needs:
    """What a kernel must show. Spilled registers are allowed to none, save on sm_100."""

    ops: str  # that launch it, on every chip
    tensor: int = 0  # fewest tensor-core instructions
    wgmma: bool = True  # which they must be on sm_90; it takes 64 rows, decoding has 16
    tma: tuple[int, ...] = ()  # chips where it loads through the tensor memory accelerator
    narrow: int | None = None  # most loads, and most stores, under 128 bits, in one that streams
    overlap: float = 0.0  # least share of the softmax under a running wgmma, on sm_90


REQUIREMENTS = {
    "_rms_norm_forward": Needs("rms_norm add_rms_norm", narrow=3),
    "_rms_norm_backward": Needs("rms_norm add_rms_norm", narrow=3),
    "_rope": Needs("rope", narrow=3),
    "_swiglu_forward": Needs("swiglu", narrow=3),
    "_swiglu_backward": Needs("swiglu", narrow=3),
    "_cross_entropy": Needs("linear_cross_entropy", narrow=3),
    "_attention_forward": Needs("attention", tensor=8, tma=HOPPER, overlap=0.8),
    "_attention_backward_dq": Needs("attention", tensor=8, tma=HOPPER),
    "_attention_backward_dkdv": Needs("attention", tensor=8, tma=HOPPER),
    "_attention_decode": Needs("attention", tensor=8, wgmma=False, narrow=3),
    "_attention_combine": Needs("attention", narrow=12),  # a few small loads in all
    # scales come two bytes at a time, and each of a few results by itself
    "_int4_linear": Needs("int4_linear", tensor=8, wgmma=False, narrow=2),
}

TOKENS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 4096, 4096, 12_288, 32, 8, 65_024


def _tensor(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).requires_grad_()


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _qkv(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they lie in the output of one projection."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    parts = torch.empty(1, TOKENS, sum(heads), head_dim, dtype=torch.bfloat16).split(heads, dim=2)
    return tuple(part.requires_grad_() for part in parts)


def _rms_norm() -> None:
    _backward(kernels.rms_norm(_tensor(TOKENS, HIDDEN), _tensor(HIDDEN), 1e-5))


def _add_rms_norm() -> None:
    x, residual = _tensor(TOKENS, HIDDEN), _tensor(TOKENS, HIDDEN)
    _backward(*kernels.add_rms_norm(x, residual, _tensor(HIDDEN), 1e-5))


def _rope(positions: Tensor | None = None) -> None:
    q, k, _ = _qkv(128)
    table = torch.empty(TOKENS, 64)
    _backward(*kernels.rope(q, k, table, table, positions))


def _swiglu() -> None:
    _backward(kernels.swiglu(_tensor(TOKENS, 2 * FEED_FORWARD)))


def _attention(head_dim: int, cu_seqlens: Tensor | None = None) -> None:
    _backward(kernels.attention(*_qkv(head_dim), cu_seqlens))


def _decode(head_dim: int) -> None:
    q, k, v = _qkv(head_dim)
    with torch.no_grad():
        kernels.attention(q[:, -1:], k, v)


def _linear_cross_entropy() -> None:
    # The products of this operation are torch's, and do run: a small hidden size, and zeros.
    hidden = torch.zeros(256, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(VOCABULARY, 64, dtype=torch.bfloat16, requires_grad=True)
    kernels.linear_cross_entropy(hidden, weight, torch.zeros(256, dtype=torch.int64)).backward()


def _int4_linear(rows: int, columns: int, hidden: int) -> None:
    packed = torch.empty(columns, hidden // 2, dtype=torch.uint8)
    scales = torch.empty(columns, hidden // 128, dtype=torch.bfloat16)
    kernels.int4_linear(torch.empty(rows, hidden, dtype=torch.bfloat16), packed, scales)


_DOCUMENTS = torch.tensor([0, 1000, 1000, 3001, TOKENS], dtype=torch.int32)
CASES: dict[str, dict[str, Callable[[], None]]] = {
    "rms_norm": {"": _rms_norm},
    "add_rms_norm": {"": _add_rms_norm},
    "rope": {"": _rope, "positions": lambda: _rope(torch.zeros(1, TOKENS, dtype=torch.int64))},
    "swiglu": {"": _swiglu},
    "attention": {
        "D=128": lambda: _attention(128),
        "D=128 documents": lambda: _attention(128, _DOCUMENTS),
        "D=128 decoding": lambda: _decode(128),
        "D=64": lambda: _attention(64),
        "D=64 documents": lambda: _attention(64, _DOCUMENTS),
        "D=64 decoding": lambda: _decode(64),
    },
    "linear_cross_entropy": {"": _linear_cross_entropy},
    "int4_linear": {
        "1 row": lambda: _int4_linear(1, HIDDEN, FEED_FORWARD),
        "1 row, wide": lambda: _int4_linear(1, 2 * FEED_FORWARD, HIDDEN),
        "16 rows": lambda: _int4_linear(16, HIDDEN, FEED_FORWARD),
        "16 rows, wide": lambda: _int4_linear(16, 2 * FEED_FORWARD, HIDDEN),
    },
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a kernel as compiled for one chip."""

    chip: int
    kernel: str
    case: str
    warps: int
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    blocks: int  # per multiprocessor
    tensor: int
    tma: int  # loads
    loads: int  # from global memory
    wide: int  # of these, 128 bits or more
    overlap: float | None


def measure(record: Launch, case: str) -> Row:
    """The figures of a record."""
    counts = record.sass.counts
    return Row(
        chip=record.capability,
        kernel=record.name,
        case=case,
        warps=record.num_warps,
        registers=record.registers,
        spills=record.spills,
        shared=record.shared,
        blocks=occupancy(record),
        tensor=counts["HMMA"] + counts["HGMMA"] + counts["UTCMMA"],
        tma=counts["UTMALDG"],
        loads=counts["LDG"] + counts["LDGSTS"],
        wide=counts["LDG.128"] + counts["LDGSTS.128"],
        overlap=record.sass.overlap,
    )


def faults(record: Launch) -> list[str]:
    """What this launch lacks of its row in REQUIREMENTS, a phrase each."""
    needs = REQUIREMENTS.get(record.name)
    if needs is None:
        return ["has no row in REQUIREMENTS"]
    counts, row = record.sass.counts, measure(record, "")
    found = []
    local = counts["LDL"] + counts["STL"]
    if record.capability != 100 and (row.spills or local):
        found.append(f"spills {row.spills} bytes, {local} accesses to local memory")
    if row.tensor < needs.tensor:
        found.append(f"has {row.tensor} tensor-core instructions, fewer than {needs.tensor}")
    if needs.wgmma and record.capability == 90 and counts["HGMMA"] < needs.tensor:
        found.append(f"has {counts['HGMMA']} wgmma, fewer than {needs.tensor}")
    if record.sass.serialized:
        found.append("waits for each wgmma by itself: ptxas lacked registers to run them in a row")
    if record.capability in needs.tma and not row.tma:
        found.append("has no TMA load")
    if needs.narrow is not None and (not row.wide or row.loads - row.wide > needs.narrow):
        found.append(f"has {row.wide} loads of 128 bits among {row.loads}")
    if needs.narrow is not None and counts["STG"] - counts["STG.128"] > needs.narrow:
        found.append(f"has {counts['STG.128']} stores of 128 bits among {counts['STG']}")
    if record.capability == 90 and (row.overlap or 0.0) < needs.overlap:
        found.append(f"overlaps {row.overlap or 0:.2f} of its softmax, less than {needs.overlap}")
    return found


def compile_op(op: str, chip: int) -> tuple[list[Row], list[str]]:
    """The kernels that an operation launches on a chip, each once, and what is wrong with them."""
    rows, failures, launched, seen = [], [], set(), set()
    for case, call in CASES[op].items():
        where = f"sm_{chip} {op} {case}".rstrip()
        with fake_gpu(chip) as launches:
            before = launch.use("triton")
            try:
                call()
            except Exception as error:  # the next kernels are still worth a look
                failures.append(f"{where}: " + " ".join(str(error).split()))
            else:
                if not launches:
                    failures.append(f"{where}: launched nothing")
            finally:
                launch.use(before)
        for record in launches:
            launched.add(record.name)
            if record.cubin not in seen:
                seen.add(record.cubin)
                rows.append(measure(record, f"{op} {case}".rstrip()))
                failures += [f"{where}: {record.name} {fault}" for fault in faults(record)]
    for name, needs in REQUIREMENTS.items():
        if op in needs.ops.split() and name not in launched:
            failures.append(f"sm_{chip} {op}: {name} was not launched")
    return rows, failures


def table(chip: int, rows: Sequence[Row]) -> str:
    """The rows of one chip as text."""
    lines = [
        (f"sm_{chip} ({CHIPS[chip].name})", "launched by", "", "", "spilled", "shared", "blocks")
        + ("tensor", "TMA", "128-bit", "softmax"),
        ("", "", "warps", "regs", "bytes", "KB", "per SM", "cores", "loads", "of loads", "overlap"),
    ]
    for row in rows:
        figures = (row.warps, row.registers, row.spills, f"{row.shared / 1024:.1f}", row.blocks)
        overlap = "" if row.overlap is None else f"{row.overlap:.2f}"
        figures += (row.tensor, row.tma, f"{row.wide}/{row.loads}", overlap)
        lines.append((row.kernel, row.case, *map(str, figures)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left < 2 else cell.rjust(width)
            for left, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def _ptxas(chip: int) -> str:
    return re.search(r"V([\d.]+)", get_ptxas_version(chip)).group(1)


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    parser = Parser(prog="bench.static", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument(
        "--chip", nargs="+", type=int, default=[80, 86, 90, 100], choices=list(CHIPS)
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a requirement is missed")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.op if op not in CASES]:
        raise ConfigError(f"no op {unknown[0]!r}; there are {', '.join(CASES)}")
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing would compile")
    work = [(chip, op) for chip in args.chip for op in args.op or CASES]
    rows, failures = [], []
    for chip, op in tqdm(work, unit="op"):
        op_rows, op_failures = compile_op(op, chip)
        rows += op_rows
        failures += op_failures
    for chip in args.chip:
        if here := [row for row in rows if row.chip == chip]:
            print(table(chip, here), end="\n\n")
    versions = {f"sm_{chip}": _ptxas(chip) for chip in args.chip}
    seconds = time.perf_counter() - started
    if args.json:
        report = {
            "triton": triton.__version__,
            "ptxas": versions,
            "seconds": seconds,
            "kernels": [asdict(row) for row in rows],
            "failures": failures,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    ptxas = ", ".join(f"{version} for {chip}" for chip, version in versions.items())
    print(f"triton {triton.__version__}, ptxas {ptxas}; {len(rows)} kernels, {seconds:.0f} s")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if args.check and failures else 0


if __name__ == "__main__":
    run_cli(main)
