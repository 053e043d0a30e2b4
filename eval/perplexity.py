"""How well a model predicts texts: bits per byte, perplexity, and the loss by position.

    python -m eval.perplexity out/extension --texts fr=fr.jsonl.gz en=en.jsonl.gz --out bpb.csv
    python -m eval.perplexity out/extension --texts books=books/ --window 4096 --min_tokens 32000

Bits per byte compare models with different tokenizers; perplexity, e to the mean loss of a token,
does not. Each document is `<s>` and its text, without `</s>`; every token of the text is predicted
once. A longer document is read in windows that begin a stride apart, each of which scores the
tokens that the one before did not reach: a token sees at least window - stride tokens before it, or
everything at the start of a document. The loss by position is that of the tokens with so many
before them in their document: after an extension it keeps falling up to the new length.

Floor: 2 N FLOPs per token read, N without the input embedding and the head, and 2 D V per token
scored. A token is read window / stride times, and scored once.
"""

import argparse
import csv
import dataclasses
import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import generate
from checkpoint import CheckpointError
from config.cli import ConfigError, Parser, run_cli, write_file
from data.dataset import DataError, size_of
from data.files import find_files, read_documents
from data.tokenizer import Tokenizer
from model import Lucie

# Positions fall into buckets that begin here: below 64, then powers of two.
BUCKETS = [1, *(2**power for power in range(6, 16))]
BUCKET_NAMES = [*(f"{a}-{b - 1}" for a, b in pairwise(BUCKETS)), f"{BUCKETS[-1]}+"]
COLUMNS = "text positions tokens loss documents bytes bits_per_byte perplexity".split()
BATCH_TOKENS = 16_384  # in one forward pass, or one window if that is longer
POOL = 256  # windows that are read ahead, to be batched by length
HEAD_ROWS = 1024  # positions whose logits exist at one time: 266 MB of fp32 for 65,024 tokens


# --- what harness.py and needle.py use, too -------------------------------------------------------


def model_parser(prog: str, description: str | None) -> Parser:
    """The parser of a command whose first options say which model, and how it runs."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("model", help="run, checkpoint, hf:FOLDER_OR_NAME or 4-bit folder")
    parser.add_argument(
        "--tokenizer", help="ranks file, tokenizer.json or folder; default: the model's own"
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--device", default="cuda" if cuda else "cpu", help="where it runs; default: %(default)s"
    )
    dtype = "of weights and compute; default: bfloat16 on a GPU, else float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
    return parser


def open_model(args: argparse.Namespace, source: str) -> tuple[Lucie, Tokenizer]:
    """The model and tokenizer of a source, with the options of `model_parser`.

    Raises CheckpointError, DataError, or ValueError for a device that is not available.
    """
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return generate.load(source, args.device, dtype, args.tokenizer)


def newest_of(source: str) -> tuple[str, Path]:
    """(the newest checkpoint of a run, or the source itself; the folder for results).

    Results of a run or checkpoint belong in the run, those of a local folder in the folder, and
    those of a model of the Hugging Face hub in out/NAME.
    """
    newest = None if source.startswith("hf:") else checkpoint.latest(source)
    if newest is None:
        path = Path(source.removeprefix("hf:"))
        return source, path if path.is_dir() else Path("out", path.name)
    in_run = newest.absolute().parent.name == "checkpoints"
    return str(newest), newest.parent.parent if in_run else newest


def make_room(model: Lucie, length: int) -> None:
    """Let a model run over `length` positions, more than it was trained on if need be."""
    trained = model.config.max_position_embeddings
    if length > trained:
        print(f"{length:,} tokens at once: the model was trained on {trained:,}", file=sys.stderr)
        model.config = dataclasses.replace(model.config, max_position_embeddings=length)
        model._rope_tables = None  # the tables of fewer positions, if the model has run before


@torch.no_grad()
def token_scores(model: Lucie, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability in nats of each target, fp32; whether it is the likeliest token).

    hidden: the last layer's output before each target, `[n, hidden_size]`. The head sees HEAD_ROWS
    of them at a time.
    """
    nats, likeliest = [], []
    for x, y in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
        logits = model.lm_head(x).float()
        nats.append(-F.cross_entropy(logits, y, reduction="none"))
        likeliest.append(logits.argmax(-1) == y)
    return torch.cat(nats), torch.cat(likeliest)


def write_table(file: Path, columns: Sequence[str], rows: Iterable[Iterable]) -> None:
    """Write a CSV with a heading, in one piece, into a folder that need not exist."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text.getvalue().encode())


# --- what texts cost -----------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of a document: all ids but the last are read, those from `ids[first + 1]` scored."""

    ids: list[int]
    first: int
    start: int  # tokens of the document before the window, `<s>` among them


