"""Lucie's benchmarks, with lm-evaluation-harness (pip install -r requirements-eval.txt).

    python -m eval.harness out/pretrain --tasks french,english
    torchrun --nproc-per-node=8 -m eval.harness hf:OpenLLM-France/Lucie-7B --tasks arc_challenge
    python -m eval.harness out/demo_pretrain --tasks mine --include_path my_tasks

Tasks are french, english, multilingual, leaderboard-fr (what Lucie was evaluated on, eval/tasks.py)
and any name of lm-evaluation-harness; those that Lucie ran get the same few-shot examples. YAML and
JSONL of your own need no network: --include_path. (A data_files in them is relative to where you
run this.)

    RUN/evaluation.csv                             scores, in the columns Lucie published
        evaluation/1_main_step0005000/mmlu_5shot.json   all that lm-evaluation-harness said of one

A task that has its JSON is not evaluated again; a JSON of other weights is an error. One that
cannot be loaded or computed does not stop the others. With --limit both are evaluation_limitN.
"""

import argparse
import difflib
import functools
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import CheckpointError, write_text
from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError
from data.tokenizer import Tokenizer
from eval.opening import add_model_options, fingerprint, open_with_tokenizer
from eval.scores import Weights, add_rows, read_rows, rows_of, weights_of
from eval.tasks import GROUPS, PUBLISHED, Task
from model import Lucie
from parallel import gather, rank, start_processes, together, world_size

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from eval.adapter import LucieLM

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-evaluation-harness's


class TasksFailed(Exception):
    """Why some tasks have no scores; `rows` are the scores of the others."""

    def __init__(self, reasons: list[str], rows: list[dict]) -> None:
        super().__init__("; ".join(reasons))
        self.rows = rows


