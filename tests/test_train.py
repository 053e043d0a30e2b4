import csv
import gc
import json
import os
import re
import signal
import sys
import time
import types
from itertools import count, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, launch, write_stream, write_weights

import checkpoint
import generate
import hf
import train
from config import Config, log
from data import tokenizer
from data.dataset import DataError

SMALL = TINY | dict(
    seq_len=16,
    samples=160,  # 20 steps of 8
    global_batch_size=8,
    micro_batch_size=4,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    warmup_samples=24,
    eps=1e-8,
    log_every=1,
    eval_every=10,
    eval_samples=4,
    checkpoint_every=0,
    dtype="float32",
    device="cpu",
)


def options(data, **change):
    values = SMALL | {"mixture": data / "mixture.csv", "out_dir": data / "out", "name": "run"}
    values |= {"validation": data / "mixture.csv"} | change
    return [f"--{name}={value}" for name, value in values.items()]


def run(data, ranks=0, script="train.py", **change):
    """train.py, or a script in its stead, with these options: one process, or several ranks."""
    # Ranks that disagree wait for each other for ever: the time limit makes that a failure.
    return launch(script, *options(data, **change), ranks=ranks, timeout=90)


def command(arguments):
    """train.py with these arguments, to its exit code."""
    sys.argv = ["train.py", *arguments]
    train.run_cli(train.main, train.DataError, train.CheckpointError)


