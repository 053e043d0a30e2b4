"""Checkpoints: written whole or not at all, read back on any number of ranks; and the Hugging Face
layout, in and out.

A checkpoint is a directory of safetensors shards, one per rank, and a state.json. The shards hold
`model.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` (AdamW's moments) for every parameter, with their
place in the full tensor, so that torch's Distributed Checkpoint can load them on another number of
ranks. state.json holds the rest: step, samples and tokens consumed, seconds trained, the config.
Neither format can hold code, so loading a foreign checkpoint cannot run any.

It is written under a temporary name, synced and renamed: a directory with its final name is
complete, and a run that is killed while saving falls back on the one before.
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import Lucie, LucieConfig

STEP = re.compile(r"step(\d+)$")
HF_SHARD_BYTES = 5 * 10**9
HF_CONFIG = {  # what every Lucie shares and LucieConfig does not name
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
    """A checkpoint that cannot be written or read; the message is one line."""


# --- our own layout ------------------------------------------------------------------------------


def save(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write a checkpoint to `path`. Every rank calls this; `state` is plain JSON data.

    Raises CheckpointError if the disk is full or not writable; nothing of that name remains then.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp")
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        _barrier()
        with _quiet():
            dcp.save(
                _tensors(model, optimizer),
                storage_writer=dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                no_dist=not dist.is_initialized(),
            )
        if first:
            with open(unfinished / "state.json", "w", encoding="utf-8") as f:
                json.dump(state, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            _sync_directory(unfinished)
            older = path.with_name(f".{path.name}.old")  # of the same step, kept until it is not
            shutil.rmtree(older, ignore_errors=True)
            if path.exists():
                os.replace(path, older)
            os.replace(unfinished, path)
            _sync_directory(path.parent)
            shutil.rmtree(older, ignore_errors=True)
        _barrier()
    except (OSError, dcp.CheckpointException) as error:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{path}: not saved ({_reason(error)})") from None


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    """Fill the model, and the optimizer if given, from a checkpoint; return its state.

    Raises CheckpointError if it is incomplete, damaged or of another architecture.
    """
    path = Path(path)
    state = read_state(path)
    here, there = vars(model.config), state["config"]
    free = ("rope_theta", "initializer_range")  # neither changes what the weights are
    differ = [n for n in here if n in there and here[n] != there[n] and n not in free]
    if differ:
        fields = ", ".join(f"{n} {there[n]} (here {here[n]})" for n in differ)
        raise CheckpointError(f"{path}: holds another model: {fields}")
    if optimizer is not None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.tensor(float(state["step"]), device=p.device)
                moments = {n: torch.zeros_like(p.detach()) for n in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
    tensors = _tensors(model, optimizer)
    try:
        with _quiet():
            dcp.load(
                tensors,
                storage_reader=dcp.HuggingFaceStorageReader(str(path)),
                no_dist=not dist.is_initialized(),
            )
    except (OSError, SafetensorError, dcp.CheckpointException, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or incomplete ({_reason(error)})") from None
    return state


def read_state(path: str | Path) -> dict:
    """The state.json of a checkpoint."""
    try:
        state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        state["step"], state["config"]["seq_len"]
        return state
    except OSError:
        raise CheckpointError(f"{path}: not a complete checkpoint (no state.json)") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}/state.json: damaged") from None


def latest(path: str | Path) -> Path | None:
    """The complete checkpoint of the highest step under a run directory, or `path` if it is one.

    Compares numbers, not names. None if there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    found = [p for p in (path / "checkpoints").glob("*step*") if (p / "state.json").is_file()]
    found = [
        (int(m[1]), p) for p in found if not p.name.startswith(".") and (m := STEP.search(p.name))
    ]
    return max(found)[1] if found else None


def architecture(options: dict) -> LucieConfig:
    """The model that a training config describes; it has seq_len positions.

    Raises ValueError naming the field of an impossible combination.
    """
    names = vars(LucieConfig()).keys() & options.keys()
    values = {name: options[name] for name in names}
    return LucieConfig(**values, max_position_embeddings=options["seq_len"])


