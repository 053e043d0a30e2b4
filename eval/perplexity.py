"""How well a model predicts texts: bits per byte, perplexity, and the loss by position.

    python -m eval.perplexity out/extension --texts fr=fr.jsonl.gz en=en.jsonl.gz --csv bpb.csv
    python -m eval.perplexity out/extension --texts books=books/ --window 32000 \\
        --stride 16000 --min_tokens 32000 --png positions.png

Bits per byte compare models with different tokenizers; perplexity, e to the mean loss of a token,
does not. Each document is `<s>` and its text, without `</s>`; every token of the text is predicted
once. What is longer than a window is read in windows that begin a stride apart, each of which
scores the tokens that the one before did not reach: so a token sees all before it at the start of a
document, and at least window - stride tokens after that.

The loss by position is that of the tokens with so many before them in their document. The same
documents with a short and a long window tell what the context is worth; after an extension the
loss goes on falling to the new length. A window past the length a model was trained on is read as
if it had been, and said so.

Floor: 2 N FLOPs a token read, N without the input embedding and the head, and 2 H V a token scored.
A token is read window / stride times, and scored once.
"""

import argparse
import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import CheckpointError
from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError, size_of
from data.prepare import Source, find_files, read_documents
from data.tokenizer import Tokenizer
from eval.opening import add_model_options, make_room, open_with_tokenizer
from kernels.linear_cross_entropy import chunk_rows
from model import Lucie

# Positions fall into buckets that begin here: under 64, then by powers of two.
BUCKETS = [1, *(2**power for power in range(6, 16))]
BUCKET_NAMES = [*(f"{a}-{b - 1}" for a, b in pairwise(BUCKETS)), f"{BUCKETS[-1]}+"]
BATCH_TOKENS = 16_384  # in one forward pass, or one window if that is longer
POOL_TOKENS = 4 * BATCH_TOKENS  # read at a time, to be batched by length


class Window(NamedTuple):
    """A part of a document: all ids but the last are read, those from `ids[first + 1]` scored."""

    ids: list[int]
    first: int
    start: int  # tokens of the document before it, `<s>` among them


@dataclass
class Tally:
    """What a text has cost. `tokens` and `nats` are by position, one entry a bucket."""

    name: str
    documents: int = 0
    bytes: int = 0  # of UTF-8
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(BUCKETS)))
    nats: np.ndarray = field(default_factory=lambda: np.zeros(len(BUCKETS)))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats.sum() / self.tokens.sum()

    @property
    def perplexity(self) -> float:
        """Per token; infinite where it is over the largest float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats.sum() / math.log(2) / self.bytes


def evaluate(
    model: Lucie,
    tokenizer: Tokenizer,
    name: str,
    documents: Iterable[str],
    window: int = 4096,
    stride: int = 2048,
    min_tokens: int = 1,
) -> Tally:
    """The cost of all tokens of `documents` that have at least min_tokens of them.

    Raises DataError if there are none.
    """
    tally = Tally(name)

    def all_windows() -> Iterator[Window]:
        for text in documents:
            ids = tokenizer.encode_document(text)[:-1].tolist()  # without `</s>`
            if len(ids) > min_tokens:
                tally.documents += 1
                tally.bytes += len(text.encode("utf-8", "surrogatepass"))
                yield from windows(ids, window, stride)

    for batch in batches(all_windows()):
        for part, losses in zip(batch, token_losses(model, batch)):
            position = part.start + part.first + 1 + np.arange(len(losses))
            bucket = np.searchsorted(BUCKETS, position, side="right") - 1
            tally.tokens += np.bincount(bucket, minlength=len(BUCKETS))
            tally.nats += np.bincount(bucket, losses.double().numpy(), minlength=len(BUCKETS))
    if not tally.documents:
        raise DataError(f"{name}: no document with {min_tokens:,} tokens")
    return tally


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
    """Windows of like length together: BATCH_TOKENS at most with what pads them, or one window."""
    rest = iter(all_windows)
    while part := next(rest, None):
        pool, size = [part], len(part.ids)
        while size < POOL_TOKENS and (part := next(rest, None)):
            pool.append(part)
            size += len(part.ids)
        pool.sort(key=lambda part: -len(part.ids))  # what does not fit in memory fails at once
        while pool:
            count = max(1, BATCH_TOKENS // len(pool[0].ids))
            yield pool[:count]
            pool = pool[count:]


@torch.no_grad()
def token_losses(model: Lucie, batch: list[Window]) -> list[Tensor]:
    """The loss in nats of each token that a window scores: fp32 on the CPU, a tensor a window.

    The head sees the scored tokens only, a chunk at a time, so that all logits are never held.
    """
    device = model.embed_tokens.weight.device
    tokens = torch.zeros(len(batch), max(len(part.ids) for part in batch) - 1, dtype=torch.int64)
    for row, part in zip(tokens, batch):  # what pads comes after, unseen
        row[: len(part.ids) - 1] = torch.tensor(part.ids[:-1])
    hidden = model.hidden(tokens.to(device))
    rows = torch.cat([x[part.first : len(part.ids) - 1] for x, part in zip(hidden, batch)])
    targets = torch.tensor([i for part in batch for i in part.ids[part.first + 1 :]], device=device)
    chunk = chunk_rows(len(rows), model.config.vocab_size)
    losses = [
        F.cross_entropy(model.lm_head(x).float(), y, reduction="none")
        for x, y in zip(rows.split(chunk), targets.split(chunk))
    ]
    return list(torch.cat(losses).cpu().split([len(part.ids) - 1 - part.first for part in batch]))


# --- tables and pictures --------------------------------------------------------------------------


def by_position(t: Tally) -> dict[str, tuple[int, float]]:
    """{positions: (tokens, loss)} of the buckets that have tokens."""
    there = np.flatnonzero(t.tokens)
    return {BUCKET_NAMES[n]: (int(t.tokens[n]), t.nats[n] / t.tokens[n]) for n in there}


def print_tables(tallies: list[Tally]) -> None:
    """A line a text; then the loss by position, texts across."""
    width = max(15, *(len(tally.name) + 2 for tally in tallies))
    print(f"{'text':{width}}documents       bytes      tokens  bits/byte  perplexity    loss")
    for t in tallies:
        print(
            f"{t.name:{width}}{t.documents:9,}{t.bytes:12,}{int(t.tokens.sum()):12,}"
            f"{t.bits_per_byte:11.4f}{t.perplexity:12.3f}{t.loss:8.4f}"
        )
    losses = [by_position(tally) for tally in tallies]
    print(f"\n{'loss by position':{width + 2}}" + "".join(f"{t.name:>{width}}" for t in tallies))
    for name in BUCKET_NAMES:
        row = [f"{found[name][1]:.4f}" if name in found else "" for found in losses]
        if any(row):
            print(f"{name:{width + 2}}" + "".join(f"{loss:>{width}}" for loss in row))


def write_csv(tallies: list[Tally], path: Path) -> None:
    """A row for each text ("all"), then one for each bucket of positions that has tokens."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        head = "text positions tokens loss documents bytes bits_per_byte perplexity"
        writer.writerow(head.split())
        for t in tallies:
            whole = (t.documents, t.bytes, f"{t.bits_per_byte:.6f}", f"{t.perplexity:.4f}")
            writer.writerow((t.name, "all", int(t.tokens.sum()), f"{t.loss:.6f}", *whole))
            for name, (tokens, loss) in by_position(t).items():
                writer.writerow((t.name, name, tokens, f"{loss:.6f}", "", "", "", ""))


