"""Learning curves: the loss of the phases side by side, each on a scale of its own, and the
learning rate in a strip below.

    python -m eval.curves out/pretrain out/extension out/annealing --png curves.png
    python -m eval.curves out/pretrain --x gpu-hours --behind training_logs_1_pretraining.csv

Reads each run's log.csv; the logs that Lucie published have the same columns. Prints the curves as
text, and draws them where matplotlib is installed.
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from config.cli import Parser, run_cli
from schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = {  # what a curve may run along: the words under it
    "tokens": "tokens",
    "time": "hours",
    "gpu-hours": "GPU hours",
    "share": "of the phase's tokens",
}
COLOURS = ("#2563eb", "#0d9668", "#d9480f", "#7c3aed", "#a16207")  # of phases, in order
BEHIND, INK = "#9aa1ab", "#24292f"
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": "#80868f", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.35, "grid.linewidth": 0.6, "axes.titlesize": "medium",
    "axes.titleweight": "bold", "legend.frameon": False, "legend.fontsize": "small",
    "svg.hashsalt": "curves",  # the same picture is the same file
}  # fmt: skip


class CurveError(Exception):
    """A log that cannot be drawn; the message is one line."""


class Curve(NamedTuple):
    """One phase. Every list has an entry per row of the log; without a validation it is NaN."""

    name: str
    x: dict[str, list[float]]  # by the keys of X
    loss: list[float]
    learning_rate: list[float]
    validation: list[float]
    vocab_size: int | None  # of the run; None for a bare log

    @property
    def tokens(self) -> list[float]:
        return self.x["tokens"]


# --- reading -------------------------------------------------------------------------------------


def read(path: Path) -> Curve:
    """The curve of a run directory or of a log in CSV. Raises CurveError."""
    file = path / "log.csv" if path.is_dir() else path
    rows = _rows(file)
    if rows and None in rows[-1].values():
        rows.pop()  # cut short by a crash
    try:
        options = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
        x = {"tokens": [float(row["training_tokens"]) for row in rows]}
        x["time"] = [float(row["walltime"]) for row in rows]
        x["gpu-hours"] = [float(row["gputime"]) for row in rows]
        curve = Curve(
            # Lucie's own are called training_logs_1_pretraining.csv
            path.name if path.is_dir() else re.sub(r"^training_logs_\d_", "Lucie ", path.stem),
            x,
            [float(row["training_loss"]) for row in rows],
            [float(row["learning_rate"]) for row in rows],
            [float(row.get("validation_loss") or "nan") for row in rows],
            options.get("vocab_size"),
        )
        planned = _planned_tokens(options) if options else curve.tokens[-1:]
        x["share"] = [tokens / planned[0] for tokens in curve.tokens]
    except OSError as error:
        raise CurveError(f"{error.filename}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CurveError(f"{file}: not a log with Lucie's columns") from None
    if not rows:
        raise CurveError(f"{file}: a log without rows has no curve")
    return curve


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with open(file, encoding="utf-8", newline="") as f:
            return list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error):
        raise CurveError(f"{file}: not a log with Lucie's columns") from None
    except OSError as error:
        raise CurveError(f"{file}: {error.strerror}") from None


def _planned_tokens(options: dict) -> list[float]:
    """The tokens of a whole phase, by its config."""
    schedule = Schedule(SimpleNamespace(**options))
    return [schedule.samples_after(schedule.num_steps()) * options["seq_len"]]


def smoothed(values: Sequence[float], rows: int) -> list[float]:
    """Means over `rows` values, an odd number, around each: fewer towards the ends, as many before
    as after."""
    out = []
    for i in range(len(values)):
        reach = min(rows // 2, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        out.append(sum(window) / len(window))
    return out


# --- the loss ------------------------------------------------------------------------------------


def as_text(curves: list[Curve], width: int = 72, height: int = 16) -> str:
    """The training loss as a plot of characters, a part of the width and a mark each phase."""
    losses = [loss for curve in curves for loss in curve.loss]
    low, high = min(losses), max(losses)
    part = width // len(curves) - 1
    parts = []
    for number, curve in enumerate(curves, 1):
        grid = [[" "] * part for _ in range(height)]
        for tokens, loss in zip(curve.tokens, curve.loss):
            column = min(part - 1, int(tokens / curve.tokens[-1] * part))
            row = round((high - loss) / ((high - low) or 1) * (height - 1))
            grid[row][column] = str(number)
        parts.append(["".join(row) for row in grid])
    lines = []
    for number, row in enumerate(zip(*parts)):
        label = high - number * (high - low) / (height - 1)
        lines.append(f"{label:6.2f} |{'|'.join(row)}".rstrip())
    lines.append(f"{'loss':>6} +{'+'.join(['-' * part] * len(curves))}")
    ends = [magnitude(curve.tokens[-1]) + " tokens" for curve in curves]
    lines.append(f"{'':8}{' '.join(f'{end:>{part}}' for end in ends)}")
    for number, curve in enumerate(curves, 1):
        text = f"{'':8}{number} {curve.name}: loss {curve.loss[-1]:.3f}"
        if validated := [loss for loss in curve.validation if loss == loss]:
            text += f", validation {validated[-1]:.3f}"
            if curve.vocab_size:  # what guessing among all tokens would cost
                share = validated[-1] / math.log(curve.vocab_size)
                text += f", {share:.1%} of ln({curve.vocab_size:,})"
        lines.append(text)
    return "\n".join(lines)


def draw(
    curves: Sequence[Curve], behind: Sequence[Curve] = (), x: str = "tokens", smooth: int = 1
) -> "Figure":
    """The convergence figure: a column a phase, the loss on a common scale and, logarithmic, the
    learning rate below. Lucie's was drawn like this.

    behind: curves in grey, the first one in the first column and so on. smooth: rows to a mean,
    an odd number.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = list(zip_longest(curves, behind))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8 if len(columns) == 1 else 4.2 * len(columns), 5.2), dpi=150)
        figure.set_layout_engine("constrained")
        axes = figure.subplots(
            2, len(columns), squeeze=False, sharex="col", sharey="row", height_ratios=(4, 1)
        )
        low, high = _limits([curve for pair in columns for curve in pair if curve])
        for number, (pair, (loss, rate)) in enumerate(zip(columns, axes.T)):
            end = max(max(curve.x[x]) for curve in pair if curve)
            scale, unit = (0.01, "%") if x == "share" else scale_of(end)
            _draw_phase(loss, rate, pair, COLOURS[number % len(COLOURS)], x, scale, smooth)
            first = pair[0] or pair[1]
            loss.set_title(first.name, loc="left", pad=18)
            loss.text(0, 1.02, length(first), transform=loss.transAxes, size=8)
            loss.set_ylim(low, high)
            if first.loss[0] > high:
                at = dict(transform=loss.transAxes, va="top", size=8)
                loss.text(0.13, 0.98, f"from {first.loss[0]:.2f}", **at)
            loss.legend(loc="upper right")
            rate.set_xlabel(" ".join(word for word in (unit, X[x]) if word))
            rate.set_xlim(-0.02 * end / scale, 1.02 * end / scale)
        axes[0, 0].set_ylabel("loss (nats per token)")
        axes[1, 0].set_ylabel("learning rate")
        rates = [v for pair in columns for c in pair if c for v in c.learning_rate if v > 0]
        if rates:
            axes[1, 0].set_yscale("log")
            axes[1, 0].set_ylim(max(min(rates), max(rates) / 300) / 1.6, 1.6 * max(rates))
    return figure


