"""Root-mean-square normalisation, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight          (Zhang and Sennrich 2019, arXiv:1910.07467)

Floor: memory. Forward reads x and writes y, 2 * size(x) bytes (3 more passes when the residual is
added and kept: read it, write the sum); backward reads x and dy and writes dx.
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x, the mean of squares taken in fp32.

    x: `[..., D]`, any float dtype; weight: `[D]`; eps is added to the mean of squares.
    Returns `[..., D]` in the dtype of x.
    """
    # torch's op accumulates in fp32 whatever the dtype of x, but wants weight in that same dtype.
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a sublayer's output to the residual stream and normalise the sum for the next sublayer.

    x, residual: `[..., D]`; weight: `[D]`. Returns `(rms_norm(x + residual), x + residual)`, both
    in the dtype of the residual.
    """
    residual = residual + x.to(residual.dtype)
    return rms_norm(residual, weight, eps), residual
