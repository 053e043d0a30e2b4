"""Root-mean-square normalisation, alone and fused with the residual addition before it.

    y = n * weight,  n = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (g - n * mean(g * n)),  g = dy * weight;   d weight = sum over rows of dy * n

(Zhang and Sennrich 2019, arXiv:1910.07467; the gradient is the chain rule.)

Floor: memory. The forward reads x and writes y, 2 * size(x) bytes; with a residual it also reads
that and writes the sum. The backward reads x and dy and writes dx; with a residual it also reads
the gradient of the sum.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import (
    as_rows,
    cdiv,
    gpu,
    launch_rows,
    next_power_of_2,
    operator,
    runs_triton,
    tl,
    triton,
)


def _definition(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, what was normalised, rstd of each row). What lies in between is fp32."""
    total = x if residual is None else residual + x.to(residual.dtype)
    x32 = total.float()
    rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * rstd).mul_(weight).to(total.dtype), total, rstd


def _definition_backward(
    dy: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dy, n = dy.float(), x.float() * rstd
    g = dy * weight
    d_weight = (dy * n).sum(tuple(range(dy.ndim - 1))).to(weight.dtype)
    dx = g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(rstd).to(x.dtype)
    return dx if d_total is None else dx + d_total, d_weight


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr,
    x_stride, residual_stride, rows, columns, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalises ROWS whole rows. Row numbers, and so all offsets, have 64 bits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, inside, other=0.0)
        total = residual.to(tl.float32) + x.to(residual.dtype).to(tl.float32)
        x = total.to(residual.dtype)  # the norm sees the sum as it is kept
        tl.store(total_ptr + row * columns + column, x, inside)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + eps)
    tl.store(rstd_ptr + row, rstd, row < rows)
    weight = tl.load(weight_ptr + column, column < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, x * rstd * weight, inside)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward(
    dy_ptr, d_total_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    dy_stride, d_total_stride, x_stride, rows, columns,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program strides over the rows and keeps its share of d weight, one row of partial."""
    program = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, column < columns, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    # With two stages the next rows are loaded while these are computed.
    for start in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + line
        inside = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
        n = x * rstd
        g = dy * weight
        d_weight += dy * n
        dx = rstd * (g - n * (tl.sum(g * n, 1, keep_dims=True) / columns))
        if ADD:
            d_total = d_total_ptr + row * d_total_stride + column
            dx += tl.load(d_total, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * columns + column, dx, inside)
    d_weight = tl.sum(d_weight, 0, keep_dims=True)
    tl.store(partial_ptr + program * columns + column, d_weight, column < columns)


# Elements that a program holds at once, elements a thread, and for the backward the programs of a
# multiprocessor. 8,192 elements are two rows of Lucie: a multiprocessor of any class then runs four
# programs of the forward, with 64 KB of bf16 in flight, or two of the backward, which keeps more
# per element. A longer row takes a program for itself.
LAUNCH = {"default": {"forward": (8192, 16), "backward": (4096, 16, 2)}}
STAGED_BYTES = 16_384  # of one tensor's rows: a second stage of three tensors is 48 KB


def _options(columns: int, elements: int, per_thread: int) -> dict[str, int]:
    block = next_power_of_2(columns)
    rows = max(1, elements // block)
    warps = min(16, max(1, rows * block // (32 * per_thread)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def _outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else residual.dtype
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("rms_norm", fake=_outputs)
def _rms_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the sum, rstd of each row). Without a residual the sum is an empty tensor."""
    columns = x.shape[-1]
    if weight.shape != (columns,) or (residual is not None and residual.shape != x.shape):
        shapes = [tuple(t.shape) for t in (x, residual, weight) if t is not None]
        raise ValueError(f"shapes of x, residual and weight do not fit: {shapes}")
    y, total, rstd = _outputs(x, residual, weight, eps)
    x2, r2 = as_rows(x), None if residual is None else as_rows(residual)
    rows = x2.shape[0]
    options = _options(columns, *launch_rows(LAUNCH)["forward"])
    _rms_norm_forward[(cdiv(rows, options["ROWS"]),)](
        x2, r2, weight.contiguous(), y, total, rstd,
        x2.stride(0), 0 if r2 is None else r2.stride(0), rows, columns, eps,
        ADD=residual is not None, **options,
    )  # fmt: skip
    return y, total, rstd


def _gradients(
    dy: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@operator("rms_norm_backward", fake=_gradients)
def _rms_norm_backward_op(
    dy: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx, d weight). x is what was normalised; d_total what else flows to it, if anything."""
    columns = x.shape[-1]
    dy2, x2, t2 = as_rows(dy), as_rows(x), None if d_total is None else as_rows(d_total)
    rows = x2.shape[0]
    elements, per_thread, resident = launch_rows(LAUNCH)["backward"]
    options = _options(columns, elements, per_thread)
    staged = options["ROWS"] * options["BLOCK"] * x.element_size() <= STAGED_BYTES
    programs = min(cdiv(rows, options["ROWS"]), resident * gpu().multiprocessors)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    _rms_norm_backward[(programs,)](
        dy2, t2, x2, weight.contiguous(), rstd, dx, partial,
        dy2.stride(0), 0 if t2 is None else t2.stride(0), x2.stride(0), rows, columns,
        ADD=d_total is not None, STAGES=2 if staged else 1, **options,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps what was normalised, and one number per row, for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
        ctx.triton, ctx.add, ctx.dtype = runs_triton(x), residual is not None, x.dtype
        forward = _rms_norm_op if ctx.triton else _definition
        y, total, rstd = forward(x, residual, weight, eps)
        ctx.save_for_backward(total if ctx.add else x, weight, rstd)
        return (y, total) if ctx.add else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, d_total: Tensor | None = None):
        backward = _rms_norm_backward_op if ctx.triton else _definition_backward
        dx, d_weight = backward(dy, d_total, *ctx.saved_tensors)
        return dx.to(ctx.dtype), dx if ctx.add else None, d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x, the mean of squares taken in fp32.

    x: `[..., D]`, any float dtype; weight: `[D]`; eps is added to the mean of squares.
    Returns `[..., D]` in the dtype of x.
    """
    return _RMSNorm.apply(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a sublayer's output to the residual stream and normalise the sum for the next sublayer.

    x, residual: `[..., D]`; weight: `[D]`. Returns `(rms_norm(x + residual), x + residual)`, both
    in the dtype of the residual.
    """
    return _RMSNorm.apply(x, residual, weight, eps)
