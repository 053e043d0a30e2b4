"""Causal grouped-query attention.

    o = softmax(q k^T / sqrt(D) + causal mask) v

Several query heads share one key and value head (Ainslie et al. 2023, arXiv:2305.13245): 32 share 8
in Lucie, which makes the cache and its traffic 4 times smaller.

Floor: 2 * B * H * T^2 * D FLOPs in the forward (two products, half of each masked), 2.5 times that
in the backward (five products). Decoding, T = 1: the bytes of the keys and values.

The kernels are in attention_forward.py, attention_backward.py and attention_decode.py. This file
has the definition, the launch table, and the operators that torch sees.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention_backward import (
    _attention_backward_delta,
    _attention_backward_dkdv,
    _attention_backward_dq,
)
from kernels.attention_decode import _attention_combine, _attention_decode
from kernels.attention_forward import PADDING, _attention_forward
from kernels.launch import (
    TensorDescriptor,
    cdiv,
    forced,
    gpu,
    launch_rows,
    next_power_of_2,
    not_offered,
    operator,
    runs_triton,
)

LOG2_E = math.log2(math.e)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Causal attention of T queries over S >= T keys, the last query seeing the last key.

    q: `[B, T, H, D]`; k, v: `[B, S, KV, D]` with H a multiple of KV; S > T when decoding against a
    cache. cu_seqlens: int32 or int64 `[documents + 1]`, the offsets at which documents start in the
    flattened `[B * T]` tokens, from 0 to B * T (then S = T): a query sees only its own document.
    positions: int64 `[B]`, for T = 1 and rows of different lengths: the query of a row sees the
    keys up to and including its position, whatever S is. deterministic: False allows a backward in
    one pass on H100, H200 and B200: 5 products instead of 7, but dq differs in its last bits from
    run to run. Returns `[B, T, H, D]` in the dtype of q.

    The Triton kernels take D of 64 and 128, and one dtype for q, k and v: bf16, fp16, or, only with
    use("triton"), fp32, which is exact and slow. Raises ValueError for shapes that do not fit.
    """
    queries, keys = q.shape[1], k.shape[1]
    if queries > keys:
        raise ValueError(f"attention: {queries} queries over {keys} keys")
    if cu_seqlens is not None and queries != keys:
        raise ValueError("attention: cu_seqlens needs as many keys as queries")
    if positions is not None and (queries != 1 or cu_seqlens is not None):
        raise ValueError("attention: positions are for one query a row")
    fits = k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"attention: shapes of q, k and v do not fit: {shapes}")
    if q.numel() == 0 or not (runs_triton(q) and _offered(q, k, v)):
        return _definition(q, k, v, cu_seqlens, positions)
    if queries == 1 and cu_seqlens is None:
        if not _needs_gradient(q, k, v):
            return _decode_op(q, k, v, positions)
        if positions is not None:
            raise ValueError("attention: decoding by positions has no gradient")
    starts = ends = None
    if cu_seqlens is not None:
        starts, ends = _bounds(cu_seqlens, q.shape[0], queries)
    return _Attention.apply(q, k, v, starts, ends, deterministic)


def _definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if positions is not None:
        mask = (torch.arange(keys, device=q.device) <= positions[:, None])[:, None, None]
    elif cu_seqlens is not None:
        mask = _document_mask(cu_seqlens, q.shape[0], queries)
    elif 1 < queries < keys:  # a chunk of prompt: its last query sees the last key of the cache
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _document_mask(cu_seqlens: Tensor, batch: int, seq_len: int) -> Tensor:
    """Boolean `[B, 1, T, T]`, true where a query sees a key."""
    starts, _ = _bounds(cu_seqlens, batch, seq_len)
    token = torch.arange(seq_len, device=cu_seqlens.device)
    from_start = token >= starts.unsqueeze(2)  # [B, query, key]
    return (from_start & (token <= token.unsqueeze(1))).unsqueeze(1)