def said(done):
    """The lines of a finished process that are messages, beside its progress bar."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith(("train.py:", "checkpoint:"))]


def train_here(data, **change):
    """A run in this process; returns its log."""
    train.main(options(data, **change))
    return log_of(data, change.get("name", "run"))


def log_of(data, name="run"):
    with open(data / "out" / name / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def results(rows):
    """What must not depend on interruptions or ranks: all but the clock."""
    names = ("training_steps", "training_tokens", "training_loss", "learning_rate", "grad_norm")
    return [tuple(row[n] for n in (*names, "validation_loss")) for row in rows]


def weights_of(data, name="run"):
    return checkpoint.from_run(data / "out" / name)[0].state_dict()


def at_each_step(monkeypatch, act):
    """Call act(step counted from 1, model) where the gradients are clipped."""
    clip, numbers = train.parallel.clip_gradients, count(1)

    def acting(model, largest):
        act(next(numbers), model)
        return clip(model, largest)

    monkeypatch.setattr(train.parallel, "clip_gradients", acting)


def same_weights(data, name, other):
    a, b = weights_of(data, name), weights_of(data, other)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_logs_lucies_columns(tiny_data):
    rows = train_here(tiny_data, samples=800, log_every=5)
    published = "training_steps,training_tokens,training_loss,walltime,gputime,learning_rate"
    assert ",".join(rows[0]).startswith(published)
    assert [int(r["training_steps"]) for r in rows] == list(range(5, 101, 5))
    assert int(rows[-1]["training_tokens"]) == 800 * 16
    assert float(rows[-1]["learning_rate"]) == pytest.approx(1e-3)  # after the last step
    assert float(rows[-1]["training_loss"]) < float(rows[0]["training_loss"]) - 0.3
    validated = [r["training_steps"] for r in rows if r["validation_loss"]]
    assert validated == [str(s) for s in range(10, 101, 10)]
    assert rows[0]["mfu"] == "" and float(rows[0]["tokens_per_second"]) > 0
    assert list((tiny_data / "out/run/tensorboard").glob("events.*"))
    saved = json.loads((tiny_data / "out/run/config.json").read_text())
    assert saved["hidden_size"] == 64 and saved["seq_len"] == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stops", [(10,), (5, 10)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tiny_data, monkeypatch, stops, dtype):
    """Losses, weights, and the tokens trained on in their order; also at the second resume."""
    trained_on, forward = [], train.Lucie.forward

    def spy(self, tokens, targets, **kwargs):
        if torch.is_grad_enabled():
            trained_on.append(torch.cat([tokens, targets[:, -1:]], 1))
        return forward(self, tokens, targets, **kwargs)

    monkeypatch.setattr(train.Lucie, "forward", spy)
    whole = train_here(tiny_data, name="whole", dtype=dtype)
    samples = torch.cat(trained_on)
    trained_on.clear()
    for start, stop in zip((0, *stops), stops):

        def stopping(step, model, last=stop - start):
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            at_each_step(patch, stopping)
            rows = train_here(tiny_data, name="parts", dtype=dtype)
        assert int(rows[-1]["training_steps"]) == stop
    parts = train_here(tiny_data, name="parts", dtype=dtype)
    assert results(parts) == results(whole)
    assert torch.equal(torch.cat(trained_on), samples)
    mixture = train.Mixture(tiny_data / "mixture.csv", 16, 42, 97)
    assert samples.tolist() == [mixture[i].tolist() for i in range(160)]
    assert same_weights(tiny_data, "whole", "parts")


def test_validation_leaves_the_training_alone(tiny_data):
    with_it = train_here(tiny_data, name="with", eval_every=3)
    without = train_here(tiny_data, name="without", validation="")
    assert sum(bool(r["validation_loss"]) for r in with_it) == 7
    assert [r[:-1] for r in results(with_it)] == [r[:-1] for r in results(without)]


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_the_triton_kernels_train_like_the_definitions(tiny_data, chip, dtype, tolerance):
    wide = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, samples=16)
    wide |= dict(warmup_samples=0, learning_rate=2e-3, dtype=dtype, device=chip.type)
    wide |= dict(num_hidden_layers=1, global_batch_size=4, micro_batch_size=2, validation="")
    logs = {
        mode: train_here(tiny_data, name=mode, kernels=mode, **wide) for mode in ("triton", "torch")
    }
    for ours, reference in zip(logs["triton"], logs["torch"]):
        for column in ("training_loss", "grad_norm"):
            assert float(ours[column]) == pytest.approx(float(reference[column]), rel=tolerance)
    assert len(logs["triton"]) == 4
    assert float(logs["triton"][-1]["training_loss"]) < float(logs["triton"][0]["training_loss"])


@pytest.mark.slow
def test_two_fresh_processes_agree_bit_for_bit(tiny_data):
    wide = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, samples=40)
    for name in ("a", "b"):
        assert run(tiny_data, name=name, device="auto", dtype="auto", **wide).returncode == 0
    assert results(log_of(tiny_data, "a")) == results(log_of(tiny_data, "b"))


@pytest.mark.slow
def test_compiled_blocks_train_like_the_others(tiny_data):
    logs = [train_here(tiny_data, name=f"c{c}", samples=40, compile=c) for c in (False, True)]
    for plain, compiled in zip(*logs):
        loss = float(plain["training_loss"])
        assert float(compiled["training_loss"]) == pytest.approx(loss, rel=1e-5)
    names = [set(weights_of(tiny_data, f"c{c}")) for c in (False, True)]
    assert names[0] == names[1]  # no _orig_mod in a checkpoint


def test_the_loss_of_a_step_is_the_mean_over_its_samples_however_they_are_split(tiny_data):
    logs = [train_here(tiny_data, name=f"m{size}", micro_batch_size=size) for size in (1, 3, 8)]
    for rows in logs[1:]:
        for a, b in zip(logs[0], rows):
            assert float(a["training_loss"]) == pytest.approx(float(b["training_loss"]), rel=1e-5)
            assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-4)
    config = Config(**SMALL)
    mixture = train.Mixture(tiny_data / "mixture.csv", 16, 42, 97)
    block = torch.stack([torch.from_numpy(mixture[i]) for i in range(8)])
    expected = train.Lucie(checkpoint.architecture(vars(config)))(block[:, :-1], block[:, 1:])
    assert float(logs[0][0]["training_loss"]) == pytest.approx(expected.item(), rel=1e-6)


def patched(data, code, ranks, **change):
    """A run on several ranks with some function of train.py replaced by `code` beforehand."""
    script = data / "patched.py"
    script.write_text(
        "import os, signal, sys, torch, train\n"
        "rank = int(os.environ.get('RANK', 0))\n"
        f"{code}\n"
        "sys.argv[0] = 'train.py'\n"
        "train.run_cli(train.main, train.DataError, train.CheckpointError)\n"
    )
    return run(data, ranks=ranks, script=script, **change)


UNEVEN = """
read = train.read_share
def masked(*args):
    share = read(*args)
    batches = [(tokens, targets.clone()) for tokens, targets in share.batches]
    for tokens, targets in batches:
        for x, y in zip(tokens, targets):
            y[: int(x.sum()) % 16] = -100  # by its content: the same on any rank
    count = sum(int((y != -100).sum()) for _, y in batches)
    return share._replace(batches=batches, targets=count)
