"""The Hugging Face layout of a Llama, read: checked as a whole first, then a tensor at a time.

Ours joins q|k|v and gate|up to one matrix each; every other tensor is the same under another name.
Writing it is in hf_export.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from model import Lucie, LucieConfig
from parallel import fill_rows
from tensor_files import (
    DTYPES,
    CheckpointError,
    Entry,
    available_memory,
    read_header,
    read_tensor,
    reason,
)

__all__ = ["CheckpointError", "config_of", "fill", "folder_of", "from_hf", "read", "reason"]

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
FREE = ("rope_theta", "initializer_range", "max_position_embeddings")  # the same weights fit


# --- what is where -------------------------------------------------------------------------------


def rows_of(config: LucieConfig) -> dict[str, tuple[str, int, int]]:
    """{tensor name of Hugging Face: (our parameter, first row, past the last row)}.

    In the order of our parameters, and of the rows of each.
    """
    c, rows = config, {}
    rows["model.embed_tokens.weight"] = ("embed_tokens.weight", 0, c.vocab_size)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for i in range(c.num_hidden_layers):
        parts = {
            "input_layernorm": (("input_layernorm", c.hidden_size),),
            "self_attn.qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
            "self_attn.o_proj": (("o_proj", c.hidden_size),),
            "post_attention_layernorm": (("post_attention_layernorm", c.hidden_size),),
            "mlp.gate_up_proj": (
                ("gate_proj", c.intermediate_size),
                ("up_proj", c.intermediate_size),
            ),
            "mlp.down_proj": (("down_proj", c.hidden_size),),
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


def shapes_of(config: LucieConfig) -> dict[str, tuple[int, ...]]:
    """{tensor name of Hugging Face: its shape}."""
    with torch.device("meta"):
        ours = {name: p.shape for name, p in Lucie(config).named_parameters()}
    return {n: (end - start, *ours[p][1:]) for n, (p, start, end) in rows_of(config).items()}


def folder_of(path_or_name: str, revision: str | None = None, optimizer: bool = False) -> Path:
    """A local folder as it is; a name is fetched through huggingface_hub, at a revision if given.

    NAME@REVISION is understood as well. Its optimizer states, many times the bytes of the weights,
    come with it only if they are asked for.
    """
    if revision is None and not Path(path_or_name).is_dir():
        path_or_name, _, revision = path_or_name.partition("@")
    path = Path(path_or_name)
    if path.is_dir():
        if revision:
            raise CheckpointError(f"{path}: a folder here, which has no revision {revision}")
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                path_or_name,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=None if optimizer else ["optimizer/*"],
            )
        )
    except ImportError:
        raise CheckpointError(
            f"{path_or_name}: no such folder; to fetch it by name: pip install huggingface_hub"
        ) from None
    except Exception as error:  # the hub's client has a dozen errors of its own
        at = f"@{revision}" if revision else ""
        raise CheckpointError(f"{path_or_name}{at}: not fetched ({reason(error)})") from None


def read_json(file: Path) -> dict:
    """Raises CheckpointError if there is no JSON object in that file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {reason(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def config_of(folder: Path) -> LucieConfig:
    """LucieConfig of a Hugging Face folder. Raises CheckpointError for another architecture."""
    values = read_json(folder / "config.json")
    rope = values.get("rope_parameters") or {}  # transformers 5 keeps theta here
    if not isinstance(rope, dict):
        raise CheckpointError(f"{folder}/config.json: rope_parameters {rope!r}")
    values = {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": 1.0} | values | rope
    if values.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    quantized = values.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if quantized and method != "nanolucie_int4":
        raise CheckpointError(
            f"{folder}: quantized by {method!r}, which is not read here; take what it was made from"
        )
    if values.get("tie_word_embeddings"):
        raise CheckpointError(f"{folder}: tied embeddings are not Lucie's architecture")
    fixed = ("model_type", "hidden_act", "attention_bias", "mlp_bias", "rope_scaling")
    for name, ours in [(n, COMMON[n]) for n in fixed] + [("partial_rotary_factor", 1.0)]:
        if values.get(name, ours) != ours:
            raise CheckpointError(f"{folder}: {name} {values[name]!r} is not Lucie's architecture")
    missing = [n for n in vars(LucieConfig()) if values.get(n) is None]
    if missing:
        raise CheckpointError(f"{folder}/config.json: lacks {', '.join(missing)}")
    try:
        config = LucieConfig(**{n: values[n] for n in vars(LucieConfig())})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}/config.json: {reason(error)}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise CheckpointError(
            f"{folder}: head_dim {values['head_dim']} is not hidden_size / num_attention_heads = "
            f"{config.head_dim}, which is not Lucie's architecture"
        )
    return config


def same_model(path: object, here: LucieConfig, there: dict) -> None:
    """Raises CheckpointError if weights of `there` do not make the model that is `here`."""
    differ = [n for n, v in vars(here).items() if n not in FREE and there.get(n, v) != v]
    if differ:
        fields = ", ".join(f"{n} {there[n]} (here {getattr(here, n)})" for n in differ)
        raise CheckpointError(f"{path}: holds another model: {fields}")


# --- reading -------------------------------------------------------------------------------------


def read(folder: Path, config: LucieConfig) -> Iterator[tuple[str, int, Tensor]]:
    """(name of our parameter, first row, the rows) of all weights of a folder, one after the other.

    Tensors come in the dtype they have there, and each is good until the next. Raises
    CheckpointError at once, before the first of them is read, for anything that is missing, cut
    short, unknown or of another shape.
    """
    return stream(entries_of(folder, config), rows_of(config), folder.name)


def entries_of(folder: Path, config: LucieConfig) -> dict[str, Entry]:
    """{tensor name of Hugging Face: where it lies}. Raises CheckpointError as `read` does."""
    if "quantization_config" in read_json(folder / "config.json"):
        raise CheckpointError(f"{folder}: holds 4-bit weights, which only generate.py can use")
    return check(folder, shapes_of(config))


def stream(
    entries: dict[str, Entry], rows: dict[str, tuple[str, int, int]], label: str
) -> Iterator[tuple[str, int, Tensor]]:
    """Read the entries, in the order of their bytes, with a progress bar.

    A tensor is good until the next one is asked for: all are read to the same memory, for fresh
    pages cost more than the copying.
    """
    bar = tqdm(
        desc=f"reading {label}",
        total=sum(entry.nbytes for entry in entries.values()),
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=dist.is_initialized() and dist.get_rank() > 0,
    )
    buffer = torch.empty(max(entry.nbytes for entry in entries.values()), dtype=torch.uint8)
    with bar:
        for name in sorted(entries, key=lambda n: (entries[n].file, entries[n].start)):
            entry = entries[name]
            tensor = buffer[: entry.nbytes].view(DTYPES[entry.dtype]).view(entry.shape)
            yield *rows[name][:2], read_tensor(entry, tensor)
            bar.update(entry.nbytes)


def check(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    """{name: where it lies} of the tensors of a folder, which must be those of `shapes`.

    Reads the index and the headers of all files. Raises CheckpointError as `read` does.
    """
    entries: dict[str, Entry] = {}
    for file in files_of(folder):
        found, _ = read_header(file)
        twice = found.keys() & entries.keys()
        if twice:
            raise CheckpointError(f"{file}: {min(twice)} is in {entries[min(twice)].file.name} too")
        entries |= found
    # An old habit; ours are computed.
    entries = {n: e for n, e in entries.items() if not n.endswith("rotary_emb.inv_freq")}
    unknown = [n for n in entries if n not in shapes]
    if unknown:
        raise CheckpointError(f"{folder}: unknown tensor {unknown[0]} and {len(unknown) - 1} more")
    missing = [n for n in shapes if n not in entries]
    if missing:
        raise CheckpointError(f"{folder}: lacks {missing[0]} and {len(missing) - 1} more")
    for name, entry in entries.items():
        if entry.shape != shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} is {list(entry.shape)}, not {list(shapes[name])}"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{folder}: {name} is {entry.dtype}, not one of {list(DTYPES)}")
    return entries


def files_of(folder: Path) -> list[Path]:
    """The safetensors of a folder: those of its index if there is one. They exist."""
    index = next(folder.glob("*.safetensors.index.json"), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        pickles = sorted(p for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}"))
        if not files and pickles:
            raise CheckpointError(
                f"{folder}: {pickles[0].name} is a pickle, which can run code and is not read; "
                "convert it with transformers: model.save_pretrained(NEW, safe_serialization=True)"
            )
        if not files:
            raise CheckpointError(f"{folder}: holds no safetensors")
        return files
    weight_map = read_json(index).get("weight_map")
    try:
        names = sorted(set(weight_map.values()))
    except (AttributeError, TypeError):
        raise CheckpointError(f"{index}: has no weight_map") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: lacks {name}, which its index names")
    return [folder / name for name in names]


def fill(model: nn.Module, weights: Iterator[tuple[str, int, Tensor]]) -> None:
    """Put weights, as `read` gives them, into a (sharded) model, in the dtype it has."""
    parameters = dict(model.named_parameters())
    for name, start, tensor in weights:
        fill_rows(parameters[name], start, tensor)


def load_folder(folder: Path, model: nn.Module) -> dict[str, int]:
    """Fill a (sharded) model; {"training_steps": ..., "training_tokens": ...} where they are told.

    The folder's config may differ in what does not change its weights. Raises CheckpointError.
    """
    same_model(folder, model.config, vars(config_of(folder)))
    fill(model, read(folder, model.config))
    return training_of(folder)


def training_of(folder: Path) -> dict[str, int]:
    """How far the weights of a folder were trained, as far as its config.json says so."""
    values = read_json(folder / "config.json")
    names = ("training_steps", "training_tokens")
    return {n: values[n] for n in names if isinstance(values.get(n), int)}


def from_hf(
    path_or_name: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Lucie:
    """Lucie from a Hugging Face folder or name. Raises CheckpointError, before any weight is read
    if the folder is not whole or memory does not suffice."""
    folder = folder_of(path_or_name, revision)
    config = config_of(folder)
    return build(config, read(folder, config), dtype, device, str(folder))


def build(
    config: LucieConfig,
    weights: Iterator[tuple[str, int, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    label: str,
) -> Lucie:
    """A model of these weights. Memory never holds more than it and one tensor."""
    with torch.device("meta"):
        model = Lucie(config).to(dtype)
    need, have = model.num_params() * dtype.itemsize, available_memory(torch.device(device))
    if have and need > have:
        raise CheckpointError(
            f"{label}: its weights take {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} "
            f"and {have / 1e9:.1f} GB are free on {device}; try bfloat16, or a larger machine"
        )
    model.to_empty(device=device)
    fill(model, weights)
    return model
