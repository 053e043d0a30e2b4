"""The gated activation of the feed-forward, silu(gate) * up (Shazeer 2020, arXiv:2002.05202).

    silu(x) = x * sigmoid(x)        d silu/dx = sigmoid(x) * (1 + x * (1 - sigmoid(x)))

Floor: memory. The forward reads gate|up and writes half as much; the backward reads gate|up and dy
and writes d(gate|up). Only gate|up is kept for the backward: recomputing silu costs less than
storing it, and the feed-forward's activations are the largest of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import (
    as_rows,
    cdiv,
    launch_rows,
    next_power_of_2,
    operator,
    runs_triton,
    tl,
    triton,
)


def _definition(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _definition_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    d_gate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    d_up.copy_(dy * F.silu(gate))
    return d_gate_up


@triton.jit
def _place(columns, BLOCK: tl.constexpr):
    """The row of this program and its BLOCK columns; the programs of a row follow each other."""
    blocks, program = tl.cdiv(columns, BLOCK), tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _swiglu_forward(gate_up_ptr, y_ptr, stride, columns, BLOCK: tl.constexpr):
    row, column = _place(columns, BLOCK)
    inside = column < columns
    gate_up_ptr += row * stride + column
    gate = tl.load(gate_up_ptr, inside).to(tl.float32)
    up = tl.load(gate_up_ptr + columns, inside).to(tl.float32)
    tl.store(y_ptr + row * columns + column, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_up_ptr, d_gate_up_ptr, dy_stride, stride, columns, BLOCK: tl.constexpr
):
    row, column = _place(columns, BLOCK)
    inside = column < columns
    gate_up_ptr += row * stride + column
    gate = tl.load(gate_up_ptr, inside).to(tl.float32)
    up = tl.load(gate_up_ptr + columns, inside).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_up = dy * gate * sigmoid
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_gate_up_ptr += row * (2 * columns) + column
    tl.store(d_gate_up_ptr, d_gate, inside)
    tl.store(d_gate_up_ptr + columns, d_up, inside)


# Columns of a program, and warps. Lucie's 12,288 are six times 2,048, and a multiprocessor runs
# eight programs of 8 KB (12 KB in the backward).
LAUNCH = {"default": {"forward": (2048, 4), "backward": (2048, 4)}}


def _grid(kernel: str, rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    block, warps = launch_rows(LAUNCH)[kernel]
    block = min(block, next_power_of_2(columns))
    options = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
    return (rows * cdiv(columns, block),), options


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@operator("swiglu", fake=_half)
def _swiglu_op(gate_up: Tensor) -> Tensor:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate|up has {gate_up.shape[-1]} columns, an odd number")
    x, y = as_rows(gate_up), _half(gate_up)
    grid, options = _grid("forward", x.shape[0], y.shape[-1])
    _swiglu_forward[grid](x, y, x.stride(0), y.shape[-1], **options)
    return y


@operator("swiglu_backward", fake=lambda dy, gate_up: gate_up.new_empty(gate_up.shape))
def _swiglu_backward_op(dy: Tensor, gate_up: Tensor) -> Tensor:
    dy2, x = as_rows(dy), as_rows(gate_up)
    d_gate_up = gate_up.new_empty(gate_up.shape)
    grid, options = _grid("backward", *dy2.shape)
    _swiglu_backward[grid](dy2, x, d_gate_up, dy2.stride(0), x.stride(0), dy2.shape[1], **options)
    return d_gate_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.triton = runs_triton(gate_up)
        ctx.save_for_backward(gate_up)
        return _swiglu_op(gate_up) if ctx.triton else _definition(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        backward = _swiglu_backward_op if ctx.triton else _definition_backward
        return backward(dy, *ctx.saved_tensors)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times its second half.

    gate_up: `[..., 2F]`, the packed output of one matrix product, in any float dtype. Returns
    `[..., F]` in the same dtype. The kernel raises ValueError for an odd last dimension.
    """
    return _SwiGLU.apply(gate_up)
