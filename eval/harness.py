"""Lucie's benchmarks, with lm-evaluation-harness (pip install -r requirements-eval.txt).

    python -m eval.harness out/pretrain --tasks french,english
    python -m eval.harness out/pretrain --tasks french --samples --all_checkpoints --follow
    torchrun --nproc-per-node=8 -m eval.harness hf:OpenLLM-France/Lucie-7B --tasks arc_challenge
    python -m eval.harness out/demo_pretrain --tasks mine --include_path my_tasks

Tasks are french, english, multilingual, leaderboard-fr (what Lucie was evaluated on: tasks.json;
the last group needs its YAML files in --include_path) and any name of lm-evaluation-harness. Those
that Lucie ran get the same number of few-shot examples. Your own YAML and JSONL need no network.

    RUN/evaluation.csv                             scores, in the columns Lucie published
        evaluation/1_main_step0005000/mmlu_5shot.json   all that lm-evaluation-harness reports
        samples.jsonl                              with --samples: greedy completions

A task that has its JSON is not evaluated again, so a killed command continues when it is given
again. A task that fails is one line on stderr and does not stop the others. With --limit N, names
begin with evaluation_limitN. Under torchrun every rank holds the whole model and answers its share.
"""

import argparse
import csv
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import hf
from checkpoint import CheckpointError
from config.cli import ConfigError, in_one_line, nearest, run_cli, write_file
from data.dataset import DataError
from data.tokenizer import BOS, EOS, Tokenizer
from eval.perplexity import model_parser, newest_of, open_model, token_scores, write_table
from generate import Decoder, Sampling, complete, decode
from model import Lucie
from parallel import gather, rank, start_processes, together, world_size
from schedule import Schedule

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # tasks_of says how to install it
    TemplateLM = object

# {group: {benchmark, as Lucie's tables name it: {task: few-shot examples, null for its own}}}
GROUPS = json.loads(Path(__file__).with_name("tasks.json").read_text(encoding="utf-8"))
COLUMNS = ("training_phase", "training_steps", "training_tokens", "benchmark", "dataset")
COLUMNS += ("num_fewshot", "score_name", "score", "stderr")
PHASES = {"pretrain": "1_main", "extension": "2_extension", "annealing": "3_annealing"}
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
PROMPTS = (
    "The capital of France is", "La capitale de la France est", "Die Hauptstadt von Frankreich ist",
    "La capital de Francia es", "La capitale della Francia è",
)  # fmt: skip


class Task(NamedTuple):
    benchmark: str
    name: str
    num_fewshot: int | None


# --- Lucie as a model of lm-evaluation-harness ----------------------------------------------------


