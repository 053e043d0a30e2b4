"""Evaluate every checkpoint of a run while it trains, each once, the oldest first.

    python -m eval.watch out/pretrain                                completions of five prompts
    python -m eval.watch out/pretrain --tasks french,arc_challenge \\
        --needle="--haystack essays/ --lengths 1000 8000 8"

Writes into the run's directory:

    samples.jsonl       the greedy completions: a line for each checkpoint and prompt
    evaluation.csv      with --tasks, by eval.harness: a row for each checkpoint and score
    needle/CHECKPOINT/  with --needle, by eval.needle: its map
    evaluated.jsonl     which checkpoints those two are done with

What is written there is not computed again: a watcher that was killed at any moment is started
again with the same command. It ends when the last checkpoint of the run's schedule is evaluated. A
task that cannot be loaded or computed is reported in a line, and tried again at the next start.
The watcher needs only the directory of the training job; give it a device of its own.
"""

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from checkpoint import CheckpointError, found, read_state, write_text
from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError
from data.prepare import find_files
from eval import harness
from eval.harness import TasksFailed
from eval.opening import add_model_options, open_with_tokenizer
from generate import Sampling, complete
from schedule import Schedule

PROMPTS = (
    "The capital of France is",
    "La capitale de la France est",
    "Die Hauptstadt von Frankreich ist",
    "La capital de Francia es",
    "La capitale della Francia è",
)


class Evaluation(NamedTuple):
    """Something to do with every checkpoint.

    `run` writes its results whole, or in parts that it does not do again; `done` looks at what is
    written. So nothing is there twice, whenever the process is killed.
    """

    name: str
    done: Callable[[Path], bool]  # given a checkpoint: are its results there?
    run: Callable[[Path], None]  # compute and write them


def watch(
    run: Path, evaluations: Sequence[Evaluation], once: bool = False, poll: float = 30.0
) -> None:
    """Evaluate the complete checkpoints of a run, then those to come, to the last of its schedule.

    once: only those that are there. poll: seconds between looks. A checkpoint that is removed
    before it is evaluated, as rolling ones are, is a line on stderr, and so are TasksFailed. Raises
    CheckpointError for a directory that holds no run, or at the end if tasks failed; and what else
    an evaluation raises.
    """
    last, waiting = None if once else _last_step(run), None
    failed: set[tuple[Path, str]] = set()
    while True:
        steps = found(run / "checkpoints")
        left = (
            (path, evaluation)
            for _, path in steps
            for evaluation in evaluations
            if (path, evaluation.name) not in failed and not evaluation.done(path)
        )
        if first := next(left, None):
            path, evaluation = first
            if not _evaluate(path, evaluation):
                failed.add((path, evaluation.name))
            # then look again: others may have come, or gone
        elif once or (steps and steps[-1][0] >= last):
            if failed:
                raise CheckpointError(f"tasks of {len(failed)} checkpoints failed, see above")
            return
        else:
            if waiting != (waiting := len(steps)):
                print(f"{waiting} checkpoints evaluated; the last is step {last:,}", flush=True)
            time.sleep(poll)


def _evaluate(path: Path, evaluation: Evaluation) -> bool:
    """Whether it is not to be tried again."""
    started = time.monotonic()
    try:
        evaluation.run(path)
        if not evaluation.done(path):
            raise CheckpointError(f"{path}: {evaluation.name} left no results")
    except TasksFailed as error:
        print(f"eval.watch: {path.name}: {error}", file=sys.stderr, flush=True)
        return False
    except Exception:  # whatever reading what vanishes may raise
        if path.is_dir():
            raise
        line = f"eval.watch: {path.name} was removed before {evaluation.name} read it (keep_last)"
        print(line, file=sys.stderr, flush=True)
    else:
        seconds = time.monotonic() - started
        print(f"{path.name}: {evaluation.name}, {seconds:,.1f} s", flush=True)
    return True


def _last_step(run: Path) -> int:
    """The step of the last checkpoint, by the run's config."""
    try:
        options = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return Schedule(SimpleNamespace(**options)).num_steps()
    except OSError:
        raise CheckpointError(f"{run}: no config.json there; only --once needs none") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run}/config.json: damaged ({error})") from None


# --- what is done with a checkpoint --------------------------------------------------------------


