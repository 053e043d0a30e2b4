r"""Flash attention, forward: the scores of a block of queries never leave the chip.

A program holds BLOCK_M queries of one head and walks over the keys that they see, BLOCK_N at a
time, from the diagonal down to the first key of their documents:

    keys       lowest          common                              end
    queries      |               |                                  |
    first_m      +---------------+------------------+---------------+
      :          |               |                  |\  . . . . . . |       . is masked
      :          | . .           |                  |   \  . . . . .|
      :          | . . . .       |                  |      \  . . . |
    + BLOCK_M    | . . . . . .   |                  |         \  . .|
                 +---------------+------------------+---------------+
                  3. where some     2. where all       1. where the
                  query's document  queries see all    diagonal is:
                  has not begun     keys: no mask      causal mask
                                      <-- start

lowest is the first key that any of the queries sees, common the first that all of them see; part 3
begins with the block in which common lies. Without documents both are 0, and part 3 is empty. Each
part is a loop of its own, so that the longest, part 2, has no mask. For each query the program
keeps (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135; on the
right the names in the papers and in Triton's tutorial)

    row_max   the largest score so far, in units of log2            m_i
    row_sum   the sum of exp2(score - row_max)                      l_i
    acc       the sum of exp2(score - row_max) * v                  acc
    scores    q k^T of the current block, before scaling            qk

Each turn of a loop issues the scores of the *next* block before the softmax of this one. On Hopper
the tensor cores then compute them in the background while the other units take exponentials. In the
order of the textbook each would wait for the other.

`*_desc` is a tensor descriptor, `*_ptr` a pointer, and `*_in` what the host passes: one or the
other (`as_descriptor`).
"""

from kernels.launch import tl, triton

# lse and delta are padded by this much past the last query, so that the backward reads unmasked.
PADDING = tl.constexpr(128)


