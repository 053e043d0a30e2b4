import torch
from conftest import relative_error

from kernels import swiglu


def test_forward_and_backward_match_fp64():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = (4 * torch.randn(3, 5, 64)).to(dtype).requires_grad_()
        dy = torch.randn(3, 5, 32).to(dtype)
        y = swiglu(x)
        y.backward(dy)
        x64 = x.detach().double().requires_grad_()
        gate, up = x64[..., :32], x64[..., 32:]
        y64 = gate / (1 + (-gate).exp()) * up
        y64.backward(dy.double())
        assert y.dtype == dtype and y.shape == (3, 5, 32)
        assert relative_error(y, y64) < 4 * torch.finfo(dtype).eps
        assert relative_error(x.grad, x64.grad) < 4 * torch.finfo(dtype).eps


def test_large_gates_do_not_overflow():
    y = swiglu(torch.tensor([[1e4, -1e4, 1.0, 1.0]]))
    assert torch.equal(y, torch.tensor([[1e4, 0.0]]))
