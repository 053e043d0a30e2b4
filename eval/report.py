"""One HTML file that tells of a run: curves, speed, scores, needle maps, samples, configuration.

    python -m eval.report out/pretrain out/extension out/annealing --out report.html

Takes the phases of a run in their order, finished or not, and what eval.watch, eval.harness and
eval.needle have written beside them. The file holds everything it shows, asks nothing of a network
and runs no script: it opens from a disk or an attachment, on a phone, by day and by night.
"""

import argparse
import csv
import html
import io
import json
import re
import time
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from checkpoint import CheckpointError, architecture, found, latest, read_state, write_text
from config import Config
from config.cli import Parser, run_cli
from eval import benchmarks, curves
from eval.curves import Curve, CurveError
from eval.watch import read_lines
from model import Lucie

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = curves.STYLE | {"svg.fonttype": "none", "savefig.transparent": True}


class Phase(NamedTuple):
    """A run directory, read."""

    path: Path
    curve: Curve
    options: dict[str, Any]
    log: list[dict[str, str]]  # the rows of log.csv
    versions: dict[str, str]  # what the newest checkpoint was computed with


def read(path: Path) -> Phase:
    """Raises CurveError for what is no run."""
    try:
        options = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CurveError(f"{path}/config.json: {error.strerror}; is it a run?") from None
    except ValueError:
        raise CurveError(f"{path}/config.json: damaged") from None
    newest = latest(path)
    versions = read_state(newest).get("versions", {}) if newest else {}
    curve = curves.read(path)
    with open(path / "log.csv", encoding="utf-8", newline="") as f:
        log = list(csv.DictReader(f))[: len(curve.loss)]
    return Phase(path, curve, options, log, versions)


# --- small pieces of HTML ------------------------------------------------------------------------

text = html.escape


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already; the first one of a row names it."""
    head = "".join(f"<th scope=col>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'


def section(name: str, content: str, or_else: str = "") -> str:
    """or_else: the command that would make the content, where there is none yet."""
    content = content or f"<p>None yet. <code>{text(or_else)}</code></p>"
    return f'<section id="{name.split()[0].lower()}"><h2>{name}</h2>\n{content}\n</section>\n'


def picture(figure: "Figure", label: str) -> str:
    """A figure as SVG in the page's own ink, to be as wide as the page or to be scrolled."""
    import matplotlib

    file = io.StringIO()
    # ids are made of the salt: those of two pictures of a page must differ
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return as_picture(file.getvalue(), label)


