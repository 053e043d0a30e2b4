"""Looking at token streams: the text of any sample, whether files are whole, how much there is.

The commands are those of `python -m data.dataset`: show, verify, count. All read a mixture's CSV.

`verify` reads every byte once, so it is as slow as the disk or one core's SHA-256. It checks the
index (documents follow one another without gap or overlap, to the end of the tokens), the ids
against a vocabulary, and both files against the checksums that data.prepare wrote beside them.
"""

import argparse
import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config.cli import ConfigError, Parser
from data import tokenizer
from data.dataset import Mixture, present_rows, read_rows
from data.token_stream import HEADER, DataError, TokenStream, size_of, stream_files

CHUNK = 1 << 22  # bytes of tokens, or entries of an index, looked at together


class Index:
    """What an .idx file says of the documents of a stream. Mapped: as much is read as is used."""

    def __init__(self, stream: TokenStream) -> None:
        if not isinstance(stream.idx, Path):
            raise DataError(f"{stream.path}: show and verify read files on this machine only")
        self.stream, count = stream, stream.sequences
        # A map cannot be empty; an empty stream has no lengths to look at.
        self.lengths = _mapped(stream.idx, np.int32, HEADER.size, count)
        self.offsets = _mapped(stream.idx, np.int64, HEADER.size + 4 * count, count)
        at = HEADER.size + 12 * count
        self.boundaries = _mapped(stream.idx, np.int64, at, stream.documents + 1)

    def document_at(self, token: int) -> tuple[int, int, int]:
        """(document, its first token, the token after its last) for a token of the stream."""
        sequence = bisect_right(self.offsets, token * self.stream.dtype.itemsize) - 1
        document = bisect_right(self.boundaries, sequence) - 1
        if not 0 <= document < self.stream.documents:
            raise DataError(f"{self.stream.idx}: no document holds token {token:,}")
        return document, self._token(document), self._token(document + 1)

    def _token(self, document: int) -> int:
        """Where a document begins; the one after the last begins at the end."""
        sequence = int(self.boundaries[document])
        if sequence >= self.stream.sequences:
            return self.stream.tokens
        return int(self.offsets[sequence]) // self.stream.dtype.itemsize

    def faults(self) -> Iterator[str]:
        """What is wrong with it."""
        count, size = self.stream.sequences, self.stream.dtype.itemsize
        expected = HEADER.size + 12 * count + 8 * (self.stream.documents + 1)
        if (found := self.stream.idx.stat().st_size) != expected:
            yield f"{self.stream.idx}: {found:,} bytes where its header says {expected:,}"
        end = 0
        for first in range(0, count, CHUNK):
            lengths = np.array(self.lengths[first : first + CHUNK], np.int64)
            offsets = self.offsets[first : first + CHUNK]
            ends = end + np.cumsum(lengths) * size
            wrong = np.flatnonzero((lengths < 0) | (offsets != ends - lengths * size))
            if len(wrong):
                yield f"{self.stream.idx}: sequence {first + wrong[0]:,} does not follow the last"
                return
            end = int(ends[-1])
        if (found := self.stream.bin.stat().st_size) != end:
            yield f"{self.stream.bin}: {found:,} bytes where its index says {end:,}"
        ends_well = self.boundaries[0] == 0 and self.boundaries[-1] == count
        for first in range(0, len(self.boundaries), CHUNK):
            ends_well &= bool((np.diff(self.boundaries[first : first + CHUNK + 1]) >= 0).all())
        if not ends_well:
            yield f"{self.stream.idx}: the documents' boundaries do not run from 0 to {count:,}"


def _mapped(path: Path, dtype: type, offset: int, count: int) -> np.ndarray:
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


class Piece(NamedTuple):
    """The part of a sample that lies in one document."""

    document: int  # from 0, in the order of the file
    start: int  # its first token in the sample, counted in the document
    end: int  # the one after its last
    length: int  # tokens of the whole document
    tokens: np.ndarray  # int64 `[end - start]`


def pieces(mixture: Mixture, i: int) -> list[Piece]:
    """The seq_len + 1 tokens of sample i, cut where documents meet."""
    source, _, position = mixture.locate(i)
    tokens, index = mixture[i], Index(mixture.streams[source])
    first = at = position * mixture.seq_len
    found = []
    while at < first + len(tokens):
        document, start, end = index.document_at(at)
        stop = min(end, first + len(tokens))
        if not start <= at < stop:
            raise DataError(f"{index.stream.idx}: document {document:,} does not follow the last")
        piece = tokens[at - first : stop - first]
        found.append(Piece(document, at - start, stop - start, end - start, piece))
        at = stop
    return found


