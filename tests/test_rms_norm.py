import pytest
import torch
from conftest import relative_error

from kernels import add_rms_norm, rms_norm


def exact(x, weight, eps):
    """The formula, in fp64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (2, 3, 256)])
def test_forward_and_backward_match_fp64(dtype, shape):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    y.backward(dy)
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y64 = exact(x64, w64, 1e-5)
    y64.backward(dy.double())
    limit = 4 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert relative_error(y, y64) < limit
    assert relative_error(x.grad, x64.grad) < limit
    assert relative_error(weight.grad, w64.grad) < limit


def test_mean_of_squares_is_taken_in_fp32():
    # In fp16 the squares overflow; in bf16 a sum of 4,096 equal squares would stop growing.
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    y = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-5)
    assert torch.equal(y, torch.ones_like(y))
    x = torch.full((1, 64), 1000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(64), 1e-5), torch.ones_like(x))


def test_eps_decides_for_tiny_rows():
    x = torch.full((1, 16), 1e-4)
    y = rms_norm(x, torch.ones(16), 1e-5)
    assert y[0, 0].item() == pytest.approx(1e-4 / (1e-8 + 1e-5) ** 0.5, rel=1e-5)


def test_add_returns_norm_of_the_sum_and_the_sum():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 4, 32), torch.randn(3, 4, 32), torch.randn(32)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert relative_error(y, exact(x + residual, weight, 1e-5)) < 1e-6


def test_a_bf16_sublayer_adds_to_an_fp32_residual():
    x, residual = torch.randn(2, 8).bfloat16(), torch.randn(2, 8)
    y, total = add_rms_norm(x, residual, torch.ones(8), 1e-5)
    assert total.dtype == y.dtype == torch.float32
    assert torch.equal(total, residual + x.float())


def test_any_layout():
    torch.manual_seed(0)
    base, weight = torch.randn(6, 4, 64), torch.randn(128)[::2]
    for x in (base[::2], base.transpose(0, 1), base[:, 1:3], base[:1].expand(5, 4, 64)):
        assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))
