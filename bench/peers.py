"""The operations that bench.kernels times: inputs, floor, and every implementation compared.

A floor is what no implementation can go below: each input read once and each output written once,
in bytes, or the FLOPs of the products. Speeds count the floor's bytes or FLOPs for everybody, so
that whoever moves more or computes twice shows as slower.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.int4_linear import GROUP, unpack
from kernels.rope import rope_tables

OURS = "nanolucie"
EPS = 1e-5
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Suite:
    """What is measured at which numbers of tokens; the sizes are Lucie's."""

    tokens: tuple[int, ...]
    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 65024
    copied: int = 2**31  # bytes of the copy whose speed is the ceiling of streaming kernels
    product: int = 8192  # side of the product whose speed is that of matrix kernels


@dataclass(frozen=True)
class Provider:
    """One implementation. Its layout of the tensors may be another than ours: `enter` leads there,
    `leave` leads its outputs back; neither is timed, and gradients flow through both.
    """

    call: Callable
    enter: Callable[..., tuple] = lambda *inputs: inputs
    leave: Callable[..., tuple] = lambda *outputs: outputs


@dataclass(frozen=True)
class Op:
    """inputs(suite, tokens, device): what our public function takes; a tensor that requires grad
    gets its gradient. floor(suite, tokens): bytes (or FLOPs, unit TFLOP/s) of each mode measured.

    Modes: forward (keeping what a backward pass needs), no-grad-forward, backward (alone), full
    (forward and backward). tokens: at which numbers of them, if not those of the suite.
    """

    inputs: Callable[[Suite, int, str], tuple[Tensor, ...]]
    floor: Callable[[Suite, int], dict[str, int]]
    unit: str
    providers: dict[str, Provider]
    tokens: tuple[int, ...] = ()


def training(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "full": forward + backward}


class Draw:
    """Normal numbers, the same at every call: providers see equal inputs without sharing them."""

    def __init__(self, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        device = self.generator.device
        x = torch.randn(shape, generator=self.generator, device=device, dtype=DTYPE)
        return x.mul_(scale).requires_grad_(grad)


@cache
def liger(module: str, function: str) -> Callable:
    """A Liger kernel; ModuleNotFoundError where liger-kernel is not installed."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply


def compiled(function: Callable) -> Callable:
    """torch.compile of it, each shape for itself; an error where that would run eagerly."""

    @cache
    def build() -> Callable:
        torch._dynamo.config.recompile_limit = 64  # the shapes of a suite are more than the usual 8
        torch._functorch.config.donated_buffer = False  # a timed backward runs again and again
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *inputs: build()(*inputs)


# --- rms_norm, add_rms_norm


def rms_norm_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = Draw(device)
    return draw(tokens, s.hidden), draw(s.hidden)


def rms_norm_floor(s: Suite, tokens: int) -> dict[str, int]:
    x, weight = 2 * tokens * s.hidden, 2 * s.hidden
    return training(2 * x + weight, 3 * x + 2 * weight)  # x -> y; x, dy -> dx


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def add_rms_norm_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = Draw(device)
    return draw(tokens, s.hidden), draw(tokens, s.hidden), draw(s.hidden)


def add_rms_norm_floor(s: Suite, tokens: int) -> dict[str, int]:
    x, weight = 2 * tokens * s.hidden, 2 * s.hidden
    # x, residual -> y, sum; backward the sum and two gradients -> one that both inputs share
    return training(4 * x + weight, 4 * x + 2 * weight)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


# --- swiglu


def swiglu_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    return (Draw(device)(tokens, 2 * s.intermediate),)


def swiglu_floor(s: Suite, tokens: int) -> dict[str, int]:
    half = 2 * tokens * s.intermediate
    return training(3 * half, 5 * half)  # gate, up -> y; gate, up, dy -> dgate, dup


def eager_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gate_and_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.contiguous(), up.contiguous()


# --- rope


def rope_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = Draw(device)
    q = draw(1, tokens, s.heads, s.head_dim)
    k = draw(1, tokens, s.kv_heads, s.head_dim)
    return q, k, *rope_tables(s.head_dim, 500_000.0, tokens, device)


def rope_floor(s: Suite, tokens: int) -> dict[str, int]:
    qk = 2 * tokens * (s.heads + s.kv_heads) * s.head_dim
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


def liger_rope_layout(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """It wants `[B, H, T, D]` views of `[B, T, H, D]`, which it turns in place, and two halves."""
    return *heads_first_views(q, k), *(torch.cat((t, t), dim=-1)[None] for t in (cos, sin))


# --- attention, attention_decode


def attention_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = Draw(device)
    q = draw(1, tokens, s.heads, s.head_dim)
    return q, *(draw(1, tokens, s.kv_heads, s.head_dim) for _ in "kv")


def attention_floor(s: Suite, tokens: int) -> dict[str, int]:
    product = tokens**2 * s.heads * s.head_dim  # 2 FLOPs an element, half of them masked away
    return training(2 * product, 5 * product)


def decode_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = Draw(device)
    q = draw(1, 1, s.heads, s.head_dim, grad=False)
    return q, *(draw(1, tokens, s.kv_heads, s.head_dim, grad=False) for _ in "kv")


def decode_floor(s: Suite, tokens: int) -> dict[str, int]:
    kv, q = 2 * tokens * s.kv_heads * s.head_dim, 2 * s.heads * s.head_dim
    return {"no-grad-forward": 2 * kv + 2 * q}


def heads_first_views(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, T, H, D]` to the `[B, H, T, D]` of torch's attentions, laid out so in memory."""
    return tuple(t.transpose(1, 2).contiguous() for t in tensors)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the backend torch chooses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def sdpa(backend: SDPBackend) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return eager_attention(q, k, v)

    return attend


def flex_call(q: Tensor, k: Tensor, v: Tensor, block_mask: object) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)


