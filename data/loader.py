"""What one rank reads of a step: its samples as micro-batches, the same number on every rank."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.dataset import DataError, Mixture

IGNORE = -100  # torch's and Hugging Face's mark for a target that does not count


class Share(NamedTuple):
    """One rank's part of a step."""

    samples: range  # by number
    batches: list[tuple[Tensor, Tensor]]  # (tokens, targets), int64 `[<= micro_batch_size, T]`
    targets: int  # that count
    error: DataError | None  # why nothing counts, if the data could not be read


def read_share(
    mixture: Mixture,
    samples: range,
    micro_batch_size: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Share:
    """Read every world-th of `samples` from the rank-th on; pin: for a copy to a GPU.

    Every pass is a meeting of all ranks, so all make as many. A rank that has run out of samples,
    or cannot read, passes with a sample whose targets do not count. Raises nothing: the error is
    in the result, for all ranks to learn of it at the same place.
    """
    mine, batches, error = samples[rank::world], [], None
    for first in range(0, len(samples[::world]), micro_batch_size):  # rank 0 has the most samples
        block = mine[first : first + micro_batch_size]
        try:
            tokens = np.stack([mixture[i] for i in block]) if block and not error else None
        except DataError as found:
            error, tokens = found, None
        if tokens is None:
            x = torch.zeros(1, mixture.seq_len, dtype=torch.int64)
            y = torch.full_like(x, IGNORE)
        else:
            # Contiguous, or a copy to a GPU would wait for another copy of it here.
            x = torch.from_numpy(tokens[:, :-1]).contiguous()
            y = torch.from_numpy(tokens[:, 1:]).contiguous()
        batches.append((x.pin_memory(), y.pin_memory()) if pin else (x, y))
    targets = 0 if error else sum(int((y != IGNORE).sum()) for _, y in batches)
    return Share(mine, batches, targets, error)
