"""A run that is killed and stopped at random moments, and restarted each time, is the undisturbed
run. A life is a process of its own, which SIGKILL ends for good; to begin one costs no imports."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from conftest import begin, environments, fork
from test_train import command, log_of, options, results, weights_of

import checkpoint
import train

needs_fork = pytest.mark.skipif(os.name == "nt", reason="needs fork and POSIX signals")
pytestmark = needs_fork

# 6 MB of checkpoint, so that writing one takes a good part of a step.
LARGE = dict(hidden_size=128, intermediate_size=512, micro_batch_size=8, save_every=3)


def start(data: Path, ranks: int = 0, hook: Callable | None = None, **change) -> list:
    """A life of a run: its processes, one or as many as `ranks`.

    hook, if any, is called in each before train.py begins. What they print goes to data/errors.
    """
    (data / "errors").write_text("")
    arguments = options(data, **change)
    return [fork(_life, arguments, data / "errors", names, hook) for names in environments(ranks)]


def _life(arguments: list[str], errors: Path, names: dict[str, str], hook: Callable | None) -> None:
    begin(names, errors, errors)
    if hook:
        hook()
    command(arguments)


def end(processes: list, seconds: float = 60) -> list[int]:
    """Their exit codes, minus the signal's number for those that one has ended."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} do not end"
    return [process.exitcode for process in processes]


def said(data: Path, traceback: bool | None = False) -> list[str]:
    """The messages of the processes. traceback: whether one is shown, as where a rank has lost
    another; None: possibly, as where TensorBoard's thread meets a full disk first."""
    text = (data / "errors").read_text()
    assert traceback in (None, "Traceback" in text), text
    return [line for line in text.replace("\r", "\n").splitlines() if "train.py:" in line]


def until(condition: Callable[[], bool], processes: list) -> None:
    """Wait until it holds, or one of the processes ends."""
    while not condition() and not wait([process.sentinel for process in processes], 0.005):
        pass


def logged(data: Path, name: str = "run") -> int:
    """The step of the last row of the log."""
    try:
        rows = (data / "out" / name / "log.csv").read_text().splitlines()[1:]
    except FileNotFoundError:
        return 0
    return int(rows[-1].partition(",")[0]) if rows else 0


def steps_of(folder: Path, mark: str = "") -> list[int]:
    """The steps of the checkpoints under their final names, or of what bears another mark."""
    names = [f"step{step:07d}" for step in range(2000)]
    left = set(os.listdir(folder)) if folder.is_dir() else set()
    return [i for i, name in enumerate(names) if (f".{name}.{mark}" if mark else name) in left]


def note_begin(path: Path) -> None:
    """A hook: the step that a life goes on from, written where it enters the loop."""
    steps_from = train.Schedule.steps_from

    def noting(self, step):
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(str(step))
        unfinished.replace(path)
        return steps_from(self, step)

    train.Schedule.steps_from = noting


def undisturbed(data: Path, ranks: int = 0, **change) -> float:
    """The run `whole`, for comparison; seconds from its start to its first row."""
    end([fork(int)])  # the imports are over
    before = time.monotonic()
    processes = start(data, ranks, name="whole", **change)
    until(lambda: logged(data, "whole") > 0, processes)
    seconds = time.monotonic() - before
    assert not any(end(processes)), (data / "errors").read_text()
    return seconds


def same_as_undisturbed(data: Path) -> None:
    assert results(log_of(data)) == results(log_of(data, "whole"))
    a, b = weights_of(data, "whole"), weights_of(data)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "kills,stops", [(3, 1), pytest.param(30, 10, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_whatever_is_killed_goes_on_from_the_last_checkpoint(tiny_data, kills, stops):
    """Moments: a random step of the run, and up to the length of a start later.

    Where the next step has been reached already, that falls into a start.
    """
    chance = random.Random(kills)
    steps = 4 * (kills + stops) + 80  # the last moment is long before the end
    change = LARGE | dict(samples=8 * steps)
    length = undisturbed(tiny_data, **change)
    folder, begun = tiny_data / "out/run/checkpoints", tiny_data / "begun"
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    chance.shuffle(signals)
    moments = sorted(chance.randrange(steps - 70) for _ in signals)
    newest = in_save = in_start = lost = 0
    for number, reached in zip(signals, moments):
        begun.unlink(missing_ok=True)
        life = start(tiny_data, hook=partial(note_begin, begun), **change)
        if number == signal.SIGTERM:  # nothing heeds it while Python itself starts
            until(begun.exists, life)
        until(lambda step=reached: logged(tiny_data) >= step, life)
        late = time.monotonic() + chance.uniform(0, length)
        until(lambda at=late: time.monotonic() > at or logged(tiny_data) > steps - 50, life)
        if chance.random() < 0.2:  # a save is short, so some moments are made to lie in one
            until(lambda: steps_of(folder, "tmp") or logged(tiny_data) > steps - 50, life)
        os.kill(life[0].pid, number)
        assert end(life) == [-number if number == signal.SIGKILL else 0]
        assert not said(tiny_data)

        if begun.exists():  # else it was killed before that
            assert int(begun.read_text()) == newest
        in_start += logged(tiny_data) == newest
        complete, unfinished = steps_of(folder), steps_of(folder, "tmp")
        newest = max([newest, *complete])
        assert newest in (0, *complete)
        if newest:
            checkpoint.verify(folder / f"step{newest:07d}")
        if number == signal.SIGTERM:
            assert newest == logged(tiny_data) and not unfinished
        in_save += any(step > newest for step in unfinished)
        lost += logged(tiny_data) - newest
    assert newest < steps
    assert end(start(tiny_data, **change)) == [0]
    same_as_undisturbed(tiny_data)
    assert not list(folder.glob("*.damaged"))
    print(
        f"{kills} kills and {stops} stops, {in_save} in a save, {in_start} where the life before "
        f"had ended, {lost} steps done again"
    )
    assert kills < 30 or (in_save and lost)


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_when_one_of_two_ranks_is_killed_the_other_ends_and_both_go_on(tiny_data, kills):
    chance = random.Random(kills)
    steps = 8 * kills + 40
    change = LARGE | dict(samples=8 * steps)
    undisturbed(tiny_data, 2, **change)
    folder, begun = tiny_data / "out/run/checkpoints", tiny_data / "begun"
    newest = in_save = 0
    for _ in range(kills):
        begun.unlink(missing_ok=True)
        ranks = start(tiny_data, 2, hook=partial(note_begin, begun), **change)
        until(lambda old=newest: begun.exists() and logged(tiny_data) > old, ranks)
        late = time.monotonic() + chance.uniform(0, 0.3)
        until(lambda at=late: time.monotonic() > at or logged(tiny_data) > steps - 20, ranks)
        victim = chance.randrange(2)
        ranks[victim].kill()
        codes = end(ranks, seconds=10)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] > 0
        assert not said(tiny_data, traceback=True)
        assert int(begun.read_text()) == newest
        complete, unfinished = steps_of(folder), steps_of(folder, "tmp")
        newest = max([newest, *complete])
        assert newest in (0, *complete)
        in_save += any(step > newest for step in unfinished)
    assert newest < steps
    assert end(start(tiny_data, 2, **change)) == [0, 0]
    same_as_undisturbed(tiny_data)
    print(f"{kills} kills of one of two ranks, {in_save} in a save")
