"""The model that an evaluation's command line names."""

import argparse
import dataclasses
import hashlib
import sys

import torch

from checkpoint import open_model
from config.cli import Parser
from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer
from generate import use_device
from model import Lucie


def add_model_options(parser: Parser) -> None:
    parser.add_argument("model", help="run, checkpoint, hf:FOLDER_OR_NAME or 4-bit folder")
    parser.add_argument(
        "--tokenizer", help="ranks file, tokenizer.json or folder; default: the model's own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )


def open_with_tokenizer(args: argparse.Namespace) -> tuple[Lucie, Tokenizer]:
    """The model and the tokenizer that the options of `add_model_options` ask for.

    Raises CheckpointError, DataError, or ValueError for a device that is not available.
    """
    use_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, source = open_model(args.model, args.device, dtype)
    return model, tokenizers.load(args.tokenizer or source, model.config.vocab_size)


def make_room(model: Lucie, length: int) -> None:
    """Let a model run over `length` positions, more than it was trained on if need be."""
    trained = model.config.max_position_embeddings
    if length > trained:
        print(f"{length:,} tokens at once: the model was trained on {trained:,}", file=sys.stderr)
        model.config = dataclasses.replace(model.config, max_position_embeddings=length)
        model._rope_tables = None  # those of fewer positions, if it has run before


def fingerprint(model: Lucie) -> str:
    """A hash of the end of each tensor, which tells these weights and their dtype from any others.

    A step of training changes all of them; what is merged into some, as LoRA is, changes those.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        end = tensor.flatten()[-1024:].view(torch.uint8).cpu()
        digest.update(name.encode() + end.numpy().tobytes())
    return digest.hexdigest()[:16]