@triton.jit
def padded_length(queries):
    """Length of a row of lse and delta: a multiple of PADDING, at least queries + PADDING."""
    return (queries // PADDING + 2) * PADDING


@triton.jit
def as_descriptor(
    x_in, batch, strides, rows, columns: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The tensor descriptor of x `[B, rows, columns]` for tiles of BLOCK rows and D columns.

    With TMA the host has made it, for the tensor memory accelerator. Without, x_in is a pointer.
    This makes a descriptor of the sequence, whose loads the compiler turns into those of pointers.
    """
    if TMA:
        desc = x_in
    else:
        x_ptr = x_in + batch.to(tl.int64) * strides[0]
        desc = tl.make_tensor_descriptor(x_ptr, [rows, columns], [strides[1], 1], [BLOCK, D])
    return desc


@triton.jit
def load_tile(desc, batch, row, column):
    """The tile that begins at (batch, row, column). Rows that do not exist are zeros."""
    if len(desc.block_shape) == 3:
        tile = desc.load([batch, row, column]).reshape(desc.block_shape[1], desc.block_shape[2])
    else:
        tile = desc.load([row, column])
    return tile


@triton.jit
def softmax_step(acc, row_max, row_sum, scores, scale, dtype: tl.constexpr):
    """Exponentials of a block of scores, and what came before rescaled to the new maximum.

    scale includes log2(e), because exp2 is the instruction that the hardware has.
    """
    scores = scores * scale
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    return p.to(dtype), acc * alpha[:, None], new_max, row_sum


@triton.jit
def _advance(
    q, scores, acc, row_max, row_sum, start, k_desc, v_desc, batch, column, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add the block of keys at `start`, whose scores are known, and compute the scores below it."""
    below = start - BLOCK_N
    k = load_tile(k_desc, batch, below, column)
    next_scores = tl.dot(q, k.T, input_precision="ieee")
    p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale, q.dtype)
    v = load_tile(v_desc, batch, start, column)
    acc = tl.dot(p, v, acc, input_precision="ieee")
    return next_scores, acc, row_max, row_sum


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention_forward(
    q_in, k_in, v_in, out_ptr, lse_ptr, first_keys_ptr, q_strides, k_strides, v_strides,
    queries, keys, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """*_strides: of batch and token. out: `[B, T, H, D]`, contiguous;
    lse: fp32 `[B, H, padded(T)]`, the log2 of the sum of exponentials, infinite past the last
    query; first_keys: int32 `[B, T]`, the first key that each query sees."""
    head, batch = tl.program_id(0), tl.program_id(2)
    # The last queries see the most keys, so their programs begin first.
    first_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_m = first_m + m
    column = head // (HEADS // KV_HEADS) * D
    q_desc = as_descriptor(q_in, batch, q_strides, queries, HEADS * D, BLOCK_M, D, TMA)
    k_desc = as_descriptor(k_in, batch, k_strides, keys, KV_HEADS * D, BLOCK_N, D, TMA)
    v_desc = as_descriptor(v_in, batch, v_strides, keys, KV_HEADS * D, BLOCK_N, D, TMA)
    # The first keys are loaded even where all are 0: if ptxas knew that, it would serialize the
    # tensor-core instructions of the loop.
    first_keys_ptr += batch.to(tl.int64) * queries
    first_key = tl.load(first_keys_ptr + offs_m, mask=offs_m < queries, other=0)
    lowest = tl.load(first_keys_ptr + first_m)
    common = tl.load(first_keys_ptr + tl.minimum(first_m + BLOCK_M, queries) - 1)

    q = load_tile(q_desc, batch, first_m, head * D)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may meet masked blocks first
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    # 1. the diagonal. _advance expects the scores of the block at `start`: compute the first ones.
    end = first_m + BLOCK_M + keys - queries
    start = end - BLOCK_N
    k = load_tile(k_desc, batch, start, column)
    scores = tl.dot(q, k.T, input_precision="ieee")
    causal = m[:, None] >= (n + BLOCK_M - BLOCK_N)[None, :]
    scores = tl.where(causal, scores, float("-inf"))
    scores = tl.where((start + n)[None, :] >= first_key[:, None], scores, float("-inf"))
    for block in tl.static_range(2, BLOCK_M // BLOCK_N + 1):
        scores, acc, row_max, row_sum = _advance(
            q, scores, acc, row_max, row_sum, start, k_desc, v_desc, batch, column, scale,
            BLOCK_N, D,
        )  # fmt: skip
        start -= BLOCK_N
        causal = m[:, None] >= (n + BLOCK_M - block * BLOCK_N)[None, :]
        scores = tl.where(causal, scores, float("-inf"))
        scores = tl.where((start + n)[None, :] >= first_key[:, None], scores, float("-inf"))

    # The keys below `start`: whole blocks of them down to `common`, then the rest.
    unmasked = tl.maximum(start - common, 0) // BLOCK_N * BLOCK_N
    rest = start - unmasked - lowest
    # 2. all queries see all keys
    for _ in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        scores, acc, row_max, row_sum = _advance(
            q, scores, acc, row_max, row_sum, start, k_desc, v_desc, batch, column, scale,
            BLOCK_N, D,
        )  # fmt: skip
        start -= BLOCK_N
    # 3. some query's document has not begun
    for _ in tl.range(0, rest, BLOCK_N, num_stages=STAGES):
        scores, acc, row_max, row_sum = _advance(
            q, scores, acc, row_max, row_sum, start, k_desc, v_desc, batch, column, scale,
            BLOCK_N, D,
        )  # fmt: skip
        start -= BLOCK_N
        scores = tl.where((start + n)[None, :] >= first_key[:, None], scores, float("-inf"))

    p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale, q.dtype)
    v = load_tile(v_desc, batch, start, column)
    acc = tl.dot(p, v, acc, input_precision="ieee")

    inside = offs_m < queries
    lse_ptr += (batch.to(tl.int64) * HEADS + head) * padded_length(queries)
    tl.store(lse_ptr + offs_m, row_max + tl.log2(row_sum), mask=inside)
    tail = tl.arange(0, 2 * PADDING)
    last = first_m + BLOCK_M >= queries  # a mask: a branch here changes the loop's schedule
    mask = last & (queries + tail < padded_length(queries))
    infinity = tl.full([2 * PADDING], float("inf"), tl.float32)  # exp2(score - infinity) is 0
    tl.store(lse_ptr + queries + tail, infinity, mask=mask)
    out_ptr += batch.to(tl.int64) * queries * HEADS * D + head * D
    offsets = offs_m.to(tl.int64)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=inside[:, None])
