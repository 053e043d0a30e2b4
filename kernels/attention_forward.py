"""Flash attention, forward: the scores of a block of queries never leave the chip.

A program holds BLOCK_M queries of one head and walks over the keys that they see, BLOCK_N at a
time. For each query it keeps the maximum of the scores so far, the sum of their exponentials, and
the output scaled to that maximum (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135).

It walks down from the diagonal, so that only the first blocks need the causal mask and the loop
over all others has none. The loop issues the scores of the *next* block before the softmax of this
one. On Hopper the tensor cores then compute them in the background while the other units take
exponentials; issued in order, each would wait for the other.
"""

from kernels.launch import tl, triton

# lse and delta are padded by this much past the last query, so that the backward reads unmasked.
PADDING = tl.constexpr(128)


@triton.jit
def table_length(queries):
    """Length of a row of lse and delta: a multiple of PADDING, at least queries + PADDING."""
    return (queries // PADDING + 2) * PADDING


@triton.jit
def load_rows(
    table, batch, row, column, batch_stride, stride, rows,
    BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load `[BLOCK, D]` of `[B, rows, columns]`, from (batch, row, column) on.

    With TMA, table is a tensor descriptor, which the tensor memory accelerator reads; otherwise it
    is a pointer. Rows before 0 or from `rows` on are not read and become zeros.
    """
    if TMA:
        tile = table.load([batch, row, column]).reshape(BLOCK, D)
    else:
        r = tl.arange(0, BLOCK)
        table += batch.to(tl.int64) * batch_stride + row.to(tl.int64) * stride + column
        inside = (row + r >= 0) & (row + r < rows)
        pointers = table + r[:, None] * stride + tl.arange(0, D)[None, :]
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    return tile


@triton.jit
def _softmax(acc, row_max, row_sum, scores, scale, dtype: tl.constexpr):
    """Exponentials of a block of scores, and what came before rescaled to the new maximum.

    scale includes log2(e), because exp2 is the instruction that the hardware has.
    """
    scores = scores * scale
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    return p.to(dtype), acc * shrink[:, None], new_max, row_sum


@triton.jit
def _advance(
    q, scores, acc, row_max, row_sum, start, k_table, v_table, batch, column,
    k_batch_stride, k_stride, v_batch_stride, v_stride, keys, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the block of keys at `start`, whose scores are known, and compute the scores below it."""
    below = start - BLOCK_N
    k = load_rows(k_table, batch, below, column, k_batch_stride, k_stride, keys, BLOCK_N, D, TMA)
    next_scores = tl.dot(q, k.T, input_precision="ieee")
    p, acc, row_max, row_sum = _softmax(acc, row_max, row_sum, scores, scale, q.dtype)
    v = load_rows(v_table, batch, start, column, v_batch_stride, v_stride, keys, BLOCK_N, D, TMA)
    acc = tl.dot(p, v, acc, input_precision="ieee")
    return next_scores, acc, row_max, row_sum


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention_forward(
    q_table, k_table, v_table, out, lse, starts,
    q_batch_stride, q_stride, k_batch_stride, k_stride, v_batch_stride, v_stride,
    queries, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(2)
    # The last queries see the most keys, so their programs begin first.
    first_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row = first_m + m
    column = head // (HEADS // KV_HEADS) * D
    # The first key that each query sees (first_key), that any sees (lowest), that all see (common).
    # They are loaded even where all are 0: with a known 0 ptxas makes the loop wait for each wgmma.
    starts += batch.to(tl.int64) * queries
    first_key = tl.load(starts + row, mask=row < queries, other=0)
    lowest = tl.load(starts + first_m)
    common = tl.load(starts + tl.minimum(first_m + BLOCK_M, queries) - 1)

    q = load_rows(
        q_table, batch, first_m, head * D, q_batch_stride, q_stride, queries, BLOCK_M, D, TMA
    )
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may meet masked blocks first
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    highest = first_m + BLOCK_M + keys - queries
    start = highest - BLOCK_N  # first key of the block whose scores are known
    k = load_rows(k_table, batch, start, column, k_batch_stride, k_stride, keys, BLOCK_N, D, TMA)
    scores = tl.dot(q, k.T, input_precision="ieee")
    scores = tl.where(m[:, None] >= (n + BLOCK_M - BLOCK_N)[None, :], scores, float("-inf"))
    scores = tl.where((start + n)[None, :] >= first_key[:, None], scores, float("-inf"))
    for block in tl.static_range(2, BLOCK_M // BLOCK_N + 1):  # the other blocks on the diagonal
        scores, acc, row_max, row_sum = _advance(
            q, scores, acc, row_max, row_sum, start, k_table, v_table, batch, column,
            k_batch_stride, k_stride, v_batch_stride, v_stride, keys, scale, BLOCK_N, D, TMA,
        )  # fmt: skip
        start -= BLOCK_N
        causal = m[:, None] >= (n + BLOCK_M - block * BLOCK_N)[None, :]
        scores = tl.where(causal, scores, float("-inf"))
        scores = tl.where((start + n)[None, :] >= first_key[:, None], scores, float("-inf"))

    unmasked = tl.maximum(start - common, 0) // BLOCK_N * BLOCK_N
    rest = start - unmasked - lowest
    for _ in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        scores, acc, row_max, row_sum = _advance(
            q, scores, acc, row_max, row_sum, start, k_table, v_table, batch, column,
            k_batch_stride, k_stride, v_batch_stride, v_stride, keys, scale, BLOCK_N, D, TMA,
        )  # fmt: skip
        start -= BLOCK_N
    for _ in tl.range(0, rest, BLOCK_N, num_stages=STAGES):
        scores, acc, row_max, row_sum = _advance(
            q, scores, acc, row_max, row_sum, start, k_table, v_table, batch, column,
            k_batch_stride, k_stride, v_batch_stride, v_stride, keys, scale, BLOCK_N, D, TMA,
        )  # fmt: skip
        start -= BLOCK_N
        scores = tl.where((start + n)[None, :] >= first_key[:, None], scores, float("-inf"))

    p, acc, row_max, row_sum = _softmax(acc, row_max, row_sum, scores, scale, q.dtype)
    v = load_rows(v_table, batch, start, column, v_batch_stride, v_stride, keys, BLOCK_N, D, TMA)
    acc = tl.dot(p, v, acc, input_precision="ieee")

    inside = row < queries
    lse += (batch.to(tl.int64) * HEADS + head) * table_length(queries)
    tl.store(lse + row, row_max + tl.log2(row_sum), mask=inside)
    tail = tl.arange(0, 2 * PADDING)  # exp2(score - infinity) is 0
    last = first_m + BLOCK_M >= queries  # a mask: a branch here changes the loop's schedule
    mask = last & (queries + tail < table_length(queries))
    tl.store(lse + queries + tail, tail + float("inf"), mask=mask)
    out += batch.to(tl.int64) * queries * HEADS * D + head * D
    pointers = out + row.to(tl.int64)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(pointers, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