def _draw_phase(
    loss: "Axes",
    rate: "Axes",
    pair: tuple[Curve | None, Curve | None],
    colour: str,
    x: str,
    scale: float,
    smooth: int,
) -> None:
    """One column; of the pair, ours is drawn over what is behind it."""
    mean = f", mean of {smooth} rows" if smooth > 1 else ""
    for curve, ink, order in ((pair[1], BEHIND, 2), (pair[0], colour, 4)):
        if curve is None:
            continue
        xs = [value / scale for value in curve.x[x]]
        line = smoothed(curve.loss, smooth)
        label = f"{curve.name if ink == BEHIND else 'loss'} {curve.loss[-1]:.3f}{mean}"
        if smooth > 1:
            loss.plot(xs, curve.loss, color=ink, lw=0.8, alpha=0.3, zorder=order - 1)
        loss.plot(xs, line, color=ink, lw=1.8, label=label, zorder=order)
        rate.plot(xs, curve.learning_rate, color=ink, lw=1.5, zorder=order)
        validated = [(at, v) for at, v in zip(xs, curve.validation) if v == v]
        if validated and ink != BEHIND:
            style = dict(color=ink, mfc="white", ms=4, lw=1.2, ls=(0, (4, 2)), zorder=order + 1)
            loss.plot(*zip(*validated), marker="o", label="validation", **style)


