import pytest
import torch
from conftest import relative_error

from kernels import attention


def exact(q, k, v, documents=None):
    """Softmax attention in fp64, a head and a query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    offset, group = k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = torch.arange(offset + i + 1)
                if documents is not None:
                    seen = seen[documents[b, seen] == documents[b, i]]
                scores = k[b, seen, h // group] @ q[b, i, h] / q.shape[3] ** 0.5
                out[b, i, h] = scores.softmax(0) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("length", [1, 2, 15, 63, 129])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, 64), (4, 1, 64), (8, 2, 128)])
def test_matches_fp64(length, heads, kv_heads, head_dim):
    torch.manual_seed(0)
    q = torch.randn(1, length, heads, head_dim)
    k, v = (torch.randn(1, length, kv_heads, head_dim) for _ in range(2))
    assert relative_error(attention(q, k, v), exact(q, k, v)) < 1e-6


def test_gradients_match_fp64():
    torch.manual_seed(0)
    shapes = [(2, 17, 4, 64), (2, 17, 2, 64), (2, 17, 2, 64)]
    inputs = [torch.randn(s).requires_grad_() for s in shapes]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    d_out = torch.randn(shapes[0])
    attention(*inputs).backward(d_out)
    q, k, v = exact_inputs
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 8
    scores = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), float("-inf"))
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2))
    out.backward(d_out.double())
    for ours, reference in zip(inputs, exact_inputs):
        assert relative_error(ours.grad, reference.grad) < 2e-6


def test_decoding_and_chunks_end_at_the_last_key():
    torch.manual_seed(0)
    q = torch.randn(1, 20, 4, 64)
    k, v = torch.randn(1, 20, 2, 64), torch.randn(1, 20, 2, 64)
    whole = exact(q, k, v)
    for start in (19, 13, 1):
        part = attention(q[:, start:], k, v)
        assert relative_error(part, whole[:, start:]) < 1e-6


def test_documents_see_themselves_only():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 2, 64) for _ in range(3))
    # lengths 5, 0, 1, 10 and 8: a document may be empty, single, or span a row's end
    cu_seqlens = torch.tensor([0, 5, 5, 6, 16, 24])
    documents = torch.tensor([0] * 5 + [2] + [3] * 10 + [4] * 8).view(2, 12)
    out = attention(q, k, v, cu_seqlens)
    assert relative_error(out, exact(q, k, v, documents)) < 1e-6
    assert not out.isnan().any()

    k2, v2 = k.clone(), v.clone()
    k2[0, :5], v2[0, :5] = 9.0, -9.0  # another first document
    changed = attention(q, k2, v2, cu_seqlens)
    assert torch.equal(changed.flatten(0, 1)[5:], out.flatten(0, 1)[5:])
    assert not torch.equal(changed[0, :5], out[0, :5])


def test_impossible_shapes_are_named():
    q, k = torch.randn(1, 3, 2, 64), torch.randn(1, 2, 2, 64)
    with pytest.raises(ValueError, match="3 queries over 2 keys"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(q[:, :1], k, k, torch.tensor([0, 1]))
