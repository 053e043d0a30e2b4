"""What a phase will need, by arithmetic: memory of a GPU, speed, GPU-hours, traffic.

    python -m bench.plan config/pretrain.py --gpus 512 --card h100 --micro_batch_size=2
    python -m bench.plan config/small_pretrain.py --gpus 1,8 --card rtx4090,a100,h100

Takes a config file (config/pretrain.py by default) and all options of train.py. Several cards or
numbers of GPUs are compared, a line each.

Memory is the sum of the tensors that are alive at the peak of a step. They are listed below, and
tests/bench/test_plan.py compares their sum with what torch's allocator counts for small models.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import torch

import checkpoint
import parallel
from config import Config, load
from config.cli import ConfigError, Parser, run_cli
from kernels.linear_cross_entropy import chunk_rows
from model import Lucie
from parallel import GPUS
from schedule import Schedule

ASSUMED = """\
The plan counts the tensors of a step that is not compiled. The CUDA context, NCCL's buffers and
fragmentation come on top: they must fit into the 6 % or so that a card has beyond its nominal
gigabytes. A step has global_batch_size samples, after the ramp. MFU counts 6 N + 6 L D S FLOPs a
token (model.flops_per_token), and nothing that activation checkpointing computes again. Traffic is
what a GPU sends with ring algorithms; as much arrives. With replica_size=0 a machine has 8 GPUs."""


class Job:
    """A phase on so many GPUs, or with device=cpu on so many processes of a CPU.

    Raises ConfigError for what cannot be.
    """

    def __init__(self, config: Config, gpus: int) -> None:
        if gpus < 1:
            raise ConfigError(f"--gpus must be at least 1, not {gpus}")
        try:
            with torch.device("meta"):
                model = Lucie(checkpoint.architecture(asdict(config)))
            parallel.checkpoint_activations(model, config.activation_checkpointing)
            self.schedule = Schedule(config)
            # the number of parts that a copy of the model is cut into
            self.shards = parallel.shards(config.parallel, config.replica_size or 8, gpus)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.config, self.gpus, self.model = config, gpus, model
        self.unwrapped = gpus == 1 and config.device == "cpu"
        # Weights are gathered in the dtype of compute; else whole, and cast by autocast.
        self.fsdp = config.parallel != "ddp" and not self.unwrapped
        self.reduces_each = config.reduce_each_micro_batch and gpus > 1
        # The kernels' definitions run, which make more temporary tensors.
        self.definitions = config.kernels == "torch" or config.device == "cpu"
        # Bytes of a number in a product (auto stands for bfloat16), and in the residual stream,
        # which autocast leaves in fp32.
        self.compute = 4 if config.dtype == "float32" else 2
        self.residual = self.compute if self.fsdp else 4
        # Of one GPU: micro-batches in a step, tokens in a micro-batch.
        samples = -(-config.global_batch_size // gpus)
        self.micro_batches = -(-samples // config.micro_batch_size)
        self.tokens = min(config.micro_batch_size, samples) * config.seq_len
        # Parameters; and those of the embedding, of a block, and of the last norm with the head.
        self.parameters = model.num_params()
        embedding, blocks = model.embed_tokens.weight.numel(), len(model.layers)
        block = sum(p.numel() for p in model.layers[0].parameters())
        self.units = embedding, block, self.parameters - embedding - blocks * block


# --- memory --------------------------------------------------------------------------------------


def kept_by_a_block(job: Job, mode: str) -> int:
    """What a block keeps for its backward in a mode of activation_checkpointing: bytes a token."""
    c, r, b = job.config, job.residual, job.compute
    hidden, wide, heads = c.hidden_size, c.intermediate_size, c.num_attention_heads
    packed = hidden + 2 * c.num_key_value_heads * (hidden // heads)
    lines = {
        "the block's input": (r * hidden, "none selective full"),
        "1 / root mean square, of two norms": (4 + 4, "none"),
        "normalised, input of qkv_proj": (b * hidden, "none"),
        "product of qkv_proj": (b * packed, "selective"),
        "queries and keys rotated, and values": (b * packed, "none"),
        "attention's output, input of o_proj": (b * hidden, "none selective full"),
        "its log-sum-exp": (4 * heads, "none selective full"),
        "product of o_proj": (b * hidden, "selective"),
        "the sum with the residual stream": (r * hidden, "none"),
        "normalised, input of gate_up_proj": (b * hidden, "none"),
        "product of gate_up_proj": (b * 2 * wide, "none selective"),
        "gated, input of down_proj": (b * wide, "none"),
    }
    return sum(size for size, modes in lines.values() if mode in modes.split())


def _gradients(job: Job, done: int) -> float:
    """Bytes of fp32 gradients in the last micro-batch, its backward through `done` parameters."""
    rest, accumulates = job.parameters - done, job.micro_batches > 1
    if not job.fsdp and not job.unwrapped:
        # ddp keeps its buckets; gradients of earlier micro-batches move into them at the last
        return 4 * job.parameters + accumulates * 4 * rest
    if not accumulates:
        return 4 * done / job.shards
    if job.fsdp and not job.reduces_each:
        return 4 * rest + 4 * done / job.shards
    return 4 * job.parameters / job.shards


class Moment(NamedTuple):
    """A moment of a step, and the bytes of what comes and goes."""

    name: str
    done: int  # parameters whose backward is over
    activations: int
    loss: int = 0  # and the head
    weights: int = 0  # gathered or cast for compute
    buffers: float = 0  # gradients on their way


def _moments(job: Job) -> Iterator[Moment]:
    """Those at which memory can be at its peak, in the order of the last micro-batch of a step."""
    c, b, tokens, layers = job.config, job.compute, job.tokens, job.config.num_hidden_layers
    embedding, block, head = job.units
    mode = c.activation_checkpointing
    kept, recomputed = (tokens * kept_by_a_block(job, m) for m in (mode, "none"))
    stream = tokens * job.residual * c.hidden_size  # between two blocks, or its gradient
    narrow = tokens * b * c.hidden_size
    cast = b if b < 4 and not job.fsdp else 0  # bytes of a weight in autocast's copies

    def for_compute(unit: int, ahead: int, done: int, blocks: int = 0) -> int:
        """fsdp gathers a unit, and if there are others to gather from, one ahead; or has all."""
        if not job.fsdp:
            return cast * block * blocks
        if not c.gather_each_micro_batch:
            return b * (job.parameters - done)
        return b * (unit + ahead * (job.shards > 1))

    # The loss makes the gradients of what enters it in its forward already, chunk by chunk.
    rows = chunk_rows(tokens, c.vocab_size, kernel=not job.definitions)
    logits = min(rows, tokens) * c.vocab_size
    chunk = b * logits
    if job.definitions:  # fp32 logits and their exponentials; a CPU adds bf16 by way of fp32
        chunk = max(8 * logits, (4 + b) * head) + b * logits if b < 4 else 8 * logits
    yield Moment(
        "forward of the loss",
        done=0,
        activations=layers * kept + stream + narrow + (stream if cast else 0),
        loss=narrow + 4 * head + chunk + cast * head,
        weights=for_compute(head, head, 0, layers),
    )
    yield Moment(
        "backward of the loss",  # which scales both gradients into new tensors
        done=0,
        activations=layers * kept + stream,
        loss=2 * narrow + 2 * 4 * head + (b * head if job.fsdp and b < 4 else 0),
        weights=for_compute(head, block, 0, layers * (mode == "none")),
    )
    gates = tokens * b * 2 * c.intermediate_size * (1 + job.definitions)  # gradient of gate|up
    down = c.hidden_size * c.intermediate_size  # a weight whose gradient is there by then
    for i in reversed(range(layers)):
        done = head + (layers - 1 - i) * block
        ahead = block if i else 0  # the embedding's backward needs no weights
        reducing = block if i < layers - 1 else head  # in fp32, until this block's turn
        yield Moment(
            f"backward of block {i + 1} of {layers}, at its gate",
            done,
            activations=i * kept + recomputed + stream + gates,
            weights=for_compute(block, ahead, done, i + 1 if mode == "none" else 1),
            buffers=b * down + 4 * reducing if job.fsdp else 4 * down,
        )
        if job.fsdp:
            yield Moment(
                f"reduction of block {i + 1} of {layers}",
                done,
                activations=i * kept + stream,
                weights=for_compute(0, ahead, done + block),
                buffers=(4 + max(b, 4 / job.shards)) * block,
            )
    yield Moment(
        "backward of the embedding",
        done=job.parameters - embedding,
        activations=stream,
        weights=0 if c.gather_each_micro_batch or not job.fsdp else b * embedding,
        buffers=(b + 4 + 4 / job.shards if job.fsdp else 4) * embedding,
    )


def peak(job: Job) -> tuple[str, dict[str, float]]:
    """The moment of a step at which a GPU holds most: its name, and bytes by purpose."""

    def parts(moment: Moment) -> dict[str, float]:
        return {
            "parameters": 4 * job.parameters / job.shards,
            "gradients": _gradients(job, moment.done),
            "optimizer": 8 * job.parameters / job.shards,
            "activations": moment.activations,
            "head and loss": moment.loss,
            "weights for compute": moment.weights,
            "gradients on their way": moment.buffers,
        }

    highest = max(_moments(job), key=lambda moment: sum(parts(moment).values()))
    return highest.name, parts(highest)


# --- speed and traffic ---------------------------------------------------------------------------


def speed(job: Job, mfu: float, flops: float) -> tuple[float, float]:
    """(tokens a second on one GPU, GPU-hours of the phase) at so much of a GPU's FLOP/s."""
    each = mfu * flops / job.model.flops_per_token(job.config.seq_len)
    tokens = job.schedule.samples_after(job.schedule.num_steps()) * job.config.seq_len
    return each, tokens / each / 3600