compiled_flex = compiled(flex_call)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal_blocks(q.shape[2], q.device) if q.shape[2] > 1 else None
    return compiled_flex(q, k, v, mask)


@cache
def causal_blocks(length: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device)


ATTENTIONS = {
    OURS: Provider(kernels.attention),
    "eager": Provider(eager_attention, heads_first, heads_first_views),
    "sdpa_flash": Provider(sdpa(SDPBackend.FLASH_ATTENTION), heads_first, heads_first_views),
    "sdpa_cudnn": Provider(sdpa(SDPBackend.CUDNN_ATTENTION), heads_first, heads_first_views),
    "flex": Provider(flex, heads_first, heads_first_views),
}


# --- linear_cross_entropy


def loss_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    draw = Draw(device)
    hidden, weight = draw(tokens, s.hidden), draw(s.vocab, s.hidden, scale=s.hidden**-0.5)
    targets = torch.randint(s.vocab, (tokens,), generator=draw.generator, device=device)
    return hidden, weight, targets


def loss_floor(s: Suite, tokens: int) -> dict[str, int]:
    """No backward alone: ours and Liger's prepare the gradients in their forward pass."""
    product = 2 * tokens * s.vocab * s.hidden
    return {"no-grad-forward": product, "full": 3 * product}


def eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    apply = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return apply(hidden, weight, targets)[0]  # z-loss and others follow


# --- int4_linear: the four matrices of a block, for a few tokens that are being decoded


def int4_shapes(s: Suite) -> list[tuple[int, int]]:
    """Rows and columns of q|k|v, o, gate|up and down."""
    q, kv = s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim
    shapes = [(q + kv, s.hidden), (s.hidden, q), (2 * s.intermediate, s.hidden)]
    return [*shapes, (s.hidden, s.intermediate)]


