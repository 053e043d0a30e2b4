"""Our adapter against lm-evaluation-harness's own `hf` backend on the same weights, exported."""

import csv
import gzip
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED, TINY, needs_shared

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before datasets and transformers are imported
pytest.importorskip("lm_eval", reason="harness without lm_eval: make test_slow")
pytest.importorskip("transformers")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import checkpoint
from checkpoint import CheckpointError
from config.cli import ConfigError
from data import tokenizer as tokenizers
from data.dataset import DataError
from data.tokenizer import BOS, ByteLevelBPE, Tokenizer
from eval import harness, perplexity
from eval.harness import COLUMNS, GROUPS, LucieLM, Task, read_rows
from generate import Sampling, complete
from hf import to_hf
from model import Lucie, LucieConfig

pytestmark = pytest.mark.slow  # and of packages that only benchmarks need
TASKS = "tests/eval_tasks"
ROOM = 128  # two solved examples and a question are longer in some languages
MERGES = [b"la", b" la", b"es", b" d", b" de", b"al", b"it", b"ital", b"\n\n", b" M"]
TOKENIZER = Tokenizer(
    ByteLevelBPE({t: i for i, t in enumerate([*(bytes([b]) for b in range(256)), *MERGES], 4)})
)
WEIGHTS = dict(zip(COLUMNS, ("1_main", 5000, 5_700_059_136)))
GREEDY = Sampling(temperature=0)
ALL = ["capitals", "letters", "answers", "passages"]
COMMON = ["--include_path", TASKS, "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    sizes = TINY | {"vocab_size": TOKENIZER.vocab_size, "initializer_range": 0.15}
    return Lucie(LucieConfig(**sizes, max_position_embeddings=ROOM), seed=1)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model as others read it."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    to_hf(model, folder)
    tokenizers.save_folder(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=TASKS, include_defaults=False)


def hf_backend(folder, batch_size=1, **options):
    """add_bos_token=False: for rolling, where `hf` puts a `<s>` before texts, and the tokenizer
    would add a second one."""
    return HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch_size, **options
    )


def ours(model, batch_size=1):
    return LucieLM(model, TOKENIZER, batch_tokens=1 if batch_size == 1 else batch_size * ROOM)


def evaluate(model, name, out):
    manager, tasks = harness.tasks_of([name], TASKS)
    harness.evaluate(ours(model, 8), manager, *tasks, WEIGHTS, out)
    return read_rows(out)


def requests(kind, arguments):
    return [Instance(kind, {}, args, 0) for args in arguments]


def of_tasks(manager, kind, *names):
    """All requests of a kind that tasks make."""
    found = []
    for task in manager.load(list(names))["tasks"].values():
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests()
        found += [instance for instance in task.instances if instance.request_type == kind]
    assert found
    return found


# --- what is computed ----------------------------------------------------------------------------

