import sys
from functools import partial

import pytest
import torch
from conftest import relative_error
from kernel_checks import DTYPES, all_laid_out, assert_as_good, check, every_layout, gradients

from kernels import attention
from kernels.launch import gpu

A = sys.modules["kernels.attention"]  # the name in the package is the function's
both_chips = pytest.mark.parametrize(  # descriptors; pointers, in smaller blocks
    "chip", [90, pytest.param(80, marks=pytest.mark.slow)], indirect=True
)


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


def test_rows_of_different_lengths_end_at_their_positions():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 64), torch.randn(3, 20, 2, 64), torch.randn(3, 20, 2, 64)
    out = attention(q, k, v, positions=torch.tensor([0, 12, 19]))
    for row, keys in enumerate((1, 13, 20)):
        alone = exact(q[row : row + 1], k[row : row + 1, :keys], v[row : row + 1, :keys])
        assert relative_error(out[row : row + 1], alone) < 1e-6


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


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 3, 6, 64), (1, 3, 4, 64), (1, 3, 4, 64)],  # heads not a multiple
        [(1, 3, 4, 64), (1, 3, 2, 64), (1, 3, 4, 64)],  # of keys and of values
        [(2, 3, 4, 64), (1, 3, 2, 64), (1, 3, 2, 64)],  # batches
        [(1, 3, 4, 64), (1, 3, 2, 128), (1, 3, 2, 128)],  # head_dim
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes):
    q, k, v = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match="shapes of q, k and v do not fit"):
        attention(q, k, v)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(chip, shape):
    q = torch.randn(*shape, 4, 64, device=chip, dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.randn(*shape, 2, 64, device=chip, dtype=torch.bfloat16) for _ in "kv")
    out = attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