def draw(trained: int, tallies: list[Tally], path: Path) -> None:
    """The loss by position, a line a text. trained: the length a dashed line marks."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # The middle of a bucket on a logarithmic axis; the last has no end, but is drawn as wide.
    middle = np.sqrt(np.array(BUCKETS) * np.array([*BUCKETS[1:], 2 * BUCKETS[-1]]))
    for tally in tallies:
        there = np.flatnonzero(tally.tokens)
        losses = tally.nats[there] / tally.tokens[there]
        axes.plot(middle[there], losses, "o-", ms=4, label=tally.name)
    axes.axvline(trained, color="black", ls="--", lw=1, label=f"trained on {trained:,}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before it in the document")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


# --- the command ----------------------------------------------------------------------------------


def read(files: list[Source], limit: int | None, bar: tqdm) -> Iterator[str]:
    """The documents of files: all, with a bar over the files' bytes, or up to `limit` bytes in all;
    the last is cut there, before a character."""
    if not limit:
        sizes = [size_of(file) for file in files]
        bar.total = None if None in sizes else sum(sizes)
        yield from read_documents(files, bar)
        return
    bar.total = limit
    for text in read_documents(files):
        content = text.encode("utf-8", "surrogatepass")[: limit - bar.n]
        yield content.decode("utf-8", "ignore")
        bar.update(len(content))
        if bar.n >= limit:
            return


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="eval.perplexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--texts", nargs="+", required=True, metavar="NAME=FILES", help="a file, folder or glob"
    )
    parser.add_argument("--window", type=int, default=4096, help="tokens read at once")
    parser.add_argument(
        "--stride", type=int, help="from one window to the next; default: half a window"
    )
    parser.add_argument("--bytes", type=int, help="read only so many of each text")
    parser.add_argument("--min_tokens", type=int, default=1, help="skip shorter documents")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.window < 1:
        raise ConfigError("--window must be at least 1")
    if args.stride is None:
        args.stride = max(1, args.window // 2)
    if not 1 <= args.stride <= args.window:
        raise ConfigError(f"a stride is 1 to the window's {args.window:,}, not {args.stride:,}")
    if args.min_tokens < 1 or (args.bytes is not None and args.bytes < 1):
        raise ConfigError("--bytes and --min_tokens must be at least 1")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    texts: dict[str, list[Source]] = {}
    for given in args.texts:
        name, _, pattern = given.partition("=")
        if not (name and pattern):
            raise ConfigError(f"{given}: a text is NAME=FILES")
        texts.setdefault(name, []).extend(find_files([pattern]))
    model, tokenizer = open_with_tokenizer(args)
    trained = model.config.max_position_embeddings
    make_room(model, args.window)
    tallies = []
    for name, files in texts.items():
        with tqdm(unit="B", unit_scale=True, desc=name) as bar:
            documents = read(files, args.bytes, bar)
            sizes = (args.window, args.stride, args.min_tokens)
            tallies.append(evaluate(model, tokenizer, name, documents, *sizes))
    print_tables(tallies)
    for path, make in ((args.csv, write_csv), (args.png, partial(draw, trained))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(tallies, path)


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
