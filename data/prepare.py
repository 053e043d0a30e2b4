"""From raw text to token streams.

    python -m data.prepare tokens FILES... --tokenizer ranks.tiktoken --out data/mine/fr
    python -m data.prepare tokenizer FILES... --vocab-size 65024 --out ranks.tiktoken
    python -m data.prepare demo --out out/demo_data

FILES are folders, .txt (one document), .jsonl or .jsonl.gz (one JSON object with a "text" a line).
`tokens` writes OUT.bin and OUT.idx (see data/dataset.py), each document as `<s> text </s>`; with
--validation 0.01, one document in a hundred goes to OUT.valid.bin and .idx instead. `demo` makes
the corpus, vocabulary and mixtures of `make demo` without any network.
"""

import argparse
import csv
import gzip
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import tee
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import bpe_training, demo_corpus, tokenizer
from data.dataset import DTYPES, HEADER, MAGIC, DataError
from data.tokenizer import LucieTokenizer, Tokenizer, TokenizerError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")

AnyTokenizer = Tokenizer | LucieTokenizer
DEMO_VOCAB_SIZE = 4096
# Lucie's shares of the main phase by language; then, for the annealing phase, facts in place of the
# mathematics, science, encyclopedia and dialogue of the real one.
PUBLISHED = {
    "en": 0.332, "fr": 0.324, "code": 0.147, "de": 0.069, "es": 0.066, "it": 0.038,
    "parallel": 0.025,
}  # fmt: skip
DEMO_MIXTURES = {
    "pretraining": PUBLISHED,
    "extension": PUBLISHED,
    "annealing": {"facts": 0.78, "arithmetic": 0.05, "en": 0.08, "fr": 0.03, "code": 0.06},
}


