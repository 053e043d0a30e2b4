"""What goes wrong on real machines: kills at random moments, disks, data, ranks, impatience.

One line tells of it, the exit code is not 0, the checkpoint from before is whole, and the next
start goes on from it to the result of the undisturbed run. A life is a process of its own, which
SIGKILL ends for good; to begin one costs no imports.
"""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import begin, end_of, environments, fork, torchrun, write_stream
from test_train import command, log_of, options, results, same_weights

import checkpoint
import hf
import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork and POSIX signals")

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
    late = end_of(processes, seconds)
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
    assert same_weights(data, "whole", "run")


# --- killed and stopped at random moments


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "ranks, kills, stops",
    [
        (0, 3, 1),
        (2, 1, 0),
        pytest.param(0, 30, 10, marks=slow),
        pytest.param(2, 6, 0, marks=slow),
    ],
)
def test_whatever_is_killed_goes_on_from_the_last_checkpoint(tiny_data, ranks, kills, stops):
    """Moments: a random step of the run, and up to the length of a start later.

    Where the next step has been reached already, that falls into a start. Of two ranks one is
    killed, and the other one ends by itself.
    """
    chance = random.Random(kills)
    steps = 4 * (kills + stops) + 80  # the last moment is long before the end
    change = LARGE | dict(samples=8 * steps)
    length = undisturbed(tiny_data, ranks, **change)
    folder, begun = tiny_data / "out/run/checkpoints", tiny_data / "begun"
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    chance.shuffle(signals)
    moments = sorted(chance.randrange(steps - 70) for _ in signals)
    newest = in_save = lost = 0
    for number, reached in zip(signals, moments):
        begun.unlink(missing_ok=True)
        life = start(tiny_data, ranks, hook=partial(note_begin, begun), **change)
        if ranks or number == signal.SIGTERM:  # nothing heeds it while Python itself starts
            until(begun.exists, life)
        until(lambda step=reached: logged(tiny_data) >= step, life)
        late = time.monotonic() + chance.uniform(0, length)
        until(lambda at=late: time.monotonic() > at or logged(tiny_data) > steps - 50, life)
        if chance.random() < 0.2:  # a save is short, so some moments are made to lie in one
            until(lambda: steps_of(folder, "tmp") or logged(tiny_data) > steps - 50, life)
        victim = chance.randrange(len(life))
        os.kill(life[victim].pid, number)
        codes = end(life)
        assert codes.pop(victim) == (-number if number == signal.SIGKILL else 0)
        assert all(code > 0 for code in codes) and not said(tiny_data, traceback=bool(codes))

        if begun.exists():  # else it was killed before that
            assert int(begun.read_text()) == newest
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
    assert not any(end(start(tiny_data, ranks, **change)))
    same_as_undisturbed(tiny_data)
    assert not list(folder.glob("*.damaged"))
    assert kills < 30 or (in_save and lost)


ONE_STEP = dict(max_minutes=1e-6)


def after_update(number: int, act: Callable) -> None:
    """A hook: act once, after so many updates of the weights."""
    update, count = torch.optim.AdamW.step, [0]

    def counting(self, *args):
        update(self, *args)
        count[0] += 1
        if count[0] == number:
            act()

    torch.optim.AdamW.step = counting


def stands(run: Path, step: int) -> None:
    """The checkpoint of that step is whole and the newest; nothing unfinished lies beside it."""
    found = checkpoint.latest(run)
    assert found.name == f"step{step:07d}"
    checkpoint.verify(found)
    assert not list(found.parent.glob(".*")) and not list(found.parent.glob("*.damaged"))


# --- disks


def limit(size: int, ranks: str = "01") -> None:
    """A hook: no file may grow beyond `size` bytes, on some ranks."""
    if os.environ.get("RANK", "0") in ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("ranks,limited", [pytest.param(0, "0", marks=pytest.mark.slow), (2, "1")])
def test_a_checkpoint_that_one_rank_cannot_write(tiny_data, ranks, limited):
    assert not any(end(start(tiny_data, ranks, **ONE_STEP)))
    lives = start(tiny_data, ranks, hook=partial(limit, 100_000, limited), save_every=5)
    assert end(lives) == [2] * (ranks or 1)
    (line,) = said(tiny_data)
    assert "step0000005: not saved" in line and "File too large" in line
    stands(tiny_data / "out/run", 1)
    assert not any(end(start(tiny_data, ranks)))
    undisturbed(tiny_data, ranks)
    same_as_undisturbed(tiny_data)


@pytest.mark.slow
def test_a_log_that_cannot_grow(tiny_data):
    change = dict(samples=800, validation="")
    assert end(start(tiny_data, **change, **ONE_STEP)) == [0]
    assert end(start(tiny_data, hook=partial(limit, 8192), **change)) == [2]
    *_, line = said(tiny_data, traceback=None)
    assert "File too large" in line and str(tiny_data / "out/run") in line
    stands(tiny_data / "out/run", 1)
    assert end(start(tiny_data, **change)) == [0]
    undisturbed(tiny_data, **change)
    same_as_undisturbed(tiny_data)


