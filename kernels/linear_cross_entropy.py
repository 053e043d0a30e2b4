"""The language-model head and its loss in one operation that never holds all the logits.

    loss_i = logsumexp(W h_i) - (W h_i)[target_i]

With 65,024 columns the logits dwarf every other activation: 32,000 tokens in fp32 are 8.3 GB, and
as much again for their gradient. Here a chunk of rows goes through the head, gives its loss and,
since d loss / d logits = softmax - onehot is known at once, its share of both gradients; then its
memory serves the next chunk. The backward pass only scales what the forward left.

Floor: 6 * N * V * D FLOPs, the three products of an ordinary linear layer.
"""

import torch
from torch import Tensor

IGNORE = -100  # torch's and Hugging Face's mark for a target that does not count


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against targets, as an fp32 scalar.

    hidden: `[..., D]`; weight: `[V, D]`; targets: int64 `[...]`, ids under V, or -100 for a
    position that does not count. reduction: "sum", or "mean" over the targets that count (0 when
    there is none). Products run in the dtype of hidden, or in autocast's; softmax and loss in
    fp32; the gradient of weight accumulates over chunks in fp32.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if not torch.is_grad_enabled():  # a custom function would not know, and prepare gradients
        hidden, weight = hidden.detach(), weight.detach()
    loss = _LinearCrossEntropy.apply(hidden, weight, targets)
    if reduction == "sum":
        return loss
    if reduction != "mean":
        raise ValueError(f'reduction is "mean" or "sum", not {reduction!r}')
    return loss / (targets != IGNORE).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        tokens, vocab_size = hidden.shape[0], weight.shape[0]
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)

        # An eighth of the logits, and no more than 2^26 of them (256 MB in fp32), but at least 128
        # rows, fewer of which would not keep a matrix product busy.
        rows = max(128, min(tokens // 8, 2**26 // vocab_size))
        for start in range(0, tokens, rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            ignored = (t == IGNORE).unsqueeze(1)
            index = t.clamp(min=0).unsqueeze(1)
            logits = (h @ w.T).float()
            lse = logits.logsumexp(dim=1, keepdim=True)
            loss += (lse - logits.gather(1, index)).masked_fill_(ignored, 0).sum()
            if not (need_hidden or need_weight):
                continue
            # softmax - onehot in the logits' own memory; exp(-inf) clears an ignored row on the way
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
