"""How finely tokenizers cut texts: tokens per word and bytes per token, language by language.

    python -m data.tokenizer compare --texts fr=fr.jsonl.gz en=en.jsonl.gz 'code=src/**/*.py' \\
        --tokenizers lucie=tokenizer.json mine=ranks.tiktoken gpt-4=tiktoken:cl100k_base \\
        --csv fertility.csv --png fertility.png

Fewer tokens a word (the fertility) and more bytes a token are shorter sequences, so faster training
and longer context for the same text. Words are what stands between white space; bytes are those of
UTF-8; special tokens do not count. A text is a file, folder or glob as data/reading.py takes them;
other files that are named or matched, such as program code, are a document each. Documents are
cleaned first, as those to be trained on are. A tokenizer is a ranks file, any tokenizer.json (of
one that is not ours, through the package tokenizers), or tiktoken:NAME, one of tiktoken's own,
which it downloads if it has not before.
"""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config.cli import ConfigError, Parser
from data import tokenizer
from data.bpe_training import find_texts, read_texts
from data.dataset import DataError

Counter = Callable[[str], int]  # the number of tokens of a text


class Fertility(NamedTuple):
    """What one tokenizer makes of one text."""

    tokenizer: str
    text: str
    documents: int
    words: int
    bytes: int
    tokens: int

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / self.words

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def load_counter(source: str) -> Counter:
    """Counts tokens as the tokenizer that `source` names would. Raises DataError."""
    if source.startswith("tiktoken:"):
        encoding = _tiktoken(source.removeprefix("tiktoken:"))
        return lambda text: len(encoding.encode_ordinary(text))
    try:
        loaded = tokenizer.load(source)
        return lambda text: len(loaded.encode_ordinary(text))
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


def _tiktoken(name: str):
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise DataError(f"tiktoken:{name}: there is {names}")
    try:
        return tiktoken.get_encoding(name)
    except OSError:  # also what requests raises
        raise DataError(f"tiktoken:{name}: not cached, and its download failed") from None


def read_text(pattern: str, limit: int, text_field: str = "text") -> list[str]:
    """Documents of a file, folder or glob, from the first on, until `limit` bytes are reached.

    Raises DataError for what cannot be read and where there are no words.
    """
    documents, size = [], 0
    for document in read_texts(find_texts(pattern), text_field):
        documents.append(document)
        size += len(document.encode())
        if size >= limit:
            break
    if not any(document.split() for document in documents):
        raise DataError(f"{pattern}: no words in it")
    return documents


def compare(counters: dict[str, Counter], texts: dict[str, list[str]]) -> list[Fertility]:
    """Every tokenizer on every text, with a progress bar over bytes.

    Raises DataError for a document that a tokenizer gives up on.
    """
    sizes = {
        text: sum(len(document.encode()) for document in documents)
        for text, documents in texts.items()
    }
    total = sum(sizes.values()) * len(counters)
    found = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="fertility") as bar:
        for name, count in counters.items():
            for text, documents in texts.items():
                tokens = 0
                for number, document in enumerate(documents, start=1):
                    try:
                        tokens += count(document)
                    # the regex of tiktoken gives up on a million spaces in a row
                    except ValueError as error:
                        place = f"{text}, document {number:,}"
                        raise DataError(f"{place}: {name} cannot cut it: {error}") from None
                words = sum(len(document.split()) for document in documents)
                found.append(Fertility(name, text, len(documents), words, sizes[text], tokens))
                bar.update(sizes[text])
    return found


def print_tables(found: list[Fertility]) -> None:
    """Tokenizers down, texts across: tokens per word, then bytes per token."""
    texts = list(dict.fromkeys(row.text for row in found))
    names = list(dict.fromkeys(row.tokenizer for row in found))
    cells = {(row.tokenizer, row.text): row for row in found}
    width, column = max(map(len, [*names, "bytes per token"])) + 2, max(10, *map(len, texts)) + 2
    for title in ("tokens per word", "bytes per token"):
        print(f"{title:<{width}}" + "".join(f"{text:>{column}}" for text in texts))
        for name in names:
            values = [getattr(cells[name, text], title.replace(" ", "_")) for text in texts]
            print(f"{name:<{width}}" + "".join(f"{value:>{column}.3f}" for value in values))
        print()


def write_csv(found: list[Fertility], path: Path) -> None:
    """One row for each tokenizer and text."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*Fertility._fields, "tokens_per_word", "bytes_per_token"])
        for row in found:
            writer.writerow([*row, f"{row.tokens_per_word:.5f}", f"{row.bytes_per_token:.5f}"])


def draw(found: list[Fertility], path: Path) -> None:
    """The two tables as bars: a group for each text, in it a colour for each tokenizer.

    Raises DataError without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("the chart needs matplotlib: pip install matplotlib") from None
    texts = list(dict.fromkeys(row.text for row in found))
    names = list(dict.fromkeys(row.tokenizer for row in found))
    colors = colormaps["tab20"].colors  # ten, and a lighter one of each
    colors = colors[::2] + colors[1::2]
    bars = len(texts) * (len(names) + 1)
    figure = Figure(figsize=(max(6, 3 + 0.32 * bars), 7.5), layout="constrained")
    titles = ("tokens per word (lower is better)", "bytes per token (higher is better)")
    for axes, title in zip(figure.subplots(2, 1), titles):
        axes.set_prop_cycle(color=colors)
        for k, name in enumerate(names):
            rows = [row for row in found if row.tokenizer == name]
            heights = [getattr(row, "_".join(title.split()[:3])) for row in rows]
            width = 1 / (len(names) + 1)  # the room of one bar between groups
            places = [at + (k - (len(names) - 1) / 2) * width for at in range(len(rows))]
            drawn = axes.bar(places, heights, width, label=name, edgecolor="white", linewidth=0.5)
            axes.bar_label(drawn, fmt="%.2f", rotation=90, padding=3, fontsize=8)
        axes.set_xticks(range(len(texts)), texts)
        axes.tick_params(axis="x", length=0)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.01, y=0.15)  # above the bars, room for their numbers
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)  # beside the bars
    figure.savefig(path, format="png", dpi=110)


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
        prog="data.tokenizer compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--texts", nargs="+", required=True, help="NAME=FILE, FOLDER or 'GLOB'")
    parser.add_argument("--tokenizers", nargs="+", required=True, help="NAME=PATH or tiktoken:NAME")
    parser.add_argument("--text_field", default="text", help="of JSON and tables")
    parser.add_argument("--megabytes", type=float, default=2.0, help="of each text at most")
    parser.add_argument("--csv", type=Path, help="file for the counts")
    parser.add_argument("--png", type=Path, help="file for the bars")
    args = parser.parse_args(argv)
    if not 0 < args.megabytes < math.inf:
        raise ConfigError("--megabytes must be over 0")
    counters = {
        name: load_counter(source) for name, source in _named(args.tokenizers, "tokenizers").items()
    }
    texts = {
        name: read_text(source, int(args.megabytes * 1e6), args.text_field)
        for name, source in _named(args.texts, "texts").items()
    }
    found = compare(counters, texts)
    print_tables(found)
    for write, path in ((write_csv, args.csv), (draw, args.png)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(found, path)
            print(path)
