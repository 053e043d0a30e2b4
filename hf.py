"""The Hugging Face layout of a Llama, in and out, through the safetensors library.

    DIR/model-00001-of-00003.safetensors ...   under 5 GB each, and their index (or one file)
        config.json  generation_config.json    with the released Lucie's keys
        tokenizer.json  tokenizer_config.json  if the tokenizer is known
        README.md                              what was trained, and how

Our q|k|v and gate|up are one matrix each; every other tensor is the same under another name. A
folder is checked as a whole before its first tensor is read, and one tensor is in memory at a time
beside the model. A folder that is written gets its name when all of it is on the disk.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from config.cli import in_one_line
from data import tokenizer as tokenizers
from model import Lucie, LucieConfig

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARD_BYTES = 4_900_000_000  # of the tensors of one file
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
# The same weights fit whatever these are.
INDEPENDENT_OF_WEIGHTS = ("rope_theta", "initializer_range", "max_position_embeddings")


class CheckpointError(Exception):
    """A checkpoint, ours or theirs, that cannot be written or read; the message is one line."""


class Piece(NamedTuple):
    """Consecutive rows of a parameter of ours, and where they are stored."""

    file: Path
    key: str  # the name of the tensor in the file
    name: str  # our parameter
    first: int  # the row of our parameter that the tensor begins at
    shape: tuple[int, ...]
    dtype: torch.dtype


def rows_of(config: LucieConfig) -> dict[str, tuple[str, int, int]]:
    """{tensor name of Hugging Face: (our parameter, first row, past the last row)}.

    In the order of our parameters, and of the rows of each.
    """
    c, rows = config, {}
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    fused = {
        "qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
        "gate_up_proj": (("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)),
    }
    with torch.device("meta"):
        parameters = dict(Lucie(config).named_parameters())
    for ours, parameter in parameters.items():
        *module, layer, _ = ours.split(".")  # layers.0.self_attn.qkv_proj.weight
        start = 0
        for part, size in fused.get(layer, ((layer, len(parameter)),)):
            prefix = [] if layer == "lm_head" else ["model"]
            rows[".".join([*prefix, *module, part, "weight"])] = (ours, start, start + size)
            start += size
    return rows


# --- reading -------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """A local folder as it is; FOLDER_OR_NAME[@revision] is fetched through huggingface_hub."""
    if name and Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    if not repository or repository.startswith(("/", ".")) or Path(repository).is_dir():
        raise CheckpointError(f"hf:{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download

        options = {"allow_patterns": ["*.safetensors", "*.json"], "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(repository, revision=revision or None, **options))
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder; to fetch a model by its name: pip install huggingface_hub"
        ) from None
    except Exception as error:  # the hub's client has a dozen errors of its own
        why = f"{type(error).__name__}: {in_one_line(error)}"
        raise CheckpointError(f"{name}: could not be fetched ({why})") from None


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder has a config.json with a model_type; one of our runs has none.

    Raises CheckpointError for a config.json that cannot be read.
    """
    file = folder / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def read_json(file: Path) -> dict:
    """Raises CheckpointError if there is no JSON object in that file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({in_one_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def config_of(folder: Path) -> LucieConfig:
    """LucieConfig of a Hugging Face folder. Raises CheckpointError for another architecture."""
    file = folder / "config.json"
    values = read_json(file)
    for key in ("rope_scaling", "rope_parameters"):  # transformers 5 keeps theta in the latter
        rope = values.get(key) or {}
        known = ("default", None, 1)  # the kind of rotation, and a factor that changes nothing
        if not isinstance(rope, dict) or any(
            value not in known for name, value in rope.items() if name != "rope_theta"
        ):
            raise CheckpointError(
                f"{file}: {key} {rope!r} is not supported: Lucie does not scale angles"
            )
        values |= {name: theta for name, theta in rope.items() if name == "rope_theta"}
    missing = [n for n in vars(LucieConfig()) if values.get(n) is None]
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}")
    try:
        config = LucieConfig(**{n: values[n] for n in vars(LucieConfig())})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: {in_one_line(error)}") from None
    names = ("model_type", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")
    fixed = {n: COMMON[n] for n in names} | {"head_dim": config.head_dim}
    for name, ours in fixed.items():
        if (values.get(name) or ours) != ours:
            raise CheckpointError(f"{file}: {name} is {values[name]!r}, and {ours!r} in a Lucie")
    return config


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as generation_config.json or else config.json says, or `</s>`."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    return Lucie.eos_token_ids


def training_of(folder: Path) -> dict[str, int]:
    """How far the weights of a folder were trained, if its config.json says so."""
    values = read_json(folder / "config.json")
    names = ("training_steps", "training_tokens")
    return {n: values[n] for n in names if isinstance(values.get(n), int)}


def check_same_model(path: object, here: LucieConfig, there: dict) -> None:
    """Raises CheckpointError if weights of the config `there` do not fit the model `here`."""
    differ = [
        n for n, v in vars(here).items() if n not in INDEPENDENT_OF_WEIGHTS and there.get(n, v) != v
    ]
    if differ:
        fields = ", ".join(f"{n} is {there[n]} there and {getattr(here, n)} here" for n in differ)
        raise CheckpointError(f"{path}: holds another model: {fields}")


def files_of(folder: Path) -> list[Path]:
    """The files that its index names, or without an index model.safetensors. They exist."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: lacks {name}; pickles (.bin, .pt) can run code and are not read, "
                "transformers converts them: model.save_pretrained(NEW)"
            )
    return [folder / name for name in names]