def evaluate(
    model: Lucie,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    weights: Weights,
    out: Path,
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_tokens: int = 16_384,
    include_path: str | None = None,
    again: bool = False,
    progress: bool = False,
) -> list[dict]:
    """Evaluate and record; the rows of `out`, a CSV, that belong to these tasks and weights.

    Every rank calls this with the whole model; rank 0 writes. tasks, include_path: see above.
    fewshot: for all tasks, instead of their own. limit: so many questions of each. batch_tokens:
    ids in a forward pass. What is recorded already is not computed, unless again. The model is in
    its mode afterwards, and generators of random numbers are where they were.

    Before anything is computed, raises ConfigError for a task that does not exist or a record of
    other weights, DataError for a file that is not a table of scores, and OSError if `out` cannot
    be written. When all is done, raises TasksFailed if tasks could not be loaded or computed.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError("this model is sharded: evaluate its checkpoint instead")
    read_rows(out)
    manager, wanted = check(tasks, include_path, fewshot)
    adapter = _adapter_class()(model, tokenizer, batch_tokens, progress and rank() == 0)
    folder, own = out.with_suffix("") / weights.folder(), fingerprint(model)
    files = [folder / _file_name(task) for task in wanted]
    records = [gather(None if again else _record(file, weights, limit))[0] for file in files]
    for file, record in zip(files, records):
        if record and record["fingerprint"] != own:
            raise ConfigError(
                f"{file} is of other weights or another dtype: choose another --out, or --again"
            )
    together(_begin, out, folder, errors=(OSError,))
    rows, reasons = [], []
    for number, (task, file, record) in enumerate(zip(wanted, files, records), start=1):
        if fewshot and task.num_fewshot == 0 and rank() == 0:
            print(f"{task.name} never has examples: 0, not {fewshot}", file=sys.stderr)
        if record is None:
            adapter.label = f"{number}/{len(wanted)} {task.name}"
            try:
                with _left_as_found(model):
                    results = _results(adapter, manager, task, limit)
            except Exception as error:  # a task brings code of its own
                if world_size() > 1 and not getattr(error, "on_all_ranks", False):
                    raise  # the other ranks, which know nothing of it, are not to wait
                why = _reason(error)
                if isinstance(error, torch.OutOfMemoryError):
                    why = f"out of memory, try --batch_tokens={max(1, batch_tokens // 2)}"
                reasons.append(f"{task.name}: {why}")
                continue
            record = {"weights": weights, "fingerprint": own, "limit": limit}
            record |= {"rows": rows_of(results, task, weights), "results": results}
            if rank() == 0:
                write_text(file, json.dumps(record, indent=1, ensure_ascii=False, default=str))
        if rank() == 0:
            add_rows(out, record["rows"])
        rows += record["rows"]
    if reasons:
        raise TasksFailed(reasons, rows)
    return rows


def check(
    names: Sequence[str], include_path: str | None, fewshot: int | None = None
) -> tuple["TaskManager", list[Task]]:
    """What can load tasks, and the tasks that names stand for.

    Raises ConfigError if lm-evaluation-harness, a name or the folder of include_path is missing.
    """
    _adapter_class()
    manager = _tasks_there_are(tuple(names), include_path)
    return manager, chosen(names, manager, fewshot)


def _adapter_class() -> "type[LucieLM]":
    try:
        from eval.adapter import LucieLM
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is missing: pip install -r requirements-eval.txt"
        ) from None
    return LucieLM


def chosen(names: Sequence[str], manager: "TaskManager", fewshot: int | None) -> list[Task]:
    """The tasks that names stand for, each once. Raises ConfigError for an unknown name."""
    found: dict[str, Task] = {}
    known = manager.task_index
    for name in names:
        tasks = GROUPS.get(name)
        if tasks is None and name not in known:
            near = difflib.get_close_matches(name, [*GROUPS, *known], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"no task {name}: --include_path=DIR for your own{hint}")
        if tasks is None:
            tags = sorted(known[name].tags) if known[name].kind.name == "TAG" else [name]
            tasks = [PUBLISHED.get(tag, Task(name, tag, None)) for tag in tags]
        for task in tasks:
            if task.name not in known:
                raise ConfigError(
                    f"{name}: lm-evaluation-harness has no {task.name}; --include_path=DIR with it"
                )
            if fewshot is not None:
                shots = 0 if _without_examples(task.name, known) else fewshot
                task = task._replace(num_fewshot=shots)
            found[task.name] = task
    return list(found.values())


def _without_examples(part: str | dict, index: dict) -> bool:
    """Whether a task, or all of a group, has its number of examples fixed at 0."""
    own = {"task": part} if isinstance(part, str) else part
    if isinstance(own.get("task"), str) and own["task"] in index:
        own = (index[own["task"]].cfg or {}) | (own if isinstance(part, dict) else {})
    if isinstance(own.get("task"), list):
        return all(_without_examples(part, index) for part in own["task"])
    return own.get("num_fewshot") == 0


@functools.cache  # it takes seconds
def _tasks_there_are(names: tuple[str, ...], include_path: str | None) -> "TaskManager":
    """What lm-evaluation-harness can load; of 14,000 files only where one's own do not suffice."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigError(f"{include_path}: no such folder of tasks")
        own = TaskManager(include_path=include_path, include_defaults=False)
        wanted = [t.name for name in names for t in GROUPS.get(name, [Task("", name, None)])]
        if all(name in own.task_index for name in wanted):
            return own
    return TaskManager(include_path=include_path)


def _results(adapter: "LucieLM", manager: "TaskManager", task: Task, limit: int | None) -> dict:
    """What lm-evaluation-harness says of one task, without the single answers."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    # some tasks shuffle their choices as they are loaded
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    loaded = together(_loaded, manager, task.name, errors=(ValueError,))
    for part in loaded["tasks"].values():
        own = part.get_config("num_fewshot")
        if own != 0 and task.num_fewshot is not None:  # 0 is for tasks that have no examples
            part.set_config(key="num_fewshot", value=task.num_fewshot)
        elif own is None:
            part.set_config(key="num_fewshot", value=0)
        part.set_fewshot_seed(seed=SEEDS["fewshot"])
    iterations = 100_000 if rank() == 0 else 0  # of errors that have no formula
    return lm_evaluate(adapter, loaded, limit=limit, bootstrap_iters=iterations, log_samples=False)


def _loaded(manager: "TaskManager", name: str) -> dict:
    try:
        return manager.load([name])
    except Exception as error:  # datasets has dozens of its own
        raise ValueError(f"not loaded ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The first line of an error; a ValueError needs no name, those of others' code do."""
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return name + str(error).strip().partition("\n")[0]


