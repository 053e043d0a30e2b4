"""More of the Triton kernels of attention: decoding, memory, compilation, deliberate faults."""

from functools import partial
from itertools import product

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_as_good,
    check,
    compiled_variants,
    count_graphs,
    far_apart,
    gpu,
    gradients,
    interpreted,
    mutant,
)
from test_attention import (  # noqa: F401, poison is a fixture
    A,
    both_chips,
    check_others_untouched,
    draw,
    eager,
    poison,
)

import kernels
import kernels.launch
from gpuless.interpreter import MemoryFault
from kernels import attention

SHAPES = [(4, 4, 64), (4, 1, 128), (8, 1, 64)]  # heads, heads of keys, head_dim
every_pair = pytest.mark.parametrize("dtype, shape", [*product(DTYPES, SHAPES)])


# Decoding


def check_decoding(chip, dtype, keys, heads, kv_heads, head_dim):
    """One query against slices of a cache that holds NaN behind them."""
    q, k, v, _ = draw(chip, dtype, 2, 1, keys, heads, kv_heads, head_dim)
    cache = torch.full((2, 2, keys + 70, kv_heads, head_dim), torch.nan, device=chip).to(dtype)
    cache[0, :, :keys], cache[1, :, :keys] = k, v
    k, v = cache[:, :, :keys]
    exact = eager()(q.double(), k.double(), v.double())
    assert_as_good(attention(q, k, v), eager()(q, k, v), exact)


@pytest.mark.usefixtures("poison")
@both_chips
@every_pair
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 1000])
def test_decoding_matches_fp64(chip, keys, dtype, shape):
    check_decoding(chip, dtype, keys, *shape)


def check_ragged_decoding(chip, dtype, positions, heads, kv_heads, head_dim):
    """Rows of several lengths; what lies behind them in the cache is NaN."""
    keys = max(positions) + 1
    q, k, v, _ = draw(chip, dtype, len(positions), 1, keys, heads, kv_heads, head_dim)
    cache = torch.full((2, len(q), keys + 70, kv_heads, head_dim), torch.nan, device=chip).to(dtype)
    for row, position in enumerate(positions):
        cache[0, row, : position + 1] = k[row, : position + 1]
        cache[1, row, : position + 1] = v[row, : position + 1]
    at = torch.tensor(positions, device=chip)
    exact = eager()(q.double(), k.double(), v.double(), positions=at)
    assert_as_good(attention(q, *cache, positions=at), eager()(q, k, v, positions=at), exact)


@pytest.mark.usefixtures("poison")
@every_pair
def test_ragged_decoding_matches_fp64(chip, dtype, shape):
    check_ragged_decoding(chip, dtype, [0, 999, 64, 127, 128], *shape)


def test_a_row_does_not_depend_on_the_others(chip):
    """Nor on the room of the cache, as long as the keys are split alike."""
    q, k, v, _ = draw(chip, torch.bfloat16, 3, 1, 700, 4, 2, 64)
    out = attention(q, k, v, positions=torch.tensor([10, 300, 699], device=chip))
    k[1:], v[1:] = torch.nan, torch.nan
    again = attention(q, k, v, positions=torch.tensor([10, 5, 6], device=chip))
    assert torch.equal(out[0], again[0])


class Spy:
    """Stands in for a kernel: keeps its grids and arguments, and runs it if there is one."""

    def __init__(self, kernel=None):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.calls.append((grid, arguments))
            if self.kernel is not None:
                self.kernel[grid](*arguments, **options)

        return launch


