"""Our adapter against lm-evaluation-harness's own `hf` backend on the same weights, exported."""

import csv
import gzip
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
from eval import adapter, harness, scores
from eval.adapter import LucieLM
from eval.harness import TasksFailed
from eval.opening import fingerprint
from eval.scores import Weights
from eval.tasks import GROUPS, PUBLISHED, Task, spelt
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
WEIGHTS = Weights("1_main", 5000, 5_700_059_136)
GREEDY = Sampling(temperature=0)
ALL = ["capitals", "letters", "answers", "passages"]


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
    (" ", "Paris"),
    ("\n\n", "Paris"),
    ("La capitale de ", "la France"),
    ("La capitale de  \n", " la France"),
    ("l", "a"),  # one token: nothing is left for the continuation but a
    ("la capi", "tale"),
    ("e", "\u0301t\u0301 ? la"),  # becomes a letter with the one before it
    ("<s>La capitale", " de"),
    ("", "<s>La capitale"),
    ("fin</s>", "début"),
    ("a b " * 100, "la Seine"),
    ("a", "la Seine " * 14),
    ("a" * 2 * ROOM, "b" * ROOM),
    ("même", " fin"),
    ("même", " fin"),
    ("même", " fil"),
]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_likelihoods_are_those_of_the_hf_backend(model, folder, manager, batch_size):
    """Multiple choice in five languages with solved examples, letters, odd pairs, and one whose
    continuation is what greedy decoding gives."""
    letters = [chr(c) for c in range(ord("a"), ord("z"))]
    greedy = [(x.prompt, x.text) for x in complete(model, TOKENIZER, letters, 1, GREEDY)]
    greedy = [
        (a, b) for a, b in greedy if b.isascii() and b.strip() and (a + b).encode() not in MERGES
    ]
    asked = of_tasks(manager, "loglikelihood", "capitals", "letters")
    odd = [pair for pair in ODD if pair != ("l", "a")]  # `hf` stops at an empty continuation
    asked += requests("loglikelihood", [*odd, *greedy])
    found = ours(model, batch_size).loglikelihood(asked)
    expected = hf_backend(folder, batch_size).loglikelihood(asked, disable_tqdm=True)
    for request, one, other in zip(asked, found, expected):
        assert one[0] == pytest.approx(other[0], abs=1e-4, rel=1e-6), request.args
        assert one[1] == other[1], request.args
    likeliest = [likeliest for _, likeliest in found]
    assert all(likeliest[-len(greedy) :]) and len(greedy) > 5
    assert not all(likeliest[: -len(greedy)])


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
    """All of them and their errors, down to the table."""
    options = {"add_bos_token": False} if name == "passages" else {}
    reference = hf_backend(folder, 8, **options)
    results = simple_evaluate(
        reference, tasks=[name], task_manager=manager, log_samples=False, bootstrap_iters=100
    )
    expected = {}
    for dataset, values in results["results"].items():
        for score, value in values.items():
            if "," in score and "_stderr" not in score:
                expected[dataset, score] = value
    rows = harness.evaluate(model, TOKENIZER, [name], WEIGHTS, tmp_path / "x.csv", **own())
    found = {(row["dataset"], row["score_name"]): float(row["score"]) for row in rows}
    assert found == pytest.approx(expected, rel=1e-5)
    assert name != "capitals" or len(found) == 11


def own(**options):
    return {"include_path": TASKS} | options


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


def test_one_bos(model, manager, read):
    """At the beginning of all that is not cut there, whatever the kind of request."""
    lm = ours(model)
    pairs = [("", "a"), ("b ", "c"), ("<s>d", "e"), ("<s><s>n", "o")]
    lm.loglikelihood(requests("loglikelihood", pairs))
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("fg",), ("<s>hi",)]))
    how = {"max_gen_toks": 1}
    asked = [(text, how) for text in ("", "jk", "<s>lm", "<s><s>pq")]
    lm.generate_until(requests("generate_until", asked))
    rows = [row for batch in read for row in batch]
    assert len(rows) == 10
    assert all(row[0] == BOS and BOS not in row[1:] for row in rows)


