"""One process, DDP, FSDP and HSDP are the same run. Ranks are processes on this machine, over gloo;
512 of them are imagined, by torch's fake process group."""

import json
import shutil
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from conftest import CUDA, TINY, launch
from kernel_checks import either
from test_train import log_of, options, weights_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import hf
import parallel
import train
from config import Config
from model import Lucie, LucieConfig

device = either

# Lucie's own optimizer: with a tiny eps AdamW turns the last bit of a tiny gradient into a step.
PUBLISHED = dict(learning_rate=3e-4, min_learning_rate=3e-5, eps=1e-5)

RUNS = """
import json, sys, torch, parallel, train
import torch.distributed as dist
ranks = parallel.start_processes(torch.device("cpu"))
parallel.start_processes = lambda device: ranks
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for arguments in json.load(open(sys.argv[1])):
    train.main(arguments)
destroy()
"""


def one_after_the_other(data, count, runs):
    """Several runs of train.py, one start of the processes for all."""
    (data / "runs.py").write_text(RUNS)
    (data / "runs.json").write_text(json.dumps([options(data, **run) for run in runs]))
    done = launch(data / "runs.py", data / "runs.json", ranks=count)
    assert done.returncode == 0, done.stderr


def steps_of(batch, **change):
    """20 steps."""
    change |= dict(global_batch_size=batch, samples=20 * batch, warmup_samples=3 * batch)
    return PUBLISHED | dict(micro_batch_size=1) | change


def same_run(data, name, reference, exactly):
    """Losses, held-out ones too, gradient norms, weights: bit for bit, or within 1e-6."""
    tolerance = 0 if exactly else 1e-6
    rows, expected = log_of(data, name), log_of(data, reference)
    assert len(rows) == len(expected) == 20
    for ours, theirs in zip(rows, expected):
        for column in ("training_loss", "grad_norm", "validation_loss"):
            a, b = float(ours[column] or 0), float(theirs[column] or 0)
            assert abs(a - b) <= tolerance * abs(b), (name, ours["training_steps"], column)
    ours, theirs = weights_of(data, name), weights_of(data, reference)
    for parameter in theirs:
        difference = (ours[parameter] - theirs[parameter]).abs().max()
        assert difference <= tolerance, (name, parameter)


@pytest.mark.slow
def test_four_ranks_are_the_run_of_one_process(tiny_data):
    """A sum of two gradients has no order; of more, every strategy adds them in its own."""
    runs = [("hsdp", 2), ("hsdp", 5), ("fsdp", 5), ("ddp", 2), ("ddp", 3)]
    for batch in (2, 3, 5):
        train.main(options(tiny_data, name=f"one-{batch}", **steps_of(batch)))
    changes = [
        dict(parallel=strategy, name=f"{strategy}-{b}", replica_size=2) for strategy, b in runs
    ]
    all_steps = [steps_of(b, **change) for (_, b), change in zip(runs, changes)]
    one_after_the_other(tiny_data, 4, all_steps)
    for strategy, batch in runs:
        same_run(tiny_data, f"{strategy}-{batch}", f"one-{batch}", exactly=batch == 2)