@both_chips
def test_no_split_of_the_keys_is_empty(chip, monkeypatch):
    spy = Spy()
    monkeypatch.setattr(A, "_attention_decode", spy)
    monkeypatch.setattr(A, "_attention_combine", Spy())
    lengths = [*range(1, 400, 7), 1000, 4096, 32_000]
    for batch, kv_heads in ((1, 1), (1, 8), (7, 8), (100, 8)):
        for keys in lengths:
            kv = torch.empty(1, 1, kv_heads, 64, device=chip).expand(batch, keys, kv_heads, 64)
            monkeypatch.setattr(A, "_rows", lambda x: x)
            attention(kv[:, :1], kv, kv)
    for (kv_heads, splits, batch), arguments in spy.calls:
        keys, per_split = arguments[-3:-1]
        assert (splits - 1) * per_split < keys <= splits * per_split
        assert per_split % A.DECODE_BLOCK == 0 and splits <= A.MOST_SPLITS
        programs, multiprocessors = kv_heads * splits * batch, kernels.launch.gpu().multiprocessors
        assert splits == 1 or programs <= 2 * multiprocessors
        if keys >= 4096 and batch == 1:  # the chip is not left idle
            assert programs > multiprocessors / 8
    assert len(spy.calls) == 4 * len(lengths)


# What torch sees


def test_operators_keep_their_promises(chip):
    """Schema, fake results and autograd registration agree with what the operators do."""
    ops = torch.ops.nanolucie
    q, k, v, dy = draw(chip, torch.float32, 2, 5, 5, 2, 1, 64)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.attention.default, (*inputs, None, None))
    bounds = A._bounds(torch.tensor([0, 3, 10], device=chip), 2, 5)
    torch.library.opcheck(ops.attention.default, (*inputs, *bounds))
    saved = ops.attention(q, k, v, *bounds)
    torch.library.opcheck(ops.attention_backward.default, (dy, q, k, v, *saved, *bounds))
    positions = torch.tensor([1, 4], device=chip)
    torch.library.opcheck(ops.attention_decode.default, (q[:, :1], k, v, positions))


def test_one_graph_for_all_lengths(chip):
    calls = [draw(chip, torch.float32, 1, n, n, 2, 1, 64)[:3] for n in (3, 5, 17)]
    assert count_graphs(lambda *qkv: attention(*qkv).square().sum(), calls) == 1
    bounds = [torch.tensor([0, 2, 3, n], device=chip) for n in (3, 5, 17)]
    calls = [[*qkv, cu_seqlens] for qkv, cu_seqlens in zip(calls, bounds)]
    assert count_graphs(lambda *inputs: attention(*inputs).square().sum(), calls) == 1


@pytest.mark.slow
def test_lengths_do_not_recompile(tmp_path):
    compiled = compiled_variants(
        """
        for length in range(1, 421, 21):  # 1, odd ones, and multiples of 16
            q, k, v = torch.randn(2, length, 4, 64).bfloat16().requires_grad_().split([2, 1, 1], 2)
            kernels.attention(q, k, v).sum().backward()
            with torch.no_grad():
                kernels.attention(q[:, -1:], *torch.randn(2, 2, 1025 + length, 1, 64).bfloat16())
        """,
        tmp_path,
    )
    names = "forward", "backward_dq", "backward_dkdv", "decode", "combine"
    assert compiled == {f"_attention_{name}": 1 for name in names}


@pytest.mark.parametrize(
    "why, change",
    [
        ("head_dim 64 and 128, not 32", lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32])),
        ("torch.float32, torch.bfloat16 and", lambda q, k, v: (q.float(), k, v)),
        ("no kernel for torch.float64", lambda *qkv: [x.double() for x in qkv]),
    ],
)
def test_what_is_not_offered_is_said_once(chip, monkeypatch, capsys, why, change):
    q, k, v, _ = draw(chip, torch.bfloat16, 1, 3, 3, 2, 1, 64)
    inputs = change(q, k, v)
    with pytest.raises(ValueError, match=why):
        attention(*inputs)
    kernels.use("auto")
    monkeypatch.setattr(A, "runs_triton", lambda x: True)  # as for CUDA tensors
    kernels.launch.say_once.cache_clear()
    for _ in range(2):
        if len({x.dtype for x in inputs}) == 1:
            assert torch.equal(attention(*inputs), eager()(*inputs))
        else:  # nor does torch
            with pytest.raises(RuntimeError, match="dtype"):
                attention(*inputs)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and why in said and "torch's own operation is used" in said