def test_scores_do_not_depend_on_the_batch(model, manager, monkeypatch):
    asked = of_tasks(manager, "loglikelihood", "capitals")
    alone = ours(model, 1).loglikelihood(asked)
    monkeypatch.setattr(adapter, "HEAD_ROWS", 7)
    for batch_tokens in (300, 1000, 100_000):
        together = LucieLM(model, TOKENIZER, batch_tokens).loglikelihood(asked)
        for one, other in zip(alone, together):
            assert one == (pytest.approx(other[0], abs=1e-5), other[1])


def test_letters_of_one_question_are_read_once_the_longest_first(model, manager, read):
    asked = of_tasks(manager, "loglikelihood", "letters")
    LucieLM(model, TOKENIZER, batch_tokens=2 * ROOM).loglikelihood(asked)
    assert len(asked) == 28 and sum(map(len, read)) == 7
    lengths = [len(batch[0]) for batch in read]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert all(len(batch) * len(batch[0]) <= 2 * ROOM for batch in read)


def test_an_empty_continuation_is_certain(model):
    """What two characters that are one token leave of the second."""
    pairs = [("l", "a"), ("", ""), ("x", "")]
    assert ours(model).loglikelihood(requests("loglikelihood", pairs)) == [(0.0, True)] * 3


def test_drawn_texts_differ_and_stop(model):
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20, "until": ["e"]}
    found = ours(model, 8).generate_until(requests("generate_until", [("a", how)] * 6))
    assert len(set(found)) > 1 and not any("e" in text for text in found)
    del how["temperature"]  # 1 then
    assert ours(model, 8).generate_until(requests("generate_until", [("a", how)] * 6)) == found


@pytest.mark.parametrize(
    "kind,arguments,message",
    [
        ("loglikelihood", ("a", "b" * (ROOM + 1)), "129 tokens, the model's context 128"),
        ("generate_until", ("a", {"max_gen_toks": ROOM}), "max_gen_toks is 1 to 127"),
        ("generate_until", ("a", {"max_gen_toks": 0}), "max_gen_toks is 1 to 127"),
        ("generate_until", ("a", {"num_beams": 4}), "num_beams: not known here"),
    ],
)
def test_what_does_not_fit_is_named(model, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours(model), kind)(requests(kind, [arguments]))


# --- what is recorded ----------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """The tasks that are computed."""
    computed, results = [], harness._results

    def counting(lm, manager, task, limit):
        computed.append(task.name)
        return results(lm, manager, task, limit)

    monkeypatch.setattr(harness, "_results", counting)
    return computed


def test_what_is_recorded_is_not_computed_again(model, tmp_path, counted):
    out = tmp_path / "run" / "evaluation.csv"

    def evaluate(*tasks, weights=WEIGHTS, **options):
        counted.clear()
        harness.evaluate(model, TOKENIZER, tasks, weights, out, **own(**options))
        return counted

    assert evaluate("letters") == ["letters"]
    table = out.read_text()
    assert evaluate("letters") == [] and out.read_text() == table
    assert evaluate("letters", "passages") == ["passages"]
    assert evaluate("letters", again=True) == ["letters"]
    assert evaluate("letters", limit=2) == ["letters"]  # another score, instead of it
    assert evaluate("letters", "letters") == ["letters"]
    complete = out.read_text()
    assert len(complete.splitlines()) == 5 and complete.startswith(table)
    assert evaluate("capitals_fr", fewshot=1) == ["capitals_fr"]
    assert evaluate("capitals_fr") == ["capitals_fr"]
    assert evaluate("letters", weights=WEIGHTS._replace(training_steps=10_000)) == ["letters"]
    assert len(out.read_text().splitlines()) == 11
    out.write_text(complete)  # as if the process had been killed before the table was written
    assert evaluate("letters", "passages", "capitals_fr") == []
    assert len(out.read_text().splitlines()) == 7
    record = out.parent / "evaluation" / "1_main_step0005000" / "letters.json"
    record.write_text(record.read_text()[:100])
    assert evaluate("letters") == ["letters"]
    assert evaluate("letters", weights=WEIGHTS._replace(training_tokens=1)) == ["letters"]


