"""Looking at data: what a mixture holds, any sample as text, whether streams are whole, how many
tokens a text takes.

    python -m data.inspect shares data/mixtures/pretraining.csv --samples 762144586 --png shares.png
    python -m data.inspect sample MIXTURE --number 12345 --tokenizer ranks.tiktoken
    python -m data.inspect verify MIXTURE --tokenizer ranks.tiktoken
    python -m data.inspect count MIXTURE
    python -m data.inspect compare --texts fr=fr.jsonl.gz 'code=src/**/*.py' \\
        --tokenizers lucie=tokenizer.json mine=ranks.tiktoken gpt-4=tiktoken:cl100k_base

`shares` has the shares by language and category, and tokens and epochs of each source. A share
before upsampling is that of the tokens there are, one after it that of the tokens trained on.
Sizes are those of the streams on disk, else those in the CSV's column `tokens`, so a run of 762
million samples is computed before a single token is there.

`verify` reads every byte once. It checks the index (documents follow one another without gap or
overlap, to the end of the tokens), the ids against a vocabulary, and both files against the
checksums that data.prepare wrote beside them.

`compare` prints tokens per word and bytes per token. Words are what stands between white space,
bytes are those of UTF-8, special tokens do not count. A tokenizer is a ranks file, any
tokenizer.json, or tiktoken:NAME, one of tiktoken's own, which it may download.

data/mixtures/pretraining.csv is Lucie's main phase as it was launched, 140 streams drawn side by
side. In pretraining_by_year.csv the years of the web ascend (series, see data/dataset.py).
"""

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
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
    series_of,
    size_of,
    stream_files,
    turns,
)
from data.prepare import clean, find_files, read_documents

SEEN_TOO_OFTEN = 4  # epochs after which repeated data teaches less (arXiv 2305.16264)
CHUNK = 1 << 22  # bytes of tokens, or entries of an index, looked at together


# --- shares --------------------------------------------------------------------------------------


class Source(NamedTuple):
    """One row of a mixture, and what a run takes from it."""

    name: str
    language: str  # "parallel" for aligned texts of two languages, "unknown" where it is not given
    category: str
    weight: float  # of the samples; those of a mixture sum to 1
    tokens: int | None  # of the stream, else as published; None where neither is known
    on_disk: bool  # or in the object store that its path is an address in
    series: str  # sources of the same one take turns
    samples: int = 0  # of the run

    def epochs(self, seq_len: int) -> float | None:
        return self.samples * seq_len / self.tokens if self.tokens else None


