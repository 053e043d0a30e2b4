import weakref
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from kernel_checks import (
    DTYPES,
    all_laid_out,
    assert_as_good,
    compiled_variants,
    count_graphs,
    every_layout,
    far_apart,
    gpu,
    gradients,
    interpreted,
    mutant,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gpuless.interpreter import MemoryFault
from kernels import linear_cross_entropy
from kernels.launch import runs_triton

file = import_module("kernels.linear_cross_entropy")  # the package's attribute is the function


@pytest.fixture(params=["definition", "kernels"])
def device(request):
    """Both implementations: a test that takes this runs with each."""
    cpu = torch.device("cpu")
    return cpu if request.param == "definition" else request.getfixturevalue("chip")


def make(tokens=600, hidden=32, vocab=211, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden).to(device, dtype).requires_grad_()
    w = torch.randn(vocab, hidden).to(device).requires_grad_()
    t = torch.randint(vocab, (tokens,))
    t[::7] = -100
    return h, w, t.to(device)


def exact(h, w, t, reduction):
    h, w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, t, reduction=reduction)
    loss.backward()
    return loss, h.grad, w.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1100])  # one chunk, several, a short last one
def test_loss_and_gradients_match_fp64(device, tokens, reduction):
    h, w, t = make(tokens, device=device)
    t[0] = 3  # one counts at least
    loss = linear_cross_entropy(h, w, t, reduction)
    loss.backward()
    expected = exact(h, w, t, reduction)
    for ours, reference in zip((loss, h.grad, w.grad), expected):
        assert relative_error(ours.detach(), reference.detach()) < 2e-6
    assert loss.dtype == torch.float32


def test_bf16_is_as_good_as_the_plain_way(device):
    h, w, t = make(dtype=torch.bfloat16, device=device)
    linear_cross_entropy(h, w, t).backward()
    wb = w.detach().bfloat16()
    _, dh, dw = exact(h, wb, t, "mean")
    h2, w2 = h.detach().requires_grad_(), wb.requires_grad_()
    F.cross_entropy((h2 @ w2.T).float(), t).backward()
    assert relative_error(h.grad, dh) < 2 * relative_error(h2.grad, dh)
    assert relative_error(w.grad, dw) < 2 * relative_error(w2.grad, dw)
    assert w.grad.dtype == torch.float32  # accumulated there, not rounded chunk by chunk


def test_weight_gradient_error_does_not_grow_with_rows(device):
    errors = []
    slow = runs_triton(torch.empty(0)) and device.type == "cpu"  # interpreted, 3 ms a row
    for tokens in (250, 2_000) if slow else (1_000, 64_000):
        h, w, t = make(tokens, 16, 53, torch.bfloat16, device)
        linear_cross_entropy(h, w, t, "sum").backward()
        _, _, dw = exact(h, w.detach().bfloat16(), t, "sum")
        errors.append(relative_error(w.grad, dw))
    assert errors[1] < errors[0]
    assert errors[1] < 2**-9  # below one rounding to bf16: chunks are added up in fp32


def test_all_targets_ignored(device):
    h, w, _ = make(10, device=device)
    loss = linear_cross_entropy(h, w, torch.full((10,), -100, device=device))
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any() and not w.grad.any()


def test_a_confident_true_class_has_no_gradient_left(device):
    w = torch.eye(4, device=device).requires_grad_()
    h = torch.tensor([[200.0, 0, 0, 0]], device=device).requires_grad_()
    loss = linear_cross_entropy(h, w, torch.tensor([0], device=device))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(h.grad, torch.zeros(1, 4, device=device))


def test_without_gradients_and_with_one_of_them():
    h, w, t = make()
    expected = exact(h, w, t, "mean")
    with torch.no_grad(), Watch(0) as watch:
        assert relative_error(linear_cross_entropy(h, w, t), expected[0].detach()) < 1e-6
    assert watch.products == len(range(0, 600, 128))  # logits alone, no gradient of anything
    frozen = w.detach()
    linear_cross_entropy(h, frozen, t).backward()
    assert relative_error(h.grad, expected[1]) < 2e-6


def test_two_backwards_agree_and_upstream_gradients_scale(device):
    h, w, t = make(device=device)
    loss = linear_cross_entropy(h, w, t)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, (h, w))
    for a, b, c in zip(first, second, tripled):
        assert torch.equal(a, b)
        assert torch.allclose(3 * a, c, rtol=1e-6)


class Watch(TorchDispatchMode):
    """Counts matrix products, and notes how many bytes of logits live at once at most."""

    most = products = 0

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.made = vocab, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.products += "mm" in op.overloadpacket._qualified_op_name
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == self.vocab > 0:
            if len(out) > 16:  # not the weight
                self.made[id(out)] = out
            alive = {x.data_ptr(): x.untyped_storage().nbytes() for x in self.made.values()}
            self.most = max(self.most, sum(alive.values()))
        return out


