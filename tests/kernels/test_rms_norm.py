"""What is particular to RMSNorm; test_all.py has what is asked of every operation."""

import pytest
import torch
from conftest import relative_error
from kernel_checks import OPS, assert_as_good, check, draw, either, gradients

from kernels import add_rms_norm, rms_norm

device = either


def ours(x, weight):
    return rms_norm(x, weight, 1e-5)


def test_mean_of_squares_is_taken_in_fp32(device):
    # In fp16 the squares overflow; in bf16 a sum of 4,096 equal squares would stop growing.
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16, device=device)
    assert torch.equal(ours(x, torch.ones_like(x[0])), torch.ones_like(x))
    x = torch.full((1, 64), 1000.0, dtype=torch.float16, device=device)
    assert torch.equal(ours(x, torch.ones_like(x[0])), torch.ones_like(x))


def test_eps_decides_for_tiny_rows(device):
    x = torch.full((1, 16), 1e-4, device=device)
    y = ours(x, torch.ones_like(x[0]))
    assert y[0, 0].item() == pytest.approx(1e-4 / (1e-8 + 1e-5) ** 0.5, rel=1e-5)


def test_dtypes_mix(device):
    """A bf16 sublayer adds to an fp32 residual, and weights may be fp32."""
    shape = (4, 96)
    x, residual, weight, dy, d_total = draw(device, torch.float32, shape, shape, 96, shape, shape)
    x, case = x.bfloat16(), OPS["add_rms_norm"].make(device, torch.float32, *shape)
    inputs = [x, residual, weight]
    check(case.ours, case.eager, inputs, dy, d_total)
    y, total, dx, d_residual, d_weight = gradients(case.ours, inputs, dy, d_total)
    assert y.dtype == total.dtype == d_residual.dtype == d_weight.dtype == torch.float32
    assert dx.dtype == torch.bfloat16 and torch.equal(total, residual + x.float())
    # The other way round the sublayer is rounded before the sum.
    y, total = add_rms_norm(residual, x, weight, 1e-5)
    assert y.dtype == total.dtype == torch.bfloat16
    assert torch.equal(total, x + residual.bfloat16())
    y, dx, d_weight = gradients(ours, [x, weight], dy.bfloat16())
    assert y.dtype == dx.dtype == torch.bfloat16 and d_weight.dtype == torch.float32
    eager = OPS["rms_norm"].make(device, torch.float32, *shape).eager
    assert_as_good(y, eager(x, weight.bfloat16()), eager(x.double(), weight.double()))


def test_one_of_two_results_in_use(device):
    case = OPS["add_rms_norm"].make(device, torch.float32, 3, 32)
    inputs, dy = case.inputs, case.dys[0]
    check(lambda *i: case.ours(*i)[0], lambda *i: case.eager(*i)[0], inputs, dy)
    _, dx, d_residual, d_weight = gradients(lambda *i: case.ours(*i)[1], inputs, dy)
    assert torch.equal(dx, dy) and torch.equal(d_residual, dy) and not d_weight.any()


def test_weight_gradient_error_does_not_grow_with_rows(chip):
    for rows in (500, 16_000):
        x, weight, dy = draw(chip, torch.bfloat16, (rows, 16), 16, (rows, 16))
        weight = weight.float()  # a gradient kept in fp32 shows what the sum itself loses
        d_weight = gradients(ours, [x, weight], dy)[2]
        case = OPS["rms_norm"].make(chip, torch.float32, 1, 16)
        exact = gradients(case.eager, [x.double(), weight.double()], dy.double())[2]
        assert relative_error(d_weight, exact) < 2**-20  # rounding in fp32; bf16 would leave 2^-9


def test_shapes_that_do_not_fit(chip):
    x = torch.ones(2, 8, device=chip)
    with pytest.raises(ValueError, match=r"\(2, 8\), \(4,\)"):
        rms_norm(x, x[0, :4], 1e-5)
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        add_rms_norm(x, x[:1], x[0], 1e-5)
