"""The plan against the allocator: every case below is a step built as train.py builds it, measured.

Run as a script this file is one rank that measures: `test_plan.py '[{"seq_len": 64}, ...]'`.
"""

import gc
import json
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import launch
from torch.profiler import ProfilerActivity, profile, record_function

import parallel
import train
from bench import plan, step
from config import Config, load
from config.cli import ConfigError

CUDA = torch.cuda.is_available()
SMALL = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    vocab_size=4096,
    seq_len=512,
    micro_batch_size=2,
    global_batch_size=2,
    dtype="float32",
    device="cpu",
)


def small(**change):
    return Config(**(SMALL | change))


# --- what the allocator counts -------------------------------------------------------------------


def prepare(config, device):
    """(what is alive between two steps, a function that makes a step), built as train.py does."""
    dtype, world = getattr(torch, config.dtype), dist.is_initialized() and dist.get_world_size()
    model, forward = train.build_model(config, device, dtype)
    for parameter in model.parameters():
        parallel.local_rows(parameter)[0].normal_(0, 0.01)
    optimizer = train.build_optimizer(config, model)
    share = config.global_batch_size // max(world, 1)
    size = min(config.micro_batch_size, share)

    def step(marked=lambda _: nullcontext()):
        for start in range(0, share, size):
            x = torch.randint(config.vocab_size, (size, config.seq_len), device=device)
            final = start + size == share
            with parallel.micro_batch(
                forward, final, config.reduce_each_micro_batch, config.gather_each_micro_batch
            ):
                with marked("forward"):
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
    """Bytes of the state between two steps, of what the forwards of a step keep, of its peak, left
    behind by it; and how many numbers its collectives gather and scatter."""
    resting, step = prepare(config, torch.device("cpu"))
    state = sum(t.untyped_storage().nbytes() for t in resting)
    with_ranks, tries = dist.is_initialized(), []
    for _ in range(4 if with_ranks else 1):
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=with_ranks
        ) as profiler:
            step(record_function)
            gc.collect()  # the interpreter of Triton leaves cycles
        tries.append(added_up(allocations(profiler)))
    # What gloo's own thread happens to free goes unseen: the step counts of which all was seen.
    left, forward, highest = min(tries)
    sent = {}
    for event in profiler.events():
        if event.name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            numbers = max(torch.Size(shape).numel() for shape in event.input_shapes if shape)
            sent[event.name] = sent.get(event.name, 0) + numbers
    peak = state + highest
    return {"state": state, "forward": forward, "peak": peak, "left": left, "sent": sent}


def added_up(events):
    """Bytes (left at the end, made and kept by forwards, most at a time)."""
    alive = forward = highest = 0
    gloos = set()  # its own copies, which NCCL does not make
    for size, address, within in events:
        if size > 0:
            own = any(name.startswith(("c10d::", "gloo:")) for name in within)
            (gloos.add if own else gloos.discard)(address)
        if address not in gloos:
            alive += size
            forward += size * ("forward" in within)
            highest = max(highest, alive)
    return abs(alive), forward, highest


