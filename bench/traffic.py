"""What a training step launches and moves, against what it could not go without; no GPU is needed.

    python -m bench.traffic [--layers 2] [--seq_len 4096] [--micro_batch_size 1] [--micro_batches 1]
        [--chip 90] [--bandwidth 4.3e12] [--activation_checkpointing none] [--check]

A step of a Lucie of full width and few blocks is recorded by bench/launches.py, which also says how
bytes are counted. Times are those of the bytes at the bandwidth of a copy (4.3 TB/s was measured on
an H200) and of the products at the FLOP/s below: what a step would take if it had no other limit.
All blocks are alike, so that the sums are given for all of Lucie's.

--check exits 1 with a line for each fp32 tensor of the size of an activation that is not in
ALLOWED, each block with more launches than EXPECTED, and each kernel that spills registers. Any
other option is one of train.py's: --gather_each_micro_batch=False.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from bench import peers
from checkpoint import architecture
from config import Config, load
from config.cli import ConfigError, Parser, run_cli

try:
    import triton

    from bench.launches import Made, Operation, record
    from bench.savings import SAVINGS, Saving
    from gpuless.compiler import CHIPS, KernelError
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"bench.traffic: needs pip install triton, which is for Linux ({error})", file=sys.stderr)
    sys.exit(2)

PRODUCT_FLOPS, ATTENTION_FLOPS = 700e12, 450e12  # a second, on an H200
LAYERS = Config().num_hidden_layers  # that sums are given for

# Launches of a block and micro-batch by activation_checkpointing. FSDP's are of one micro-batch: a
# cast and a copy of each of six weights, twice, and the gradients joined in fp32 and copied.
EXPECTED = {
    "none": {"forward": 12, "backward": 20},
    "selective": {"forward": 12, "backward": 25},
    "full": {"forward": 12, "backward": 28},
}
EXPECTED_OF_WEIGHTS = {"weights forward": 12, "weights backward": 14}

# fp32 tensors of the forward and backward with as many elements as a head of every token, by what
# makes them, where, and in which shape (None: any). All have the size of weights. What grows with
# the tokens is to be bf16, but for a number a row or a head: rstd, log-sum-exp, the losses.
ALLOWED = [
    ("linear_cross_entropy/new_empty", "lm_head forward", "head", "its d weight, summed by chunks"),
    ("mul", "lm_head backward", "head", "the same, times the gradient of the loss"),
    ("rms_norm_backward/new_empty", "backward", "programs", "d weight, a row from each program"),
    ("empty", "weights backward", None, "FSDP's: gradients joined, and reduced"),
    ("_to_copy", "weights backward", None, "FSDP's: gradients that others will be added to"),
]


@dataclass(frozen=True)
class Step:
    """The record of one step."""

    config: Config
    micro_batches: int
    operations: list[Operation]
    made: list[Made]

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.config.micro_batch_size * self.config.seq_len

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Of a block, and of the rest: embedding, last norm, head."""
        c = self.config
        packed = 2 * c.hidden_size + 2 * c.num_key_value_heads * self.head_dim
        block = c.hidden_size * (packed + 3 * c.intermediate_size + 2)
        return block, c.hidden_size * (2 * c.vocab_size + 1)

    @property
    def head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def of(self, unit: str, phase: str = "") -> list[Operation]:
        return [o for o in self.operations if o.unit == unit and o.phase.startswith(phase)]

    def times(self, operation: Operation) -> float:
        """How often all of Lucie has what is recorded once: steps grow with the parameters."""
        layers = self.config.num_hidden_layers
        if operation.unit.startswith("layers."):
            return LAYERS / layers
        block, rest = self.parameters
        return (LAYERS * block + rest) / (layers * block + rest) if operation.of_step else 1.0

    def per_token(self, operations: Sequence[Operation]) -> float:
        """Bytes of all of Lucie."""
        moved = sum(self.times(o) * o.bytes for o in operations)
        return moved / (self.tokens * self.micro_batches)

    @property
    def suite(self) -> peers.Suite:
        c = self.config
        return peers.Suite(
            (), c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
            self.head_dim, c.vocab_size,
        )  # fmt: skip


# --- against the floor ----------------------------------------------------------------------------


