"""Where the time of a training step goes: every operation beside its floor, and the gaps.

    python -m bench.step_profile out/bench/step.json     the tables of saved profiles again

A recorded step is a list of events, as torch's profiler writes them for chrome://tracing. What
takes time is a kernel or copy of the device; where there is none, on a CPU, what an operation takes
without those it calls. It belongs to the operation that launched it, found by its correlation with
the launch and by what that lies within; bench/step_groups.py says to which line of the table. What
stays unknown is listed by name under "other". The floors are at the speed of a large product and a
large copy, measured in the same run.
"""

import gzip
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.report import BenchError
from bench.step_groups import (
    MICRO_BATCH,
    OPTIMIZER,
    STEP,
    Piece,
    Shapes,
    Span,
    floors,
    group_of,
    product_size,
)
from config.cli import Parser, run_cli
from model import LucieConfig

# What makes the host wait for the device, or ask the driver for memory.
WAITS = (
    "cudaStreamSynchronize cudaDeviceSynchronize cudaEventSynchronize cudaMemcpy cudaMalloc "
    "cudaFree cuCtxSynchronize cuStreamSynchronize aten::item aten::_local_scalar_dense "
    "aten::nonzero"
).split()
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


# --- recording and reading ------------------------------------------------------------------------


def record(step: Callable[[], None], device: torch.device, path: Path) -> float:
    """Make one profiled step and write its events to `path`; seconds by the host's clock."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities):  # what the first use of the profiler takes is no step's
        torch.zeros(1, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    with profile(activities=activities, record_shapes=True) as profiler:
        with record_function(STEP):
            begin = time.perf_counter()
            step()
            wait()
            seconds = time.perf_counter() - begin
    profiler.export_chrome_trace(str(path))
    return seconds


def read(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as f:
        return json.load(f)["traceEvents"]


def nest(events: list[dict]) -> list[Span]:
    """What the host did, in the order of its beginning, each within its parent."""
    threads: dict[object, list[Span]] = defaultdict(list)
    for e in events:
        if e.get("ph") == "X" and e.get("cat") in HOST:
            span = Span(e["name"], e["cat"], e["ts"], e["ts"] + e["dur"], e.get("args", {}))
            threads[e["tid"]].append(span)
    found = []
    for spans in threads.values():
        spans.sort(key=lambda span: (span.start, -span.end))
        open_ones: list[Span] = []
        for span in spans:
            while open_ones and open_ones[-1].end <= span.start:
                open_ones.pop()
            if open_ones:
                span.parent = open_ones[-1]
                span.parent.children.append(span)
            open_ones.append(span)
        found += spans
    return sorted(found, key=lambda span: span.start)


def pieces_of(events: list[dict], spans: list[Span]) -> list[Piece]:
    """The device's kernels and copies, each with its launch; without a device, operations."""
    on_device = [e for e in events if e.get("ph") == "X" and e.get("cat") in DEVICE]
    if not on_device:
        mine = [s for s in spans if any(outer.name == STEP for outer in s.outwards())]
        return [piece for span in mine for piece in _own_time(span)]
    launches = {
        span.arguments["correlation"]: span
        for span in spans
        if span.category.startswith("cuda_") and "correlation" in span.arguments
    }
    by_id = {
        span.arguments["External id"]: span
        for span in spans
        if span.category == "cpu_op" and "External id" in span.arguments
    }
    pieces = []
    for e in on_device:
        arguments = e.get("args", {})
        launch = launches.get(arguments.get("correlation"))
        of = launch.parent if launch else None
        of = of or by_id.get(arguments.get("External id"))
        pieces.append(Piece(e["name"], e["ts"], e["ts"] + e["dur"], of))
    return pieces


def _own_time(span: Span) -> Iterable[Piece]:
    """The parts of an operation that are in none of those it calls."""
    if span.category != "cpu_op":
        return
    at = span.start
    for child in span.children:
        if child.start > at:
            yield Piece(span.name, at, child.start, span)
        at = max(at, child.end)
    if span.end > at:
        yield Piece(span.name, at, span.end, span)


# --- time -----------------------------------------------------------------------------------------


def shares(pieces: list[Piece]) -> tuple[list[float], float]:
    """Of each piece its microseconds, where n run at once a part in n; and the time with several.

    They add up to the time in which anything runs.
    """
    edges = sorted(
        [(p.start, 0, i) for i, p in enumerate(pieces)]
        + [(p.end, 1, i) for i, p in enumerate(pieces)]
    )
    found, running, together, at = [0.0] * len(pieces), set(), 0.0, 0.0
    for moment, ends, i in edges:
        if running and moment > at:
            for j in running:
                found[j] += (moment - at) / len(running)
            together += (moment - at) * (len(running) > 1)
        at = moment
        running.discard(i) if ends else running.add(i)
    return found, together


def waits(spans: list[Span]) -> dict[str, int]:
    """How often the host waited between the first forward and the optimizer, by name."""
    begin = min((s.start for s in spans if s.name == MICRO_BATCH), default=math.inf)
    end = min((s.start for s in spans if s.name == OPTIMIZER), default=math.inf)
    return dict(Counter(s.name for s in spans if s.name in WAITS and begin <= s.start < end))


