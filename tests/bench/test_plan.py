"""The plan against torch's allocator: each case below is a step, built as train.py builds it.

Run as a script this file is one rank that measures: `test_plan.py '[{"seq_len": 64}, ...]'`.
"""

import gc
import json
import re
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import launch
from torch.profiler import ProfilerActivity, profile

import parallel
import train
from bench import plan
from config import Config, load
from config.cli import ConfigError

SMALL = dict(
    hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=1, vocab_size=4096, seq_len=512, micro_batch_size=2, global_batch_size=2,
    dtype="float32", device="cpu",
)  # fmt: skip


def small(**change):
    return Config(**(SMALL | change))


# --- what the allocator counts -------------------------------------------------------------------


def prepare(config):
    """(what is alive between two steps, a function that makes a step), built as train.py does."""
    dtype, world = getattr(torch, config.dtype), dist.is_initialized() and dist.get_world_size()
    device = torch.device("cpu")
    model, forward = train.build_model(config, device, dtype)
    for parameter in model.parameters():
        parallel.local_rows(parameter)[0].normal_(0, 0.01)
    optimizer = train.build_optimizer(config, model)
    share = config.global_batch_size // max(world, 1)
    size = min(config.micro_batch_size, share)

    def step():
        for start in range(0, share, size):
            x = torch.randint(config.vocab_size, (size, config.seq_len), device=device)
            final = start + size == share
            each = config.reduce_each_micro_batch, config.gather_each_micro_batch
            with parallel.micro_batch(forward, final, *each):
                loss = train.loss_sum(forward, x, x, config, device) / (size * config.seq_len)
                loss.backward()
        parallel.clip_gradients(model, config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2 if world else 1):  # the first makes moments, the second the buckets of ddp
        step()
    resting = list(model.parameters())
    resting += [t for p in model.parameters() for t in optimizer.state[p].values()]
    if config.parallel == "ddp" and world:
        resting += [torch.empty_like(p) for p in model.parameters()]  # as large as its buckets
    return [parallel.local_rows(t)[0] for t in resting], step


def measure(config):
    """Bytes of the state between two steps, and of a step's peak."""
    resting, step = prepare(config)
    state = sum(t.untyped_storage().nbytes() for t in resting)
    tries = []
    for _ in range(4 if dist.is_initialized() else 1):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
            gc.collect()
        tries.append(left_and_highest(allocations(profiler)))
    # What gloo's own thread happens to free goes unseen: the step counts of which all was seen.
    return {"state": state, "peak": state + min(tries)[1]}


def left_and_highest(events):
    """Bytes alive at the end of the step and at its peak, beyond those at its begin."""
    alive = highest = 0
    gloos = set()  # its own copies, which NCCL does not make
    for size, address, within in events:
        if size > 0:
            own = any(name.startswith(("c10d::", "gloo:")) for name in within)
            (gloos.add if own else gloos.discard)(address)
        if address not in gloos:
            alive += size
            highest = max(highest, alive)
    return abs(alive), highest


def allocations(profiler):
    """(bytes, negative when freed; address; names of the operations it happened in), in order."""
    found, nodes = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]":
            within, parent = [], node.parent
            while parent:
                within.append(parent.name)
                parent = parent.parent
            fields = node.extra_fields
            found.append((node.start_time_ns, fields.alloc_size, fields.ptr, within))
    return [rest for _, *rest in sorted(found, key=lambda event: event[0])]


def planned(config, gpus):
    """Bytes of parameters and moments, and of all."""
    _, parts = plan.peak(plan.Job(config, gpus))
    return parts["parameters"] + parts["optimizer"], sum(parts.values())


FEW = dict(seq_len=64, micro_batch_size=1, global_batch_size=1)  # tokens: the state is nearly all
CASES = {
    "activations": dict(),
    "selective": dict(activation_checkpointing="selective"),
    "full": dict(activation_checkpointing="full", num_hidden_layers=6),
    "autocast": dict(dtype="bfloat16"),
    "autocast, full": dict(dtype="bfloat16", activation_checkpointing="full"),
    "state": FEW,
    "three micro-batches": dict(global_batch_size=3, micro_batch_size=1),
    "large vocabulary": dict(vocab_size=32_768, num_hidden_layers=1, seq_len=64),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(c, id=n, marks=[pytest.mark.slow] * (n != "state")) for n, c in CASES.items()],
)
def test_the_planned_peak_is_the_measured_one(change):
    config = small(**change)
    measured = measure(config)
    state, total = planned(config, 1)
    assert total == pytest.approx(measured["peak"], rel=0.02)
    assert state == pytest.approx(measured["state"], rel=1e-3)


RANKS = {
    "sharded, bf16": dict(dtype="bfloat16", global_batch_size=4, seq_len=128),
    "sharded, full": dict(activation_checkpointing="full", global_batch_size=4, seq_len=128),
    "two micro-batches": dict(FEW, dtype="bfloat16", global_batch_size=4),
    "reduced once": dict(FEW, global_batch_size=4, reduce_each_micro_batch=False),
    "gathered once": dict(
        FEW, global_batch_size=4, gather_each_micro_batch=False, dtype="bfloat16"
    ),
    "ddp": dict(parallel="ddp", dtype="bfloat16", global_batch_size=8, seq_len=64),
    "a copy each": dict(FEW, parallel="hsdp", replica_size=1, global_batch_size=4),
}


