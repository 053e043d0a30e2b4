"""Lucie-7B in one file: a Llama 3.1 decoder.

What is special in it:
- RMSNorm before each sublayer, no biases anywhere, no dropout
- rotary positions on queries and keys; theta grows from 500,000 to 20,000,000 for 32k tokens
- grouped-query attention: 32 query heads share 8 key and value heads
- a SiLU-gated feed-forward three times as wide as the model
- the output head is not tied to the input embedding
- q|k|v and gate|up are one matrix each: fewer, larger products

Everything that is not a matrix product is a function of `kernels/`. Nothing here knows about ranks,
files or optimizers; train.py, generate.py and eval/ use it, checkpoint.py fills it.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import add_rms_norm, attention, linear_cross_entropy, rms_norm, rope, swiglu
from kernels.rope import rope_tables


@dataclass(frozen=True)
class LucieConfig:
    """The architecture, named as in Hugging Face's config.json; the defaults are Lucie-7B."""

    vocab_size: int = 65024
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_position_embeddings: int = 4096
    initializer_range: float = 0.009

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"hidden_size / num_attention_heads = {self.head_dim} must be even")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class KVCache:
    """Keys and values of the tokens so far; memory for `max_length` of them is allocated at once.

    k, v: `[layers, B, max_length, KV, D]`; `length`: the number of tokens, advanced by the model.
    Prompts of different lengths are padded at their ends. `decode_from` then says where each row
    ends, and from there the model takes one token a row; it overwrites the padding before any
    query sees it. `positions`: int64 `[B]`, the positions of those next tokens, always at the same
    address, which a CUDA graph keeps.
    """

    def __init__(
        self,
        config: LucieConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, max_length)
        shape += (config.num_key_value_heads, config.head_dim)
        # Zeros, because a masked key has weight 0, and 0 times NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self._rows = torch.arange(batch_size, device=device)
        self._positions = torch.zeros_like(self._rows)
        self.clear()

    def clear(self) -> None:
        """Make room for other prompts. Old keys stay, finite, and no query sees them."""
        self.length = 0
        self.positions: Tensor | None = None

    def decode_from(self, lengths: list[int]) -> None:
        """Set the number of tokens of each row; from here on each row grows at its own end."""
        self.positions = self._positions.copy_(torch.tensor(lengths))
        self.length = max(lengths)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new `[B, T, KV, D]`; return all keys and values so far."""
        end = self.length + k.shape[1]
        if self.positions is None:
            self.k[layer, :, self.length : end] = k
            self.v[layer, :, self.length : end] = v
        else:
            self.k[layer, self._rows, self.positions] = k[:, 0].to(self.k.dtype)
            self.v[layer, self._rows, self.positions] = v[:, 0].to(self.v.dtype)
            end = min(end, self.k.shape[2])
            if k.is_cuda:  # the kernel reads positions; a CUDA graph must not depend on length
                end = self.k.shape[2]
        return self.k[layer, :, :end].to(k.dtype), self.v[layer, :, :end].to(v.dtype)


class RMSNorm(nn.Module):
    def __init__(self, config: LucieConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LucieConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        packed = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, packed, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens, cache) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 KV, D]
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        positions = None if cache is None else cache.positions
        q, k = rope(q, k, cos, sin, None if positions is None else positions[:, None])
        if cache is None:
            v = v.contiguous()  # attention keeps v for its backward; a slice would keep all of qkv
        else:
            k, v = cache.append(self.layer, k, v)
        return self.o_proj(attention(q, k, v, cu_seqlens, positions).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LucieConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: LucieConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens=None, cache=None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, cache)
        norm = self.post_attention_layernorm
        y, x = add_rms_norm(attended, x, norm.weight, norm.eps)
        return x + self.mlp(y)


class Head(nn.Linear):
    """Logits; or with targets the loss, which keeps the logits of few rows at a time."""

    def __init__(self, config: LucieConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, reduction)


class Lucie(nn.Module):
    """The language model. On the meta device the caller has to fill its parameters."""

    eos_token_ids = (1,)  # a completion ends at any of these; hf.py sets those of a folder

    def __init__(self, config: LucieConfig, seed: int = 42) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.lm_head = Head(config)
        # A plain attribute, not a buffer: model.to(torch.bfloat16) must never round the angles.
        self._rope_tables: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    parameter.copy_(initial_weight(config, name, parameter.shape, seed))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits `[B, T, vocab_size]`, or with targets the loss, an fp32 scalar.

        tokens, targets: int64 `[B, T]`; a target of -100 is ignored. reduction: "mean" over the
        targets that are not ignored, or "sum". cu_seqlens: see `kernels.attention`. With a cache,
        tokens continue its sequences and are appended to it.
        Raises ValueError beyond max_position_embeddings or the length of the cache.
        """
        return self.lm_head(self.hidden(tokens, cu_seqlens, cache), targets, reduction)

    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """The input of the head, `[B, T, hidden_size]`: for callers that need few logits."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        room = self.config.max_position_embeddings if cache is None else cache.k.shape[2]
        if cache is not None and cache.positions is not None:
            end = min(end, room)  # a full row stays where it is while others go on
        if end > min(room, self.config.max_position_embeddings):
            raise ValueError(
                f"{end} tokens, but max_position_embeddings is "
                f"{self.config.max_position_embeddings} and there is room for {room}"
            )
        cos, sin = self.rope_tables(tokens.device)
        if cache is None or cache.positions is None:
            cos, sin = cos[start:end], sin[start:end]
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, cos, sin, cu_seqlens, cache)
        if cache is not None:
            cache.length = end
            if cache.positions is not None:
                cache.positions.add_(1).clamp_(max=room - 1)
        return self.norm(x)

    def rope_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The fp32 tables for this config's theta and length, made once on the device in use."""
        if self._rope_tables is None or self._rope_tables[0].device != device:
            c = self.config
            self._rope_tables = rope_tables(
                c.head_dim, c.rope_theta, c.max_position_embeddings, device
            )
        return self._rope_tables

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs of training on one token, forward and backward: 6 N + 6 L D S.

        N counts every weight except the input embedding (a look-up). Attention counts only the
        causal half; the other convention, 12 L D S, counts products that are never computed.
        """
        c = self.config
        n = self.num_params() - self.embed_tokens.weight.numel()
        return 6 * n + 6 * c.num_hidden_layers * c.hidden_size * seq_len


def initial_weight(config: LucieConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The fp32 initial value of one parameter, a function of (seed, name) alone.

    Norms are ones. Matrices are Normal(0, initializer_range); those that write to the residual
    stream are scaled by 1/sqrt(2 * layers), as in Megatron, so that its variance does not grow with
    depth. No draw depends on another parameter: 1 and 512 GPUs start from the same model.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.num_hidden_layers)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0, std, generator=generator)
