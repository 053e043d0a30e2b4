import math
from functools import partial

import pytest
import torch
from kernel_checks import (
    DTYPES,
    all_laid_out,
    assert_as_good,
    check,
    compiled_variants,
    count_graphs,
    every_layout,
    far_apart,
    gpu,
    gradients,
    interpreted,
    laid_out,
    mutant,
)

from gpuless.interpreter import MemoryFault
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


# The Triton kernel: on the chip where there is one, else interpreted.


def eager(cos, sin, positions=None):
    """Rotation as plain torch writes it; rounded once, at the end."""

    def rotate(x):
        at = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        a, b = x.chunk(2, dim=-1)
        c, s = (torch.cat((t[at], t[at]), -1).unsqueeze(-2) for t in (cos, sin))
        return (x * c + torch.cat((-b, a), -1) * s).to(x.dtype)

    return lambda q, k: (rotate(q), rotate(k))


def draw(chip, dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, device=chip).to(dtype) for shape in shapes]


def tables(chip, head_dim, length):
    return rope_tables(head_dim, 10_000.0, length, chip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, tokens, heads, kv_heads, head_dim",
    [(1, 1, 1, 1, 2), (2, 7, 12, 3, 6), (1, 3, 32, 8, 128), (2, 65, 4, 4, 64), (1, 2, 40, 1, 96)],
)
def test_kernel_matches_fp64(chip, dtype, batch, tokens, heads, kv_heads, head_dim):
    shapes = (batch, tokens, heads, head_dim), (batch, tokens, kv_heads, head_dim)
    q, k, dq, dk = draw(chip, dtype, *shapes, *shapes)
    cos, sin = tables(chip, head_dim, tokens + 3)
    check(lambda q, k: rope(q, k, cos, sin), eager(cos, sin), [q, k], dq, dk)


@every_layout
def test_kernel_takes_any_layout(chip, shift):
    shapes = 2 * [(2, 5, 4, 16), (2, 5, 2, 16)]
    q, k, dq, dk = all_laid_out(draw(chip, torch.bfloat16, *shapes), shift)
    before = dq.clone(), dk.clone()
    cos, sin = tables(chip, 16, 5)
    check(lambda q, k: rope(q, k, cos, sin), eager(cos, sin), [q, k], dq, dk)
    assert torch.equal(dq, before[0]) and torch.equal(dk, before[1])


def test_kernel_takes_slices_of_a_packed_product(chip):
    (qkv,) = draw(chip, torch.bfloat16, (2, 5, 8 * 16))
    dq, dk = draw(chip, torch.bfloat16, (2, 4, 5, 16), (2, 2, 5, 16))
    dq, dk = dq.transpose(1, 2), dk.transpose(1, 2)  # as attention returns them
    cos, sin = tables(chip, 16, 9)
    cos, sin = cos[4:], sin[4:]  # as in decoding

    def packed(rotate):
        return lambda qkv: rotate(*qkv.unflatten(-1, (8, 16)).split([4, 2, 2], 2)[:2])

    check(packed(lambda q, k: rope(q, k, cos, sin)), packed(eager(cos, sin)), [qkv], dq, dk)


def test_kernel_takes_tables_of_any_stride(chip):
    q, k = draw(chip, torch.float32, (1, 5, 2, 16), (1, 5, 1, 16))
    cos, sin = tables(chip, 16, 20)
    cos, sin = cos[::2], laid_out(sin[::2], "transposed")
    for ours, plain in zip(rope(q, k, cos, sin), eager(cos, sin)(q, k)):
        assert torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([3, 0, 31, 7, 7]),
        torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 30, 31]]),
        torch.arange(20).view(5, 4)[:, :2].t(),  # transposed and strided
        torch.tensor([[9], [31]]).expand(2, 5),
        torch.tensor([5]),
    ],
)
def test_kernel_takes_positions(chip, positions):
    positions = positions.to(chip)
    q, k, dq, dk = draw(chip, torch.bfloat16, *[(2, 5, 2, 8), (2, 5, 1, 8)] * 2)
    cos, sin = tables(chip, 8, 32)
    rotate = eager(cos, sin, positions)
    check(lambda q, k: rope(q, k, cos, sin, positions), rotate, [q, k], dq, dk)


def test_a_position_past_the_tables_is_not_a_number(chip):
    q, k = draw(chip, torch.float32, (1, 4, 2, 8), (1, 4, 1, 8))
    cos, sin = tables(chip, 8, 4)
    for rotated in rope(q, k, cos, sin, torch.tensor([3, 4, -1, 0], device=chip)):
        assert rotated.isnan().all(-1).all(-1).tolist() == [[False, True, True, False]]
        assert not rotated[0, [0, 3]].isnan().any()
    with pytest.raises(ValueError, match="4 tokens, but tables of 3"):
        rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 8\)"):
        rope(q, k[:, :3], cos, sin)


def test_kernel_keeps_two_dtypes_and_the_last_position(chip):
    q, k = draw(chip, torch.float32, (1, 1, 2, 128), (1, 1, 1, 128))
    cos, sin = rope_tables(128, 20_000_000.0, 32_000, chip)
    last = torch.tensor([31_999], device=chip)
    rotated = rope(q, k.bfloat16(), cos, sin, last)
    expected = eager(cos.double(), sin.double(), last)(q.double(), k.bfloat16().double())
    assert rotated[0].dtype == torch.float32 and rotated[1].dtype == torch.bfloat16
    assert (rotated[0] - expected[0]).abs().max() < 1e-6
    assert_as_good(rotated[1], expected[1].bfloat16(), expected[1])