@pytest.fixture(scope="module")
def on_two_ranks():
    done = launch(__file__, json.dumps(list(RANKS.values())), ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("[{"))
    return dict(zip(RANKS, json.loads(line)))


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKS)
def test_planned_peaks_of_two_ranks(on_two_ranks, case):
    config, measured = small(**RANKS[case]), on_two_ranks[case]
    state, total = planned(config, 2)
    assert total == pytest.approx(measured["peak"], rel=0.02)
    if config.parallel == "ddp":
        state += 4 * plan.Job(config, 2).parameters
    assert state == pytest.approx(measured["state"], rel=1e-3)


# --- what is arithmetic --------------------------------------------------------------------------


def test_lucies_own_hours():
    """Its logs: 1,782 tokens/s on a GPU and 486,654 GPU hours, 7.5 % of 989.4 TFLOP/s."""
    tokens, hours = plan.speed(plan.Job(load(["config/pretrain.py"]), 512), 0.075, 989.4e12)
    assert tokens == pytest.approx(1782, rel=0.01)
    assert hours == pytest.approx(486_654, rel=0.01)
    assert hours == pytest.approx(3_121_742_086_144 / tokens / 3600)


def test_traffic_by_hand():
    """A million numbers of which the head and the embedding are a fixed part, 4 ranks."""
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    shape |= dict(vocab_size=10, seq_len=4, micro_batch_size=1, global_batch_size=8)
    embedding, head = 80, 80 + 8
    block = 8 * 24 + 8 * 8 + 8 * 16 + 8 * 8 + 2 * 8
    p = embedding + block + head

    def sent(**change):
        job = plan.Job(small(**shape | dict(dtype="bfloat16") | change), 4)
        return list(plan.traffic(job).values())

    # fsdp: two micro-batches, of each rank three quarters of everything, bf16 out and fp32 back
    assert sent() == [2 * 0.75 * 2 * p, 2 * 0.75 * 2 * block, 2 * 0.75 * 4 * p, 0]
    assert sent(reduce_each_micro_batch=False)[2] == 0.75 * 4 * p
    assert sent(gather_each_micro_batch=False)[:2] == [0.75 * 2 * p, 0]
    # hsdp of two pairs: half of everything within a pair, half of the gradient to and fro between
    hybrid = [2 * 0.5 * 2 * p, 2 * 0.5 * 2 * block, 2 * 0.5 * 4 * p, 2 * 0.5 * 4 * p / 2]
    assert sent(parallel="hsdp", replica_size=2) == hybrid
    assert sent(parallel="ddp") == [2 * 0.75 * 4 * p]


# --- the command ----------------------------------------------------------------------------------


def test_it_prints_a_plan(capsys):
    plan.main(["config/pretrain.py", "--gpus", "512", "--micro_batch_size=2"])
    out = capsys.readouterr().out
    assert "on each GPU 1 micro-batches of 2" in out
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    figures = {line[2:42].strip(): line[42:].split() for line in lines}
    parts = list(figures.values())[: list(figures).index("peak")]
    total = float(figures["peak"][0])
    assert len(parts) == 7 and sum(float(p[0]) for p in parts) == pytest.approx(total, abs=0.04)
    full = figures["with activation_checkpointing=full"]
    assert total > float(full[0]) and full[1:] == ["of", "80:", "fits"]
    assert figures["tokens a second on a GPU"] == ["9,453"]  # 40 % of 989.4 TFLOP/s


def test_it_compares_cards(capsys):
    """A line for each, with the figures of the plans of one."""
    plan.main(["config/small_pretrain.py", "--gpus", "1,8", "--card", "rtx4090,h100"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    named = [("1", "rtx4090"), ("8", "rtx4090"), ("1", "h100"), ("8", "h100")]
    assert [(line[0], line[2]) for line in lines] == named
    for (gpus, card), line in zip(named, lines):
        plan.main(["config/small_pretrain.py", "--gpus", gpus, "--card", card])
        out = capsys.readouterr().out
        peak = float(re.search(r"  peak +([\d.]+)", out)[1])
        hours = float(re.search(r"GPU-hours of the phase +([\d.,]+)", out)[1].replace(",", ""))
        assert float(line[3]) == pytest.approx(peak, abs=0.051) and line[5] == "fits"
        assert float(line[-2]) == pytest.approx(hours / int(gpus), abs=0.55 / int(gpus) + 0.05)
        assert re.search(r"  tokens a second +([\d,]+)", out)[1] == line[-3]


@pytest.mark.parametrize(
    "arguments,told",
    [
        ("--card h300", "--card must be one of h200, .*, not h300"),
        ("--gpus 1,x", "--gpus must be whole numbers such as 1,8, not 1,x"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("--mfu 40", "--mfu must be above 0"),
        ("--gpus 12 --parallel=hsdp --replica_size=5", "replica_size 5 does not divide the 12"),
        ("--gpus 4 --activation_checkpointing=some", "none, selective, full"),
    ],
)
def test_bad_input_is_told_in_a_line(arguments, told):
    with pytest.raises(ConfigError, match=told):
        plan.main(arguments.split())


if __name__ == "__main__":
    configs = [small(**change) for change in json.loads(sys.argv[1])]
    parallel.start_processes(torch.device("cpu"))
    results = [measure(config) for config in configs]
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()