def group(o: Operation) -> str:
    """Which line of the block's table an operation belongs to."""
    if o.of_weights:
        return "casts and copies of weights"
    if o.is_product:
        return "products"
    for line in ("attention", "rms_norm", "rope", "swiglu"):
        if o.within.startswith(line):
            return LINES[line]
    return LINES["rms_norm"] if o.name == "add" else LINES["rope"] if o.name in SPLIT else "other"


LINES = {
    "rms_norm": "norms and residual sums",
    "rope": "rotation, split of q|k|v",
    "swiglu": "SwiGLU",
    "attention": "attention",
}
SPLIT = ("clone", "cat")  # v is copied out of q|k|v, the three gradients into one


def floors(step: Step) -> dict[str, dict[str, int]]:
    """Bytes of a block by group and phase: each input once, each output once, with every sum of the
    residual stream fused into the norm that follows."""
    s, tokens = step.suite, step.tokens
    packed = (s.heads + 2 * s.kv_heads) * s.head_dim
    shapes = [(s.hidden, packed), (s.hidden, s.hidden), (s.hidden, 2 * s.intermediate)]
    shapes.append((s.intermediate, s.hidden))
    products = sum(2 * (tokens * (k + n) + k * n) for k, n in shapes)
    q, kv, lse = (2 * tokens * n * s.head_dim for n in (s.heads, s.kv_heads, 0))
    lse = 4 * tokens * s.heads
    norm = peers.add_rms_norm_floor(s, tokens)
    return {
        "products": {"forward": products, "backward": 2 * products},
        LINES["attention"]: {
            "forward": 2 * q + 2 * kv + lse,  # q, k, v -> out
            "backward": 4 * q + 4 * kv + lse,  # and d out -> dq, dk, dv
        },
        LINES["rms_norm"]: {phase: 2 * norm[phase] for phase in ("forward", "backward")},
        LINES["rope"]: peers.rope_floor(s, tokens),
        LINES["swiglu"]: peers.swiglu_floor(s, tokens),
        "casts and copies of weights": {"forward": 0, "backward": 0},
        "other": {"forward": 0, "backward": 0},
    }


def block_table(step: Step) -> list[tuple]:
    """KB a token and block by group: forward, backward, both, floor, ratio."""
    lines, least = [], floors(step)
    rows = {name: [0, 0, least[name]["forward"] + least[name]["backward"]] for name in least}
    for o in step.of("layers.0"):
        rows[group(o)]["backward" in o.phase] += o.bytes / step.micro_batches
    streaming = [sum(rows[name][i] for name in rows if name != "products") for i in range(3)]
    rows["all but the products"] = streaming
    for name, (forward, backward, floor) in rows.items():
        both = forward + backward
        figures = (x / step.tokens / 1e3 for x in (forward, backward, both, floor))
        ratio = f"{both / floor:.2f}" if floor else "" if not both else "no floor"
        lines.append((name, *(f"{x:,.1f}" for x in figures), ratio))
    return lines


def parts(step: Step) -> dict[str, list[Operation]]:
    """What moves bytes and is not a product, by part of the step."""
    rest = [o for o in step.operations if not o.is_product and not o.within.startswith("att")]
    blocks = [o for o in rest if o.unit.startswith("layers.") and not o.of_weights]
    weights = [o for o in rest if o.of_weights]
    return {
        "streaming operations of the blocks": blocks,
        "weights: cast and copied for a forward": [o for o in weights if "forward" in o.phase],
        "weights: again for the backward": [o for o in weights if o.casts_again],
        "gradients: cast, joined, added": [
            o for o in weights if "backward" in o.phase and not o.casts_again
        ],
        "embedding, last norm, loss": [
            o for o in rest if not o.of_step and not o.of_weights and o not in blocks
        ],
        "clipping": [o for o in rest if o.unit == "clip"],
        "optimizer": [o for o in rest if o.unit == "optimizer"],
    }


def seconds(step: Step, bandwidth: float) -> dict[str, tuple[str, float]]:
    """Of each part of a step, what it does for a token, in words, and seconds: of all of Lucie."""
    tokens, c = step.tokens * step.micro_batches, step.config
    flops = sum(step.times(o) * o.flops for o in step.operations if o.is_product) / tokens
    attention = peers.attention_floor(step.suite, c.seq_len)["full"] / c.seq_len * LAYERS
    found = {
        "products": (f"{flops / 1e9:.2f} GFLOP", flops / PRODUCT_FLOPS),
        "attention": (f"{attention / 1e9:.2f} GFLOP", attention / ATTENTION_FLOPS),
    }
    for name, operations in parts(step).items():
        moved = step.per_token(operations)
        found[name] = f"{moved / 1e6:.2f} MB", moved / bandwidth
    return found