def samples(
    file: Path, prompts: Sequence[str], max_new_tokens: int, options: dict[str, object]
) -> Evaluation:
    """Greedy completions of fixed prompts, as lines of JSON.

    options: device, dtype and tokenizer, as `open_with_tokenizer` takes them.
    """

    def missing(path: Path) -> list[str]:
        known = {line["prompt"] for line in read_lines(file) if line["checkpoint"] == path.name}
        return [prompt for prompt in prompts if prompt not in known]

    def run(path: Path) -> None:
        state = read_state(path)
        at = {"training_steps": state["step"], "training_tokens": state.get("tokens", 0)}
        model, tokenizer = open_with_tokenizer(SimpleNamespace(**options, model=str(path)))
        greedy = Sampling(temperature=0)
        add_lines(
            file,
            [
                {"checkpoint": path.name, **at, "prompt": found.prompt, "text": found.text}
                for found in complete(model, tokenizer, missing(path), max_new_tokens, greedy)
            ],
        )

    return Evaluation("samples", lambda path: not missing(path), run)


def command(
    name: str,
    main: Callable[[list[str]], object],
    args_for: Callable[[Path], list[str]],
    asked: Sequence[str],
    file: Path,
) -> Evaluation:
    """A command of its own, one that does nothing again that is in its results.

    main(args_for(checkpoint)) runs it; what has been run is kept in `file`, so that a restart
    does not load every model only to find that all is there. asked: what the results depend on;
    of paths the last name counts, so that it does not matter from where they are typed.
    """
    key = [name, *(Path(part).name for part in asked)]

    def line(path: Path) -> dict:
        return {"checkpoint": path.name, "command": key}

    def run(path: Path) -> None:
        main(args_for(path))
        add_lines(file, [line(path)])

    return Evaluation(name, lambda path: line(path) in read_lines(file), run)


def read_lines(file: Path) -> list[dict]:
    """The lines of a .jsonl; none if there is no such file. Raises CheckpointError."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        return []
    except ValueError:
        raise CheckpointError(f"{file}: damaged; remove it to evaluate everything again") from None


def add_lines(file: Path, lines: list[dict]) -> None:
    """Add to a .jsonl all of them, or none if the process is killed."""
    lines = [json.dumps(line, ensure_ascii=False) for line in [*read_lines(file), *lines]]
    write_text(file, "\n".join(lines) + "\n")


# --- the command ---------------------------------------------------------------------------------


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Two watchers of one run would do everything twice. Raises CheckpointError."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        with open(run / ".watch.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, even killed
            yield
    except BlockingIOError:
        raise CheckpointError(f"{run}: another process watches it already") from None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--tasks", help="tasks of eval.harness, separated by commas")
    parser.add_argument(
        "--include_path", metavar="DIR", help="folder of your own tasks, as in eval.harness"
    )
    parser.add_argument("--needle", metavar="OPTIONS", help="run eval.needle with these, in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line; \\n is a line break")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--once", action="store_true", help="do not wait for more checkpoints")
    parser.add_argument("--poll", type=float, default=30.0, metavar="SECONDS")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not args.poll > 0:
        raise ConfigError("--max_new_tokens must be at least 1, and --poll above 0")
    return args


def read_prompts(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start:,}") from None
    prompts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file}: holds no prompt")
    return prompts


def main(argv: list[str]) -> None:
    args = parse(argv)
    run = Path(args.model)
    if not (run / "checkpoints").is_dir() and not (run / "config.json").is_file():
        raise CheckpointError(f"{run}: is not a run, the folder out_dir/name of a training config")
    names = ("device", "dtype", "tokenizer")
    options = {name: getattr(args, name) for name in names}
    model_args = [f"--{name}={value}" for name, value in options.items() if value]
    prompts = list(dict.fromkeys(read_prompts(args.prompts))) if args.prompts else PROMPTS
    ledger = run / "evaluated.jsonl"
    evaluations = [samples(run / "samples.jsonl", prompts, args.max_new_tokens, options)]
    dtype = [f"--dtype={args.dtype}"] if args.dtype else []
    if args.tasks:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

        def tasks_args(path: Path) -> list[str]:
            own = ["--include_path", args.include_path] if args.include_path else []
            return [str(path), "--tasks", args.tasks, *own, *model_args]

        names = harness.names_in(args.tasks)
        harness.check(names, args.include_path)  # a mistake is told at once
        evaluations.append(command("tasks", harness.main, tasks_args, [*names, *dtype], ledger))
    if args.needle:
        from eval import needle

        try:
            given = shlex.split(args.needle)
        except ValueError as error:
            raise ConfigError(f"--needle {args.needle}: {error}") from None

        def needle_args(path: Path) -> list[str]:
            out = run / "needle" / path.name
            return [str(path), *given, "--out", str(out), *model_args]

        find_files(needle.parse(needle_args(run)).haystack)
        evaluations.append(command("needle", needle.main, needle_args, [*given, *dtype], ledger))
    with only_one(run):
        watch(run, evaluations, args.once, args.poll)


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
