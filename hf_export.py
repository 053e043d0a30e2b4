"""The Hugging Face layout of a Llama, written: from a model, a checkpoint or tensors made on the
way, one tensor at a time.

    DIR/model-00001-of-00003.safetensors ...   under 5 GB each, and their index (or one file)
        config.json  generation_config.json    with the released Lucie's keys
        tokenizer.json  tokenizer_config.json  if the tokenizer is known
        README.md                              what was trained, and how
        optimizer/                             only if asked for, to go on training elsewhere:
            optimizer-00001-of-00017.safetensors ...
                master.NAME, exp_avg.NAME, exp_avg_sq.NAME, all fp32; NAME is Hugging Face's
            optimizer.safetensors.index.json
            training_state.json                a checkpoint's state.json

A folder gets its name when all of it is on the disk.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import tokenizer as tokenizers
from hf_layout import COMMON, rows_of, shapes_of
from model import Lucie, LucieConfig
from tensor_files import CheckpointError, Entries, new_folder, shards, size_of, write

KINDS = {"master": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # {there: here}
Read = Callable[[str, int, int], Tensor]  # (name, first row, past the last row) -> those rows


def to_hf(model: Lucie, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model that is not sharded, without tokenizer and training facts."""
    parameters = dict(model.named_parameters())

    def read(name: str, start: int, end: int) -> Tensor:
        return parameters[name.removeprefix("model.")].detach()[start:end]

    write_folder(model.config, read, path, dtype)


def write_folder(
    config: LucieConfig,
    read: Read,
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    state: dict | None = None,
    tokenizer: str = "",
    optimizer: bool = False,
) -> None:
    """Write a folder that transformers, lm-eval and vLLM read; one tensor is in memory at a time.

    read: is asked for rows of "model.NAME", NAME a parameter of ours; with optimizer also of
    "exp_avg.NAME" and "exp_avg_sq.NAME". state: of a checkpoint, for the model card. tokenizer:
    a path for data.tokenizer.load. Raises CheckpointError and TokenizerError, before anything is
    written if there is something at `path` or not enough room.
    """
    path, rows, shapes = Path(path), rows_of(config), shapes_of(config)
    known = tokenizers.load(tokenizer) if tokenizer else None
    if known and known.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{tokenizer} has {known.vocab_size:,} tokens, the model {config.vocab_size:,}"
        )
    weights: Entries = {name: (dtype, shape) for name, shape in shapes.items()}
    moments: Entries = {}
    if optimizer:
        moments = {f"{k}.{n}": (torch.float32, s) for k in KINDS for n, s in shapes.items()}
    nbytes = size_of(weights) + size_of(moments)
    bar = tqdm(
        desc=f"writing {path.name}", total=nbytes, unit="B", unit_scale=True, delay=2, leave=False
    )

    def weight(name: str) -> Tensor:
        ours, start, end = rows[name]
        tensor = read(f"model.{ours}", start, end)
        if dtype == torch.float16 and tensor.abs().max() > torch.finfo(dtype).max:
            raise CheckpointError(f"{path}: {name} has values that fp16 cannot hold: --dtype=bf16")
        return tensor

    def moment(name: str) -> Tensor:
        kind, _, theirs = name.partition(".")
        ours, start, end = rows[theirs]
        return read(f"{KINDS[kind]}.{ours}", start, end)

    with bar, new_folder(path, nbytes) as folder:
        _write_shards(folder, "model", weights, weight, bar)
        _write_json(folder / "config.json", config_json(config, dtype, state))
        _write_json(folder / "generation_config.json", GENERATION)
        (folder / "README.md").write_text(
            model_card(config, dtype, state, optimizer), encoding="utf-8"
        )
        if known:
            tokenizers.save_folder(known, folder)
        if optimizer:
            (folder / "optimizer").mkdir()
            _write_shards(folder / "optimizer", "optimizer", moments, moment, bar)
            _write_json(folder / "optimizer" / "training_state.json", state)


def _write_shards(
    folder: Path, stem: str, entries: Entries, read: Callable[[str], Tensor], bar: tqdm
) -> None:
    """One file STEM.safetensors if that suffices, else several and an index."""
    files, weight_map = shards(entries), {}
    for number, part in enumerate(files, start=1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            name = f"{stem}.safetensors"
        write(folder / name, part, map(read, part), {"format": "pt"}, bar=bar)
        weight_map |= dict.fromkeys(part, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": size_of(entries)}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- what is told of a model ---------------------------------------------------------------------

GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}


def trained(state: dict | None) -> dict[str, int]:
    """{"training_steps": ..., "training_tokens": ...} of a checkpoint's state, over all phases."""
    if not state:
        return {}
    before = state.get("trained_before", {})
    return {
        "training_steps": before.get("training_steps", 0) + state["step"],
        "training_tokens": before.get("training_tokens", 0) + state.get("tokens", 0),
    }


def config_json(config: LucieConfig, dtype: torch.dtype, state: dict | None = None) -> dict:
    """The keys of the released Lucie's config.json (transformers' version says their meaning)."""
    told = {"torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.36.1"}
    return COMMON | vars(config) | told | trained(state)


def model_card(config: LucieConfig, dtype: torch.dtype, state: dict | None, optimizer: bool) -> str:
    """README.md: the architecture, and of the training what its state tells."""
    count = sum(torch.Size(shape).numel() for shape in shapes_of(config).values())
    architecture = {"parameters": f"{count:,}"} | {
        name: f"{value:,}" if isinstance(value, int) else f"{value:g}"
        for name, value in vars(config).items()
    }
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
        "A language model of Lucie-7B's architecture, a Llama 3.1 decoder, in "
        f"{str(dtype).removeprefix('torch.')}. Written by nanoLucie.\n",
        _table("architecture", architecture),
    ]
    if state:
        parts.append(_table("training", _training(state)))
        if versions := state.get("versions"):
            parts.append(_table("version of", versions))
    if optimizer:
        parts.append(
            "`optimizer/` holds the fp32 weights (`master.NAME`), the moments of AdamW "
            "(`exp_avg.NAME`, `exp_avg_sq.NAME`) and `training_state.json`: with them\n"
            "`python -m checkpoint import` gives a checkpoint from which training goes on.\n"
        )
    return "\n".join(parts)


def _training(state: dict) -> dict[str, str]:
    options = state["config"]
    facts = {"phase": options.get("name", "")}
    for name in ("step", "samples", "tokens"):
        if name in state and not state.get("weights_only"):
            facts[f"{name} of this phase"] = f"{state[name]:,}"
    facts |= {f"{n.replace('_', ' ')}, all phases": f"{v:,}" for n, v in trained(state).items()}
    for name, told in (("seconds", "hours"), ("gpu_seconds", "GPU hours")):
        if state.get(name):
            facts[told] = f"{state[name] / 3600:,.2f}"
    names = ("init_from", "mixture", "seq_len", "global_batch_size", "learning_rate")
    names += ("min_learning_rate", "lr_decay", "warmup_samples", "beta1", "beta2", "eps")
    names += ("weight_decay", "clip_grad", "dtype", "seed")
    return facts | {n: str(options[n]) for n in names if n in options}


def _table(title: str, rows: dict[str, str]) -> str:
    lines = [f"| {title} | |", "| --- | --- |", *(f"| {n} | {v} |" for n, v in rows.items())]
    return "\n".join(lines) + "\n"
