"""The language-model head and its loss in one operation that never holds all the logits.

    loss_i = logsumexp(W h_i) - (W h_i)[target_i]

With 65,024 columns the logits are far larger than any other activation: 32,000 tokens in fp32 are
8.3 GB, and their gradient as much again. Here a chunk of rows goes through the head and gives its
loss. Since d loss / d logits = softmax - onehot is known at once, it also gives its share of both
gradients, and the next chunk reuses its memory. The backward pass only scales those gradients.

Floor: 6 * N * V * D FLOPs, the three products of an ordinary linear layer.
"""

import torch
from torch import Tensor

from kernels.launch import on_its_device, runs_triton, tl, triton

IGNORE = -100  # how torch and Hugging Face mark a target that does not count


def chunk_rows(tokens: int, vocab_size: int) -> int:
    """Rows of a chunk: an eighth of all rows, with at most 2^26 logits (256 MB in fp32).

    Always whole tiles of 128 rows, because a matrix product would waste the rest of a tile.
    """
    return max(128, min(tokens // 8, 2**26 // vocab_size) // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        tokens, vocab_size = hidden.shape[0], weight.shape[0]
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)

        rows = chunk_rows(tokens, vocab_size)
        for start in range(0, tokens, rows):
            logits = d_logits = None  # of the chunk before, freed
            h, t = hidden[start : start + rows], targets[start : start + rows]
            ignored = (t == IGNORE).unsqueeze(1)
            index = t.clamp(min=0).unsqueeze(1)
            logits = (h @ w.T).float()
            lse = logits.logsumexp(dim=1, keepdim=True)
            loss += (lse - logits.gather(1, index)).masked_fill_(ignored, 0).sum()
            if not (need_hidden or need_weight):
                continue
            # softmax - onehot in the memory of the logits; exp(-inf) clears an ignored row
            logits.sub_(lse.masked_fill_(ignored, torch.inf)).exp_()
            logits.scatter_add_(1, index, ignored.float() - 1)
            d_logits = logits.to(h.dtype)
            if need_hidden:
                torch.matmul(d_logits, w, out=d_hidden[start : start + rows])
            if need_weight and h.dtype == torch.float32:
                d_weight.addmm_(d_logits.T, h)
            elif need_weight:
                d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        # Out of place: a second backward through the same graph must find them unscaled.
        return (
            None if d_hidden is None else (d_hidden * d_loss).to(d_hidden.dtype),
            None if d_weight is None else d_weight * d_loss,
            None,
        )


# A chunk may begin at any row, so the kernel assumes no alignment of its targets and losses.
@triton.jit(do_not_specialize_on_alignment=["targets_ptr", "losses_ptr"])
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


# A multiprocessor then runs two programs, with 64 KB of bf16 in flight. It should not run more: the
# rows in work (34 MB on an H100) are read twice, the second time from the L2 cache if they fit.
BLOCK, WARPS = 16_384, 16


@torch.library.custom_op("nanolucie::linear_cross_entropy", mutates_args=())
@on_its_device
def _linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, d hidden, d weight in fp32). A gradient that is not needed is empty."""
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    w, targets = weight.to(hidden.dtype), targets.contiguous()
    d_hidden, d_weight = _gradients(hidden, weight, need_hidden, need_weight)
    d_weight.zero_()
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    rows = chunk_rows(tokens, vocab_size)
    memory = hidden.new_empty(min(rows, tokens), vocab_size)  # which all chunks use in turn
    for start in range(0, tokens, rows):
        h = hidden[start : start + rows]
        logits = torch.mm(h, w.T, out=memory[: h.shape[0]])
        _cross_entropy[(h.shape[0],)](
            logits, targets[start:], losses[start:], logits.stride(0), vocab_size,
            IGNORE=IGNORE, GRADIENT=need_hidden or need_weight,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        if need_hidden:
            torch.matmul(logits, w, out=d_hidden[start : start + rows])
        if need_weight and h.dtype == torch.float32:
            d_weight.addmm_(logits.T, h)
        elif need_weight:
            d_weight += logits.T @ h
    return losses.sum(), d_hidden, d_weight


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, need_hidden, need_weight):
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *_gradients(hidden, weight, need_hidden, need_weight)


def _gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    d_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    return d_hidden, d_weight


def _save(ctx, inputs, output) -> None:
    _, weight, _, ctx.need_hidden, ctx.need_weight = inputs
    ctx.weight_dtype = weight.dtype
    _, d_hidden, d_weight = output
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)  # or autograd makes zeros, 1 GB for the weight
    ctx.save_for_backward(d_hidden, d_weight)


def _differentiate(ctx, d_loss: Tensor, *_):
    d_hidden, d_weight = ctx.saved_tensors
    # Out of place: a second backward through the same graph must find them unscaled.
    return (
        (d_hidden * d_loss).to(d_hidden.dtype) if ctx.need_hidden else None,
        (d_weight * d_loss).to(ctx.weight_dtype) if ctx.need_weight else None,
        None,
        None,
        None,
    )


_linear_cross_entropy_op.register_autograd(_differentiate, setup_context=_save)


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
    if runs_triton(hidden):
        loss = _linear_cross_entropy_op(
            hidden, weight, targets, hidden.requires_grad, weight.requires_grad
        )[0]
    else:
        loss = _LinearCrossEntropy.apply(hidden, weight, targets)
    if reduction == "sum":
        return loss
    if reduction != "mean":
        raise ValueError(f'reduction is "mean" or "sum", not {reduction!r}')
    return loss / (targets != IGNORE).sum().clamp(min=1)
