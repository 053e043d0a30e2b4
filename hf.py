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
from contextlib import ExitStack, contextmanager, suppress
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

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# --- names and shapes ----------------------------------------------------------------------------


def rows_of(config: LucieConfig) -> dict[str, tuple[str, int, int]]:
    """{tensor name of Hugging Face: (our parameter, first row, past the last row)}.

    In the order of our parameters, and of the rows of each.
    """
    c, rows = config, {}
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    fused = {
        "self_attn.qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
        "mlp.gate_up_proj": (("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)),
    }
    with torch.device("meta"):
        parameters = {name: p.shape[0] for name, p in Lucie(config).named_parameters()}
    for ours, count in parameters.items():
        layer = ours.removesuffix(".weight")
        module = ".".join(layer.split(".")[2:])  # layers.0.self_attn.qkv_proj
        start = 0
        for part, size in fused.get(module, ((layer.rpartition(".")[2], count),)):
            theirs = f"{layer.rpartition('.')[0]}.{part}.weight".lstrip(".")
            prefix = "" if theirs == "lm_head.weight" else "model."
            rows[prefix + theirs] = (ours, start, start + size)
            start += size
    return rows


def shapes_of(config: LucieConfig) -> dict[str, tuple[int, ...]]:
    """{tensor name of Hugging Face: its shape}."""
    with torch.device("meta"):
        ours = {name: p.shape for name, p in Lucie(config).named_parameters()}
    return {n: (end - start, *ours[p][1:]) for n, (p, start, end) in rows_of(config).items()}


# --- reading -------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """A local folder as it is; FOLDER_OR_NAME[@revision] is fetched through huggingface_hub."""
    if name and Path(name).is_dir():
        return Path(name)
    name, _, revision = name.partition("@")
    if name and Path(name).is_dir():
        raise CheckpointError(f"{name}: a local folder has no revision {revision}")
    if not name or name.startswith(("/", ".")):
        raise CheckpointError(f"hf:{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder; to fetch a model by its name: pip install huggingface_hub"
        ) from None
    try:
        options = {"allow_patterns": ["*.safetensors", "*.json"], "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(name, revision=revision or None, **options))
    except Exception as error:  # the hub's client has a dozen errors of its own
        at = f"@{revision}" if revision else ""
        why = f"{type(error).__name__}: {in_one_line(error)}"
        raise CheckpointError(f"{name}{at}: could not be fetched ({why})") from None


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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({in_one_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def config_of(folder: Path) -> LucieConfig:
    """LucieConfig of a Hugging Face folder. Raises CheckpointError for another architecture."""
    file = folder / "config.json"
    values = read_json(file)
    fixed = ("model_type", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")
    for name in fixed:
        if (values.get(name) or COMMON[name]) != COMMON[name]:
            raise CheckpointError(f"{file}: {name} {values[name]!r} is not Lucie's architecture")
    for key in ("rope_scaling", "rope_parameters"):  # transformers 5 keeps theta in the latter
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{file}: {key} {rope!r} is not an object")
        kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
        nested = any(isinstance(value, dict) for value in rope.values())
        if kind != "default" or factor not in (None, 1) or nested:
            raise CheckpointError(
                f"{file}: {key} {rope!r} is not supported: Lucie does not scale angles"
            )
        values |= {n: rope[n] for n in ("rope_theta", "partial_rotary_factor") if n in rope}
    if values.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(f"{file}: partial_rotary_factor is not Lucie's architecture")
    missing = [n for n in vars(LucieConfig()) if values.get(n) is None]
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}")
    try:
        config = LucieConfig(**{n: values[n] for n in vars(LucieConfig())})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: {in_one_line(error)}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise CheckpointError(
            f"{file}: head_dim {values['head_dim']} is not hidden_size / num_attention_heads = "
            f"{config.head_dim}, which is not Lucie's architecture"
        )
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
    index, only = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if only.is_file():
            return [only]
        pickles = sorted(p for kind in ("bin", "pt", "pth") for p in folder.glob(f"[!.]*.{kind}"))
        if pickles:
            raise CheckpointError(
                f"{folder}: {pickles[0].name} is a pickle, which can run code and is not read; "
                "convert it with transformers: model.save_pretrained(NEW, safe_serialization=True)"
            )
        raise CheckpointError(f"{folder}: has no model.safetensors and no {index.name}")
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
    except SafetensorError as error:
        why = in_one_line(error)
        raise CheckpointError(f"{file}: damaged, or cut short ({why})") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or in_one_line(error)}") from None


def pieces_of(folder: Path, config: LucieConfig) -> list[Piece]:
    """All weights of a folder. Raises CheckpointError for any that is missing, unknown, stored
    twice or of another shape or dtype."""
    if method := read_json(folder / "config.json").get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        if method != "nanolucie_int4":
            raise CheckpointError(f"{folder}: quantized by {method!r}, which is not supported")
        raise CheckpointError(f"{folder}: holds 4-bit weights, which only generate.py can use")
    rows, shapes, pieces = rows_of(config), shapes_of(config), {}
    for file in files_of(folder):
        for key, (dtype, shape) in header_of(file)[0].items():
            if key.endswith("rotary_emb.inv_freq"):
                continue  # written by old versions; we compute the angles
            if key in pieces:
                raise CheckpointError(f"{file}: {key} is also in {pieces[key].file.name}")
            if key not in shapes:
                raise CheckpointError(f"{folder}: unknown tensor {key}")
            if shape != shapes[key]:
                raise CheckpointError(f"{folder}: {key} is {[*shape]}, not {[*shapes[key]]}")
            if dtype not in DTYPES:
                raise CheckpointError(f"{folder}: {key} is {dtype}, not one of {[*DTYPES]}")
            pieces[key] = Piece(file, key, *rows[key][:2], shape, DTYPES[dtype])
    missing = [key for key in shapes if key not in pieces]
    if missing:
        raise CheckpointError(f"{folder}: lacks {missing[0]} and {len(missing) - 1} more")
    return list(pieces.values())


def read(
    pieces: Iterable[Piece], held: Mapping[str, tuple[int, int]] | None = None
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (parameter, first row, rows) of the pieces, one after the other, in their own dtype.

    held: {parameter: (first row, past the last row)} that this rank wants; None for all rows.
    """
    parts = []  # (piece, from which of its rows, to which)
    for piece in pieces:
        rows = piece.shape[0]
        first, end = held[piece.name] if held else (piece.first, piece.first + rows)
        a, b = max(first - piece.first, 0), min(end - piece.first, rows)
        if a < b:
            parts.append((piece, a, b))
    parts.sort(key=lambda part: part[0].file)
    bar = tqdm(
        desc=f"reading {parts[0][0].file.parent.name}" if parts else None,
        total=sum(piece.nbytes // piece.shape[0] * (b - a) for piece, a, b in parts),
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=dist.is_initialized() and dist.get_rank() > 0,
    )
    with bar, ExitStack() as stack:
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
    label: str,
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


def from_hf(
    path_or_name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Lucie:
    """Lucie from a Hugging Face folder or NAME[@revision].

    Raises CheckpointError, before any weight is read if the folder is incomplete or there is
    not enough memory.
    """
    folder = folder_of(path_or_name)
    config = config_of(folder)
    model = build(config, pieces_of(folder, config), dtype, device, str(folder))
    model.eos_token_ids = eos_token_ids(folder)
    return model


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or of main memory for this process; 0 where that is unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        facts = Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1]
        free = 1024 * int(facts.split()[0])
    except (OSError, IndexError):
        return 0
    try:  # a job or container may have a limit of its own
        group = Path("/sys/fs/cgroup", *Path("/proc/self/cgroup").read_text().split("::/")[1:2])
        group = Path(str(group).strip())
        limit, used = ((group / f"memory.{n}").read_text() for n in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # without a limit the file says "max"
        return free


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
    anything is written if there is something at `path` or not enough room.
    """
    dtype = dtype or model.embed_tokens.weight.dtype
    parameters = dict(model.named_parameters())
    tensors = {
        theirs: parameters[ours].detach()[start:end]
        for theirs, (ours, start, end) in rows_of(model.config).items()
    }
    config = config_json(model, dtype, state)
    texts = {"README.md": model_card(config, state), "config.json": config}
    texts["generation_config.json"] = {
        "bos_token_id": 0,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": 3,
    }
    write_folder(Path(path), tensors, dtype, texts, tokenizer, model.config.vocab_size)


def write_folder(
    path: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    texts: dict[str, str | dict],
    tokenizer: str,
    vocab_size: int,
) -> None:
    """Write tensors (in dtype; None for their own), text or JSON files, and the tokenizer."""
    known = tokenizers.load(tokenizer, vocab_size) if tokenizer else None
    sizes = {n: t.numel() * (dtype or t.dtype).itemsize for n, t in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    bar = tqdm(desc=f"writing {path.name}", total=sum(sizes.values()), unit="B", unit_scale=True,
               delay=2, leave=False)  # fmt: skip
    with bar, new_folder(path, sum(sizes.values())) as folder:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = "model.safetensors"
            shard = {n: tensors[n].to("cpu", dtype).contiguous() for n in names}
            for name, tensor in shard.items():
                if dtype == torch.float16 and not tensor.isfinite().all():
                    raise CheckpointError(f"{path}: {name} has values that fp16 cannot hold")
            save_tensors(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            bar.update(sum(sizes[n] for n in names))
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            texts = texts | {"model.safetensors.index.json": index}
        for name, content in texts.items():
            if isinstance(content, dict):
                content = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(content, encoding="utf-8")
        if known:
            tokenizers.save_folder(known, folder)


def save_tensors(tensors: dict[str, Tensor], file: Path, about: dict[str, str]) -> None:
    """Write a safetensors file. Raises CheckpointError."""
    try:
        save_file(tensors, file, about)
        # The library makes files private; this is what any other file in that folder would have.
        file.chmod(file.parent.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {in_one_line(error)}") from None


@contextmanager
def new_folder(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """A folder to write to, which gets the name `path` when all that is in it is on the disk.

    Raises CheckpointError before anything is written if there is something of that name, or no room
    for nbytes; later if a file cannot be written. Nothing of it is left then.
    """
    absolute = path.absolute()  # the path . has no name
    unfinished = absolute.with_name(f".{absolute.name}.tmp")
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise CheckpointError(f"{path}: exists already; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if nbytes > free:
            raise CheckpointError(
                f"{path}: takes {nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there"
            )
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for file in [*unfinished.rglob("*"), unfinished]:
            sync(file)
        with suppress(FileNotFoundError):
            path.rmdir()  # an empty one
        os.replace(unfinished, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written ({in_one_line(error)})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does it by itself
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
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
