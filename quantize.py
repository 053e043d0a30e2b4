"""4-bit weights for inference: Lucie-7B in 4.3 GB, and 0.3 GB more for 2,048 tokens of context.

    DIR/model.safetensors      or several files under 5 GB and their index
        config.json            Hugging Face's keys, and "quantization_config"
        tokenizer.json ...     if the tokenizer is known

The matrices of the blocks are packed (kernels/int4_linear.py says how, and why so). The embedding,
a look-up of a few rows, and the norms stay as they are, and so does the head: in 4 bits it would
save 0.39 GB and a tenth of the time of a token, but on small models it alone raised perplexity more
than all blocks together (bench/NOTES.md).

A model is quantised before it is filled, on the meta device, so that only one of its tensors is
ever there in full.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data import tokenizer as tokenizers
from hf_export import config_json
from hf_layout import config_of, files_of, read_json, reason
from kernels.int4_linear import GROUP, int4_linear, pack
from model import Lucie, LucieConfig
from tensor_files import CheckpointError, available_memory, new_folder, shards, size_of, write

METHOD = "nanolucie_int4"


class Int4Linear(nn.Module):
    """A linear layer without bias whose weight `[out_features, in_features]` is packed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = GROUP,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size < 4 or group_size % 4 or in_features % group_size:
            raise ValueError(f"4-bit groups of {group_size} do not divide {in_features} columns")
        self.group_size = group_size
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out_features, in_features // group_size, device=device)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales.bfloat16())

    def set_rows(self, first: int, weight: Tensor) -> None:
        """Quantise `[rows, in_features]` into the rows from `first` on."""
        rows = slice(first, first + len(weight))
        self.packed[rows], self.scales[rows] = pack(weight.to(self.packed.device), self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.packed, self.scales)