@pytest.mark.slow
def test_a_rank_without_a_row_takes_part(tiny_data):
    """Four rows of a norm are two and two: the third rank has none, to train, to save, to load.

    Not bit for bit: a third is no binary number."""
    shape = dict(hidden_size=4, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    shape |= steps_of(2, save_every=10, keep_last=9, initializer_range=0.3)
    train.main(options(tiny_data, name="one", **shape))
    one_after_the_other(tiny_data, 3, [dict(shape, name="three")])
    same_run(tiny_data, "three", "one", exactly=False)
    checkpoint.verify(tiny_data / "out/three/checkpoints/step0000010")
    shutil.rmtree(tiny_data / "out/three/checkpoints/step0000020")
    one_after_the_other(tiny_data, 3, [dict(shape, name="three")])
    same_run(tiny_data, "three", "one", exactly=False)


def test_two_ranks_are_the_run_of_one_process(tiny_data):
    """The short form: uneven batches, gradients reduced each time or once, every checkpointing."""
    train.main(options(tiny_data, name="one-2", **steps_of(2)))
    train.main(options(tiny_data, name="one-5", **steps_of(5)))
    runs = [
        steps_of(2, name="fsdp-2", activation_checkpointing="selective"),
        steps_of(2, name="ddp-2", parallel="ddp", activation_checkpointing="full"),
        steps_of(5, name="once-5", reduce_each_micro_batch=False, gather_each_micro_batch=False),
        steps_of(5, name="hsdp-5", parallel="hsdp", replica_size=1),
    ]
    one_after_the_other(tiny_data, 2, runs)
    for name in ("ddp-2", "hsdp-5"):  # of two replicas each writes what the other does not
        shards = (tiny_data / "out" / name).glob("checkpoints/step0000020/*.safetensors")
        first, second = (hf.header_of(shard)[0].keys() for shard in shards)
        assert first and second and not first & second
    for name in ("fsdp-2", "ddp-2"):
        same_run(tiny_data, name, "one-2", exactly=True)
    for name in ("once-5", "hsdp-5"):
        same_run(tiny_data, name, "one-5", exactly=False)


# --- one process that is a group of its own


@pytest.fixture
def alone():
    """A process group of one, as a lone GPU has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def imagined(request):
    """Rank 3 of as many as the parameter says; its messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "ddp"])
def test_nothing_is_left_uninitialised(alone, tmp_path, strategy):
    """A parameter or table that nobody fills keeps the NaN it is given here."""
    with torch.device("meta"):
        model = Lucie(LucieConfig(**TINY, max_position_embeddings=64))
    parallel.parallelize(model, strategy, 1, torch.device("cpu"), torch.float32)
    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.is_meta
        parallel.local_rows(tensor)[0].fill_(torch.nan)
    config = Config(seed=3, init_from="scratch")
    checkpoint.start(config, tmp_path / "run", "", model, None)
    whole = Lucie(model.config, seed=3)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        assert torch.equal(parallel.local_rows(ours)[0], theirs), name
    tables = [one.rope_tables(torch.device("cpu")) for one in (model, whole)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*tables))


