"""What is particular to RoPE; test_all.py has what is asked of every operation."""

import math
from functools import partial

import pytest
import torch
from kernel_checks import (
    OPS,
    draw,
    either,
    far_apart,
    gradients,
    interpreted,
)

from kernels import rope
from kernels.rope import rope_tables

device = either


@pytest.mark.parametrize("theta", [500_000.0, 20_000_000.0])
def test_tables_are_right_at_the_last_position(theta):
    cos, sin = rope_tables(128, theta, 32_000)
    for i in (0, 1, 17, 63):
        angle = 31_999 * theta ** (-2 * i / 128)  # Python floats are fp64
        assert cos[31_999, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[31_999, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert cos.dtype == sin.dtype == torch.float32


def test_half_split_layout_against_complex_numbers(device):
    q, k = draw("cpu", torch.float32, (2, 9, 4, 16), (2, 9, 2, 16))
    tables = rope_tables(16, 10_000.0, 9, device)
    angle = torch.outer(torch.arange(9.0).double(), 10_000.0 ** -(torch.arange(8).double() / 8))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    for x, rotated in zip((q, k), rope(q.to(device), k.to(device), *tables)):
        z = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
        expected = torch.cat((z.real, z.imag), -1)
        assert (rotated.cpu().double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([3, 0, 31, 7, 7]),
        torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 30, 31]]),
        torch.arange(20).view(5, 4)[:, :2].t(),  # transposed and strided
        torch.tensor([[9], [31]]).expand(2, 5),
    ],
)
def test_positions(device, positions):
    case = OPS["rope"].make(device, torch.bfloat16, 2, 5)
    case.inputs.append(positions.to(device))
    case.check()


def check_unknown_positions(chip):
    q, k = draw(chip, torch.float32, (1, 4, 2, 8), (1, 4, 1, 8))
    tables = rope_tables(8, 10_000.0, 4, chip)
    for rotated in rope(q, k, *tables, torch.tensor([3, 4, -1, 0], device=chip)):
        assert rotated.isnan().all(-1).all(-1).tolist() == [[False, True, True, False]]
        assert not rotated[0, [0, 3]].isnan().any()


def test_a_position_past_the_tables_is_not_a_number(chip):
    check_unknown_positions(chip)


def test_what_does_not_fit_is_refused(chip):
    q, k = draw(chip, torch.float32, (1, 4, 2, 8), (1, 4, 1, 8))
    cos, sin = rope_tables(8, 10_000.0, 4, chip)
    with pytest.raises(ValueError, match="4 tokens, but tables of 3"):
        rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 8\)"):
        rope(q, k[:, :3], cos, sin)


FAR_BY = {  # which dimension it is whose three elements lie 2^30 apart
    "samples": lambda x: x[:, None],
    "tokens": lambda x: x[None],
    "heads": lambda x: x[:, :1].transpose(0, 1)[None],
}


def run_rope_far(chip, move):
    """Results of tensors near and far apart."""
    tensors = draw(chip, torch.bfloat16, *[(3, 2, 16), (3, 1, 16)] * 2)
    function = partial(rope, **dict(zip(("cos", "sin"), rope_tables(16, 10_000.0, 3, chip))))
    for lay_out in (lambda x: x, far_apart):
        q, k, *dys = (move(lay_out(x)) for x in tensors)
        yield gradients(function, [q, k], *dys)


@interpreted
@pytest.mark.parametrize("what", FAR_BY)
def test_offsets_past_int32(chip, what):
    near, far = run_rope_far(chip, FAR_BY[what])
    assert all(map(torch.equal, near, far))