def read_sources(path: str | Path, partial: bool = False, samples: int = 0) -> list[Source]:
    """The sources of a mixture, whether their streams are on disk or not.

    partial: only those on disk, their weights scaled up. samples: of a run; the numbers that each
    source gives are those of data.dataset.Mixture. Raises DataError for a CSV or a stream that
    cannot be read, and for epochs of a source of unknown size.
    """
    sources = []
    for row in present_rows(path, partial=True)[0] if partial else read_rows(path):
        on_disk = all(size_of(file) is not None for file in stream_files(row["path"]))
        text, tokens, weight = row.get("tokens") or "", None, row["weight"]
        if on_disk:
            tokens = TokenStream(row["path"]).tokens
        elif text:
            if not (text.isascii() and text.isdigit()):
                raise DataError(f"{path}: {row['name']} has {text!r} tokens: not a whole number")
            tokens = int(text)
        if weight is None and tokens is None:
            raise DataError(
                f"{path}: the weight of {row['name']} follows from its epochs and its tokens, but "
                "it has neither files nor a number in a column tokens"
            )
        category = row.get("category") or "unknown"
        language = "parallel" if category == "aligned" else row.get("language") or "unknown"
        weight = row["epochs"] * tokens if weight is None else weight
        sources.append(
            Source(row["name"], language, category, weight, tokens, on_disk, row["series"])
        )
    total = sum(source.weight for source in sources)
    if not total:
        raise DataError(f"{path}: its sources have no tokens")
    weights = [source.weight / total for source in sources]
    leaves = series_of([source.series for source in sources])
    of_leaf = drawn(huffman([sum(weights[k] for k in leaf) for leaf in leaves]), samples)
    for leaf, starts in enumerate(turns(leaves, weights, of_leaf)):
        for k, start, end in zip(leaves[leaf], starts, [*starts[1:], of_leaf[leaf]]):
            sources[k] = sources[k]._replace(weight=weights[k], samples=end - start)
    return sources


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
    header = f"{'source':<{width}}{'tokens':>17}{'weight':>12}"
    header += f"{'samples':>13}{'tokens seen':>19}{'epochs':>11}" if samples else ""
    print(header + "  files")
    for source in sources:
        tokens = "-" if source.tokens is None else f"{source.tokens:,}"
        line = f"{source.name:<{width}}{tokens:>17}{100 * source.weight:>10.5f} %"
        if samples:
            epochs = source.epochs(seq_len)
            line += f"{source.samples:>13,}{source.samples * seq_len:>19,}"
            line += f"{'-' if epochs is None else f'{epochs:,.3f}':>11}"
        print(line + ("  on disk" if source.on_disk else "  missing"))
    total = f"{len(sources)} sources, {sum(source.tokens or 0 for source in sources):,} tokens"
    if samples:
        total += f"; {samples:,} samples of {seq_len:,}: {samples * seq_len:,} tokens"
    print(total)
    for source in sources:
        if (source.epochs(seq_len) or 0) > SEEN_TOO_OFTEN:
            print(f"warning: {source.name} is seen {source.epochs(seq_len):,.1f} times")
    for leaf in series_of([source.series for source in sources]):
        if len(leaf) > 1:
            print(f"one after the other: {', '.join(sources[k].name for k in leaf)}")
    unknown = [source.name for source in sources if source.tokens is None]
    if unknown:
        print(f"of unknown size (no files, no column tokens): {', '.join(unknown)}")
    missing = [source.name for source in sources if not source.on_disk]
    if len(missing) == len(sources):
        print("no source has files on disk; sizes are the CSV's")
    elif missing:
        print(f"without files, {len(missing)} of {len(sources)}: {', '.join(missing)}")
        print("--partial shows the mixture of the others; train.py --partial trains on it")