def analyse(
    events: list[dict],
    shapes: Shapes,
    ceilings: dict[str, float],
    parameters: int,
    wall: float,
) -> dict:
    """The table of a recorded step: `rows`, the slowest group first, the gaps among them.

    wall: seconds of the step by the host's clock, to which the rows must add up (`agrees`).
    """
    spans = nest(events)
    whole = next(s for s in spans if s.name == STEP and s.category == "user_annotation")
    pieces = pieces_of(events, spans)
    took, together = shares(pieces)
    cut = [replace(p, start=max(p.start, whole.start), end=min(p.end, whole.end)) for p in pieces]
    idle = whole.end - whole.start - sum(shares([p for p in cut if p.start < p.end])[0])
    least, groups, unknown = floors(shapes, ceilings, parameters), defaultdict(list), Counter()
    flops: Counter = Counter()
    counted: set[Span] = set()
    for piece, microseconds in zip(pieces, took):
        group = group_of(piece, shapes)
        groups[group].append(microseconds)
        if group == "other":
            unknown[piece.name if piece.of is None else piece.of.name] += microseconds
        for span in piece.of.outwards() if piece.of else ():
            if (size := product_size(span)) and span not in counted:
                counted.add(span)
                # a mode of torch's may call an operation from within itself
                if not any(product_size(child) for child in span.below()):
                    flops[group] += 2 * math.prod(size)
    rows = [
        {"group": group, "ms": sum(parts) / 1e3, "pieces": len(parts)}
        for group, parts in groups.items()
    ]
    rows.append({"group": "gaps", "ms": idle / 1e3, "pieces": 0})
    total = sum(row["ms"] for row in rows)
    for row in rows:
        row["floor_ms"] = least.get(row["group"], 0.0)
        row["lost_ms"] = row["ms"] - row["floor_ms"]
        row["of_step"] = row["ms"] / total
        row["flops"] = flops.get(row["group"])
    rows.sort(key=lambda row: -row["ms"])
    worst = max(rows, key=lambda row: row["lost_ms"])
    return {
        "rows": rows,
        "wall_ms": 1e3 * wall,
        "sum_ms": total,
        "agrees": abs(total - 1e3 * wall) <= 0.01 * 1e3 * wall,
        "together_ms": together / 1e3,
        "floor_ms": sum(row["floor_ms"] for row in rows),
        "lossiest": {k: worst[k] for k in ("group", "lost_ms")}
        | {"of_step": worst["lost_ms"] / total},
        "waits": waits(spans),
        "other": {name: us / 1e3 for name, us in unknown.most_common(10)},
        "flops_expected": sum(
            6 * shapes.tokens * shapes.micro_batches * a * b
            * (1 if name == "head" else shapes.config.num_hidden_layers)
            for name, (a, b) in shapes.matrices.items()
        ),
        "flops_found": sum(f for group, f in flops.items() if "recomputed" not in group),
    }  # fmt: skip


def table(found: dict, title: str) -> str:
    """The rows as text, and what they tell."""
    lines = [
        title,
        f"{'':28}{'ms':>10}{'of step':>9}{'floor ms':>10}{'lost ms':>10}{'pieces':>8}",
    ]
    for row in found["rows"]:
        lines.append(
            f"{row['group']:28}{row['ms']:10.2f}{row['of_step']:9.1%}{row['floor_ms']:10.2f}"
            f"{row['lost_ms']:10.2f}{row['pieces'] or '':>8}"
        )
    apart = "within 1 %" if found["agrees"] else "MORE THAN 1 % APART"
    lines += [
        f"{'sum':28}{found['sum_ms']:10.2f}{'':9}{found['floor_ms']:10.2f}",
        f"the step took {found['wall_ms']:.2f} ms by the host's clock: {apart}; "
        f"{found['together_ms']:.2f} ms with several kernels at once",
    ]
    if found["flops_found"] != found["flops_expected"]:
        lines.append(
            f"products found {found['flops_found']:,} FLOPs, expected {found['flops_expected']:,}: "
            "some were not told apart"
        )
    told = ", ".join(f"{name} {count} x" for name, count in found["waits"].items())
    lines.append(f"host waits between the first forward and the optimizer: {told or 'none'}")
    if found["other"]:
        parts = (f"{name} {ms:.2f}" for name, ms in found["other"].items())
        lines.append(f"other, ms: {', '.join(parts)}")
    worst = found["lossiest"]
    lines.append(
        f"most is lost in: {worst['group']}, {worst['lost_ms']:.2f} ms over its floor, "
        f"{worst['of_step']:.1%} of the step"
    )
    return "\n".join(lines)


def again(results: dict, folder: Path) -> str:
    """The tables of the profiles in a step.json, from the events recorded beside it."""
    tables = []
    for profiled in results["profiles"]:
        if profiled["failure"]:
            continue
        config = LucieConfig(**profiled["shapes"]["config"])
        shapes = Shapes(**profiled["shapes"] | {"config": config})
        found = analyse(
            read(folder / profiled["events"]),
            shapes,
            results["ceilings"],
            profiled["parameters"],
            profiled["wall_ms"] / 1e3,
        )
        tables.append(table(found, profiled["title"]))
    return "\n\n".join(tables)


def main(argv: list[str]) -> None:
    parser = Parser(prog="bench.step_profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="DIR/step.json, with the recorded events beside")
    file = parser.parse_args(argv).results
    try:
        print(again(json.loads(file.read_text(encoding="utf-8")), file.parent))
    except (ValueError, KeyError) as error:
        raise BenchError(f"{file}: not a step.json ({error!r})") from None


if __name__ == "__main__":
    run_cli(main, BenchError)