def test_impossible_shapes_are_named():
    q, k = torch.randn(1, 3, 2, 64), torch.randn(1, 2, 2, 64)
    with pytest.raises(ValueError, match="3 queries over 2 keys"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(q[:, :1], k, k, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one query a row"):
        attention(q[:, :2], k, k, positions=torch.tensor([1]))


# The Triton kernels, forward and backward: on the chip where there is one, else interpreted. Their
# reference is the definition, in the same dtype and in fp64. What else can go wrong with them, and
# decoding, is in test_attention_kernels.py.


def eager(cu_seqlens=None):
    return partial(A._definition, cu_seqlens=cu_seqlens)


def draw(chip, dtype, batch, queries, keys, heads, kv_heads, head_dim):
    """q, k, v and the gradient of the output."""
    torch.manual_seed(0)
    shapes = [(batch, queries, heads, head_dim), (batch, keys, kv_heads, head_dim)]
    return [torch.randn(shapes[i], device=chip).to(dtype) for i in (0, 1, 1, 0)]


@pytest.fixture
def poison():
    """New memory holds NaN: what is read before it is written, or never written, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@both_chips
@pytest.mark.parametrize(
    "dtype, queries, heads, kv_heads, head_dim",
    [
        (torch.float32, 2, 2, 2, 128),
        (torch.float16, 15, 8, 1, 64),
        (torch.bfloat16, 63, 4, 1, 128),
        (torch.bfloat16, 15, 8, 1, 128),
        (torch.float16, 63, 2, 2, 64),
        (torch.float16, 127, 2, 2, 128),
        (torch.bfloat16, 128, 4, 1, 64),
        (torch.float32, 129, 4, 1, 64),
        (torch.bfloat16, 129, 8, 1, 64),
    ],
)
def test_kernels_match_fp64(chip, poison, dtype, queries, heads, kv_heads, head_dim):
    q, k, v, dy = draw(chip, dtype, 1, queries, queries, heads, kv_heads, head_dim)
    check(attention, eager(), [q, k, v], dy)


def test_kernels_match_fp64_over_many_blocks(chip, poison):
    q, k, v, dy = draw(chip, torch.bfloat16, 1, 1000, 1000, 1, 1, 128)
    check(attention, eager(), [q, k, v], dy)


@both_chips
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_with_one_token(chip, poison, dtype):
    """The softmax of one score is constant: dq and dk are 0, to rounding."""
    q, k, v, dy = draw(chip, dtype, 2, 1, 1, 4, 2, 64)
    out, dq, dk, dv = gradients(attention, [q, k, v], dy)
    torch.testing.assert_close(out, v.repeat_interleave(2, 2))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5
    assert_as_good(dv, dv, dy.double().unflatten(2, (2, 2)).sum(3))


@both_chips
@pytest.mark.parametrize(
    "dtype, queries, keys",
    [
        (torch.bfloat16, 1, 65),
        (torch.float32, 70, 198),
        (torch.bfloat16, 70, 100),
        (torch.bfloat16, 129, 131),
        (torch.float32, 3, 259),
    ],
)
def test_kernels_with_more_keys_than_queries(chip, poison, dtype, queries, keys):
    """A chunk of prompt, against a cache whose tail holds NaN; nothing leaks from there."""
    q, k, v, dy = draw(chip, dtype, 2, queries, keys, 2, 1, 64)
    longer = [torch.full((2, keys + 77, 1, 64), torch.nan, device=chip).to(dtype) for _ in "kv"]
    cached = [cache[:, :keys].copy_(x) for cache, x in zip(longer, (k, v))]
    check(attention, eager(), [q, *cached], dy)


DOCUMENTS = {  # of two rows of 150 tokens
    "empty, single, over the end of a row": [0, 70, 70, 71, 200, 200, 299, 300],
    "many small": [*range(0, 300, 7), 300],
    "single tokens": list(range(301)),
    "a row each": [0, 150, 300],
    "one": [0, 300],
    "on the borders of blocks": [0, 32, 64, 128, 150, 278, 300],
}


@both_chips
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_kernels_with_documents(chip, poison, documents):
    q, k, v, dy = draw(chip, torch.bfloat16, 2, 150, 150, 2, 1, 64)
    dtype = torch.int32 if documents == "one" else torch.int64
    cu_seqlens = torch.tensor(DOCUMENTS[documents], dtype=dtype, device=chip)
    ours, plain = partial(attention, cu_seqlens=cu_seqlens), eager(cu_seqlens)
    if documents != "single tokens":
        check(ours, plain, [q, k, v], dy)
    else:  # as in test_kernels_with_one_token
        out, dq, dk, _ = gradients(ours, [q, k, v], dy)
        torch.testing.assert_close(out, v.repeat_interleave(2, 2))
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def check_others_untouched(chip, value, cu_seqlens, document, end=None):
    """With the tokens of one document replaced, up to end, the others are the same bit for bit."""
    length, (begin, after) = cu_seqlens[-1] // 2, document
    inputs = draw(chip, torch.bfloat16, 2, length, length, 2, 1, 64)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x.flatten(0, 1)[begin : end or after] = value
    function = partial(attention, cu_seqlens=torch.tensor(cu_seqlens, device=chip))
    old, new = (gradients(function, x[:3], x[3]) for x in (inputs, changed))
    for x, y in zip(old, new):
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        assert torch.equal(x[:begin], y[:begin]) and torch.equal(x[after:], y[after:])
    assert not torch.equal(old[0], new[0])


@pytest.mark.parametrize("document", [(0, 40), (40, 130), (130, 131)])
def test_a_changed_document_leaves_the_others_bit_equal(chip, document):
    check_others_untouched(chip, 9.0, [0, 40, 130, 131, 131, 140, 170, 300], document)


@pytest.mark.parametrize("document", [(0, 128), (128, 256)])
def test_blocks_of_other_documents_are_skipped(chip, document):
    """Masked, NaN would spread: 0 times NaN. What a block over the border takes in is spared."""
    block_m, block_n, *_ = A.LAUNCH[gpu().kind]["forward"]
    end = document[1] - max(block_n - block_m, 0)
    check_others_untouched(chip, torch.nan, [0, 128, 256, 384, 512], document, end)


@both_chips
def test_padding_holds_no_nan(chip, poison):
    """lse of every query is finite; past the last it is infinite as far as the backward reads."""
    q, k, v, dy = draw(chip, torch.bfloat16, 2, 130, 130, 2, 1, 64)
    for documents in (None, DOCUMENTS["one"]):
        starts = ends = None
        if documents:
            starts, ends = A._bounds(torch.tensor([0, 3, 3, 260], device=chip), 2, 130)
        out, lse = torch.ops.nanolucie.attention(q, k, v, starts, ends)
        assert out.isfinite().all() and lse[:, :, :130].isfinite().all()
        assert lse[:, :, 130:258].isposinf().all()
        saved = out, lse, starts, ends
        for gradient in torch.ops.nanolucie.attention_backward(dy, q, k, v, *saved):
            assert gradient.isfinite().all()


@both_chips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_with_large_scores(chip, poison, dtype):
    q, k, v, dy = draw(chip, dtype, 1, 130, 130, 2, 1, 64)
    q *= 1e4
    exact_out = eager()(q.double(), k.double(), v.double())
    ours = gradients(attention, [q, k, v], dy)
    assert_as_good(ours[0], eager()(q, k, v), exact_out)
    assert all(x.isfinite().all() for x in ours)


@both_chips
@every_layout
def test_kernels_take_any_layout(chip, poison, shift):
    q, k, v, dy = all_laid_out(draw(chip, torch.bfloat16, 2, 20, 20, 4, 2, 64), shift)
    before = dy.clone()
    ours = gradients(attention, [q, k, v], dy)
    assert torch.equal(dy, before)
    plain = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v, dy)]
    assert all(map(torch.equal, ours, gradients(attention, plain[:3], plain[3])))


@both_chips
@pytest.mark.parametrize("columns", [512, 515])
def test_kernels_take_slices_of_a_packed_product(chip, columns):
    torch.manual_seed(0)
    qkv = torch.randn(2, 40, columns, device=chip).bfloat16()
    dy = torch.randn(2, 40, 4, 64, device=chip).bfloat16()

    def packed(attend):
        return lambda qkv: attend(*qkv[..., -512:].unflatten(-1, (8, 64)).split([4, 2, 2], 2))

    check(packed(attention), packed(eager()), [qkv], dy)


@both_chips
@pytest.mark.parametrize("strides", [(7, 3), (0, 0), (64, 1)])
def test_strides_of_single_rows_mean_nothing(chip, strides):
    q, k, v, dy = draw(chip, torch.bfloat16, 1, 1, 1, 2, 2, 64)
    odd = [x.as_strided(x.shape, (*strides, 64, 1)) for x in (q, k, v, dy)]
    expected = gradients(attention, [q, k, v], dy)
    assert all(map(torch.equal, gradients(attention, odd[:3], odd[3]), expected))
    assert torch.equal(attention(*odd[:3]), attention(q, k, v))  # decoding


def test_backward_twice_from_one_graph(chip):
    inputs = [x.requires_grad_() for x in draw(chip, torch.bfloat16, 1, 70, 70, 4, 1, 64)[:3]]
    total = attention(*inputs).sum()
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, inputs)))
    total = attention(*inputs).sum()
    total.backward()
    assert all(map(torch.equal, first, (x.grad for x in inputs)))


def test_kernels_repeat_themselves(chip):
    q, k, v, dy = draw(chip, torch.bfloat16, 2, 70, 70, 2, 1, 64)
    function = partial(attention, cu_seqlens=torch.tensor([0, 60, 140], device=chip))
    runs = [gradients(function, [q, k, v], dy) for _ in range(5)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