def int4_inputs(s: Suite, tokens: int, device: str) -> tuple[Tensor, ...]:
    """x, packed and scales of each matrix, one after the other."""
    draw, inputs = Draw(device), []
    for rows, columns in int4_shapes(s):
        x, scales = draw(tokens, columns, grad=False), draw(rows, columns // GROUP, grad=False)
        size = (rows, columns // 2)
        packed = torch.randint(256, size, generator=draw.generator, device=device)
        inputs += [x, packed.to(torch.uint8), scales]
    return tuple(inputs)


def int4_floor(s: Suite, tokens: int) -> dict[str, int]:
    """In 4 bits for everybody: who reads 16 is to look four times as slow."""
    shapes = int4_shapes(s)
    weights = sum(n * (k // 2 + 2 * k // GROUP) for n, k in shapes)
    return {"no-grad-forward": weights + sum(2 * tokens * (n + k) for n, k in shapes)}


def each_matrix(linear: Callable) -> Callable:
    return lambda *tensors: tuple(map(linear, tensors[::3], tensors[1::3], tensors[2::3]))


def unpack_and_multiply(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return F.linear(x, unpack(packed, scales, x.dtype))


def unpacked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """x and the weight of each matrix, and nothing in the place of its scales."""
    triples = zip(tensors[::3], tensors[1::3], tensors[2::3])
    parts = [(x, unpack(packed, scales, x.dtype), x[:0]) for x, packed, scales in triples]
    return tuple(tensor for part in parts for tensor in part)


# What matters most first: a run cut short still tells it.
OPS = {
    "attention": Op(attention_inputs, attention_floor, "TFLOP/s", ATTENTIONS),
    "linear_cross_entropy": Op(
        loss_inputs,
        loss_floor,
        "TFLOP/s",
        {
            OURS: Provider(kernels.linear_cross_entropy),
            "eager": Provider(eager_loss),
            "compile": Provider(compiled(eager_loss)),
            "liger": Provider(liger_loss),
        },
    ),
    "rms_norm": Op(
        rms_norm_inputs,
        rms_norm_floor,
        "GB/s",
        {
            OURS: Provider(lambda x, w: kernels.rms_norm(x, w, EPS)),
            "eager": Provider(eager_rms_norm),
            "compile": Provider(compiled(eager_rms_norm)),
            "liger": Provider(lambda x, w: liger("rms_norm", "LigerRMSNormFunction")(x, w, EPS)),
        },
    ),
    "add_rms_norm": Op(
        add_rms_norm_inputs,
        add_rms_norm_floor,
        "GB/s",
        {
            OURS: Provider(lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS)),
            "eager": Provider(eager_add_rms_norm),
            "compile": Provider(compiled(eager_add_rms_norm)),
            "liger": Provider(
                lambda x, r, w: liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")(
                    x, r, w, EPS
                )
            ),
        },
    ),
    "swiglu": Op(
        swiglu_inputs,
        swiglu_floor,
        "GB/s",
        {
            OURS: Provider(kernels.swiglu),
            "eager": Provider(eager_swiglu),
            "compile": Provider(compiled(eager_swiglu)),
            "liger": Provider(
                lambda gate, up: liger("swiglu", "LigerSiLUMulFunction")(gate, up), gate_and_up
            ),
        },
    ),
    "rope": Op(
        rope_inputs,
        rope_floor,
        "GB/s",
        {
            OURS: Provider(kernels.rope),
            "eager": Provider(eager_rope, whole_tables),
            "compile": Provider(compiled(eager_rope), whole_tables),
            "liger": Provider(
                lambda q, k, cos, sin: liger("rope", "LigerRopeFunction")(q, k, cos, sin),
                liger_rope_layout,
                heads_first_views,
            ),
        },
    ),
    "attention_decode": Op(decode_inputs, decode_floor, "GB/s", ATTENTIONS),
    "int4_linear": Op(
        int4_inputs,
        int4_floor,
        "GB/s",
        {
            OURS: Provider(each_matrix(kernels.int4_linear)),
            "eager": Provider(each_matrix(lambda x, weight, _: F.linear(x, weight)), unpacked),
            "compile": Provider(each_matrix(compiled(unpack_and_multiply))),
        },
        tokens=(1, 4, 16),
    ),
}