def test_backward_turns_back(chip):
    q, k = draw(chip, torch.float32, (2, 9, 3, 16), (2, 9, 3, 16))
    cos, sin = tables(chip, 16, 9)
    _, _, dq, dk = gradients(lambda q, k: rope(q, k, cos, sin), [q, k], *rope(q, k, cos, sin))
    assert torch.allclose(dq, q, atol=1e-6) and torch.allclose(dk, k, atol=1e-6)


def test_operator_keeps_its_promises(chip):
    """Schema, fake results and autograd registration agree with what the operator does."""
    q, k = draw(chip, torch.float32, (2, 3, 4, 8), (2, 3, 2, 8))
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    cos, sin = tables(chip, 8, 3)
    for positions in (None, torch.tensor([2, 1, 0], device=chip)):
        for inverse in (False, True):
            inputs = q, k.detach().requires_grad_(), cos, sin, positions, inverse
            torch.library.opcheck(torch.ops.nanolucie.rope.default, inputs)


def test_one_graph_for_all_token_counts(chip):
    cos, sin = tables(chip, 8, 64)
    calls = [draw(chip, torch.float32, (2, n, 4, 8), (2, n, 2, 8)) for n in (3, 5, 17, 40)]

    def loss(q, k):
        q, k = rope(q, k, cos, sin)
        return q.square().sum() + k.sum()

    assert count_graphs(loss, calls) == 1


@pytest.mark.slow
def test_token_counts_do_not_recompile(tmp_path):
    compiled = compiled_variants(
        """
        from kernels.rope import rope_tables
        for tokens in range(1, 21):
            qkv = torch.randn(2, tokens, 4, 64).requires_grad_()
            q, k = kernels.rope(*qkv.split([3, 1], 2), *rope_tables(64, 1e4, tokens + 1))
            (q.sum() + k.sum()).backward()
        """,
        tmp_path,
    )
    assert compiled == {"_rope": 2}  # there and back


@interpreted
def test_tokens_past_int32(chip):
    q, k, dq, dk = draw(chip, torch.bfloat16, *[(3, 2, 16), (3, 1, 16)] * 2)
    cos, sin = tables(chip, 16, 3)

    def function(q, k):
        return rope(q, k, cos, sin)

    # Far apart are tokens, then samples, then heads.
    for move in (lambda x: x[None], lambda x: x[:, None], lambda x: x[:, :1].transpose(0, 1)[None]):
        near = [move(x) for x in (q, k, dq, dk)]
        far = [move(far_apart(x)) for x in (q, k, dq, dk)]
        expected = gradients(function, near[:2], *near[2:])
        assert all(map(torch.equal, gradients(function, far[:2], *far[2:]), expected))


MUTANTS = {
    "no head mask": (MemoryFault, " & (kv_head < kv_heads)", ""),
    "no column mask": (MemoryFault, "[:, None] & (column < half)", "[:, None] & (column >= 0)"),
    "32-bit tokens": (
        MemoryFault,
        "tl.program_id(0).to(tl.int64) * TOKENS",
        "tl.program_id(0) * TOKENS",
    ),
    "32-bit samples": (MemoryFault, "tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "32-bit heads": (MemoryFault, "[None, :, None].to(tl.int64)", "[None, :, None]"),
    "positions unchecked": (MemoryFault, "(position >= 0) & (position < length)", "position >= 0"),
    "a backward that turns on": (AssertionError, "if INVERSE:", "if False:"),
    "keys of another head": (AssertionError, "kv_head * k_head", "kv_head * 0 * k_head"),
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("fault", MUTANTS)
def test_broken_kernels_are_caught(chip, tmp_path, fault):
    error, old, new = MUTANTS[fault]
    broken = mutant(tmp_path, "rope", old, new)
    q, k, dq, dk = draw(chip, torch.bfloat16, *[(3, 5, 12), (3, 3, 12)] * 2)
    cos, sin = tables(chip, 12, 3)
    positions = torch.tensor([0, 1, 3], device=chip) if "positions" in fault else None
    if fault.startswith("32-bit"):
        q = far_apart(q)
    if fault == "32-bit samples":
        q, k, dq, dk = (x[:, None] for x in (q, k, dq, dk))
    elif fault == "32-bit heads":
        q, k, dq, dk = (x[:, :3].transpose(0, 1)[None] for x in (q, k, dq, dk))
    else:
        q, k, dq, dk = (x[None] for x in (q, k, dq, dk))
    with pytest.raises(error):
        ours = partial(broken.rope, cos=cos, sin=sin, positions=positions)
        check(ours, eager(cos, sin), [q, k], dq, dk)


@gpu
def test_one_token_past_int32(chip):
    tokens = 2**31 // 4096 + 1
    q = torch.zeros(1, tokens, 32, 128, dtype=torch.bfloat16, device=chip)
    k = torch.zeros(1, tokens, 8, 128, dtype=torch.bfloat16, device=chip)
    q[:, -1].normal_(), k[:, -1].normal_()
    cos, sin = tables(chip, 128, 8)
    positions = torch.arange(tokens, device=chip) % 8
    rotated = rope(q, k, cos, sin, positions)
    expected = rope(q[:, -1:], k[:, -1:], cos, sin, positions[-1:])
    for a, b in zip(rotated, expected):
        assert torch.equal(a[:, -1:], b)