def from_run(path: str | Path) -> tuple[Lucie, dict]:
    """(model, config) of a run's newest checkpoint or of a checkpoint, fp32 on the CPU."""
    found = latest(path)
    if found is None:
        raise CheckpointError(f"{path}: no complete checkpoint there")
    options = read_state(found)["config"]
    with torch.device("meta"):
        model = Lucie(architecture(options))
    model.to_empty(device="cpu")
    load(found, model, None)
    return model, options


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    out = {}
    for name, p in model.named_parameters():
        out[f"model.{name}"] = p.detach()
        if optimizer is not None:
            out[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
            out[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
    return out


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that this rank holds, and the number of the first of them.

    FSDP gives every rank ceil(rows / ranks) consecutive rows of dimension 0, the last ones fewer.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    return parameter.to_local().detach(), -(
        -parameter.shape[0] // mesh.size()
    ) * mesh.get_local_rank()


def fill_rows(parameter: Tensor, start: int, values: Tensor) -> None:
    """Write `values` to the rows from `start` on, as far as this rank holds them."""
    rows, first = local_rows(parameter)
    a, b = max(start, first), min(start + len(values), first + len(rows))
    if a < b:
        rows[a - first : b - first].copy_(values[a - start : b - start])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that Distributed Checkpoint logs of errors it also raises, and its
    warning that one process is one process."""
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sync_directory(path: Path) -> None:
    """Make names in a directory survive a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


# --- Hugging Face's layout -----------------------------------------------------------------------


def hf_rows(config: LucieConfig) -> dict[str, tuple[str, int, int]]:
    """{tensor name of Hugging Face: (our parameter, first row, past the last row)}.

    Ours joins q|k|v and gate|up, row after row; every other tensor is the same.
    """
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


def hf_folder(path_or_name: str, revision: str | None = None) -> Path:
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
        raise CheckpointError(f"{path_or_name}: not fetched ({_reason(error)})") from None


def hf_config(folder: Path) -> LucieConfig:
    """LucieConfig of a Hugging Face folder. Raises CheckpointError for another architecture."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope = values.get("rope_parameters") or {}  # transformers 5 keeps theta here
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: {_reason(error)}") from None
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    scaling = values.get("rope_scaling") or (
        rope if rope.get("rope_type", "default") != "default" else None
    )
    if scaling:
        values["rope_scaling"] = scaling
    for name in ("model_type", "hidden_act", "attention_bias", "mlp_bias", "rope_scaling"):
        if values.get(name, HF_CONFIG[name]) != HF_CONFIG[name]:
            raise CheckpointError(f"{folder}: {name} {values[name]!r} is not Lucie's architecture")
    if values.get("tie_word_embeddings"):
        raise CheckpointError(f"{folder}: tied embeddings are not Lucie's architecture")
    missing = [n for n in vars(LucieConfig()) if n not in values]
    if missing:
        raise CheckpointError(f"{folder}/config.json: lacks {', '.join(missing)}")
    try:
        return LucieConfig(**{n: values[n] for n in vars(LucieConfig())})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {_reason(error)}") from None


def load_hf(folder: Path, model: nn.Module) -> None:
    """Fill a (sharded) model from the safetensors of a Hugging Face folder, a tensor at a time."""
    rows = hf_rows(model.config)
    parameters = dict(model.named_parameters())
    for name, tensor in _hf_tensors(folder):
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


def _hf_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / shard for shard in shards})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: {_reason(error)}") from None
    if not files:
        raise CheckpointError(f"{folder}: holds no safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    yield name, f.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {_reason(error)}") from None


def from_hf(path_or_name: str, revision: str | None = None) -> Lucie:
    """Lucie from a Hugging Face folder or name, fp32 on the CPU."""
    folder = hf_folder(path_or_name, revision)
    with torch.device("meta"):
        model = Lucie(hf_config(folder))
    model.to_empty(device="cpu")
    load_hf(folder, model)
    return model


def to_hf(model: Lucie, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder: safetensors shards with their index, and config.json."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parameters, rows = dict(model.named_parameters()), hf_rows(model.config)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (ours, start, end) in rows.items():
        nbytes = (end - start) * parameters[ours][0].numel() * dtype.itemsize
        if size + nbytes > HF_SHARD_BYTES and shards[-1]:
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
    config = HF_CONFIG | vars(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    for file, content in (("model.safetensors.index.json", index), ("config.json", config)):
        (path / file).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
