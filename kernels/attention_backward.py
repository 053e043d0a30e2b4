"""Flash attention, backward: two kernels, each recomputing the probabilities it needs.

    p = exp(s - lse), s = scale q k^T        dv = p^T do
    dp = do v^T        ds = p * (dp - delta)        dq = scale ds k        dk = scale ds^T q
    delta = rowsum(o * do)                          (Dao 2023, arXiv:2307.08691, algorithm 2)

One kernel walks over keys for a block of queries and owns their dq. The other walks over queries
for a block of keys, all heads of the group in turn, and owns their dk and dv. No two programs add
to the same place, so without atomics gradients are the same bit for bit in every run. The price is
7 products; one pass in which many programs add to dq has 5.
"""

from kernels.attention_forward import PADDING, load_rows, table_length
from kernels.launch import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dq_block(
    dq, q, d_out, lse, delta, start, first_key, row, k_table, v_table, batch, column,
    k_batch_stride, k_stride, v_batch_stride, v_stride, offset, keys, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to dq what the block of keys at `start` contributes."""
    key = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_table, batch, start, column, k_batch_stride, k_stride, keys, BLOCK_N, D, TMA)
    scores = tl.dot(q, k.T, input_precision="ieee")
    v = load_rows(v_table, batch, start, column, v_batch_stride, v_stride, keys, BLOCK_N, D, TMA)
    dp = tl.dot(d_out, v.T, input_precision="ieee")  # issued early, to run while p is computed
    p = tl.exp2(scores * scale - lse[:, None])
    if CAUSAL:
        p = tl.where((row + offset)[:, None] >= key[None, :], p, 0.0)
    if RAGGED:
        p = tl.where(key[None, :] >= first_key[:, None], p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention_backward_dq(
    q_table, k_table, v_table, d_out_table, out, lse_table, delta_table, dq_table, starts,
    q_batch_stride, q_stride, k_batch_stride, k_stride, v_batch_stride, v_stride,
    d_out_batch_stride, d_out_stride, queries, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    SQUARE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(2)
    first_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # long programs begin first
    row = first_m + tl.arange(0, BLOCK_M)
    inside = row < queries
    column = head // (HEADS // KV_HEADS) * D
    offset = 0 if SQUARE else keys - queries
    first_key = row * 0
    lowest, common = 0, 0
    if RAGGED:
        starts += batch.to(tl.int64) * queries
        lowest = tl.load(starts + first_m)
        common = tl.load(starts + tl.minimum(first_m + BLOCK_M, queries) - 1)
        first_key = tl.load(starts + row, mask=inside, other=0)

    q = load_rows(
        q_table, batch, first_m, head * D, q_batch_stride, q_stride, queries, BLOCK_M, D, TMA
    )
    d_out = load_rows(
        d_out_table, batch, first_m, head * D, d_out_batch_stride, d_out_stride, queries,
        BLOCK_M, D, TMA,
    )  # fmt: skip
    # delta is computed here for this kernel and for the next one.
    position = (batch.to(tl.int64) * queries + row) * (HEADS * D) + head * D
    position = position[:, None] + tl.arange(0, D)[None, :]
    o = tl.load(out + position, mask=inside[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * d_out.to(tl.float32), 1)
    table_row = (batch.to(tl.int64) * HEADS + head) * table_length(queries)
    lse_table += table_row
    delta_table += table_row
    tl.store(delta_table + row, delta, mask=inside)
    tail = tl.arange(0, PADDING)
    last = first_m + BLOCK_M >= queries
    tl.store(delta_table + queries + tail, tail * 0.0, mask=last & (tail >= 0))
    lse = tl.load(lse_table + row)  # infinite past the last query: p is 0 there

    dq = tl.zeros([BLOCK_M, D], tl.float32)
    start = first_m + BLOCK_M + offset
    for _ in tl.static_range(BLOCK_M // BLOCK_N):  # the blocks of keys on the diagonal
        start -= BLOCK_N
        dq = _dq_block(
            dq, q, d_out, lse, delta, start, first_key, row, k_table, v_table, batch, column,
            k_batch_stride, k_stride, v_batch_stride, v_stride, offset, keys, scale,
            BLOCK_N, D, True, RAGGED, TMA,
        )  # fmt: skip
    unmasked = tl.maximum(start - common, 0) // BLOCK_N * BLOCK_N
    rest = start - unmasked - lowest
    for _ in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        start -= BLOCK_N
        dq = _dq_block(
            dq, q, d_out, lse, delta, start, first_key, row, k_table, v_table, batch, column,
            k_batch_stride, k_stride, v_batch_stride, v_stride, offset, keys, scale,
            BLOCK_N, D, False, False, TMA,
        )  # fmt: skip
    if RAGGED:
        for _ in tl.range(0, rest, BLOCK_N, num_stages=STAGES):
            start -= BLOCK_N
            dq = _dq_block(
                dq, q, d_out, lse, delta, start, first_key, row, k_table, v_table, batch, column,
                k_batch_stride, k_stride, v_batch_stride, v_stride, offset, keys, scale,
                BLOCK_N, D, False, True, TMA,
            )  # fmt: skip
    dq *= scale / LOG2_E
    tl.store(dq_table + position, dq.to(dq_table.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dkdv_block(
    dk, dv, k, v, first, key, q_table, d_out_table, lse_table, delta_table, starts, batch, head,
    q_batch_stride, q_stride, d_out_batch_stride, d_out_stride, queries, offset, scale,
    BLOCK_M: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the queries at `first` contribute. Scores have keys as rows here."""
    row = first + tl.arange(0, BLOCK_M)
    q = load_rows(
        q_table, batch, first, head * D, q_batch_stride, q_stride, queries, BLOCK_M, D, TMA
    )
    lse = tl.load(lse_table + row)  # infinite past the last query: p is 0 there
    p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
    p = tl.where((row + offset)[None, :] >= key[:, None], p, 0.0)
    if RAGGED:
        first_key = tl.load(starts + row, mask=row < queries, other=0)
        p = tl.where(key[:, None] >= first_key[None, :], p, 0.0)
    d_out = load_rows(
        d_out_table, batch, first, head * D, d_out_batch_stride, d_out_stride, queries,
        BLOCK_M, D, TMA,
    )  # fmt: skip
    dp = tl.dot(v, d_out.T, input_precision="ieee")  # issued before dv, to run while p is computed
    dv = tl.dot(p.to(q.dtype), d_out, dv, input_precision="ieee")
    ds = p * (dp - tl.load(delta_table + row)[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention_backward_dkdv(
    q_table, k_table, v_table, d_out_table, lse_table, delta_table, dk_table, dv_table,
    starts, ends,
    q_batch_stride, q_stride, k_batch_stride, k_stride, v_batch_stride, v_stride,
    d_out_batch_stride, d_out_stride, queries, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    SQUARE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    kv_head, batch = tl.program_id(0), tl.program_id(2)
    start = tl.program_id(1) * BLOCK_N  # the first keys have the most queries, and begin first
    key = start + tl.arange(0, BLOCK_N)
    column = kv_head * D
    offset = 0 if SQUARE else keys - queries
    end = queries  # past the last query that sees any of these keys
    if RAGGED:
        starts += batch.to(tl.int64) * queries
        ends += batch.to(tl.int64) * keys
        end = tl.load(ends + tl.minimum(start + BLOCK_N, keys) - 1)

    k = load_rows(k_table, batch, start, column, k_batch_stride, k_stride, keys, BLOCK_N, D, TMA)
    v = load_rows(v_table, batch, start, column, v_batch_stride, v_stride, keys, BLOCK_N, D, TMA)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    diagonal = tl.maximum(start - offset, 0)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        table_row = (batch.to(tl.int64) * HEADS + head) * table_length(queries)
        for done in tl.range(0, end - diagonal, BLOCK_M, num_stages=STAGES):
            dk, dv = _dkdv_block(
                dk, dv, k, v, diagonal + done, key, q_table, d_out_table,
                lse_table + table_row, delta_table + table_row, starts, batch, head,
                q_batch_stride, q_stride, d_out_batch_stride, d_out_stride, queries, offset, scale,
                BLOCK_M, D, RAGGED, TMA,
            )  # fmt: skip
    inside = key < keys
    position = (batch.to(tl.int64) * keys + key) * (KV_HEADS * D) + column
    position = position[:, None] + tl.arange(0, D)[None, :]
    dk *= scale / LOG2_E
    tl.store(dk_table + position, dk.to(dk_table.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_table + position, dv.to(dv_table.dtype.element_ty), mask=inside[:, None])