ODD = [
    ("", "Paris"),
    ("", " Paris"),
    ("\n\n", "Paris"),
    ("La capitale de ", "la France"),
    ("La capitale de  \n", " la France"),
    ("l", "a"),  # one token: nothing is left for the continuation but a
    ("e", "\u0301t\u0301 ? la"),  # becomes a letter with the one before it
    ("<s>La capitale", " de"),
    ("", "<s>La capitale"),
    ("fin</s>", "début"),
    ("a" * 2 * ROOM, "b" * ROOM),
    ("même", " fin"),
    ("même", " fil"),
]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_likelihoods_are_those_of_the_hf_backend(
    model, folder, manager, monkeypatch, batch_size
):
    """Multiple choice in five languages with solved examples, letters, odd pairs, and one whose
    continuation is what greedy decoding gives."""
    monkeypatch.setattr(perplexity, "HEAD_ROWS", 7)
    letters = [chr(c) for c in range(ord("a"), ord("z"))]
    found = [(x.prompt, x.text) for x in complete(model, TOKENIZER, letters, 1, GREEDY)]
    plain = [(a, b) for a, b in found if b.isascii() and b.strip()]
    greedy = [(a, b) for a, b in plain if (a + b).encode() not in MERGES]
    assert len(greedy) > 5
    asked = of_tasks(manager, "loglikelihood", "capitals", "letters")
    odd = [pair for pair in ODD if pair != ("l", "a")]  # `hf` stops at an empty continuation
    asked += requests("loglikelihood", [*odd, *greedy])
    found = ours(model, batch_size).loglikelihood(asked, disable_tqdm=True)
    expected = hf_backend(folder, batch_size).loglikelihood(asked, disable_tqdm=True)
    for request, one, other in zip(asked, found, expected):
        assert one[0] == pytest.approx(other[0], abs=1e-4, rel=1e-6), request.args
        assert one[1] == other[1], request.args
    likeliest = [likeliest for _, likeliest in found]
    assert all(likeliest[-len(greedy) :]) and not all(likeliest[: -len(greedy)])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rolling_log_likelihoods_are_those_of_the_hf_backend(model, folder, manager, batch_size):
    asked = of_tasks(manager, "loglikelihood_rolling", "passages")
    texts = ["é", "x" * ROOM, "x" * (ROOM + 1), "<unk> and </s>", " two\n\n"]
    asked += requests("loglikelihood_rolling", [(text,) for text in texts])
    found = ours(model, batch_size).loglikelihood_rolling(asked)
    reference = hf_backend(folder, batch_size, add_bos_token=False)
    expected = reference.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)
    assert ours(model).loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_continuations_are_those_of_the_hf_backend(model, folder, manager, batch_size):
    """Of short, long and empty contexts, up to a text to stop at, in several manners."""
    asked = of_tasks(manager, "generate_until", "answers")
    contexts = ["", "a", "Il y a", "la Seine " * 30, "x " * 52, "Où ?"]
    for until, new in (([], 40), (["e"], 40), (["al", "\n"], 100), ("a", 1), (["es", "zz"], 9)):
        how = {"until": until, "max_gen_toks": new, "do_sample": False}
        asked += requests("generate_until", [(context, how) for context in contexts])
    found = ours(model, batch_size).generate_until(asked)
    expected = hf_backend(folder, batch_size).generate_until(asked, disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > 10 and max(map(len, found)) >= 40


@pytest.mark.parametrize("name", ALL)
def test_scores_are_those_of_the_hf_backend(model, folder, manager, tmp_path, name):
    """All of them and their errors, in the columns of the published tables."""
    options = {"add_bos_token": False} if name == "passages" else {}
    results = simple_evaluate(
        hf_backend(folder, 8, **options), tasks=[name], task_manager=manager, log_samples=False
    )["results"]
    expected = {
        (dataset, score, values.get(score.replace(",", "_stderr,"))): value
        for dataset, values in results.items()
        for score, value in values.items()
        if "," in score and "_stderr" not in score
    }
    rows = evaluate(model, name, tmp_path / "x.csv")
    assert len(rows) == len(expected) and all(tuple(row) == COLUMNS for row in rows)
    for row, ((dataset, score_name, stderr), score) in zip(rows, expected.items()):
        whose = ["1_main", "5000.0", "5700059136.0", name, dataset]
        assert [*row.values()][:5] == whose and row["score_name"] == score_name
        assert float(row["score"]) == pytest.approx(score, rel=1e-5)
        if isinstance(stderr, float):
            assert float(row["stderr"]) == pytest.approx(stderr, rel=0.02, abs=1e-6)
    if name == "capitals":  # none of a mean over tasks
        assert [row["num_fewshot"] for row in rows] == ["2.0"] * 10 + [""]


# --- how it is computed --------------------------------------------------------------------------


@pytest.fixture
def read(model, monkeypatch):
    """The rows of ids that the model reads, without padding at their ends."""
    rows, hidden = [], model.hidden

    def spy(tokens, *args, **kwargs):
        rows.append(tokens.tolist())
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", spy)
    return rows


def test_one_bos(model, read):
    """At the beginning of all that is not cut there, whatever the kind of request."""
    lm = ours(model)
    pairs = [("", "a"), ("b ", "c"), ("<s>d", "e"), ("<s><s>n", "o")]
    lm.loglikelihood(requests("loglikelihood", pairs))
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("fg",), ("<s>hi",)]))
    asked = [(text, {"max_gen_toks": 1}) for text in ("", "jk", "<s>lm", "<s><s>pq")]
    lm.generate_until(requests("generate_until", asked))
    rows = [row for batch in read for row in batch]
    assert len(rows) == 10
    assert all(row[0] == BOS and BOS not in row[1:] for row in rows)


def test_letters_of_one_question_are_read_once_the_longest_first(model, manager, read):
    asked = of_tasks(manager, "loglikelihood", "letters")
    LucieLM(model, TOKENIZER, batch_tokens=2 * ROOM).loglikelihood(asked)
    assert len(asked) == 28 and sum(map(len, read)) == 7
    lengths = [len(batch[0]) for batch in read]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert all(len(batch) * len(batch[0]) <= 2 * ROOM for batch in read)


