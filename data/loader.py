"""What one rank reads for a step: its samples as micro-batches, equally many on every rank."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.dataset import Mixture
from data.tokenizer_base import BOS

IGNORE = -100  # torch's and Hugging Face's mark for a target that does not count


class Share(NamedTuple):
    """One rank's part of a step."""

    samples: range  # their numbers
    batches: list[tuple[Tensor, Tensor]]  # (tokens, targets), int64 `[<= micro_batch_size, T]`
    targets: int  # the number of targets that count


def read_share(
    mixture: Mixture,
    samples: range,
    micro_batch_size: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Share:
    """Read every `world`-th of the samples, beginning with number `rank` of them.

    Every forward pass involves all ranks, so all need the same number of batches. A
    rank that has run out of samples gets one whose targets are all IGNORE. pin: in pinned memory,
    for a copy to a GPU that does not wait. Raises DataError for a sample that cannot be read.
    """
    mine, batches = samples[rank::world], []
    for first in range(0, len(samples[::world]), micro_batch_size):  # rank 0 has the most samples
        block = mine[first : first + micro_batch_size]
        if block:
            tokens = torch.from_numpy(np.stack([mixture[i] for i in block]))
            # Contiguous, because a copy of a view to a GPU would begin with another copy here.
            x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        else:
            x = torch.zeros(1, mixture.seq_len, dtype=torch.int64)
            y = torch.full_like(x, IGNORE)
        batches.append((x.pin_memory(), y.pin_memory()) if pin else (x, y))
    return Share(mine, batches, sum(int((y != IGNORE).sum()) for _, y in batches))


def document_starts(tokens: Tensor) -> Tensor:
    """Where documents start in int64 `[B, T]` tokens: the cu_seqlens of kernels.attention.

    int32 `[documents + 1]`, offsets in the rows laid end to end: every row starts a document, so
    does every `<s>`, and B * T comes last.
    """
    starts = tokens == BOS
    starts[:, 0] = True
    end = torch.tensor([tokens.numel()], device=tokens.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end]).int()