class LucieLM(TemplateLM):
    """Answers requests; TemplateLM splits a context and its continuation into ids.

    batch_tokens: ids in one forward pass, with padding and the tokens to be generated.
    """

    eot_token_id, prefix_token_id = EOS, BOS

    def __init__(
        self, model: Lucie, tokenizer: Tokenizer, batch_tokens: int = 16_384, label: str = ""
    ) -> None:
        super().__init__()
        self.model, self._tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.label, self.room = label, model.config.max_position_embeddings
        self._device = model.embed_tokens.weight.device

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Exactly one `<s>` begins the ids, or none if add_special_tokens is False."""
        while string.startswith("<s>"):
            string = string.removeprefix("<s>")
        return self._tokenizer.encode(string)[add_special_tokens is False :]

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding gives it) of each
        (texts, ids of a context, ids of its continuation). A context that is too long loses its
        beginning. Raises ValueError for a continuation longer than the model's context.

        Requests that differ only in their last id, such as the letters of a multiple-choice
        question, are read once.
        """
        readers: dict[tuple, list[tuple[int, list[int]]]] = {}  # {what is read: what it answers}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.room:
                size = f"a continuation has {len(continuation):,} tokens"
                raise ValueError(f"{size}, the model's context {self.room:,}")
            if continuation:
                read = tuple([*context, *continuation][-self.room - 1 : -1])
                readers.setdefault(read, []).append((number, continuation))
        items = [(read, [ids for _, ids in asked]) for read, asked in readers.items()]
        answers = [(0.0, True)] * len(requests)  # an empty continuation is certain
        found = self._share(items, lambda item: len(item[0]), self._scores)
        for asked, scores in zip(readers.values(), found):
            for (number, _), score in zip(asked, scores):
                answers[number] = score
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text (nats): of all its ids but `<s>`, each once, in windows as
        long as the context. The last window reaches back to be full; the others begin with the
        last id of the one before."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pieces, owners, totals = [], [], [0.0] * len(requests)
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, BOS, self.room, 1):
                pieces.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pieces)):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What follows each (context, generation_kwargs), up to `</s>`, a text of "until", or
        max_gen_toks (256 by default). Texts are greedy and do not depend on batches or ranks.

        Raises ValueError for generation_kwargs that are not known here, or for max_gen_toks that
        leave no room for a context.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        alike: dict[str, list[int]] = {}  # {generation_kwargs: requests}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts, decoder = [""] * len(requests), Decoder(self.model)

        def work(batch: list[tuple]) -> list[str]:
            return self._continued(batch, decoder)

        for asked, numbers in alike.items():
            how = normalize_gen_kwargs(json.loads(asked))
            stops, new = handle_stop_sequences(how["until"], "</s>"), how["max_gen_toks"]
            if how.keys() - KNOWN or how["do_sample"]:
                raise ValueError(f"generation_kwargs {asked}: only greedy decoding is known here")
            if not 0 < new < self.room:
                limits = f"max_gen_toks is 1 to {self.room - 1:,} with this model's context"
                raise ValueError(f"{limits}, not {new:,}: set it in the task's generation_kwargs")
            stops, room = [stop for stop in stops if stop], self.room - new
            contexts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            prompts = [(ids, new, stops) for ids in contexts]
            found = self._share(prompts, lambda prompt: len(prompt[0]) + prompt[1], work)
            for number, text in zip(numbers, found):
                texts[number] = text
        return texts

    def _share(self, items: Sequence, size: Callable[[Any], int], work: Callable) -> list:
        """The answers to items. Each rank takes every world-th of them, the largest first, so that
        a lack of memory shows at once; work(items) answers a batch."""
        order = sorted(range(len(items)), key=lambda number: -size(items[number]))

        def mine() -> dict[int, Any]:
            rest, answers = order[rank() :: world_size()], {}
            with tqdm(desc=self.label, total=len(rest), disable=rank() > 0) as bar:
                while rest:
                    count = max(1, self.batch_tokens // size(items[rest[0]]))
                    batch, rest = rest[:count], rest[count:]
                    answers |= zip(batch, work([items[number] for number in batch]))
                    bar.update(len(batch))
            return answers

        found = {}
        for part in gather(together(mine, errors=(ValueError, torch.OutOfMemoryError))):
            found |= part
        return [found[number] for number in range(len(items))]

    @torch.no_grad()
    def _scores(self, batch: list[tuple[tuple, list]]) -> list[list[tuple[float, bool]]]:
        """For each (ids to read, continuations that end one id after them): a score for each
        continuation. The floor is 2 N FLOPs per id read, and 2 D V per id scored."""
        tokens = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.int64)  # the longest first
        for row, (read, _) in zip(tokens, batch):
            row[: len(read)] = torch.tensor(read)
        found = []
        for hidden, (read, continuations) in zip(self.model.hidden(tokens.to(self._device)), batch):
            found.append([])
            for ids in continuations:
                targets = torch.tensor(ids, device=self._device)
                rows = hidden[len(read) - len(ids) : len(read)]
                nats, likeliest = token_scores(self.model, rows, targets)
                found[-1].append((float(nats.cpu().double().sum()), bool(likeliest.all())))
        return found

    def _continued(self, batch: list[tuple], decoder: Decoder) -> list[str]:
        """The greedy text after each (prompt ids, max_gen_toks, stop texts)."""
        _, new, stops = batch[0]
        ids: list[list[int]] = [[] for _ in batch]
        prompts = [prompt for prompt, *_ in batch]
        steps = decode(self.model, prompts, new, Sampling(temperature=0), decoder=decoder)
        for number, step in enumerate(steps, 1):
            for row, token, _ in step:
                ids[row].append(token)
            if number % 16 == 0:  # reading texts at every step would take longer
                texts = [self._tokenizer.decode(row) for row in ids]
                if all(
                    row[-1] in self.model.eos_token_ids or any(stop in text for stop in stops)
                    for row, text in zip(ids, texts)
                ):
                    break
        texts = [self._tokenizer.decode(row) for row in ids]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


# --- what is evaluated and recorded ---------------------------------------------------------------


