"""Speed and memory of each kernel beside its baselines, in one run on one GPU.

    python -m bench.kernels [op ...] [--tokens 4096 16384] [--out DIR] [--minutes 7]
    python -m bench.kernels --sweep attention      which launch table is the fastest
    python -m bench.kernels --toy                  a rehearsal at toy size on a CPU

The baselines are eager torch, torch.compile, Liger where it is installed, and for attention SDPA,
the same by cuDNN, and FlexAttention; all in bf16 at Lucie's shapes. Attention's backward in one
pass, which is ours too, is shown beside them and not ranked. At the smallest number of tokens each
implementation is first compared with the definition in fp32, outputs and gradients; one that is
wrong is not timed. Memory is the peak above what was allocated before the call.

Times are those of a CUDA graph's replay with a cold L2 cache; those by events, the host's and what
they mean: bench/measure.py. With --sweep, see bench/sweep.py.

Writes DIR/kernels.json, and with matplotlib DIR/kernels.png. Exit code 1 where one of ours failed
or was wrong.
"""

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.baselines import ONE_PASS, OPS, OURS, Draw, Op
from bench.measure import (
    TIMES,
    compare,
    copy_speed,
    describe,
    heading,
    machine,
    measure,
    product_speed,
    write_json,
)
from config.cli import ConfigError, Parser, run_cli
from kernels.launch import use
from model import LucieConfig

