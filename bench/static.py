"""What the compiler makes of every kernel at Lucie's shapes, found without a GPU.

    python -m bench.static [op ...] [--chip 80 86 90 100 120] [--check]
    python -m bench.static [op ...] --host         what the Python around a kernel costs

The public operations are called as model.py calls them, forward and backward, under a driver that
compiles for the chip and runs nothing; then the machine code is read. --check exits 1 with a line
for each kernel that misses a requirement of the table below. A kernel that passes may still be
wrong or slow; one that spills in a loop, or has lost its tensor cores or its wide loads, is slow on
any shape. A few bytes spilled before or after a loop are shown, and pass.

--host prints how long the host takes for a forward and a backward of each operation, with sm_90's
options: torch's dispatch, the allocation of outputs (tiny here), Triton's own Python, all but the
launch itself, for which a record is made. A GPU that is given less work than that waits.
"""

import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from config.cli import ConfigError, Parser, run_cli
from kernels import launch

try:
    import triton

    from gpuless.compiler import CHIPS, Launch, fake_gpu, occupancy
except ImportError as error:
    print(f"bench.static: needs pip install triton, which is for Linux ({error})", file=sys.stderr)
    sys.exit(2)

HOPPER = (90, 100, 120)  # and later: the chips with a tensor memory accelerator
ONE_PASS = (90, 100)  # chips with blocks for attention's backward in one pass
UNTUNED = (100, 120)  # chips whose blocks are not tuned: some kernels spill there


@dataclass(frozen=True)
class Needs:
    """What a kernel must show. On a chip that is tuned for, no kernel may spill registers
    inside a loop, nor anywhere if it has no loop."""

    ops: str  # that launch it
    tensor: int = 0  # fewest tensor-core instructions
    wgmma: bool = True  # which they must be on sm_90; it takes 64 rows, decoding has 16
    tma: tuple[int, ...] = ()  # chips where it loads through the tensor memory accelerator
    narrow: int | None = None  # most loads, and most stores, under 128 bits, in one that streams
    overlap: float = 0.0  # least share of the softmax under a running wgmma, on sm_90
    chips: tuple[int, ...] = tuple(CHIPS)  # that launch it


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
    "_attention_backward_delta": Needs("attention", narrow=3, chips=ONE_PASS),
    "_attention_decode": Needs("attention", tensor=8, wgmma=False, narrow=3),
    "_attention_combine": Needs("attention", narrow=12),  # it has few loads, all small
    # scales are loaded two bytes at a time, and each of the few results is stored by itself
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


def _rope(positions: Tensor | None = None) -> None:
    q, k, _ = _qkv(128)
    table = torch.empty(TOKENS, 64)
    _backward(*kernels.rope(q, k, table, table, positions))