def with_another(model, name):
    """The same weights but for one tensor."""
    other = Lucie(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.get_parameter(name).mul_(1.001)
    return other


def test_each_tensor_and_the_dtype_tell_weights_apart(model):
    names = [name for name, _ in model.named_parameters()]
    others = [fingerprint(with_another(model, name)) for name in names]
    others.append(fingerprint(with_another(model, names[0]).bfloat16()))
    copy = Lucie(model.config)
    copy.load_state_dict(model.state_dict())
    assert fingerprint(copy) == fingerprint(model)
    assert len({fingerprint(model), *others}) == len(names) + 2
    rounded = copy.bfloat16()
    wide = Lucie(model.config)
    wide.load_state_dict(rounded.state_dict())  # the same values in another dtype
    assert fingerprint(rounded) != fingerprint(wide)


def test_a_record_of_other_weights_is_refused(model, tmp_path, counted):
    """Two runs of one phase, steps and tokens, and one --out: no score goes to the other one."""
    out = tmp_path / "e.csv"
    harness.evaluate(model, TOKENIZER, ["letters"], WEIGHTS, out, **own())
    table = out.read_text()
    other = Lucie(model.config, seed=2)
    for refused in (other, with_another(model, "norm.weight").bfloat16()):
        counted.clear()
        with pytest.raises(ConfigError, match=r"letters.json is of other weights .* --again"):
            harness.evaluate(refused, TOKENIZER, ["passages", "letters"], WEIGHTS, out, **own())
        assert counted == [] and out.read_text() == table
    rows = harness.evaluate(other, TOKENIZER, ["letters"], WEIGHTS, out, **own(again=True))
    alone = harness.evaluate(other, TOKENIZER, ["letters"], WEIGHTS, tmp_path / "o.csv", **own())
    assert rows == alone == scores.read_rows(out) and out.read_text() != table
    with pytest.raises(ConfigError, match="other weights"):
        harness.evaluate(model, TOKENIZER, ["letters"], WEIGHTS, out, **own())


BROKEN = {  # tasks that fail as they are loaded, as their questions are made, as they are answered
    "gone": ("data_files: {test: tests/eval_tasks/none.jsonl}", ""),
    "wrong": ("data_files: {test: tests/eval_tasks/capitals_en.jsonl}", "{{1 / 0}}"),
    "long": ("data_files: {test: tests/eval_tasks/capitals_en.jsonl}", "{{question}}"),
}


@pytest.fixture
def broken(tmp_path):
    """A folder of tasks, three of which fail."""
    shutil.copytree(TASKS, tmp_path / "tasks")
    for name, (data, text) in BROKEN.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  {data}\n"
            f"output_type: generate_until\ntest_split: test\ndoc_to_text: '{text}'\n"
            "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: [a], max_gen_toks: 999}\n"
            "metric_list: [{metric: exact_match}]\n"
        )
    return str(tmp_path / "tasks")


def test_tasks_that_fail_do_not_stop_the_others(model, tmp_path, counted, broken):
    out, names = tmp_path / "e.csv", ["gone", "letters", "wrong", "long", "passages"]

    def evaluate():
        counted.clear()
        with pytest.raises(TasksFailed) as raised:
            harness.evaluate(model, TOKENIZER, names, WEIGHTS, out, include_path=broken)
        assert {row["dataset"] for row in raised.value.rows} == {"letters", "passages"}
        assert raised.value.rows == scores.read_rows(out)
        return str(raised.value)

    told = evaluate()
    assert "\n" not in told and [part.split(":")[0] for part in told.split("; ")] == [*BROKEN]
    assert "gone: not loaded (" in told and "ZeroDivisionError" in told
    assert "long: max_gen_toks is 1 to 127" in told
    assert counted == names
    assert evaluate() == told and counted == ["gone", "wrong", "long"]


def test_scores_are_shown_before_what_failed(folder, tmp_path, capsys, broken):
    args = ["--include_path", broken, "--device=cpu", "--out", str(tmp_path / "e.csv")]
    with pytest.raises(TasksFailed, match=r"^gone: not loaded"):
        harness.main([str(folder), "--tasks=gone,letters", *args])
    out = capsys.readouterr().out
    assert "letters" in out and out.splitlines()[-1] == str(tmp_path / "e.csv")
    with pytest.raises(TasksFailed, match=r"^gone: not loaded"):
        harness.main([str(folder), "--tasks=gone", *args])
    assert capsys.readouterr().out == ""


