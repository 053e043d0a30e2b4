import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
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
    mutant,
)

from gpuless.interpreter import MemoryFault
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


# The Triton kernels: on the chip where there is one, else interpreted.


def eager(x, weight, eps=1e-5):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def eager_add(x, residual, weight, eps=1e-5):
    residual = residual + x.to(residual.dtype)
    return F.rms_norm(residual, x.shape[-1:], weight, eps), residual


def ours(x, weight):
    return rms_norm(x, weight, 1e-5)


def ours_add(x, residual, weight):
    return add_rms_norm(x, residual, weight, 1e-5)


def draw(chip, dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, device=chip).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 8), (2, 5, 100), (70, 128), (2, 4096), (1, 5000)])
def test_kernels_match_fp64(chip, dtype, shape):
    x, residual, weight, dy, d_total = draw(chip, dtype, shape, shape, shape[-1:], shape, shape)
    check(ours, eager, [x, weight], dy)
    check(ours_add, eager_add, [x, residual, weight], dy, d_total)


@every_layout
def test_kernels_take_any_layout(chip, shift):
    tensors = draw(chip, torch.bfloat16, (6, 40), (6, 40), 40, (6, 40), (6, 40))
    *inputs, dy, d_total = all_laid_out(tensors, shift)
    before = dy.clone(), d_total.clone()
    check(ours_add, eager_add, inputs, dy, d_total)
    assert torch.equal(dy, before[0]) and torch.equal(d_total, before[1])


def test_kernels_mix_dtypes(chip):
    x, residual, weight, dy, d_total = draw(chip, torch.float32, *[(4, 96)] * 2, 96, *[(4, 96)] * 2)
    x = x.bfloat16()
    check(ours_add, eager_add, [x, residual, weight], dy, d_total)
    y, total, dx, d_residual, d_weight = gradients(ours_add, [x, residual, weight], dy, d_total)
    assert y.dtype == total.dtype == d_residual.dtype == d_weight.dtype == torch.float32
    assert dx.dtype == torch.bfloat16
    # the other way round the sublayer is rounded before the sum, as in the definition
    y, total = add_rms_norm(residual, x, weight, 1e-5)
    assert y.dtype == total.dtype == torch.bfloat16
    assert torch.equal(total, x + residual.bfloat16())
    y, dx, d_weight = gradients(ours, [x, weight], dy.bfloat16())
    assert y.dtype == dx.dtype == torch.bfloat16 and d_weight.dtype == torch.float32
    assert_as_good(y, eager(x, weight.bfloat16()), eager(x.double(), weight.double()))


def test_kernels_of_extremes(chip):
    x = torch.full((1, 64), 1000.0, dtype=torch.float16, device=chip)  # squares overflow fp16
    assert torch.equal(rms_norm(x, torch.ones_like(x[0]), 1e-5), torch.ones_like(x))
    x = torch.full((1, 16), 1e-4, device=chip)
    y = rms_norm(x, torch.ones_like(x[0]), 1e-5)
    assert y[0, 0].item() == pytest.approx(1e-4 / (1e-8 + 1e-5) ** 0.5, rel=1e-5)
    empty = torch.empty(0, 3, 16, device=chip)
    y, dx, d_weight = gradients(ours, [empty, x[0]], empty)
    assert y.shape == dx.shape == empty.shape and not d_weight.any()


def test_one_of_two_results_in_use(chip):
    inputs = draw(chip, torch.float32, (3, 32), (3, 32), 32)
    (dy,) = draw(chip, torch.float32, (3, 32))
    check(lambda *i: ours_add(*i)[0], lambda *i: eager_add(*i)[0], inputs, dy)
    _, dx, d_residual, d_weight = gradients(lambda *i: ours_add(*i)[1], inputs, dy)
    assert torch.equal(dx, dy) and torch.equal(d_residual, dy) and d_weight is None