def measure_on_the_chip(config):
    device = torch.device("cuda")
    _, step = prepare(config, device)
    torch.cuda.reset_peak_memory_stats()
    step()
    return {"peak": torch.cuda.max_memory_allocated()}


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
    name, parts = plan.peak(plan.Job(config, gpus))
    return name, parts, sum(parts.values())


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
    _, parts, total = planned(config, 1)
    assert measured["peak"] > 80e6
    assert total == pytest.approx(measured["peak"], rel=0.02)
    assert measured["left"] < 0.02 * total
    assert parts["parameters"] + parts["optimizer"] == pytest.approx(measured["state"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", parallel.ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_keeps_what_the_plan_says(mode, dtype):
    """The difference of one more block: nothing but what it keeps grows with their number."""
    kept = {}
    for layers in (1, 3):
        change = dict(activation_checkpointing=mode, num_hidden_layers=layers, vocab_size=512)
        change |= dict(seq_len=128)  # bf16 is slow on processors that have none
        config = small(dtype=dtype, **change)
        kept[layers] = measure(config)["forward"]
    job = plan.Job(config, 1)
    block = job.tokens * sum(plan.kept_by_a_block(job, mode).values())
    if dtype == "bfloat16" and mode == "none":
        block += 2 * (job.units[1] - 2 * 256)  # autocast's copies of its matrices
    assert (kept[3] - kept[1]) / 2 == pytest.approx(block, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="counts what the interpreter allocates")
@pytest.mark.parametrize("dtype,mode", [("float32", "none"), ("bfloat16", "selective")])
def test_with_tritons_kernels_there_are_fewer_temporary_tensors(chip, dtype, mode):
    change = dict(hidden_size=128, intermediate_size=384, num_attention_heads=2, vocab_size=512)
    change |= dict(num_hidden_layers=3, seq_len=128, activation_checkpointing=mode, dtype=dtype)
    config = small(**change, kernels="triton")
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(400, 1, 1)  # the interpreter leaves tensors in cycles
    try:
        measured = measure(config)
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
    _, _, total = planned(config, 1)
    assert total == pytest.approx(measured["peak"], rel=0.05)
    assert measured["left"] < 0.02 * total
    _, _, of_definitions = planned(small(**change), 1)
    assert of_definitions > 1.03 * total


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


def on_ranks(number, cases):
    done = launch(__file__, json.dumps(cases), ranks=number, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


@pytest.fixture(scope="module")
def on_two_ranks():
    return dict(zip(RANKS, on_ranks(2, list(RANKS.values()))))


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKS)
def test_of_two_ranks_too(on_two_ranks, case):
    config, measured = small(**RANKS[case]), on_two_ranks[case]
    _, parts, total = planned(config, 2)
    assert total == pytest.approx(measured["peak"], rel=0.02)
    assert measured["left"] < 0.02 * total
    state = parts["parameters"] + parts["optimizer"]
    if config.parallel == "ddp":
        state += 4 * plan.Job(config, 2).parameters
    assert state == pytest.approx(measured["state"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sharded, bf16", "two micro-batches", "reduced once"])
def test_the_traffic_is_what_the_ranks_exchange(on_two_ranks, case):
    config = small(**RANKS[case])
    job, sent = plan.Job(config, 2), on_two_ranks[case]["sent"]
    traffic = plan.traffic(job)
    gathered = traffic["all-gather, forward"] + traffic["all-gather, backward"]
    assert gathered == pytest.approx(sent["c10d::_allgather_base_"] * job.compute / 2, rel=1e-3)
    scattered = sent["c10d::_reduce_scatter_base_"] * 4 / 2
    assert traffic["reduce-scatter"] == pytest.approx(scattered, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("mode", parallel.ACTIVATION_CHECKPOINTING)
def test_the_planned_peak_is_that_of_a_gpu(mode):
    """Of 2 GB and more, beside which the workspace of cuBLAS is small."""
    change = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=8, seq_len=2048)
    change |= dict(vocab_size=32_768, num_hidden_layers=6, micro_batch_size=4, global_batch_size=8)
    change |= dict(activation_checkpointing=mode, dtype="bfloat16", device="cuda")
    (measured,) = on_ranks(1, [change])
    assert planned(small(**change), 1)[2] == pytest.approx(measured["peak"], rel=0.1)


# --- what is arithmetic --------------------------------------------------------------------------


def pretrain(*options):
    return load(["config/pretrain.py", *options])


def test_state_of_the_7b():
    job = plan.Job(pretrain(), 1)
    assert job.parameters == 6_706_958_336
    _, parts = plan.peak(job)  # a GPU alone makes 1,024 micro-batches: all gradients are there
    state = [parts[name] for name in ("parameters", "gradients", "optimizer")]
    assert sum(state) == 16 * 6_706_958_336  # 107.3 GB
    assert state == [4 * 6_706_958_336, 4 * 6_706_958_336, 8 * 6_706_958_336]


def test_activations_of_the_7b():
    """Counted by hand in numbers of 2 bytes: hidden 4,096, q|k|v 6,144, feed-forward 12,288."""
    config = pretrain()
    job = plan.Job(config, 8)
    hand = {
        "none": 2 * (5 * 4096 + 6144 + 3 * 12_288) + 8 + 4 * 32,
        "selective": 2 * (3 * 4096 + 6144 + 2 * 12_288) + 4 * 32,
        "full": 2 * (2 * 4096) + 4 * 32,
    }
    for mode, bytes_a_token in hand.items():
        assert sum(plan.kept_by_a_block(job, mode).values()) == bytes_a_token


@pytest.mark.parametrize(
    "path,gpus,card,fits",
    [
        ("config/pretrain.py", 1, "h200", {"none": True, "selective": True, "full": True}),
        ("config/extension.py", 1, "h200", {"none": False, "selective": False, "full": True}),
        ("config/pretrain.py", 1, "h100", {"none": False, "selective": False, "full": False}),
        ("config/pretrain.py", 8, "h100", {"none": True, "selective": True, "full": True}),
        ("config/extension.py", 128, "h100", {"none": False, "selective": False, "full": True}),
    ],
)
def test_where_the_7b_fits(path, gpus, card, fits):
    for mode, expected in fits.items():
        config = load([path, f"--activation_checkpointing={mode}"])
        assert (planned(config, gpus)[2] <= plan.GPUS[card].memory) == expected, mode


def test_lucies_own_hours():
    """Its logs: 1,782 tokens/s on a GPU and 486,654 GPU hours, 7.5 % of 989.4 TFLOP/s."""
    tokens, hours = plan.speed(plan.Job(pretrain(), 512), 0.075, 989.4e12)
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


# --- the command line ----------------------------------------------------------------------------


def test_it_prints_a_plan(capsys):
    options = ["--gpus", "512", "--card=h100", "--mfu", "0.4", "--micro_batch_size=2"]
    step.main(["--plan", "config/pretrain.py", *options, "--activation_checkpointing=selective"])
    out = capsys.readouterr().out
    assert "6,706,958,336 parameters, on 512 x h100, fsdp" in out
    assert "of 80: fits" in out and "on each GPU 1 x 2; recomputed selective" in out
    figures = {line[2:42].strip(): line[42:].split() for line in out.splitlines()}
    parts = ["parameters", "gradients", "optimizer", "activations", "head and loss"]
    parts += ["weights for compute", "gradients on their way"]
    total = float(figures["peak"][0])
    assert sum(float(figures[part][0]) for part in parts) == pytest.approx(total, abs=0.04)
    assert figures["tokens a second on a GPU"] == ["9,453"]
    assert figures["and in main memory, to save a checkpoint"] == ["0.16"]
    assert max(map(len, out.splitlines())) <= 100


def test_it_prints_the_published_phases(capsys):
    step.main(["--plan"])
    out = capsys.readouterr().out
    assert out.count("does not fit") == 4 and out.count("  fits") == 11
    assert max(map(len, out.splitlines())) <= 100
    step.main(["--plan", "--micro_batch_size=16"])  # of every one
    assert capsys.readouterr().out.count("does not fit") > 4


@pytest.mark.parametrize(
    "arguments,told",
    [
        ("--card v100", "v100"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("--gpus many", "must be a whole number, not"),
        ("--mfu 40", "--mfu must be above 0"),
        ("--gpus 12 --parallel=hsdp --replica_size=5", "replica_size 5 does not divide the 12"),
        ("--gpus 4 --parallel=tp", "parallel must be one of fsdp, ddp, hsdp"),
        ("--gpus 4 --micro_batchsize=2", "did you mean '--micro_batch_size'"),
        ("--gpus 4 --activation_checkpointing=some", "none, selective, full"),
        ("--gpus 4 --hidden_size=100", "hidden_size 100"),
        ("nowhere.py", "nowhere.py: No such file"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(arguments, told):
    with pytest.raises(ConfigError, match=told) as caught:
        step.main(["--plan", *arguments.split()])
    assert "\n" not in str(caught.value)


def test_the_exit_code_is_2():
    done = launch("bench.step", "--plan", "--gpus", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "bench.step: --gpus must be at least 1, not 0\n"


if __name__ == "__main__":
    configs = [small(**change) for change in json.loads(sys.argv[1])]
    device = torch.device(configs[0].device)
    parallel.start_processes(device)
    how = measure_on_the_chip if device.type == "cuda" else measure
    results = [how(config) for config in configs]
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()