@interpreted
def test_without_a_gpu():
    with pytest.raises(ValueError, match="need a CUDA GPU, and there is none"):
        kernels.use("triton")
    q, k, v, _ = draw("cpu", torch.float32, 1, 3, 3, 2, 1, 64)
    assert torch.equal(attention(q, k, v), eager()(q, k, v))


def test_launch_tables_fit_the_kernels():
    assert A.LAUNCH.keys() == kernels.launch.CLASSES.keys()
    for table in A.LAUNCH.values():
        assert table.keys() == {"forward", "dq", "dkdv"}
        for kernel, (block_m, block_n, warps, stages) in [*table.items(), ("dq", A.FP32)]:
            assert all(x >= 16 and x & (x - 1) == 0 for x in (block_m, block_n))
            # Queries are padded to PADDING; keys are aligned to it where there are more of them.
            assert A.PADDING.value % block_m == A.PADDING.value % block_n == 0
            assert kernel != "dq" or block_m % block_n == 0
            assert warps in (4, 8) and stages >= 1


# Offsets past int32


def far_tokens(x):
    """x `[1, 129, 1, 64]` with its tokens 2^24 elements apart: the last is past int32."""
    huge = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    return huge.as_strided(x.shape, (2**31, 2**24, 64, 1)).copy_(x)


@interpreted
@both_chips
@pytest.mark.parametrize("far, shape", [(far_apart, (3, 3, 3)), (far_tokens, (1, 129, 129))])
def test_rows_past_int32(chip, far, shape):
    near = draw(chip, torch.bfloat16, *shape, 1, 1, 64)
    q, k, v, dy = map(far, near)
    expected = gradients(attention, near[:3], near[3])
    assert all(map(torch.equal, gradients(attention, [q, k, v], dy), expected))
    decoded = attention(q[:, -1:], k, v)
    assert torch.equal(decoded, attention(near[0][:, -1:], *near[1:3]))


@gpu
def test_one_sequence_past_int32(chip):
    """17 sequences of 32,768 tokens and 4,096 columns: the last lies past 2^31 elements."""
    shapes = [(17, 32_768, heads, 128) for heads in (32, 8, 8, 32)]
    q, k, v, dy = (torch.zeros(shape, dtype=torch.bfloat16, device=chip) for shape in shapes)
    for x in (q, k, v, dy):
        x[-1].normal_()
    whole = gradients(attention, [q, k, v], dy)
    last = gradients(attention, [q[-1:], k[-1:], v[-1:]], dy[-1:])
    for a, b in zip(whole, last):
        assert torch.equal(a[-1:], b)


# Deliberate faults

