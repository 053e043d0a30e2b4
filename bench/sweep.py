"""Which launch table is fastest: a dozen candidates for each kernel of one operation.

    python -m bench.kernels --sweep attention [--tokens 8192] [--minutes 3] [--out DIR]
    python -m bench.kernels --sweep attention --toy [--chip 90]     compiles them, without a GPU

First all candidates are compiled, on all cores, by a driver that stands in for the GPU. That fills
Triton's cache, so the process that measures only loads. A candidate is dropped if it does not
compile, does not fit, spills inside a loop or has its wgmma serialized. On a GPU each of the others
is compared with the definition and timed as bench.kernels does it, in the pass in which its kernel
runs; the time includes whatever else runs in that pass. The present row is always timed. The last
line is the table for LAUNCH of the operation's file: it differs from the present one only where at
least 1% is gained.

Writes DIR/sweep_OP.json after each candidate.
"""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from bench import baselines
from bench.baselines import ONE_PASS, OURS, Draw
from bench.measure import compare, describe, heading, machine, measure, timed, write_json
from config.cli import ConfigError, nearest
from kernels import launch
from model import LucieConfig

try:
    import triton

    from bench import static
    from gpuless.compiler import CHIPS, fake_gpu
except ImportError as error:
    why = f"needs pip install triton, which is for Linux ({error})"
    print(f"bench.kernels --sweep: {why}", file=sys.stderr)
    sys.exit(2)

ATTENTION = baselines.OPS["attention"]
OPS = baselines.OPS | {  # and what launches other kernels of attention
    "attention_one_pass": replace(
        ATTENTION, implementations={OURS: ATTENTION.implementations[ONE_PASS]}
    ),
    "attention_documents": replace(  # eight
        ATTENTION,
        inputs=lambda draw, s, t: (
            *ATTENTION.inputs(draw, s, t),
            torch.linspace(0, t, 9, device=draw.device).int(),
        ),
    ),
}
MODULES = {  # of kernels/, where it is not called as the operation
    "add_rms_norm": "rms_norm",
    "attention_one_pass": "attention",
    "attention_documents": "attention",
}
TOKENS = 8192
SMALL = 512  # tokens to compile with, since Triton specialises alike for these, and to compare at
GAIN = 0.99  # of the present time, below which a candidate replaces it


@dataclass(frozen=True)
class Kernel:
    """What to try for one entry of a table LAUNCH."""

    function: str  # of the kernel
    mode: str  # of bench.kernels, in which it runs
    fields: str  # of the entry
    candidates: list[tuple[int, ...]]


# A warpgroup, which is 4 warps, takes 64 rows of a product.
_TILES = [*product(((64, 4), (128, 8)), (32, 64, 128), (2, 3))]
_BY_QUERIES = [(m, n, warps, stages) for (m, warps), n, stages in _TILES]
_WHOLE = [tile for tile in _BY_QUERIES if tile[0] % tile[1] == 0]  # as the kernel of dq needs
_BY_KEYS = [(m, n, warps, stages) for (n, warps), m, stages in _TILES]
_TILE, _HELD = "BLOCK_M, BLOCK_N, warps, stages", "elements, elements a thread"
_STREAMED = [*product((1024, 2048, 4096, 8192), (2, 4, 8))]
_NORM = {
    "forward": Kernel(
        "_rms_norm_forward", "forward", _HELD,
        [(4096, 8), *product((4096, 8192), (16, 32, 64)), (16_384, 32)],
    ),
    "backward": Kernel(
        "_rms_norm_backward", "backward", f"{_HELD}, programs a multiprocessor",
        [*product((4096, 8192), (16, 32), (1, 2, 4))],
    ),
}  # fmt: skip
SWEEPS = {  # op: kernel, as LAUNCH names it: what to try
    "attention": {
        "forward": Kernel("_attention_forward", "forward", _TILE, _BY_QUERIES),
        "dq": Kernel("_attention_backward_dq", "backward", _TILE, _WHOLE),
        "dkdv": Kernel("_attention_backward_dkdv", "backward", _TILE, _BY_KEYS),
    },
    "attention_one_pass": {
        "one pass": Kernel("_attention_backward_dkdv", "backward", _TILE, _BY_KEYS),
    },
    "attention_documents": {
        "forward small": Kernel("_attention_forward", "forward", _TILE, _BY_QUERIES),
        "dq small": Kernel("_attention_backward_dq", "backward", _TILE, _WHOLE),
        "dkdv small": Kernel("_attention_backward_dkdv", "backward", _TILE, _BY_KEYS),
    },
    "linear_cross_entropy": {
        "cross_entropy": Kernel(
            "_cross_entropy", "full", "BLOCK, warps",
            [*product((4096, 8192, 16_384, 32_768), (8, 16, 32))],
        )
    },
    "rms_norm": _NORM,
    "add_rms_norm": _NORM,
    "swiglu": {
        "forward": Kernel("_swiglu_forward", "forward", "BLOCK, warps", _STREAMED),
        "backward": Kernel("_swiglu_backward", "backward", "BLOCK, warps", _STREAMED),
    },
    "rope": {
        "rope": Kernel(
            "_rope", "full", "elements, warps", [*product((2048, 4096, 8192), (2, 4, 8))]
        )
    },
    "int4_linear": {  # a larger BLOCK_N would launch "narrow"
        "wide": Kernel(
            "_int4_linear", "no-grad-forward", "BLOCK_N, warps, stages",
            [*product((16, 32), (2, 4, 8), (3, 4))],
        )
    },
}  # fmt: skip


