"""Root-mean-square normalisation, alone and fused with the residual addition before it.

    y = n * weight,  n = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (g - n * mean(g * n)),  g = dy * weight;   d weight = sum over rows of dy * n

(Zhang and Sennrich 2019, arXiv:1910.07467; the gradient is the chain rule.)

Floor: memory. Forward reads x and writes y, 2 * size(x) bytes (2 more passes when the residual is
added and kept: read it, write the sum); backward reads x and dy and writes dx.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x, the mean of squares taken in fp32.

    x: `[..., D]`, any float dtype; weight: `[D]`; eps is added to the mean of squares.
    Returns `[..., D]` in the dtype of x.
    """
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a sublayer's output to the residual stream and normalise the sum for the next sublayer.

    x, residual: `[..., D]`; weight: `[D]`. Returns `(rms_norm(x + residual), x + residual)`, both
    in the dtype of the residual.
    """
    residual = residual + x.to(residual.dtype)
    return rms_norm(residual, weight, eps), residual


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row; everything in between is fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        dy, n = dy.float(), x.float() * rstd
        g = dy * weight
        d_weight = (dy * n).sum(tuple(range(dy.ndim - 1))).to(weight.dtype)
        d_x = g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(rstd)
        return d_x.to(x.dtype), d_weight, None