FORWARD, BACKWARD, DECODE = "attention_forward", "attention_backward", "attention_decode"
WRONG, FAULT = AssertionError, MemoryFault
MUTANTS = {
    "forward without causal mask": (
        WRONG, FORWARD,
        "m[:, None] >= (n + BLOCK_M - BLOCK_N)[None, :]",
        "m[:, None] >= 0 * n[None, :]",
    ),
    "forward without causal mask in the second block": (
        WRONG, FORWARD, "m[:, None] >= (n + BLOCK_M - block * BLOCK_N)", "m[:, None] >= (0 * n)"
    ),
    "forward without document mask": (
        WRONG, FORWARD, ">= first_key[:, None]", ">= 0 * first_key[:, None]"
    ),
    "forward that masks other documents, but reads them": (
        WRONG, FORWARD, "lowest = tl.load(starts + first_m)", "lowest = first_m * 0"
    ),
    "forward that takes the last document for the first": (
        WRONG, FORWARD, "tl.load(starts + tl.minimum(first_m + BLOCK_M, queries) - 1)", "lowest"
    ),
    "forward with another head's keys": (
        WRONG, FORWARD, "head // (HEADS // KV_HEADS) * D", "head % KV_HEADS * D"
    ),
    "forward without rescaled output": (
        WRONG, FORWARD, "acc * shrink[:, None], new_max", "acc, new_max"
    ),
    "forward without rescaled sum": (WRONG, FORWARD, "row_sum * shrink", "row_sum"),
    "forward that forgets the maximum": (
        WRONG, FORWARD, "tl.maximum(row_max, tl.max(scores, 1))", "tl.max(scores, 1)"
    ),
    "forward without the last whole block": (
        WRONG, FORWARD, "tl.range(0, unmasked, BLOCK_N,", "tl.range(BLOCK_N, unmasked, BLOCK_N,"
    ),
    "forward without the last block in part": (
        WRONG, FORWARD, "tl.range(0, rest,", "tl.range(0, 0 * rest,"
    ),
    "output without mask": (
        FAULT, FORWARD, "mask=inside[:, None])\n", "mask=inside[:, None] | True)\n"
    ),
    "lse without padding": (
        WRONG, FORWARD, "mask = last & (queries", "mask = (tail < 0) & (queries"
    ),
    "padding by every program": (FAULT, FORWARD, "mask = last & (queries", "mask = (queries"),
    "a table without padding": (WRONG, FORWARD, "(queries // PADDING + 2) * PADDING", "queries"),
    "32-bit sequences": (FAULT, FORWARD, "table += batch.to(tl.int64)", "table += batch"),
    "32-bit tokens": (FAULT, FORWARD, "row.to(tl.int64) * stride", "row * stride"),
    "reading past the end": (FAULT, FORWARD, "(row + r >= 0) & (row + r < rows)", "row + r >= 0"),
    "reading before the beginning": (
        FAULT, FORWARD, "(row + r >= 0) & (row + r < rows)", "row + r < rows"
    ),
    "dq without causal mask": (
        WRONG, BACKWARD, "(row + offset)[:, None] >= key[None, :]", "key[None, :] >= -10000"
    ),
    "dq without document mask": (
        WRONG, BACKWARD, "key[None, :] >= first_key[:, None]", "key[None, :] >= -10000"
    ),
    "dq that reads other documents": (
        WRONG, BACKWARD, "lowest = tl.load(starts + first_m)", "lowest = 0"
    ),
    "dq with another head's keys": (
        WRONG, BACKWARD, "head // (HEADS // KV_HEADS) * D", "head % KV_HEADS * D"
    ),
    "dq without the last whole block": (
        WRONG, BACKWARD, "tl.range(0, unmasked, BLOCK_N,", "tl.range(BLOCK_N, unmasked, BLOCK_N,"
    ),
    "dq without the last block in part": (
        WRONG, BACKWARD, "tl.range(0, rest,", "tl.range(0, 0 * rest,"
    ),
    "dq without mask": (
        FAULT, BACKWARD,
        "tl.store(dq_table + position, dq.to(dq_table.dtype.element_ty), mask=inside[:, None])",
        "tl.store(dq_table + position, dq.to(dq_table.dtype.element_ty))",
    ),
    "delta without padding": (WRONG, BACKWARD, "last & (tail >= 0)", "last & (tail < 0)"),
    "dkdv without causal mask": (
        WRONG, BACKWARD, "(row + offset)[None, :] >= key[:, None]", "key[:, None] >= 0"
    ),
    "dkdv without document mask": (
        WRONG, BACKWARD, "key[:, None] >= first_key[None, :]", "key[:, None] >= 0"
    ),
    "dkdv that reads other documents": (
        WRONG, BACKWARD, "end = tl.load(ends", "end += 0 * tl.load(ends"
    ),
    "dkdv with another group's queries": (
        WRONG, BACKWARD, "kv_head * GROUP + g", "kv_head + g * KV_HEADS"
    ),
    "dkdv without the first block": (
        WRONG, BACKWARD, "tl.range(0, end - diagonal", "tl.range(BLOCK_M, end - diagonal"
    ),
    "dkdv without the last block": (
        WRONG, BACKWARD, "tl.range(0, end - diagonal", "tl.range(0, end - diagonal - BLOCK_M"
    ),
    "dkdv without mask": (
        FAULT, BACKWARD,
        "dv.to(dv_table.dtype.element_ty), mask=inside[:, None]",
        "dv.to(dv_table.dtype.element_ty)",
    ),
    "decoding of another group": (
        WRONG, DECODE, "kv_head * GROUP + member", "kv_head + member * KV_HEADS"
    ),
    "decoding without masked scores": (
        WRONG, DECODE, 'tl.where(seen[None, :], scores, float("-inf"))', "scores"
    ),
    "decoding without masked keys": (
        FAULT, DECODE, "seen = start + n < count", "seen = start + n < count + 64"
    ),
    "decoding without rescaled output": (WRONG, DECODE, "acc * shrink[:, None]", "acc"),
    "decoding without rescaled sum": (WRONG, DECODE, "row_sum * shrink", "row_sum"),
    "decoding without the last block": (
        WRONG, DECODE, "tl.range(0, count,", "tl.range(0, count - BLOCK_N,"
    ),
    "decoding without head mask": (
        FAULT, DECODE, "inside = member < GROUP", "inside = member >= 0"
    ),
    "ragged decoding that sees them all": (
        FAULT, DECODE, "tl.load(positions + batch) + 1", "tl.load(positions + batch) * 0 + 2000"
    ),
    "ragged decoding without the last key": (
        WRONG, DECODE, "tl.load(positions + batch) + 1", "tl.load(positions + batch)"
    ),
    "ragged decoding by another row": (
        WRONG, DECODE, "tl.load(positions + batch)", "tl.load(positions)"
    ),
    "ragged decoding with empty splits": (
        WRONG, DECODE, "tl.where(row_sum > 0, row_sum, 1)[:, None]", "row_sum[:, None]"
    ),
    "decoding without weights": (WRONG, DECODE, "rows * weight[:, None]", "rows"),
    "joining splits there are not": (
        FAULT, DECODE, "inside = split < splits", "inside = split >= 0"
    ),
    "decoding of 32-bit sequences": (
        FAULT, DECODE, "k_table += batch.to(tl.int64)", "k_table += batch"
    ),
    "decoding of 32-bit tokens": (
        FAULT, DECODE, "v_table += first.to(tl.int64)", "v_table += first"
    ),
}  # fmt: skip


