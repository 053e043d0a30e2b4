"""What a run has learned, as pictures or one page: loss, benchmark scores, needle maps, samples.

    python -m eval.curves out/pretrain out/extension out/annealing --png curves.png
    python -m eval.curves out/pretrain --x share --behind training_logs_1_pretraining.csv \\
        evaluation_learning_curve.csv.gz --baselines evaluation_baselines.csv.gz --scores scores.png
    python -m eval.curves out/pretrain out/extension needle_results/ --html report.html

Takes runs in the order of their phases, logs or tables of scores in CSV (.gz as well) with the
columns of those that Lucie published, and folders of needle maps. A run brings its log.csv,
completions.csv, evaluation.csv, needle/ and samples.jsonl. --behind draws other results in grey,
--baselines other models as dashed lines. The page holds everything it shows and runs no script; it
is made from a run that goes on as well as from one that has ended.
"""

import base64
import csv
import gzip
import html
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
from itertools import cycle, zip_longest
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from config.cli import ConfigError, Parser, run_cli, write_file
from data.dataset import DataError
from eval import needle
from schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#0d9668", "#d9480f", "#7c3aed", "#a16207")  # of phases, in order
BEHIND = "#9aa1ab"
OTHERS = ("#06b6d4", "#ec4899", "#57534e", "#84a80b", "#c8a000", "#b39ddb")  # of other models
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.35,
    "axes.titlesize": "medium", "axes.titleweight": "bold", "legend.frameon": False,
    "legend.fontsize": "small", "svg.fonttype": "none", "svg.hashsalt": "curves",
}  # fmt: skip
# Means over some of MMLU's subjects, as Lucie's tables name them.
CATEGORIES = {"humanities", "other", "social sciences", "stem"}
# Models tuned to follow instructions do not belong on a curve of pretraining.
TUNED = re.compile("^4_instruct|Instruct|Chat")
# What Python raises for a file that is not what it should be.
DAMAGED = (AttributeError, LookupError, TypeError, ValueError, EOFError, zlib.error, csv.Error)
Test = tuple[str, str, str]  # dataset, num_fewshot, score_name: what may be compared


class Curve(NamedTuple):
    name: str
    options: dict[str, Any]  # the run's config.json; empty for a log by itself
    log: dict[str, np.ndarray]  # columns of the log, NaN where a row has nothing, and "share"


class Score(NamedTuple):
    """A row of an evaluation.csv, or of the baselines, which have no tokens."""

    model: str  # the run; the phase of a table by itself; or the baseline
    tokens: float
    test: Test
    score: float
    stderr: float  # NaN where it is not known


class Results(NamedTuple):
    curves: list[Curve]
    scores: list[Score]
    maps: list[tuple]  # what needle.draw takes
    samples: list[list[str]]  # run, checkpoint or step, prompt, text


# --- reading --------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> Results:
    """What runs, CSVs and folders hold. Raises DataError, in one line, for anything else."""
    found = Results([], [], [], [])
    runs = [path.resolve().name for path in paths if (path / "log.csv").is_file()]
    for path in paths:
        label = str(path) if runs.count(path.resolve().name) > 1 else path.resolve().name
        try:
            if (path / "log.csv").is_file():
                options = json.loads((path / "config.json").read_text(encoding="utf-8"))
                found.curves.append(curve_of(path / "log.csv", label, options))
                if (path / "evaluation.csv").is_file():
                    found.scores.extend(scores_of(read_csv(path / "evaluation.csv"), label))
                found.maps.extend(map(needle.read_map, sorted(path.glob("needle/**/*.csv"))))
                if (path / "completions.csv").is_file():
                    found.samples.extend(completions_of(path / "completions.csv", label))
                samples = path / "samples.jsonl"
                lines = samples.read_text(encoding="utf-8") if samples.is_file() else ""
                for line in map(json.loads, filter(None, lines.split("\n"))):
                    keys = ("checkpoint", "prompt", "text")
                    found.samples.append([label, *(str(line[key]) for key in keys)])
            elif path.is_dir():
                found.maps.extend(map(needle.read_map, sorted(path.rglob("*.csv"))))
            elif "dataset" in (rows := read_csv(path))[0]:
                found.scores.extend(scores_of(rows))
            else:  # Lucie's own logs are called training_logs_1_pretraining.csv
                name = re.sub(r"^training_logs_\d_", "Lucie ", path.stem)
                found.curves.append(curve_of(path, name, {}))
        except OSError as error:
            raise DataError(f"{error.filename or path}: {error.strerror or error}") from None
        except DAMAGED as error:
            what = "no run, log, table of scores or needle map, or a damaged one"
            raise DataError(f"{path}: {what} ({type(error).__name__}: {error})") from None
    return found


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV, without one that a crash has cut short."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return rows[:-1] if rows and None in rows[-1].values() else rows