def test_a_table_that_cannot_be_written_is_told_at_once(model, tmp_path, counted):
    (tmp_path / ".e.csv.tmp").mkdir()
    (tmp_path / "f").write_text("a file where the folder of records would be")
    for name in ("e.csv", "f.csv"):
        with pytest.raises(OSError, match=r"\.e\.csv|f"):
            harness.evaluate(model, TOKENIZER, ["letters"], WEIGHTS, tmp_path / name, **own())
    assert counted == []


def test_a_task_without_examples_says_so(model, tmp_path, counted, capsys):
    """Its record has 0 in its name, and so is the same whatever number is asked for."""

    def evaluate(name, fewshot):
        counted.clear()
        out = tmp_path / "e.csv"
        harness.evaluate(model, TOKENIZER, [name], WEIGHTS, out, **own(fewshot=fewshot))
        return [path.name for path in (tmp_path / "e" / WEIGHTS.folder()).iterdir()]

    assert evaluate("letters", 2) == ["letters_0shot.json"] and counted
    assert capsys.readouterr().err.startswith("letters never has examples: 0, not 2")
    assert evaluate("letters", 3) == ["letters_0shot.json"] and not counted
    assert "letters never has examples: 0, not 3" in capsys.readouterr().err
    assert evaluate("letters", 0) == ["letters_0shot.json"] and not counted
    assert "never" not in capsys.readouterr().err
    assert "capitals_fr_1shot.json" in evaluate("capitals_fr", 1)
    assert "never" not in capsys.readouterr().err


def test_a_model_in_shards_is_not_evaluated(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.norm.weight, "device_mesh", "of a DTensor", raising=False)
    with pytest.raises(ValueError, match="this model is sharded: evaluate its checkpoint"):
        harness.evaluate(model, TOKENIZER, ["letters"], WEIGHTS, tmp_path / "e.csv", **own())


def test_a_row_is_spelt_as_the_published_ones(model, tmp_path):
    out = tmp_path / "e.csv"
    rows = harness.evaluate(model, TOKENIZER, ["capitals"], WEIGHTS, out, **own(fewshot=1))
    with open(out, newline="") as file:
        assert list(csv.DictReader(file)) == rows
    first = rows[0] | {"score": "", "stderr": ""}
    assert list(first.values()) == [
        "1_main", "5000.0", "5700059136.0", "capitals", "capitals_fr", "1.0", "acc,none", "", "",
    ]  # fmt: skip
    assert 0 <= float(rows[0]["score"]) <= 1 and float(rows[0]["stderr"]) > 0
    assert [row["num_fewshot"] for row in rows if row["dataset"] == "capitals"] == [""]


def test_the_model_and_generators_are_left_as_they_were(model, tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for training in (True, False):
        model.train(training)
        harness.evaluate(model, TOKENIZER, ["letters"], WEIGHTS, tmp_path / "e.csv", **own(again=1))
        assert model.training == training
    assert states() == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_which_weights_they_are(folder, tmp_path):
    """Steps and tokens are those of all phases."""
    state = {"step": 1220, "samples": 9, "tokens": 100, "config": {"seq_len": 64}}
    state["trained_before"] = {"training_steps": 753_851, "training_tokens": 1000}
    tiny = Lucie(LucieConfig(**TINY))
    tiny(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)).backward()
    optimizer = torch.optim.AdamW(tiny.parameters())
    optimizer.step()
    names = {"extension": "2_extension", "demo_annealing": "3_annealing", "pretrain": "1_main"}
    for name, phase in (names | {"mine": "mine"}).items():
        state["config"] |= {"name": name}
        path = tmp_path / name / "checkpoints" / "step0001220"
        checkpoint.save(path, tiny, optimizer, state)
        for source in (path, tmp_path / name):
            found = scores.weights_of(str(source))
            assert found == (Weights(phase, 755_071, 1100), str(path), tmp_path / name)
    found = Weights("tiny"), f"hf:{folder}", folder
    assert scores.weights_of(f"hf:{folder}") == found


# --- the command ---------------------------------------------------------------------------------