TOKENS, TOY_TOKENS = [4096, 8192, 16384, 32000], [32, 48]
TOY_SIZES = LucieConfig(
    vocab_size=97, hidden_size=256, intermediate_size=256, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
TOY_BASELINES = (OURS, "eager")  # a CPU has these, and they need no compiler
CEILINGS = {"GB/s": "copy", "TFLOP/s": "large product"}


def run(
    ops: dict[str, Op],
    sizes: LucieConfig,
    tokens: list[int],
    device: str,
    out: Path,
    minutes: float,
) -> dict:
    """Measure until `minutes` are over, and return the results.

    out/kernels.json holds what is known after every row.
    """
    deadline = time.monotonic() + 60 * minutes
    counts = dict.fromkeys([*tokens, *(t for op in ops.values() for t in op.tokens)])
    plan = [
        (name, count, mode, baseline)
        for count in counts
        for name, op in ops.items()
        if count in (op.tokens or tokens)
        for mode in op.floor(sizes, count)
        for baseline in op.implementations  # in turns: a GPU that grows warm favours none
    ]
    limits = {"GB/s": copy_speed(device), "TFLOP/s": product_speed(device)}
    results = machine(device) | {"sizes": vars(sizes), "ceilings": limits}
    results |= {"stopped": None, "rows": []}
    checks: dict[str, dict[str, dict]] = {}
    stream = torch.cuda.Stream() if device == "cuda" else None  # the default one is not captured
    for name, count, mode, baseline in (bar := tqdm(plan, desc="kernels", unit="row")):
        bar.set_description(f"{name} {mode} {count:,} {baseline}", refresh=False)
        if time.monotonic() >= deadline:
            results["stopped"] = f"after {minutes:g} minutes"
            break
        op = ops[name]
        row = {"op": name, "tokens": count, "mode": mode, "baseline": baseline}
        row |= dict.fromkeys((*TIMES, "speed", "of_ceiling", "peak_mb"))
        try:
            if name not in checks:
                checks[name] = compare(op, sizes, min(op.tokens or tokens), device)
            row |= checks[name][baseline] | {"unit": op.unit}
            if row["failure"] is None:
                with torch.cuda.stream(stream):
                    inputs = op.inputs(Draw(device), sizes, count)
                    row |= measure(op.implementations[baseline], inputs, mode, device)
                work = op.floor(sizes, count)[mode] / (1e9 if op.unit == "TFLOP/s" else 1e6)
                row["speed"] = work / row["ms"]
                row["of_ceiling"] = row["speed"] / limits[op.unit]
        except Exception as error:
            row["failure"] = describe(error)
        results["rows"].append(row)
        write_json(results, out / "kernels.json")
    write_json(results, out / "kernels.json")
    return results


# --- results --------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """Milliseconds of every implementation; of ours also its speed, the share of the ceiling, the
    time of the host, and the ratio to the fastest baseline (above 1: ours is faster)."""
    limits = (f"{CEILINGS[u]} {speed:,.2f} {u}" for u, speed in results["ceilings"].items())
    lines = [heading(results), ", ".join(limits)]
    if any(row["timed_by"] for row in results["rows"]):
        lines.append("times by replays of a CUDA graph; * by events, of what could not be captured")
    for op, mode in dict.fromkeys((row["op"], row["mode"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["op"], row["mode"]) == (op, mode)]
        names = list(dict.fromkeys(row["baseline"] for row in rows))
        head = f"{'tokens':>8}" + "".join(f"{name:>12}" for name in names)
        lines += [
            "",
            f"{op} {mode}, ms",
            f"{head}{'speed':>17}{'ceiling':>9}{'host us':>9}  against the fastest",
        ]
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            times = {row["baseline"]: row for row in rows if row["tokens"] == tokens}
            line = f"{tokens:>8,}"
            for name in names:
                row = times.get(name, {"ms": None})
                mark = "*" if row.get("timed_by") == "events" else ""
                shown = "failed" if row["ms"] is None else f"{row['ms']:.4g}{mark}"
                line += f"{shown:>12}"
            ran = {name: row for name, row in times.items() if not row["failure"]}
            ran.pop(ONE_PASS, None)
            if ours := ran.pop(OURS, None):
                line += f"{ours['speed']:9,.1f} {ours['unit']:7}{ours['of_ceiling']:9.0%}"
                host_us = ours["host_us"]
                line += f"{'' if host_us is None else f'{host_us:.0f}':>9}"
                if ran:
                    best = min(ran.values(), key=lambda row: row["ms"])
                    line += f"  {best['ms'] / ours['ms']:.2f}x {best['baseline']}"
                    if ours["peak_mb"] is not None:
                        line += f", {ours['peak_mb']:,.0f} MB to {best['peak_mb']:,.0f}"
            lines.append(line)
        failures = {(row["baseline"], row["failure"]): None for row in rows if row["failure"]}
        lines += [f"{'':10}{name}: {failure}" for name, failure in failures]
    if results["stopped"]:
        lines += ["", f"stopped {results['stopped']}"]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Draw speed against tokens: a panel for each operation and mode."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["op"], row["mode"]) for row in results["rows"] if row["ms"]))
    figure = Figure(figsize=(10, 3 * -(-len(panels) // 3)), layout="constrained")
    for number, (op, mode) in enumerate(panels, start=1):
        axes = figure.add_subplot(-(-len(panels) // 3), 3, number)
        rows = [r for r in results["rows"] if (r["op"], r["mode"]) == (op, mode) and r["ms"]]
        for name in dict.fromkeys(row["baseline"] for row in rows):
            points = [(row["tokens"], row["speed"]) for row in rows if row["baseline"] == name]
            axes.plot(*zip(*points), "o-", label=name, lw=2.4 if name == OURS else 1.2)
        unit = rows[0]["unit"]
        ceiling = {"color": "black", "lw": 1, "ls": "--", "label": CEILINGS[unit]}
        axes.axhline(results["ceilings"][unit], **ceiling)
        axes.set(title=f"{op} {mode}", xlabel="tokens", ylabel=unit, ylim=(0, None))
        axes.legend(fontsize="small", frameon=False)
    figure.suptitle(heading(results), fontsize="small")
    figure.savefig(path, dpi=100)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens to measure at")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the results")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing more after these; default: 7, of a sweep 3"
    )
    parser.add_argument("--toy", action="store_true", help="toy size on a CPU")
    parser.add_argument("--sweep", metavar="OP", help="time a dozen launch tables of an operation")
    parser.add_argument(
        "--chip", type=int, default=90, help="a --sweep with --toy compiles for; 90: an H100"
    )
    args = parser.parse_args(argv)
    minutes = args.minutes if args.minutes is not None else 3.0 if args.sweep else 7.0
    if args.sweep:
        from bench.sweep import command  # which needs Triton

        return command(args.sweep, args.tokens, minutes, args.out, args.toy, args.chip)
    if unknown := [name for name in args.ops if name not in OPS]:
        raise ConfigError(f"no op {unknown[0]!r}; there are {', '.join(OPS)}")
    if not (args.toy or torch.cuda.is_available()):
        raise ConfigError(
            "there is no CUDA GPU here: --toy rehearses on a CPU, and `python -m bench.static` "
            "shows what the compiler makes of the kernels"
        )
    ops = {name: op for name, op in OPS.items() if not args.ops or name in args.ops}
    if args.toy:
        sizes, tokens, device = TOY_SIZES, TOY_TOKENS, "cpu"
        for name, op in ops.items():
            kept = {n: i for n, i in op.implementations.items() if n in TOY_BASELINES}
            ops[name] = replace(op, implementations=kept)
    else:
        sizes, tokens, device = LucieConfig(), TOKENS, "cuda"
        try:
            use("triton")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    results = run(ops, sizes, args.tokens or tokens, device, args.out, minutes)
    print(table(results))
    if any(row["ms"] for row in results["rows"]) and importlib.util.find_spec("matplotlib"):
        plot(results, args.out / "kernels.png")
    ours = [row for row in results["rows"] if row["baseline"] in (OURS, ONE_PASS)]
    return int(any(row["failure"] for row in ours))


if __name__ == "__main__":
    run_cli(main)
