"""What is particular to SwiGLU; test_all.py has what is asked of every operation."""

import pytest
import torch
from kernel_checks import either

from kernels import swiglu

device = either


def test_large_gates_do_not_overflow(device):
    y = swiglu(torch.tensor([[1e4, -1e4, 1.0, 1.0]], device=device))
    assert torch.equal(y.cpu(), torch.tensor([[1e4, 0.0]]))


def test_columns_are_even(chip):
    with pytest.raises(ValueError, match="7"):
        swiglu(torch.ones(2, 7, device=chip))