class StreamWriter:
    """Writes PATH.bin and PATH.idx in Megatron's indexed format, complete or not at all."""

    def __init__(self, path: str | Path, vocab_size: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # uint16 holds ids to 65,535; past that Megatron's own choice is int32.
        self.dtype = np.dtype(np.uint16 if vocab_size <= 65_535 else np.int32)
        self.lengths: list[int] = []
        self._bin = open(f"{path}.bin.tmp", "wb")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document."""
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(len(tokens))

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        try:
            with self._bin as f:
                f.flush()
                os.fsync(f.fileno())
            if not failed:
                self._finish()
        finally:
            for suffix in (".bin.tmp", ".idx.tmp"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _finish(self) -> None:
        count = len(self.lengths)
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        with open(f"{self.path}.idx.tmp", "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
            f.write(np.array(self.lengths, np.int32).tobytes())
            f.write(np.concatenate(([0], ends[:-1])).astype(np.int64).tobytes())
            f.write(np.arange(count + 1, dtype=np.int64).tobytes())
            f.flush()
            os.fsync(f.fileno())
        # Never an old index beside new tokens: without its index a stream is not there.
        Path(f"{self.path}.idx").unlink(missing_ok=True)
        os.replace(f"{self.path}.bin.tmp", f"{self.path}.bin")
        os.replace(f"{self.path}.idx.tmp", f"{self.path}.idx")


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The text files named or found in folders, in a fixed order."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
        elif path.is_file() and path.name.endswith(SUFFIXES):
            files.append(path)
        else:
            raise DataError(f"{path}: not a folder nor a {', '.join(SUFFIXES)} file")
    return files


def read_documents(files: Iterable[Path], progress: tqdm | None = None) -> Iterator[str]:
    """The texts of the files, one by one. Raises DataError with file and line for a bad one."""
    for path in files:
        with open(path, "rb") as raw:
            opened = gzip.open(raw) if path.suffix == ".gz" else raw
            lines = [opened.read()] if path.suffix == ".txt" else opened
            done = 0
            for number, line in enumerate(_readable(lines, path), start=1):
                try:
                    text = line.decode("utf-8")
                    if path.suffix != ".txt":
                        text = json.loads(text)["text"] if text.strip() else ""
                except (ValueError, KeyError, TypeError) as error:
                    reason = "no text field" if isinstance(error, (KeyError, TypeError)) else error
                    raise DataError(f"{path}, line {number}: {reason}") from None
                if not isinstance(text, str):
                    raise DataError(f"{path}, line {number}: its text is not a string")
                yield text
                if progress is not None:
                    progress.update(raw.tell() - done)
                    done = raw.tell()


def _readable(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (OSError, EOFError) as error:  # a broken or truncated gzip file
        raise DataError(f"{path}: {error}") from None


def tokenize(
    documents: Iterable[str],
    encoder: AnyTokenizer,
    out: str | Path,
    validation: float = 0.0,
    workers: int = 1,
) -> dict[str, int]:
    """Write the documents to the stream `out`, and a share of them to `out.valid`.

    Returns counts: documents, tokens, empty (skipped), validation (documents held out). Which
    document is held out depends on its text alone. The order of documents, and so every byte
    written, is the same for any number of workers.
    """
    if not 0 <= validation < 1:
        raise DataError(f"validation is a share from 0 to under 1, not {validation}")
    counts = {"documents": 0, "tokens": 0, "empty": 0, "validation": 0}
    with ExitStack() as streams:
        writers = {"train": streams.enter_context(StreamWriter(out, encoder.vocab_size))}
        if validation:
            held_out = StreamWriter(f"{out}.valid", encoder.vocab_size)
            writers["validation"] = streams.enter_context(held_out)
        for part, tokens in _encode_all(documents, encoder, validation, workers):
            if part == "empty":
                counts["empty"] += 1
                continue
            writers[part].add(tokens)
            counts["documents"] += 1
            counts["tokens"] += len(tokens)
            counts["validation"] += part == "validation"
        for part, writer in writers.items():
            if not writer.lengths:
                raise DataError(f"{out}: no document for {part}: the corpus is empty or too small")
    return counts


def _encode_all(
    documents: Iterable[str], encoder: AnyTokenizer, validation: float, workers: int
) -> Iterator[tuple[str, np.ndarray]]:
    read, texts = tee(documents)  # texts: those read ahead
    for tokens, text in zip(encoder.encode_batch(read, workers), texts):
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        part = "empty" if not text.strip() else "validation" if share < validation else "train"
        yield part, tokens


def write_mixture(path: Path, weights: dict[str, float], suffix: str = "") -> None:
    """A mixture CSV of the streams that lie beside it."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("name", "path", "weight"))
        writer.writerows((name, name + suffix, weight) for name, weight in weights.items())


def prepare_demo(out: Path) -> None:
    """Corpus, vocabulary, streams and mixtures of the demo, in `out`."""
    documents = {source: list(demo_corpus.documents(source, "train")) for source in PUBLISHED}
    # The vocabulary sees each source in its share of the mixture.
    sample = []
    for source, share in PUBLISHED.items():
        size, left = len(PUBLISHED) * share, 200_000
        for text in random.Random(source).sample(documents[source], len(documents[source])):
            if left <= 0:
                break
            sample.append(text)
            left -= len(text) / size
    tokenizer.save(bpe_training.train(sample, DEMO_VOCAB_SIZE), out / "ranks.tiktoken")
    ranks = tokenizer.load(out / "ranks.tiktoken")
    for source in tqdm(demo_corpus.SOURCES, desc="tokenize", unit="source"):
        for split, suffix in (("train", ""), ("valid", ".valid")):
            if split == "train" and source in documents:
                texts = documents[source]
            else:
                texts = demo_corpus.documents(source, split)
            with StreamWriter(out / f"{source}{suffix}", ranks.vocab_size) as stream:
                for _, tokens in _encode_all(texts, ranks, 0.0, 1):
                    stream.add(tokens)
    for name, weights in DEMO_MIXTURES.items():
        write_mixture(out / f"{name}.csv", weights)
    write_mixture(out / "validation.csv", PUBLISHED, ".valid")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text files to a token stream")
    tokens.add_argument("files", nargs="+")
    tokens.add_argument("--tokenizer", required=True, help="ranks file or tokenizer.json")
    tokens.add_argument("--out", required=True, help="stream to write, without suffix")
    tokens.add_argument("--validation", type=float, default=0.0, help="share of documents held out")
    tokens.add_argument("--workers", type=int, default=os.cpu_count())
    vocabulary = commands.add_parser("tokenizer", help="learn a vocabulary from text files")
    vocabulary.add_argument("files", nargs="+")
    vocabulary.add_argument("--vocab-size", type=int, default=65_024)
    vocabulary.add_argument("--out", required=True, help="ranks file to write")
    demo = commands.add_parser("demo", help="the corpus of make demo")
    demo.add_argument("--out", default="out/demo_data")
    args = parser.parse_args(argv)
    try:
        if args.command == "demo":
            prepare_demo(Path(args.out))
            return
        encoder = tokenizer.load(args.tokenizer) if args.command == "tokens" else None
        files = find_files(args.files)
        size = sum(path.stat().st_size for path in files)
        with tqdm(total=size, unit="B", unit_scale=True, desc=args.command) as progress:
            documents = read_documents(files, progress)
            if encoder is None:
                tokenizer.save(bpe_training.train(documents, args.vocab_size), args.out)
                return
            counts = tokenize(documents, encoder, args.out, args.validation, max(1, args.workers))
        print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    except (DataError, TokenizerError) as error:
        sys.exit(_fail(error))
    except OSError as error:
        sys.exit(_fail(f"{error.filename or args.out}: {error.strerror}; nothing was kept"))
    except BrokenProcessPool:
        sys.exit(_fail("a worker process died, perhaps for want of memory; try --workers=1"))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: object) -> int:
    print(f"data.prepare: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
