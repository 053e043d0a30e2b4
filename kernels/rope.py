"""Rotary position embedding, half-split layout (the one of Hugging Face Llama).

Each pair (x[i], x[i + D/2]) of a head is turned by the angle position * theta^(-2i/D), so that the
product of a query and a key depends only on their distance (Su et al. 2021, arXiv:2104.09864).

Floor: memory. Forward and backward each read and write q and k once; cos and sin stay in cache.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import cdiv, launch_rows, next_power_of_2, operator, runs_triton, tl, triton


def rope_tables(
    head_dim: int, theta: float, length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, `[length, head_dim // 2]` fp32 each.

    Angles are computed in fp64: at position 31,999 a product in fp32 is already wrong in the third
    decimal, and bf16 cannot even tell neighbouring positions apart.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponent)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def _definition(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    at = slice(q.shape[1]) if positions is None else positions
    cos, sin = cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)  # one angle for all heads
    sin = -sin if inverse else sin
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@triton.jit(do_not_specialize=["position_batch", "tokens", "length"])
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    cos_row, sin_row, position_batch, position_token, tokens, length, heads, kv_heads, half,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program turns all heads of TOKENS tokens, so that an angle is read once.

    q_batch to position_token are strides; HEADS, KV_HEADS and BLOCK are heads, kv_heads and half
    rounded up to powers of two.
    """
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < half)

    # All loads are issued before the first store.
    head = tl.arange(0, HEADS)[None, :, None].to(tl.int64)
    kv_head = tl.arange(0, KV_HEADS)[None, :, None].to(tl.int64)
    q_inside = inside[:, None, :] & (head < heads)
    k_inside = inside[:, None, :] & (kv_head < kv_heads)
    q_ptr += batch * q_batch + token[:, None, None] * q_token + head * q_head + column
    k_ptr += batch * k_batch + token[:, None, None] * k_token + kv_head * k_head + column
    q_a, q_b = tl.load(q_ptr, q_inside), tl.load(q_ptr + half, q_inside)
    k_a, k_b = tl.load(k_ptr, k_inside), tl.load(k_ptr + half, k_inside)
    position = token
    if positions_ptr is not None:
        positions_ptr += batch * position_batch + token * position_token
        position = tl.load(positions_ptr, token < tokens, other=0).to(tl.int64)
    # A position beyond cos and sin gives NaN instead of whatever lies there.
    known = inside & ((position >= 0) & (position < length))[:, None]
    cos_ptr += position[:, None] * cos_row + column
    sin_ptr += position[:, None] * sin_row + column
    cos = tl.load(cos_ptr, known, other=float("nan"))[:, None, :]
    sin = tl.load(sin_ptr, known, other=float("nan"))[:, None, :]
    if INVERSE:
        sin = -sin

    q_a, q_b = q_a.to(tl.float32), q_b.to(tl.float32)
    k_a, k_b = k_a.to(tl.float32), k_b.to(tl.float32)
    line = batch * tokens + token[:, None, None]
    q_out_ptr += (line * heads + head) * (2 * half) + column
    k_out_ptr += (line * kv_heads + kv_head) * (2 * half) + column
    tl.store(q_out_ptr, q_a * cos - q_b * sin, q_inside)
    tl.store(q_out_ptr + half, q_b * cos + q_a * sin, q_inside)
    tl.store(k_out_ptr, k_a * cos - k_b * sin, k_inside)
    tl.store(k_out_ptr + half, k_b * cos + k_a * sin, k_inside)


# Elements of one half of the query heads that a program holds, two tokens of Lucie, and warps.
LAUNCH = {"default": {"rope": (4096, 4)}}


def _outputs(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator("rope", fake=_outputs)
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by their angles, or by the opposite ones."""
    batch, tokens, heads, head_dim = q.shape
    length, half = cos.shape
    fits = k.shape[:2] == q.shape[:2] and sin.shape == cos.shape
    if not (fits and head_dim == k.shape[3] == 2 * half):
        shapes = [tuple(t.shape) for t in (q, k, cos, sin)]
        raise ValueError(f"shapes of q, k, cos and sin do not fit: {shapes}")
    if positions is None and tokens > length:
        raise ValueError(f"{tokens} tokens, but tables of {length} positions")
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    position_strides = (0, 0)
    if positions is not None:
        positions = positions.expand(batch, tokens)
        position_strides = positions.stride()
    block, kv_heads = next_power_of_2(half), k.shape[2]
    held, warps = launch_rows(LAUNCH)["rope"]
    elements = next_power_of_2(heads) * block  # of a token
    per_program = max(1, held // elements)
    outputs = _outputs(q, k)
    _rope[(cdiv(tokens, per_program), batch)](
        q, k, cos, sin, positions, *outputs,
        *q.stride()[:3], *k.stride()[:3],
        cos.stride(0), sin.stride(0), *position_strides, tokens, length, heads, kv_heads, half,
        INVERSE=inverse, TOKENS=per_program, HEADS=next_power_of_2(heads),
        KV_HEADS=next_power_of_2(kv_heads), BLOCK=block,
        num_warps=min(32, max(warps, elements // 1024)), enable_fp_fusion=True,
    )  # fmt: skip
    return outputs


class _Rope(torch.autograd.Function):
    """A rotation. The backward pass is its transpose, which turns by the opposite angle."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None):
        ctx.triton = runs_triton(q)
        ctx.save_for_backward(cos, sin, positions)
        return (_rope_op if ctx.triton else _definition)(q, k, cos, sin, positions, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        dq, dk = (_rope_op if ctx.triton else _definition)(dq, dk, *ctx.saved_tensors, True)
        return dq, dk, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to their positions.

    q: `[B, T, H, D]`, k: `[B, T, KV, D]`; cos, sin: `[P, D/2]` fp32 from `rope_tables`;
    positions: int64 `[B, T]` or `[T]`, or None for 0 .. T-1. Positions must be less than P: for
    others the kernel returns NaN. Returns q and k rotated, computed in fp32, in their own dtypes
    and shapes. The kernel raises ValueError for shapes that do not fit.
    """
    return _Rope.apply(q, k, cos, sin, positions)