@pytest.mark.parametrize("imagined", [512], indirect=True)
@pytest.mark.parametrize("strategy,replica_size,parts", [("fsdp", 0, 512), ("hsdp", 8, 8)])
def test_lucie_7b_is_never_whole_on_a_rank(imagined, strategy, replica_size, parts):
    with torch.device("meta"):
        model = Lucie(LucieConfig())
    parallel.parallelize(model, strategy, replica_size, torch.device("cpu"), torch.bfloat16)
    here = sum(parallel.local_rows(p)[0].numel() for p in model.parameters())
    assert here == 6_706_958_336 // parts
    assert parallel.shards(strategy, replica_size, 512) == parts
    for name in ("embed_tokens.weight", "layers.31.mlp.down_proj.weight", "lm_head.weight"):
        rows, first = parallel.local_rows(model.get_parameter(name))
        count = model.get_parameter(name).shape[0] // parts
        assert (len(rows), first) == (count, 3 * count)
        assert rows.dtype == torch.float32


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 NVL", None),
        ("Tesla T4", None),
    ],
)
def test_the_speed_of_a_card_is_that_of_its_form(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found = parallel.peak_flops(torch.device("cuda"))
    assert found == (tflops and pytest.approx(tflops * 1e12))


@pytest.mark.parametrize("imagined", [6], indirect=True)
def test_groups_that_do_not_divide_the_ranks_are_refused(imagined):
    with pytest.raises(ValueError, match="replica_size 4 does not divide the 6"):
        parallel.parallelize(nn.Linear(1, 1), "hsdp", 4, torch.device("cpu"), torch.float32)
    for size, parts in ((1, 1), (3, 3), (6, 6), (7, 6)):
        assert parallel.shards("hsdp", size, 6) == parts


# --- messages


class Operations(TorchDispatchMode):
    """What is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.order = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.order.append(operation.__name__.split(".")[0])
        return operation(*args, **(kwargs or {}))

    @property
    def count(self) -> Counter:
        return Counter(self.order)


def parallelized(strategy, config, replica_size=0):
    """What to call of a model in fp32 whose weights are all alike."""
    with torch.device("meta"):
        model = Lucie(config)
    forward = parallel.parallelize(
        model, strategy, replica_size, torch.device("cpu"), torch.float32
    )
    for p in model.parameters():
        parallel.local_rows(p)[0].data.fill_(0.1)
    return forward


# Of three micro-batches, two layers: embedding, blocks and head are four units. Blocks are gathered
# for the forward and again for the backward of each, the head once for both, the embedding for the
# forward alone; or everything once.
MESSAGES = {
    ("fsdp", True, True): {"_reduce_scatter_base_": 12, "allreduce_": 0, "_allgather_base_": 18},
    ("fsdp", False, False): {"_reduce_scatter_base_": 4, "allreduce_": 0, "_allgather_base_": 4},
    ("hsdp", False, True): {"_reduce_scatter_base_": 4, "allreduce_": 4, "_allgather_base_": 18},
    ("hsdp", True, False): {"_reduce_scatter_base_": 12, "allreduce_": 4, "_allgather_base_": 4},
}


@pytest.mark.parametrize("imagined", [8], indirect=True)
def test_the_next_unit_is_on_its_way_before_one_computes(imagined, tiny_config):
    forward, tokens = parallelized("fsdp", tiny_config), torch.randint(97, (1, 9))
    with Operations() as seen:
        forward(tokens, tokens)
    gathered, at_products = 0, []
    for name in seen.order:
        gathered += name == "_allgather_base_"
        if name in ("embedding", "mm"):
            at_products.append(gathered)
    # The embedding, four products in each of two blocks, those of the head: one unit ahead.
    assert at_products[:9] == [2, *[3] * 4, *[4] * 4]


@pytest.mark.parametrize("imagined", [8], indirect=True)
@pytest.mark.parametrize("strategy,reduce_each,gather_each", MESSAGES)
def test_nothing_travels_more_often_than_it_must(
    imagined, strategy, reduce_each, gather_each, tiny_config
):
    forward = parallelized(strategy, tiny_config, 4)
    tokens = torch.randint(97, (1, 9))
    with Operations() as seen:
        for number in range(3):
            with parallel.micro_batch(forward, number == 2, reduce_each, gather_each):
                forward(tokens, tokens).backward()
    for name, count in MESSAGES[strategy, reduce_each, gather_each].items():
        assert seen.count[name] == count, (name, seen.count)


def test_ddp_exchanges_gradients_at_the_last_micro_batch(alone, tiny_config):
    forward, tokens, sent = parallelized("ddp", tiny_config), torch.randint(97, (1, 9)), []

    def noting(_, bucket):
        sent.append(number)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    forward.register_comm_hook(None, noting)
    for number in range(3):
        with parallel.micro_batch(forward, number == 2, True, True):
            forward(tokens, tokens).backward()
    assert set(sent) == {2}


# --- clipping


@pytest.mark.parametrize("largest", [0.0, 0.5, 1e9])
def test_clipping_equals_torchs(tiny_config, largest):
    models = [Lucie(tiny_config), Lucie(tiny_config)]
    for model in models:
        model(torch.arange(32).view(2, 16), torch.arange(32).view(2, 16)).backward()
    gradients = [p.grad.double() for p in models[0].parameters()]
    exact = torch.stack([g.norm() for g in gradients]).norm()
    norm = parallel.clip_gradients(models[0], largest)
    expected = nn.utils.clip_grad_norm_(models[1].parameters(), largest or torch.inf)
    assert norm.shape == () and norm.dtype == torch.float32
    assert float(norm) == float(exact.float())
    assert float(expected) == pytest.approx(float(norm), rel=1e-6)
    for ours, theirs in zip(*(m.parameters() for m in models)):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=0)


# --- activation checkpointing

# Of the four products of a block, down_proj's result serves nothing that is computed again.
AGAIN = {"none": (0, 0), "selective": (0, 2), "full": (3, 2)}  # products and norms, per layer


@pytest.mark.parametrize("mode", AGAIN)
def test_what_is_kept_is_not_computed_again(tiny_config, mode):
    plain, model = Lucie(tiny_config), Lucie(tiny_config)
    parallel.checkpoint_activations(model, mode)
    tokens = torch.randint(97, (2, 33))
    seen = []
    for one in (plain, model):
        loss = one(tokens, tokens)
        with Operations() as operations:
            loss.backward()
        seen.append(operations.count)
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    layers = tiny_config.num_hidden_layers
    products, norms = AGAIN[mode]
    assert seen[1]["mm"] - seen[0]["mm"] == products * layers
    assert seen[1]["rsqrt_"] - seen[0]["rsqrt_"] == norms * layers
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert seen[0][attention] == seen[1][attention] == 0
    assert seen[1][f"{attention}_backward"] == layers


@pytest.mark.parametrize("mode", AGAIN)
def test_torch_compile_takes_blocks_whole(device, mode):
    shape = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    model = Lucie(LucieConfig(**TINY | shape, max_position_embeddings=32)).to(device)
    tokens = torch.randint(97, (1, 32), device=device)
    expected = [model(tokens, tokens)]
    expected += torch.autograd.grad(expected[0], list(model.parameters()))
    parallel.checkpoint_activations(model, mode)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.layers:
        block.compile(backend=counter, fullgraph=True)
    loss = model(tokens, tokens)
    with Operations() as operations:
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(loss, expected[0]) and all(map(torch.equal, found, expected[1:]))
    assert counter.frame_count == 1 and operations.count["attention"] == 0


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_kernels_attention_is_kept_too(chip, mode):
    shape = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    model = Lucie(LucieConfig(**TINY | shape, max_position_embeddings=32)).to(chip)
    parallel.checkpoint_activations(model, mode)
    tokens = torch.randint(97, (1, 32), device=chip)
    loss = model(tokens, tokens)
    with Operations() as operations:
        loss.backward()
    assert operations.count["attention"] == 0
    assert operations.count["attention_backward"] == len(model.layers)
    assert operations.count["rms_norm"] == 2 * len(model.layers)


# --- what ranks tell each other


SAY = """
import sys, torch, parallel
rank, world = parallel.start_processes(torch.device("cpu"))
def act(value):
    if rank == 1:
        raise OSError(5, "unplugged", "disk")
    return value
try:
    parallel.together(act, 7, errors=(OSError,))
except OSError as error:
    told = parallel.gather((rank, error.errno, error.filename, error.on_all_ranks))
print(told == [(0, 5, "disk", True), (1, 5, "disk", True)], flush=True)
torch.distributed.destroy_process_group()
"""


def test_the_error_of_one_rank_is_raised_on_all(tmp_path):
    (tmp_path / "say.py").write_text(SAY)
    done = launch(tmp_path / "say.py", ranks=2)
    assert done.returncode == 0 and done.stdout.count("True") == 2, done.stderr


# --- on the chip


COUNT_WAITS = """
import sys, warnings, torch, train
waits, seen, clip = [], [], train.parallel.clip_gradients
warnings.showwarning = lambda message, *_: waits.append(str(message))
warnings.simplefilter("always")
def counting(*args):
    torch.cuda.set_sync_debug_mode("warn")
    seen.append(len(waits))
    return clip(*args)
train.parallel.clip_gradients = counting
train.main(sys.argv[1:])
print({b - a for a, b in zip(seen[2:], seen[3:])})  # the first steps allocate and compile
"""


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_step_waits_for_the_device_once(tiny_data, strategy):
    """By torch's own detector of synchronisations; of two micro-batches of 4,096 tokens, for which
    the embedding has another kernel than for few."""
    (tiny_data / "count.py").write_text(COUNT_WAITS)
    change = dict(device="cuda", dtype="bfloat16", log_every=100, validation="", parallel=strategy)
    change |= dict(seq_len=512, micro_batch_size=8, global_batch_size=16, samples=320)
    done = launch(tiny_data / "count.py", *options(tiny_data, **change))
    assert done.returncode == 0, done.stderr
    assert "{1}" in done.stdout