def traffic(job: Job) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by collective.

    In a ring of n, gathering or scattering p bytes takes (n - 1) / n * p, an all-reduce both.
    """
    copies, p = job.gpus // job.shards, job.parameters
    if not job.fsdp:
        return {"all-reduce of gradients": 2 * 4 * p * (job.gpus - 1) / job.gpus}
    embedding, _, head = job.units
    ring = (job.shards - 1) / job.shards
    reductions = job.micro_batches if job.reduces_each else 1
    twice = job.config.gather_each_micro_batch  # else once, and for the whole step
    gatherings = job.micro_batches if twice else 1
    return {
        "all-gather, forward": gatherings * ring * job.compute * p,
        # the head is still there from the forward, the embedding is not needed
        "all-gather, backward": twice * gatherings * ring * job.compute * (p - head - embedding),
        "reduce-scatter": reductions * ring * 4 * p,
        "all-reduce between copies": 2 * 4 * p / job.shards * (copies - 1) / copies,
    }


# --- printing ------------------------------------------------------------------------------------


def show(job: Job, card: str, mfu: float) -> None:
    """Print the plan of a job; mfu: the share of the card's FLOP/s that the job is to reach."""
    c, (_, room, flops) = job.config, GPUS[card]
    moment, parts = peak(job)
    sent = {name: size for name, size in traffic(job).items() if size}
    tokens, hours = speed(job, mfu, flops)
    seconds = c.global_batch_size * c.seq_len / (tokens * job.gpus)

    def line(name: str, figure: float, digits: int, rest: str = "") -> None:
        print(f"  {name:40}{figure:12,.{digits}f}  {rest}".rstrip())

    print(f"{c.name}, {job.parameters:,} parameters, on {job.gpus} x {card}, {c.parallel}")
    print(f"a step: {c.global_batch_size:,} x {c.seq_len:,} tokens, on each GPU", end=" ")
    print(f"{job.micro_batches:,} micro-batches of {job.tokens // c.seq_len}")
    print(f"\nGB of a GPU at the peak of a step: {moment}")
    for name, size in parts.items():
        line(name, size / 1e9, 2)
    peaks = {"peak": sum(parts.values())}
    for mode in parallel.ACTIVATION_CHECKPOINTING:
        if mode != c.activation_checkpointing:
            other = Job(replace(c, activation_checkpointing=mode), job.gpus)
            peaks[f"with activation_checkpointing={mode}"] = sum(peak(other)[1].values())
    for name, size in peaks.items():
        fits = "fits" if size <= room else "does not fit"
        line(name, size / 1e9, 2, f"of {room / 1e9:.0f}: {fits}")
    line("main memory, to save a checkpoint", 12 * job.parameters / job.shards / 1e9, 2)
    print(f"\nspeed at an MFU of {mfu:.1%}")
    line("tokens a second on a GPU", tokens, 0)
    line("tokens a second", tokens * job.gpus, 0, f"a step in {seconds:,.2f} s")
    line("GPU-hours of the phase", hours, 0, f"{hours / job.gpus / 24:,.1f} days")
    print("\nGB that a GPU sends in a step")
    for name, size in (sent | {"total": sum(sent.values())}).items():
        line(name, size / 1e9, 2, f"{size / seconds / 1e9:,.2f} GB/s")
    print(f"\n{ASSUMED}")


