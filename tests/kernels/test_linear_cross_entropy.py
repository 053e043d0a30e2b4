"""What is particular to the head's loss; test_all.py has what is asked of every operation."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from kernel_checks import draw, either, far_apart, gpu, gradients, interpreted
from torch.testing import assert_close

from kernels import linear_cross_entropy
from kernels.launch import runs_triton

file = import_module("kernels.linear_cross_entropy")  # the package's attribute is the function
device, chunk_rows = either, file.chunk_rows


@pytest.fixture(autouse=True)
def chunks_of_32_rows(monkeypatch):
    """So that few rows are several chunks. Returns what chunks were asked for."""
    asked = []
    monkeypatch.setattr(file, "chunk_rows", lambda *args: asked.append(args) or 32)
    return asked


def make(tokens=200, hidden=32, vocab=211, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden).to(device, dtype).requires_grad_()
    w = torch.randn(vocab, hidden).to(device).requires_grad_()
    t = torch.randint(vocab, (tokens,))
    t[::7] = -100
    return h, w, t.to(device)


def exact(h, w, t, reduction="mean"):
    h, w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, t, reduction=reduction)
    loss.backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [2, 32, 75])  # one chunk, and several with a short last one
def test_loss_and_gradients_match_fp64(device, tokens, reduction):
    h, w, t = make(tokens, device=device)
    loss = linear_cross_entropy(h, w, t, reduction)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    for ours, reference in zip((loss, *first), exact(h, w, t, reduction)):
        assert relative_error(ours, reference) < 2e-6
    assert loss.dtype == torch.float32
    # A second backward finds the gradients as the first did; what flows in scales them.
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (h, w), retain_graph=True)))
    for a, b in zip(first, torch.autograd.grad(3 * loss, (h, w))):
        assert torch.allclose(3 * a, b, rtol=1e-6)


def test_weight_gradient_error_does_not_grow_with_rows(device):
    errors = []
    slow = runs_triton(torch.empty(0)) and device.type == "cpu"  # interpreted, 3 ms a row
    for tokens in (50, 350) if slow else (1_000, 64_000):
        h, w, t = make(tokens, 16, 53, torch.bfloat16, device)
        linear_cross_entropy(h, w, t, "sum").backward()
        _, _, dw = exact(h, w.detach().bfloat16(), t, "sum")
        errors.append(relative_error(w.grad, dw))
    assert errors[1] < errors[0] and w.grad.dtype == torch.float32
    assert errors[1] < 0.003  # 0.004 where chunks are added up in bf16


@pytest.mark.parametrize("tokens", [0, 10])
def test_all_targets_ignored(device, tokens):
    h, w, t = make(tokens, device=device)
    loss = linear_cross_entropy(h, w, torch.full_like(t, -100))
    loss.backward()
    assert loss.item() == 0 and h.grad.shape == h.shape
    assert not h.grad.any() and not w.grad.any()


def test_a_confident_true_class_has_no_gradient_left(device):
    w = torch.eye(4, device=device).requires_grad_()
    h = torch.tensor([[200.0, 0, 0, 0]], device=device).requires_grad_()
    loss = linear_cross_entropy(h, w, torch.tensor([0], device=device))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(h.grad, torch.zeros(1, 4, device=device))


class Recorder:
    """Stands in for the kernel and notes the logits of each launch and whether they are kept."""

    def __init__(self, monkeypatch):
        self.kernel, self.logits, self.gradient = file._cross_entropy, [], []
        monkeypatch.setattr(file, "_cross_entropy", self)

    def __getitem__(self, grid):
        def launch(logits, *args, GRADIENT, **options):
            self.logits.append(logits)
            self.gradient.append(GRADIENT)
            self.kernel[grid](logits, *args, GRADIENT=GRADIENT, **options)

        return launch


def test_kernel_holds_its_share_of_the_logits(chip, monkeypatch, chunks_of_32_rows):
    h, w, t = make(75, 16, 100, device=chip)
    recorder = Recorder(monkeypatch)
    linear_cross_entropy(h, w, t).backward()
    assert [x.shape for x in recorder.logits] == [(32, 100)] * 2 + [(11, 100)]
    assert len({x.data_ptr() for x in recorder.logits}) == 1  # one memory serves all chunks
    assert all(recorder.gradient) and chunks_of_32_rows == [(75, 100, True)]


def test_rows_of_a_chunk():
    assert chunk_rows(4096, 1000, kernel=False) == 512  # an eighth
    assert chunk_rows(2**20, 65_024, kernel=False) == 1024  # 2^26 logits
    assert [chunk_rows(32_000, v, kernel=True) for v in (97, 65_024, 260_000)] == [
        4096, 4096, 1024,
    ]  # fmt: skip


class SeeminglyOnGPU(torch.Tensor):
    is_cuda = True


def test_the_product_that_adds_in_fp32(monkeypatch):
    """torch has it for GPUs only. What it is asked for is checked here, with a fp64 product in its
    place; whether it does that, by the other tests on a GPU."""

    def addmm(total, a, b, *, beta, out_dtype, out):
        assert out is total and out_dtype == total.dtype == torch.float32
        before = total.double() * beta if beta else 0  # as in BLAS, a beta of 0 reads nothing
        out.copy_(before + a.double() @ b.double())

    monkeypatch.setattr(torch, "addmm", addmm)
    d_logits, h = draw("cpu", torch.bfloat16, (5, 11), (5, 8))
    d_weight = torch.full((11, 8), torch.nan)  # new memory holds anything
    for first in (True, False):
        file._add_product(d_weight, d_logits, h.as_subclass(SeeminglyOnGPU), True, first)
    assert_close(d_weight, (2 * (d_logits.double().T @ h.double())).float())
    # In fp32, and in the definition, it is an ordinary product, and this addmm would be refused.
    monkeypatch.setattr(torch, "addmm", None)
    for dtype, kernel in ((torch.float32, True), (torch.bfloat16, False)):
        on_gpu = h.to(dtype).as_subclass(SeeminglyOnGPU)
        file._add_product(d_weight, d_logits.to(dtype), on_gpu, kernel, first=True)
        assert_close(d_weight, (d_logits.to(dtype).T @ h.to(dtype)).float())


def test_only_gradients_in_use_are_prepared(device, monkeypatch):
    h, w, t = make(10, device=device)
    loss, d_hidden, d_weight = exact(h, w, t)
    recorder = Recorder(monkeypatch)
    with torch.no_grad():
        assert relative_error(linear_cross_entropy(h, w, t), loss) < 1e-6
    assert not any(recorder.gradient)
    linear_cross_entropy(h, w.detach(), t).backward()
    assert relative_error(h.grad, d_hidden) < 2e-6
    linear_cross_entropy(h.detach(), w, t).backward()
    assert relative_error(w.grad, d_weight) < 2e-6
    if runs_triton(h):
        op = torch.ops.nanolucie.linear_cross_entropy
        found = op(h.detach(), w.detach(), t, False, True)
        assert [x.numel() for x in found] == [1, 0, w.numel()]


def test_what_does_not_fit_is_named(device):
    h, w, t = make(3, 16, 20, device=device)
    for wrong in ((h[:2], w, t), (h, w, t[:2]), (h, w[:, :15], t)):
        with pytest.raises(ValueError, match="hidden, weight and targets do not fit"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="none"):
        linear_cross_entropy(h, w, t, "none")


@pytest.mark.parametrize("target", [211, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary_is_not_a_number(chip, target):
    h, w, t = make(5, device=chip)
    t[2] = target
    assert linear_cross_entropy(h, w, t).isnan()
    t[2] = -100
    assert not linear_cross_entropy(h, w, t).isnan()


def test_autocast(device):
    h, w, t = make(40, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(h, w, t)
    loss.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (h, w)]
    expected = gradients(linear_cross_entropy, [*rounded, t])
    assert torch.equal(loss, expected[0])
    assert torch.equal(h.grad.bfloat16(), expected[1])


# The kernel alone


def launch(logits, targets):
    """The loss of each row; logits become their gradient."""
    losses = torch.empty(len(logits), device=logits.device)
    options = dict(IGNORE=-100, GRADIENT=True, BLOCK=64)
    arguments = logits, targets, losses, logits.stride(0), logits.shape[1]
    file._cross_entropy[(len(logits),)](*arguments, **options)
    return losses


def check_kernel_alone(logits, targets):
    leaf = logits.double().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    expected.sum().backward()
    losses = launch(logits, targets)
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    assert torch.allclose(logits.double(), leaf.grad, atol=1e-5)


def rows_of_logits(chip):
    torch.manual_seed(0)
    return 3 * torch.randn(3, 150, device=chip), torch.tensor([3, -100, 149], device=chip)


def test_kernel_survives_infinite_logits(chip):
    check_kernel_alone(*rows_of_logits(chip))
    logits = torch.full((2, 200), -torch.inf, device=chip)  # the first blocks hold nothing else
    logits[:, -1], logits[:, -2] = 1.0, 0.0
    check_kernel_alone(logits, torch.tensor([199, 198], device=chip))


def launch_far(chip):
    near, targets = rows_of_logits(chip)
    near = near.bfloat16()
    far = far_apart(near)
    return launch(far, targets), far, launch(near, targets), near


@interpreted
def test_rows_past_int32(chip):
    far_losses, far, losses, near = launch_far(chip)
    assert torch.equal(far_losses, losses) and torch.equal(far, near)


@gpu
def test_one_row_past_int32(chip):
    rows, columns = 2**31 // 65_024 + 1, 65_024
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device=chip)
    logits[-1].normal_()
    targets = torch.full((rows,), 7, device=chip)
    last = logits[-1:].clone()
    expected = launch(last, targets[-1:])
    assert torch.equal(launch(logits, targets)[-1:], expected)
    assert torch.equal(logits[-1:], last)
