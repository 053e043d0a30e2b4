"""The model that an evaluation's command line names: its options, and the errors in one line."""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable

import torch

from checkpoint import CheckpointError
from data.dataset import DataError
from data.tokenizer import LucieTokenizer, Tokenizer, TokenizerError
from loading import open_model, tokenizer_for, use_device
from model import Lucie


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run, checkpoint, hf:FOLDER_OR_NAME or 4-bit folder")
    parser.add_argument(
        "--tokenizer", help="ranks file, tokenizer.json or folder; default: the model's own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )


def open_with_tokenizer(args: argparse.Namespace) -> tuple[Lucie, Tokenizer | LucieTokenizer]:
    """The model and the tokenizer that the options of `add_model_options` ask for.

    Raises CheckpointError, TokenizerError, or ValueError for a device that is not there.
    """
    use_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, source = open_model(args.model, args.device, dtype)
    return model, tokenizer_for(model, args.tokenizer or source)


def make_room(model: Lucie, length: int) -> None:
    """Let a model run over `length` positions, trained on so many or not; theta stays."""
    trained = model.config.max_position_embeddings
    if length > trained:
        print(f"{length:,} tokens at once: the model was trained on {trained:,}", file=sys.stderr)
        model.config = dataclasses.replace(model.config, max_position_embeddings=length)
        model._rope_tables = None  # those of fewer positions, if it has run before


def fingerprint(model: Lucie) -> str:
    """What tells these weights, in their dtype, from any others: a hash of the end of each tensor.

    A step of training changes all of them; what is merged into some, as LoRA is, changes those.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        end = tensor.flatten()[-1024:].view(torch.uint8).cpu()
        digest.update(name.encode() + end.numpy().tobytes())
    return digest.hexdigest()[:16]


def command_line(name: str, main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run main, with its errors as one line; the exit code."""
    try:
        main(argv)
    except torch.OutOfMemoryError as error:
        print(f"{name}: out of memory ({str(error).splitlines()[0]})", file=sys.stderr)
        return 2
    except (CheckpointError, TokenizerError, DataError, ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