train.read_share = masked
"""


@pytest.mark.slow
def test_uneven_ignored_targets_weigh_the_same_on_any_ranks_and_micro_batches(tiny_data):
    logs = []
    for name, ranks, micro in (("a", 0, 8), ("b", 0, 1), ("c", 0, 3), ("d", 2, 2)):
        done = patched(tiny_data, UNEVEN, ranks, name=name, micro_batch_size=micro, samples=48)
        assert done.returncode == 0, done.stderr
        logs.append(log_of(tiny_data, name))
    plain = train_here(tiny_data, name="plain", samples=48)
    assert float(plain[0]["training_loss"]) != float(logs[0][0]["training_loss"])
    for rows in logs[1:]:
        for a, b in zip(logs[0], rows):
            for column in ("training_loss", "grad_norm"):
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5)


@pytest.mark.parametrize("seconds, wait", [(19, 0), (57, 38)])
def test_a_slow_disk_is_hidden_behind_the_step_and_shows_where_it_is_slower(
    tiny_data, monkeypatch, capsys, seconds, wait
):
    """On a clock of its own: the disk takes so many seconds for a share, and the step takes 19."""
    clock = types.SimpleNamespace(now=0.0, disk=0.0)

    def submit(read, *args):
        clock.disk = there = max(clock.disk, clock.now) + seconds
        share = read(*args)

        def result():
            clock.now = max(clock.now, there)
            return share

        return types.SimpleNamespace(result=result)

    def computing(step, model):
        clock.now += 19

    time = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(train, "time", time)
    monkeypatch.setattr(train, "ThreadPoolExecutor", lambda _: types.SimpleNamespace(submit=submit))
    at_each_step(monkeypatch, computing)
    rows = train_here(tiny_data, validation="", log_every=4)
    # Nothing is there to hide the first one behind; a row has the waits since the one before.
    expected = [seconds + 3 * wait] + [4 * wait] * 4
    assert [float(row["data_seconds"]) for row in rows] == expected
    told = "67% of the time waiting for data" in capsys.readouterr().err
    assert told == (wait > 0)


POISONED = """
import model
forward, clip, steps = model.MLP.forward, train.parallel.clip_gradients, [0]
def counting(*args):
    steps[0] += 1
    return clip(*args)
def poisoned(self, x):
    y = forward(self, x)
    if steps[0] == 6 and rank == last and torch.is_grad_enabled():
        y = y.clone()
        y[1, 3, 5] = float("inf")  # the second sample of every micro-batch
    return y
last = int(os.environ.get("WORLD_SIZE", 1)) - 1
train.parallel.clip_gradients, model.MLP.forward = counting, poisoned
"""


@pytest.mark.parametrize(
    "ranks, samples",
    [
        (0, "rank 0: [48, 49, 50, 51, 52, 53, 54, 55]"),
        pytest.param(2, "rank 1: [49, 51, 53, 55]", marks=pytest.mark.slow),
    ],
)
def test_infinity_on_one_rank_stops_all_before_the_update(tiny_data, ranks, samples):
    done = patched(tiny_data, POISONED, ranks, checkpoint_every=5)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = said(done)
    assert line.startswith("train.py: step 7: loss nan, gradient norm nan on samples 48 to 55")
    assert f"({samples}); stopped before the update, the last step saved is 5" in line
    assert checkpoint.latest(tiny_data / "out/run").name == "step0000005"


def test_a_gradient_that_no_loss_explains_stops_too(tiny_data, monkeypatch, capsys):
    def poison(step, model):
        if step == 7:
            model.norm.weight.grad[0] = float("inf")

    at_each_step(monkeypatch, poison)
    assert train.main(options(tiny_data, checkpoint_every=5)) == 1
    error = capsys.readouterr().err
    assert "gradient norm inf on samples 48 to 55 (the loss of every sample is finite);" in error
    assert checkpoint.latest(tiny_data / "out/run").name == "step0000005"


def test_the_host_waits_once_a_step(tiny_data, monkeypatch):
    """Whatever asks a tensor for its number asks through one of these."""
    asked, seen = [], []

    def noting(name, method):
        def noted(self, *args):
            asked.append(name)
            return method(self, *args)

        return noted

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    at_each_step(monkeypatch, lambda step, model: seen.append(len(asked)))
    train_here(tiny_data, validation="", log_every=100, max_minutes=60)
    steps = [asked[a:b] for a, b in pairwise(seen)]
    reading = [name for step in steps for name in step if name != "tolist"]
    assert len(steps) == 19
    # The thread that reads ahead counts the targets, on the host, one number a micro-batch.
    assert set(reading) <= {"__int__"} and len(reading) <= 2 * 20
    assert all(step.count("tolist") == 1 for step in steps)


def test_data_that_vanishes_mid_run_loses_nothing(tiny_data, monkeypatch):
    def vanish(step, model):
        if step == 4:
            os.remove(tiny_data / "a.bin")

    at_each_step(monkeypatch, vanish)
    with pytest.raises(DataError, match=r"a\.bin: No such file"):
        train_here(tiny_data, save_every=3)
    deadline = time.monotonic() + 30
    while checkpoint.latest(tiny_data / "out/run") is None:  # a process waits for it when it ends
        assert time.monotonic() < deadline
    assert checkpoint.latest(tiny_data / "out/run").name == "step0000003"


SPYING = """
read = train.read_share
def noting(*args):
    share = read(*args)
    with open(f"PATH.{rank}", "a") as file:
        print(*share.samples, file=file)
    return share