# --- data


def folder_of_rank(folder: Path) -> None:
    """A hook: each rank reads the data of its own folder."""
    os.chdir(folder / os.environ["RANK"])


def test_data_that_differs_between_ranks_is_not_trained_on(tiny_data):
    for rank in "01":
        shutil.copytree(tiny_data, tiny_data / rank, ignore=lambda *_: ("0", "1"))
    write_stream(tiny_data / "1/a", [np.arange(90)], 97)
    change = dict(mixture="mixture.csv", validation="")
    hook = partial(folder_of_rank, tiny_data)
    assert end(start(tiny_data, 2, hook=hook, **change)) == [2, 2]
    (line,) = said(tiny_data)
    assert "not the same on every rank" in line
    assert not (tiny_data / "out/run").exists()


# --- what one rank alone meets


def no_quota() -> None:
    """A hook: rank 1 meets an error that the other one does not."""

    def refuse() -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/of/a/compiler")

    if os.environ["RANK"] == "1":
        after_update(3, refuse)


def test_an_error_of_the_system_on_another_rank_is_told(tiny_data):
    first, second = start(tiny_data, 2, hook=no_quota, validation="")
    assert 0 not in end([first, second])
    text = "train.py: rank 1: /cache/of/a/compiler: Disk quota exceeded"
    assert [text] == said(tiny_data, traceback=True)


# --- signals


def test_a_second_signal_stops_at_once(tiny_data):
    """While the first one waits for its checkpoint, on a disk that does not answer."""
    assert end(start(tiny_data, samples=8000, **ONE_STEP)) == [0]
    (life,) = start(tiny_data, hook=block_saves, samples=8000)
    folder = tiny_data / "out/run/checkpoints"
    until(lambda: logged(tiny_data) > 1, [life])
    os.kill(life.pid, signal.SIGTERM)
    until(lambda: steps_of(folder, "tmp"), [life])
    os.kill(life.pid, signal.SIGINT)
    assert end([life], seconds=5) == [-signal.SIGINT]
    assert steps_of(folder) == [1] and not said(tiny_data)
    checkpoint.verify(folder / "step0000001")
    assert end(start(tiny_data, samples=8000, **ONE_STEP)) == [0]
    stands(tiny_data / "out/run", 2)


def block_saves() -> None:
    """A hook."""
    hf.sync = lambda file: time.sleep(600 if file.suffix == ".safetensors" else 0)


@pytest.mark.parametrize(
    "rank,number", [pytest.param(0, signal.SIGUSR1, marks=pytest.mark.slow), (1, signal.SIGTERM)]
)
def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(tiny_data, rank, number):
    change = dict(samples=320, validation="")
    ranks = start(tiny_data, 2, **change)
    until(lambda: logged(tiny_data) > 2, ranks)
    os.kill(ranks[rank].pid, number)
    assert end(ranks) == [0, 0] and not said(tiny_data)
    assert 2 < logged(tiny_data) < 40
    stands(tiny_data / "out/run", logged(tiny_data))
    assert end(start(tiny_data, 2, **change)) == [0, 0]
    undisturbed(tiny_data, 2, **change)
    same_as_undisturbed(tiny_data)


# --- a rank that dies


def die_in_a_save(rank: str) -> None:
    """A hook: this rank is killed while it writes its part of a checkpoint."""

    def die(file: Path) -> None:
        if file.suffix == ".safetensors":
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == rank:
        hf.sync = die


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_in_the_last_save_is_missed(tiny_data, victim):
    """The other one has nothing left to do but wait for the save."""
    ranks = start(tiny_data, 2, hook=partial(die_in_a_save, str(victim)), **ONE_STEP)
    codes = end(ranks, seconds=10)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] > 0
    assert not said(tiny_data, traceback=True)
    assert steps_of(tiny_data / "out/run/checkpoints") == []
    assert end(start(tiny_data, 2, **ONE_STEP)) == [0, 0]
    stands(tiny_data / "out/run", 1)


DYING = """
import os, signal, sys, time, torch, train
update, count, saved = torch.optim.AdamW.step, [0], sys.argv.pop()
def dying(self, *args):
    update(self, *args)
    count[0] += 1
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], count[0]) == ("1", "0", 13):
        while not os.path.isdir(saved):  # in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
torch.optim.AdamW.step = dying
train.run_cli(train.main, train.DataError, train.CheckpointError)
"""


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torchrun_itself_and_how_it_starts_all_again(tiny_data, dies):
    """In processes of their own, which import what they need and end as users' do."""
    (tiny_data / "dying.py").write_text(DYING)
    arguments = ["train.py", *options(tiny_data, save_every=5)]
    if dies:
        saved = tiny_data / "out/run/checkpoints/step0000010"
        arguments = ["--max-restarts=1", tiny_data / "dying.py", *arguments[1:], saved]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    # Else a restart may meet addresses that the dead left in the store (pytorch issue 135712).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = list(map(str, [*torchrun(2), *arguments]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr  # torch's complaint when it was not called
    undisturbed(tiny_data, 2)
    same_as_undisturbed(tiny_data)
