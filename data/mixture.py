"""What a mixture holds: shares by language and category, tokens and epochs of each source.

    python -m data.mixture show data/mixtures/pretraining.csv
    python -m data.mixture show data/mixtures/pretraining.csv --samples 762144586 --png mixture.png

A share before upsampling is that of the tokens there are, a share after it that of the tokens
trained on, where Lucie's better sources come 1.5 to 3 times. Sizes are those of the streams on
disk, else those in the CSV's column `tokens`; so the run of 762 million samples is computed before
a single token is there. `--partial` shows what is left with the sources on disk alone.

data/mixtures/pretraining.csv is Lucie's main phase as it was launched: 140 streams drawn side by
side, each at its share all along and shuffled within, the years of the web among them. In
data/mixtures/pretraining_by_year.csv they ascend: the years of RedPajama in a language, and those
of FineWebEdu, are a series (see data.dataset.Mixture). All shares are the same.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from config.cli import ConfigError, Parser, run_cli
from data.dataset import (
    DataError,
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

SEEN_TOO_OFTEN = 4  # epochs after which repeated data teaches less (arXiv 2305.16264)


class Source(NamedTuple):
    """One row of a mixture."""

    name: str
    language: str  # "parallel" for aligned texts of two languages, "" where the CSV does not say
    category: str
    weight: float  # of the samples; those of a mixture sum to 1
    tokens: int | None  # of the stream, else as published; None where neither is known
    on_disk: bool  # or in the object store that its path is an address in
    series: str = ""  # sources of the same one take turns


class Drawn(NamedTuple):
    """What a run takes from one source."""

    samples: int
    epochs: float | None  # of its tokens; None where their number is not known


def read(path: str | Path, partial: bool = False) -> list[Source]:
    """The sources of a mixture, whether their streams are on disk or not.

    partial: only those on disk, their weights scaled up. Raises DataError for a CSV or a stream
    that cannot be read, and for epochs of a source of unknown size.
    """
    sources = []
    for row in present_rows(path, partial=True)[0] if partial else read_rows(path):
        on_disk = all(size_of(file) is not None for file in stream_files(row["path"]))
        tokens = TokenStream(row["path"]).tokens if on_disk else _published_tokens(path, row)
        weight = row["weight"]
        if weight is None:
            if tokens is None:
                raise DataError(
                    f"{path}: {row['name']} has epochs but neither files nor a number in a column "
                    "tokens, which its weight would follow from"
                )
            weight = row["epochs"] * tokens
        category = row.get("category") or ""
        language = "parallel" if category == "aligned" else row.get("language") or ""
        about = (row["name"], language, category, weight, tokens, on_disk, row["series"])
        sources.append(Source(*about))
    total = sum(source.weight for source in sources)
    if not total:
        raise DataError(f"{path}: its sources have no tokens")
    return [source._replace(weight=source.weight / total) for source in sources]


def _published_tokens(path: str | Path, row: dict) -> int | None:
    text = row.get("tokens") or ""
    if text and not (text.isascii() and text.isdigit()):
        raise DataError(f"{path}: {row['name']} has {text!r} tokens, which is no whole number")
    return int(text) if text else None


def shares(sources: list[Source], column: str) -> dict[str, tuple[float | None, float]]:
    """{language or category: (share before upsampling, after)}, the largest after first.

    column is "language" or "category". Before is None for all if the size of a source is unknown.
    """
    tokens, weights = defaultdict(int), defaultdict(float)
    known = all(source.tokens is not None for source in sources)
    for source in sources:
        kind = getattr(source, column) or "unknown"
        tokens[kind] += source.tokens or 0
        weights[kind] += source.weight
    total = sum(tokens.values())
    return {
        kind: (tokens[kind] / total if known else None, weights[kind])
        for kind in sorted(weights, key=weights.get, reverse=True)
    }


def run_of(sources: list[Source], samples: int, seq_len: int) -> list[Drawn]:
    """What a run of so many samples takes from each source, by arithmetic.

    The counts are those of data.dataset.Mixture, which gives whole samples to a source: its share
    within `deviation()`, under 1.3 samples for Lucie's 140, and one more within a series.
    """
    weights, leaves = [source.weight for source in sources], series_of([s.series for s in sources])
    of_leaf = drawn(huffman([sum(weights[k] for k in leaf) for leaf in leaves]), samples)
    counts = {}
    for leaf, starts in enumerate(turns(leaves, weights, of_leaf)):
        for k, start, end in zip(leaves[leaf], starts, [*starts[1:], of_leaf[leaf]]):
            counts[k] = end - start
    return [
        Drawn(counts[k], counts[k] * seq_len / source.tokens if source.tokens else None)
        for k, source in enumerate(sources)
    ]


def print_tables(sources: list[Source], samples: int | None, seq_len: int) -> None:
    """Shares by language and category, then the sources."""
    print("shares of the tokens before upsampling, and after it: of those trained on\n")
    for column in ("language", "category"):
        table = shares(sources, column)
        if set(table) == {"unknown"}:
            print(f"no {column} is given in the CSV, in a column of that name\n")
            continue
        print(f"{column:<16}{'before':>10}{'after':>10}")
        for kind, (before, after) in table.items():
            share = "-" if before is None else f"{100 * before:.1f} %"
            print(f"{kind:<16}{share:>10}{100 * after:>8.1f} %")
        print()
    width = max(len(source.name) for source in sources) + 2
    header = f"{'source':<{width}}{'tokens':>17}{'weight':>12}"
    run = None
    if samples is not None:
        header += f"{'samples':>13}{'tokens seen':>19}{'epochs':>11}"
        run = run_of(sources, samples, seq_len)
    print(header + "  files")
    for k, source in enumerate(sources):
        tokens = "-" if source.tokens is None else f"{source.tokens:,}"
        line = f"{source.name:<{width}}{tokens:>17}{100 * source.weight:>10.5f} %"
        if run:
            epochs = "-" if run[k].epochs is None else f"{run[k].epochs:,.3f}"
            line += f"{run[k].samples:>13,}{run[k].samples * seq_len:>19,}{epochs:>11}"
        print(line + ("  on disk" if source.on_disk else "  missing"))
    known = [source.tokens for source in sources if source.tokens is not None]
    total = f"{len(sources)} sources, {sum(known):,} tokens"
    if len(known) < len(sources):
        total += f" in the {len(known)} of known size"
    if run:
        total += f"; {samples:,} samples of {seq_len:,}: {samples * seq_len:,} tokens"
    print(total)
    for source, taken in zip(sources, run or []):
        if taken.epochs is not None and taken.epochs > SEEN_TOO_OFTEN:
            print(f"warning: {source.name} is seen {taken.epochs:,.1f} times")
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


def draw(sources: list[Source], path: str | Path, title: str) -> None:
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.mixture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    show = parser.add_subparsers(dest="command", required=True).add_parser("show")
    show.add_argument("mixture", help="CSV file: name, path, weight or epochs")
    show.add_argument("--samples", type=int, help="of a run, for tokens and epochs of each source")
    show.add_argument("--seq_len", type=int, default=4096, help="tokens in a sample")
    show.add_argument("--png", help="file for the two pie charts")
    show.add_argument("--partial", action="store_true", help="only the sources on disk")
    args = parser.parse_args(argv)
    if (args.samples or 0) < 0 or args.seq_len < 1:
        raise ConfigError("--samples must be 0 or more and --seq_len at least 1")
    sources = read(args.mixture, args.partial)
    print_tables(sources, args.samples, args.seq_len)
    if args.png:
        draw(sources, args.png, Path(args.mixture).stem)
        print(args.png)


if __name__ == "__main__":
    run_cli(main, DataError)