def curve_of(file: Path, name: str, options: dict) -> Curve:
    """A log; the options of its run say how many tokens the phase has."""
    rows = read_csv(file)
    log = {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
    tokens = whole = log["training_tokens"][-1]
    if options:
        schedule = Schedule(SimpleNamespace(**options))
        whole = schedule.samples_after(schedule.num_steps()) * options["seq_len"]
    log["share"] = log["training_tokens"] / whole
    log.setdefault("validation_loss", np.full(len(rows), math.nan))
    needed = ("training_steps", "training_loss", "learning_rate", "walltime")
    if missing := set(needed) - log.keys() or not tokens:
        raise ValueError(f"no {missing}")
    return Curve(name, options, log)


def completions_of(file: Path, run: str) -> list[list[str]]:
    """What training completed: of all steps the last, and some ten before it at equal distances."""
    rows = read_csv(file)
    steps = [*dict.fromkeys(int(row["training_steps"]) for row in rows)]
    shown = {*steps[:: max(1, len(steps) // 10)], *steps[-1:]}
    return [
        [run, f"step {step:,}", row["prompt"], row["text"]]
        for row in rows
        if (step := int(row["training_steps"])) in shown
    ]


def scores_of(rows: list[dict[str, str]], run: str = "") -> list[Score]:
    """The scores of a table, without those of tuned models; run: the name that they get."""
    scores = []
    for row in rows:
        model = row.get("model_name") or row["training_phase"]
        if not TUNED.search(model):
            shots = f"{float(row['num_fewshot']):.0f}" if row["num_fewshot"] else ""
            test = (row["dataset"], shots, row["score_name"])
            tokens, error = row.get("training_tokens") or 0, row["stderr"].replace("N/A", "")
            values = (float(tokens), test, float(row["score"]), float(error or "nan"))
            scores.append(Score(run or model, *values))
    return scores


# --- words ----------------------------------------------------------------------------------------


def scale_of(number: float) -> tuple[float, str]:
    """A power of 1,000 to count in, and its name."""
    names = {0: "", 3: "thousand", 6: "million", 9: "billion", 12: "trillion"}
    power = min(12, int(math.log10(max(number, 1))) // 3 * 3)
    return 10.0**power, names[power]


def length_of(curve: Curve) -> str:
    """How long a phase has been trained: `3.12 trillion tokens, 950 h`."""
    tokens, hours = curve.log["training_tokens"][-1], curve.log["walltime"][-1]
    scale, name = scale_of(tokens)
    time = f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else "under an hour"
    return f"{tokens / scale:.3g} {name} tokens, {time}".replace("  ", " ")


def last_validation(curve: Curve) -> str:
    """Its last validation loss, in relation to guessing among all tokens if those are known."""
    known = curve.log["validation_loss"][~np.isnan(curve.log["validation_loss"])]
    if not len(known):
        return ""
    vocabulary = curve.options.get("vocab_size")
    share = f", {known[-1] / math.log(vocabulary):.1%} of ln({vocabulary:,})" if vocabulary else ""
    return f"{known[-1]:.3f}{share}"


def languages_of(curve: Curve) -> list[str]:
    """The languages whose validation losses its log has."""
    columns = (name for name in curve.log if name.startswith("validation_"))
    return [name.removeprefix("validation_") for name in columns if name != "validation_loss"]


# --- the loss -------------------------------------------------------------------------------------


def draw(
    curves: Sequence[Curve],
    behind: Sequence[Curve] = (),
    x: str = "tokens",
    smooth: int = 1,
) -> "Figure":
    """One column per phase: the loss on a common scale, and the learning rate below.

    behind: curves in grey, the first one in the first column and so on. smooth: rows to a mean,
    as many before a row as after it, drawn over the rows themselves. There are fewer in the steep
    beginning; the mean ends where rows are lacking, because a mean of fewer would bend its end.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = list(zip_longest(curves, behind))
    with rc_context(STYLE):
        size = (5.6 if len(columns) == 1 else 4.2 * len(columns), 5)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(
            2, len(columns), squeeze=False, sharex="col", sharey="row", height_ratios=(4, 1)
        )
        low, high = limits_of([*curves, *behind])
        for number, ((ours, grey), (loss, rate)) in enumerate(zip(columns, axes.T)):
            first = ours or grey
            end = max(curve.log["training_tokens"][-1] for curve in (ours, grey) if curve)
            scale, unit = (0.01, "% of the phase's") if x == "share" else scale_of(end)
            for curve, ink in ((grey, BEHIND), (ours, COLOURS[number % len(COLOURS)])):
                if curve:
                    xs = curve.log["share" if x == "share" else "training_tokens"] / scale
                    draw_loss(loss, curve, xs, ink, smooth)
                    rate.plot(xs, curve.log["learning_rate"], color=ink, lw=1.5)
            loss.set_title(first.name, loc="left", pad=18)
            loss.text(0, 1.02, length_of(first), transform=loss.transAxes, size=8)
            loss.set_ylim(low, high)
            if (start := first.log["training_loss"][0]) > high:
                style = {"transform": loss.transAxes, "va": "top", "size": 8}
                loss.text(0.1, 0.98, f"from {start:.2f}", **style)
            loss.legend(loc="upper right")
            rate.set_xlabel(f"{unit} tokens".strip())
        axes[0, 0].set_ylabel("loss (nats per token)")
        axes[1, 0].set_ylabel("learning rate")
        rates = np.concatenate([curve.log["learning_rate"] for curve in (*curves, *behind)])
        if len(rates := rates[rates > 0]):
            axes[1, 0].set_yscale("log")
            axes[1, 0].set_ylim(max(min(rates), max(rates) / 300) / 1.6, 1.6 * max(rates))
    return figure


def draw_loss(axes: "Axes", curve: Curve, xs: np.ndarray, ink: str, smooth: int) -> None:
    loss, validation = curve.log["training_loss"], curve.log["validation_loss"]
    order, name = (2, curve.name) if ink == BEHIND else (4, "loss")
    label, mean, at = f"{name} {loss[-1]:.3f}", loss, xs
    if 1 < smooth <= len(loss):
        axes.plot(xs, loss, color=ink, lw=0.8, alpha=0.3, zorder=order - 1)
        reach = [min(smooth // 2, row) for row in range(len(loss) - smooth // 2)]
        mean = [loss[row - r : row + r + 1].mean() for row, r in enumerate(reach)]
        at, label = xs[: len(mean)], f"{label}, mean of {smooth} rows"
    axes.plot(at, mean, color=ink, lw=1.8, label=label, zorder=order)
    if ink != BEHIND and (known := ~np.isnan(validation)).any():
        style = {"color": ink, "mfc": "white", "ms": 4, "lw": 1.2, "ls": "--", "marker": "o"}
        axes.plot(xs[known], validation[known], label="validation", zorder=order + 1, **style)


def limits_of(curves: Sequence[Curve]) -> tuple[float, float]:
    """A range that shows all but the first fall: 97 % of every curve, and room for the legend."""
    low = min(curve.log["training_loss"].min() for curve in curves)
    high = max(np.quantile(curve.log["training_loss"], 0.97) for curve in curves)
    high = np.nanmax([high, *(value for curve in curves for value in curve.log["validation_loss"])])
    room = (high - low) or 0.5
    return low - 0.06 * room, high + 0.2 * room


def draw_languages(curves: Sequence[Curve]) -> "Figure | None":
    """The validation loss of each language: one panel per phase that has several, on one scale."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [curve for curve in curves if languages_of(curve)]
    if not shown:
        return None
    names = [*dict.fromkeys(name for curve in shown for name in languages_of(curve))]
    inks = dict(zip(names, cycle((*COLOURS, *OTHERS))))
    with rc_context(STYLE):
        size = (max(5.6, 4.2 * len(shown)), 3.6)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for curve, panel in zip(shown, panels):
            scale, unit = scale_of(curve.log["training_tokens"][-1])
            for name in languages_of(curve):
                loss = curve.log[f"validation_{name}"]
                known = ~np.isnan(loss)
                xs = curve.log["training_tokens"][known] / scale
                panel.plot(
                    xs, loss[known], color=inks[name], lw=1.5, marker="o", ms=2.5, label=name
                )
            panel.set_title(curve.name, loc="left")
            panel.set_xlabel(f"{unit} tokens".strip())
        panels[0].set_ylabel("validation loss (nats per token)")
        lines = {
            label: line
            for panel in panels
            for line, label in zip(*panel.get_legend_handles_labels())
        }
        figure.legend(lines.values(), lines, loc="outside right center")
    return figure


# --- benchmarks -----------------------------------------------------------------------------------


def tests_of(scores: Sequence[Score]) -> list[Test]:
    """The tests that stand for a benchmark: mmlu, and not its 57 subjects. In their order.

    A subject's name begins with its benchmark's. What has subjects of its own is a benchmark, such
    as mmlu_continuation.
    """
    names = {score.test[0] for score in scores}
    whole = {name for name in names if any(other.startswith(f"{name}_") for other in names)}
    parts = {name for name in names for other in whole if name.startswith(f"{other}_")}
    wanted = names - ((parts | CATEGORIES) - whole)
    return [test for test in dict.fromkeys(score.test for score in scores) if test[0] in wanted]


def points_of(scores: Sequence[Score], test: Test) -> dict[str, np.ndarray]:
    """{model: tokens, score and stderr of each checkpoint, `[checkpoints, 3]`} of one test.

    A checkpoint that was evaluated more than once counts with its mean.
    """
    found: dict[str, dict[float, list]] = {}
    for model, tokens, this, *values in scores:
        if this == test:
            found.setdefault(model, {}).setdefault(tokens, []).append((tokens, *values))
    return {
        model: np.array([np.mean(same, axis=0) for _, same in sorted(by_tokens.items())])
        for model, by_tokens in found.items()
    }


def draw_scores(
    scores: Sequence[Score],
    tests: Sequence[Test],
    behind: Sequence[Score] = (),
    baselines: Sequence[Score] = (),
    x: str = "tokens",
) -> "Figure":
    """Scores against tokens, one panel per test: the first phase along the axis, later ones, which
    are short beside it, in strips of their own after it. Shaded: one standard error.

    x: tokens, or the share of the first phase's tokens, of ours and of those behind.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(score.model for score in baselines))
    orders = [list(dict.fromkeys(score.model for score in side)) for side in (behind, scores)]
    across = min(4, len(tests))
    down = -(-len(tests) // across)
    with rc_context(STYLE | {"axes.titlesize": "small"}):
        size = (max(5.6, 3.5 * across), 0.7 + 2.6 * down)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        named: dict[str, Any] = {}
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for panel in panels[len(tests) :]:
            panel.set_axis_off()
        for panel, test in zip(panels, tests):
            for number, model in enumerate(models):
                for _, score, _ in points_of(baselines, test).get(model, ()):
                    style = {"color": OTHERS[number % len(OTHERS)], "ls": "--", "lw": 1}
                    panel.axhline(score, label=model, **style)
            sides = [(points_of(side, test), side is scores) for side in (behind, scores)]
            ends = [next(iter(phases.values()))[:, 0].max() for phases, _ in sides if phases]
            scale, unit = (0.01, "% of the first phase's") if x == "share" else scale_of(max(ends))
            right = 100 if x == "share" else max(ends) / scale  # where the strips begin
            for phases, ours in sides:
                draw_phases(panel, phases, orders[ours], scale, right, x, ours)
            panel.set_xticks([tick for tick in panel.get_xticks() if 0 <= tick <= right])
            panel.set_xlabel(f"{unit} tokens".strip(), size=7)
            panel.tick_params(labelsize=7)
            name, shots, kind = test
            panel.set_title(name.replace("_", " "), loc="left")
            how = kind.split(",")[0] + (f", {shots}-shot" if shots else "")
            panel.set_title(how, loc="right", size=7, weight="normal")
            named |= {text: line for line, text in zip(*panel.get_legend_handles_labels())}
        style = {"loc": "outside lower center", "ncols": min(5, 1 + across), "fontsize": 8}
        figure.legend(named.values(), named, **style)
    return figure


def draw_phases(
    panel: "Axes",
    phases: dict[str, np.ndarray],
    order: list[str],
    scale: float,
    right: float,
    x: str,
    ours: bool,
) -> None:
    """Draw a line per phase. order: all phases of this side, of which a test may lack some."""
    for place, (model, points) in enumerate(phases.items()):
        tokens, score, error = points.T
        number = order.index(model)
        if place:
            xs = right * (np.linspace(0, 0.06, len(tokens)) + 0.97 + 0.09 * number)
        else:  # tokens are 0 where they are not known
            xs = tokens / ((tokens.max() or 1) if x == "share" else 1) / scale
        ink = COLOURS[number % len(COLOURS)] if ours else BEHIND
        label = re.sub(r"^\d_", "", model) if ours else "behind"
        style = {"color": ink, "marker": "o", "ms": 2.5, "lw": 1.5, "zorder": 2 + 2 * ours}
        panel.plot(xs, score, label=label, **style)
        panel.fill_between(xs, score - error, score + error, color=ink, alpha=0.15, lw=0)


# --- the page -------------------------------------------------------------------------------------

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #24292f; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; min-width: 6rem;
  border-bottom: 1px solid #dfe2e6; font-weight: 400; }
</style>
<h1>$title</h1>
$sections</html>
""")


def table(*rows: Sequence[object]) -> str:
    """Rows of text, not HTML; the first row and the first cell of each are headings."""
    lines = []
    for number, (first, *rest) in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in rest)
        lines.append(f"<tr><th>{html.escape(str(first))}</th>{cells}</tr>\n")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>\n'


def picture(label: str, figure: "Figure") -> str:
    """A figure as SVG within HTML; label: what it shows."""
    from matplotlib import rc_context

    svg = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
    return f'<img alt="{html.escape(label)}" src="{source}">\n'


def page(found: Results, losses: "Figure", scores: "Figure | None") -> str:
    """All results as HTML; losses, scores: what `draw` and `draw_scores` have drawn of them."""
    curves, names = found.curves, [curve.name for curve in found.curves]
    facts = [
        ["trained", *map(length_of, curves)],
        ["share of the phase", *(f"{curve.log['share'][-1]:.0%}" for curve in curves)],
        ["loss", *(f"{curve.log['training_loss'][-1]:.3f}" for curve in curves)],
        ["validation loss", *map(last_validation, curves)],
    ]
    texts = [(prompt, f"{run}, {at}", text) for run, at, prompt, text in found.samples]
    texts.sort(key=lambda line: line[0])  # the answers to one prompt together, in their order
    options = dict.fromkeys(option for curve in curves for option in curve.options)
    chosen = ([option, *(curve.options.get(option, "") for curve in curves)] for option in options)
    maps = (picture(cells[2], needle.draw(*cells)) for cells in found.maps)
    languages = draw_languages(found.curves)
    sections = {
        "Training": table(["", *names], *facts) + picture("loss and learning rate", losses),
        "Languages": picture("validation loss by language", languages) if languages else "",
        "Benchmarks": picture("scores over training", scores) if scores else "",
        "Needle in a haystack": "".join(maps),
        "Samples": table(("prompt", "checkpoint", "completion"), *texts) if texts else "",
        "Configuration": table(["option", *names], *chosen) if options else "",
    }
    parts = (f"<h2>{name}</h2>\n{content}\n" for name, content in sections.items() if content)
    return PAGE.substitute(title=html.escape(" · ".join(names)), sections="".join(parts))


# --- the command ----------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m eval.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="runs, CSVs or needle folders, in order")
    many = {"nargs": "+", "type": Path, "default": [], "metavar": "FILE"}
    parser.add_argument("--behind", help="results to draw in grey", **many)
    parser.add_argument("--baselines", help="tables of scores of other models", **many)
    share = "share: of the phase's tokens, to compare runs of other lengths"
    parser.add_argument("--x", choices=("tokens", "share"), default="tokens", help=share)
    mean = "draw means of so many rows of the log, an odd number; default: 1"
    parser.add_argument("--smooth", type=int, default=1, metavar="ROWS", help=mean)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw loss and learning rate here")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="draw benchmark scores here")
    one = "draw these tests only, by the names of their datasets"
    parser.add_argument("--tests", nargs="+", metavar="NAME", default=[], help=one)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with everything")
    args = parser.parse_args(argv)
    if args.smooth < 1 or args.smooth % 2 == 0:
        raise ConfigError(f"--smooth is an odd number, not {args.smooth}")
    found, behind, baselines = read(args.runs), read(args.behind), read(args.baselines).scores
    written = [path for path in (args.png, args.scores, args.html) if path]
    if (args.png or args.html) and not found.curves:
        raise DataError("no loss to draw: --png and --html need a run or a log")
    if args.scores and not found.scores:
        raise DataError("no scores to draw: python -m eval.harness RUN --tasks NAMES")
    losses = scores = None
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if args.png or args.html:
            losses = draw(found.curves, behind.curves, args.x, args.smooth)
        if found.scores and (args.scores or args.html):
            tests = [t for t in tests_of(found.scores) if not args.tests or t[0] in args.tests]
            if not tests:
                raise DataError(f"no scores of {', '.join(args.tests)}")
            scores = draw_scores(found.scores, tests, behind.scores, baselines, args.x)
        if args.png:
            losses.savefig(args.png)
        if args.scores:
            scores.savefig(args.scores)
        if args.html:
            write_file(args.html, page(found, losses, scores).encode())
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib") from None
    for path in written:
        print(f"wrote {path}")
    for number, curve in enumerate(found.curves, 1):
        validation = last_validation(curve)
        loss = f"loss {curve.log['training_loss'][-1]:.3f}"
        print(f"{number} {curve.name}: {loss}{validation and f', validation {validation}'}")


if __name__ == "__main__":
    run_cli(main, DataError, ValueError)
