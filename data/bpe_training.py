"""Learning a byte-level vocabulary from texts, each in its share of a mixture.

    python -m data.tokenizer train my_texts/ --vocab_size 8000 --out ranks.tiktoken
    python -m data.tokenizer train fr=fr.jsonl.gz en=en/ 'code=src/**/*.py' --partial \\
        --mixture data/mixtures/pretraining.csv --by language --out ranks.tiktoken
    python -m data.tokenizer train fr=fr.txt en=en.txt --shares fr=0.6 en=0.4 --out ranks.tiktoken

A text is a file, folder or glob as data/reading.py takes them; other files that are named or
matched, such as program code, are a document each. With --mixture or --shares its name says whose
share it has; a name may be given several times. Without them all texts are read whole.

Shares are of the sample's bytes in UTF-8, there being no tokens yet. Documents are drawn whole, at
random and none twice, the same ones every time. The sample is as large as the text with the least
for its share allows, or --megabytes. Every text is read twice: to be measured, and to be drawn.
"""

import argparse
import glob
import json
import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from config.cli import ConfigError, Parser
from data import mixture, tokenizer
from data.cleaning import clean
from data.dataset import DataError, permute
from data.reading import LARGEST, SUFFIXES, Source, files_in, find_files, read_documents, size_of
from data.tokenizer import PATTERN, byte_characters
from data.tokenizer_base import SPECIAL_TOKENS
from data.unicode_tables import nfc