def run(*args, ranks, script=("-m", "eval.harness")):
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *torchrun, *script, *map(str, args)]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(folder, tmp_path, capsys):
    args = [folder, "--tasks", ",".join(ALL), "--include_path", TASKS, "--device", "cpu", "--out"]
    harness.main([str(arg) for arg in [*args, tmp_path / "1.csv"]])
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == str(tmp_path / "1.csv") and "capitals_it" in shown
    done = run(*args, tmp_path / "2.csv", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("capitals_it") == 2  # two scores, and one rank that shows them
    tables = [scores.read_rows(tmp_path / f"{ranks}.csv") for ranks in (1, 2)]
    assert len(tables[0]) == len(tables[1]) == 16
    for one, other in zip(*tables):
        for name in ("score", "stderr"):
            values = [float(row.pop(name) or 0) for row in (one, other)]
            assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert one == other


FAILS_ON_ONE = """
import os
from lm_eval.tasks import TaskManager
from config.cli import run_cli
from eval import harness

load = TaskManager.load

def flaky(self, names):
    if names == ["letters"] and os.environ["RANK"] == "1":
        raise ConnectionError("no network")
    return load(self, names)

TaskManager.load = flaky
run_cli(harness.main, harness.TasksFailed)
"""


@pytest.mark.slow
def test_a_task_that_fails_on_one_rank_fails_on_all(folder, tmp_path):
    (tmp_path / "flaky.py").write_text(FAILS_ON_ONE)
    args = [folder, "--tasks=letters,passages", "--include_path", TASKS, "--device=cpu", "--out"]
    done = run(*args, tmp_path / "e.csv", ranks=2, script=[tmp_path / "flaky.py"])
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("flaky.py: letters: not loaded (ConnectionError: no network)") == 1
    assert {row["dataset"] for row in scores.read_rows(tmp_path / "e.csv")} == {"passages"}


def failed(*args):
    """What the command reports of bad input."""
    with pytest.raises((CheckpointError, ConfigError, DataError, ValueError)) as raised:
        harness.main([str(arg) for arg in args])
    return str(raised.value)


def test_bad_input_is_an_error(model, manager, folder, tmp_path, monkeypatch):
    common = ["--include_path", TASKS, "--device", "cpu", "--out", tmp_path / "e.csv"]

    def line(*args):
        return failed(*args, *common)

    assert "tmp/none: no complete checkpoint there" in line("/tmp/none", "--tasks", "letters")
    for name, least in (("fewshot", 0), ("limit", 1), ("batch_tokens", 1)):
        said = line(folder, "--tasks", "letters", f"--{name}={least - 1}")
        assert f"--{name} must be at least {least}" in said
    assert "must end with .csv" in failed(folder, "--tasks=letters", "--out=x.json")
    assert "/tmp/none: No such file" in line(folder, "--tasks=letters", "--tokenizer=/tmp/none")
    nowhere = ["--include_path", tmp_path / "none"]
    assert "no such folder of tasks" in failed(folder, "--tasks=a", *nowhere)
    here = ["--include_path", TASKS]
    assert "device 'cuda:99'" in failed(folder, "--tasks=cities", "--device=cuda:99", *here)
    with monkeypatch.context() as patch:  # those that lm_eval brings are many
        patch.setattr(harness, "_tasks_there_are", lambda *given: manager)
        assert "no task leters" in line("/tmp", "--tasks=leters")  # before weights are looked for

    (tmp_path / "e.csv").write_text("step,loss\n1,2\n")
    assert "not a table of scores" in line(folder, "--tasks", "letters")
    assert (tmp_path / "e.csv").read_text() == "step,loss\n1,2\n"
    (tmp_path / "e.csv").unlink()

    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        assert "tokenizer.json" in line(folder, "--tasks", "letters")
    finally:
        (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")

    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "eval.adapter")
    assert "is missing: pip install -r requirements-eval.txt" in line(folder, "--tasks", "letters")
    assert not (tmp_path / "e.csv").exists()


def test_out_of_memory_says_what_to_do(model, monkeypatch, tmp_path):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "hidden", full)
    with pytest.raises(TasksFailed, match="letters: out of memory, try --batch_tokens=8192"):
        harness.evaluate(model, TOKENIZER, ["letters"], WEIGHTS, tmp_path / "e.csv", **own())


# --- which tasks ---------------------------------------------------------------------------------


