"""Looking at data: what a mixture holds, any sample as text, whether streams are whole.

    python -m data.inspect shares data/mixtures/pretraining.csv --samples 762144586 --png shares.png
    python -m data.inspect sample MIXTURE --number 12345 --tokenizer ranks.tiktoken
    python -m data.inspect verify MIXTURE --tokenizer ranks.tiktoken
    python -m data.inspect count MIXTURE

`shares` has the shares by language and category, and tokens and epochs of each source. A share
before upsampling is that of the tokens there are, one after it that of the tokens trained on.
Sizes are those of the streams on disk, else those in the CSV's column `tokens`, so a run of 762
million samples is computed before a single token is there.

`verify` reads every byte once. It checks the index (documents follow one another without gap or
overlap, to the end of the tokens), the ids against a vocabulary, and both files against the
checksums that data.prepare wrote beside them. Memory: 30 bytes for each document of a stream.
"""

import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data import tokenizer
from data.dataset import (
    HEADER,
    DataError,
    Mixture,
    TokenStream,
    drawn,
    huffman,
    present_rows,
    read_rows,
    size_of,
    stream_files,
)

SEEN_TOO_OFTEN = 4  # epochs after which repeated data teaches less (arXiv 2305.16264)
CHUNK = 1 << 22  # bytes of tokens looked at together
BEFORE, AFTER = "#A6A6A6", "#0072B2"  # of the chart: grey and blue, told apart by everyone


# --- shares --------------------------------------------------------------------------------------


class Source(NamedTuple):
    """One row of a mixture, and what a run takes from it."""

    name: str
    language: str  # "parallel" for aligned texts of two languages, "unknown" where it is not given
    category: str
    weight: float  # of the samples; those of a mixture sum to 1
    tokens: int | None  # of the stream, else as published; None where neither is known
    on_disk: bool  # or in the object store that its path is an address in
    samples: int = 0  # of the run

    def epochs(self, seq_len: int) -> float:
        return self.samples * seq_len / self.tokens if self.tokens else math.nan


def read_sources(path: str | Path, partial: bool = False, samples: int = 0) -> list[Source]:
    """The sources of a mixture, whether their streams are on disk or not.

    partial: only those on disk, their weights scaled up. samples: of a run; the numbers that each
    source gives are those of data.dataset.Mixture. Raises DataError for a CSV or a stream that
    cannot be read, and for epochs of a source of unknown size.
    """
    sources = []
    for row in present_rows(path, partial=True)[0] if partial else read_rows(path):
        on_disk = all(size_of(file) is not None for file in stream_files(row["path"]))
        tokens = row.get("tokens") or None
        try:
            tokens = TokenStream(row["path"]).tokens if on_disk else tokens and int(tokens)
            weight = row["epochs"] * tokens if row["weight"] is None else row["weight"]
        except (TypeError, ValueError):
            said = f"{row['name']} has no files, and {row.get('tokens')!r} in the column tokens"
            raise DataError(f"{path}: {said} is not a whole number") from None
        category = row.get("category") or "unknown"
        language = "parallel" if category == "aligned" else row.get("language") or "unknown"
        sources.append(Source(row["name"], language, category, weight, tokens, on_disk))
    total = sum(source.weight for source in sources)
    if not total:
        raise DataError(f"{path}: its sources have no tokens")
    counts = drawn(huffman([source.weight / total for source in sources]), samples)
    return [s._replace(weight=s.weight / total, samples=counts[k]) for k, s in enumerate(sources)]


def shares(sources: list[Source], column: str) -> dict[str, tuple[float | None, float]]:
    """{language or category: (share before upsampling, after)}, the largest after first.

    column is "language" or "category". Before is None for all if the size of a source is unknown.
    """
    tokens, weights = defaultdict(int), defaultdict(float)
    known = all(source.tokens is not None for source in sources)
    for source in sources:
        tokens[getattr(source, column)] += source.tokens or 0
        weights[getattr(source, column)] += source.weight
    total = sum(tokens.values())
    return {
        kind: (tokens[kind] / total if known else None, weights[kind])
        for kind in sorted(weights, key=weights.get, reverse=True)
    }