def _one_pass(head_dim: int, *documents: Tensor) -> None:
    _backward(kernels.attention(*_qkv(head_dim), *documents, deterministic=False))


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
    "rms_norm": {
        "": lambda: _backward(kernels.rms_norm(_tensor(TOKENS, HIDDEN), _tensor(HIDDEN), 1e-5))
    },
    "add_rms_norm": {
        "": lambda: _backward(
            *kernels.add_rms_norm(
                _tensor(TOKENS, HIDDEN), _tensor(TOKENS, HIDDEN), _tensor(HIDDEN), 1e-5
            )
        )
    },
    "rope": {"": _rope, "positions": lambda: _rope(torch.zeros(1, TOKENS, dtype=torch.int64))},
    "swiglu": {"": lambda: _backward(kernels.swiglu(_tensor(TOKENS, 2 * FEED_FORWARD)))},
    "attention": {
        "D=128": lambda: _backward(kernels.attention(*_qkv(128))),
        "D=128 documents": lambda: _backward(kernels.attention(*_qkv(128), _DOCUMENTS)),
        "D=128 one pass": lambda: _one_pass(128),
        "D=128 one pass documents": lambda: _one_pass(128, _DOCUMENTS),
        "D=128 decoding": lambda: _decode(128),
        "D=64": lambda: _backward(kernels.attention(*_qkv(64))),
        "D=64 documents": lambda: _backward(kernels.attention(*_qkv(64), _DOCUMENTS)),
        "D=64 one pass": lambda: _one_pass(64),
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


def measure(record: Launch) -> dict[str, object]:
    """The figures of a kernel as compiled for one chip."""
    counts = record.sass.counts
    return {
        "chip": record.capability,
        "kernel": record.name,
        "warps": record.num_warps,
        "registers": record.registers,
        "spills": record.spills,  # bytes
        "in_loops": record.sass.local_in_loops,  # accesses to what is spilled, inside loops
        "shared": record.shared,  # bytes
        "blocks": occupancy(record),  # per multiprocessor
        "tensor": counts["HMMA"] + counts["HGMMA"] + counts["UTCMMA"],  # instructions
        "tma": counts["UTMALDG"],  # loads
        "loads": counts["LDG"] + counts["LDGSTS"],  # from global memory
        "wide": counts["LDG.128"] + counts["LDGSTS.128"],  # of these, 128 bits or more
        "overlap": record.sass.overlap,  # share of the softmax under a running wgmma, or None
    }


def spilling(record: Launch) -> str | None:
    """How a kernel spills registers where it costs time, in a phrase."""
    if not (accesses := record.sass.local_in_loops):
        return None
    where = "its loops" if record.sass.loops else "a kernel without loops"
    return f"spills {record.spills} bytes, {accesses} accesses to local memory in {where}"


def faults(record: Launch) -> list[str]:
    """What this launch lacks of its row in REQUIREMENTS, a phrase each."""
    needs = REQUIREMENTS.get(record.name)
    if needs is None:
        return ["has no row in REQUIREMENTS"]
    counts, row, chip = record.sass.counts, measure(record), record.capability
    found = []
    loads, wide, overlap = row["loads"], row["wide"], row["overlap"] or 0.0
    if chip not in UNTUNED and (spills := spilling(record)):
        found.append(spills)
    if row["tensor"] < needs.tensor:
        found.append(f"has {row['tensor']} tensor-core instructions, fewer than {needs.tensor}")
    if needs.wgmma and chip == 90 and counts["HGMMA"] < needs.tensor:
        found.append(f"has {counts['HGMMA']} wgmma, fewer than {needs.tensor}")
    if record.sass.serialized:
        found.append("waits for each wgmma by itself: ptxas lacked registers to run them in a row")
    if chip in needs.tma and not row["tma"]:
        found.append("has no TMA load")
    if record.constants.get("ONE_PASS") and not counts["UTMAREDG"]:
        found.append("does not add by TMA")
    if needs.narrow is not None and (not wide or loads - wide > needs.narrow):
        found.append(f"has {wide} loads of 128 bits among {loads}")
    if needs.narrow is not None and counts["STG"] - counts["STG.128"] > needs.narrow:
        found.append(f"has {counts['STG.128']} stores of 128 bits among {counts['STG']}")
    if chip == 90 and overlap < needs.overlap:
        found.append(f"overlaps {overlap:.2f} of its softmax, less than {needs.overlap}")
    return found


def compile_op(op: str, chip: int) -> tuple[list[dict], list[str]]:
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
            launch.use(before)
        for record in launches:
            launched.add(record.name)
            if record.cubin not in seen:
                seen.add(record.cubin)
                rows.append(measure(record) | {"case": f"{op} {case}".rstrip()})
                failures += [f"{where}: {record.name} {fault}" for fault in faults(record)]
    for name, needs in REQUIREMENTS.items():
        if op in needs.ops.split() and chip in needs.chips and name not in launched:
            failures.append(f"sm_{chip} {op}: {name} was not launched")
    return rows, failures


def host_times(ops: Sequence[str]) -> Iterator[tuple[str, float, float | None]]:
    """For each operation the microseconds of a forward and, if it has one, of a backward."""
    x, weight, table = _tensor(8, 128), _tensor(128), torch.empty(16, 64)
    q, k, v = (_tensor(1, 16, heads, 128) for heads in (4, 2, 2))
    targets, packed = torch.zeros(8, dtype=torch.int64), torch.zeros(64, 64, dtype=torch.uint8)
    calls = {  # and what gets a gradient
        "rms_norm": (lambda: kernels.rms_norm(x, weight, 1e-5), (x, weight)),
        "add_rms_norm": (lambda: kernels.add_rms_norm(x, x, weight, 1e-5), (x, weight)),
        "rope": (lambda: kernels.rope(q, k, table, table), (q, k)),
        "swiglu": (lambda: kernels.swiglu(x), (x,)),
        "attention": (lambda: kernels.attention(q, k, v), (q, k, v)),
        "linear_cross_entropy": (lambda: kernels.linear_cross_entropy(x, x, targets), (x,)),
        "int4_linear": (lambda: kernels.int4_linear(x, packed, weight[:64, None]), ()),
    }

    def microseconds(function: Callable[[], object]) -> float:
        function()  # which compiles
        return 1e6 * min(timeit.repeat(function, number=20, repeat=20)) / 20

    for op in tqdm(ops, desc="host", unit="op"):
        call, leaves = calls[op]
        with fake_gpu(90), torch.set_grad_enabled(bool(leaves)):
            before = launch.use("triton")
            times = [microseconds(call), None]
            if leaves:
                outputs = (y,) if isinstance(y := call(), Tensor) else y
                upstream = [torch.zeros_like(y) for y in outputs]
                backward = partial(torch.autograd.grad, outputs, leaves, upstream, True)
                times[1] = microseconds(backward)
            launch.use(before)
        yield op, *times


def table(chip: int, rows: Sequence[dict]) -> str:
    """The rows of one chip as text."""
    form = "{:26}{:35}{:>5}{:>6}{:>9}{:>9}{:>8}{:>8}{:>8}{:>7}{:>10}{:>9}"
    name = f"sm_{chip} ({CHIPS[chip].name})"
    lines = [
        [name, "launched by", "", "", "spilled", "accesses", "shared", "blocks", "tensor", "TMA",
         "128-bit", "softmax"],
        ["", "", "warps", "regs", "bytes", "in loops", "KB", "per SM", "cores", "loads", "of loads",
         "overlap"],
    ]  # fmt: skip
    for row in rows:
        names = ("kernel", "case", "warps", "registers", "spills", "in_loops")
        figures = [row[n] for n in names]
        figures += [f"{row['shared'] / 1024:.1f}", row["blocks"], row["tensor"], row["tma"]]
        overlap = "" if row["overlap"] is None else f"{row['overlap']:.2f}"
        lines.append([*figures, f"{row['wide']}/{row['loads']}", overlap])
    return "\n".join(form.format(*line).rstrip() for line in lines)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument(
        "--chip", nargs="+", type=int, default=list(CHIPS), choices=list(CHIPS),
        help="ten times the compute capability of each chip to compile for",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit 1 if a requirement is missed")
    parser.add_argument("--host", action="store_true", help="print the host's time of each op")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.op if op not in CASES]:
        raise ConfigError(f"no op {unknown[0]!r}; there are {', '.join(CASES)}")
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing would compile")
    if args.host:
        print(f"{'microseconds of the host':26}{'forward':>9}{'backward':>10}")
        for op, forward, backward in host_times(args.op or list(CASES)):
            print(f"{op:26}{forward:9.0f}{'' if backward is None else f'{backward:.0f}':>10}")
        return 0
    rows, failures = [], []
    for chip, op in tqdm(
        [(chip, op) for chip in args.chip for op in args.op or CASES], desc="compile", unit="op"
    ):
        of_op, failures_of_op = compile_op(op, chip)
        rows, failures = rows + of_op, failures + failures_of_op
    for chip in args.chip:
        print(table(chip, [row for row in rows if row["chip"] == chip]), end="\n\n")
    print(f"triton {triton.__version__}, {len(rows)} kernels")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if args.check and failures else 0


if __name__ == "__main__":
    run_cli(main)