def header_of(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """({name: (dtype as safetensors names it, shape)}, metadata) of a safetensors file.

    Raises CheckpointError for a file that is missing, cut short, or not in that format.
    """
    with opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        facts = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        return facts, f.metadata() or {}


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A safetensors file, with the library's errors in one line that names it."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged, or not readable ({in_one_line(error)})") from None


def pieces_of(folder: Path, config: LucieConfig) -> list[Piece]:
    """All weights of a folder. Raises CheckpointError for any that is missing, unknown, stored
    twice or of another shape or dtype."""
    if method := read_json(folder / "config.json").get("quantization_config"):
        raise CheckpointError(f"{folder}: holds quantized weights, which cannot be used ({method})")
    rows, pieces = rows_of(config), {}
    with torch.device("meta"):
        shapes = {name: p.shape[1:] for name, p in Lucie(config).named_parameters()}
    for file in files_of(folder):
        for key, (dtype, shape) in header_of(file)[0].items():
            if key.endswith("rotary_emb.inv_freq"):
                continue  # written by old versions; we compute the angles
            if key not in rows or key in pieces:
                raise CheckpointError(f"{file}: {key} is unknown or comes twice")
            name, start, end = rows[key]
            if shape != (end - start, *shapes[name]) or dtype not in DTYPES:
                expected = [end - start, *shapes[name]]
                raise CheckpointError(f"{file}: {key} is {dtype} {[*shape]}, not {expected}")
            pieces[key] = Piece(file, key, name, start, shape, DTYPES[dtype])
    missing = [key for key in rows if key not in pieces]
    if missing:
        raise CheckpointError(f"{folder}: lacks {missing[0]} and {len(missing) - 1} more")
    return list(pieces.values())


def bytes_bar(description: str, total: int) -> tqdm:
    """A progress bar in bytes; rank 0 shows it if the work takes longer than two seconds."""
    hidden = dist.is_initialized() and dist.get_rank() > 0
    common = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False}
    return tqdm(desc=description, total=total, disable=hidden, **common)


