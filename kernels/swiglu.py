"""The gated activation of the feed-forward, silu(gate) * up (Shazeer 2020, arXiv:2002.05202).

Floor: memory. Forward reads gate|up and writes half as much; backward reads gate|up and dy and
writes d(gate|up).
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times its second half.

    gate_up: `[..., 2F]`, the packed output of one matrix product. Returns `[..., F]`, same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