def train(texts: Iterable[str], vocab_size: int, count: int | None = None) -> dict[bytes, int]:
    """Learn a vocabulary of vocab_size tokens, special ones included: {bytes of a token: id}.

    The `tokenizers` library counts and merges, with progress bars on a terminal, where count is the
    number of texts. Memory: each different word once. Raises DataError if the library is not
    installed, or if the text holds too few different pairs for so many tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise DataError(f"a vocabulary has at least {smallest} tokens, not {vocab_size}")
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable
    except ImportError:
        raise DataError("training a vocabulary needs: pip install tokenizers") from None
    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    # Composed as the tokenizer composes a text before it cuts it.
    bpe.train_from_iterator(map(nfc, texts), trainer, count)
    ranks = ranks_of(json.loads(bpe.to_str())["model"]["merges"])
    if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
        raise DataError(
            f"the text gives {len(ranks) + len(SPECIAL_TOKENS):,} tokens, not {vocab_size:,}: "
            "more text or a smaller vocabulary is needed"
        )
    return ranks


def ranks_of(merges: list[list[str]]) -> dict[bytes, int]:
    """{bytes of a token: id} from the ordered merges of a byte-level BPE.

    tokenizers names a merge by its two parts, tiktoken by their concatenation; a token that a
    second pair of parts gives as well keeps the rank of its first.
    """
    byte_of = {char: byte for byte, char in byte_characters().items()}
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(byte_of[c] for c in a + b) for a, b in merges]
    return {t: i for i, t in enumerate(dict.fromkeys(tokens), start=len(SPECIAL_TOKENS))}


# --- texts ---------------------------------------------------------------------------------------


def find_texts(pattern: str) -> list[Source]:
    """The files of a file, folder or glob: all that data/reading.py knows, and any other file that
    is named or matched.

    Raises DataError if there are none.
    """
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    files: list[Source] = []
    for path in map(Path, paths):
        files += files_in(path) if path.is_dir() else [path]
    if not paths:  # elsewhere, or nowhere
        files = find_files([pattern])
    if not files:
        raise DataError(f"{pattern}: no texts in it")
    return list(dict.fromkeys(files))


def read_texts(
    files: Iterable[Source], text_field: str = "text", progress: tqdm | None = None
) -> Iterator[str]:
    """The documents of the files, one by one, cleaned as training data are (data/cleaning.py).

    Of files that data/reading.py does not know, U+FFFD replaces what is not UTF-8. Raises
    DataError, with the place, for what cannot be read.
    """
    for file in files:
        if isinstance(file, Path) and not file.name.endswith(SUFFIXES):
            documents = [_read_whole(file, progress)]
        else:
            documents = read_documents([file], progress, text_field)
        for document in documents:
            yield clean(document)[0]


def _read_whole(file: Path, progress: tqdm | None) -> str:
    size = file.stat().st_size
    if size > LARGEST:
        raise DataError(f"{file}: over {LARGEST:,} bytes for one document: cut it into several")
    content = file.read_bytes()
    if b"\0" in content:
        raise DataError(f"{file}: has NUL bytes, so it is no text: leave it out")
    if progress is not None:
        progress.update(size)
    return content.decode("utf-8-sig", "replace")


# --- the sample ----------------------------------------------------------------------------------


def measure(
    texts: Mapping[str, list[Source]], text_field: str = "text"
) -> dict[str, Sequence[int]]:
    """{name: bytes of each document in UTF-8} of {name: files}, with a progress bar.

    Memory: one document, and 8 bytes for each. Raises DataError for a text without any.
    """
    sizes = {}
    stored = sum(size_of(file) or 0 for files in texts.values() for file in files)
    with tqdm(total=stored, unit="B", unit_scale=True, desc="measure") as bar:
        for name, files in texts.items():
            sizes[name] = array("q", (len(t.encode()) for t in read_texts(files, text_field, bar)))
            if not sum(sizes[name]):
                raise DataError(f"{name}: no text in {files[0]}{' ...' if files[1:] else ''}")
    return sizes


def choose(
    sizes: Mapping[str, Sequence[int]], shares: Mapping[str, float], total: float | None = None
) -> dict[str, bytearray]:
    """{name: 1 for each document in the sample, 0 for the others}.

    sizes: {name: bytes of each document}. shares: {name: share of the sample}, which sum to 1.
    total: bytes of the sample; None is the most that needs no document twice. Of every text, the
    bytes chosen differ from its share by at most half a document, the one that was left out or
    taken last; one document is always taken. Raises DataError for a text too small for its share.
    """
    scarce = min(shares, key=lambda name: sum(sizes[name]) / shares[name])
    most = sum(sizes[scarce]) / shares[scarce]
    if total is None:
        total = most
    elif total > most:
        raise DataError(
            f"{scarce}: {sum(sizes[scarce]) / 1e6:,.3f} MB of text, but {shares[scarce]:.2%} of "
            f"{total / 1e6:,.3f} MB are {total * shares[scarce] / 1e6:,.3f} MB: more text, or "
            f"--megabytes {math.floor(most / 1e3) / 1e3} at most"
        )
    chosen = {}
    for name, share in shares.items():
        count, left = len(sizes[name]), share * total
        chosen[name] = bytearray(count)
        for position in range(count):
            document = permute(position, count, name)
            if position and sizes[name][document] > 2 * left:  # the sum is nearer without it
                break
            chosen[name][document] = 1
            left -= sizes[name][document]
    return chosen


def drawn(
    texts: Mapping[str, list[Source]], chosen: Mapping[str, bytearray], text_field: str = "text"
) -> Iterator[str]:
    """The documents chosen, read once more from {name: files}."""
    for name, files in texts.items():
        documents = read_texts(files, text_field)
        yield from (text for text, taken in zip(documents, chosen[name]) if taken)


# --- the command ---------------------------------------------------------------------------------


def named_texts(given: list[str]) -> dict[str, list[Source]]:
    """{name: files} of NAME=PATH arguments, where a name may come several times."""
    texts = {}
    for text in given:
        name, _, path = text.partition("=")
        if not (name and path):
            raise ConfigError(f"{text}: with --mixture or --shares a text is NAME=PATH")
        texts.setdefault(name, []).extend(find_texts(path))
    return texts


def given_shares(given: list[str]) -> dict[str, float]:
    """{name: weight} of NAME=WEIGHT arguments."""
    weights = {}
    for text in given:
        name, _, weight = text.partition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if name in weights or not 0 < value < math.inf:
            raise ConfigError(f"{text}: write --shares NAME=NUMBER, over 0 and once for a name")
        weights[name] = value
    return weights


def shares_of(
    weights: Mapping[str, float], names: Iterable[str], source: str, partial: bool = False
) -> dict[str, float]:
    """The shares of the texts in `names`, which sum to 1.

    Raises ConfigError for a name without a weight, and, unless partial, a weight without a text.
    source: what gave the weights, for the message.
    """
    names, total = set(names), sum(weights.values())
    if unknown := sorted(names - weights.keys()):
        raise ConfigError(f"{unknown[0]}: has no share in {source}, which has {_listed(weights)}")
    if lacking := [f"{name} ({weights[name] / total:.1%})" for name in weights.keys() - names]:
        if not partial:
            raise ConfigError(
                f"{source}: no text for {_listed(sorted(lacking))}; --partial does without"
            )
    total = sum(weights[name] for name in names)
    return {name: weight / total for name, weight in weights.items() if name in names}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")


def print_sample(
    sizes: Mapping[str, Sequence[int]], chosen: Mapping[str, bytearray], shares: Mapping[str, float]
) -> None:
    """A line for each text: its share as asked for and as drawn, and how much of it is drawn."""
    drawn_bytes = {
        name: sum(size for size, taken in zip(sizes[name], chosen[name]) if taken)
        for name in shares
    }
    total = sum(drawn_bytes.values())
    width = max(len(name) for name in [*shares, "text"]) + 2
    print(
        f"{'text':<{width}}{'share':>9}{'drawn':>9}{'MB':>12}{'of':>12}{'documents':>14}{'of':>14}"
    )
    for name, share in shares.items():
        print(
            f"{name:<{width}}{100 * share:>7.2f} %{100 * drawn_bytes[name] / total:>7.2f} %"
            f"{drawn_bytes[name] / 1e6:>12,.3f}{sum(sizes[name]) / 1e6:>12,.3f}"
            f"{sum(chosen[name]):>14,}{len(sizes[name]):>14,}"
        )


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.tokenizer train",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help="PATH; with --mixture or --shares NAME=PATH"
    )
    parser.add_argument("--out", type=Path, required=True, help="ranks file to write")
    parser.add_argument("--folder", help="folder to write a tokenizer.json to as well")
    parser.add_argument("--vocab_size", type=int, default=65_024, help="special tokens included")
    parser.add_argument("--text_field", default="text", help="of JSON and tables")
    parser.add_argument("--megabytes", type=float, help="size of the sample")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--mixture", help="CSV file; its shares are the sample's")
    weights.add_argument("--shares", nargs="+", metavar="NAME=NUMBER", help="shares by hand")
    parser.add_argument(
        "--by",
        choices=("name", "language", "category"),
        default="name",
        help="the column of the mixture where the names of the texts stand (name)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="only the shares that a text is given for"
    )
    args = parser.parse_args(argv)
    if args.megabytes is not None and not 0 < args.megabytes < math.inf:
        raise ConfigError("--megabytes must be over 0")
    if args.out.is_dir():
        raise ConfigError(f"{args.out}: is a folder; --out is the ranks file to write")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    if args.mixture or args.shares:
        if args.mixture:
            table = mixture.shares(mixture.read(args.mixture), args.by)
            weights, source = {k: after for k, (_, after) in table.items()}, args.mixture
        else:
            weights, source = given_shares(args.shares), "--shares"
        texts = named_texts(args.texts)
        shares = shares_of(weights, texts, source, args.partial)
    else:
        if named := [text for text in args.texts if "=" in text and not glob.glob(text)]:
            raise ConfigError(f"{named[0]}: a name needs --mixture or --shares")
        texts, shares = {"all": [f for path in args.texts for f in find_texts(path)]}, {"all": 1.0}
    sizes = measure(texts, args.text_field)
    chosen = choose(sizes, shares, args.megabytes and args.megabytes * 1e6)
    print_sample(sizes, chosen, shares)
    sample = drawn(texts, chosen, args.text_field)
    ranks = train(sample, args.vocab_size, sum(map(sum, chosen.values())))
    tokenizer.save(ranks, args.out)
    print(f"{args.out}: {args.vocab_size:,} tokens")
    if args.folder:
        tokenizer.save_folder(tokenizer.Tokenizer(ranks), args.folder)
        print(f"{args.folder}: tokenizer.json, tokenizer_config.json")