def print_shares(sources: list[Source], samples: int, seq_len: int) -> None:
    """Shares by language and category, then the sources, then what deserves attention."""
    print("shares of the tokens before upsampling, and after it: of those trained on\n")
    for column in ("language", "category"):
        print(f"{column:<16}{'before':>10}{'after':>10}")
        for kind, (before, after) in shares(sources, column).items():
            share = "-" if before is None else f"{100 * before:.1f} %"
            print(f"{kind:<16}{share:>10}{100 * after:>8.1f} %")
        print()
    width = max(len(source.name) for source in sources) + 2
    columns = f"{'tokens':>17}{'weight':>12}{'tokens seen':>19}{'epochs':>11}"
    print(f"{'source':<{width}}{columns}  files")
    for source in sources:
        tokens = "-" if source.tokens is None else f"{source.tokens:,}"
        seen, files = source.samples * seq_len, "on disk" if source.on_disk else "missing"
        line = f"{source.name:<{width}}{tokens:>17}{100 * source.weight:>10.5f} %"
        print(line + f"{seen:>19,}{source.epochs(seq_len):>11,.3f}  {files}")
    total = f"{len(sources)} sources, {sum(source.tokens or 0 for source in sources):,} tokens"
    print(f"{total}; {samples:,} samples of {seq_len:,}: {samples * seq_len:,} tokens")
    for source in sources:
        if source.epochs(seq_len) > SEEN_TOO_OFTEN:
            print(f"warning: {source.name} is seen {source.epochs(seq_len):,.1f} times")
    missing = sum(not source.on_disk for source in sources)
    if missing:
        print(f"{missing} sources lack files: --partial shows the mixture of the others")


