"""Rotary position embedding, half-split layout (the one of Hugging Face Llama).

Each pair (x[i], x[i + D/2]) of a head is turned by the angle position * theta^(-2i/D), so that the
product of a query and a key depends on their distance only (Su et al. 2021, arXiv:2104.09864).

Floor: memory. Forward and backward each read and write q and k once; the tables stay in cache.
"""

import torch
from torch import Tensor


def rope_tables(
    head_dim: int, theta: float, length: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, `[length, head_dim // 2]` fp32 each.

    Angles are taken in fp64: at position 31,999 a fp32 product is already wrong in the third
    decimal, and bf16 could not even tell neighbouring positions apart.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponent)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to their positions.

    q: `[B, T, H, D]`, k: `[B, T, KV, D]`; cos, sin: `[P, D/2]` fp32 from `rope_tables`;
    positions: int64 `[B, T]` or `[T]`, each under P, or None for 0 .. T-1.
    Computed in fp32; returns q and k rotated, in their own dtypes and shapes.
    """
    if positions is None:
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    else:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


class _Rope(torch.autograd.Function):
    """A rotation; its transpose, the backward pass, turns by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
