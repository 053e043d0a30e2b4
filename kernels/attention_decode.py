"""Decoding: one new query per sequence against all keys of the cache.

The keys of a group are read once for its 4 query heads, and nothing else is reused, so the floor is
memory: 2 * B * S * KV * D elements. One program per key head would leave most of a GPU idle. So the
keys are split among many programs, and a second, tiny kernel joins their partial softmaxes
(Flash-Decoding, Dao et al. 2023).
"""

from kernels.launch import tl, triton


@triton.jit(do_not_specialize=["keys", "per_split"])
def _attention_decode(
    q, k_table, v_table, positions, partial, lse_table,
    q_batch_stride, k_batch_stride, k_stride, v_batch_stride, v_stride, keys, per_split, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one group's queries to per_split keys, from split * per_split on.

    positions: int64 `[B]`, the last key of each row, or None for keys - 1 in all. A split past it
    has weight 0. partial: fp32 `[B, H, splits, D]`; lse_table: fp32 `[B, H, splits]`, base 2.
    ROWS: the queries of the group, padded to the 16 rows that a tensor core needs.
    """
    kv_head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    member, d, n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + member
    inside = member < GROUP
    q += batch.to(tl.int64) * q_batch_stride
    query = tl.load(q + head[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    k_table += batch.to(tl.int64) * k_batch_stride + kv_head * D
    v_table += batch.to(tl.int64) * v_batch_stride + kv_head * D
    first = split * per_split
    k_table += first.to(tl.int64) * k_stride
    v_table += first.to(tl.int64) * v_stride
    if positions is not None:
        keys = (tl.load(positions + batch) + 1).to(tl.int32)
    count = tl.minimum(per_split, keys - first)

    acc = tl.zeros([ROWS, D], tl.float32)
    row_max = tl.full([ROWS], -1e30, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        seen = start + n < count
        at = n[:, None] * k_stride + d[None, :]
        k = tl.load(k_table + at, mask=seen[:, None], other=0.0)
        scores = tl.dot(query, k.T, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = tl.load(v_table + n[:, None] * v_stride + d[None, :], mask=seen[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
        # Pointers advance by one block: start * stride would overflow 32 bits in a long cache.
        k_table += BLOCK_N * k_stride
        v_table += BLOCK_N * v_stride

    at = (batch.to(tl.int64) * HEADS + head) * tl.num_programs(1) + split
    tl.store(lse_table + at, row_max + tl.log2(row_sum), mask=inside)
    # A split without keys gives 0 with weight 2^-inf; 0 / 0 would make the sum of the splits NaN.
    o = acc / tl.where(row_sum > 0, row_sum, 1)[:, None]
    tl.store(partial + at[:, None] * D + d[None, :], o, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits"])
def _attention_combine(partial, lse_table, out, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    """Join the splits of one head of one sequence. SPLITS: splits rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, D)
    inside = split < splits
    lse = tl.load(lse_table + row * splits + split, mask=inside, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    at = (row * splits + split)[:, None] * D + d[None, :]
    rows = tl.load(partial + at, mask=inside[:, None], other=0.0)
    o = tl.sum(rows * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + d, o.to(out.dtype.element_ty))
