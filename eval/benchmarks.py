"""Scores of benchmarks by checkpoint, against the tokens trained on; other models as dashed lines.

    python -m eval.benchmarks out/pretrain out/extension --png scores.png
    python -m eval.benchmarks out/pretrain --behind evaluation_learning_curve.csv.gz \\
        --baselines evaluation_baselines.csv.gz --datasets hellaswag,french_bench_grammar

Reads each run's evaluation.csv, which eval.harness and eval.watch write; the tables that Lucie
published have the same columns. Prints the last scores, and draws where matplotlib is installed.
"""

import argparse
import csv
import gzip
import math
import re
import zlib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from config.cli import Parser, run_cli
from eval.curves import BEHIND, COLOURS, STYLE, CurveError, add_pictures, save, scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Means over some of MMLU's subjects, as Lucie's tables name them.
CATEGORIES = {"humanities", "other", "social sciences", "stem"}

# Models tuned to follow instructions are no points of a curve of pretraining.
TUNED_PHASE, TUNED_MODEL = re.compile("^4_instruct"), re.compile("Instruct|Chat")


Test = tuple[str, str, str]  # dataset, num_fewshot, score_name: what may be compared


class Score(NamedTuple):
    """A row of an evaluation.csv, or of the baselines, which know no phase, steps and tokens."""

    model: str  # of a baseline; the run; of a table by itself, the phase
    steps: float
    tokens: float
    test: Test
    score: float
    stderr: float  # NaN where it is not known


def read(path: Path, name: str = "") -> list[Score]:
    """The rows of a run's evaluation.csv or of such a file, without those of tuned models.

    The scores of a run have its name, or the one given here. Raises CurveError.
    """
    file = path / "evaluation.csv" if path.is_dir() else path
    run = (name or path.resolve().name) if path.is_dir() else ""
    scores = []
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        for row in rows:
            shots = f"{float(row['num_fewshot']):.0f}" if row["num_fewshot"] else ""
            model = row.get("model_name") or row["training_phase"]
            if (TUNED_MODEL if "model_name" in row else TUNED_PHASE).search(model):
                continue
            scores.append(
                Score(
                    run or model,
                    float(row.get("training_steps") or 0),
                    float(row.get("training_tokens") or 0),
                    (row["dataset"], shots, row["score_name"]),
                    float(row["score"]),
                    float(row["stderr"]) if row["stderr"] not in ("", "N/A") else math.nan,
                )
            )
    except OSError as error:
        raise CurveError(f"{file}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, csv.Error, EOFError, zlib.error):
        raise CurveError(f"{file}: not an evaluation with Lucie's columns") from None
    return scores


def read_all(paths: Sequence[Path]) -> list[Score]:
    """The scores of all; runs of one name are told apart by their paths. Raises CurveError."""
    names = [path.resolve().name for path in paths]
    labels = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names)]
    return [score for path, label in zip(paths, labels) for score in read(path, label)]


def tests_of(scores: list[Score], datasets: Sequence[str] = ()) -> list[Test]:
    """The tests of these datasets; of none, those that stand for a benchmark: mmlu, and not its 57
    subjects. In their order; raises CurveError if there are none.

    A subject's name begins with its benchmark's. What has subjects of its own is a benchmark,
    mmlu_continuation too.
    """
    tests = list(dict.fromkeys(score.test for score in scores))
    names = {name for name, _, _ in tests}
    if datasets:
        if unknown := set(datasets) - names:
            raise CurveError(f"no scores of {', '.join(sorted(unknown))}")
        return [test for test in tests if test[0] in datasets]
    if not tests:
        raise CurveError("no scores to draw")
    whole = {name for name in names if any(other.startswith(f"{name}_") for other in names)}
    parts = {name for name in names for other in whole if name.startswith(f"{other}_")}
    parts |= CATEGORIES
    return [test for test in tests if test[0] in names - (parts - whole)]


def phases_of(scores: list[Score]) -> dict[str, list[tuple[float, float, float]]]:
    """{phase: [(tokens, score, stderr) of each checkpoint]} of one test; phases in their order.

    What was evaluated more than once is the mean of it.
    """
    phases: dict[str, dict[float, list[Score]]] = {}
    for score in scores:
        phases.setdefault(score.model, {}).setdefault(score.steps, []).append(score)
    return {
        phase: [
            (same[0].tokens, *(sum(s[i] for s in same) / len(same) for i in (4, 5)))
            for _, same in sorted(steps.items())
        ]
        for phase, steps in phases.items()
    }