def test_never_holds_all_logits():
    """An eighth of the logits is alive at once, also where one chunk follows another."""
    h, w, t = make(4096, 16, 1000)
    with Watch(1000) as watch:
        linear_cross_entropy(h, w, t)
        with torch.no_grad():
            linear_cross_entropy(h, w, t)
    assert 4096 * 1000 * 4 / 16 < watch.most <= 4096 * 1000 * 4 / 8


@pytest.mark.parametrize("change", [{"h": 2}, {"t": 2}, {"w": 15}])
def test_shapes_that_do_not_fit_are_named(device, change):
    h, w, t = make(3, 16, 20, device=device)
    h, t, w = h[: change.get("h", 3)], t[: change.get("t", 3)], w[:, : change.get("w", 16)]
    with pytest.raises(ValueError, match="hidden, weight and targets do not fit"):
        linear_cross_entropy(h, w, t)


def test_unknown_reduction(device):
    h, w, t = make(3, device=device)
    with pytest.raises(ValueError, match="none"):
        linear_cross_entropy(h, w, t, "none")


# The Triton kernel: on the chip where there is one, else interpreted.


def eager(h, w, t, reduction="mean"):
    return F.cross_entropy(F.linear(h, w).float(), t, reduction=reduction)


def eager64(h, w, t):
    return F.cross_entropy(F.linear(h, w), t)


def launch(module, logits, targets):
    """The kernel alone: loss of each row; logits become their gradient."""
    losses = torch.empty(len(logits), device=logits.device)
    options = dict(IGNORE=-100, GRADIENT=True, BLOCK=64)
    arguments = logits, targets, losses, logits.stride(0), logits.shape[1]
    module._cross_entropy[(len(logits),)](*arguments, **options)
    return losses


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocab", [(1, 2), (130, 211), (40, 128), (3, 20_000)])
def test_kernel_matches_fp64(chip, dtype, tokens, vocab):
    h, w, t = make(tokens, 24, vocab, device=chip)
    t[0] = 1
    inputs = [h.detach().to(dtype), (w.detach() / 5).to(dtype), t]
    exact = gradients(eager64, [*(x.double() for x in inputs[:2]), t])
    for triple in zip(gradients(linear_cross_entropy, inputs), gradients(eager, inputs), exact):
        assert_as_good(*triple)


@every_layout
def test_kernel_takes_any_layout(chip, shift):
    h, w, t = (x.detach() for x in make(10, 24, 50, torch.bfloat16, chip))
    h, w = all_laid_out([h, w.bfloat16()], shift)
    exact = gradients(eager64, [h.double(), w.double(), t])
    ours, plain = gradients(linear_cross_entropy, [h, w, t]), gradients(eager, [h, w, t])
    for triple in zip(ours, plain, exact):
        assert_as_good(*triple)


def test_kernel_takes_samples_and_strided_targets(chip):
    h, w, t = make(12, device=chip)
    many = torch.stack((t, t + 1), 1)[:, 0].view(3, 4)
    expected = linear_cross_entropy(h, w, t)
    assert torch.equal(linear_cross_entropy(h.view(3, 4, 32), w, many), expected)


