"""Causal grouped-query attention.

    o = softmax(q k^T / sqrt(D) + causal mask) v

Several query heads share one key and value head (Ainslie et al. 2023, arXiv:2305.13245): 32 share 8
in Lucie, which makes the cache and its traffic 4 times smaller.

Floor: 2 * B * H * T^2 * D FLOPs forward (two products, half of each masked away), 2.5 times that
backward (five products).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal attention of T queries over S >= T keys, the last query seeing the last key.

    q: `[B, T, H, D]`; k, v: `[B, S, KV, D]` with H a multiple of KV; S > T when decoding against a
    cache. cu_seqlens: int32 or int64 `[documents + 1]`, the offsets at which documents start in the
    flattened `[B * T]` tokens, 0 first and B * T last (S = T then): a query sees its own document
    only. Returns `[B, T, H, D]` in the dtype of q.
    """
    queries, keys = q.shape[1], k.shape[1]
    if queries > keys:
        raise ValueError(f"attention: {queries} queries over {keys} keys")
    mask = None
    if cu_seqlens is not None:
        if queries != keys:
            raise ValueError("attention: cu_seqlens needs as many keys as queries")
        mask = _document_mask(cu_seqlens, q.shape[0], queries)
    elif 1 < queries < keys:  # a chunk of prompt against the cache: the diagonal ends at the corner
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
    """Boolean `[B, 1, T, T]`, true where a query may see a key."""
    token = torch.arange(batch * seq_len, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True).view(batch, 1, seq_len)
    same = document.transpose(1, 2) == document
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=same.device).tril()
    return (same & causal).unsqueeze(1)
