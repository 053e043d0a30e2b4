"""What goes wrong on real machines: disks, data, ranks, impatience. One line tells of it, the exit
code is not 0, the checkpoint from before is whole, and the next start goes on from it."""

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import torchrun, write_stream
from test_chaos import (
    end,
    logged,
    needs_fork,
    said,
    same_as_undisturbed,
    start,
    steps_of,
    undisturbed,
    until,
)
from test_train import options

import checkpoint
import hf

pytestmark = needs_fork

ONE_STEP = dict(max_minutes=1e-6)
TORCHRUN = torchrun(2)


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


# --- a small disk, which only the lives of a test see


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[int]:
    """A file system of `size` at `folder`, in a mount table of its own, kept by a sleeping process.

    Yields that process's id: `enter` takes a life there, and /proc/ID/root shows what is in it.
    """
    script = f"mount -t tmpfs -o size={size} none {folder} && echo ready && exec sleep 600"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    instead = "a limit to the size of a file is tested instead"
    try:
        keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        pytest.skip(f"no unshare here; {instead}")
    with keeper:
        try:
            if (answer := keeper.stdout.readline()) != b"ready\n":
                pytest.skip(f"{answer.decode().strip()}; {instead}")
            yield keeper.pid
        finally:
            keeper.kill()


def enter(keeper: int, hook: Callable | None = None) -> None:
    """A hook: go where the keeper's mount table holds, then another hook."""
    libc, here = ctypes.CDLL(None), os.getcwd()
    spaces = [os.open(f"/proc/{keeper}/ns/{name}", os.O_RDONLY) for name in ("user", "mnt")]
    for space in spaces:
        assert libc.setns(space, 0) == 0
    os.chdir(here)
    if hook:
        hook()


def mount(keeper: int, *args: object, command: str = "mount") -> None:
    within = ["nsenter", f"--target={keeper}", "--user", "--mount", "--preserve-credentials"]
    subprocess.run([*within, command, *map(str, args)], check=True)


@pytest.fixture
def disk(tiny_data):
    """A run on a disk of 1.5 checkpoints, stopped after one step.

    (its life, keeper, the folder as it is seen there, and from here)
    """
    folder = tiny_data / "disk"
    folder.mkdir()
    with small_disk(folder, "1400k") as keeper:

        def life(hook=None, **change):
            change |= dict(out_dir=folder)
            return end(start(tiny_data, hook=partial(enter, keeper, hook), **change))

        yield life, keeper, folder, Path(f"/proc/{keeper}/root{folder}")


def goes_on_undisturbed(data: Path, disk: tuple, **change) -> None:
    """The next start finishes the run, which is the undisturbed one."""
    life, _, _, seen = disk
    assert life(**change) == [0]
    assert not said(data)
    undisturbed(data, **change)
    shutil.copytree(seen / "run", data / "out/run")
    same_as_undisturbed(data)


def test_a_disk_too_small_for_the_next_checkpoint(tiny_data, disk):
    life, keeper, folder, seen = disk
    assert life(**ONE_STEP) == [0]
    assert life(save_every=5) == [2]
    *_, line = said(tiny_data, traceback=None)
    # The log may feel it before the checkpoint that is in its way has given up.
    assert "No space left on device" in line
    assert "step0000005: not saved" in line or "log.csv" in line
    assert checkpoint.latest(seen / "run").name == "step0000001"
    checkpoint.verify(seen / "run/checkpoints/step0000001")
    mount(keeper, "-o", "remount,size=100M", folder)
    goes_on_undisturbed(tiny_data, disk, save_every=5)