@contextmanager
def _left_as_found(model: Lucie) -> Iterator[None]:
    """Evaluation mode within; the mode and the generators of before after it."""
    training, python, numpy = model.training, random.getstate(), np.random.get_state()
    device = model.embed_tokens.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield model.eval()
        finally:
            model.train(training)
            random.setstate(python)
            np.random.set_state(numpy)


def _file_name(task: Task) -> str:
    shots = "" if task.num_fewshot is None else f"_{task.num_fewshot}shot"
    return f"{task.name}{shots}.json"


def _begin(out: Path, folder: Path) -> None:
    """An error of writing now, not after the first task."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        add_rows(out, [])


def _record(file: Path, weights: Weights, limit: int | None) -> dict | None:
    """What was recorded of a task, if of these weights and with this limit."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        same = (record["weights"], record["limit"]) == (list(weights), limit)
        known = isinstance(record["rows"], list) and isinstance(record["fingerprint"], str)
        return record if same and known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the command ---------------------------------------------------------------------------------


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--tasks", type=names_in, required=True, help="names, separated by commas")
    parser.add_argument("--fewshot", type=int, help="solved examples; default: each task's own")
    parser.add_argument("--limit", type=int, help="only so many questions of each task")
    parser.add_argument("--batch_tokens", type=int, default=16_384, help="of one forward pass")
    parser.add_argument(
        "--include_path", metavar="DIR", help="folder of your own tasks, YAML files"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/evaluation.csv")
    parser.add_argument("--again", action="store_true", help="evaluate recorded tasks again, too")
    args = parser.parse_args(argv)
    for name, least in (("fewshot", 0), ("limit", 1), ("batch_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}")
    if args.out and args.out.suffix != ".csv":
        raise ConfigError(f"--out {args.out}: the name must end with .csv")
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    check(args.tasks, args.include_path)  # before minutes of loading
    weights, args.model, run = weights_of(args.model)
    suffix = f"_limit{args.limit}" if args.limit else ""
    out = args.out or run / f"evaluation{suffix}.csv"
    if "RANK" in os.environ and not dist.is_initialized():
        start_processes(torch.device(args.device))
    model, tokenizer = open_with_tokenizer(args)
    failed = None
    try:
        rows = evaluate(
            model, tokenizer, args.tasks, weights, out, fewshot=args.fewshot, limit=args.limit,
            batch_tokens=args.batch_tokens, include_path=args.include_path, again=args.again,
            progress=True,
        )  # fmt: skip
    except TasksFailed as error:
        rows, failed = error.rows, error
    if rank() == 0 and rows:
        show(rows)
        print(out)
    first = rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if failed and first:
        raise failed  # one rank reports it
    return 2 if failed else 0


def show(rows: list[dict]) -> None:
    width = max((len(row["dataset"]) for row in rows), default=7)
    print(f"{'dataset':{width}}  few-shot  {'score':26}   value  std. error")
    for row in rows:
        shots = row["num_fewshot"].removesuffix(".0") or "-"
        error = f"{float(row['stderr']):10.4f}" if row["stderr"] else f"{'-':>10}"
        score = f"{float(row['score']):7.4f}"
        print(f"{row['dataset']:{width}}  {shots:>8}  {row['score_name']:26} {score}  {error}")


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, TasksFailed, ValueError, torch.OutOfMemoryError)
