"""To which line of a step's time table an operation belongs, and what each line cannot go below.

A matrix product is told by its shapes, and by whether it runs in the forward, in a forward that is
made again, or in the backward. Anything else by the name of the operation, or of what that is part
of; where the launch of a kernel is not known, by the kernel's own name.

The floor of a product is its FLOPs at the speed of a large product, of anything else the bytes that
no implementation can do without at the speed of a large copy. What a better plan of the step would
not do at all has no floor: copies of activations, sums of two tensors that a neighbouring kernel
could add, gaps.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench import peers
from config import Config
from model import LucieConfig

# What bench.step marks, and what this file looks for.
STEP, MICRO_BATCH, CLIP, OPTIMIZER = (
    f"bench.{part}" for part in ("step", "micro_batch", "clip", "optimizer")
)

# The group of an operation, by its name or that of one that it is part of, the innermost first.
NODE = "autograd::engine::evaluate_function: "  # a backward; what is within belongs to it
RULES = {
    "loss": r"linear_cross_entropy|LinearCrossEntropy",
    "norms": r"rms_norm|RMSNorm",
    "swiglu": r"swiglu|SwiGLU",
    "rope": r"nanolucie.+rope|_Rope",
    "attention": r"attention|Attention",
    "embedding": r"embedding|Embedding",
    "weights gathered and cast": (
        r"FSDP::(?!post|root_post)|fsdp::(?!chunk_cat)|allgather|AllGather"
    ),
    "gradients cast and added": (
        r"FSDP::(post|root_post)|chunk_cat|reduce_scatter|ReduceScatter|::AccumulateGrad"
    ),
    "gradient norm": re.escape(CLIP),
    "optimizer": re.escape(OPTIMIZER) + r"|^Optimizer\.",
}
TWO_WAYS = ("norms", "swiglu", "rope", "attention", "embedding")  # forward and backward apart
RULES = {group: re.compile(pattern) for group, pattern in RULES.items()}

# Our Triton functions, for a kernel whose launch was not found.
KERNELS = {
    "_rms_norm_forward": "norms, forward",
    "_rms_norm_backward": "norms, backward",
    "_rope": "rope, forward",
    "_swiglu_forward": "swiglu, forward",
    "_swiglu_backward": "swiglu, backward",
    "_attention_forward": "attention, forward",
    "_attention_backward_dq": "attention, backward",
    "_attention_backward_dkdv": "attention, backward",
    "_cross_entropy": "loss",
}
PRODUCTS = re.compile(r"aten::(mm|addmm_?|_scaled_mm)$")
FORWARD_OF_A_PRODUCT = ("aten::linear", "aten::matmul")
ADDS = ("aten::add", "aten::add_")
COPIES = tuple(f"aten::{name}" for name in "copy_ clone contiguous cat to _to_copy fill_".split())


@dataclass(eq=False)
class Span:
    """An event. Times in microseconds; `parent` is what it lies within, on its thread."""

    name: str
    category: str
    start: float
    end: float
    arguments: dict = field(repr=False, default_factory=dict)
    parent: "Span | None" = field(repr=False, default=None)
    children: list["Span"] = field(repr=False, default_factory=list)

    def outwards(self) -> Iterable["Span"]:
        span = self
        while span is not None:
            yield span
            span = span.parent

    def below(self) -> Iterable["Span"]:
        for child in self.children:
            yield child
            yield from child.below()


@dataclass
class Piece:
    """Time that something took, by itself: `of` is the operation that launched or is it."""

    name: str
    start: float
    end: float
    of: Span | None


@dataclass(frozen=True)
class Shapes:
    """Of a step: what tells products apart, and what floors are counted from."""

    config: LucieConfig
    seq_len: int
    micro_batch_size: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.seq_len * self.micro_batch_size

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(columns in, rows out) of each."""
        c = self.config
        packed = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        return {
            "qkv": (c.hidden_size, packed),
            "o": (c.hidden_size, c.hidden_size),
            "gate_up": (c.hidden_size, 2 * c.intermediate_size),
            "down": (c.intermediate_size, c.hidden_size),
            "head": (c.hidden_size, c.vocab_size),
        }

    @classmethod
    def of(cls, config: Config, architecture: LucieConfig) -> "Shapes":
        micro_batches = -(-config.global_batch_size // config.micro_batch_size)
        return cls(architecture, config.seq_len, config.micro_batch_size, micro_batches)


def product_size(span: Span) -> tuple[int, int, int] | None:
    """(rows, inner, columns) of a matrix product; None for anything else.

    A product whose result the first forward has kept is not made again: it only hands it out.
    """
    if not PRODUCTS.match(span.name):
        return None
    if any(child.name == "aten::detach" for child in span.children):
        if not any(PRODUCTS.match(inner.name) for inner in span.below()):
            return None
    dims = span.arguments.get("Input Dims", [])
    two = [d for d in dims if len(d) == 2 and isinstance(d[0], int)]
    if span.name.startswith("aten::addmm"):
        two = two[-2:]  # what is added to comes first
    return (two[0][0], two[0][1], two[1][1]) if len(two) >= 2 else None


def product_group(span: Span, shapes: Shapes) -> str:
    """Which matrix, and forward, input gradient, weight gradient, or a forward computed again."""
    rows, inner, columns = product_size(span)
    within, node = _within(span)
    in_loss = any(RULES["loss"].search(s.name) for s in span.outwards())
    again = node is not None and any(s.name in FORWARD_OF_A_PRODUCT for s in within)
    tokens = shapes.tokens
    for name, (given, out) in shapes.matrices.items():
        if in_loss != (name == "head"):
            continue
        of_rows, of_sum = in_loss or rows == tokens, in_loss or inner == tokens  # loss: by chunks
        if of_rows and (inner, columns) == (given, out) and (in_loss or node is None or again):
            return f"{name}, {'recomputed' if again else 'forward'}"
        if not in_loss and (node is None or again):
            continue
        of_input = of_rows and (inner, columns) == (out, given)
        of_weight = of_sum and (rows, columns) == (out, given)
        # dy W and dy^T x may be of one size; the latter reads dy transposed
        if of_weight and (not of_input or _reads_transposed(span)):
            return f"{name}, weight gradient"
        if of_input:
            return f"{name}, input gradient"
    return "other"


def _reads_transposed(span: Span) -> bool:
    strides = [s for s in span.arguments.get("Input Strides", []) if len(s) == 2]
    first = strides[span.name.startswith("aten::addmm") :][:1]  # what is added to comes before
    return bool(first) and first[0][0] == 1 and first[0][1] > 1


def _within(span: Span) -> tuple[list[Span], Span | None]:
    """What an operation lies within up to the backward node it is part of, and that node."""
    within = []
    for outer in span.outwards():
        if outer.name.startswith(NODE):
            return within, outer
        within.append(outer)
    return within, None


def group_of(piece: Piece, shapes: Shapes) -> str:
    """The line of the table that a piece belongs to."""
    if piece.of is not None:
        for span in piece.of.outwards():
            if product_size(span):
                return product_group(span, shapes)
        for span in piece.of.outwards():
            for group, pattern in RULES.items():
                if pattern.search(span.name):
                    return _with_direction(group, pattern, piece.of)
    for function, group in KERNELS.items():
        if re.fullmatch(function + r"(_\d\w*)?", piece.name):  # Triton may add a suffix
            return group
    if piece.of is not None:
        return _generic(piece.of, shapes)
    return "activations copied" if piece.name.startswith("Memcpy") else "other"


def _with_direction(group: str, pattern: re.Pattern, span: Span) -> str:
    if group not in TWO_WAYS:
        return group
    _, node = _within(span)
    if node is None:
        return f"{group}, forward"
    return f"{group}, {'backward' if pattern.search(node.name) else 'recomputed'}"


def _generic(span: Span, shapes: Shapes) -> str:
    """Torch's own small operations, between those that have a name in this project."""
    activation = shapes.tokens * shapes.config.hidden_size
    for outer in span.outwards():
        dims = outer.arguments.get("Input Dims", [])
        sizes = [math.prod(d) for d in dims if d and isinstance(d[0], int)]
        if outer.name in ADDS and sizes and max(sizes) >= activation:
            return "sums of activations"
        if outer.name in COPIES:
            return "activations copied"
    return "other"


def floors(shapes: Shapes, ceilings: dict[str, float], parameters: int) -> dict[str, float]:
    """Milliseconds of a step that each group cannot go below; what is not there has none.

    ceilings: GB/s of a copy, TFLOP/s of a product (bench.kernels.ceilings).
    """
    c, m, n = shapes.config, shapes.tokens, shapes.micro_batches
    layers = c.num_hidden_layers
    suite = peers.Suite(
        (m,), c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
        c.head_dim, c.vocab_size,
    )  # fmt: skip
    flops: dict[str, float] = {}
    for name, (given, out) in shapes.matrices.items():
        each = 2 * m * given * out * (1 if name == "head" else layers)
        kinds = ("forward", "recomputed", "input gradient", "weight gradient")
        flops |= {f"{name}, {kind}": n * each for kind in kinds}
    for way, each in peers.attention_floor(suite, shapes.seq_len).items():
        flops[f"attention, {way}"] = n * shapes.micro_batch_size * layers * each

    moved: dict[str, float] = {}
    norm, add = peers.rms_norm_floor(suite, m), peers.add_rms_norm_floor(suite, m)
    swiglu, rope = peers.swiglu_floor(suite, m), peers.rope_floor(suite, m)
    for way in ("forward", "backward"):
        moved[f"norms, {way}"] = n * (layers * (norm[way] + add[way]) + norm[way])
        moved[f"swiglu, {way}"] = n * layers * swiglu[way]
        moved[f"rope, {way}"] = n * layers * rope[way]
    moved["norms, recomputed"] = n * layers * (norm["forward"] + add["forward"])
    moved["swiglu, recomputed"] = moved["swiglu, forward"]
    moved["rope, recomputed"] = moved["rope, forward"]
    # The rows looked up, in bf16; their gradients read, and each added to its row in fp32.
    moved["embedding, forward"] = n * 2 * 2 * m * c.hidden_size
    moved["embedding, backward"] = n * (2 + 8) * m * c.hidden_size
    moved["loss"] = n * 2 * 2 * m * c.vocab_size  # logits read, their gradients written
    moved["weights gathered and cast"] = 2 * parameters  # written in bf16, once a step
    # The first micro-batch's written, those of the others added.
    moved["gradients cast and added"] = (4 + 8 * (n - 1)) * parameters
    moved["gradient norm"] = 4 * parameters
    moved["optimizer"] = 28 * parameters  # weight and two moments read and written, gradient read
    found = {group: each / ceilings["TFLOP/s"] / 1e9 for group, each in flops.items()}
    return found | {group: each / ceilings["GB/s"] / 1e6 for group, each in moved.items()}
