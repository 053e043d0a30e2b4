"""The operations that bench.kernels times: inputs, floor, and every implementation compared.

A floor is what no implementation can go below: each input read once and each output written once,
in bytes, or the FLOPs of the products. Speeds count the floor's bytes or FLOPs for every
implementation, so one that moves more or computes twice shows as slower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import kernels
from kernels.int4_linear import GROUP, unpack
from kernels.rope import rope_tables
from model import LucieConfig

OURS = "nanolucie"
EPS = 1e-5
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation, possibly on tensors laid out in another way than ours.

    enter: turns our inputs into its inputs; leave: turns its outputs into ours. Neither is timed,
    and gradients flow through both.
    """

    call: Callable
    enter: Callable[..., tuple] = lambda *inputs: inputs
    leave: Callable[..., tuple] = lambda *outputs: outputs


class Draw:
    """Random inputs, the same from every new Draw, so that all implementations get equal ones."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=DTYPE)
        return x.mul_(scale).requires_grad_(grad)

    def integers(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Op:
    """inputs(draw, s, tokens): what our public function takes, for a model of shape s; where it
    requires grad, it gets its gradient. floor(s, tokens): bytes (or FLOPs) of each mode.

    Modes: forward (which keeps what a backward needs), no-grad-forward, backward (alone), full
    (forward and backward). tokens: the numbers of tokens, if not those of the command line.
    """

    inputs: Callable[[Draw, LucieConfig, int], tuple[Tensor, ...]]
    floor: Callable[[LucieConfig, int], dict[str, int]]
    unit: str
    implementations: dict[str, Implementation]
    tokens: tuple[int, ...] = ()


def training(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "full": forward + backward}


def liger(module: str, function: str) -> Callable:
    """A Liger kernel. Calling it raises ModuleNotFoundError where liger-kernel is not installed."""

    def call(*inputs: object) -> object:
        return getattr(import_module(f"liger_kernel.ops.{module}"), function).apply(*inputs)

    return call


def compiled(function: Callable) -> Callable:
    """torch.compile of a function for each shape; an error where part of it would run eagerly."""

    @cache
    def build() -> Callable:
        torch._dynamo.config.recompile_limit = 64  # there are more shapes than the usual 8
        torch._functorch.config.donated_buffer = False  # a timed backward runs again and again
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *inputs: build()(*inputs)


# --- rms_norm, add_rms_norm


def rms_norm_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    x, weight = 2 * tokens * s.hidden_size, 2 * s.hidden_size
    return training(2 * x + weight, 3 * x + 2 * weight)  # x -> y; x, dy -> dx


def add_rms_norm_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    x, weight = 2 * tokens * s.hidden_size, 2 * s.hidden_size
    # x, residual -> y, sum; backward: the sum and two gradients -> one that both inputs share
    return training(4 * x + weight, 4 * x + 2 * weight)


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager_rms_norm(total, weight), total


liger_rms_norm = liger("rms_norm", "LigerRMSNormFunction")
liger_add_rms_norm = liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
RMS_NORMS = {
    OURS: Implementation(lambda x, w: kernels.rms_norm(x, w, EPS)),
    "eager": Implementation(eager_rms_norm),
    "compile": Implementation(compiled(eager_rms_norm)),
    "liger": Implementation(lambda x, w: liger_rms_norm(x, w, EPS)),
}
ADD_RMS_NORMS = {
    OURS: Implementation(lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS)),
    "eager": Implementation(eager_add_rms_norm),
    "compile": Implementation(compiled(eager_add_rms_norm)),
    "liger": Implementation(lambda x, r, w: liger_add_rms_norm(x, r, w, EPS)),
}

# --- swiglu


def swiglu_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    half = 2 * tokens * s.intermediate_size
    return training(3 * half, 5 * half)  # gate, up -> y; gate, up, dy -> dgate, dup


def eager_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gate_and_up(gate_up: Tensor) -> tuple[Tensor, ...]:
    return tuple(half.contiguous() for half in gate_up.chunk(2, dim=-1))


SWIGLUS = {
    OURS: Implementation(kernels.swiglu),
    "eager": Implementation(eager_swiglu),
    "compile": Implementation(compiled(eager_swiglu)),
    "liger": Implementation(liger("swiglu", "LigerSiLUMulFunction"), gate_and_up),
}

# --- rope


def rope_inputs(draw: Draw, s: LucieConfig, tokens: int) -> tuple[Tensor, ...]:
    q = draw(1, tokens, s.num_attention_heads, s.head_dim)
    k = draw(1, tokens, s.num_key_value_heads, s.head_dim)
    return q, k, *rope_tables(s.head_dim, 500_000.0, tokens, draw.device)


def rope_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    qk = 2 * tokens * (s.num_attention_heads + s.num_key_value_heads) * s.head_dim
    tables = 2 * 4 * tokens * s.head_dim // 2
    return training(2 * qk + tables, 2 * qk + tables)


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As in transformers: tables for both halves, in the dtype of q."""

    def rotate_half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def whole_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(1).to(q.dtype) for t in (cos, sin))
    return q, k, cos, sin