def _limits(curves: list[Curve]) -> tuple[float, float]:
    """A range that shows all but the first fall: 97 % of every curve, and room for the legend."""
    low = min(min(curve.loss) for curve in curves)
    high = max(sorted(c.loss)[min(len(c.loss) - 1, int(0.97 * len(c.loss)))] for c in curves)
    high = max([high, *(v for curve in curves for v in curve.validation if v == v)])
    room = (high - low) or 0.5
    return low - 0.06 * room, high + 0.2 * room


def length(curve: Curve) -> str:
    """How long a phase has been trained, in words."""
    words = [f"{magnitude(curve.tokens[-1])} tokens", duration(curve.x["time"][-1])]
    if curve.x["gpu-hours"][-1] != curve.x["time"][-1]:
        words.append(duration(curve.x["gpu-hours"][-1]).replace(" ", " GPU "))
    return ", ".join(words)


def duration(hours: float) -> str:
    """`2.5 min`, `3.21 h`, `1,190 h`."""
    if hours < 1:
        return f"{60 * hours:.3g} min"
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"


def scale_of(number: float) -> tuple[float, str]:
    """A power of 1,000 to count in, and its name."""
    names = {0: "", 3: "thousand", 6: "million", 9: "billion", 12: "trillion"}
    power = min(12, int(math.log10(max(number, 1))) // 3 * 3)
    return 10.0**power, names[power]


def magnitude(tokens: float) -> str:
    scale, name = scale_of(tokens)
    return f"{tokens / scale:.2f} {name}".strip()


# --- the command ---------------------------------------------------------------------------------


def add_pictures(parser: Parser) -> None:
    """--png and --svg, for `save`."""
    for kind in ("png", "svg"):
        text = f"draw to a {kind.upper()}, too"
        parser.add_argument(
            f"--{kind}", type=Path, action="append", dest="pictures", metavar="FILE", help=text
        )


def save(draw: Callable[[], "Figure"], pictures: list[Path]) -> None:
    """Draw, and write in the formats that the names end in. Raises CurveError."""
    try:
        import matplotlib

        figure = draw()
        for path in pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(STYLE):
                figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
            print(f"{'':8}{path}")
    except ImportError:
        raise CurveError("drawing needs: pip install matplotlib") from None
    except ValueError as error:  # a name that ends in no format
        raise CurveError(f"{path}: {error}") from None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="runs or their CSV, in order of phases")
    parser.add_argument("--behind", nargs="+", type=Path, default=[], help="the same, in grey")
    parser.add_argument(
        "--x",
        choices=X,
        default="tokens",
        help="share: of the phase's tokens, to compare runs of other lengths",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=1,
        metavar="ROWS",
        help="mean of so many rows of the log, an odd number, as many before each as after it "
        "(fewer at the ends); the rows themselves stay, faint. 1: none",
    )
    add_pictures(parser)
    args = parser.parse_args(argv)
    if args.smooth < 1 or args.smooth % 2 == 0:
        parser.error(f"--smooth is an odd number, not {args.smooth}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    curves, behind = [read(path) for path in args.runs], [read(path) for path in args.behind]
    print(as_text(curves))
    if args.pictures:
        save(lambda: draw(curves, behind, args.x, args.smooth), args.pictures)


if __name__ == "__main__":
    run_cli(main, CurveError)