def _bounds(cu_seqlens: Tensor, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Where the document of each token starts and ends in its row, int32 `[B, T]` each.

    The end is the position past the last token. A document that crosses the end of a row becomes
    two documents.
    """
    token = torch.arange(batch * seq_len, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True)
    row = token // seq_len * seq_len
    starts = (cu_seqlens[document - 1] - row).clamp(min=0)
    ends = (cu_seqlens[document] - row).clamp(max=seq_len)
    return starts.int().view(batch, seq_len), ends.int().view(batch, seq_len)


def _offered(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.shape[3] not in (64, 128):
        not_offered(f"attention has kernels for head_dim 64 and 128, not {q.shape[3]}")
    elif not q.dtype == k.dtype == v.dtype:
        not_offered(f"attention of {q.dtype}, {k.dtype} and {v.dtype} has no kernel")
    elif q.dtype == torch.float32 and not forced():
        not_offered("attention in fp32 has no fast kernel")
    elif q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        not_offered(f"attention has no kernel for {q.dtype}")
    else:
        return True
    return False


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# --- launches -------------------------------------------------------------------------------------

# (BLOCK_M, BLOCK_N, warps, stages). On sm_80 and sm_90 neither Triton 3.6 nor 3.7 spills registers
# in a loop or serializes wgmma with these (python -m bench.static); sm_100 is not tuned. "small" is
# for documents, whose masks take registers, and for head_dim 64, where large blocks overlap less.
_ANY = {"forward": (32, 64, 4, 2), "dq": (32, 32, 8, 2), "dkdv": (32, 64, 8, 2)}
_HOPPER = {
    "forward": (128, 128, 8, 2),
    "forward small": (128, 64, 8, 2),
    "dq": (128, 128, 8, 2),
    "dq small": (128, 64, 8, 2),
    "dkdv": (64, 128, 8, 2),
    "dkdv small": (32, 128, 8, 2),
    "one pass": (32, 128, 8, 2),
    "one pass small": (32, 128, 8, 2),
}
LAUNCH = {
    "sm_100": {**_HOPPER, "forward": (128, 64, 8, 2), "dkdv": (32, 128, 8, 2)},
    "sm_90": _HOPPER,
    "default": _ANY | {f"{kernel} small": blocks for kernel, blocks in _ANY.items()},
}
FP32 = (32, 32, 4, 1)  # exact products without tensor cores, for checks and not for speed
DELTA_BLOCK = 64  # queries
DECODE_BLOCK = 64  # keys at a time
MAX_SPLITS = 64  # of the keys of one head, which one program joins


def _options(kernel: str, x: Tensor, documents: bool) -> dict:
    """Launch options of a kernel. TMA: it gets tensor descriptors for the tensor memory
    accelerator, not pointers."""
    exact, head_dim = x.dtype == torch.float32, x.shape[3]
    small = documents or head_dim == 64
    row = FP32 if exact else launch_rows(LAUNCH)[kernel + " small" * small]
    block_m, block_n, warps, stages = row
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_stages": stages}
    options |= {"num_warps": warps, "enable_fp_fusion": True, "D": head_dim}
    return options | {"TMA": gpu().tma}


def _rows(x: Tensor) -> Tensor:
    """x `[B, T, H, D]` with the heads of a token contiguous, as the kernels need it."""
    of_batch, of_token, of_head, of_element = x.stride()
    together = of_element == 1 and (of_head == x.shape[3] or x.shape[2] == 1)
    # The tensor memory accelerator needs multiples of 16 bytes, and takes no expanded tensor.
    aligned = (of_batch | of_token) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if together and aligned and of_batch and of_token:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() may not copy


def _kernel_input(x: Tensor, block: int, tma: bool) -> "Tensor | TensorDescriptor":
    """x, or with tma the tensor descriptor of x as `[B, T, H * D]`."""
    if not tma:
        return x
    batch, length, heads, head_dim = x.shape
    strides = [x.stride(0), x.stride(1), 1]
    return TensorDescriptor(x, [batch, length, heads * head_dim], strides, [1, block, head_dim])


def _strides(*tensors: Tensor) -> list[tuple[int, int]]:
    return [(x.stride(0), x.stride(1)) for x in tensors]


def _ragged_bounds(
    q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The bounds of documents. Without documents None, unless the first block of keys would be
    partial: then the bounds of one document, so that the kernel masks it."""
    if starts is None and (k.shape[1] - q.shape[1]) % PADDING.value:
        starts = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
        ends = torch.full(k.shape[:2], q.shape[1], dtype=torch.int32, device=q.device)
    return starts, ends


def _outputs(q: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    length = (q.shape[1] // PADDING.value + 2) * PADDING.value  # as `padded_length` has it
    lse = q.new_empty(q.shape[0], q.shape[2], length, dtype=torch.float32)
    return q.new_empty(q.shape), lse


@operator("attention", fake=_outputs)
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, D]`, lse fp32 `[B, H, T + padding]`, base 2, infinite in the padding)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    out, lse = _outputs(q)
    options = _options("forward", q, starts is not None)
    if starts is None:
        starts = torch.zeros(batch, queries, dtype=torch.int32, device=q.device)
    m, n, tma = options["BLOCK_M"], options["BLOCK_N"], options["TMA"]
    _attention_forward[(heads, cdiv(queries, m), batch)](
        _kernel_input(q, m, tma), _kernel_input(k, n, tma), _kernel_input(v, n, tma),
        out, lse, starts, *_strides(q, k, v), queries, keys, LOG2_E / math.sqrt(head_dim),
        HEADS=heads, KV_HEADS=kv_heads, **options,
    )  # fmt: skip
    return out, lse


def _gradients(d_out: Tensor, *qkv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in qkv[:3])


@operator("attention_backward", fake=_gradients)
def _backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, ends: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, with the shapes of q, k and v."""
    d_out, q, k, v = _rows(d_out), _rows(q), _rows(k), _rows(v)
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    dq, dk, dv = _gradients(d_out, q, k, v)
    delta = torch.empty_like(lse)
    starts, ends = _ragged_bounds(q, k, starts, ends)
    ragged = starts is not None
    arguments = (*_strides(q, k, v, d_out), queries, keys, LOG2_E / math.sqrt(head_dim))
    shape = {"HEADS": heads, "KV_HEADS": kv_heads, "SQUARE": queries == keys, "RAGGED": ragged}

    def inputs(options: dict) -> list:
        m, n, tma = options["BLOCK_M"], options["BLOCK_N"], options["TMA"]
        return [_kernel_input(x, block, tma) for x, block in ((q, m), (k, n), (v, n), (d_out, m))]

    options = _options("dq", q, ragged)
    one_pass = not deterministic and q.dtype != torch.float32 and "one pass" in launch_rows(LAUNCH)
    sum_desc = None  # of dq in fp32
    if one_pass:
        options = _options("one pass", q, ragged)
        dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        sum_desc = _kernel_input(dq_sum, options["BLOCK_M"], tma=True)
        _attention_backward_delta[(heads, cdiv(queries, DELTA_BLOCK), batch)](
            out, d_out, delta, *_strides(d_out), queries, HEADS=heads, D=head_dim,
            BLOCK_M=DELTA_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _attention_backward_dq[(heads, cdiv(queries, options["BLOCK_M"]), batch)](
            *inputs(options), out, lse, delta, dq, starts, *arguments, **shape, **options
        )
        options = _options("dkdv", q, ragged)
    _attention_backward_dkdv[(kv_heads, cdiv(keys, options["BLOCK_N"]), batch)](
        *inputs(options), sum_desc, lse, delta, dk, dv, starts, ends, *arguments,
        ONE_PASS=one_pass, **shape, **options,
    )  # fmt: skip
    if one_pass:
        torch.mul(dq_sum, 1 / math.sqrt(head_dim), out=dq)
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None,
        deterministic: bool,
    ):  # fmt: skip
        out, lse = _forward_op(q, k, v, starts, ends)
        ctx.save_for_backward(q, k, v, out, lse, starts, ends)
        ctx.deterministic = deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        gradients = _backward_op(d_out, *ctx.saved_tensors, ctx.deterministic)
        return *gradients, None, None, None


@operator("attention_decode", fake=lambda q, *_: q.new_empty(q.shape))
def _decode_op(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
    """out `[B, 1, H, D]`. The grid does not depend on the positions: a CUDA graph may replay it."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    positions = None if positions is None else positions.contiguous()
    batch, _, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # Two programs per multiprocessor, each with two blocks of keys or more.
    wanted = max(1, min(2 * gpu().multiprocessors // (batch * kv_heads), MAX_SPLITS))
    splits = min(wanted, cdiv(cdiv(keys, DECODE_BLOCK), 2))
    partial = q.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
    lse = q.new_empty(batch, heads, splits, dtype=torch.float32)
    out = q.new_empty(q.shape)
    _attention_decode[(kv_heads, splits, batch)](
        q, k, v, positions, partial, lse, *_strides(q, k, v), keys,
        LOG2_E / math.sqrt(head_dim), HEADS=heads, KV_HEADS=kv_heads, D=head_dim,
        ROWS=max(16, next_power_of_2(heads // kv_heads)), BLOCK_N=DECODE_BLOCK, STAGES=3,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    _attention_combine[(batch * heads,)](
        partial, lse, out, splits, D=head_dim, SPLITS=next_power_of_2(splits),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
