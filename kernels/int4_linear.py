"""A linear layer whose weight is stored in 4 bits, for decoding: y = x W^T, W = scale * q.

q is an integer from -8 to 7, and 128 neighbours in a row form a group with one scale, that of least
squared error. A weight takes 4.125 bits instead of 16. Decoding reads every weight once per token,
so it is that much faster where memory is the limit. Activations keep their dtype.

Floor: memory, the bytes of packed and scales, K / 2 + 2 K / G for each of the N rows. A
multiprocessor reads some 30 weights per cycle, which leaves about 4 instructions for each pair of
weights: therefore tensor cores even for one row of x, and the assembly of `_quarter`.

Integers are preferred to the quantiles of a normal distribution (NF4, Dettmers et al. 2023,
arXiv:2305.14314): in groups of 128, NF4 is 1 % closer to normal weights (an error of 9.6 % instead
of 9.7), but would look every weight up, which now costs half a shift, half an `and` and half an
`fma`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import as_rows, cdiv, gpu, launch_rows, operator, runs_triton, tl, triton

GROUP = 128
MOST_ROWS = 16  # of x that the kernel takes; with more, products are the limit and not bytes


# --- the format -----------------------------------------------------------------------------------


def pack(weight: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantise `[N, K]` row by row into packed uint8 `[N, K / 2]` and scales bf16 `[N, K / G]`.

    As little-endian 16-bit words, a group is G / 4 words: bits 4 t to 4 t + 3 of word j hold q + 8
    of element t * G / 4 + j, so that each quarter of a group lies in order in memory. A scale has 5
    significant bits. Its product with q is therefore exact in bf16, and a long prompt, which
    unpacks, sees the same weights as decoding. group_size G is a multiple of 4 that divides K.
    Raises ValueError for another group size, or for a weight that is not finite.
    """
    if group_size % 4 or weight.shape[1] % group_size or not weight.shape[1]:
        raise ValueError(
            f"4-bit groups of {group_size} do not divide rows of {weight.shape[1]} columns"
        )
    rows, groups = weight.shape[0], weight.shape[1] // group_size
    packed = torch.empty(rows, weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, groups, dtype=torch.bfloat16, device=weight.device)
    # A few rows at a time stay in the cache of a CPU and need little memory on a GPU.
    step = max(1, (2**18 if weight.device.type == "cpu" else 2**24) // weight.shape[1])
    for i in range(0, rows, step):
        groups_of_rows = weight[i : i + step].detach().float().unflatten(1, (groups, group_size))
        scale = _best_scale(groups_of_rows)
        scales[i : i + step] = scale
        q = (groups_of_rows / scale.float().unsqueeze(-1)).round_().clamp_(-8, 7)
        quarters = (q + 8).to(torch.int32).unflatten(2, (4, group_size // 4))
        shift = torch.arange(0, 16, 4, dtype=torch.int32, device=weight.device)
        words = (quarters << shift.view(4, 1)).sum(2, dtype=torch.int32)  # as unsigned 16 bits
        packed[i : i + step] = words.to(torch.int16).flatten(1).view(torch.uint8)
    return packed, scales


def _best_scale(x: Tensor) -> Tensor:
    """The scale of least squared error for each group `[..., G]`, bf16 `[...]`.

    Candidates have 5 significant bits and map the element of largest magnitude to -8, or beyond,
    where it is clipped, which pays for a few outliers. The sign makes it -8 instead of 8.
    """
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    if not extreme.isfinite().all():
        raise ValueError("a weight that is not finite cannot be quantised")
    sign = torch.where(extreme > 0, -1.0, 1.0)
    unit = extreme.abs().clamp_(min=torch.finfo(torch.float32).tiny)  # so that no square overflows
    # A bf16 has 8 significant bits. Without the last three, neighbouring values differ by one.
    top = (extreme.abs() / 8).bfloat16().view(torch.int16) >> 3
    best_error = torch.full_like(extreme, torch.inf)
    best = torch.ones_like(extreme)
    r, q = torch.empty_like(x), torch.empty_like(x)
    for step in range(1, -7, -1):
        scale = ((top + step).clamp_(min=16) << 3).view(torch.bfloat16).float() * sign
        torch.mul(x, 1 / scale, out=r)
        torch.round(r, out=q).clamp_(-8, 7)
        error = torch.linalg.vector_norm(r.sub_(q), dim=-1, keepdim=True) * (scale / unit).abs()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best.squeeze(-1).bfloat16()


def unpack(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` that packed and scales represent, exact in bf16 and wider dtypes."""
    groups = scales.shape[1]
    words = _words(packed).unflatten(1, (groups, -1))
    weight = torch.empty(*words.shape[:2], 4, words.shape[2], dtype=dtype, device=packed.device)
    for t in range(4):
        weight[:, :, t] = (words >> 4 * t) & 15
    return weight.sub_(8).mul_(scales.to(dtype)[:, :, None, None]).flatten(1)


def _words(packed: Tensor) -> Tensor:
    """packed as 16-bit words `[N, K / 4]`, copied only if it is not aligned to them."""
    packed = as_rows(packed)
    if packed.storage_offset() % 2 or packed.stride(0) % 2:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.int16)


def _definition(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Torch's product with the whole unpacked weight. In Lucie-7B and bf16 the largest weight of a
    block takes 201 MB, the head 533 MB."""
    if x.device.type == "cpu":
        return _on_cpu(x, packed, scales)
    return F.linear(x, unpack(packed, scales, x.dtype))


def _on_cpu(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """The same in fp32, for some rows of the weight at a time, which stay in the cache. To keep
    loops long, the columns of x are put in the order of the nibbles, not the reverse."""
    groups, columns = scales.shape[1], packed.shape[1]
    # [rows of x, group, second byte of a word, high nibble, j] -> nibble, then bytes in their order
    x5 = x.reshape(-1, x.shape[-1]).float().unflatten(1, (groups, 2, 2, -1))
    ordered = x5.permute(0, 3, 1, 4, 2).flatten(1)
    step = max(1, 2**17 // columns)
    weight = torch.empty(min(step, len(packed)), 2, columns, device=x.device)
    y = torch.empty(len(ordered), len(packed), device=x.device)
    for i in range(0, len(packed), step):
        some, w = packed[i : i + step], weight[: len(packed) - i]
        w[:, 0] = (some & 15).view(torch.int8) - 8
        w[:, 1] = (some >> 4).view(torch.int8) - 8
        w *= scales[i : i + step].float().repeat_interleave(columns // groups, dim=1).unsqueeze(1)
        torch.mm(ordered, w.flatten(1).T, out=y[:, i : i + step])
    return y.to(x.dtype).view(*x.shape[:-1], len(packed))


# --- the kernel -----------------------------------------------------------------------------------

# From bits 4 t to 4 t + 3 of two words at once to two bf16. 0 to 15 in the lowest bits of a bf16
# are that many times 2^-133; times 2^127, minus 1/8, this is q / 64, in one exact instruction.
_QUARTERS = tl.constexpr(
    [
        "{ .reg .b32 q, scale, offset; mov.b32 scale, 0x7F007F00; mov.b32 offset, 0xBE00BE00; "
        f"shr.u32 q, $1, {4 * t}; and.b32 q, q, 0x000F000F; "
        "fma.rn.bf16x2 $0, q, scale, offset; }"
        for t in range(4)
    ]
)


@triton.jit
def _quarter(words, t: tl.constexpr, PAIRS: tl.constexpr, dtype: tl.constexpr):
    """q / 64 of the elements in bits 4 t to 4 t + 3. PAIRS: two per instruction, as above."""
    if PAIRS:
        return tl.inline_asm_elementwise(
            _QUARTERS.value[t], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:  # the same in Triton, one per instruction
        return ((((words >> 4 * t) & 15) - 8).to(tl.float32) * 0.015625).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _int4_linear(
    x_ptr, words_ptr, scales_ptr, y_ptr, stride, scales_stride, rows, N, K,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    PAIRS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_N columns of y. SPLITS warps take the groups of a row in turn, which
    is a batch of products to Triton, and are added at the end: one launch, in a fixed order."""
    QUARTER: tl.constexpr = G // 4
    split, j, m = tl.arange(0, SPLITS), tl.arange(0, QUARTER), tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the last row the last one is read again: only what is stored is masked.
    row = tl.minimum(n, N - 1).to(tl.int64)
    words_ptr += row[None, :, None] * stride + j[None, None, :]
    scales_ptr += row[None, :] * scales_stride
    x_ptr += m[None, None, :] * K + j[None, :, None]
    present = (m < rows)[None, None, :]

    groups = K // G
    acc = tl.zeros([SPLITS, BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, groups, SPLITS, num_stages=STAGES):
        inside = first + split < groups
        group = tl.minimum(first + split, groups - 1)
        words = tl.load(words_ptr + group[:, None, None] * QUARTER)
        scale = tl.load(scales_ptr + group[:, None], mask=inside[:, None], other=0.0)
        product = tl.zeros([SPLITS, BLOCK_N, ROWS], tl.float32)
        for t in tl.static_range(4):
            x = tl.load(x_ptr + group[:, None, None] * G + t * QUARTER, mask=present, other=0.0)
            product = tl.dot(_quarter(words, t, PAIRS, x.dtype), x, product)
        acc += product * scale.to(tl.float32)[:, :, None]
    y = tl.sum(acc, 0) * 64
    y_ptr += m[None, :] * N + n[:, None]
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


# Rows of the weight that a program takes, warps that share its groups, stages. They serve every
# class of GPU, because memory is the limit and each holds two blocks or more on a multiprocessor.
# Wide blocks are for matrices that fill the GPU twice over: gate|up and the head.
LAUNCH = {"default": {"wide": (32, 4, 4), "narrow": (16, 8, 4)}}


def _options(rows: int, columns: int) -> dict[str, int]:
    """Launch options for rows of x and columns of y."""
    block, splits, stages = launch_rows(LAUNCH)["wide"]
    if cdiv(columns, block) < 4 * gpu().multiprocessors:
        block, splits, stages = launch_rows(LAUNCH)["narrow"]
    many = rows > 8
    options = {"ROWS": 16 if many else 8, "STAGES": stages - many, "num_stages": stages - many}
    return options | {"BLOCK_N": block, "SPLITS": splits, "num_warps": splits}


def _output(x: Tensor, packed: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@operator("int4_linear", fake=_output)
def _int4_linear_op(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    y = _output(x, packed)
    rows, group_size = y.numel() // y.shape[-1], _group_size(x, scales)
    if not 0 < rows <= MOST_ROWS or x.dtype == torch.float32 or group_size not in (64, 128, 256):
        return _definition(x, packed, scales)
    x = x.reshape(rows, -1).contiguous()
    words, scales = _words(packed), as_rows(scales)
    options = _options(rows, y.shape[-1])
    _int4_linear[(cdiv(y.shape[-1], options["BLOCK_N"]),)](
        x, words, scales, y, words.stride(0), scales.stride(0), rows, y.shape[-1], x.shape[1],
        G=group_size, PAIRS=x.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret,
        enable_fp_fusion=True, **options,
    )  # fmt: skip
    return y


def _group_size(x: Tensor, scales: Tensor) -> int:
    return x.shape[-1] // scales.shape[1]


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """`x @ unpack(packed, scales).T`. For 1 to 16 rows of x the weight is never written to memory.

    x: `[..., K]` bf16, fp16 or fp32; packed uint8 `[N, K / 2]` and scales bf16 `[N, K / G]` as
    `pack` returns them. Returns `[..., N]` in the dtype of x. The Triton kernel takes up to 16 rows
    in bf16 and fp16, and G of 64, 128 or 256; anything else unpacks and uses torch's product.
    Raises ValueError for shapes that do not fit, and RuntimeError if x requires a gradient.
    """
    fits = packed.shape == (scales.shape[0], x.shape[-1] // 2) and scales.shape[1]
    if not fits or x.shape[-1] % (4 * scales.shape[1]):
        shapes = [tuple(t.shape) for t in (x, packed, scales)]
        raise ValueError(f"shapes of x, packed and scales do not fit: {shapes}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("int4_linear has no gradient: call it under torch.no_grad()")
    if runs_triton(x):
        return _int4_linear_op(x, packed, scales)
    return _definition(x, packed, scales)