def compare(config: Config, gpus: list[int], cards: list[str], mfu: float) -> None:
    """Print a line for each number of GPUs of each kind."""
    print(f"{config.name}, at an MFU of {mfu:.1%}: peak of memory, speed, length of the phase")
    print(f"{'GPUs':<14}{'GB':>8}{'of':>6}{'':16}{'tokens/s':>12}{'hours':>10}{'days':>8}")
    for count, card in ((count, card) for card in cards for count in gpus):
        job, (_, room, flops) = Job(config, count), GPUS[card]
        size = sum(peak(job)[1].values())
        tokens, hours = speed(job, mfu, flops)
        fits = "fits" if size <= room else "does not fit"
        print(f"{f'{count} x {card}':<14}{size / 1e9:>8.1f}{room / 1e9:>6.0f}  {fits:14}", end="")
        print(f"{tokens * count:>12,.0f}{hours / count:>10,.1f}{hours / count / 24:>8,.1f}")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--gpus", default="1", help="number of GPUs; several: 1,8")
    kinds = f"what kind they are: {', '.join(GPUS)}; several: a100,h100; default: h100"
    parser.add_argument("--card", default="h100", help=kinds)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its FLOP/s to reach")
    args, options = parser.parse_known_args(argv)
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu must be above 0 and at most 1, not {args.mfu}")
    if not any(option.endswith(".py") for option in options):
        options = ["config/pretrain.py", *options]
    gpus, cards, config = args.gpus.split(","), args.card.split(","), load(options)
    if unknown := {*cards} - GPUS.keys():
        raise ConfigError(f"--card must be one of {', '.join(GPUS)}, not {unknown.pop()}")
    if not all(count.isdecimal() for count in gpus):
        raise ConfigError(f"--gpus must be whole numbers such as 1,8, not {args.gpus}")
    if len(gpus) == len(cards) == 1:
        show(Job(config, int(gpus[0])), cards[0], args.mfu)
    else:
        compare(config, [*map(int, gpus)], cards, args.mfu)


if __name__ == "__main__":
    run_cli(main)