def draw_shares(sources: list[Source], path: Path, title: str) -> None:
    """Two pie charts as PNG: the tokens trained on, by language and by category.

    Raises DataError without matplotlib, OSError for a path that cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("the chart needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("language", "category")):
        slices = {kind: after for kind, (_, after) in shares(sources, column).items()}
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        edges = {"linewidth": 1, "edgecolor": "white"}
        wedges = axes.pie(slices.values(), startangle=90, counterclock=False, wedgeprops=edges)[0]
        # In a legend: the labels of thin slices would lie on each other.
        labels = [f"{kind}  {100 * share:.1f} %" for kind, share in slices.items()]
        axes.legend(wedges, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set_title(f"by {column}")
    figure.suptitle(f"{title}: {len(sources)} sources, share of the tokens trained on")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


# --- samples and streams -------------------------------------------------------------------------


def print_sample(mixture: Mixture, i: int, decode: Callable[..., str]) -> None:
    """The text of sample i, special tokens included, and where it comes from."""
    source, epoch, position = mixture.locate(i)
    stream, start = mixture.streams[source], position * mixture.seq_len
    print(
        f"sample {i:,}: {mixture.names[source]}, epoch {epoch:,}, its sample {position:,} of "
        f"{mixture.lengths[source]:,}\n{stream.bin}, tokens {start:,} to "
        f"{start + mixture.seq_len:,} of {stream.tokens:,}; the last one is only a target\n"
    )
    print(decode(mixture[i], skip_special=False))


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


def index_faults(stream: TokenStream) -> Iterator[str]:
    """What is wrong with the .idx of a stream. It is mapped: as much is read as is looked at."""
    count, size = stream.sequences, stream.dtype.itemsize
    expected = HEADER.size + 12 * count + 8 * (stream.documents + 1)
    if (found := stream.idx.stat().st_size) != expected:
        yield f"{stream.idx}: {found:,} bytes where its header says {expected:,}"

    def mapped(dtype: type, offset: int, length: int) -> np.ndarray:
        # A map cannot be empty.
        return (
            np.memmap(stream.idx, dtype, "r", offset, (length,)) if length else np.empty(0, dtype)
        )

    all_lengths = mapped(np.int32, HEADER.size, count)
    all_offsets = mapped(np.int64, HEADER.size + 4 * count, count)
    end = 0
    for first in range(0, count, CHUNK):
        lengths = np.array(all_lengths[first : first + CHUNK], np.int64)
        offsets = all_offsets[first : first + CHUNK]
        ends = end + np.cumsum(lengths) * size
        wrong = np.flatnonzero((lengths < 0) | (offsets != ends - lengths * size))
        if len(wrong):
            yield f"{stream.idx}: sequence {first + wrong[0]:,} does not follow the last"
            return
        end = int(ends[-1])
    if (found := stream.bin.stat().st_size) != end:
        yield f"{stream.bin}: {found:,} bytes where its index says {end:,}"
    boundaries = mapped(np.int64, HEADER.size + 12 * count, stream.documents + 1)
    ends_well = boundaries[0] == 0 and boundaries[-1] == count
    for first in range(0, len(boundaries), CHUNK):
        ends_well &= bool((np.diff(boundaries[first : first + CHUNK + 1]) >= 0).all())
    if not ends_well:
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
    path = Path(stream.path)
    for dots in range(path.name.count(".") + 1):
        report = path.with_name(f"{path.name.rsplit('.', dots)[0]}.json")
        try:
            streams = json.loads(report.read_text(encoding="utf-8"))["streams"]
            if path.name in streams:
                found = streams[path.name]["sha256"]
                return {kind: str(found[kind]) for kind in ("bin", "idx")}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{report}: not a report of data.prepare with sha256 of bin, idx"
            ) from None
    return {}


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
                sums = "sha256 as written down" if checksums(stream) else "no sha256 to compare"
            except DataError as error:
                faults = [str(error)]
            for fault in faults:
                bar.write(f"{row['name']}: {fault}", file=sys.stderr)
            if not faults:
                whole = f"{stream.documents:,} documents, {stream.tokens:,} tokens"
                bar.write(f"{row['name']}: whole, {whole}, {sums}")
            found += len(faults)
    return found


# --- tokenizers ----------------------------------------------------------------------------------


def token_counter(source: str) -> Callable[[str], int]:
    """Counts the tokens of a text as the tokenizer that `source` names would. Raises DataError."""
    if source.startswith("tiktoken:"):
        import tiktoken

        name = source.removeprefix("tiktoken:")
        if name not in (names := tiktoken.list_encoding_names()):
            raise DataError(f"tiktoken:{name}: there is {', '.join(names)}")
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError:  # also what requests raises
            raise DataError(f"tiktoken:{name}: not cached, and its download failed") from None
        return lambda text: len(encoding.encode_ordinary(text))
    try:
        ours = tokenizer.load(source)
        return lambda text: len(ours.encode_ordinary(text))
    except DataError as error:
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise
        try:
            from tokenizers import Tokenizer

            foreign = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except ImportError:
            raise DataError(f"{error}; pip install tokenizers reads more kinds") from None
        except Exception:  # the package raises nothing narrower
            raise error from None
    foreign.no_truncation()
    return lambda text: len(foreign.encode(text, add_special_tokens=False).ids)


def compare(
    tokenizers: dict[str, str], texts: dict[str, str], megabytes: float, field: str
) -> None:
    """Print a line for each tokenizer and text: tokens per word, bytes per token.

    tokenizers: {name: source}. texts: {name: file, folder or glob}, cleaned as those to be trained
    on are; the first `megabytes` of each count. Raises DataError for what cannot be read or cut.
    """
    counters = {name: token_counter(source) for name, source in tokenizers.items()}
    width = max(map(len, [*tokenizers, "tokenizer"])) + 2
    print(f"{'tokenizer':<{width}}{'text':<12}{'MB':>8}{'tokens/word':>13}{'bytes/token':>13}")
    for text, pattern in texts.items():
        documents, size = [], 0
        for document in read_documents(find_files([pattern]), None, field):
            documents.append(clean(document))
            size += len(documents[-1].encode())
            if size >= megabytes * 1e6:
                break
        words = sum(len(document.split()) for document in documents)
        if not words:
            raise DataError(f"{pattern}: no words in it")
        for name, count in counters.items():
            try:
                tokens = sum(count(d) for d in tqdm(documents, desc=name, leave=False))
            except ValueError as error:  # tiktoken's regex gives up on a million spaces in a row
                raise DataError(f"{text}: {name} cannot tokenize it: {error}") from None
            line = f"{name:<{width}}{text:<12}{size / 1e6:>8.2f}"
            print(f"{line}{tokens / words:>13.3f}{size / tokens:>13.3f}")


def _named(given: list[str], what: str) -> dict[str, str]:
    """{name: source} of NAME=SOURCE arguments; a source alone is its own name."""
    found = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not name or (equals and not source) or name in found:
            raise ConfigError(f"{text}: write --{what} NAME=PATH, each with a name of its own")
        found[name] = source or name
    return found


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.inspect", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("shares", help="shares, and tokens and epochs of each source")
    show.add_argument("--png", type=Path, help="file for two pie charts")
    sample = commands.add_parser("sample", help="the text of a sample, and where it comes from")
    sample.add_argument("--number", type=int, required=True, help="of the sample, from 0")
    sample.add_argument("--seed", type=int, default=42, help="of the data order")
    check = commands.add_parser("verify", help="index, ids and checksums of every stream")
    count = commands.add_parser("count", help="documents and tokens of every stream")
    for command in (show, sample, check, count):
        command.add_argument("mixture", help="CSV file: name, path, weight or epochs")
        command.add_argument("--partial", action="store_true", help="only the sources on disk")
    for command in (show, sample):
        command.add_argument("--samples", type=int, default=0, help="of the whole run")
        command.add_argument("--seq_len", type=int, default=4096, help="tokens in a sample")
    for command in (sample, check):
        command.add_argument("--tokenizer", required=True, help="ranks or tokenizer.json")
    cut = commands.add_parser("compare", help="tokens per word of tokenizers")
    cut.add_argument("--texts", nargs="+", required=True, help="NAME=FILE, FOLDER or 'GLOB'")
    cut.add_argument("--tokenizers", nargs="+", required=True, help="NAME=PATH or tiktoken:NAME")
    cut.add_argument("--text_field", default="text", help="of JSON and tables")
    cut.add_argument("--megabytes", type=float, default=2.0, help="of each text at most")
    args = parser.parse_args(argv)
    if args.command in ("shares", "sample") and (args.samples < 0 or args.seq_len < 1):
        raise ConfigError("--samples must be 0 or more and --seq_len at least 1")
    if args.command == "shares":
        sources = read_sources(args.mixture, args.partial, args.samples)
        print_shares(sources, args.samples, args.seq_len)
        if args.png:
            draw_shares(sources, args.png, Path(args.mixture).stem)
            print(args.png)
    elif args.command == "sample":
        if args.number < 0:
            raise ConfigError("--number must be 0 or more")
        loaded = tokenizer.load(args.tokenizer)
        common = (args.seq_len, args.seed, loaded.vocab_size, args.partial, args.samples)
        print_sample(Mixture(args.mixture, *common), args.number, loaded.decode)
    elif args.command == "verify":
        loaded = tokenizer.load(args.tokenizer)
        if found := verify_all(args.mixture, loaded.vocab_size, args.partial):
            raise DataError(f"{args.mixture}: {found} fault{'s' * (found > 1)}")
    elif args.command == "count":
        print_counts(args.mixture, args.partial)
    elif not 0 < args.megabytes < math.inf:
        raise ConfigError("--megabytes must be over 0")
    else:
        counted = _named(args.tokenizers, "tokenizers"), _named(args.texts, "texts")
        compare(*counted, args.megabytes, args.text_field)


if __name__ == "__main__":
    run_cli(main, DataError)