def group_size_of(config: LucieConfig) -> int:
    """The largest of 128, 64 and 32 that divides the columns of every matrix of a block.

    Raises ValueError if none does.
    """
    for size in (GROUP, GROUP // 2, GROUP // 4):
        if config.hidden_size % size == config.intermediate_size % size == 0:
            return size
    raise ValueError(
        f"4-bit groups need a hidden_size and an intermediate_size that are multiples of "
        f"{GROUP // 4}, not {config.hidden_size} and {config.intermediate_size}"
    )


@torch.no_grad()
def quantize_(model: Lucie, group_size: int | None = None) -> Lucie:
    """Replace the linear layers of the blocks in place; of a model on meta, by empty ones on meta.

    group_size: as `group_size_of` says where it is None. The model is for inference then: none of
    its parameters wants a gradient. Raises ValueError, with the model as it was, if the group size
    does not divide the columns.
    """
    group_size = group_size or group_size_of(model.config)
    layers = {n: m for n, m in model.layers.named_modules() if isinstance(m, nn.Linear)}
    replaced = {}
    for name, linear in layers.items():
        weight = linear.weight
        new = Int4Linear(linear.in_features, linear.out_features, group_size, weight.device)
        if not weight.is_meta:
            new.set_rows(0, weight)
        replaced[name] = new
    for name, new in replaced.items():
        parent, _, child = name.rpartition(".")
        setattr(model.layers.get_submodule(parent), child, new)
    return model.requires_grad_(False)


def build(
    config: LucieConfig,
    stream: Iterable[tuple[str, int, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    label: str,
) -> Lucie:
    """A quantised model, its matrices packed as they arrive; dtype: of all else.

    Raises CheckpointError, naming `label`, if there is not enough memory, and as `fill` does.
    """
    with torch.device("meta"):
        model = quantize_(Lucie(config).to(dtype))
    _hold(model, device, label)
    fill(model, stream)
    return model


def _hold(model: Lucie, device: torch.device | str, label: object) -> None:
    """Give a model on meta its memory, or say that there is not enough."""
    need = sum(x.nbytes for x in model.state_dict().values())
    have = available_memory(torch.device(device))
    if have and need > have:
        raise CheckpointError(
            f"{label}: its weights take {need / 1e9:.1f} GB, {have / 1e9:.1f} are free on {device}"
        )
    model.to_empty(device=device)


@torch.no_grad()
def fill(model: Lucie, stream: Iterable[tuple[str, int, Tensor]]) -> None:
    """Fill a quantised model that has memory: matrices are packed as they arrive.

    stream: (name of a parameter of the model before it was quantised, first row, those rows), in
    any order, a parameter at once or in parts. Raises CheckpointError for an unknown name, rows
    that do not fit, come twice or not at all, and values that are not finite.
    """
    packed = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    shapes |= {n: (len(m.packed), 2 * m.packed.shape[1]) for n, m in packed.items()}
    missing = {name: torch.ones(shape[0], dtype=torch.bool) for name, shape in shapes.items()}
    for name, first, values in stream:
        if name not in shapes:
            raise CheckpointError(f"unknown tensor {name}")
        rows, shape = slice(first, first + len(values)), shapes[name]
        if first < 0 or rows.stop > shape[0] or tuple(values.shape[1:]) != shape[1:]:
            raise CheckpointError(
                f"{name}: {list(values.shape)} from row {first} on is no part of {list(shape)}"
            )
        if not missing[name][rows].all():
            raise CheckpointError(f"{name}: rows of it from {first} on came twice")
        missing[name][rows] = False
        if name not in packed:
            parameters[name][rows] = values.to(parameters[name])
            continue
        try:
            packed[name].set_rows(first, values)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
    lacking = [name for name, rows in missing.items() if rows.any()]
    if lacking:
        raise CheckpointError(f"lacks {lacking[0]} or rows of it, and {len(lacking) - 1} more")


def save(model: Lucie, folder: str | Path, tokenizer: tokenizers.Tokenizer | None = None) -> None:
    """Write a quantised model. Raises CheckpointError if there is something of that name, or no
    room, or the model is not quantised."""
    folder, state = Path(folder), model.state_dict()
    group_sizes = {m.group_size for m in model.modules() if isinstance(m, Int4Linear)}
    if len(group_sizes) != 1:
        raise CheckpointError(f"{folder}: the model is not quantised")
    config = config_json(model.config, model.embed_tokens.weight.dtype)
    config["quantization_config"] = {"quant_method": METHOD, "group_size": group_sizes.pop()}
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    files, weight_map = shards(entries), {}
    with new_folder(folder, size_of(entries)) as unfinished:
        for number, part in enumerate(files, start=1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            if len(files) == 1:
                file = "model.safetensors"
            write(unfinished / file, part, (state[name] for name in part), {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": size_of(entries)}, "weight_map": weight_map}
            _write_json(unfinished / "model.safetensors.index.json", index)
        _write_json(unfinished / "config.json", config)
        if tokenizer is not None:
            tokenizers.save_folder(tokenizer, unfinished)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def load(folder: str | Path, device: torch.device | str = "cpu") -> Lucie:
    """The model of a folder that `save` has written, in the dtypes it was written with.

    Raises CheckpointError: a missing or damaged file, another method, a tensor that is missing,
    unknown or of another shape or dtype, and before any is read, not enough memory.
    """
    folder = Path(folder)
    config, values = config_of(folder), read_json(folder / "config.json")
    method = values.get("quantization_config")
    method = method if isinstance(method, dict) else {}
    if method.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder}: quantised by {method.get('quant_method')!r}, not {METHOD}"
        )
    if not isinstance(method.get("group_size"), int):
        raise CheckpointError(f"{folder}: group_size {method.get('group_size')!r} is no number")
    dtype = getattr(torch, str(values.get("torch_dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{folder}: torch_dtype {values.get('torch_dtype')!r} is unknown")
    try:
        with torch.device("meta"):
            model = quantize_(Lucie(config).to(dtype), method["group_size"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    wanted = model.state_dict()
    need = sum(x.nbytes for x in wanted.values())
    _hold(model, device, folder)
    missing = model.state_dict()  # the tensors to be filled, by name
    bar = tqdm(desc="reading", total=need, unit="B", unit_scale=True, delay=2, leave=False)
    with bar:
        for file in files_of(folder):
            try:
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():
                        tensor = f.get_tensor(name)
                        _check(folder, name, tensor, wanted.get(name))
                        missing.pop(name).copy_(tensor)
                        bar.update(tensor.nbytes)
            except KeyError as error:
                raise CheckpointError(f"{file}: {error.args[0]} a second time") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: {reason(error)}") from None
    if missing:
        raise CheckpointError(f"{folder}: lacks {next(iter(missing))} and {len(missing) - 1} more")
    return model


def _check(folder: Path, name: str, tensor: Tensor, expected: Tensor | None) -> None:
    if expected is None:
        raise CheckpointError(f"{folder}: unknown tensor {name}")
    if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"not {expected.dtype} {list(expected.shape)}"
        )


def bytes_of(config: LucieConfig, context: int, batch: int = 1) -> tuple[int, int]:
    """(bytes of the weights, bytes of the cache) of a 4-bit model, all but the packed in bf16.

    context: tokens of each of the `batch` sequences. What a forward pass needs besides comes on
    top: the logits, and for more than 16 rows one unpacked matrix.
    """
    c = config
    kv = c.num_key_value_heads * c.head_dim
    group_size = group_size_of(config)
    matrices = c.hidden_size * (2 * c.hidden_size + 2 * kv + 3 * c.intermediate_size)
    packed = c.num_hidden_layers * (matrices // 2 + matrices // group_size * 2)
    norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
    weights = packed + 2 * (2 * c.vocab_size * c.hidden_size + norms)
    return weights, 2 * c.num_hidden_layers * batch * context * kv * 2
