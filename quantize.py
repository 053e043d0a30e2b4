"""4-bit weights for inference: Lucie-7B in 4.3 GB, and 0.3 GB more for 2,048 tokens of context.

    DIR/model.safetensors      or several files under 5 GB and their index
        config.json            Hugging Face's keys, and "quantization_config"
        tokenizer.json ...     if the tokenizer is known

The matrices of the blocks are packed (kernels/int4_linear.py says how and why). The embedding,
a look-up of a few rows, and the norms stay as they are, and so does the head: in 4 bits it would
save 0.39 GB and a tenth of the time of a token, but on small models it alone raised perplexity more
than all blocks together (docs/kernels.md).

A model is quantized before it is filled, on the meta device, so that only one of its tensors is
ever in memory in full.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import hf
from hf import CheckpointError
from kernels.int4_linear import GROUP, int4_linear, pack
from model import Lucie, LucieConfig

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
        """Quantize `[rows, in_features]` into the rows from `first` on."""
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
    pieces: list[hf.Piece],
    dtype: torch.dtype,
    device: torch.device | str,
    label: object,
) -> Lucie:
    """A quantized model, its matrices packed as they are read; dtype: of everything else.

    Raises CheckpointError if there is not enough memory, or for weights that are not finite.
    """
    with torch.device("meta"):
        model = quantize_(Lucie(config).to(dtype))
    hf.allocate(model, device, label)
    fill(model, hf.read(pieces))
    return model


@torch.no_grad()
def fill(model: Lucie, weights: Iterable[tuple[str, int, Tensor]]) -> None:
    """Fill a quantized model that has memory, from (parameter of the model before it was quantized,
    first row, rows). Raises CheckpointError for weights that are not finite."""
    packed = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    parameters = dict(model.named_parameters())
    for name, first, rows in weights:
        if name not in packed:
            parameters[name][first : first + len(rows)] = rows.to(parameters[name])
            continue
        try:
            packed[name].set_rows(first, rows)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None


def save(model: Lucie, folder: str | Path, tokenizer: str = "") -> None:
    """Write a quantized model; tokenizer: a path for data.tokenizer.load.

    Raises CheckpointError if the folder exists, there is no room, or the model is not quantized.
    """
    sizes = {m.group_size for m in model.modules() if isinstance(m, Int4Linear)}
    if len(sizes) != 1:
        raise CheckpointError(f"{folder}: the model is not quantized")
    config = hf.config_json(model, model.embed_tokens.weight.dtype)
    config["quantization_config"] = {"quant_method": METHOD, "group_size": sizes.pop()}
    files = {"config.json": config}
    vocab_size = model.config.vocab_size
    hf.write_folder(Path(folder), model.state_dict(), None, files, tokenizer, vocab_size)


def is_int4(folder: Path) -> bool:
    """Whether `save` has written a Hugging Face folder."""
    method = hf.read_json(folder / "config.json").get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == METHOD


@torch.no_grad()
def load(folder: str | Path, device: torch.device | str = "cpu") -> Lucie:
    """The model of a folder that `save` has written, in the dtypes it was written with.

    Raises CheckpointError: a missing or damaged file, a tensor that is missing, unknown or of
    another shape or dtype, and before any is read, not enough memory.
    """
    folder = Path(folder)
    config, values = hf.config_of(folder), hf.read_json(folder / "config.json")
    if not is_int4(folder):
        raise CheckpointError(f"{folder}: does not hold nanoLucie's 4-bit weights")
    try:
        dtype = getattr(torch, values["torch_dtype"])
        group_size = values["quantization_config"]["group_size"]
        with torch.device("meta"):
            model = quantize_(Lucie(config).to(dtype), group_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None
    hf.allocate(model, device, folder)
    missing = model.state_dict()  # the tensors to be filled, by name
    with hf.bytes_bar("reading weights", sum(x.nbytes for x in missing.values())) as bar:
        for path in hf.files_of(folder):
            with hf.opened(path) as file:
                for name in file.keys():
                    tensor, ours = file.get_tensor(name), missing.pop(name, None)
                    if ours is None:
                        raise CheckpointError(f"{path}: {name} is unknown or comes twice")
                    if (tensor.dtype, tensor.shape) != (ours.dtype, ours.shape):
                        raise CheckpointError(
                            f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                            f"not {ours.dtype} {list(ours.shape)}"
                        )
                    ours.copy_(tensor)
                    bar.update(tensor.nbytes)
    if missing:
        raise CheckpointError(f"{folder}: lacks {next(iter(missing))} and {len(missing) - 1} more")
    return model