@pytest.mark.parametrize(
    "kind,arguments,message",
    [
        ("loglikelihood", ("a", "b" * (ROOM + 1)), "129 tokens, the model's context 128"),
        ("generate_until", ("a", {"max_gen_toks": ROOM}), "max_gen_toks is 1 to 127"),
        ("generate_until", ("a", {"num_beams": 4}), "num_beams.*only greedy decoding"),
        ("generate_until", ("a", {"do_sample": True}), "do_sample.*only greedy decoding"),
    ],
)
def test_what_does_not_fit_is_named(model, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours(model), kind)(requests(kind, [arguments]))


def test_the_model_and_generators_are_left_as_they_were(model, tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for training in (True, False):
        model.train(training)
        evaluate(model, "letters", tmp_path / "e.csv")
        assert model.training == training
    assert states() == before


# --- the command ---------------------------------------------------------------------------------


SCHEDULE = dict(
    samples=16, global_batch_size=4, batch_ramp_samples=0, batch_ramp_start=4,
    batch_ramp_increment=1, learning_rate=1e-3, min_learning_rate=0.0, warmup_samples=0,
    lr_decay="constant", checkpoint_every=1, checkpoint_early_every=0, checkpoint_early_steps=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run whose four steps all left a checkpoint, after 1,000 steps of another one."""
    run = tmp_path_factory.mktemp("runs") / "tiny_extension"
    run.mkdir()
    tokenizers.save(TOKENIZER.bpe.ranks, run / "ranks")
    options = vars(model.config) | SCHEDULE | {"seq_len": ROOM, "name": run.name}
    options["tokenizer"] = str(run / "ranks")
    del options["max_position_embeddings"]
    (run / "config.json").write_text(json.dumps(options))
    trained = Lucie(model.config)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    for step in range(1, 5):
        x = torch.full((1, 8), step + 4)
        trained(x, x).backward()
        optimizer.step()
        state = {"step": step, "samples": 4 * step, "tokens": 512 * step, "config": options}
        state["trained_before"] = {"training_steps": 1000, "training_tokens": 9}
        name = f"checkpoints/step{step:07d}"
        checkpoint.save(run / name, trained, optimizer, state)
    return run


def test_follow_evaluates_each_checkpoint_once_over_restarts(whole, tmp_path, monkeypatch, capsys):
    """Checkpoints come one by one; the process is killed in the second, before and after its table
    is written; the third is removed, as a rolling one, while it is evaluated."""
    run = tmp_path / whole.name
    run.mkdir()
    shutil.copy(whole / "config.json", run)
    coming = sorted((whole / "checkpoints").iterdir())
    args = [str(run), "--tasks=letters,passages", *COMMON, "--samples", "--all_checkpoints"]

    def appears(*_):
        path = coming.pop(0)
        shutil.copytree(path, run / "checkpoints" / path.name)

    def opened(args, source, opener=harness.open_model):
        if source.endswith("3"):
            shutil.rmtree(source)
        return opener(args, source)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.time, "sleep", appears)
    monkeypatch.setattr(harness, "open_model", opened)
    for name in ("add_rows", "write_file"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(harness, name, killed)
            harness.main([*args, "--follow"])
    assert harness.main([*args, "--follow"]) == 0
    assert "step0000003 was removed before it was evaluated" in capsys.readouterr().err
    rows = read_rows(run / "evaluation.csv")
    found = [(row["training_steps"], row["dataset"], row["score_name"]) for row in rows]
    assert len(found) == len(set(found)) == 3 * 4
    assert list(dict.fromkeys(step for step, *_ in found)) == ["1001.0", "1002.0", "1004.0"]
    assert {row["training_phase"] for row in rows} == {"2_extension"}
    assert rows[-1]["training_tokens"] == "2057.0"
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [line["checkpoint"] for line in lines] == [
        f"step000000{step}" for step in (1, 2, 4) for _ in harness.PROMPTS
    ]
    assert (run / "evaluation" / "2_extension_step0001004" / "passages.json").is_file()
    # All is done; --limit writes files of its own, of the newest checkpoint alone.
    monkeypatch.setattr(harness, "open_model", killed)
    assert harness.main(args) == 0
    monkeypatch.setattr(harness, "open_model", opened)
    assert harness.main([*args[:-1], "--limit=2"]) == 0
    limited = read_rows(run / "evaluation_limit2.csv")
    assert [row["training_steps"] for row in limited] == ["1004.0"] * 4


def test_tasks_that_fail_do_not_stop_the_others(folder, tmp_path, capsys):
    shutil.copytree(TASKS, tmp_path / "tasks")
    passages = (tmp_path / "tasks" / "passages.yaml").read_text()
    gone = passages.replace("task: passages", "task: gone").replace("passages.jsonl", "none.jsonl")
    (tmp_path / "tasks" / "gone.yaml").write_text(gone)
    args = ["--tasks=gone,letters", "--include_path", str(tmp_path / "tasks"), "--device=cpu"]
    args = [f"hf:{folder}", *args, "--out", str(tmp_path / "e.csv")]
    assert harness.main(args) == 2
    out, err = capsys.readouterr()
    assert "harness.py: tiny: gone: " in err and "letters  " in out
    assert {row["dataset"] for row in read_rows(tmp_path / "e.csv")} == {"letters"}


def test_two_ranks_give_the_scores_of_one(folder, tmp_path):
    args = [f"hf:{folder}", "--tasks", ",".join(ALL), *COMMON, "--out"]
    assert harness.main([str(arg) for arg in [*args, tmp_path / "1.csv"]]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "eval.harness"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, *map(str, args), tmp_path / "2.csv"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("capitals_it") == 2  # two scores, and one rank that shows them
    tables = [read_rows(tmp_path / f"{ranks}.csv") for ranks in (1, 2)]
    assert len(tables[0]) == len(tables[1]) == 16
    for one, other in zip(*tables):
        for name in ("score", "stderr"):
            values = [float(row.pop(name) or 0) for row in (one, other)]
            assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert one == other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["/tmp/none", "--tasks=letters"], "/tmp/none: no such|/tmp/none/config.json: No such"),
        (["{}"], "nothing to do: use --tasks NAMES, --samples, or both"),
        (["{}", "--tasks=letters", "--out=x.json"], "must end with .csv"),
        (["{}", "--tasks=a", "--include_path=/tmp/none"], "no such folder of tasks"),
        (["{}", "--tasks=letters", "--all_checkpoints"], "no complete checkpoint there"),
        (["{}", "--tasks=letters", "--out=log.csv"], "log.csv: not a table of scores"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, args, message):
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    shutil.copytree(TASKS, tmp_path / TASKS)
    monkeypatch.chdir(tmp_path)
    args = [*COMMON, *(arg.format(folder) for arg in args)]
    with pytest.raises((CheckpointError, ConfigError, DataError, ValueError), match=message):
        harness.main(args)
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,2\n"


def test_without_lm_eval_one_line_says_how_to_install_it(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="is missing: pip install -r requirements-eval"):
        harness.main([str(folder), "--tasks=letters", *COMMON])


# --- which tasks ---------------------------------------------------------------------------------


def test_names_of_tasks(monkeypatch, manager):
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)  # not 14,000 files
    _, tasks = harness.tasks_of(["answers", "capitals", "answers"], TASKS)
    assert tasks == [Task("answers", "answers", None), Task("capitals", "capitals", None)]
    with pytest.raises(ConfigError, match=r"no task capitales: .*; did you mean 'capitals'\?"):
        harness.tasks_of(["capitales"], TASKS)

    class Index:
        task_index = {task: None for table in GROUPS.values() for b in table.values() for task in b}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: Index)
    assert harness.tasks_of(["arc_challenge"], None)[1] == [Task("openllm", "arc_challenge", 25)]


@needs_shared
def test_groups_are_those_of_the_published_tables():
    """Their benchmarks and tasks, and the number of few-shot examples of each."""
    published = {}
    for table in ("evaluation_learning_curve", "evaluation_baselines"):
        with gzip.open(SHARED / "lucie" / f"{table}.csv.gz", "rt", newline="") as file:
            reader = csv.DictReader(file)
            assert table == "evaluation_baselines" or tuple(reader.fieldnames) == COLUMNS
            for row in reader:
                shots = int(float(row["num_fewshot"])) if row["num_fewshot"] else None
                benchmark = row["benchmark"].replace("multilingual", "okapi")
                published[benchmark, row["dataset"]] = shots
    groups = [table for group in GROUPS.values() for table in group.items()]
    assert {benchmark for benchmark, _ in published} == {benchmark for benchmark, _ in groups}
    for benchmark, tasks in groups:
        for task, shots in tasks.items():
            assert published[benchmark, task] in (shots, None), task  # None: a mean over subjects
