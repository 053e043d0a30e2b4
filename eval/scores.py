"""Scores in the form in which Lucie's were published: whose they are, and the table they stand in.

Used by eval/harness.py.
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import checkpoint
import hf
from checkpoint import CheckpointError, write_text
from data.dataset import DataError
from eval.tasks import Task, spelt

COLUMNS = ("training_phase", "training_steps", "training_tokens", "benchmark", "dataset")
COLUMNS += ("num_fewshot", "score_name", "score", "stderr")
KEY = COLUMNS[:7]  # what a score is of
PHASES = {"pretrain": "1_main", "extension": "2_extension", "annealing": "3_annealing"}


class Weights(NamedTuple):
    """Which weights a score is of; steps and tokens over all phases, None if not known."""

    training_phase: str
    training_steps: int | None = None
    training_tokens: int | None = None

    def folder(self) -> str:
        steps = "" if self.training_steps is None else f"_step{self.training_steps:07d}"
        return f"{self.training_phase}{steps}"


def weights_of(source: str) -> tuple[Weights, str, Path]:
    """(which weights they are, source without "the newest of", folder for their scores) of anything
    that checkpoint.open_model takes. Raises CheckpointError if there is nothing to be evaluated."""
    newest = None if source.startswith("hf:") else checkpoint.latest(source)
    if newest is None:
        path = Path(source.removeprefix("hf:"))
        folder = hf.folder_of(str(path)) if source.startswith("hf:") else path
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{source}: no complete checkpoint there")
        run = path if path.is_dir() else Path("out", path.name)  # not the cache of downloads
        return Weights(path.name, **hf.training_of(folder)), source, run
    state = checkpoint.read_state(newest)
    name = state["config"].get("name", "")
    phase = next((phase for word, phase in PHASES.items() if word in name), name)
    run = newest.parent.parent if newest.parent.name == "checkpoints" else newest
    return Weights(phase, **hf.trained(state)), str(newest), run


def rows_of(results: dict, task: Task, weights: Weights) -> list[dict]:
    """A row for each score of each dataset, spelt as Lucie's tables are."""
    rows = []
    for dataset, scores in results["results"].items():
        leaf = dataset in results["configs"]
        for name, score in scores.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            values = [*weights, task.benchmark, spelt(dataset)]
            values += [results["n-shot"][dataset] if leaf else None, name, score]
            values += [error if isinstance(error, float) else None]
            rows.append(dict(zip(COLUMNS, map(_number, values))))
    return rows


def _number(value: object) -> str:
    """Numbers as floats, nothing as nothing."""
    return "" if value is None else value if isinstance(value, str) else str(float(value))


def read_rows(out: Path) -> list[dict]:
    """The rows of a table of scores, none if there is none yet. Raises DataError for any other
    file."""
    try:
        with open(out, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{out}: not a table of scores") from None
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows):
        raise DataError(f"{out}: not a table of scores with the columns {','.join(COLUMNS)}")
    return rows


def add_rows(out: Path, rows: list[dict]) -> None:
    """Put rows in the table, instead of those that are of the same. Of none, it is begun."""
    table = {tuple(row[name] for name in KEY): row for row in [*read_rows(out), *rows]}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text.getvalue())