def draw_shares(sources: list[Source], path: Path, title: str) -> None:
    """A PNG of two bar charts, by language and by category: each share before and after upsampling.

    Raises DataError without matplotlib, OSError for a path that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("the chart needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 6.5), layout="constrained")  # 1,000 pixels wide
    for axes, column in zip(figure.subplots(1, 2), ("language", "category")):
        found = shares(sources, column)
        places = np.arange(len(found))
        kinds = (
            ("share of the available tokens", BEFORE),
            ("share of the tokens trained on", AFTER),
        )
        for k, (label, color) in enumerate(kinds):
            percent = [100 * both[k] for both in found.values() if both[k] is not None]
            if not percent:  # the size of a source is unknown
                continue
            bars = axes.barh(places + 0.4 * k - 0.2, percent, 0.38, color=color, label=label)
            axes.bar_label(bars, fmt=lambda x: "<0.1" if 0 < x < 0.05 else f"{x:.1f}", padding=2)
        axes.set_yticks(places, list(found))
        axes.invert_yaxis()  # the largest at the top
        axes.set_title(f"by {column}, in percent")
        axes.margins(x=0.12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"{title}: {len(sources)} sources, before and after upsampling")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=100)


# --- samples and streams -------------------------------------------------------------------------


def index_faults(stream: TokenStream) -> Iterator[str]:
    """What is wrong with the .idx of a stream, whose format data/dataset.py describes."""
    count, size = stream.sequences, stream.dtype.itemsize
    expected = HEADER.size + 12 * count + 8 * (stream.documents + 1)
    if (found := stream.idx.stat().st_size) != expected:
        yield f"{stream.idx}: {found:,} bytes where its header says {expected:,}"
    with open(stream.idx, "rb") as f:
        f.seek(HEADER.size)
        lengths = np.fromfile(f, np.int32, count)
        offsets = np.fromfile(f, np.int64, count)
        boundaries = np.fromfile(f, np.int64, stream.documents + 1)
    ends = np.cumsum(lengths, dtype=np.int64) * size
    wrong = np.flatnonzero((lengths < 0) | (offsets + lengths.astype(np.int64) * size != ends))
    end = int(ends[-1]) if count else 0
    if len(wrong):
        yield f"{stream.idx}: sequence {wrong[0]:,} does not follow the last"
    elif (found := stream.bin.stat().st_size) != end:
        yield f"{stream.bin}: {found:,} bytes where its index says {end:,}"
    if boundaries[0] != 0 or boundaries[-1] != count or (np.diff(boundaries) < 0).any():
        yield f"{stream.idx}: the documents' boundaries do not run from 0 to {count:,}"


def verify(stream: TokenStream, vocab_size: int, progress: Callable[[int], object]) -> list[str]:
    """What is wrong with a stream, a line each; progress is called with bytes just read."""
    if not isinstance(stream.idx, Path):
        raise DataError(f"{stream.path}: verify reads files on this machine only")
    faults = list(index_faults(stream))
    digest, at, outside, first = hashlib.sha256(), 0, 0, ""
    with open(stream.bin, "rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
            tokens = np.frombuffer(chunk, stream.dtype, len(chunk) // stream.dtype.itemsize)
            places = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
            if len(places):
                outside += len(places)
                first = first or f"token {at + places[0]:,} with id {tokens[places[0]]}"
            at += len(tokens)
            progress(len(chunk))
    if outside:
        past = f"{outside:,} ids are past the vocabulary of {vocab_size:,}"
        faults.append(f"{stream.bin}: {past}, first {first}")
    idx = hashlib.sha256(stream.idx.read_bytes())
    for kind, written in checksums(stream).items():
        if {"bin": digest, "idx": idx}[kind].hexdigest() != written:
            faults.append(f"{stream.path}.{kind}: not the file whose sha256 was written down")
    return faults


def checksums(stream: TokenStream) -> dict[str, str]:
    """The digests of bin and idx that data.prepare wrote down; {} where no report names the stream.

    One report is for all streams of a command: that of fr.long.valid is fr.json.
    """
    path = Path(stream.path)
    for dots in range(path.name.count(".") + 1):
        report = path.with_name(f"{path.name.rsplit('.', dots)[0]}.json")
        # Another JSON file may have that name.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            streams = json.loads(report.read_text(encoding="utf-8"))["streams"]
            return dict(streams[path.name]["sha256"])
    return {}


def verify_all(rows: list[dict], vocab_size: int) -> int:
    """Check the stream of each row and say what is wrong; returns the number of faults."""
    size, found = sum(size_of(stream_files(row["path"])[1]) or 0 for row in rows), 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        for row in rows:
            try:
                stream = TokenStream(row["path"])
                faults = verify(stream, vocab_size, bar.update)
            except DataError as error:
                faults = [str(error)]
            for fault in faults:
                bar.write(f"{row['name']}: {fault}", file=sys.stderr)
            if not faults:
                sums = "sha256 as written down" if checksums(stream) else "no sha256 to compare"
                whole = f"{stream.documents:,} documents, {stream.tokens:,} tokens"
                bar.write(f"{row['name']}: whole, {whole}, {sums}")
            found += len(faults)
    return found


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m data.inspect", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("shares", help="shares, and tokens and epochs of each source")
    show.add_argument("--png", type=Path, help="file for bar charts of the shares")
    show.add_argument("--samples", type=int, default=0, help="number of samples of the run")
    sample = commands.add_parser("sample", help="the text of a sample, and where it comes from")
    sample.add_argument("--number", type=int, required=True, help="number of the sample, from 0")
    sample.add_argument("--seed", type=int, default=42, help="seed of the data order")
    check = commands.add_parser("verify", help="index, ids and checksums of every stream")
    count = commands.add_parser("count", help="documents and tokens of every stream")
    for command in (show, sample, check, count):
        command.add_argument("mixture", help="CSV file: name, path, weight or epochs")
        command.add_argument("--partial", action="store_true", help="only the sources on disk")
    for command in (show, sample):
        command.add_argument("--seq_len", type=int, default=4096, help="tokens in a sample")
    for command in (sample, check):
        command.add_argument("--tokenizer", required=True, help="ranks or tokenizer.json")
    args = parser.parse_args(argv)
    if getattr(args, "seq_len", 1) < 1 or getattr(args, "number", 0) < 0:
        raise ConfigError("--seq_len must be at least 1, and --number 0 or more")
    if args.command == "shares":
        sources = read_sources(args.mixture, args.partial, args.samples)
        print_shares(sources, args.samples, args.seq_len)
        if args.png:
            draw_shares(sources, args.png, Path(args.mixture).stem)
            print(args.png)
        return
    rows, missing = present_rows(args.mixture, args.partial)
    if missing:
        print(f"without files: {', '.join(missing)}")
    if args.command == "count":
        for row in rows:
            stream = TokenStream(row["path"])
            print(f"{row['name']}: documents {stream.documents:,}, tokens {stream.tokens:,}")
        return
    loaded = tokenizer.load(args.tokenizer)
    if args.command == "sample":
        mixture = Mixture(args.mixture, args.seq_len, args.seed, loaded.vocab_size, args.partial)
        source, epoch, position = mixture.locate(args.number)
        stream, start = mixture.streams[source], position * args.seq_len
        place = f"its sample {position:,} of {mixture.lengths[source]:,}"
        print(f"sample {args.number:,}: {mixture.names[source]}, epoch {epoch:,}, {place}")
        end = f"{start + args.seq_len:,} of {stream.tokens:,}; the last one is only a target"
        print(f"{stream.bin}, tokens {start:,} to {end}\n")
        print(loaded.decode(mixture[args.number], skip_special=False))
    elif found := verify_all(rows, loaded.vocab_size):
        raise DataError(f"{args.mixture}: {found} fault{'s' * (found > 1)}")


if __name__ == "__main__":
    run_cli(main, DataError)