def launch_table(op: str) -> dict[str, dict[str, tuple[int, ...]]]:
    return import_module(f"kernels.{MODULES.get(op, op)}").LAUNCH


def present(op: str) -> dict[str, tuple[int, ...]]:
    """How the kernels of an operation are launched on the current GPU."""
    return launch.launch_rows(launch_table(op))


@contextmanager
def launched_as(op: str, kernel: str, candidate: Sequence[int]) -> Iterator[None]:
    """Within this context the kernel is launched with the candidate, on the current GPU."""
    tables, before = launch_table(op), dict(launch_table(op))
    tables[launch.gpu().kind] = present(op) | {kernel: tuple(candidate)}
    try:
        yield
    finally:
        tables.clear()
        tables.update(before)


def compile_candidate(
    op: str, kernel: str, candidate: Sequence[int], chip: int, tokens: int
) -> dict:
    """Its figures, and `dropped`: why it is not worth a run, or None."""
    spec, sizes, tokens = SWEEPS[op][kernel], LucieConfig(), min(tokens, SMALL)
    if op == "linear_cross_entropy":  # torch's products do run, on the CPU
        sizes, tokens = replace(sizes, hidden_size=64), 16
    try:
        with fake_gpu(chip) as launches, launched_as(op, kernel, candidate):
            launch.use("triton")
            inputs = OPS[op].inputs(Draw("cpu"), sizes, tokens)
            timed(OPS[op].implementations[OURS], inputs, spec.mode)()
        record = next(record for record in launches if record.name == spec.function)
    except Exception as error:
        return {"dropped": describe(error)}
    serialized = "waits for each wgmma by itself" if record.sass.serialized else None
    return static.measure(record) | {"dropped": serialized or static.spilling(record)}