@pytest.mark.parametrize("target", [211, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary_is_not_a_number(chip, target):
    h, w, t = make(5, device=chip)
    t[2] = target
    assert linear_cross_entropy(h, w, t).isnan()
    t[2] = -100
    assert not linear_cross_entropy(h, w, t).isnan()


def test_kernel_survives_infinite_logits(chip):
    logits = torch.full((2, 200), -torch.inf, device=chip)  # the first blocks hold nothing else
    logits[:, -1], logits[:, -2] = 1.0, 0.0
    targets = torch.tensor([199, 198], device=chip)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(launch(file, logits, targets), expected)
    assert torch.allclose(logits.sum(1), torch.zeros(2, device=chip), atol=1e-6)


def test_kernel_holds_an_eighth_of_the_logits(chip, monkeypatch):
    h, w, t = make(1100, 16, 100, device=chip)
    recorder = Recorder(monkeypatch)
    linear_cross_entropy(h, w, t).backward()
    assert [x.shape for x in recorder.logits] == [(128, 100)] * 8 + [(76, 100)]
    assert len({x.data_ptr() for x in recorder.logits}) == 1  # one memory serves all chunks
    assert all(recorder.gradient)


def test_kernel_prepares_only_gradients_in_use(chip, monkeypatch):
    h, w, t = make(130, device=chip)
    loss, d_hidden, d_weight = exact(h, w, t, "mean")
    recorder = Recorder(monkeypatch)
    with torch.no_grad():
        assert relative_error(linear_cross_entropy(h, w, t), loss.detach()) < 1e-6
    assert not any(recorder.gradient)
    linear_cross_entropy(h, w.detach(), t).backward()
    assert relative_error(h.grad, d_hidden) < 2e-6
    linear_cross_entropy(h.detach(), w, t).backward()
    assert relative_error(w.grad, d_weight) < 2e-6
    op = torch.ops.nanolucie.linear_cross_entropy
    assert [x.numel() for x in op(h, w, t, False, True)] == [1, 0, w.numel()]
    assert [x.numel() for x in op(h, w, t, True, False)] == [1, h.numel(), 0]


def test_autocast(device):
    h, w, t = make(140, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(h, w, t)
    loss.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (h, w)]
    expected = gradients(linear_cross_entropy, [*rounded, t])
    assert torch.equal(loss, expected[0])
    assert torch.equal(h.grad.bfloat16(), expected[1])


def test_kernel_repeats_itself(chip):
    h, w, t = (x.detach() for x in make(140, dtype=torch.bfloat16, device=chip))
    runs = [gradients(linear_cross_entropy, [h, w, t]) for _ in range(5)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_no_tokens(device):
    h, w, t = make(0, device=device)
    loss = linear_cross_entropy(h, w, t)
    loss.backward()
    assert loss.item() == 0 and h.grad.shape == (0, 32) and not w.grad.any()


def test_operator_keeps_its_promises(chip):
    """Schema, fake results and autograd registration agree with what the operator does."""
    h, w, t = make(5, 8, 11, device=chip)
    op = torch.ops.nanolucie.linear_cross_entropy.default
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        inputs = [x.detach().requires_grad_(need) for x, need in zip((h, w), needs)]
        torch.library.opcheck(op, (*inputs, t, *needs))
    half = h.detach().bfloat16().requires_grad_()
    torch.library.opcheck(op, (half, w, t, True, True))


def test_one_graph_for_all_token_counts(chip):
    calls = [[x.detach() for x in make(n, 8, 11, device=chip)] for n in (3, 5, 17, 150)]
    assert count_graphs(lambda h, w, t: 2 * linear_cross_entropy(h, w, t), calls) == 1


@pytest.mark.slow
def test_token_counts_do_not_recompile(tmp_path):
    compiled = compiled_variants(
        """
        weight = torch.randn(512, 16)
        for tokens in (*range(1, 19), 1100, 1300):  # of the last, every second chunk is unaligned
            hidden = torch.randn(tokens, 16).requires_grad_()
            kernels.linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64))
        """,
        tmp_path,
    )
    assert compiled == {"_cross_entropy": 1}


@interpreted
def test_rows_past_int32(chip):
    torch.manual_seed(0)
    near, targets = torch.randn(3, 150).bfloat16(), torch.tensor([3, -100, 149])
    far = far_apart(near)
    assert torch.equal(launch(file, far, targets), launch(file, near, targets))
    assert torch.equal(far, near)


MUTANTS = {
    "no column mask": (MemoryFault, "column < columns).to", "column >= 0).to"),
    "32-bit rows": (MemoryFault, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    "targets unchecked": (MemoryFault, "(target >= 0) & (target < columns)", "target < columns"),
    "a sum never rescaled": (AssertionError, "total * tl.exp(before - largest)", "total"),
    "ignored rows count": (AssertionError, "target == IGNORE", "target == 211"),
    "no onehot": (AssertionError, "tl.where(column == hot, 1.0, 0.0)", "0.0"),
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("fault", MUTANTS)
def test_broken_kernels_are_caught(chip, tmp_path, fault):
    error, old, new = MUTANTS[fault]
    broken = mutant(tmp_path, "linear_cross_entropy", old, new)
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(3, 150), torch.tensor([3, -100, 149])
    if fault == "32-bit rows":
        logits = far_apart(logits)
    with pytest.raises(error):
        leaf = logits.double().requires_grad_()
        expected = F.cross_entropy(leaf, targets, reduction="none")
        expected.sum().backward()
        losses = launch(broken, logits, targets)
        assert torch.allclose(losses.double(), expected, atol=1e-5)
        assert torch.allclose(logits.double(), leaf.grad, atol=1e-5)


@gpu
def test_one_row_past_int32(chip):
    rows, columns = 2**31 // 65_024 + 1, 65_024
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device=chip)
    logits[-1].normal_()
    targets = torch.full((rows,), 7, device=chip)
    last = logits[-1:].clone()
    expected = launch(file, last, targets[-1:])
    assert torch.equal(launch(file, logits, targets)[-1:], expected)
    assert torch.equal(logits[-1:], last)


@gpu
def test_one_token_past_int32(chip):
    tokens, hidden = 2**31 // 4096 + 1, 4096
    h = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=chip)
    h[-1].normal_()
    w = torch.randn(256, hidden, dtype=torch.bfloat16, device=chip)
    t = torch.full((tokens,), -100, device=chip)
    t[-1] = 5
    whole = gradients(linear_cross_entropy, [h, w, t])
    last = gradients(linear_cross_entropy, [h[-1:], w, t[-1:]])
    assert relative_error(whole[0], last[0].double()) < 1e-6
    assert relative_error(whole[1][-1:], last[1].double()) < 2**-7
    assert not whole[1][:-1].any()