def draw(
    scores: list[Score],
    tests: list[Test],
    behind: Sequence[Score] = (),
    baselines: Sequence[Score] = (),
    x: str = "tokens",
) -> "Figure":
    """Scores against tokens, a panel a test: the first phase along the axis, later ones, which
    are short beside it, in strips of their own after it. Shaded: one standard error.

    x: tokens, or share of the first phase's.
    """
    import matplotlib
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(s.model for s in baselines if s.test in tests))
    across = min(4, len(tests))
    down = -(-len(tests) // across)
    with matplotlib.rc_context(STYLE | {"axes.titlesize": "small"}):
        figure = Figure(figsize=(max(6, 3.5 * across), 0.7 + 2.5 * down), dpi=150)
        figure.set_layout_engine("constrained")
        axes = figure.subplots(down, across, squeeze=False).flat
        dashes = {m: matplotlib.colormaps["Dark2"](i % 8) for i, m in enumerate(models)}
        for panel, test in zip_longest(axes, tests):
            if test is None:
                panel.set_axis_off()
                continue
            for score in baselines:
                if score.test == test:
                    style = dict(color=dashes[score.model], ls="--", lw=1, alpha=0.8)
                    panel.axhline(score.score, label=score.model, **style)
            for rows, ours in ((behind, False), (scores, True)):
                _draw_test(panel, phases_of([s for s in rows if s.test == test]), ours, x)
            name, shots, kind = test
            panel.set_title(name.replace("_", " "), loc="left")
            how = kind.split(",")[0] + (f", {shots}-shot" if shots else "")
            panel.set_title(how, loc="right", size=7, weight="normal")
            panel.yaxis.set_major_formatter(lambda share, _: f"{round(100 * share, 2):g}%")
        named: dict[str, Any] = {}
        for panel in figure.axes:
            handles, labels = panel.get_legend_handles_labels()
            named |= dict(zip(labels, handles))
        figure.legend(
            named.values(), named, loc="outside lower center", ncols=min(5, len(named)), fontsize=8
        )
    return figure


def _draw_test(
    panel: "Axes", phases: dict[str, list[tuple[float, float, float]]], ours: bool, x: str
) -> None:
    end = 1.0
    for number, (phase, points) in enumerate(phases.items()):
        tokens, score, stderr = zip(*points)
        if number == 0:
            most = max(tokens) or 1.0  # 0 where they are not known
            end = most if x == "tokens" else 1.0
            xs = [t * end / most for t in tokens]
        else:
            left = end * (0.97 + 0.09 * number)
            xs = [left + 0.06 * end * n / max(1, len(points) - 1) for n in range(len(points))]
        ink = COLOURS[number % len(COLOURS)] if ours else BEHIND
        label = re.sub(r"^\d_", "", phase) if ours else "behind"
        style = dict(color=ink, marker="o", ms=2.5, lw=1.5, zorder=4 if ours else 2)
        panel.plot(xs, score, label=label, **style)
        low, high = ([v + sign * e for v, e in zip(score, stderr)] for sign in (-1, 1))
        panel.fill_between(xs, low, high, color=ink, alpha=0.15, lw=0)
    if ours:
        scale, unit = scale_of(end) if x == "tokens" else (0.01, "% of the first phase's")
        step = 10.0 ** math.floor(math.log10(end / scale))
        step *= 0.25 if end / scale < 2.5 * step else 0.5 if end / scale < 5 * step else 1
        ticks = [step * n for n in range(int(end / scale / step) + 1)]
        panel.set_xticks([tick * scale for tick in ticks], [f"{tick:g}" for tick in ticks])
        panel.tick_params(labelsize=7)
        panel.set_xlabel(f"{unit} tokens".strip(), size=7)


def as_text(scores: list[Score], tests: list[Test]) -> str:
    """A line a test: its score at the last checkpoint of every phase."""
    lines = []
    for test in tests:
        phases = phases_of([score for score in scores if score.test == test])
        ends = [f"{phase} {points[-1][1]:.1%}" for phase, points in phases.items()]
        lines.append(f"{test[0]:36} {', '.join(ends)}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m eval.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="runs or their CSV, in order of phases")
    parser.add_argument("--behind", nargs="+", type=Path, default=[], help="the same, in grey")
    parser.add_argument("--baselines", nargs="+", type=Path, default=[], help="of other models")
    parser.add_argument("--datasets", default="", help="which, separated by commas")
    text = "share: of the first phase's tokens, to compare runs of other lengths"
    parser.add_argument("--x", choices=("tokens", "share"), default="tokens", help=text)
    add_pictures(parser)
    args = parser.parse_args(argv)
    groups = (args.runs, args.behind, args.baselines)
    scores, behind, baselines = map(read_all, groups)
    tests = tests_of(scores, [name for name in args.datasets.split(",") if name])
    print(as_text(scores, tests))
    if args.pictures:
        save(lambda: draw(scores, tests, behind, baselines, args.x), args.pictures)


if __name__ == "__main__":
    run_cli(main, CurveError)