def compile_all(jobs: Sequence[tuple], seconds: float) -> Iterator[dict]:
    """Run compile_candidate on each. A compiler may hang or die, so what is not done after so many
    seconds is dropped."""
    end, spawn = time.monotonic() + seconds, multiprocessing.get_context("spawn")
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with spawn.Pool(min(len(jobs), os.cpu_count() or 1), **one_thread) as pool:
        awaited = [pool.apply_async(compile_candidate, job) for job in jobs]
        for result in tqdm(awaited, "compile", unit="kernel"):
            try:
                yield result.get(max(0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                yield {"dropped": "did not compile in time"}


def measure_candidate(op: str, row: dict, tokens: int, device: str) -> dict:
    """Times of a candidate in its mode, or `dropped` if it is wrong or does not run."""
    ours, sizes = OPS[op].implementations[OURS], LucieConfig()
    stream = torch.cuda.Stream() if device == "cuda" else None
    try:
        with launched_as(op, row["kernel"], row["candidate"]):
            alone = replace(OPS[op], implementations={OURS: ours})
            if failure := compare(alone, sizes, min(tokens, SMALL), device)[OURS]["failure"]:
                return {"dropped": failure}
            with torch.cuda.stream(stream):
                inputs = OPS[op].inputs(Draw(device), sizes, tokens)
                return measure(ours, inputs, SWEEPS[op][row["kernel"]].mode, device)
    except Exception as error:
        return {"dropped": describe(error)}


def sweep(op: str, tokens: int, chip: int, device: str, out: Path, minutes: float) -> dict:
    """Compile for half of the time, on a GPU then measure until it is over; return the results."""
    deadline, now = time.monotonic() + 60 * minutes, present(op)
    rows = [
        {"kernel": name, "candidate": candidate, "dropped": None, "ms": None}
        for name, kernel in SWEEPS[op].items()
        for candidate in dict.fromkeys([now[name], *kernel.candidates])
    ]
    results = machine(device) | {"op": op, "tokens": tokens, "kind": launch.gpu().kind}
    results |= {"best": now, "stopped": None, "rows": rows}
    if chip in CHIPS:
        jobs = [(op, row["kernel"], row["candidate"], chip, tokens) for row in rows]
        for row, found in zip(rows, compile_all(jobs, 60 * minutes / (1 + (device == "cuda")))):
            row.update(found | {"kernel": row["kernel"]})
    write_json(results, out / f"sweep_{op}.json")
    if device == "cuda":
        launch.use("triton")
        chosen = [r for r in rows if not r["dropped"] or r["candidate"] == now[r["kernel"]]]
        for row in tqdm(chosen, "measure", unit="kernel"):
            if time.monotonic() >= deadline:
                results["stopped"] = f"after {minutes:g} minutes"
                break
            row.update(measure_candidate(op, row, tokens, device))
            results["best"] = {**now, **{kernel: best(rows, kernel) for kernel in SWEEPS[op]}}
            write_json(results, out / f"sweep_{op}.json")
    write_json(results, out / f"sweep_{op}.json")
    return results


def best(rows: Sequence[dict], kernel: str) -> tuple[int, ...]:
    """The fastest candidate, or the present one, which comes first, if that gains too little."""
    first, *others = (row for row in rows if row["kernel"] == kernel)
    limit = GAIN * first["ms"] if first["ms"] else math.inf
    faster = [row for row in others if row["ms"] and row["ms"] < limit]
    return min(faster, key=lambda row: row["ms"], default=first)["candidate"]


def table(results: dict) -> str:
    """What the compiler made of each candidate, its time, and the ratio to the present one, which
    comes first (above 1: faster)."""
    lines = [heading(results), f"{results['op']}, {results['tokens']:,} tokens"]
    columns = ("registers", "spills", "in_loops", "shared", "overlap", "ms", "speedup")
    for name, kernel in SWEEPS[results["op"]].items():
        rows = [row for row in results["rows"] if row["kernel"] == name]
        lines += ["", f"{name} ({kernel.fields}), {kernel.mode}", f"{'candidate':20}"]
        lines[-1] += "".join(f"{column:>10}" for column in columns)
        for row in rows:
            ratio = rows[0]["ms"] / row["ms"] if rows[0]["ms"] and row["ms"] else None
            found = [(row | {"speedup": ratio}).get(column) for column in columns]
            found = [x if isinstance(x, int) else "" if x is None else f"{x:.4g}" for x in found]
            line = f"{row['candidate']!s:20}" + "".join(f"{x:>10}" for x in found)
            lines.append(f"{line}  {row['dropped'] or ''}".rstrip())
    if results["stopped"]:
        lines += ["", f"stopped {results['stopped']}"]
    return "\n".join([*lines, "", f'LAUNCH["{results["kind"]}"] = {results["best"]}'])


def command(
    op: str, tokens: list[int] | None, minutes: float, out: Path, toy: bool, chip: int
) -> int:
    """`python -m bench.kernels --sweep OP`. Exit code 1: no candidate is left to choose from."""
    if op not in SWEEPS:
        raise ConfigError(f"no op {op!r} to sweep{nearest(op, SWEEPS)}")
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing would compile")
    if not (toy or torch.cuda.is_available()):
        raise ConfigError("there is no CUDA GPU here: --toy compiles the candidates")
    if toy and chip not in CHIPS:
        raise ConfigError(f"--chip is {', '.join(map(str, CHIPS))}, not {chip}")
    count = (tokens or OPS[op].tokens or [TOKENS])[0]
    device = "cpu" if toy else "cuda"
    if not toy:
        major, minor = torch.cuda.get_device_capability()
        chip = 10 * major + minor
    with fake_gpu(chip) if toy else nullcontext():
        try:
            kind = launch.gpu().kind
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
        if missing := SWEEPS[op].keys() - present(op).keys():
            raise ConfigError(f"{kind} has no kernel {', '.join(sorted(missing))!r}")
        results = sweep(op, count, chip, device, out, minutes)
    print(table(results))
    return int(all(row["dropped"] for row in results["rows"]))