def as_picture(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    for ink in (curves.INK, "#000000"):
        svg = svg.replace(ink, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    style = f"min-width:{0.8 * width:.0f}px; max-width:{1.5 * width:.0f}px"
    attributes = f'role="img" aria-label="{text(label)}" style="{style}"'
    return f'<div class="wide">{svg.replace("<svg", f"<svg {attributes}", 1)}</div>'


# --- the parts -----------------------------------------------------------------------------------


def overview(phases: list[Phase]) -> str:
    """What was trained how far, a column a phase."""
    rows: dict[str, list[str]] = {}
    for phase in phases:
        curve, last = phase.curve, phase.log[-1]
        with torch.device("meta"):
            parameters = Lucie(architecture(phase.options)).num_params()
        validated = [loss for loss in curve.validation if loss == loss]
        waits, seconds = numbers(phase.log, "data_seconds"), 3600 * curve.x["time"][-1]
        saved = len(found(phase.path / "checkpoints"))
        told = {
            "parameters": f"{parameters:,}",
            "of the phase": f"{curve.x['share'][-1]:.1%}",
            "steps": f"{int(last['training_steps']):,}",
            "tokens": curves.magnitude(curve.tokens[-1]),
            "loss": f"{curve.loss[-1]:.3f}",
            "validation loss": f"{validated[-1]:.3f}" if validated else "none",
            "hours": f"{curve.x['time'][-1]:,.2f}",
            "GPU hours": f"{curve.x['gpu-hours'][-1]:,.2f}",
            "tokens/s": f"{middle(numbers(phase.log, 'tokens_per_second')):,.0f}",
            "MFU": f"{middle(mfu):.1%}" if (mfu := numbers(phase.log, "mfu")) else "not known",
            "waiting for data": f"{sum(waits) / max(seconds, 1e-9):.1%}" if waits else "not known",
            "checkpoints": f"{saved:,}",
        }
        for name, value in told.items():
            rows.setdefault(name, []).append(value)
    names = [text(phase.path.name) for phase in phases]
    return table(["", *names], [[name, *values] for name, values in rows.items()], "numbers")


def numbers(log: list[dict[str, str]], column: str) -> list[float]:
    """What a column of the log holds, where it holds something."""
    return [float(row[column]) for row in log if row.get(column)]


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def speed(phases: list[Phase]) -> "Figure":
    """Tokens a second along each phase."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        width = 8 if len(phases) == 1 else 4.2 * len(phases)
        figure = Figure(figsize=(width, 2.6), layout="constrained")
        panels = figure.subplots(1, len(phases), squeeze=False, sharey="row")[0]
        for number, (panel, phase) in enumerate(zip(panels, phases)):
            values = [float(row.get("tokens_per_second") or "nan") for row in phase.log]
            scale, unit = curves.scale_of(phase.curve.tokens[-1])
            colour = curves.COLOURS[number % len(curves.COLOURS)]
            panel.plot([t / scale for t in phase.curve.tokens], values, color=colour, lw=1.5)
            panel.set_title(phase.path.name, loc="left")
            panel.set_xlabel(f"{unit} tokens".strip())
        top = max(
            [value for phase in phases for value in numbers(phase.log, "tokens_per_second")] or [1]
        )
        panels[0].set_ylim(0, 1.1 * top)
        panels[0].set_ylabel("tokens a second")
    return figure


def scores(phases: list[Phase]) -> str:
    """Learning curves of the benchmarks and the table of all scores."""
    runs = [p.path for p in phases if (p.path / "evaluation.csv").is_file()]
    rows = benchmarks.read_all(runs)
    if not rows:
        return ""
    tests = benchmarks.tests_of(rows)
    lines = [
        [
            text(s.test[0]),
            text(s.model),
            f"{s.steps:,.0f}",
            curves.magnitude(s.tokens),
            text(s.test[1]),
            text(s.test[2]),
            f"{s.score:.4f}" + (f" ± {s.stderr:.4f}" if s.stderr == s.stderr else ""),
        ]
        for s in sorted(rows, key=lambda s: s.test)
    ]
    header = ["dataset", "phase", "step", "tokens", "few-shot", "metric", "score"]
    drawing = picture(benchmarks.draw(rows, tests), "scores of benchmarks by checkpoint")
    return drawing + folded(f"all {len(lines):,} scores", table(header, lines))


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def needle_maps(phases: list[Phase]) -> str:
    """The maps of each phase: of its newest checkpoint in sight, of older ones folded."""
    import matplotlib

    from eval import needle, needle_map

    out = []
    for phase in phases:
        beside = phase.path.parent / "needle"  # where eval.needle writes by itself
        folders = [*phase.path.glob("needle/*"), *beside.glob(f"{phase.path.name}_step*")]
        drawn = []  # the maps of each folder, the newest first
        for folder in sorted(folders, key=lambda f: f.name.rpartition("step")[2], reverse=True):
            maps = []
            for file in sorted(folder.glob("*.csv")):
                try:
                    rows = needle.read_rows(file)
                    if not rows or tuple(rows[0]) != needle.COLUMNS:
                        continue  # none yet, or not a map
                    cells = {(int(r["length"]), int(r["depth"])): float(r["score"]) for r in rows}
                except (ValueError, TypeError, csv.Error):
                    raise CurveError(f"{file}: not a needle map") from None
                title = f"{phase.path.name}, {folder.name}: {file.stem.replace('_', ', ')}"
                svg = io.BytesIO()
                look = STYLE | {"savefig.format": "svg", "svg.hashsalt": title, "axes.grid": False}
                with matplotlib.rc_context(look):
                    needle_map.draw(cells, phase.options["seq_len"], title, svg)
                maps.append(as_picture(svg.getvalue().decode(), f"needle map of {title}"))
            if maps:
                drawn.append(maps)
        if drawn:
            out += drawn[0]
        if older := [drawing for maps in drawn[1:] for drawing in maps]:
            out.append(folded(f"{len(older)} of older checkpoints", "".join(older)))
    return "".join(out)


def samples(phases: list[Phase]) -> str:
    """Completions of the same prompts by one checkpoint after the other."""
    by_prompt: dict[str, list[list[str]]] = {}
    for phase in phases:
        file = phase.path / "samples.jsonl"
        try:
            for line in sorted(read_lines(file), key=lambda line: line["training_steps"]):
                where = f"{text(phase.path.name)}, step {line['training_steps']:,}"
                said = f"<span class=prompt>{text(line['prompt'])}</span>{text(line['text'])}"
                by_prompt.setdefault(line["prompt"], []).append([where, said])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CurveError(f"{file}: not completions of eval.watch") from None
    return "".join(
        f"<details{' open' if number == 0 else ''}><summary>{text(prompt)}</summary>"
        f"{table(['checkpoint', 'completion'], rows, 'said')}</details>"
        for number, (prompt, rows) in enumerate(by_prompt.items())
    )


def configuration(phases: list[Phase]) -> str:
    """Every option: those that were set in some phase in sight, the defaults folded."""
    default, chosen, rest = vars(Config()), [], []
    for name in dict.fromkeys(name for phase in phases for name in phase.options):
        values = [phase.options.get(name, "") for phase in phases]
        row = [text(name), *(text(f"{v:,}" if type(v) is int else str(v)) for v in values)]
        (rest if all(v == default.get(name) for v in values) else chosen).append(row)
    header = ["option", *(text(phase.path.name) for phase in phases)]
    return table(header, chosen) + folded(f"{len(rest)} defaults", table(header, rest))


def versions(phases: list[Phase]) -> str:
    names = dict.fromkeys(name for phase in phases for name in phase.versions)
    rows = [[text(n), *(text(str(p.versions.get(n, ""))) for p in phases)] for n in names]
    return table(["", *(text(phase.path.name) for phase in phases)], rows) if rows else ""


# --- the page ------------------------------------------------------------------------------------

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #24292f; --page: #ffffff; --soft: #f5f6f8;
  --line: #dfe2e6; --faint: #656d76; --accent: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --page: #14171b; --soft: #1d2126;
  --line: #343a41; --faint: #98a1ab; --accent: #7aa5ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.8rem; padding-bottom: 0.3rem;
  border-bottom: 1px solid var(--line); }
.lead { color: var(--faint); margin: 0.3rem 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; }
a { color: var(--accent); text-decoration: none; }
.wide { overflow-x: auto; margin: 0.5rem 0; }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1.2rem 0.3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tr > th[scope=row] { font-weight: 400; color: var(--faint); white-space: nowrap; }
.numbers td, .numbers th[scope=col] { text-align: right; padding: 0.3rem 0 0.3rem 2rem; }
.said { width: 100%; } .said th { width: 1%; }
.said td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; }
.prompt { color: var(--faint); }
details { background: var(--soft); border-radius: 8px; padding: 0.5rem 0.9rem; margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
code { background: var(--soft); border-radius: 4px; padding: 0.1rem 0.3rem; font-size: 0.9em;
  overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="lead">$lead</p>
<nav>$links</nav>
$sections</body>
</html>
""")


def page(phases: list[Phase], behind: list[Curve], x: str = "tokens") -> str:
    """The report, as HTML."""
    drawn = [phase.curve for phase in phases]
    smooth = min(len(curve.loss) for curve in drawn) // 20 | 1
    figure = curves.draw(drawn, behind, x, smooth)
    tokens, last = sum(curve.tokens[-1] for curve in drawn), str(phases[-1].path)
    count = f"{len(phases)} phase{'s' if len(phases) > 1 else ''}"
    lead = f"{curves.magnitude(tokens)} tokens in {count}, loss {drawn[-1].loss[-1]:.3f}"
    sections = [
        section("Overview", overview(phases)),
        section("Learning curves", picture(figure, "loss and learning rate")),
        section("Speed", picture(speed(phases), "tokens a second")),
        section("Benchmarks", scores(phases), f"python -m eval.watch {last} --tasks french"),
        section(
            "Needle in a haystack",
            needle_maps(phases),
            f'python -m eval.watch {last} --needle="--haystack FILES"',
        ),
        section("Samples over time", samples(phases), f"python -m eval.watch {last}"),
        section("Configuration", configuration(phases)),
        section("Versions", versions(phases), "a checkpoint tells"),
    ]
    named = [re.search(r'id="(\w+)"><h2>(.*?)</h2>', part).groups() for part in sections]
    return PAGE.substitute(
        title=text(" · ".join(phase.path.name for phase in phases)),
        lead=f"{lead}. Written on {time.strftime('%d %B %Y, %H:%M')}.",
        links="".join(f'<a href="#{name}">{title}</a>' for name, title in named),
        sections="".join(sections),
    )


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m eval.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, in order of phases")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--behind", nargs="+", type=Path, default=[], help="curves in grey: logs")
    parser.add_argument("--x", choices=curves.X, default="tokens", help="as of eval.curves")
    args = parser.parse_args(argv)
    phases, behind = [read(run) for run in args.runs], [curves.read(path) for path in args.behind]
    try:
        content = page(phases, behind, args.x)
    except ImportError:
        raise CurveError("drawing needs: pip install matplotlib") from None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, content)
    print(f"{args.out}: {len(content.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_cli(main, CheckpointError, CurveError)
