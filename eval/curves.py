"""The learning curves of the three phases, one after the other: loss against tokens, and the
learning rate in a strip below.

    python -m eval.curves out/pretrain out/extension out/annealing --png curves.png

Reads each run's log.csv; Lucie's own published logs have the same columns. Prints the curve as
text, and draws it where matplotlib is installed.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

COLOURS = ("tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")


class CurveError(Exception):
    """A log that cannot be drawn; the message is one line."""


class Curve(NamedTuple):
    """One phase. A list has an entry per row of the log; validation holds (tokens, loss)."""

    name: str
    tokens: list[float]
    loss: list[float]
    learning_rate: list[float]
    validation: list[tuple[float, float]]
    vocab_size: int | None  # of the run; None for a bare log


def read(path: Path) -> Curve:
    """The curve of a run directory or of a log in CSV."""
    file = path / "log.csv" if path.is_dir() else path
    try:
        with open(file, encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        tokens = [float(row["training_tokens"]) for row in rows]
        validation = [row.get("validation_loss") for row in rows]
        options = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
        return Curve(
            path.name if path.is_dir() else path.stem,
            tokens,
            [float(row["training_loss"]) for row in rows],
            [float(row["learning_rate"]) for row in rows],
            [(t, float(v)) for t, v in zip(tokens, validation) if v],
            options.get("vocab_size"),
        )
    except OSError as error:
        raise CurveError(f"{file}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise CurveError(f"{file}: not a log with Lucie's columns") from None


def chain(curves: list[Curve]) -> list[Curve]:
    """The curves with each one's tokens counted on from the end of the one before."""
    done, out = 0.0, []
    for curve in curves:
        out.append(
            curve._replace(
                tokens=[done + t for t in curve.tokens],
                validation=[(done + t, v) for t, v in curve.validation],
            )
        )
        done = out[-1].tokens[-1] if curve.tokens else done
    return out


def as_text(curves: list[Curve], width: int = 72, height: int = 16) -> str:
    """The training loss as a plot of characters, one mark a phase: 1, 2, 3."""
    points = [(t, v, str(n)) for n, c in enumerate(curves, 1) for t, v in zip(c.tokens, c.loss)]
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    end = max(p[0] for p in points)
    grid = [[" "] * width for _ in range(height)]
    for tokens, loss, mark in points:
        column = min(width - 1, int(tokens / end * width))
        row = round((high - loss) / ((high - low) or 1) * (height - 1))
        grid[row][column] = mark
    lines = []
    for number, row in enumerate(grid):
        label = high - number * (high - low) / (height - 1)
        lines.append(f"{label:6.2f} |{''.join(row)}".rstrip())
    lines.append(f"{'loss':>6} +{'-' * width}")
    lines.append(f"{'':8}0{magnitude(end) + ' tokens':>{width - 1}}")
    for number, curve in enumerate(curves, 1):
        text = f"{'':8}{number} {curve.name}: loss {curve.loss[-1]:.3f}"
        if curve.validation:
            final = curve.validation[-1][1]
            text += f", validation {final:.3f}"
            if curve.vocab_size:  # what guessing among all tokens would cost
                text += f", {final / math.log(curve.vocab_size):.1%} of ln({curve.vocab_size:,})"
        lines.append(text)
    return "\n".join(lines)


def as_png(curves: list[Curve], path: Path) -> None:
    """Draw the curves to a PNG (or SVG, by suffix)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, rate) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 5.5), height_ratios=(4, 1), layout="constrained"
    )
    scale, unit = scale_of(max(c.tokens[-1] for c in curves))
    for curve, colour in zip(curves, COLOURS):
        x = [t / scale for t in curve.tokens]
        loss.plot(x, curve.loss, color=colour, lw=1, alpha=0.6, label=curve.name)
        if curve.validation:
            xs, ys = zip(*((t / scale, v) for t, v in curve.validation))
            loss.plot(xs, ys, "o-", color=colour, ms=3, lw=1.5, label=f"{curve.name}, validation")
        rate.plot(x, curve.learning_rate, color=colour)
    loss.set_ylabel("loss (nats per token)")
    loss.legend(fontsize="small")
    rate.set_ylabel("learning rate")
    rate.set_xlabel(f"training tokens{f' ({unit}s)' if unit else ''}")
    rate.ticklabel_format(axis="y", scilimits=(0, 0))
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _picture(text: str) -> Path:
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text}: .png or .svg")
    return Path(text)


def scale_of(tokens: float) -> tuple[float, str]:
    names = {0: "", 3: "thousand", 6: "million", 9: "billion", 12: "trillion"}
    power = min(12, int(math.log10(max(tokens, 1))) // 3 * 3)
    return 10.0**power, names[power]


def magnitude(tokens: float) -> str:
    scale, name = scale_of(tokens)
    return f"{tokens / scale:.2f} {name}".strip()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories or logs, in order")
    parser.add_argument("--png", type=_picture, help="draw them too (.png or .svg)")
    args = parser.parse_args(argv)
    curves = chain([read(run) for run in args.runs])
    if not all(curve.tokens for curve in curves):
        raise CurveError("a log without rows has no curve")
    print(as_text(curves))
    if args.png:
        try:
            as_png(curves, args.png)
        except ImportError:
            raise CurveError("drawing needs: pip install matplotlib") from None
        print(f"{'':8}{args.png}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CurveError as error:
        print(f"eval.curves: {error}", file=sys.stderr)
        sys.exit(2)