def fill(folder: Path) -> None:
    with open(folder / "others", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.slow
def test_a_disk_too_full_for_the_log(tiny_data, disk):
    life, keeper, folder, seen = disk
    change = dict(samples=800, validation="")
    assert life(**change, **ONE_STEP) == [0]
    assert life(partial(after_update, 5, partial(fill, folder)), **change) == [2]
    *_, line = said(tiny_data, traceback=None)
    assert "No space left on device" in line and str(folder / "run") in line
    stands(seen / "run", 1)
    mount(keeper, "-o", "remount,size=100M", folder)
    goes_on_undisturbed(tiny_data, disk, **change)


def test_a_disk_that_has_become_read_only(tiny_data, disk):
    life, keeper, folder, seen = disk
    assert life(**ONE_STEP) == [0]
    mount(keeper, "-o", "remount,ro", folder)
    assert life() == [2]
    (line,) = said(tiny_data)
    assert "Read-only file system" in line and str(folder) in line
    stands(seen / "run", 1)
    mount(keeper, "-o", "remount,rw,size=100M", folder)

    checkpoints = folder / "run/checkpoints"  # those alone: it is noticed at the first save
    mount(keeper, "--bind", checkpoints, checkpoints)
    mount(keeper, "-o", "remount,bind,ro", checkpoints)
    assert life(save_every=5) == [2]
    (line,) = said(tiny_data)
    assert "step0000005: not saved" in line and "Read-only file system" in line
    mount(keeper, checkpoints, command="umount")
    stands(seen / "run", 1)
    goes_on_undisturbed(tiny_data, disk)


# --- the same where nothing can be mounted


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
def test_a_save_that_fails_is_noticed_before_the_next(tiny_data):
    change = dict(samples=8000, validation="", save_every=400, log_every=20)
    assert end(start(tiny_data, hook=partial(limit, 100_000), **change)) == [2]
    (line,) = said(tiny_data)
    assert "step0000400: not saved" in line
    assert 400 <= logged(tiny_data) < 700


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


def test_a_file_in_place_of_the_directory(tiny_data):
    assert end(start(tiny_data, **ONE_STEP)) == [0]
    run = tiny_data / "out/run"
    run.rename(tiny_data / "out/aside")
    run.write_text("")
    assert end(start(tiny_data)) == [2]
    (line,) = said(tiny_data)
    assert str(run) in line
    run.unlink()
    (tiny_data / "out/aside").rename(run)
    stands(run, 1)
    assert end(start(tiny_data)) == [0]
    undisturbed(tiny_data)
    same_as_undisturbed(tiny_data)


# --- data


def copy_of_its_own(folder: Path, vanishing: bool) -> None:
    """A hook: rank 1 reads the data of another folder, from which a file is removed mid-run."""
    os.chdir(folder / os.environ["RANK"])
    if vanishing and os.environ["RANK"] == "1":
        after_update(4, partial(os.remove, "a.bin"))


@pytest.mark.slow
def test_data_that_vanishes_on_one_of_two_ranks(tiny_data):
    for rank in "01":
        shutil.copytree(tiny_data, tiny_data / rank, ignore=lambda *_: ("0", "1"))
    change = dict(mixture="mixture.csv", validation="", save_every=3)
    lives = start(tiny_data, 2, hook=partial(copy_of_its_own, tiny_data, True), **change)
    assert end(lives) == [1, 2]
    (line,) = said(tiny_data, traceback=True)
    assert line.startswith("train.py: rank 1: a.bin: No such file")
    assert logged(tiny_data) in (4, 5)  # the step after may have been read ahead
    stands(tiny_data / "out/run", 3)
    shutil.copy(tiny_data / "a.bin", tiny_data / "1/a.bin")
    whole = partial(copy_of_its_own, tiny_data, False)
    for name in ("run", "whole"):
        assert end(start(tiny_data, 2, hook=whole, name=name, **change)) == [0, 0]
    same_as_undisturbed(tiny_data)


def with_another_document(folder: Path) -> None:
    """A hook: the data of rank 1 is newer than that of rank 0."""
    os.chdir(folder / os.environ["RANK"])


def test_data_that_differs_between_ranks_is_not_trained_on(tiny_data):
    for rank in "01":
        shutil.copytree(tiny_data, tiny_data / rank, ignore=lambda *_: ("0", "1"))
    write_stream(tiny_data / "1/a", [np.arange(90)], 97)
    change = dict(mixture="mixture.csv", validation="")
    hook = partial(with_another_document, tiny_data)
    assert end(start(tiny_data, 2, hook=hook, **change)) == [2, 2]
    (line,) = said(tiny_data)
    assert "not the same on every rank" in line
    assert not (tiny_data / "out/run").exists()


# --- what one rank alone meets


def no_quota() -> None:
    """A hook."""
    if os.environ["RANK"] == "1":

        def refuse() -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/of/a/compiler")

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


def test_torchrun_itself(tiny_data):
    """In processes of their own, which import what they need and end as users' do."""
    command = [*TORCHRUN, "train.py", *options(tiny_data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    undisturbed(tiny_data, 2)
    same_as_undisturbed(tiny_data)


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves_before_it_ends(tiny_data):
    """The signal goes to the whole process group, and torchrun passes it on again."""
    command = [*TORCHRUN, "train.py", *options(tiny_data, samples=8000, validation="")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as job:
        try:
            until(lambda: job.poll() is not None or logged(tiny_data) > 1, [])
            os.killpg(job.pid, signal.SIGINT)
            assert job.wait(timeout=60) != 0  # torchrun's way to say that it was interrupted
        finally:
            job.kill()
    stands(tiny_data / "out/run", logged(tiny_data))


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


def test_rolling_checkpoints_are_forgotten_over_restarts_and_milestones_stay(tiny_data):
    change = dict(save_every=2, checkpoint_every=7, keep_last=2)
    stop = partial(after_update, 8, partial(signal.raise_signal, signal.SIGTERM))
    folder = tiny_data / "out/run/checkpoints"
    assert end(start(tiny_data, hook=stop, **change)) == [0]
    assert steps_of(folder) == [7, 8, 9]
    assert end(start(tiny_data, **change)) == [0]
    assert steps_of(folder) == [7, 14, 16, 18, 20]
    for step in (7, 14, 16, 18, 20):
        checkpoint.verify(folder / f"step{step:07d}")


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
    assert end(start(tiny_data, 2, **ONE_STEP)) == [0, 0]
    ranks = start(tiny_data, 2, hook=partial(die_in_a_save, str(victim)), **ONE_STEP)
    codes = end(ranks, seconds=10)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] > 0
    assert not said(tiny_data, traceback=True)
    assert steps_of(tiny_data / "out/run/checkpoints") == [1]
    assert end(start(tiny_data, 2, **ONE_STEP)) == [0, 0]
    stands(tiny_data / "out/run", 2)


DYING = """
import os, signal, sys, time, torch, train
rank = int(os.environ["RANK"])
update, count = torch.optim.AdamW.step, [0]
def dying(self, *args):
    update(self, *args)
    count[0] += 1
    if count[0] == 13 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        while not os.path.isdir(os.environ["SAVED"]):  # in the background
            time.sleep(0.01)
        open(os.environ["DIED"], "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
torch.optim.AdamW.step = dying
sys.argv[0] = 'train.py'
train.run_cli(train.main, train.DataError, train.CheckpointError)
"""


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_ends_quickly_without_a_rank_or_starts_all_again(tiny_data, monkeypatch, restarts):
    monkeypatch.setenv("PET_MAX_RESTARTS", str(restarts))  # torchrun's --max-restarts
    # Else a restart may meet addresses that the dead left in the store (pytorch issue 135712).
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("DIED", str(tiny_data / "died"))
    monkeypatch.setenv("SAVED", str(tiny_data / "out/run/checkpoints/step0000010"))
    (tiny_data / "dying.py").write_text(DYING)
    command = [*TORCHRUN, tiny_data / "dying.py", *options(tiny_data, save_every=5)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if restarts:
        assert done.returncode == 0, done.stderr
        undisturbed(tiny_data, 2)
        same_as_undisturbed(tiny_data)
    else:
        assert time.time() - float((tiny_data / "died").read_text()) < 20
        assert done.returncode != 0
        assert "Signal 9 (SIGKILL)" in done.stderr and "(local_rank: 1)" in done.stderr
        stands(tiny_data / "out/run", 10)