def tasks_of(names: Sequence[str], include_path: str | None) -> tuple:
    """(lm-evaluation-harness's TaskManager, the tasks that names stand for, each once).

    Raises ConfigError if lm-evaluation-harness, a name or the folder of include_path is missing.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        install = "pip install -r requirements-eval.txt"
        raise ConfigError(f"{error.name} is missing: {install}") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"{include_path}: no such folder of tasks")
    published = {
        group: [Task(b, name, shots) for b, tasks in table.items() for name, shots in tasks.items()]
        for group, table in GROUPS.items()
    }
    by_name = {task.name: [task] for tasks in published.values() for task in tasks} | published
    tasks = [task for name in names for task in by_name.get(name, [Task(name, name, None)])]
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if any(task.name not in manager.task_index for task in tasks):
        manager = TaskManager(include_path=include_path)  # reads 14,000 files
    for task in tasks:
        if task.name not in manager.task_index:
            hint = nearest(task.name, [*GROUPS, *manager.task_index])
            raise ConfigError(f"no task {task.name}: --include_path DIR for your own{hint}")
    return manager, list(dict.fromkeys(tasks))


def weights_of(source: str) -> dict[str, Any]:
    """Which weights those of a checkpoint or of a model in the Hugging Face layout are: the first
    three of COLUMNS, steps and tokens over all phases or None if they are unknown."""
    state_file = Path(source) / "state.json"
    if not source.startswith("hf:") and state_file.is_file():
        state = checkpoint.read_state(source)
        name, trained = state["config"].get("name", ""), hf.trained(state)
        name = next((phase for word, phase in PHASES.items() if word in name), name)
    else:
        path = source.removeprefix("hf:")
        folder = hf.folder_of(path) if source.startswith("hf:") else Path(source)
        name, trained = Path(path).name, hf.training_of(folder)
    return dict.fromkeys(COLUMNS[:3]) | {"training_phase": name} | trained


def evaluate(lm: LucieLM, manager: Any, task: Task, weights: dict, out: Path, limit=None) -> None:
    """Evaluate one task; rank 0 shows its scores, puts them into `out` and all results beside it.

    Every rank calls this with the whole model, which is in its mode afterwards, as the generators
    of random numbers are where they were. Raises what the task raises.
    """
    from lm_eval.evaluator import simple_evaluate

    options = {"num_fewshot": task.num_fewshot, "task_manager": manager, "limit": limit}
    options["bootstrap_iters"] = 100_000 if rank() == 0 else 0  # for errors without a formula
    training, python, numpy = lm.model.training, random.getstate(), np.random.get_state()
    device = lm.model.embed_tokens.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            lm.model.eval()
            if world_size() > 1:  # a task that one rank cannot load fails on all
                together(manager.load, [task.name], errors=(Exception,))
            results = simple_evaluate(lm, tasks=[task.name], log_samples=False, **options)
        finally:
            lm.model.train(training)
            random.setstate(python)
            np.random.set_state(numpy)
    if rank() == 0:
        file = record_of(out, weights, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = rows_of(results, task, weights)
        for row in rows:
            error = f" ± {float(row['stderr']):.4f}" if row["stderr"] else ""
            print(f"{row['dataset']:36} {row['score_name']:24} {float(row['score']):.4f}{error}")
        add_rows(out, rows)
        write_file(file, json.dumps(results, indent=1, ensure_ascii=False, default=str).encode())


def record_of(out: Path, weights: dict, task: Task) -> Path:
    """The JSON of a task; it is written last, so where it exists the scores are in `out`."""
    phase, steps, _ = weights.values()
    folder = phase if steps is None else f"{phase}_step{steps:07d}"
    shots = "" if task.num_fewshot is None else f"_{task.num_fewshot}shot"
    return out.with_suffix("") / folder / f"{task.name}{shots}.json"


def rows_of(results: dict, task: Task, weights: dict) -> list[dict]:
    """A row for each score of each dataset, spelt as in Lucie's tables."""
    rows = []
    for dataset, scores in results["results"].items():
        shots = results["n-shot"][dataset] if dataset in results["configs"] else None
        name = dataset.rpartition("::")[2]  # of a group defined within another one
        if name.startswith("mmlu_") and name.endswith("_continuation"):
            name = f"mmlu_continuation_{name[len('mmlu_') : -len('_continuation')]}"
        for score_name, score in scores.items():
            metric, comma, kind = score_name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            values = [*weights.values(), task.benchmark, name, shots, score_name, score]
            values += [error if isinstance(error, float) else None]
            texts = (str(float(v)) if isinstance(v, int | float) else v or "" for v in values)
            rows.append(dict(zip(COLUMNS, texts)))
    return rows


def read_rows(out: Path) -> list[dict]:
    """The rows of a table of scores, none if there is no file. Raises DataError for another one."""
    if not out.exists():
        return []
    with out.open(encoding="utf-8", errors="replace", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) == COLUMNS:
            return list(reader)
    raise DataError(f"{out}: not a table of scores with the columns {','.join(COLUMNS)}")


def add_rows(out: Path, rows: list[dict]) -> None:
    """Put rows in the table; a score that is there already is replaced."""
    table = {tuple(row[name] for name in COLUMNS[:7]): row for row in [*read_rows(out), *rows]}
    write_table(out, COLUMNS, (row.values() for row in table.values()))


