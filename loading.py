"""A model for use: from a run of ours, a Hugging Face folder, or 4-bit weights, on one device.

Weights arrive tensor by tensor in the dtype they are used in, so that memory is never above the
model and one tensor more; matrices that are to be 4-bit are packed as they arrive.
"""

from pathlib import Path

import torch

import checkpoint
import hf_layout
import quantize
from data.tokenizer import LucieTokenizer, Tokenizer, TokenizerError
from data.tokenizer import load as load_tokenizer
from model import Lucie
from tensor_files import CheckpointError


def open_model(
    source: str, device: str, dtype: torch.dtype | None = None, int4: bool = False
) -> tuple[Lucie, str]:
    """(model, where its tokenizer lies: for data.tokenizer.load, "" if that is not known).

    source: a run or checkpoint directory, `hf:FOLDER_OR_NAME[@revision]`, or a folder in the
    Hugging Face layout, ours in 4 bits among them. dtype: None is bfloat16 on a GPU, else float32,
    and what a 4-bit folder was written in. Raises CheckpointError, before the first weight
    is read if there is not enough memory.
    """
    if source.startswith("hf:"):
        name, _, revision = source.removeprefix("hf:").partition("@")
        folder = hf_layout.folder_of(name, revision or None)
    else:
        folder = Path(source)
    config = _config(folder)
    if "quantization_config" in config:
        model = quantize.load(folder, device)
        if dtype not in (None, model.embed_tokens.weight.dtype):
            kept = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
            raise CheckpointError(f"{source}: its 4-bit weights are for {kept}, no other dtype")
        return model, str(folder)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    if "architectures" in config:
        architecture, tokenizer = hf_layout.config_of(folder), str(folder)
        weights = hf_layout.read(folder, architecture)
    else:
        newest = checkpoint.latest(folder)
        if newest is None:
            raise CheckpointError(f"{source}: no complete checkpoint there")
        options = checkpoint.read_state(newest)["config"]
        architecture, tokenizer = checkpoint.architecture(options), options["tokenizer"]
        weights = checkpoint.read(newest, architecture)
    if int4:
        model = quantize.build(architecture, weights, dtype, device, source)
    else:
        model = hf_layout.build(architecture, weights, dtype, device, source)
    return model, tokenizer


def use_device(device: str) -> None:
    """Make a GPU that is named by its number the current one, which CUDA graphs are captured on.

    Raises ValueError for a device that is not there.
    """
    try:
        torch.empty(1, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device} is not to be had here") from None


def tokenizer_for(model: Lucie, source: str) -> Tokenizer | LucieTokenizer:
    """The tokenizer that lies at `source`. Raises TokenizerError for none or another size."""
    if not source:
        raise TokenizerError("which vocabulary? --tokenizer=RANKS_FILE, tokenizer.json or folder")
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise TokenizerError(
            f"{source} has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}"
        )
    return tokenizer


def _config(folder: Path) -> dict:
    """The config.json of a folder, or nothing; who needs it will say what is wrong with it."""
    try:
        return hf_layout.read_json(folder / "config.json")
    except CheckpointError:
        return {}


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU, or this process in main memory; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 0
