import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_cross_entropy


def make(tokens=600, hidden=32, vocab=211, dtype=torch.float32):
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden).requires_grad_()
    t = torch.randint(vocab, (tokens,))
    t[::7] = -100
    return h, w, t


def exact(h, w, t, reduction):
    h, w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, t, reduction=reduction)
    loss.backward()
    return loss, h.grad, w.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 2500])  # one chunk, several, a short last one
def test_loss_and_gradients_match_fp64(tokens, reduction):
    h, w, t = make(tokens)
    t[0] = 3  # one counts at least
    loss = linear_cross_entropy(h, w, t, reduction)
    loss.backward()
    expected = exact(h, w, t, reduction)
    for ours, reference in zip((loss, h.grad, w.grad), expected):
        assert relative_error(ours.detach(), reference.detach()) < 2e-6
    assert loss.dtype == torch.float32


def test_bf16_is_as_good_as_the_plain_way():
    h, w, t = make(dtype=torch.bfloat16)
    linear_cross_entropy(h, w, t).backward()
    wb = w.detach().bfloat16()
    _, dh, dw = exact(h, wb, t, "mean")
    h2, w2 = h.detach().requires_grad_(), wb.requires_grad_()
    F.cross_entropy((h2 @ w2.T).float(), t).backward()
    assert relative_error(h.grad, dh) < 2 * relative_error(h2.grad, dh)
    assert relative_error(w.grad, dw) < 2 * relative_error(w2.grad, dw)
    assert w.grad.dtype == torch.float32  # accumulated there, not rounded chunk by chunk


def test_weight_gradient_error_does_not_grow_with_rows():
    errors = []
    for tokens in (1_000, 64_000):
        h, w, t = make(tokens, 16, 53, torch.bfloat16)
        linear_cross_entropy(h, w, t, "sum").backward()
        _, _, dw = exact(h, w.detach().bfloat16(), t, "sum")
        errors.append(relative_error(w.grad, dw))
    assert errors[1] < errors[0]
    assert errors[1] < 2**-9  # below one rounding to bf16: chunks are added up in fp32


def test_all_targets_ignored():
    h, w, _ = make(10)
    loss = linear_cross_entropy(h, w, torch.full((10,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any() and not w.grad.any()


def test_a_confident_true_class_has_no_gradient_left():
    w = torch.eye(4).requires_grad_()
    h = torch.tensor([[200.0, 0, 0, 0]]).requires_grad_()
    loss = linear_cross_entropy(h, w, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(h.grad, torch.zeros(1, 4))


def test_without_gradients_and_with_one_of_them():
    h, w, t = make()
    expected = exact(h, w, t, "mean")
    with torch.no_grad(), Watch() as watch:
        assert relative_error(linear_cross_entropy(h, w, t), expected[0].detach()) < 1e-6
    assert watch.products == len(range(0, 600, 128))  # logits alone, no gradient of anything
    frozen = w.detach()
    linear_cross_entropy(h, frozen, t).backward()
    assert relative_error(h.grad, expected[1]) < 2e-6


def test_two_backwards_agree_and_upstream_gradients_scale():
    h, w, t = make()
    loss = linear_cross_entropy(h, w, t)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, (h, w))
    for a, b, c in zip(first, second, tripled):
        assert torch.equal(a, b)
        assert torch.allclose(3 * a, c, rtol=1e-6)


class Watch(TorchDispatchMode):
    """Notes the largest tensor made, in bytes, and the number of matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.products += "mm" in op.overloadpacket._qualified_op_name
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_never_holds_all_logits():
    """Under an eighth of the logits is alive at once: counted in the sizes of tensors made."""
    h, w, t = make(4096, 16, 1000)
    with Watch() as watch:
        linear_cross_entropy(h, w, t)
    assert 4096 * 1000 * 4 / 16 < watch.largest <= 4096 * 1000 * 4 / 8


def test_unknown_reduction():
    h, w, t = make(3)
    with pytest.raises(ValueError, match="none"):
        linear_cross_entropy(h, w, t, "none")
