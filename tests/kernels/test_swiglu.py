import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from kernel_checks import (
    DTYPES,
    all_laid_out,
    check,
    compiled_variants,
    count_graphs,
    every_layout,
    far_apart,
    gpu,
    gradients,
    interpreted,
    mutant,
)

from gpuless.interpreter import MemoryFault
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


# The Triton kernels: on the chip where there is one, else interpreted.


def eager(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def draw(chip, dtype, *shapes):
    torch.manual_seed(0)
    return [(2 * torch.randn(shape, device=chip)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (2, 5, 100), (70, 128), (2, 2048), (3, 5001)])
def test_kernels_match_fp64(chip, dtype, shape):
    x, dy = draw(chip, dtype, (*shape[:-1], 2 * shape[-1]), shape)
    check(swiglu, eager, [x], dy)


@every_layout
def test_kernels_take_any_layout(chip, shift):
    x, dy = all_laid_out(draw(chip, torch.bfloat16, (6, 80), (6, 40)), shift)
    before = dy.clone()
    check(swiglu, eager, [x], dy)
    assert torch.equal(dy, before)


def test_kernels_of_extremes(chip):
    y = swiglu(torch.tensor([[1e4, -1e4, 1.0, 1.0]], device=chip))
    assert torch.equal(y.cpu(), torch.tensor([[1e4, 0.0]]))
    empty = torch.empty(0, 3, 16, device=chip)
    y, dx = gradients(swiglu, [empty], empty[..., :8])
    assert y.shape == (0, 3, 8) and dx.shape == empty.shape
    with pytest.raises(ValueError, match="7"):
        swiglu(torch.ones(2, 7, device=chip))


def test_kernels_repeat_themselves(chip):
    x, dy = draw(chip, torch.bfloat16, (30, 200), (30, 100))
    runs = [gradients(swiglu, [x], dy) for _ in range(5)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_operators_keep_their_promises(chip):
    """Schema, fake results and autograd registration agree with what the operators do."""
    x, dy = draw(chip, torch.float32, (3, 2, 40), (3, 2, 20))
    x, dy = x.transpose(0, 1), dy.transpose(0, 1)
    torch.library.opcheck(torch.ops.nanolucie.swiglu.default, (x.detach().requires_grad_(),))
    torch.library.opcheck(torch.ops.nanolucie.swiglu_backward.default, (dy, x))


def test_one_graph_for_all_row_counts(chip):
    calls = [draw(chip, torch.float32, (n, 40)) for n in (3, 5, 17, 40)]
    assert count_graphs(lambda x: swiglu(x).square().sum(), calls) == 1


@pytest.mark.slow
def test_row_counts_do_not_recompile(tmp_path):
    compiled = compiled_variants(
        """
        for rows in range(1, 21):
            x = torch.randn(rows, 64).requires_grad_()
            kernels.swiglu(x).backward(x.detach()[:, :32])
        """,
        tmp_path,
    )
    assert compiled == {"_swiglu_forward": 1, "_swiglu_backward": 1}


@interpreted
def test_rows_past_int32(chip):
    x, dy = draw(chip, torch.bfloat16, (3, 64), (3, 32))
    expected = gradients(swiglu, [x], dy)
    assert all(map(torch.equal, gradients(swiglu, [far_apart(x)], far_apart(dy)), expected))


MUTANTS = {
    "no column mask": (MemoryFault, "inside = column < columns", "inside = column >= 0"),
    "32-bit rows": (MemoryFault, "(program // blocks).to(tl.int64)", "program // blocks"),
    "programs of one more row": (MemoryFault, "rows * triton.cdiv", "(rows + 1) * triton.cdiv"),
    "half a derivative": (AssertionError, "(1 + gate * (1 - sigmoid))", "(1 + gate)"),
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("fault", MUTANTS)
def test_broken_kernels_are_caught(chip, tmp_path, fault):
    error, old, new = MUTANTS[fault]
    broken = mutant(tmp_path, "swiglu", old, new)
    x, dy = draw(chip, torch.bfloat16, (3, 200), (3, 100))
    if fault == "32-bit rows":
        x = far_apart(x)
    with pytest.raises(error):
        check(broken.swiglu, eager, [x], dy)


@gpu
def test_one_row_past_int32(chip):
    rows, columns = 2**31 // 24_576 + 1, 12_288
    x = torch.zeros(rows, 2 * columns, dtype=torch.bfloat16, device=chip)
    dy = torch.zeros(rows, columns, dtype=torch.bfloat16, device=chip)
    x[-1].normal_(), dy[-1].normal_()
    whole, last = gradients(swiglu, [x], dy), gradients(swiglu, [x[-1:]], dy[-1:])
    for a, b in zip(whole, last):
        assert torch.equal(a[-1:], b)