def attempt(chip, fault):
    """What of the tests finds a fault."""
    if "32-bit" in fault:
        far, shape = (far_apart, (3, 3, 3)) if "sequences" in fault else (far_tokens, (1, 129, 129))
        q, k, v, dy = map(far, draw(chip, torch.bfloat16, *shape, 1, 1, 64))
        if "decoding" in fault:
            attention(q[:, -1:], k, v)
        else:
            gradients(attention, [q, k, v], dy)
    elif "ragged" in fault:
        check_ragged_decoding(chip, torch.bfloat16, [40, 299, 131], 4, 2, 64)
    elif "decoding" in fault or "splits" in fault:
        for keys in (70, 129, 300):
            check_decoding(chip, torch.bfloat16, keys, 4, 2, 64)
    elif "reads" in fault:
        for document in ((0, 128), (128, 256)):
            check_others_untouched(chip, torch.nan, [0, 128, 256, 384, 512], document)
    else:
        q, k, v, dy = draw(chip, torch.bfloat16, 1, 300, 300, 4, 2, 64)
        check(attention, eager(), [q, k, v], dy)
        cu_seqlens = torch.tensor([0, 90, 91, 260, 300], device=chip)
        check(partial(attention, cu_seqlens=cu_seqlens), eager(cu_seqlens), [q, k, v], dy)


def chip_with(fault):
    """Pointers have offsets and edges to get wrong, descriptors have not."""
    return 80 if "32-bit" in fault or "reading" in fault else 90


@pytest.mark.slow
@interpreted
@pytest.mark.usefixtures("chip")
@pytest.mark.parametrize("chip, fault", [(chip_with(f), f) for f in MUTANTS], indirect=["chip"])
def test_broken_kernels_are_caught(request, monkeypatch, tmp_path, fault):
    error, module, old, new = MUTANTS[fault]
    broken = mutant(tmp_path, module, old, new)
    for name, function in vars(broken).items():
        if name in vars(A) and name.startswith("_attention"):
            monkeypatch.setattr(A, name, function)
    if "32-bit" not in fault:  # whose tensors are too large to be filled
        request.getfixturevalue("poison")
    with pytest.raises(error):
        attempt(request.getfixturevalue("chip"), fault)