# --- what could go --------------------------------------------------------------------------------


def saved(step: Step, saving: Saving) -> float:
    """Bytes a token, of all of Lucie."""
    block, rest = step.parameters
    added = saving.per_parameter * (LAYERS * block + rest) / (step.tokens * step.micro_batches)
    gone = saving.share * step.per_token([o for o in step.operations if saving.of(o)])
    return gone - added if gone else 0.0


# --- the check ------------------------------------------------------------------------------------


def faults(step: Step) -> list[str]:
    """What --check objects to, a line each."""
    found, mode = [], step.config.activation_checkpointing
    for m in wide(step):
        if not allowed(step, m):
            found.append(f"{m.unit} {m.phase}: {m.maker} makes {told(m)}")
    expected = EXPECTED[mode] | (EXPECTED_OF_WEIGHTS if step.micro_batches == 1 else {})
    for layer in range(step.config.num_hidden_layers):
        for phase, most in expected.items():
            count = len(step.of(f"layers.{layer}", phase)) / step.micro_batches
            if count > most:
                found.append(f"layers.{layer} {phase}: {count:g} launches, {most} are expected")
    for o in step.operations:
        if o.launch and o.launch.spills:
            found.append(f"{o.unit} {o.phase}: {o.name} spills {o.launch.spills} bytes")
    return list(dict.fromkeys(found))


def wide(step: Step) -> list[Made]:
    """fp32 and fp64 tensors of the size of activations."""
    least = step.tokens * step.head_dim
    floats = (torch.float32, torch.float64)
    return [m for m in step.made if m.dtype in floats and math.prod(m.shape) >= least]


def allowed(step: Step, m: Made) -> str:
    """Why a tensor of ALLOWED may be; empty for others."""
    c, where = step.config, f"{m.unit} {m.phase}"
    programs = 2 * max(chip.multiprocessors for chip in CHIPS.values())
    for maker, place, shape, why in ALLOWED:
        fits = shape is None
        fits |= shape == "head" and m.shape == (c.vocab_size, c.hidden_size)
        fits |= shape == "programs" and m.shape[1:] == (c.hidden_size,) and m.shape[0] <= programs
        if m.maker == maker and where.endswith(place) and fits:
            return why
    return ""


def told(m: Made) -> str:
    return f"{str(m.dtype).removeprefix('torch.')} {list(m.shape)}"


# --- printing -------------------------------------------------------------------------------------