def heads_first_views(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def liger_rope_layout(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Liger takes `[B, H, T, D]` views of `[B, T, H, D]`, rotates them in place, and takes tables
    for both halves."""
    return *heads_first_views(q, k), *(torch.cat((t, t), dim=-1)[None] for t in (cos, sin))


liger_rope = liger("rope", "LigerRopeFunction")
ROPES = {
    OURS: Implementation(kernels.rope),
    "eager": Implementation(eager_rope, whole_tables),
    "compile": Implementation(compiled(eager_rope), whole_tables),
    "liger": Implementation(liger_rope, liger_rope_layout, heads_first_views),
}

# --- attention, attention_decode


def qkv(draw: Draw, s: LucieConfig, queries: int, keys: int, grad: bool) -> tuple[Tensor, ...]:
    q = draw(1, queries, s.num_attention_heads, s.head_dim, grad=grad)
    k, v = (draw(1, keys, s.num_key_value_heads, s.head_dim, grad=grad) for _ in "kv")
    return q, k, v


def attention_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    # 2 FLOPs an element, half of them masked away
    product = tokens**2 * s.num_attention_heads * s.head_dim
    return training(2 * product, 5 * product)


def decode_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    kv, q = 2 * tokens * s.num_key_value_heads * s.head_dim, 2 * s.num_attention_heads * s.head_dim
    return {"no-grad-forward": 2 * kv + 2 * q}


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, T, H, D]` to the `[B, H, T, D]` of torch's attentions, laid out so in memory."""
    return tuple(t.transpose(1, 2).contiguous() for t in tensors)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with the backend that torch chooses, which is flash attention where it can be."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return eager_attention(q, k, v)


compiled_flex = compiled(lambda q, k, v, m: flex_attention(q, k, v, block_mask=m, enable_gqa=True))


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal_blocks(q.shape[2], q.device) if q.shape[2] > 1 else None
    return compiled_flex(q, k, v, mask)


@cache
def causal_blocks(length: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device)


ONE_PASS = "one pass"  # attention's other backward: ours too, so no baseline to be ranked with
ATTENTIONS = {
    OURS: Implementation(kernels.attention),
    ONE_PASS: Implementation(partial(kernels.attention, deterministic=False)),
    "eager": Implementation(eager_attention, heads_first, heads_first_views),
    "cudnn": Implementation(cudnn_attention, heads_first, heads_first_views),
    "flex": Implementation(flex, heads_first, heads_first_views),
}

DECODINGS = {name: way for name, way in ATTENTIONS.items() if name != ONE_PASS}

# --- linear_cross_entropy


def loss_inputs(draw: Draw, s: LucieConfig, tokens: int) -> tuple[Tensor, ...]:
    weight = draw(s.vocab_size, s.hidden_size, scale=s.hidden_size**-0.5)
    return draw(tokens, s.hidden_size), weight, draw.integers(s.vocab_size, tokens)


def loss_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    """No backward alone: ours and Liger's compute the gradients in their forward pass."""
    product = 2 * tokens * s.vocab_size * s.hidden_size
    return {"no-grad-forward": product, "full": 3 * product}


def eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


liger_loss = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
LOSSES = {
    OURS: Implementation(kernels.linear_cross_entropy),
    "eager": Implementation(eager_loss),
    "compile": Implementation(compiled(eager_loss)),
    "liger": Implementation(lambda *inputs: liger_loss(*inputs)[0]),  # its z-loss follows
}

# --- int4_linear: gate_up_proj, a block's largest matrix, for the few tokens of a decoding step


def int4_inputs(draw: Draw, s: LucieConfig, tokens: int) -> tuple[Tensor, ...]:
    rows, columns = 2 * s.intermediate_size, s.hidden_size
    packed = draw.integers(256, rows, columns // 2).to(torch.uint8)
    return draw(tokens, columns, grad=False), packed, draw(rows, columns // GROUP, grad=False)


def int4_floor(s: LucieConfig, tokens: int) -> dict[str, int]:
    """4-bit weights for all: an implementation that reads 16 bits shows as four times as slow."""
    rows, columns = 2 * s.intermediate_size, s.hidden_size
    weights = rows * (columns // 2 + 2 * columns // GROUP)
    return {"no-grad-forward": weights + 2 * tokens * (rows + columns)}


def unpacked(x: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return x, unpack(packed, scales, x.dtype)


INT4_LINEARS = {
    OURS: Implementation(kernels.int4_linear),
    "eager": Implementation(F.linear, unpacked),
    "compile": Implementation(compiled(lambda *inputs: F.linear(*unpacked(*inputs)))),
}

OPS = {  # what matters most comes first: a run that is cut short still tells it
    "attention": Op(
        lambda draw, s, t: qkv(draw, s, t, t, grad=True), attention_floor, "TFLOP/s", ATTENTIONS
    ),
    "linear_cross_entropy": Op(loss_inputs, loss_floor, "TFLOP/s", LOSSES),
    "rms_norm": Op(
        lambda draw, s, t: (draw(t, s.hidden_size), draw(s.hidden_size)),
        rms_norm_floor,
        "GB/s",
        RMS_NORMS,
    ),
    "add_rms_norm": Op(
        lambda draw, s, t: (draw(t, s.hidden_size), draw(t, s.hidden_size), draw(s.hidden_size)),
        add_rms_norm_floor,
        "GB/s",
        ADD_RMS_NORMS,
    ),
    "swiglu": Op(
        lambda draw, s, t: (draw(t, 2 * s.intermediate_size),), swiglu_floor, "GB/s", SWIGLUS
    ),
    "rope": Op(rope_inputs, rope_floor, "GB/s", ROPES),
    "attention_decode": Op(
        lambda draw, s, t: qkv(draw, s, 1, t, grad=False), decode_floor, "GB/s", DECODINGS
    ),
    "int4_linear": Op(int4_inputs, int4_floor, "GB/s", INT4_LINEARS, tokens=(1, 4, 16)),
}
