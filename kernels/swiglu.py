"""The gated activation of the feed-forward, silu(gate) * up (Shazeer 2020, arXiv:2002.05202).

    silu(x) = x * sigmoid(x)        d silu/dx = sigmoid(x) * (1 + x * (1 - sigmoid(x)))

Floor: memory. Forward reads gate|up and writes half as much; backward reads gate|up and dy and
writes d(gate|up). Nothing but gate|up is kept in between: recomputing silu costs less than storing
it, and the feed-forward's activations are the largest of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times its second half.

    gate_up: `[..., 2F]`, the packed output of one matrix product. Returns `[..., F]`, same dtype.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        d_gate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        d_up.copy_(dy * F.silu(gate))
        return d_gate_up
