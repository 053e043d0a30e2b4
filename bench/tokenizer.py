"""Speed of our tokenizers against the `tokenizers` library, every id compared on the way.

    python -m bench.tokenizer TOKENIZER_JSON FILES... [--megabytes 20]

FILES are what data.prepare reads. Their texts are encoded as they are (documents) and cut into
lines. MB are 10^6 bytes of UTF-8; a time ends when ids are a Python list, or for our
encode_document, as data.prepare uses it, an array. The library also uses all cores, by threads.

The floor is the memory read once, some GB/s: encoding is bound by its branches, not by bytes.

Exit code 1 where ids differ. Texts that spell a special token ("<s>") are left out: encode reads
it, encode_document does not.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError
from data.prepare import find_files, read_documents
from data.tokenizer import SPECIAL_TOKENS, load

CHUNK = 1_000_000  # bytes given to a library at a time

Encode = Callable[[list[str]], list[list[int]]]


class DifferenceError(Exception):
    """Ids that are not those of the library."""


def read(files: list[Path], limit: int) -> tuple[list[str], list[str]]:
    """Documents of about `limit` bytes in all, the same share of each file; and their lines."""
    documents = []
    for file in files:
        left = limit / len(files)
        for text in read_documents([file]):
            if text and not any(token in text for token in SPECIAL_TOKENS):
                documents.append(text)
                left -= len(text.encode())
            if left <= 0:
                break
    return documents, [line for text in documents for line in text.splitlines() if line]


def size(texts: Iterable[str]) -> float:
    """In MB."""
    return sum(len(text.encode()) for text in texts) / 1e6


def chunks(texts: list[str]) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of texts of about CHUNK bytes."""
    first, bytes_ = 0, 0
    for end, text in enumerate(texts, start=1):
        bytes_ += len(text.encode())
        if bytes_ >= CHUNK or end == len(texts):
            yield first, end
            first, bytes_ = end, 0


def measure(peers: dict[str, Encode], texts: list[str], expected: list) -> dict[str, float]:
    """MB/s of each, in turns, so that a machine whose speed drifts favours nobody.

    Raises DifferenceError for the first text whose ids are not the expected ones.
    """
    seconds = dict.fromkeys(peers, 0.0)
    for first, end in tqdm(list(chunks(texts)), unit="MB", leave=False):
        for name, encode in peers.items():
            start = time.perf_counter()
            ids = encode(texts[first:end])
            seconds[name] += time.perf_counter() - start
            compare(ids, texts[first:end], expected[first:end], name)
    return {name: size(texts) / spent for name, spent in seconds.items()}


def compare(ids: list, texts: list[str], expected: list, name: str) -> None:
    for text, a, b in zip(texts, ids, expected, strict=True):
        if list(a) != list(b):
            at = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            raise DifferenceError(f"{name}: ids differ from ours at {at} of {text[:60]!r}")


def run(path: Path, texts: list[str]) -> dict[str, float]:
    """MB/s of each for the texts; the first is ours on one core."""
    import tokenizers

    ours = load(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    theirs = tokenizers.Tokenizer.from_file(str(file))
    one_core: dict[str, Encode] = {
        "ours, encode": lambda batch: [ours.encode(text) for text in batch],
        "ours, encode_document": lambda batch: [ours.encode_document(text)[:-1] for text in batch],
        "tokenizers, encode": lambda batch: [theirs.encode(text).ids for text in batch],
        "tokenizers, encode_batch": lambda batch: [e.ids for e in theirs.encode_batch(batch)],
        "tokenizers, encode_batch_fast": lambda batch: [
            e.ids for e in theirs.encode_batch_fast(batch)
        ],
    }
    expected = one_core["ours, encode"](texts)
    # The library reads this at every call.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rates = measure(one_core, texts, expected)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    batches = list(one_core.items())[3:]
    all_cores = {f"{name}, {os.cpu_count()} cores": encode for name, encode in batches}
    return rates | measure(all_cores, texts, expected)


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="bench.tokenizer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, or the folder it is in")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--megabytes", type=float, default=20, help="of text, at most (about)")
    args = parser.parse_args(argv)
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("pip install tokenizers, to compare with it") from None
    documents, lines = read(find_files(args.files), int(args.megabytes * 1e6))
    if not documents:
        raise DataError("the files hold no text")
    try:
        tables = [run(args.tokenizer, texts) for texts in (documents, lines)]
    except DifferenceError as error:
        print(f"bench.tokenizer: {error}", file=sys.stderr)
        return 1
    print(
        f"{size(documents):.1f} MB, {len(documents):,} documents, {len(lines):,} lines; "
        f"tokenizers {tokenizers.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores; every id the same"
    )
    print(f"{'MB/s (and how many times faster our encode is)':50} {'documents':>16} {'lines':>16}")
    for name in tables[0]:
        rates = [f"{t[name]:8.2f} ({t['ours, encode'] / t[name]:4.1f}x)" for t in tables]
        print(f"{name:50} {rates[0]:>16} {rates[1]:>16}")
    return 0


if __name__ == "__main__":
    run_cli(main, DataError)