def test_kernels_repeat_themselves(chip):
    x, weight, dy = draw(chip, torch.bfloat16, (300, 64), 64, (300, 64))
    runs = [gradients(ours, [x, weight], dy) for _ in range(5)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_weight_gradient_error_does_not_grow_with_rows(chip):
    errors = []
    for rows in (1_000, 64_000):
        x, weight, dy = draw(chip, torch.bfloat16, (rows, 16), 16, (rows, 16))
        weight = weight.float()  # a gradient kept in fp32 shows what the sum itself loses
        d_weight = gradients(ours, [x, weight], dy)[2]
        exact = gradients(eager, [x.double(), weight.double()], dy.double())[2]
        errors.append(relative_error(d_weight, exact))
    assert errors[1] < 2 * errors[0] and errors[1] < 2**-20


def test_shapes_that_do_not_fit(chip):
    x = torch.ones(2, 8, device=chip)
    with pytest.raises(ValueError, match=r"\(2, 8\), \(4,\)"):
        rms_norm(x, x[0, :4], 1e-5)
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        add_rms_norm(x, x[:1], x[0], 1e-5)


def test_operators_keep_their_promises(chip):
    """Schema, fake results and autograd registration agree with what the operators do."""
    x, residual, dy = draw(chip, torch.float32, (3, 2, 40), (3, 2, 40), (3, 2, 40))
    x, weight = x.transpose(0, 1), torch.randn(40, device=chip)
    rstd = torch.ones(2, 3, device=chip)
    ops = torch.ops.nanolucie
    for r in (None, residual.transpose(0, 1).bfloat16()):
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x, r, weight)]
        torch.library.opcheck(ops.rms_norm.default, (*leaves, 1e-5))
        inputs = dy.transpose(0, 1), r, x, weight, rstd
        torch.library.opcheck(ops.rms_norm_backward.default, inputs)


def test_one_graph_for_all_row_counts(chip):
    calls = [draw(chip, torch.float32, (n, 40), (n, 40), 40) for n in (3, 5, 17, 40)]

    def loss(x, residual, weight):
        y, total = add_rms_norm(x, residual, weight, 1e-5)
        return (rms_norm(y, weight, 1e-5) * total).sum()

    assert count_graphs(loss, calls) == 1


@pytest.mark.slow
def test_row_counts_do_not_recompile(tmp_path):
    compiled = compiled_variants(
        """
        for rows in range(1, 21):
            x = torch.randn(rows, 64).requires_grad_()
            kernels.rms_norm(x, x.detach()[0], 1e-5).backward(x.detach())
        """,
        tmp_path,
    )
    assert compiled == {"_rms_norm_forward": 1, "_rms_norm_backward": 1}


@interpreted
def test_rows_past_int32(chip):
    x, residual, weight, dy = draw(chip, torch.bfloat16, (3, 64), (3, 64), 64, (3, 64))
    far = [far_apart(t) for t in (x, residual, dy)]
    expected = gradients(ours_add, [x, residual, weight], dy, dy)
    assert all(map(torch.equal, gradients(ours_add, [*far[:2], weight], far[2], far[2]), expected))


MUTANTS = {
    "no column mask": (
        MemoryFault,
        "inside = (row < rows) & (column < columns)\n    x = ",
        "inside = (row < rows) & (column >= 0)\n    x = ",
    ),
    "no row mask": (
        MemoryFault,
        "inside = (row < rows) & (column < columns)\n        x = ",
        "inside = (row >= 0) & (column < columns)\n        x = ",
    ),
    "32-bit rows": (MemoryFault, "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS"),
    "32-bit rows, backward": (MemoryFault, "[:, None].to(tl.int64)", "[:, None]"),
    "a partial row shared": (MemoryFault, "partial_ptr + program * columns", "partial_ptr"),
    "a mean of the wrong product": (AssertionError, "tl.sum(g * n,", "tl.sum(g,"),
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("fault", MUTANTS)
def test_broken_kernels_are_caught(chip, tmp_path, fault):
    error, old, new = MUTANTS[fault]
    broken = mutant(tmp_path, "rms_norm", old, new)
    x, weight, dy = draw(chip, torch.bfloat16, (70, 100), 100, (70, 100))
    if fault.startswith("32-bit"):
        x, dy = far_apart(x[:3]), dy[:3]
    with pytest.raises(error):
        check(lambda x, w: broken.rms_norm(x, w, 1e-5), eager, [x, weight], dy)


@gpu
def test_one_row_past_int32(chip):
    rows, columns = 2**31 // 4096 + 1, 4096
    x, dy = (torch.zeros(rows, columns, dtype=torch.bfloat16, device=chip) for _ in range(2))
    x[-1].normal_(), dy[-1].normal_()
    weight = torch.randn(columns, dtype=torch.bfloat16, device=chip)
    whole = gradients(ours_add, [x, x, weight], dy, dy)
    last = gradients(ours_add, [x[-1:], x[-1:], weight], dy[-1:], dy[-1:])
    assert torch.equal(whole.pop(), last.pop())  # d weight: all other rows give zero
    for a, b in zip(whole, last):
        assert torch.equal(a[-1:], b)
