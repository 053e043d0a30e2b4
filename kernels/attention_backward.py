"""Flash attention, backward: every kernel recomputes the probabilities that it needs.

    p = exp(s - lse), s = scale q k^T        dv = p^T do
    dp = do v^T        ds = p * (dp - delta)        dq = scale ds k        dk = scale ds^T q
    delta = rowsum(o * do), D_i in the paper        (Dao 2023, arXiv:2307.08691, algorithm 2)

There are two ways:

1. Two kernels, the default. `_attention_backward_dq` walks over keys for a block of queries and
   owns their dq. `_attention_backward_dkdv` walks over queries for a block of keys, for all heads
   of the group in turn, and owns their dk and dv. No two programs add to the same place, so
   gradients are the same bit for bit in every run. The price is 7 products.
2. One pass. `_attention_backward_dkdv` also adds its share of dq to memory, in fp32 and atomically:
   5 products. The order of these additions, and so the last bits of dq, change from run to run.

Tensor cores work in the background. So the kernel of dq issues the product for dp before it takes
the exponentials of the scores, and the kernel of dk and dv issues it before the product for dv.
"""

from kernels.attention_forward import PADDING, as_descriptor, load_tile, padded_length
from kernels.launch import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store_delta(
    delta_ptr, out_ptr, d_out, first_m, offsets, inside, queries, BLOCK_M: tl.constexpr
):
    """Compute delta of a block of queries, store it, and return it. It is 0 past the last query."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    out = tl.load(out_ptr + offsets, mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + offs_m, delta, mask=inside)
    tail = tl.arange(0, PADDING)
    last = first_m + BLOCK_M >= queries  # a mask and not a branch, as in the forward
    tl.store(delta_ptr + queries + tail, 0.0, mask=last)
    return delta


@triton.jit
def _dq_block(
    dq, q, d_out, lse, delta, start, first_key, offs_m, k_desc, v_desc, batch, column, shift, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add to dq what the block of keys at `start` contributes."""
    offs_n = start + tl.arange(0, BLOCK_N)
    k = load_tile(k_desc, batch, start, column)
    scores = tl.dot(q, k.T, input_precision="ieee")
    v = load_tile(v_desc, batch, start, column)
    dp = tl.dot(d_out, v.T, input_precision="ieee")
    p = tl.exp2(scores * scale - lse[:, None])
    if CAUSAL:
        p = tl.where((offs_m + shift)[:, None] >= offs_n[None, :], p, 0.0)
    if RAGGED:
        p = tl.where(offs_n[None, :] >= first_key[:, None], p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention_backward_dq(
    q_in, k_in, v_in, d_out_in, out_ptr, lse_ptr, delta_ptr, dq_ptr, first_keys_ptr,
    q_strides, k_strides, v_strides, d_out_strides, queries, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    SQUARE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head; also their delta, for the kernel of dk and dv.

    It walks as the forward does, in the same three parts (see there for lowest and common). Two
    flags are compiled in, so that the usual case pays for neither: SQUARE, there are as many keys
    as queries; RAGGED, first_keys is given, because there are documents or the first block of keys
    is partial.
    """
    head, batch = tl.program_id(0), tl.program_id(2)
    first_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # long programs begin first
    offs_m = first_m + tl.arange(0, BLOCK_M)
    inside = offs_m < queries
    column = head // (HEADS // KV_HEADS) * D
    shift = 0 if SQUARE else keys - queries  # query i sits at key i + shift
    q_desc = as_descriptor(q_in, batch, q_strides, queries, HEADS * D, BLOCK_M, D, TMA)
    k_desc = as_descriptor(k_in, batch, k_strides, keys, KV_HEADS * D, BLOCK_N, D, TMA)
    v_desc = as_descriptor(v_in, batch, v_strides, keys, KV_HEADS * D, BLOCK_N, D, TMA)
    d_out_desc = as_descriptor(d_out_in, batch, d_out_strides, queries, HEADS * D, BLOCK_M, D, TMA)
    first_key = tl.zeros([BLOCK_M], tl.int32)
    lowest, common = 0, 0
    if RAGGED:
        first_keys_ptr += batch.to(tl.int64) * queries
        lowest = tl.load(first_keys_ptr + first_m)
        common = tl.load(first_keys_ptr + tl.minimum(first_m + BLOCK_M, queries) - 1)
        first_key = tl.load(first_keys_ptr + offs_m, mask=inside, other=0)

    q = load_tile(q_desc, batch, first_m, head * D)
    d_out = load_tile(d_out_desc, batch, first_m, head * D)
    offsets = (batch.to(tl.int64) * queries + offs_m) * (HEADS * D) + head * D
    offsets = offsets[:, None] + tl.arange(0, D)[None, :]
    lse_offset = (batch.to(tl.int64) * HEADS + head) * padded_length(queries)
    delta_ptr += lse_offset
    delta = _store_delta(delta_ptr, out_ptr, d_out, first_m, offsets, inside, queries, BLOCK_M)
    lse = tl.load(lse_ptr + lse_offset + offs_m)  # infinite past the last query: p is 0 there

    dq = tl.zeros([BLOCK_M, D], tl.float32)
    start = first_m + BLOCK_M + shift
    for _ in tl.static_range(BLOCK_M // BLOCK_N):
        start -= BLOCK_N
        dq = _dq_block(
            dq, q, d_out, lse, delta, start, first_key, offs_m, k_desc, v_desc, batch, column,
            shift, scale, BLOCK_N, D, True, RAGGED,
        )  # fmt: skip
    unmasked = tl.maximum(start - common, 0) // BLOCK_N * BLOCK_N
    rest = start - unmasked - lowest
    for _ in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        start -= BLOCK_N
        dq = _dq_block(
            dq, q, d_out, lse, delta, start, first_key, offs_m, k_desc, v_desc, batch, column,
            shift, scale, BLOCK_N, D, False, False,
        )  # fmt: skip
    if RAGGED:
        for _ in tl.range(0, rest, BLOCK_N, num_stages=STAGES):
            start -= BLOCK_N
            dq = _dq_block(
                dq, q, d_out, lse, delta, start, first_key, offs_m, k_desc, v_desc, batch,
                column, shift, scale, BLOCK_N, D, False, True,
            )  # fmt: skip
    dq *= scale / LOG2_E
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["queries"])
def _attention_backward_delta(
    out_ptr, d_out_ptr, delta_ptr, d_out_strides, queries,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute delta for the backward in one pass, which has no dq kernel to do it."""
    head, batch = tl.program_id(0), tl.program_id(2)
    first_m = tl.program_id(1) * BLOCK_M
    offs_m, offs_d = first_m + tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = offs_m < queries
    d_out_ptr += batch.to(tl.int64) * d_out_strides[0] + head * D
    d_out_offsets = offs_m.to(tl.int64)[:, None] * d_out_strides[1] + offs_d[None, :]
    d_out = tl.load(d_out_ptr + d_out_offsets, mask=inside[:, None], other=0.0)
    offsets = (batch.to(tl.int64) * queries + offs_m) * (HEADS * D) + head * D
    offsets = offsets[:, None] + offs_d[None, :]
    delta_ptr += (batch.to(tl.int64) * HEADS + head) * padded_length(queries)
    _store_delta(delta_ptr, out_ptr, d_out, first_m, offsets, inside, queries, BLOCK_M)


@triton.jit
def _dkdv_block(
    dk, dv, k, v, first_m, offs_n, q_desc, d_out_desc, dq_desc, lse_ptr, delta_ptr, first_keys_ptr,
    batch, head, queries, shift, scale,
    BLOCK_M: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the queries from first_m on contribute. With ONE_PASS, also add to dq
    what these keys contribute. Scores have keys as rows here."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    q = load_tile(q_desc, batch, first_m, head * D)
    lse = tl.load(lse_ptr + offs_m)  # infinite past the last query: p is 0 there
    p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
    p = tl.where((offs_m + shift)[None, :] >= offs_n[:, None], p, 0.0)
    if RAGGED:
        first_key = tl.load(first_keys_ptr + offs_m, mask=offs_m < queries, other=0)
        p = tl.where(offs_n[:, None] >= first_key[None, :], p, 0.0)
    d_out = load_tile(d_out_desc, batch, first_m, head * D)
    dp = tl.dot(v, d_out.T, input_precision="ieee")
    dv = tl.dot(p.to(q.dtype), d_out, dv, input_precision="ieee")
    ds = (p * (dp - tl.load(delta_ptr + offs_m)[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    if ONE_PASS:
        dq = tl.dot(ds.T, k, input_precision="ieee")
        dq_desc.atomic_add([batch, first_m, head * D], dq.reshape(1, BLOCK_M, D))
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention_backward_dkdv(
    q_in, k_in, v_in, d_out_in, dq_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    first_keys_ptr, ends_ptr, q_strides, k_strides, v_strides, d_out_strides, queries, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    SQUARE: tl.constexpr, RAGGED: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head; in one pass also their share of dq, before scaling.

    ends: int32 `[B, S]`, one past the last query that sees each key.
    """
    kv_head, batch = tl.program_id(0), tl.program_id(2)
    start = tl.program_id(1) * BLOCK_N  # the first keys have the most queries, and begin first
    offs_n = start + tl.arange(0, BLOCK_N)
    column = kv_head * D
    shift = 0 if SQUARE else keys - queries
    q_desc = as_descriptor(q_in, batch, q_strides, queries, HEADS * D, BLOCK_M, D, TMA)
    k_desc = as_descriptor(k_in, batch, k_strides, keys, KV_HEADS * D, BLOCK_N, D, TMA)
    v_desc = as_descriptor(v_in, batch, v_strides, keys, KV_HEADS * D, BLOCK_N, D, TMA)
    d_out_desc = as_descriptor(d_out_in, batch, d_out_strides, queries, HEADS * D, BLOCK_M, D, TMA)
    end = queries  # one past the last query that sees any of these keys
    if RAGGED:
        first_keys_ptr += batch.to(tl.int64) * queries
        ends_ptr += batch.to(tl.int64) * keys
        end = tl.load(ends_ptr + tl.minimum(start + BLOCK_N, keys) - 1)

    k = load_tile(k_desc, batch, start, column)
    v = load_tile(v_desc, batch, start, column)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    first_query = tl.maximum(start - shift, 0)  # the first that sees any of these keys
    for g in range(GROUP):
        head = kv_head * GROUP + g
        lse_offset = (batch.to(tl.int64) * HEADS + head) * padded_length(queries)
        for done in tl.range(0, end - first_query, BLOCK_M, num_stages=STAGES):
            dk, dv = _dkdv_block(
                dk, dv, k, v, first_query + done, offs_n, q_desc, d_out_desc, dq_desc,
                lse_ptr + lse_offset, delta_ptr + lse_offset, first_keys_ptr, batch, head,
                queries, shift, scale, BLOCK_M, D, RAGGED, ONE_PASS,
            )  # fmt: skip
    inside = offs_n < keys
    offsets = (batch.to(tl.int64) * keys + offs_n) * (KV_HEADS * D) + column
    offsets = offsets[:, None] + tl.arange(0, D)[None, :]
    dk *= scale / LOG2_E
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])
