import math

import pytest
import torch

from kernels import rope
from kernels.rope import rope_tables


@pytest.mark.parametrize("theta", [500_000.0, 20_000_000.0])
def test_tables_are_right_at_the_last_position(theta):
    cos, sin = rope_tables(128, theta, 32_000)
    for i in (0, 1, 17, 63):
        angle = 31_999 * theta ** (-2 * i / 128)  # Python floats are fp64
        assert cos[31_999, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[31_999, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert cos.dtype == sin.dtype == torch.float32


def test_half_split_layout_against_complex_numbers():
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    cos, sin = rope_tables(16, 10_000.0, 9)
    angle = torch.outer(torch.arange(9.0).double(), 10_000.0 ** -(torch.arange(8).double() / 8))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    for x, rotated in zip((q, k), rope(q, k, cos, sin)):
        z = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
        expected = torch.cat((z.real, z.imag), -1)
        assert (rotated.double() - expected).abs().max() < 1e-6


def test_products_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 64).double(), torch.randn(1, 1, 1, 64).double()
    cos, sin = rope_tables(64, 500_000.0, 4096)

    def product(m, n):
        a, _ = rope(q, k, cos, sin, torch.tensor([m]))
        _, b = rope(q, k, cos, sin, torch.tensor([n]))
        return (a * b).sum().item()

    assert product(7, 3) == pytest.approx(product(4007, 4003), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)


def test_positions_per_sample():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 1, 8)
    cos, sin = rope_tables(8, 10_000.0, 32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
    together = rope(q, k, cos, sin, positions)
    for row in range(2):
        alone = rope(q[row : row + 1], k[row : row + 1], cos, sin, positions[row])
        assert torch.equal(together[0][row : row + 1], alone[0])
        assert torch.equal(together[1][row : row + 1], alone[1])
    assert torch.equal(together[0][0], rope(q, k, cos, sin)[0][0])  # None is 0, 1, 2, ...


def test_computes_in_fp32_and_returns_the_dtype_given():
    q = torch.randn(1, 4, 1, 8).bfloat16()
    cos, sin = rope_tables(8, 10_000.0, 4)
    out, _ = rope(q, q, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rope(q.float(), q.float(), cos, sin)[0].bfloat16())