def evaluate(
    model: Lucie,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    window: int = 4096,
    stride: int = 2048,
    min_tokens: int = 1,
) -> list[tuple]:
    """What the documents cost that have at least min_tokens: the values of COLUMNS but the first.

    A row is of all tokens, those after it of each bucket of positions that has tokens. Raises
    DataError if there is no such document.
    """
    sizes: list[int] = []  # bytes of documents
    tokens, nats = np.zeros(len(BUCKETS), np.int64), np.zeros(len(BUCKETS))

    def all_windows() -> Iterator[Window]:
        for text in documents:
            ids = tokenizer.encode_document(text)[:-1].tolist()  # without `</s>`
            if len(ids) > min_tokens:
                sizes.append(len(text.encode("utf-8", "surrogatepass")))
                yield from windows(ids, window, stride)

    for batch in batches(all_windows()):
        positions, losses = token_losses(model, batch)
        bucket = np.searchsorted(BUCKETS, positions, side="right") - 1
        tokens += np.bincount(bucket, minlength=len(BUCKETS))
        nats += np.bincount(bucket, losses, minlength=len(BUCKETS))
    if not sizes:
        raise DataError(f"no document with {min_tokens:,} tokens")
    loss, bits = nats.sum() / tokens.sum(), nats.sum() / math.log(2) / sum(sizes)
    whole = (len(sizes), sum(sizes), f"{bits:.6f}", f"{math.exp(loss):.4f}")
    rows = [("all", tokens.sum(), f"{loss:.6f}", *whole)]
    for name, count, sum_of_nats in zip(BUCKET_NAMES, tokens, nats):
        if count:
            rows.append((name, count, f"{sum_of_nats / count:.6f}", "", "", "", ""))
    return rows


def windows(ids: list[int], window: int, stride: int) -> Iterator[Window]:
    """The windows of a document: at most `window` tokens are read, and each but the first id is
    scored once, in the first window that reaches it."""
    scored, last = 0, len(ids) - 1
    for start in range(0, last, stride):
        end = min(start + window, last)
        yield Window(ids[start : end + 1], scored - start, start)
        scored = end
        if end == last:
            return


def batches(all_windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Windows of similar lengths together: at most BATCH_TOKENS with padding, or one window."""
    rest = iter(all_windows)
    while pool := list(islice(rest, POOL)):
        pool.sort(key=lambda part: -len(part.ids))  # a lack of memory shows at once
        while pool:
            count = max(1, BATCH_TOKENS // len(pool[0].ids))
            yield pool[:count]
            pool = pool[count:]


@torch.no_grad()
def token_losses(model: Lucie, batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """(positions in their documents, losses in nats, fp64) of all tokens that windows score."""
    device = model.embed_tokens.weight.device
    tokens = torch.zeros(len(batch), max(len(part.ids) for part in batch) - 1, dtype=torch.int64)
    for row, part in zip(tokens, batch):  # the padding comes after the window, which is causal
        row[: len(part.ids) - 1] = torch.tensor(part.ids[:-1])
    hidden = model.hidden(tokens.to(device))
    rows = torch.cat([x[part.first : len(part.ids) - 1] for x, part in zip(hidden, batch)])
    targets = torch.tensor([i for part in batch for i in part.ids[part.first + 1 :]], device=device)
    spans = [np.arange(part.first + 1, len(part.ids)) + part.start for part in batch]
    return np.concatenate(spans), -token_scores(model, rows, targets)[0].cpu().double().numpy()


# --- the command ----------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = model_parser("python -m eval.perplexity", __doc__)
    parser.add_argument(
        "--texts", nargs="+", required=True, metavar="NAME=FILES", help="a file, folder or glob"
    )
    parser.add_argument("--window", type=int, help="tokens read at once; default: the model's own")
    parser.add_argument("--stride", type=int, help="between two windows; default: half a window")
    parser.add_argument("--min_tokens", type=int, default=1, help="skip shorter documents")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table here, too")
    args = parser.parse_args(argv)
    for name in ("window", "stride", "min_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    files_of: dict[str, list] = {}
    for given in args.texts:
        name, _, pattern = given.partition("=")
        if not (name and pattern):
            raise ConfigError(f"{given}: a text is NAME=FILES")
        files_of.setdefault(name, []).extend(find_files([pattern]))
    model, tokenizer = open_model(args, args.model)
    trained = model.config.max_position_embeddings
    window = args.window or trained
    stride = args.stride or max(1, window // 2)
    if stride > window:
        raise ConfigError(f"--stride must be at most the window of {window:,}, not {stride:,}")
    make_room(model, window)
    rows = []
    for name, files in files_of.items():
        sizes = [size_of(file) or 0 for file in files]
        with tqdm(unit="B", unit_scale=True, desc=name, total=sum(sizes)) as bar:
            texts = read_documents(files, bar)
            found = evaluate(model, tokenizer, texts, window, stride, args.min_tokens)
        rows += [(name, *values) for values in found]
    for row in (COLUMNS, *rows):
        print("".join(f"{value!s:>14}" for value in row))
    if args.out:
        write_table(args.out, COLUMNS, rows)


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