def test_names_of_tasks(manager):
    def names(*asked, fewshot=None):
        return [(t.benchmark, t.name, t.num_fewshot) for t in chosen(asked, fewshot)]

    def chosen(asked, fewshot):
        return harness.chosen(asked, manager, fewshot)

    assert names("answers", "capitals", "answers", "letters", fewshot=3) == [
        ("answers", "answers", 3), ("capitals", "capitals", 3), ("letters", "letters", 0),
    ]  # fmt: skip
    assert ("cities", "capitals_de", None) in names("cities") and len(names("cities")) == 6
    with pytest.raises(ConfigError, match=r"no task capitales: .*; did you mean capitals\?"):
        names("capitales")
    with pytest.raises(ConfigError, match="french: lm-evaluation-harness has no french_bench_arc"):
        names("french")


def test_a_task_that_lucie_ran_has_its_examples():
    class Index:
        task_index = dict.fromkeys(PUBLISHED)

    Index.task_index |= {"arc_challenge": type("E", (), {"kind": type("K", (), {"name": "TASK"})})}
    assert harness.chosen(["arc_challenge"], Index, None) == [Task("openllm", "arc_challenge", 25)]
    for group, tasks in GROUPS.items():
        assert harness.chosen([group], Index, None) == tasks


def test_groups_all_of_whose_tasks_have_no_examples():
    class Entry:
        def __init__(self, **cfg):
            self.cfg = cfg

    index = {
        "a": Entry(task="a", num_fewshot=0),
        "b": Entry(task="b", num_fewshot=0),
        "c": Entry(task="c"),
        "none": Entry(group="none", task=["a", {"group": "in", "task": ["b"]}]),
        "fixed": Entry(group="fixed", task=["a", {"task": "c", "num_fewshot": 0}]),
        "some": Entry(group="some", task=["none", "c"]),
        "set": Entry(group="set", task=[{"task": "a", "num_fewshot": 3}]),
    }
    found = {name for name in index if harness._without_examples(name, index)}
    assert found == {"a", "b", "none", "fixed"}


def members(index, name):
    """{task or group: number of examples of its own} of a name and all that is in it."""
    entry = name if isinstance(name, dict) else index[name]
    if not isinstance(entry, dict) and entry.kind.name == "TAG":
        found, parts = {}, sorted(entry.tags)
    else:
        config = entry if isinstance(entry, dict) else entry.cfg or {}
        own = config["group"] if isinstance(name, dict) else name
        found, parts = {spelt(own): config.get("num_fewshot")}, config.get("task", [])
    for part in parts if isinstance(parts, list) else []:
        found |= members(index, part)
    return found


@needs_shared
def test_every_published_dataset_is_in_a_group():
    """With the same number of examples, which for members of a group are in its own files."""
    published = set()
    for table in ("evaluation_learning_curve", "evaluation_baselines"):
        with gzip.open(SHARED / "lucie" / f"{table}.csv.gz", "rt", newline="") as file:
            reader = csv.DictReader(file)
            if table == "evaluation_learning_curve":
                assert tuple(reader.fieldnames) == scores.COLUMNS
            for row in reader:
                shots = int(float(row["num_fewshot"])) if row["num_fewshot"] else None
                benchmark = row["benchmark"].replace("multilingual", "okapi")
                published.add((benchmark, row["dataset"], shots))

    root = os.path.dirname(lm_eval.tasks.__file__)
    names = "arc french_bench gsm8k hellaswag leaderboard mmlu/continuation mmlu/default okapi"
    paths = [f"{root}/{name}" for name in [*names.split(), "truthfulqa", "winogrande"]]
    index = TaskManager(include_path=paths, include_defaults=False).task_index
    reached = set()
    for task in PUBLISHED.values():
        if task.benchmark == "fr_leaderboard":  # no part of lm-evaluation-harness
            reached.add(task)
            continue
        for name, own in members(index, task.name).items():
            shots = (own or 0) if own == 0 or task.num_fewshot is None else task.num_fewshot
            reached |= {Task(task.benchmark, name, shots), Task(task.benchmark, name, None)}
    assert {Task(*row) for row in published} - reached == set()
    datasets = {row[:2] for row in published}
    assert {(task.benchmark, task.name) for task in PUBLISHED.values()} <= datasets
    assert len(PUBLISHED) == sum(map(len, GROUPS.values()))