def verify(stream: TokenStream, vocab_size: int, progress: Callable[[int], object]) -> list[str]:
    """What is wrong with a stream, a line each; progress is called with bytes just read."""
    faults = list(Index(stream).faults())
    digest, at, outside, first = hashlib.sha256(), 0, 0, ""
    with open(stream.bin, "rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
            tokens = np.frombuffer(chunk, stream.dtype, len(chunk) // stream.dtype.itemsize)
            if tokens.max(initial=0) >= vocab_size or tokens.min(initial=0) < 0:
                places = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
                outside += len(places)
                first = first or f"token {at + places[0]:,} with id {tokens[places[0]]}"
            at += len(tokens)
            progress(len(chunk))
    if outside:
        faults.append(
            f"{stream.bin}: {outside:,} ids are past the vocabulary of {vocab_size:,}, first "
            f"{first}"
        )
    with open(stream.idx, "rb") as f:
        digests = {"bin": digest.hexdigest(), "idx": hashlib.file_digest(f, "sha256").hexdigest()}
    for kind, written in checksums(stream).items():
        if digests.get(kind) != written:
            faults.append(f"{stream.path}.{kind}: not the file whose sha256 was written down")
    return faults


def checksums(stream: TokenStream) -> dict[str, str]:
    """The digests of bin and idx that data.prepare wrote down; {} where no report names the stream.

    One report is for all streams of a command: that of fr.long.valid is fr.json.
    """
    name = stream.path.name
    for dots in range(name.count(".") + 1):
        path = stream.path.with_name(f"{name.rsplit('.', dots)[0]}.json")
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if name in report["streams"]:
                found = report["streams"][name]["sha256"]
                return {kind: str(found[kind]) for kind in ("bin", "idx")}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: not a report of data.prepare with sha256 of bin, idx"
            ) from None
    return {}


def print_sample(mixture: Mixture, i: int, decode: Callable[..., str]) -> None:
    """The text of sample i, with a line before each document's part of it."""
    source, epoch, position = mixture.locate(i)
    stream, start = mixture.streams[source], position * mixture.seq_len
    print(
        f"sample {i:,}: {mixture.names[source]}, epoch {epoch:,}, its sample {position:,} of "
        f"{mixture.lengths[source]:,}\n{stream.bin}, tokens {start:,} to "
        f"{start + mixture.seq_len:,} of {stream.tokens:,}; the last one is only a target"
    )
    for piece in pieces(mixture, i):
        print(
            f"\n--- {mixture.names[source]}, document {piece.document:,} of {stream.documents:,}: "
            f"tokens {piece.start:,} to {piece.end - 1:,} of {piece.length:,}"
        )
        print(decode(piece.tokens, skip_special=False))


def print_counts(path: str, partial: bool) -> None:
    """Documents and tokens of each stream of a mixture; those without files are named."""
    rows, missing = present_rows(path, partial=True) if partial else (read_rows(path), [])
    width = max(len(row["name"]) for row in rows) + 2
    print(f"{'source':<{width}}{'documents':>17}{'tokens':>20}{'a document':>13}")
    streams = [TokenStream(row["path"]) for row in rows]
    counts = [(row["name"], s.documents, s.tokens) for row, s in zip(rows, streams)]
    total = ("all", sum(c[1] for c in counts), sum(c[2] for c in counts))
    for name, documents, tokens in [*counts, total]:
        mean = f"{tokens / documents:,.1f}" if documents else "-"
        print(f"{name:<{width}}{documents:>17,}{tokens:>20,}{mean:>13}")
    if missing:
        print(f"without files: {', '.join(missing)}")


def verify_all(path: str, vocab_size: int, partial: bool) -> int:
    """Check every stream of a mixture and say what is wrong; returns the number of faults."""
    rows, missing = present_rows(path, partial)
    if missing:
        print(f"without files: {', '.join(missing)}")
    found = 0
    size = sum(size_of(stream_files(row["path"])[1]) or 0 for row in rows)
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        for row in rows:
            try:
                stream = TokenStream(row["path"])
                faults = verify(stream, vocab_size, bar.update)
                sums = "checksums hold" if checksums(stream) else "no checksums to compare"
            except DataError as error:
                faults = [str(error)]
            for fault in faults:
                bar.write(f"{row['name']}: {fault}", file=sys.stderr)
            if not faults:
                whole = f"{stream.documents:,} documents, {stream.tokens:,} tokens"
                bar.write(f"{row['name']}: whole, {whole}, {sums}")
            found += len(faults)
    return found


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.dataset", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="the text of a sample, and where it comes from")
    show.add_argument("--sample", type=int, required=True, help="its number, from 0")
    show.add_argument("--seq_len", type=int, default=4096, help="tokens in a sample")
    show.add_argument("--seed", type=int, default=42, help="of the data order")
    show.add_argument("--samples", type=int, default=0, help="of the run, for a mixture of series")
    check = commands.add_parser("verify", help="index, ids and checksums of every stream")
    count = commands.add_parser("count", help="documents and tokens of every stream")
    for command in (show, check, count):
        command.add_argument("mixture", help="CSV file: name, path, weight or epochs")
        command.add_argument("--partial", action="store_true", help="only the sources on disk")
        if command is not count:
            command.add_argument("--tokenizer", required=True, help="ranks or tokenizer.json")
    args = parser.parse_args(argv)
    if args.command == "count":
        print_counts(args.mixture, args.partial)
        return
    loaded = tokenizer.load(args.tokenizer)
    if args.command == "verify":
        if found := verify_all(args.mixture, loaded.vocab_size, args.partial):
            raise DataError(f"{args.mixture}: {found} faults")
        return
    if args.sample < 0 or args.seq_len < 1:
        raise ConfigError("--sample must be 0 or more and --seq_len at least 1")
    common = (args.seq_len, args.seed, loaded.vocab_size, args.partial, args.samples)
    print_sample(Mixture(args.mixture, *common), args.sample, loaded.decode)