def read(
    pieces: Iterable[Piece], held: Mapping[str, tuple[int, int]] | None = None
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (parameter, first row, rows) of the pieces, one after the other, in their own dtype.

    held: {parameter: (first row, past the last row)} that this rank wants; None for all rows.
    """
    parts, total = [], 0  # (piece, from which of its rows, to which)
    for piece in pieces:
        rows = piece.shape[0]
        first, end = held[piece.name] if held else (piece.first, piece.first + rows)
        a, b = max(first - piece.first, 0), min(end - piece.first, rows)
        if a < b:
            parts.append((piece, a, b))
            total += (b - a) * torch.Size(piece.shape[1:]).numel() * piece.dtype.itemsize
    parts.sort(key=lambda part: part[0].file)
    with bytes_bar("reading weights", total) as bar, ExitStack() as stack:
        current = file = None
        for piece, a, b in parts:
            if piece.file != current:
                stack.close()
                current, file = piece.file, stack.enter_context(opened(piece.file))
            rows = file.get_slice(piece.key)[a:b]
            yield piece.name, piece.first + a, rows
            bar.update(rows.nbytes)


def build(
    config: LucieConfig,
    pieces: list[Piece],
    dtype: torch.dtype,
    device: torch.device | str,
    label: object,
) -> Lucie:
    """A model of these weights. Memory never holds more than it and one tensor."""
    with torch.device("meta"):
        model = Lucie(config).to(dtype)
    allocate(model, device, label)
    parameters = dict(model.named_parameters())
    for name, first, rows in read(pieces):
        parameters[name].detach()[first : first + len(rows)].copy_(rows)
    return model


def allocate(model: Lucie, device: torch.device | str, label: object) -> None:
    """Give a model on the meta device its memory. Raises CheckpointError if there is not enough."""
    need = sum(x.nbytes for x in model.state_dict().values())
    free = available_memory(torch.device(device))
    if free and need > free:
        raise CheckpointError(
            f"{label}: its weights take {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on "
            f"{device}; try bfloat16, 4 bits or a larger machine"
        )
    model.to_empty(device=device)


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or of main memory; 0 where that is unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        facts = Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1]
        return 1024 * int(facts.split()[0])
    except (OSError, IndexError):
        return 0


# --- writing -------------------------------------------------------------------------------------


def to_hf(
    model: Lucie,
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str = "",
    state: dict | None = None,
) -> None:
    """Write a model that is not sharded as a folder that transformers, lm-eval and vLLM read.

    dtype: None keeps the model's own. tokenizer: a path for data.tokenizer.load. state: of the
    checkpoint, for config.json and the model card. Raises CheckpointError and DataError, before
    anything is written if there is something at `path`.
    """
    dtype = dtype or model.embed_tokens.weight.dtype
    parameters = dict(model.named_parameters())
    tensors = {
        theirs: parameters[ours].detach()[start:end]
        for theirs, (ours, start, end) in rows_of(model.config).items()
    }
    config = config_json(model, dtype, state)
    ids = {"bos_token_id": 0, "eos_token_id": config["eos_token_id"], "pad_token_id": 3}
    texts = {"config.json": config, "generation_config.json": ids}
    texts["README.md"] = model_card(config, state)
    write_folder(Path(path), tensors, dtype, texts, tokenizer, model.config.vocab_size)


def write_folder(
    path: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    texts: dict[str, str | dict],
    tokenizer: str,
    vocab_size: int,
) -> None:
    """Write tensors (in dtype; None for their own), text or JSON files, and the tokenizer.

    The folder gets its name when all of it is on the disk; nothing is left of it otherwise. Raises
    CheckpointError if there is something of that name, or a file cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name")
    known = tokenizers.load(tokenizer, vocab_size) if tokenizer else None
    sizes = {n: t.numel() * (dtype or t.dtype).itemsize for n, t in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map, total = {}, sum(sizes.values())
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with bytes_bar(f"writing {path.name}", total) as bar:
            for number, names in enumerate(shards, start=1):
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                file = file if len(shards) > 1 else "model.safetensors"
                shard = {n: tensors[n].to("cpu", dtype).contiguous() for n in names}
                save_tensors(shard, unfinished / file, {"format": "pt"})
                weight_map |= dict.fromkeys(names, file)
                bar.update(sum(sizes[n] for n in names))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            texts = texts | {"model.safetensors.index.json": index}
        for name, content in texts.items():
            if isinstance(content, dict):
                content = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (unfinished / name).write_text(content, encoding="utf-8")
        if known:
            tokenizers.save_folder(known, unfinished)
        for file in [*unfinished.iterdir(), unfinished]:
            sync(file)
        os.replace(unfinished, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written ({in_one_line(error)})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], file: Path, about: dict[str, str]) -> None:
    """Write a safetensors file. Raises CheckpointError."""
    try:
        save_file(tensors, file, about)
        # The library makes files private; this is what any other file in that folder would have.
        file.chmod(file.parent.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {in_one_line(error)}") from None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does it by itself
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise  # some network file systems cannot sync a directory
    finally:
        os.close(handle)


def trained(state: dict | None) -> dict[str, int]:
    """{"training_steps": ..., "training_tokens": ...} of a checkpoint's state, over all phases."""
    if not state:
        return {}
    before = state.get("trained_before", {})
    return {
        "training_steps": before.get("training_steps", 0) + state["step"],
        "training_tokens": before.get("training_tokens", 0) + state.get("tokens", 0),
    }


def config_json(model: Lucie, dtype: torch.dtype, state: dict | None = None) -> dict:
    """The keys of the released Lucie's config.json."""
    ids = model.eos_token_ids
    more = {
        "eos_token_id": ids[0] if len(ids) == 1 else list(ids),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.36.1",  # whose keys these are
    }
    return COMMON | vars(model.config) | more | trained(state)


def model_card(config: dict, state: dict | None) -> str:
    """README.md: the architecture, and what the checkpoint's state says about the training."""
    facts = {name: config[name] for name in (*vars(LucieConfig()), "torch_dtype")} | trained(state)
    if state:
        facts["GPU hours of this phase"] = round(state.get("gpu_seconds", 0) / 3600, 2)
        facts |= {f"option {name}": value for name, value in state["config"].items()}
        facts |= {f"version of {name}": value for name, value in state.get("versions", {}).items()}
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
        "A language model of Lucie-7B's architecture, a Llama 3.1 decoder. Written by nanoLucie.\n",
        "| | |\n| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"
