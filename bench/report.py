"""Results of bench.kernels as files, as a table on the screen, and as plots."""

import csv
import io
import json
from pathlib import Path

from bench.peers import OURS
from checkpoint import write_text

# Liger's benchmark data: both can be read by the same scripts.
COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)
COLOURS = {
    OURS: "tab:red",
    "eager": "tab:gray",
    "compile": "tab:blue",
    "liger": "tab:green",
    "sdpa_flash": "tab:purple",
    "sdpa_cudnn": "tab:olive",
    "flex": "tab:cyan",
}
CEILING = {"GB/s": "copy", "TFLOP/s": "large product"}


class BenchError(Exception):
    """Nothing can be measured or drawn; the message is one line."""


def write(results: dict, out: Path) -> None:
    """kernels.json and kernels.csv, each whole at any moment."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"kernels.json": json.dumps(results, indent=1) + "\n", "kernels.csv": as_csv(results)}
    for name, text in texts.items():
        write_text(out / name, text)


def as_csv(results: dict) -> str:
    """A line for each time and one for each peak of memory; nan where there is none."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    sizes = {name: size for name, size in results["suite"].items() if name != "tokens"}
    last = (
        json.dumps({"dtype": "bfloat16"} | sizes),
        results["gpu"],
        results["date"],
        results["liger-kernel"],
    )
    for row in results["rows"]:
        speed = ("speed", "ms", row["ms"], row["ms_20"], row["ms_80"])
        memory = ("memory", "MB", *[row["peak_mb"]] * 3)
        for metric, unit, *values in (speed, memory):
            values = ["nan" if value is None else value for value in values]
            first = (row["op"], row["provider"], row["mode"], metric, unit)
            lines.writerow((*first, "T", "tokens", row["tokens"], *values, *last))
    return text.getvalue()


def read(path: Path) -> dict:
    """The results in a kernels.json."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not results["rows"]:
            raise BenchError(f"{path}: no rows")
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise BenchError(f"{path}: not a kernels.json") from None
    return results


def checks(op: str, found: dict[str, dict]) -> str:
    """One line with the error of each provider."""
    errors = (
        f"{name} {check['failure'] or format(check['relative_error'], '.1e')}"
        for name, check in found.items()
    )
    return f"{op}, relative error against fp32: {', '.join(errors)}"


def blocks(results: dict) -> dict[tuple[str, str], list[dict]]:
    """The rows of each operation and mode, in the order measured."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        found.setdefault((row["op"], row["mode"]), []).append(row)
    return found


def table(results: dict) -> str:
    """Milliseconds of everybody; of ours also speed, share of the ceiling, and the ratio to the
    fastest peer (above 1: ours is faster) in time and in memory.
    """
    lines = [
        f"{results['gpu']}, torch {results['torch']}, triton {results['triton']}, "
        f"Liger {results['liger-kernel'] or 'absent'}, {results['date']}",
        ", ".join(
            f"{CEILING[unit]} {speed:,.0f} {unit}" for unit, speed in results["ceilings"].items()
        ),
    ]
    told = set()
    for (op, mode), rows in blocks(results).items():
        providers = list(dict.fromkeys(row["provider"] for row in rows))
        unit = next((row["unit"] for row in rows if row["unit"]), "")
        lines += ["", f"{op} {mode}, ms"]
        lines.append(
            f"{'tokens':>8}"
            + "".join(f"{name:>12}" for name in providers)
            + f"{unit:>10}{'ceiling':>9}  against the fastest peer"
        )
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            lines.append(_line(tokens, providers, [r for r in rows if r["tokens"] == tokens]))
        for row in rows:  # a reason that holds for the whole operation is given once
            reason = (op, row["provider"], row["failure"])
            if row["failure"] and reason not in told:
                told.add(reason)
                lines.append(f"{'':10}{row['provider']}: {row['failure']}")
    if results["stopped"]:
        lines += ["", f"stopped {results['stopped']}: {results['not_begun']} rows not begun"]
    return "\n".join(lines)


def _line(tokens: int, providers: list[str], rows: list[dict]) -> str:
    by_name = {row["provider"]: row for row in rows}
    line = f"{tokens:>8,}"
    for name in providers:
        row = by_name.get(name)
        ms = "" if row is None else "failed" if row["failure"] else f"{row['ms']:.4g}"
        line += f"{ms:>12}"
    ours = by_name.get(OURS)
    if ours is None or ours["failure"]:
        return line
    line += f"{ours['speed']:>10,.0f}{ours['of_ceiling']:>9.0%}"
    peers = [row for row in rows if row["provider"] != OURS and not row["failure"]]
    if peers:
        best = min(peers, key=lambda row: row["ms"])
        line += f"  {best['ms'] / ours['ms']:.2f}x {best['provider']}"
        if ours["peak_mb"] is not None:
            line += f", {ours['peak_mb']:,.0f} MB to {best['peak_mb']:,.0f}"
    return line


def plot(results: dict, out: Path) -> list[Path]:
    """A PNG for each operation: speed against tokens, a panel for each mode.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    timed: dict[str, dict[str, list[dict]]] = {}
    for (op, mode), rows in blocks(results).items():
        if measured := [row for row in rows if not row["failure"]]:
            timed.setdefault(op, {})[mode] = measured
    return [_picture(op, modes, results, out / f"{op}.png") for op, modes in timed.items()]


def _picture(op: str, modes: dict[str, list[dict]], results: dict, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1,
        len(modes),
        figsize=(1.6 + 3.6 * len(modes), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    unit = next(iter(modes.values()))[0]["unit"]
    ceiling = results["ceilings"][unit]
    for axes, (mode, rows) in zip(panels[0], modes.items()):
        for name in dict.fromkeys(row["provider"] for row in rows):
            points = [row for row in rows if row["provider"] == name]
            tokens, speed = zip(*((row["tokens"], row["speed"]) for row in points))
            style = dict(lw=2.4, zorder=3) if name == OURS else dict(lw=1.4)
            axes.plot(tokens, speed, "o-", ms=4, color=COLOURS[name], label=name, **style)
        axes.axhline(ceiling, color="black", lw=1, ls="--", label=CEILING[unit])
        axes.set_title(mode, fontsize="medium")
        axes.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for row in rows})
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize="small")
        axes.set_xticks([], minor=True)
        axes.set_xlabel("tokens")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(unit)
    handles = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="small")
    figure.suptitle(f"{op}, {results['gpu']}, bf16", x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