train.read_share = noting
"""


@pytest.mark.slow
def test_a_run_moves_between_worlds_and_trains_on_the_same_samples(tiny_data):
    """1 -> 2 -> 4 -> 1 ranks, twice in a row on some, with every strategy."""
    change = dict(global_batch_size=5, samples=100, warmup_samples=15, micro_batch_size=2)
    change |= dict(learning_rate=3e-4, min_learning_rate=3e-5, eps=1e-5, validation="")
    whole = train_here(tiny_data, name="whole", **change)
    change |= dict(name="moved", keep_last=1)
    lives = ((0, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "hsdp"), (0, "fsdp"), (4, "hsdp"))
    for step, (ranks, strategy) in enumerate(lives):
        change |= dict(max_minutes=1e-6, parallel=strategy, replica_size=2)  # stops after one step
        path = tiny_data / f"read{step}"
        done = patched(tiny_data, SPYING.replace("PATH", str(path)), ranks, **change)
        assert done.returncode == 0, done.stderr
        # of each rank the first share is what it trained on, the second what it read ahead
        firsts = [open(f"{path}.{rank}").readline().split() for rank in range(ranks or 1)]
        read = sorted(int(x) for ids in firsts for x in ids)
        assert read == list(range(5 * step, 5 * step + 5))
    assert checkpoint.latest(tiny_data / "out/moved").name == "step0000006"
    assert os.listdir(tiny_data / "out/moved/checkpoints") == ["step0000006"]
    rows = train_here(tiny_data, **change | dict(max_minutes=0))
    assert len(rows) == len(whole)
    for a, b in zip(whole, rows):
        for column in ("training_loss", "grad_norm"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-6)
    a, b = weights_of(tiny_data, "whole"), weights_of(tiny_data, "moved")
    assert all((a[n] - b[n]).abs().max() < 1e-6 for n in a)


def test_decay_touches_matrices_only():
    config = Config(**SMALL)
    model = train.Lucie(checkpoint.architecture(vars(config)))
    groups = train.build_optimizer(config, model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0 if name.endswith("norm.weight") else config.weight_decay), name


@pytest.mark.parametrize("source", ["run", "hf"])
def test_hand_over_between_phases_takes_weights_only(tiny_data, source):
    train_here(tiny_data, name="main", samples=80)
    given = tiny_data / "out/main"
    if source == "hf":
        hf.to_hf(checkpoint.from_run(given)[0], tiny_data / "hf")
        given = f"hf:{tiny_data}/hf"
    change = dict(name="longer", seq_len=32, rope_theta=2e7, samples=8, checkpoint_prefix="long_")
    change |= dict(learning_rate=0.0, min_learning_rate=0.0, warmup_samples=0)
    rows = train_here(tiny_data, init_from=given, **change)
    assert [r["training_steps"] for r in rows] == ["1"]
    path = tiny_data / "out/longer/checkpoints/long_step0000001"
    assert checkpoint.read_state(path)["samples"] == 8
    assert same_weights(tiny_data, "main", "longer")  # a rate of zero changed nothing


def test_a_changed_mixture_is_not_resumed_nor_are_damaged_weights_handed_over(tiny_data):
    train_here(tiny_data, max_minutes=1e-6)
    shard = tiny_data / "out/run/checkpoints/step0000001/shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(train.CheckpointError, match=r"shard-00001\.safetensors: damaged"):
        train_here(tiny_data, name="next", init_from=tiny_data / "out/run")
    assert not (tiny_data / "out/next").exists()
    shard.write_bytes(content)
    write_weights(tiny_data / "mixture.csv", {"a": 0.6, "b": 0.4})
    done = run(tiny_data)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = said(done)
    assert "have changed since it began" in line


@pytest.mark.slow
def test_hours_are_counted_on_over_restarts_and_ranks(tiny_data, monkeypatch):
    train_here(tiny_data, max_minutes=1e-6)
    state = checkpoint.read_state(checkpoint.latest(tiny_data / "out/run"))
    assert 0 < state["seconds"] == state["gpu_seconds"]
    load, hours = checkpoint.load, {"seconds": 3600.0, "gpu_seconds": 512 * 3600.0}
    monkeypatch.setattr(checkpoint, "load", lambda *args: load(*args) | hours)
    row = train_here(tiny_data)[-1]
    assert 1 < float(row["walltime"]) < 1.1
    assert 512 < float(row["gputime"]) < 512.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_gpu_follows_the_cpu(tiny_data):
    cpu = train_here(tiny_data, name="cpu")
    done = run(tiny_data, name="gpu", device="cuda")
    assert done.returncode == 0, done.stderr
    for a, b in zip(cpu, log_of(tiny_data, "gpu")):
        assert float(a["training_loss"]) == pytest.approx(float(b["training_loss"]), rel=1e-3)


# --- what a run says


def test_start_validation_and_end_are_told(tiny_data, capsys):
    train_here(tiny_data, max_minutes=1e-6)
    out = capsys.readouterr().out
    assert out.startswith("run: 74,176 parameters, float32, 1 x CPU\n20 steps, 160 samples, 2,560 ")
    assert f"tokens; begins at step 0; writes to {tiny_data}/out/run\n" in out
    assert "1 of 2 sources are read more than once, a the most often: 1.9 times\n" in out
    assert "run: stopped after step 1 of 20; to continue, run the same command: python " in out
    train_here(tiny_data)
    out, err = capsys.readouterr()
    assert "; resumes after step 1; " in out and "run: finished (20 steps)\n" in out
    assert f"newest checkpoint: {tiny_data}/out/run/checkpoints/step0000020" in out
    assert f"step 20: validation loss {float(log_of(tiny_data)[-1]['validation_loss']):.4f}" in err
    assert len(train_here(tiny_data)) == 20
    assert "run: had already finished (20 steps)" in capsys.readouterr().out


# --- one process a run


def test_a_second_process_is_refused_before_it_touches_anything(tiny_data, monkeypatch):
    train_here(tiny_data, max_minutes=1e-6)
    unfinished = tiny_data / "out/run/checkpoints/.step0000002.tmp"
    unfinished.mkdir()  # as the first one would be writing it
    before = (tiny_data / "out/run/log.csv").read_bytes()
    (tiny_data / "out/link").symlink_to(tiny_data / "out/run")
    monkeypatch.setattr(train, "build_model", None)  # that would take the memory of the first one
    with train.claim(tiny_data / "out/run"):
        for name in ("run", "link"):
            with pytest.raises(train.CheckpointError, match="another process is training this run"):
                train_here(tiny_data, name=name)
    assert (tiny_data / "out/run/log.csv").read_bytes() == before and unfinished.is_dir()
    monkeypatch.undo()
    assert len(train_here(tiny_data)) == 20


# --- longer runs


def test_a_constant_schedule_can_be_extended_bit_for_bit(tiny_data):
    constant = dict(lr_decay="constant", validation="")
    whole = train_here(tiny_data, name="whole", samples=240, **constant)
    train_here(tiny_data, **constant)
    assert results(train_here(tiny_data, samples=240, **constant)) == results(whole)
    with pytest.raises(train.ConfigError, match="samples was 240 and is now 80"):
        train_here(tiny_data, samples=80, **constant)


def test_another_run_of_the_same_name_is_refused(tiny_data):
    train_here(tiny_data)
    for change, message in (
        (dict(samples=240), "samples was 160 and is now 240.*--name.*--init_from=.*/run"),
        (dict(learning_rate=0.5, seed=1), "seed was 42 and is now 1, learning_rate was 0.01"),
        (dict(init_from="scratch"), "already holds a run"),
    ):
        with pytest.raises(train.ConfigError, match=message):
            train_here(tiny_data, **change)
        gc.collect()  # the traceback of the error holds the lock on the run
    assert checkpoint.latest(tiny_data / "out/run").name == "step0000020"


@pytest.mark.slow
def test_the_small_run_chains_at_full_width(tmp_path, capsys):
    """config/small_*.py as they are, but for two blocks, toy lengths and a vocabulary of bytes."""
    tokenizer.save({bytes([b]): 4 + b for b in range(256)}, tmp_path / "bytes.tiktoken")
    rng = np.random.default_rng(0)
    write_stream(tmp_path / "a", [rng.integers(4, 260, 400) for _ in range(40)], 260)
    (tmp_path / "m.csv").write_text("name,path,weight,language\na,a,1,fr\n")
    toy = {"num_hidden_layers": 2, "vocab_size": 260, "samples": 6, "global_batch_size": 2}
    toy |= {"micro_batch_size": 1, "eval_samples": 2, "dtype": "float32", "device": "cpu"}
    toy |= {"tokenizer": tmp_path / "bytes.tiktoken", "out_dir": tmp_path, "batch_ramp_samples": 0}
    toy |= {"mixture": tmp_path / "m.csv", "validation": tmp_path / "m.csv"}
    before = None
    for phase, length in (("pretrain", 128), ("extension", 256), ("annealing", 256)):
        start = {"init_from": before} if before else {}
        given = toy | {"seq_len": length} | start
        train.main([f"config/small_{phase}.py", *(f"--{k}={v}" for k, v in given.items())])
        before = tmp_path / f"small_{phase}"
        assert "finished (3 steps)" in capsys.readouterr().out
    assert checkpoint.latest(before).name == "step0000003"
    model, options = checkpoint.from_run(before)
    assert (model.config.hidden_size, options["rope_theta"]) == (1024, 2e7)
    assert not (tmp_path / "small_extension/completions.csv").exists()
    last = completions_of(tmp_path, "small_annealing", folder="")
    assert {prompt for _, prompt, _ in last} == {*options["sample_prompts"].split("\n")}


# --- what is seen while it runs


@pytest.fixture
def held_out(tiny_data):
    """A mixture to validate on: a is French, b English and three times as much."""
    path = tiny_data / "held_out.csv"
    path.write_text("name,path,weight,language\na,a,1,fr\nb,b,3,en\n")
    return path


def test_validation_of_each_language(tiny_data, held_out):
    """Their losses, each over its own samples, are those of plain torch for the final weights."""
    last = train_here(tiny_data, validation=held_out, eval_samples=7)[-1]
    model, found = checkpoint.from_run(tiny_data / "out/run")[0], {"fr": [], "en": []}
    mixture = train.Mixture(held_out, 16, 42, 97)
    for i in range(7):
        x = torch.tensor(mixture[i])
        loss = F.cross_entropy(model(x[None, :-1])[0].double(), x[1:]).item()
        found[["fr", "en"][mixture.locate(i).source]].append(loss)
    for column, losses in (
        ("fr", found["fr"]),
        ("en", found["en"]),
        ("loss", found["fr"] + found["en"]),
    ):
        assert float(last[f"validation_{column}"]) == pytest.approx(np.mean(losses), abs=1e-5)
    train_here(tiny_data, name="other", eval_samples=7)
    assert results(log_of(tiny_data, "other"))[-1][:5] == results([last])[0][:5]


@pytest.fixture
def prompted(tiny_data):
    """Options of a run that completes two prompts every 8 steps: (options, its tokenizer)."""
    tokenizer.save({bytes([b]): 4 + b for b in range(256)}, tiny_data / "bytes.tiktoken")
    prompts = "Ab\nThe capital"
    sampled = {"tokenizer": tiny_data / "bytes.tiktoken", "sample_prompts": prompts}
    sampled |= {"vocab_size": 260, "seq_len": 64, "sample_every": 8, "log_every": 10}
    return sampled, tokenizer.load(tiny_data / "bytes.tiktoken")


def completions_of(data, name="run", folder="out"):
    with open(data / folder / name / "completions.csv", newline="", encoding="utf-8") as f:
        return [
            (int(row["training_steps"]), row["prompt"], row["text"]) for row in csv.DictReader(f)
        ]


def test_completions_are_those_of_the_checkpoint_and_leave_the_training_alone(
    tiny_data, prompted, capsys
):
    boards = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sampled, byte_level = prompted
    rows = train_here(tiny_data, **sampled)
    err = capsys.readouterr().err
    assert [int(row["training_steps"]) for row in rows] == [8, 10, 16, 20]
    found = completions_of(tiny_data)
    assert [step for step, *_ in found] == [8, 8, 16, 16, 20, 20]
    model = checkpoint.from_run(tiny_data / "out/run")[0]
    expected = generate.complete(
        model, byte_level, ["Ab", "The capital"], 40, generate.Sampling(temperature=0)
    )
    assert [text for _, _, text in found[-2:]] == [x.text for x in expected]
    assert f"step 20: Ab |{expected[0].text}".replace("\n", "\\n") in err
    events = boards.EventAccumulator(str(tiny_data / "out/run/tensorboard")).Reload()
    shown = [
        event.tensor_proto.string_val[0] for event in events.Tensors("completion/2/text_summary")
    ]
    assert shown[-1].decode() == f"The capital | {expected[1].text}" and len(shown) == 3
    without = sampled | {"sample_every": 0, "log_every": 1}
    plain = results(train_here(tiny_data, name="plain", **without))
    assert [row for row in plain if row[0] in ("8", "10", "16", "20")] == results(rows)
    # A resumed run writes what a crash has left past its checkpoint once.
    train_here(tiny_data, name="resumed", max_minutes=1e-6, **sampled)
    with open(tiny_data / "out/resumed/completions.csv", "a") as f:
        f.write('8,Ab,"left by a crash\n8,T')
    train_here(tiny_data, name="resumed", max_minutes=1e-6, **sampled | {"sample_every": 99})
    train_here(tiny_data, name="resumed", **sampled)
    assert completions_of(tiny_data, "resumed") == found


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_two_ranks_complete_and_validate_as_one(tiny_data, prompted, held_out, parallel):
    sampled = prompted[0] | {"validation": held_out, "eval_samples": 5}
    for name, ranks in (("run", 0), ("two", 2)):
        done = run(tiny_data, ranks=ranks, name=name, parallel=parallel, **sampled)
        assert done.returncode == 0, done.stderr
    assert completions_of(tiny_data, "two") == completions_of(tiny_data)
    one, two = log_of(tiny_data)[-1], log_of(tiny_data, "two")[-1]
    for column in ("validation_loss", "validation_fr", "validation_en"):
        assert float(two[column]) == pytest.approx(float(one[column]), abs=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer": ""}, "sample_every needs a --tokenizer and --sample_prompts"),
        ({"sample_prompts": ""}, "sample_every needs a --tokenizer and --sample_prompts"),
        (
            {"sample_prompts": "x" * 24},
            "a prompt of 25 tokens is too long; 256 is the most, and 40",
        ),
    ],
)
def test_prompts_that_cannot_be_completed(tiny_data, prompted, change, message):
    with pytest.raises(train.ConfigError, match=message):
        train_here(tiny_data, **prompted[0] | change)


def test_the_summary_tells_what_it_took_and_what_to_do_next(
    tiny_data, prompted, monkeypatch, capsys
):
    counter = count(360_000, 360_000)  # joules, at every row
    monkeypatch.setattr(train, "energy_meter", lambda _: lambda: next(counter))
    rows = train_here(tiny_data, **prompted[0] | {"sample_every": 0, "eval_every": 4})
    out = capsys.readouterr().out
    losses = {float(row["validation_loss"]): row for row in rows if row["validation_loss"]}
    best, step = min(losses), losses[min(losses)]["training_steps"]
    run = tiny_data / "out/run"
    assert re.search(
        r"run: finished \(20 steps\)\n10,240 tokens, \d\.\d\d hours, "
        rf"{len(rows) / 10:.2f} kWh\n"
        rf"best validation loss {best:.4f}, after step {step}\n"
        rf"newest checkpoint: {run}/checkpoints/step0000020\n"
        rf"to complete prompts: python generate.py {run} --interactive\n"
        rf"to export it: python -m checkpoint export {run} --out {run}_hf\n",
        out,
    )


def test_energy_is_what_nvml_counts(tmp_path, monkeypatch):
    """From millijoules since the driver was loaded; a call that fails counts nothing."""
    (tmp_path / "pynvml.py").write_text(
        "readings = {7: [1500, 4000, None]}\n"
        "def nvmlInit(): pass\n"
        "def nvmlDeviceGetHandleByUUID(name): return {'GPU-12ab': 7}[name]\n"
        "def nvmlDeviceGetTotalEnergyConsumption(gpu): return 0 + readings[gpu].pop(0)\n"
    )
    gpu = torch.device("cuda")
    assert log.energy_meter(gpu)() == 0.0  # not installed
    monkeypatch.syspath_prepend(tmp_path)
    properties = types.SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    used = log.energy_meter(gpu)
    assert [used(), used()] == [2.5, 0.0]
    properties.uuid = "another"
    assert log.energy_meter(gpu)() == 0.0


# --- logs


def test_a_continued_log_loses_what_lies_past_its_checkpoint(tmp_path):
    """Of other columns too: as it was before data_seconds, and with one that is gone."""
    (tmp_path / "log.csv").write_text(
        "training_steps,training_tokens,training_loss,walltime,gputime,learning_rate,grad_norm,"
        "loudness,tokens_per_second,mfu,validation_loss\n"
        "1,16,4.5,0.1,0.2,0.001,1.5,11,99,,4.25\n2,32,4.25,0.2,0.4,0.002,1.25,11,98,0.5,\n"
        "3,48,4.0,0.3,0.6,0.003,1.0,11,97,0.5,\n2,32,4.25\n"  # killed in the middle of a row
    )
    expected = [
        ",".join(log.LOG_COLUMNS),
        "1,16,4.5,0.1,0.2,0.001,1.5,99,,4.25,",
        "2,32,4.25,0.2,0.4,0.002,1.25,98,0.5,,",
    ]
    write = log.open_log(Config(**SMALL), tmp_path, [], 2)
    assert (tmp_path / "log.csv").read_text().splitlines() == expected
    write((3, None, 1.5, *[None] * 7), {}, {})
    assert (tmp_path / "log.csv").read_text().splitlines() == [*expected, "3,,1.5,,,,,,,,"]
    (tmp_path / "log.csv").write_text("no,log\n1,2\n")
    log.open_log(Config(**SMALL), tmp_path, [], 2)
    assert (tmp_path / "log.csv").read_text() == expected[0] + "\n"


def test_training_goes_on_without_a_board_that_fails(tiny_data, monkeypatch, capsys):
    broken = types.SimpleNamespace(add_scalar=None)  # to call it is a TypeError
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_, **__: broken)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert len(train_here(tiny_data, wandb_project="lucie")) == 20
    error = capsys.readouterr().err
    assert error.count("train.py: continuing without TensorBoard (") == 1
    assert error.count("continuing without Weights & Biases (") == 1


def test_weights_and_biases_gets_the_same_numbers(tiny_data, monkeypatch):
    seen = []
    board = types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)))
    wandb = types.SimpleNamespace(init=lambda **options: seen.append(options) or board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    rows = train_here(tiny_data, wandb_project="lucie")
    options, *logged = seen
    assert (options["project"], options["name"], options["resume"]) == ("lucie", "run", "allow")
    for (step, numbers), row in zip(logged, rows, strict=True):
        told = {n: str(v) for n, v in numbers.items()} | {"training_steps": str(step)}
        assert told == {n: v for n, v in row.items() if v}


# --- documents


def test_a_packed_sample_has_the_loss_of_its_documents_alone():
    """Of random lengths, some of them of one token; the first begins before the sample."""
    config = Config(**SMALL | {"seq_len": 64, "document_mask": True})
    model = train.Lucie(checkpoint.architecture(vars(config)))
    tokens = torch.randint(1, 97, (2, 65), generator=torch.Generator().manual_seed(0))
    starts = [[9, 10, 30, 63], [0, 31]]
    for row, positions in zip(tokens, starts):
        row[positions] = 0
    x, y = tokens[:, :-1], tokens[:, 1:]
    cpu = torch.device("cpu")
    packed = train.loss_sum(model, x, y, config, cpu).item()
    alone = 0.0
    config.document_mask = False
    for row, positions in enumerate(starts):
        for a, b in pairwise([*dict.fromkeys([0, *positions]), 64]):
            one = slice(row, row + 1), slice(a, b)
            alone += train.loss_sum(model, x[one], y[one], config, cpu).item()
    assert packed == pytest.approx(alone, rel=1e-6)  # some roundings of fp32
    assert train.loss_sum(model, x, y, config, cpu).item() != pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_document_mask_trains_on_documents(tiny_data, monkeypatch, masked):
    seen, forward = [], train.Lucie.forward

    def noting(self, tokens, targets, **options):
        seen.append(options["cu_seqlens"])
        return forward(self, tokens, targets, **options)

    monkeypatch.setattr(train.Lucie, "forward", noting)
    train_here(tiny_data, samples=32, document_mask=masked)
    for mask in seen:  # of 4 samples of 16
        assert int(mask[-1]) == 64 and len(mask) >= 5 if masked else mask is None


# --- bad input: one line, exit 2, nothing lost or half written


@pytest.mark.parametrize(
    "change,message",
    [
        ({"samples": 7, "warmup_samples": 0}, "samples must be at least 8, those of a step"),
        ({"mixture": "none.csv"}, "none.csv: No such file"),
        ({"vocab_size": 50}, "past the vocabulary of 50"),
        ({"seq_len": 100_000}, "too few for one sample of 100,000"),
        ({"tokenizer": "{data}/r.tiktoken"}, "has 260 tokens, but the model's vocabulary has 97"),
        ({"init_from": "resume"}, "no complete checkpoint"),
        ({"init_from": "hf:{data}/nowhere"}, "nowhere"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float32 or auto"),
        ({"device": "cuda"}, "device 'cuda'"),
        ({"kernels": "triton"}, "need a CUDA GPU, and there is none here"),
        ({"out_dir": "/dev/null/x"}, "/dev/null/x"),
        ({"parallel": "tp"}, "parallel must be one of fsdp, ddp, hsdp, not 'tp'"),
        ({"activation_checkpointing": "some"}, "activation_checkpointing must be one of none"),
        ({"hidden_size": 65536, "num_hidden_layers": 200}, "use more GPUs, or try config/demo"),
    ],
)
def test_bad_input_is_one_line(tiny_data, change, message):
    if torch.cuda.is_available() and {"cuda", "triton"} & {str(v) for v in change.values()}:
        pytest.skip("there is one here")

    tokenizer.save({bytes([b]): b + 4 for b in range(256)}, tiny_data / "r.tiktoken")
    change = {k: v.format(data=tiny_data) if type(v) is str else v for k, v in change.items()}
    expected = (train.ConfigError, train.DataError, train.CheckpointError, OSError)
    with pytest.raises(expected) as caught:
        train_here(tiny_data, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoint.latest(tiny_data / "out/run") is None


def test_training_passes_on_partial_and_holds_out_the_first_samples(tiny_data):
    held, path = tiny_data / "held.csv", tiny_data / "m.csv"
    held.write_text("name,path,weight\na,a,1\nb,b,3\n")
    path.write_text(held.read_text() + "c,c,9\n")
    config = Config(mixture=str(path), validation=str(held), seq_len=7, vocab_size=97,
                    eval_samples=8, micro_batch_size=8)  # fmt: skip
    with pytest.raises(DataError, match="sources lack files: c"):
        train.open_data(config, 0, 1)
    config.partial = True
    found, held_out = train.open_data(config, 0, 1)
    expected = train.Mixture(held, 7, 42, 97)
    assert [found.locate(i) for i in range(100)] == [expected.locate(i) for i in range(100)]
    assert held_out["unknown"].batches[0][0].tolist() == [
        expected[i][:-1].tolist() for i in range(8)
    ]
