"""Decoding: one new query per sequence against all keys of the cache.

The keys of a group are read once for its 4 query heads, and nothing else is reused, so the floor is
memory: 2 * B * S * KV * D elements. One program per key head would leave most of a GPU idle. So the
keys are split among many programs, and a second, tiny kernel joins their partial softmaxes
(Flash-Decoding, Dao et al. 2023). They take blocks of keys in turn, so that all have work however
little of the cache is filled.
"""

from kernels.attention_forward import softmax_step
from kernels.launch import tl, triton


@triton.jit(do_not_specialize=["keys"])
def _attention_decode(
    q_ptr, k_ptr, v_ptr, positions_ptr, partial_ptr, lse_ptr,
    q_strides, k_strides, v_strides, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one group's queries to the blocks split, split + splits, ... of keys.

    *_strides: of batch and token. positions: int64 `[B]`, the last key of each row, or None for
    keys - 1 in all. A split without keys has weight 0. partial: fp32 `[B, H, splits, D]`; lse: fp32
    `[B, H, splits]`, base 2. ROWS: the queries of the group, padded to the 16 rows that a tensor
    core needs.
    """
    kv_head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    member, offs_d, offs_n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + member
    inside = member < GROUP
    q_ptr += batch.to(tl.int64) * q_strides[0]
    q = tl.load(q_ptr + head[:, None] * D + offs_d[None, :], mask=inside[:, None], other=0.0)
    first, step = split * BLOCK_N, splits * BLOCK_N
    k_ptr += batch.to(tl.int64) * k_strides[0] + first.to(tl.int64) * k_strides[1] + kv_head * D
    v_ptr += batch.to(tl.int64) * v_strides[0] + first.to(tl.int64) * v_strides[1] + kv_head * D
    k_offsets = offs_n[:, None] * k_strides[1] + offs_d[None, :]
    v_offsets = offs_n[:, None] * v_strides[1] + offs_d[None, :]
    if positions_ptr is not None:
        keys = (tl.load(positions_ptr + batch) + 1).to(tl.int32)

    acc = tl.zeros([ROWS, D], tl.float32)
    row_max = tl.full([ROWS], -1e30, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, keys, step, num_stages=STAGES):
        seen = start + offs_n < keys
        k = tl.load(k_ptr + k_offsets, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale, q.dtype)
        v = tl.load(v_ptr + v_offsets, mask=seen[:, None], other=0.0)
        acc = tl.dot(p, v, acc, input_precision="ieee")
        k_ptr += step.to(tl.int64) * k_strides[1]
        v_ptr += step.to(tl.int64) * v_strides[1]

    row = (batch.to(tl.int64) * HEADS + head) * splits + split
    tl.store(lse_ptr + row, row_max + tl.log2(row_sum), mask=inside)
    # A split without keys gives 0 with weight 2^-inf; 0 / 0 would make the sum of the splits NaN.
    out = acc / tl.where(row_sum > 0, row_sum, 1)[:, None]
    tl.store(partial_ptr + row[:, None] * D + offs_d[None, :], out, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits"])
def _attention_combine(
    partial_ptr, lse_ptr, out_ptr, splits, D: tl.constexpr, SPLITS: tl.constexpr
):
    """Join the splits of one head of one sequence. SPLITS: splits rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    split, offs_d = tl.arange(0, SPLITS), tl.arange(0, D)
    inside = split < splits
    lse = tl.load(lse_ptr + row * splits + split, mask=inside, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    offsets = (row * splits + split)[:, None] * D + offs_d[None, :]
    partial = tl.load(partial_ptr + offsets, mask=inside[:, None], other=0.0)
    out = tl.sum(partial * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty))
