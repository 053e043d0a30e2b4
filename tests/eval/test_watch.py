import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

import checkpoint
import eval.harness
import eval.needle
from checkpoint import CheckpointError, open_model, write_text
from config.cli import ConfigError
from data import tokenizer
from data.dataset import DataError
from eval import watch
from eval.harness import TasksFailed
from eval.watch import Evaluation
from generate import Sampling, complete
from model import Lucie, LucieConfig

BYTES = {bytes([b]): b + 4 for b in range(256)}
SCHEDULE = dict(
    samples=40, global_batch_size=4, batch_ramp_samples=0, batch_ramp_start=4,
    batch_ramp_increment=1, learning_rate=1e-3, min_learning_rate=0.0, warmup_samples=0,
    lr_decay="constant", checkpoint_every=1, checkpoint_early_every=0, checkpoint_early_steps=0,
)  # fmt: skip
LAST = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a tiny model over bytes, of which all ten steps left a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = Lucie(LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=200))
    folder.mkdir()
    tokenizer.save(BYTES, folder / "r.tiktoken")
    options = TINY | SCHEDULE | {"vocab_size": 260, "seq_len": 200, "name": "tiny"}
    options |= {"rope_theta": model.config.rope_theta, "tokenizer": str(folder / "r.tiktoken")}
    (folder / "config.json").write_text(json.dumps(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for step in range(1, LAST + 1):
        x = torch.full((1, 8), step + 4)
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {"step": step, "samples": 4 * step, "tokens": 800 * step, "config": options}
        name = f"step{step:07d}"
        checkpoint.save(folder / "checkpoints" / name, model, optimizer, state)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """The same, to be changed by the test."""
    shutil.copytree(whole, tmp_path / "tiny")
    return tmp_path / "tiny"


def stand_in(file: Path, seconds: float = 0.0) -> Evaluation:
    """Writes the step of a checkpoint and what its last file begins with, when it has read that."""

    def lines() -> list[str]:
        return file.read_text().splitlines() if file.exists() else []

    def run(path: Path) -> None:
        step = checkpoint.read_state(path)["step"]
        with open(file.with_name("begun"), "a") as f:
            f.write(f"{step}\n")
        time.sleep(seconds)
        write_text(file, "\n".join([*lines(), f"{step} {path.name}"]) + "\n")

    return Evaluation(
        "stand-in", lambda path: any(line.endswith(path.name) for line in lines()), run
    )


def in_order() -> list[str]:
    return [f"{step} step{step:07d}" for step in range(1, LAST + 1)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_restarted_at_random_each_checkpoint_is_evaluated_once(whole, tmp_path):
    """Ten checkpoints that appear one by one, a stand-in evaluation, and one that is a command of
    two tasks; the watcher is killed a random moment after each start."""
    run, rng = tmp_path / "run", random.Random(5)
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "config.json", run)
    results, tasks = run / "results.txt", run / "tasks.txt"

    def two_tasks(args: list[str]) -> None:
        for task in "ab":
            line = f"{task} {Path(args[0]).name}"
            known = tasks.read_text().splitlines() if tasks.exists() else []
            if line not in known:
                time.sleep(0.004)
                write_text(tasks, "\n".join([*known, line]) + "\n")

    ledger = run / "evaluated.jsonl"
    evaluations = [
        stand_in(results, 0.03),
        watch.command("tasks", two_tasks, lambda path: [str(path)], ["a", "b"], ledger),
    ]
    coming = sorted((whole / "checkpoints").iterdir())
    kills, fork = 0, multiprocessing.get_context("fork")
    while True:
        process = fork.Process(target=watch.watch, args=(run, evaluations, False, 0.005))
        process.start()
        for _ in range(2):
            if coming and rng.random() < 0.4:  # as the saver does: whole, then renamed
                path = coming.pop(0)
                unfinished = run / "checkpoints" / f".{path.name}.tmp"
                shutil.copytree(path, unfinished)
                unfinished.rename(run / "checkpoints" / path.name)
            process.join(rng.uniform(0, 0.06))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
        assert kills < 1000
    assert results.read_text().splitlines() == in_order()
    written = [line.split() for line in tasks.read_text().splitlines()]
    assert written == [
        [t, path.name] for path in sorted((whole / "checkpoints").iterdir()) for t in "ab"
    ]
    assert [line["checkpoint"] for line in watch.read_lines(ledger)] == [
        f"step{step:07d}" for step in range(1, LAST + 1)
    ]
    # a test of nothing otherwise: some evaluations were begun and did not come to their end
    begun = (run / "begun").read_text().splitlines()
    assert kills >= 10 and len(begun) > LAST


def test_a_kill_while_lines_are_written_leaves_those_of_before(tmp_path, monkeypatch):
    file, write = tmp_path / "x.jsonl", Path.write_text
    watch.add_lines(file, [{"a": 1}])

    def killed(path: Path, text: str, **options: str) -> None:
        write(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            watch.add_lines(file, [{"b": 2}, {"c": 3}])
    assert watch.read_lines(file) == [{"a": 1}]
    watch.add_lines(file, [{"b": 2}, {"c": 3}])
    assert watch.read_lines(file) == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_it_ends_with_the_last_of_the_schedule_and_not_before(run, tmp_path):
    last = run / "checkpoints" / f"step{LAST:07d}"
    aside, looks = tmp_path / "aside", []
    last.rename(aside)

    def done(path: Path) -> bool:
        looks.append(path.name)
        if looks.count("step0000001") == 3 and aside.exists():
            aside.rename(last)
        return not path.name.endswith("10") or looks.count(path.name) > 1

    watch.watch(run, [Evaluation("none", done, lambda path: None)], poll=0.01)
    assert looks.count("step0000001") >= 3 and looks.count(last.name) >= 2
    last.rename(aside)
    watch.watch(run, [stand_in(tmp_path / "r")], once=True)  # what is there, no more
    assert (tmp_path / "r").read_text().splitlines() == in_order()[:-1]


def test_what_rotation_removes_is_a_line(run, tmp_path, capsys):
    plain = stand_in(tmp_path / "r")

    def removed_meanwhile(path: Path) -> None:
        if path.name.endswith(("3", "7")):
            shutil.rmtree(path)
        plain.run(path)

    watch.watch(run, [plain._replace(run=removed_meanwhile)], once=True)
    assert (tmp_path / "r").read_text().splitlines() == [
        line for line in in_order() if line[0] not in "37"
    ]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "step0000003 was removed" in err[0] and "step0000007" in err[1]


def test_trouble_of_another_kind_is_not_passed_over(run, tmp_path):
    def fails(path: Path) -> None:
        raise ValueError("no memory")

    plain = stand_in(tmp_path / "r")
    with pytest.raises(ValueError, match="no memory"):
        watch.watch(run, [plain._replace(run=fails)], once=True)
    with pytest.raises(CheckpointError, match="left no results"):  # and not for ever again
        watch.watch(run, [plain._replace(run=lambda path: None)], once=True)


def test_tasks_that_fail_are_lines_and_tried_at_the_next_start(run, tmp_path, capsys):
    """They do not stop the other checkpoints, and those are not evaluated twice."""
    plain, began = stand_in(tmp_path / "r"), []

    def fails(path: Path) -> None:
        began.append(path.name[-2:])
        if path.name.endswith(("3", "7")):
            raise TasksFailed(["letters: not loaded (no network)"], [])
        plain.run(path)

    flaky = plain._replace(run=fails)
    for _ in range(2):
        began.clear()
        with pytest.raises(CheckpointError, match="tasks of 2 checkpoints failed, see above"):
            watch.watch(run, [flaky], poll=0.01)
        assert capsys.readouterr().err.splitlines() == [
            f"eval.watch: step000000{step}: letters: not loaded (no network)" for step in (3, 7)
        ]
        assert began in (["01", "02", "03", "04", "05", "06", "07", "08", "09", "10"], ["03", "07"])
    assert began == ["03", "07"]
    watch.watch(run, [plain], poll=0.01)
    assert sorted((tmp_path / "r").read_text().splitlines()) == sorted(in_order())


@pytest.mark.slow
def test_mistakes_are_told_at_the_start(run, tmp_path, monkeypatch):
    """Before any checkpoint: not hours later, when the first one is there."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    own = manager(include_path="tests/eval_tasks", include_defaults=False)
    monkeypatch.setattr(eval.harness, "_tasks_there_are", lambda *given: own)

    def line(*args: object) -> str:
        with pytest.raises((ConfigError, DataError)) as raised:
            watch.main([str(run), *map(str, args)])
        assert not (run / "samples.jsonl").exists()
        return str(raised.value)

    assert "no task leters" in line("--tasks=letters,leters")
    assert "a.txt: no such file" in line(f"--needle=--haystack {tmp_path}/a.txt")
    (tmp_path / "a.txt").write_text("a b")
    assert "--depths >= 1" in line(f"--needle=--haystack {tmp_path}/a.txt --depths 0")
    assert "No closing quotation" in line(f"--needle=--haystack '{tmp_path}/a.txt")
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "eval.adapter", raising=False)
    assert "pip install -r requirements-eval.txt" in line("--tasks=letters")


def test_samples_are_what_the_checkpoint_completes(run, capsys):
    (run / "prompts.txt").write_text("Bonjour\n\nligne 1\\nligne 2\u2028x\n", encoding="utf-8")
    for step in (1, *range(3, LAST)):
        shutil.rmtree(run / "checkpoints" / f"step{step:07d}")
    args = [str(run), f"--prompts={run / 'prompts.txt'}", "--max_new_tokens=6", "--device=cpu"]
    watch.main(args)
    lines = watch.read_lines(run / "samples.jsonl")
    prompts = ["Bonjour", "ligne 1\nligne 2\u2028x"]
    assert [(s["training_steps"], s["training_tokens"], s["prompt"]) for s in lines] == [
        (step, 800 * step, prompt) for step in (2, 10) for prompt in prompts
    ]
    model, source = open_model(str(run / "checkpoints" / "step0000002"), "cpu")
    expected = complete(model, tokenizer.load(source), prompts, 6, Sampling(temperature=0))
    assert [s["text"] for s in lines[:2]] == [c.text for c in expected]
    assert lines[0]["text"] != lines[2]["text"]  # of another checkpoint

    # a further prompt is completed alone; a whole file is not computed again
    with open(run / "prompts.txt", "a") as f:
        f.write("Ciao\n")
    watch.main(args)
    more = watch.read_lines(run / "samples.jsonl")
    assert more[:4] == lines and [s["prompt"] for s in more[4:]] == ["Ciao", "Ciao"]
    before = (run / "samples.jsonl").stat().st_mtime_ns
    watch.main(args)
    assert (run / "samples.jsonl").stat().st_mtime_ns == before


def test_the_commands_that_are_run(run, monkeypatch):
    for step in range(1, LAST):
        shutil.rmtree(run / "checkpoints" / f"step{step:07d}")
    called = []
    monkeypatch.setattr(eval.harness, "main", lambda args: called.append(("tasks", args)))
    monkeypatch.setattr(eval.needle, "main", lambda args: called.append(("needle", args)))
    monkeypatch.setattr(eval.harness, "check", lambda *given: None)
    monkeypatch.chdir(run)
    for name in ("a.txt", "b c.txt"):
        (run / name).write_text("a haystack")
    args = [str(run), "--max_new_tokens=1", "--device=cpu", "--tasks=french,arc_easy"]
    watch.main([*args, "--include_path=mine", "--needle=--haystack a.txt 'b c.txt' --depths 3"])
    path = str(run / "checkpoints" / f"step{LAST:07d}")
    own = ["--include_path", "mine", "--device=cpu"]
    hay = [
        "a.txt",
        "b c.txt",
        "--depths",
        "3",
        "--out",
        str(run / "needle" / f"step{LAST:07d}"),
        "--device=cpu",
    ]
    assert called == [
        ("tasks", [path, "--tasks", "french,arc_easy", *own]),
        ("needle", [path, "--haystack", *hay]),
    ]
    eval.harness.parse(called[0][1])  # both know these options
    assert eval.needle.parse(called[1][1]).haystack == ["a.txt", "b c.txt"]
    watch.main([*args, "--include_path=mine", "--needle=--haystack a.txt 'b c.txt' --depths 3"])
    assert len(called) == 2
    # the same, from elsewhere and on another device
    monkeypatch.chdir(run.parent)
    other = ["tiny", "--max_new_tokens=1", "--device=cuda", "--tasks=french,arc_easy"]
    hay = f"--haystack tiny/a.txt '{run}/b c.txt' --depths 3"
    watch.main([*other, "--include_path", str(run / "mine"), f"--needle={hay}"])
    assert len(called) == 2
    watch.main([*other, "--needle=--haystack tiny/a.txt"])  # something else
    assert len(called) == 3
    watch.main([*other, "--dtype=bfloat16"])
    assert len(called) == 4


def test_one_watcher_of_a_run(run):
    pytest.importorskip("fcntl")
    with watch.only_one(run):
        with pytest.raises(CheckpointError, match="watches it already"):
            with watch.only_one(run):
                pass
    with watch.only_one(run):
        pass


def lines_of(file: Path) -> list[list[str]]:
    """The rows of a CSV below its header that are whole."""
    text = file.read_text() if file.exists() else ""
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))[1:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills")
def test_the_command_killed_in_each_part_does_all_once(run, tmp_path):
    """The real one, with a task and a needle test, over three checkpoints."""
    pytest.importorskip("lm_eval")
    for step in range(1, LAST - 2):
        shutil.rmtree(run / "checkpoints" / f"step{step:07d}")
    (tmp_path / "hay.txt").write_text("The year opens slowly. The wind turns. " * 40)
    command = [sys.executable, "-m", "eval.watch", run, "--tasks=letters", "--device=cpu"]
    command += ["--include_path=tests/eval_tasks", "--max_new_tokens=2"]
    hay = f"--haystack {tmp_path}/hay.txt --lengths 450 900 4 --depths 9 --scoring likelihood"
    command += [f"--needle={hay}"]
    names = [f"step{step:07d}" for step in (8, 9, 10)]
    cells = [run / "needle" / name / "en_likelihood.csv" for name in names]
    records = [run / "evaluation" / f"tiny_{name}" / "letters.json" for name in names]
    moments = [  # what is there when the watcher is killed
        lambda: records[0].exists(),
        lambda: len(lines_of(cells[2])) >= 20,
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    path = filter(None, [os.getcwd(), env.get("PYTHONPATH")])
    env["PYTHONPATH"] = os.pathsep.join(path)
    for reached in [*moments, None]:
        with open(tmp_path / "told", "w") as told:
            process = subprocess.Popen(command, env=env, stdout=told, stderr=told)
        while process.poll() is None and not (reached and reached()):
            time.sleep(0.002)
        killed = process.poll() is None
        process.kill()
        assert process.wait(60) == (-9 if reached else 0), (tmp_path / "told").read_text()
        assert killed == (reached is not None)
    rows = lines_of(run / "evaluation.csv")
    assert len(rows) == len({tuple(row[:7]) for row in rows}) == 3 * 2
    assert {float(row[1]) for row in rows} == {8, 9, 10}
    for file in cells:
        found = [tuple(row[:2]) for row in lines_of(file)]
        assert len(found) == len(set(found)) == 4 * 9
    said = [
        (line["checkpoint"], line["prompt"]) for line in watch.read_lines(run / "samples.jsonl")
    ]
    assert said == [(name, prompt) for name in names for prompt in watch.PROMPTS]
    ledger = [(x["checkpoint"], x["command"][0]) for x in watch.read_lines(run / "evaluated.jsonl")]
    assert ledger == [(name, what) for name in names for what in ("tasks", "needle")]


def test_bad_input_is_an_error(run, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"a\xff\n")
    (run / "samples.jsonl").write_text("{")
    (tmp_path / "no" / "checkpoints").mkdir(parents=True)
    for args, message in (
        ([tmp_path / "nothing"], "is not a run"),
        ([tmp_path / "no"], "no config.json"),
        ([run, "--poll=0"], "--poll above 0"),
        ([run, f"--prompts={tmp_path / 'empty'}"], "holds no prompt"),
        ([run, f"--prompts={tmp_path / 'bytes'}"], "not UTF-8 at byte 1"),
        ([run], "samples.jsonl: damaged"),
    ):
        with pytest.raises((CheckpointError, ConfigError, DataError), match=message):
            watch.main(list(map(str, args)))
