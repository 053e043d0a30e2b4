"""The Hugging Face layout of a Llama: read into a (sharded) model, and written.

Ours joins q|k|v and gate|up to one matrix each; every other tensor is the same under another name.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import Lucie, LucieConfig
from parallel import fill_rows

SHARD_BYTES = 5 * 10**9
COMMON = {  # what every Lucie shares and LucieConfig does not name
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class CheckpointError(Exception):
    """A checkpoint, ours or theirs, that cannot be written or read; the message is one line."""


def rows_of(config: LucieConfig) -> dict[str, tuple[str, int, int]]:
    """{tensor name of Hugging Face: (our parameter, first row, past the last row)}."""
    c, rows = config, {}
    rows["model.embed_tokens.weight"] = ("embed_tokens.weight", 0, c.vocab_size)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for i in range(c.num_hidden_layers):
        parts = {
            "self_attn.qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
            "self_attn.o_proj": (("o_proj", c.hidden_size),),
            "mlp.gate_up_proj": (
                ("gate_proj", c.intermediate_size),
                ("up_proj", c.intermediate_size),
            ),
            "mlp.down_proj": (("down_proj", c.hidden_size),),
            "input_layernorm": (("input_layernorm", c.hidden_size),),
            "post_attention_layernorm": (("post_attention_layernorm", c.hidden_size),),
        }
        for ours, pieces in parts.items():
            start = 0
            for piece, count in pieces:
                theirs = f"{ours.rpartition('.')[0]}.{piece}".lstrip(".")
                rows[f"model.layers.{i}.{theirs}.weight"] = (
                    f"layers.{i}.{ours}.weight",
                    start,
                    start + count,
                )
                start += count
    rows["model.norm.weight"] = ("norm.weight", 0, c.hidden_size)
    rows["lm_head.weight"] = ("lm_head.weight", 0, c.vocab_size)
    return rows


def folder_of(path_or_name: str, revision: str | None = None) -> Path:
    """A local folder as it is; a name is fetched through huggingface_hub."""
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(path_or_name, revision=revision, allow_patterns=patterns))
    except ImportError:
        raise CheckpointError(
            f"{path_or_name}: no such folder; to fetch it by name: pip install huggingface_hub"
        ) from None
    except Exception as error:  # the hub's client has a dozen errors of its own
        raise CheckpointError(f"{path_or_name}: not fetched ({reason(error)})") from None


def config_of(folder: Path) -> LucieConfig:
    """LucieConfig of a Hugging Face folder. Raises CheckpointError for another architecture."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope = values.get("rope_parameters") or {}  # transformers 5 keeps theta here
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: {reason(error)}") from None
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    scaling = values.get("rope_scaling") or (
        rope if rope.get("rope_type", "default") != "default" else None
    )
    if scaling:
        values["rope_scaling"] = scaling
    for name in ("model_type", "hidden_act", "attention_bias", "mlp_bias", "rope_scaling"):
        if values.get(name, COMMON[name]) != COMMON[name]:
            raise CheckpointError(f"{folder}: {name} {values[name]!r} is not Lucie's architecture")
    if values.get("tie_word_embeddings"):
        raise CheckpointError(f"{folder}: tied embeddings are not Lucie's architecture")
    missing = [n for n in vars(LucieConfig()) if n not in values]
    if missing:
        raise CheckpointError(f"{folder}/config.json: lacks {', '.join(missing)}")
    try:
        return LucieConfig(**{n: values[n] for n in vars(LucieConfig())})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {reason(error)}") from None


def load_folder(folder: Path, model: nn.Module) -> None:
    """Fill a (sharded) model from the safetensors of a Hugging Face folder, a tensor at a time."""
    rows = rows_of(model.config)
    parameters = dict(model.named_parameters())
    for name, tensor in _tensors(folder):
        if name.endswith("rotary_emb.inv_freq"):  # an old habit; ours are computed
            continue
        if name not in rows:
            raise CheckpointError(f"{folder}: unknown tensor {name}")
        ours, start, end = rows.pop(name)
        expected = (end - start, *parameters[ours].shape[1:])
        if tensor.shape != expected:
            raise CheckpointError(f"{folder}: {name} is {list(tensor.shape)}, not {list(expected)}")
        fill_rows(parameters[ours], start, tensor)
    if rows:
        raise CheckpointError(f"{folder}: lacks {next(iter(rows))} and {len(rows) - 1} more")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / shard for shard in shards})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: {reason(error)}") from None
    if not files:
        raise CheckpointError(f"{folder}: holds no safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    yield name, f.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {reason(error)}") from None


def from_hf(path_or_name: str, revision: str | None = None) -> Lucie:
    """Lucie from a Hugging Face folder or name, fp32 on the CPU."""
    folder = folder_of(path_or_name, revision)
    with torch.device("meta"):
        model = Lucie(config_of(folder))
    model.to_empty(device="cpu")
    load_folder(folder, model)
    return model


def to_hf(model: Lucie, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder: safetensors shards with their index, and config.json."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parameters, rows = dict(model.named_parameters()), rows_of(model.config)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (ours, start, end) in rows.items():
        nbytes = (end - start) * parameters[ours][0].numel() * dtype.itemsize
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
        total += nbytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            ours, start, end = rows[name]
            tensors[name] = parameters[ours].detach()[start:end].to(dtype, copy=True)
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config = COMMON | vars(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    for file, content in (("model.safetensors.index.json", index), ("config.json", config)):
        (path / file).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