def show(title: str, lines: Sequence[tuple], left: int = 1) -> None:
    """Columns; the first ones, so many, are words."""
    print(f"\n{title}")
    lines = [tuple(map(str, line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = zip(line, widths)
        shown = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)]
        print("  " + "  ".join(shown).rstrip())


def launch_lines(step: Step, operations: Sequence[Operation]) -> list[tuple]:
    """One for each operation; equal ones that follow each other together."""
    head = ("phase", "operation", "on", "times", "grid", "warps", "regs", "shared KB", "GFLOP")
    lines, counts = [], []
    for o in operations:
        chip = ("",) * 4
        if o.launch:
            grid = "x".join(map(str, o.launch.grid))
            shared = f"{o.launch.shared / 1024:.1f}"
            chip = (grid, o.launch.num_warps, o.launch.registers, shared)
        moved = f"{o.bytes / step.tokens:,.0f}"
        flops = f"{o.flops / 1e9:,.1f}" if o.flops else ""
        line = [o.phase, o.name, o.shapes, *chip, flops, moved]
        if lines and lines[-1] == line:
            counts[-1] += 1
        else:
            lines.append(line)
            counts.append(1)
    rows = [(*line[:3], count, *line[3:]) for line, count in zip(lines, counts)]
    return [(*head, "bytes a token"), *rows]


def outside_lines(step: Step) -> list[tuple]:
    """Operations outside the blocks by unit, phase and name."""
    sums: dict[tuple, list[int]] = {}
    for o in step.operations:
        if not o.unit.startswith("layers."):
            row = sums.setdefault((o.unit, o.phase, o.name), [0, 0, 0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + o.bytes, row[2] + o.flops
    rows = [
        (*key, count, f"{flops / 1e9:,.1f}" if flops else "", f"{moved / 1e6:,.2f}")
        for key, (count, moved, flops) in sums.items()
    ]
    return [("unit", "phase", "operation", "launches", "GFLOP", "MB"), *rows]


def report(step: Step, larger: Step, bandwidth: float) -> None:
    c, n = step.config, len(step.operations)
    print(
        f"{c.num_hidden_layers} blocks, {step.micro_batches} micro-batches of {step.tokens:,}",
        end="",
    )
    print(f" tokens, recomputed: {c.activation_checkpointing}; {n} operations in a step")
    block = step.of("layers.0")
    show(f"block 1 of {c.num_hidden_layers}: {len(block)} launches", launch_lines(step, block), 3)
    show("outside the blocks", outside_lines(step), 3)
    head = ("KB a token and block", "forward", "backward", "both", "floor", "ratio")
    show("bytes against the floor", [head, *block_table(step)])

    both = [seconds(s, bandwidth) for s in (step, larger)]
    sums = [sum(time for _, time in timed.values()) for timed in both]
    sizes = [f"micro-batch {s.tokens:,}" for s in (step, larger)]
    lines = [("a token", *(x for size in sizes for x in (size, "us", "share")))]
    for name in both[0]:
        cells = (
            (does, f"{t * 1e6:.2f}", f"{t / whole:.1%}")
            for (does, t), whole in zip((timed[name] for timed in both), sums)
        )
        lines.append((name, *(cell for column in cells for cell in column)))
    cells = ((f"{1 / whole:,.0f} tokens/s", f"{whole * 1e6:.2f}", "") for whole in sums)
    lines.append(("all", *(cell for column in cells for cell in column)))
    rates = f"{PRODUCT_FLOPS / 1e12:.0f} and {ATTENTION_FLOPS / 1e12:.0f} TFLOP/s"
    show(f"{LAYERS} blocks, at {rates} and {bandwidth / 1e12:.1f} TB/s", lines)

    kinds = dict.fromkeys((m.maker, told(m), allowed(step, m) or "NOT ALLOWED") for m in wide(step))
    show("fp32 tensors of the size of activations", list(kinds) or [("none",)], 3)

    lines = [("what could go", *(x for s in (step, larger) for x in (f"at {s.tokens:,}", "share")))]
    for saving in sorted(SAVINGS, key=lambda saving: -saved(step, saving)):
        moved = [saved(s, saving) for s in (step, larger)]
        if moved[0]:
            cells = ((f"{x / 1e6:.2f}", f"{x / bandwidth / t:.1%}") for x, t in zip(moved, sums))
            lines.append((saving.what, *(cell for pair in cells for cell in pair)))
    show("MB a token in micro-batches of so many tokens, and of a step's time", lines)


def main(argv: list[str]) -> int:
    parser = Parser(prog="bench.traffic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--micro_batch_size", type=int, default=1)
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument("--chip", type=int, default=90, choices=list(CHIPS))
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second of a copy")
    parser.add_argument("--activation_checkpointing", choices=list(EXPECTED), default="none")
    parser.add_argument("--check", action="store_true", help="exit 1 if something is amiss")
    args, options = parser.parse_known_args(argv)
    if args.micro_batches < 1 or not args.bandwidth > 0:
        raise ConfigError("--micro_batches and --bandwidth must be positive")
    names = ("seq_len", "micro_batch_size", "activation_checkpointing")
    given = [f"--{name}={getattr(args, name)}" for name in names]
    config = load([f"--num_hidden_layers={args.layers}", *given, *options])
    try:
        architecture(asdict(config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing would compile")
    larger = replace(config, micro_batch_size=4 * config.micro_batch_size)
    steps = [
        Step(each, args.micro_batches, *record(each, args.micro_batches, args.chip))
        for each in (config, larger)
    ]
    report(*steps, args.bandwidth)
    found = faults(steps[0])
    for line in found:
        print(line, file=sys.stderr)
    return 1 if args.check and found else 0


if __name__ == "__main__":
    run_cli(main, KernelError)