# --- the command ----------------------------------------------------------------------------------


def checkpoints(run: Path, follow: bool) -> Iterator[str]:
    """The complete checkpoints of a run, the oldest first, each once. follow: also those to come,
    up to that of the run's last step. Raises CheckpointError if there are none."""
    last, seen = 0, set()
    if follow:
        options = hf.read_json(run / "config.json")
        last = Schedule(SimpleNamespace(**options)).num_steps()
    while True:
        there = gather(checkpoint.found(run / "checkpoints"))[0]
        if new := [path for _, path in there if path not in seen]:
            seen.add(new[0])
            yield str(new[0])  # then look again: others may have come, or gone
        elif not follow or (there and there[-1][0] >= last):
            break
        else:
            time.sleep(30)
    if not seen:
        raise CheckpointError(f"{run}: no complete checkpoint there")


def evaluate_source(
    source: str, run: Path, args: argparse.Namespace, manager: Any, tasks: Sequence[Task]
) -> bool:
    """Do for one checkpoint or model what is not done yet; whether all tasks succeeded."""
    name, fine = Path(source).name, True
    weights = weights_of(source)
    out = args.out or run / f"evaluation{f'_limit{args.limit}' if args.limit else ''}.csv"
    read_rows(out)  # an error now, not after hours
    left = [task for task in tasks if not record_of(out, weights, task).is_file()]
    file = run / "samples.jsonl"
    samples = file.read_text(encoding="utf-8") if args.samples and file.is_file() else ""
    sampled = not args.samples or json.dumps({"checkpoint": name})[1:-1] in samples
    left, sampled = gather((left, sampled))[0]
    if left or not sampled:
        errors = (CheckpointError, DataError, OSError, ValueError)
        model, tokenizer = together(open_model, args, source, errors=errors)
    if not sampled and rank() == 0:
        for done in complete(model, tokenizer, PROMPTS, 48, Sampling(temperature=0)):
            line = {"checkpoint": name} | weights | {"prompt": done.prompt, "text": done.text}
            samples += json.dumps(line, ensure_ascii=False) + "\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, samples.encode())
    for number, task in enumerate(left, start=1):
        label = f"{name}: {task.name} ({number}/{len(left)})"
        try:
            lm = LucieLM(model, tokenizer, args.batch_tokens, label)
            evaluate(lm, manager, task, weights, out, args.limit)
        except Exception as error:  # a task brings code of its own
            if world_size() > 1 and not getattr(error, "on_all_ranks", False):
                raise  # the other ranks, which know nothing of it, must not wait
            fine, reason = False, f"{type(error).__name__}: {in_one_line(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                reason = f"out of memory, try --batch_tokens {args.batch_tokens // 2}"
            if rank() == 0:
                print(f"harness.py: {name}: {task.name}: {reason}", file=sys.stderr, flush=True)
    return fine


def main(argv: list[str]) -> int:
    parser = model_parser("python -m eval.harness", __doc__)
    parser.add_argument("--tasks", default="", help="names, separated by commas")
    parser.add_argument("--limit", type=int, help="only this many questions of each task")
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=16_384,
        help="tokens in one forward pass; default: %(default)s",
    )
    parser.add_argument("--include_path", metavar="DIR", help="folder of your own YAML tasks")
    parser.add_argument("--samples", action="store_true", help="complete five prompts as well")
    every = "evaluate every checkpoint of a run, the oldest first"
    parser.add_argument("--all_checkpoints", action="store_true", help=every)
    follow = "the same, and wait for more until the run's last step"
    parser.add_argument("--follow", action="store_true", help=follow)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="table of scores; default: RUN/evaluation.csv"
    )
    args = parser.parse_args(argv)
    for name in ("limit", "batch_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1")
    args.tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not args.tasks and not args.samples:
        raise ConfigError("nothing to do: use --tasks NAMES, --samples, or both")
    if args.out and args.out.suffix != ".csv":
        raise ConfigError(f"--out {args.out}: the name must end with .csv")
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # A mistake is reported before minutes of loading.
    tasks = tasks_of(args.tasks, args.include_path) if args.tasks else (None, [])
    if "RANK" in os.environ and not dist.is_initialized():
        start_processes(torch.device(args.device))
    source, run = newest_of(args.model)
    every, fine = args.all_checkpoints or args.follow, True
    run = Path(args.model) if every else run
    for path in checkpoints(run, args.follow) if every else [source]:
        try:
            fine &= evaluate_source(path, run, args, *tasks)
        except (CheckpointError, OSError):
            if not every or gather(Path(path).is_dir())[0]:
                raise
            if rank() == 0:
                print(f"harness.py: {path} was removed before it was evaluated", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if fine else 2


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
