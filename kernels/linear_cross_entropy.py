"""The language-model head and its loss in one operation, which holds few logits at a time.

    loss_i = logsumexp(W h_i) - (W h_i)[target_i]

With 65,024 columns the logits are far larger than any other activation: 32,000 tokens in fp32 are
8.3 GB, and their gradient as much again. Here a chunk of rows goes through the head and gives its
loss. Since d loss / d logits = softmax - onehot is known at once, it also gives its share of both
gradients, and the next chunk reuses its memory. The backward pass only scales those gradients.

Floor: 6 * N * V * D FLOPs, the three products of an ordinary linear layer.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import launch_rows, next_power_of_2, operator, runs_triton, tl, triton

IGNORE = -100  # how torch and Hugging Face mark a target that does not count


def chunk_rows(tokens: int, vocab_size: int, kernel: bool) -> int:
    """Rows of a chunk, in whole tiles of 128: a matrix product would waste the rest of a tile.

    With the kernel 4,096, or fewer where that would be more than 2^28 logits (512 MB in bf16). Each
    chunk after the first reads and writes d weight, 2.1 GB in Lucie beside 6.5 TFLOP of products.
    The definition has an eighth of all rows, and at most 2^26 logits (256 MB in fp32).
    """
    rows = min(4096, 2**28 // vocab_size) if kernel else min(tokens // 8, 2**26 // vocab_size)
    return max(128, rows // 128 * 128)


def _definition(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The summed loss of a chunk. With gradient, d loss / d logits replaces the logits."""
    ignored = (targets == IGNORE).unsqueeze(1)
    index = targets.clamp(min=0).unsqueeze(1)
    x = logits.float()
    lse = x.logsumexp(dim=1, keepdim=True)
    loss = (lse - x.gather(1, index)).masked_fill_(ignored, 0).sum()
    if gradient:  # softmax - onehot; exp(-inf) clears an ignored row
        x.sub_(lse.masked_fill_(ignored, torch.inf)).exp_()
        x.scatter_add_(1, index, ignored.float() - 1)
        logits.copy_(x)
    return loss


# The targets may be part of a tensor, so the kernel assumes no alignment of theirs.
@triton.jit(do_not_specialize_on_alignment=["targets_ptr"])
def _cross_entropy(
    logits_ptr, targets_ptr, losses_ptr, stride, columns,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the loss of one row. With GRADIENT, d loss / d logits replaces logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    # A target outside the vocabulary makes the loss NaN instead of reading what is not there.
    known = (target >= 0) & (target < columns)
    of_target = tl.load(logits_ptr + target, known, other=float("nan")).to(tl.float32)
    hot = tl.where(known, target, -1).to(tl.int32)

    # Log-sum-exp in one pass: a larger logit rescales the sum. The maximum starts from a finite
    # number because a block of nothing but -inf would give -inf - -inf, which is NaN.
    largest, total = -3e38, 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, column < columns, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
    lse = largest + tl.log(total)
    tl.store(losses_ptr + row, tl.where(target == IGNORE, 0.0, lse - of_target))

    if GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, column < columns).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(column == hot, 1.0, 0.0)
            gradient = tl.where(target == IGNORE, 0.0, gradient)
            tl.store(logits_ptr + column, gradient, column < columns)


# Columns at a time, and warps. A multiprocessor then runs two programs, with 64 KB of bf16 in
# flight. It should not run more: the rows in work (34 MB on an H100) are read twice, the second
# time from the L2 cache if they fit.
LAUNCH = {"default": {"cross_entropy": (16_384, 16)}}


def _by_kernel(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """What `_definition` returns and does."""
    block, warps = launch_rows(LAUNCH)["cross_entropy"]
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    _cross_entropy[(rows,)](
        logits, targets, losses, logits.stride(0), columns, IGNORE=IGNORE, GRADIENT=gradient,
        BLOCK=min(block, next_power_of_2(columns)), num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return losses.sum()


def _add_product(d_weight: Tensor, d_logits: Tensor, h: Tensor, kernel: bool, first: bool) -> None:
    """Add d_logits^T h to d_weight, which is fp32; the first one replaces what is there."""
    # Where the kernel runs, torch has a product of 16-bit matrices that adds in fp32.
    if kernel and h.is_cuda and h.itemsize == 2:
        out = {"out_dtype": torch.float32, "out": d_weight}
        torch.addmm(d_weight, d_logits.T, h, beta=0 if first else 1, **out)
        return
    if first:
        d_weight.zero_()
    if h.dtype == torch.float32:
        d_weight.addmm_(d_logits.T, h)
    else:
        d_weight += d_logits.T @ h


def _outputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_zeros((), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    d_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    return loss, d_hidden, d_weight


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, d hidden, d weight in fp32). A gradient that is not needed is empty."""
    kernel = runs_triton(hidden)
    loss_of = _by_kernel if kernel else _definition
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    w, targets = weight.to(hidden.dtype), targets.contiguous()
    loss, d_hidden, d_weight = _outputs(hidden, weight, targets, need_hidden, need_weight)
    rows = chunk_rows(tokens, vocab_size, kernel)
    memory = hidden.new_empty(min(rows, tokens), vocab_size)  # which all chunks use in turn
    for start in range(0, tokens, rows):
        h = hidden[start : start + rows]
        logits = torch.mm(h, w.T, out=memory[: h.shape[0]])
        loss += loss_of(logits, targets[start : start + rows], need_hidden or need_weight)
        if need_hidden:  # logits are now their gradient
            torch.mm(logits, w, out=d_hidden[start : start + rows])
        if need_weight:
            _add_product(d_weight, logits, h, kernel, first=start == 0)
    if tokens == 0:
        d_weight.zero_()
    return loss, d_hidden, d_weight


_linear_cross_entropy_op = operator("linear_cross_entropy", fake=_outputs)(_loss_and_gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        forward = _linear_cross_entropy_op if runs_triton(hidden) else _loss_and_gradients
        loss, *gradients = forward(hidden, weight, targets, *ctx.needs_input_grad[:2])
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        # Out of place: a second backward through the same graph must find them unscaled.
        d_hidden, d_weight = (
            (gradient * d_loss).to(dtype) if needed else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        )
        return d_hidden, d_weight, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against targets, as an fp32 scalar.

    hidden: `[..., D]`; weight: `[V, D]`; targets: int64 `[...]`, ids under V, or -100 for a
    position that does not count. reduction: "sum", or "mean" over the targets that count (0 when
    there is none). Products run in the dtype of hidden, or in that of autocast; softmax and loss
    in fp32; the gradient of weight accumulates over chunks in fp32. Raises ValueError for shapes
    that do not fit or another reduction. For a target outside the vocabulary the kernel returns
    NaN.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1)
    if targets.shape[0] != hidden.shape[0] or weight.shape[1] != hidden.shape[1]:
        shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
        raise ValueError(f"shapes of hidden, weight and targets do not fit: {shapes}")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if not torch.is_grad_enabled():  # the operation cannot know, and would prepare gradients
        hidden, weight = hidden.detach(), weight.detach()
    loss = _LinearCrossEntropy.apply(hidden, weight, targets)
    if reduction == "sum":
        return loss
    if reduction != "mean":
        raise ValueError(f'reduction is "mean" or "sum", not {reduction!r}')
    return loss / (targets != IGNORE).sum().clamp(min=1)
