"""From raw text to token streams, to the data of a run, and to a vocabulary.

    python -m data.prepare vocabulary INPUTS... --vocab_size 8000 --out out/mine/ranks.tiktoken
    python -m data.prepare tokens INPUTS... --tokenizer out/mine/ranks.tiktoken --out out/mine/fr
    python -m data.prepare mixture data/mixtures/small.csv --out out/small_data

INPUTS are files, globs and folders, on this machine or at any address that fsspec knows: s3://,
gs://, https://, hf://datasets/NAME ... A .txt or .md is a document, a .jsonl has a JSON object per
line, a .json the same, or one object, or one array of them; a .parquet has a document per row. All
but tables may be compressed: .gz .bz2 .xz .zst. Other files are read as text where they are named.

`tokens` writes each document, cleaned, as `<s> text </s>` to OUT.bin and OUT.idx (the format of
data/dataset.py), and a report, OUT.json. --validation holds out documents in OUT.valid; --split_by
language makes streams OUT.fr, OUT.en ...; --split_length 4096 makes OUT.short and OUT.long. OUT.csv
and OUT.valid.csv are mixtures of them to train on, every token as often as any other.

The same command, given again, skips the input files that are finished. The bytes written are the
same for any number of processes. Results are replaced only with --overwrite.

`mixture` makes all that the three phases of a run read, from a list of sources: as many tokens of
each as its shares of the phases need, spread over several of its files, which are read no further.
The folder gets pretraining.csv, extension.csv (long documents ten times as often as short ones, as
in Lucie's) and annealing.csv, validation.csv with a stream for each language, and the tokenizer. A
list has the columns name, language, category, pretraining and annealing (shares of these phases),
and files (paths, globs and addresses, with spaces between them).

`vocabulary` learns a byte-level BPE from the texts, whole or each in a share of the bytes, as in
`vocabulary french/ english/ --shares 0.6 0.4`.

Filtering web text by language, quality or similarity is out of scope: see Hugging Face's datatrove.
"""

import argparse
import csv
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli, write_file
from data import tokenizer as tokenizers
from data.dataset import HEADER, DataError, TokenStream, read_bytes, size_of, token_dtype
from data.files import NoFiles, Source, find_files, read_documents
from data.streams import (
    Due,
    Options,
    clean,
    hash_fraction,
    left_out,
    suffix_of,
    tokenize,
    write_index,
    write_mixture,
)

LUCIES_TOKENIZER = "hf://OpenLLM-France/Lucie-7B/tokenizer.json"
SAMPLES = {"pretraining": 4096, "extension": 32_000, "annealing": 32_000}  # tokens of one, by phase
LONG_TO_SHORT = 10  # in the extension: how many times as often a long document is read
FEWEST = 4 * 32_001  # tokens of a source, however small its share: samples for every phase
SPREAD = 8  # files of a source that its tokens are spread over
TEXT = 4.0  # bytes of text in a token: Lucie's data set has 8,842 G characters and 2,315 G tokens
DISK = 2.1  # bytes of a token there: uint16, and 20 bytes for a document in its index
SPEED = 2.6e6  # bytes of text a second and core: python -m bench.text prepare, docs/results.md

# --- the data of a run ---------------------------------------------------------------------------


class Listed(NamedTuple):
    """A row of a list of sources."""

    name: str
    language: str
    category: str
    pretraining: float  # share of the phase
    annealing: float
    files: str


def read_list(path: Path) -> list[Listed]:
    """The sources of a list, their shares of each phase scaled to sum to 1.

    Raises DataError for what is no such list.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [Listed(**row) for row in csv.DictReader(file)]
        shares = np.array([(row.pretraining, row.annealing) for row in rows], float)
        unnamed = not all(map(all, rows)) or len({row.name for row in rows}) < len(rows)
        if unnamed or not shares.min() >= 0:
            raise ValueError
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (TypeError, ValueError, csv.Error):
        rule = "a name of its own for each source, and shares of 0 or more"
        columns = ", ".join(Listed._fields)
        raise DataError(f"{path}: a list of sources has the columns {columns}; {rule}") from None
    shares = (shares / np.maximum(shares.sum(0), 1e-12)).tolist()
    return [row._replace(pretraining=a, annealing=b) for row, (a, b) in zip(rows, shares)]


def some(names: list[str]) -> str:
    """The names, or the first five and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def files_of(listed: list[Listed], needs: list[int]) -> tuple[list[Source], list[Due]]:
    """All files of the sources, and what is due after each.

    A source's tokens come in equal parts from SPREAD files at equal distances, because neighbours
    are alike: one file has abstracts, another papers. The other files follow, should these have too
    few. Raises DataError naming the sources without files.
    """
    files, dues, absent = [], [], []
    for row, need in zip(tqdm(listed, desc="list", delay=2, leave=False), needs):
        try:
            found = find_files(row.files.split())
        except NoFiles:
            absent.append(row.name)
            continue
        parts = min(SPREAD, len(found))
        first = [found[len(found) * part // parts] for part in range(parts)]
        files += first + [file for file in found if file not in {*first}]
        for number in range(1, len(found) + 1):
            dues.append(Due(row.name, math.ceil(need * min(1, number / parts))))
    if absent:
        raise DataError(
            f"no files of {some(absent)}: mend their column files, or take out the rows"
        )
    return files, dues


def stem(row: Listed, length: str, held_out: bool = False) -> str:
    """The name of a source's stream of "short" or "long" documents."""
    return "tokens" + suffix_of([row.name], length, held_out)


def tokens_of(report: dict, row: Listed, length: str) -> int:
    """The tokens to train on in a source's stream."""
    return report["streams"].get(stem(row, length), {}).get("tokens", 0)


def write_phases(out: Path, listed: list[Listed], report: dict) -> None:
    """Write the mixtures of the three phases.

    The share of a source is that of its long and its short documents together; where one of these
    streams is shorter than a sample, the other has all of it.
    """
    for phase, sample in SAMPLES.items():
        often = {"short": 1, "long": LONG_TO_SHORT if phase == "extension" else 1}
        rows, lacking = [], []
        for row in listed:
            share = row.annealing if phase == "annealing" else row.pretraining
            sizes = {length: tokens_of(report, row, length) for length in often if share}
            weights = {k: often[k] * tokens for k, tokens in sizes.items() if tokens > sample}
            lacking += [row.name] if share and not weights else []
            for length, weight in weights.items():
                facts = {"name": f"{row.name}--{length}", "path": stem(row, length)}
                facts["weight"] = share * weight / sum(weights.values())
                rows.append(facts | {"language": row.language, "category": row.category})
        if rows:
            write_mixture(out / f"{phase}.csv", rows)
        if lacking:
            print(f"{phase}: without {some(lacking)}, shorter than a sample", file=sys.stderr)


def write_validation(out: Path, listed: list[Listed], report: dict, dtype: np.dtype) -> None:
    """Join what is held out of each language to one stream, and write their mixture."""
    rows, lacking = [], []
    for language in dict.fromkeys(row.language for row in listed):
        sources = [row for row in listed if row.language == language]
        stems = [stem(row, length, True) for row in sources for length in ("short", "long")]
        stream, lengths = out / f"valid.{language}", [np.empty(0, np.int32)]
        with open(f"{stream}.bin", "wb") as file:
            for held_out in (out / name for name in stems if name in report["streams"]):
                index = Path(f"{held_out}.idx").read_bytes()
                count = HEADER.unpack_from(index)[3]
                lengths.append(np.frombuffer(index, np.int32, count, HEADER.size))
                file.write(Path(f"{held_out}.bin").read_bytes())
        write_index(f"{stream}.idx", np.concatenate(lengths), dtype)
        if TokenStream(stream).tokens > SAMPLES["pretraining"]:
            facts = {"name": language, "path": stream.name, "language": language}
            rows.append(facts | {"weight": sum(row.pretraining for row in sources)})
        else:
            lacking.append(language)
    if rows:
        write_mixture(out / "validation.csv", rows)
    if lacking:
        print(f"validation: without {some(lacking)}, shorter than a sample", file=sys.stderr)


def fetch_tokenizer(source: str, out: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file, a folder or an address, saved as out/tokenizer.json."""
    if "://" in source:
        if (size := size_of(source)) is None:
            raise DataError(f"{source}: no such file")
        write_file(out / "tokenizer.json", read_bytes(source, 0, size))
        return tokenizers.load(out / "tokenizer.json")
    tokenizer = tokenizers.load(source)
    tokenizers.save_folder(tokenizer, out)
    return tokenizer


def show_shares(listed: list[Listed], needs: list[int], report: dict) -> None:
    """Print what was wanted of each language and what there is, and what deserves attention."""
    taken = [tokens_of(report, row, "short") + tokens_of(report, row, "long") for row in listed]
    shares = {row.name: n / sum(taken) for row, n in zip(listed, taken)}
    wanted = {row.name: n / sum(needs) for row, n in zip(listed, needs)}
    print(f"{'language':<12}{'wanted':>9}{'share':>9}")
    for language in dict.fromkeys(row.language for row in listed):
        names = [row.name for row in listed if row.language == language]
        pair = (sum(shares_of[name] for name in names) for shares_of in (wanted, shares))
        print(f"{language:<12}" + "".join(f"{share:>9.2%}" for share in pair))
    apart = {name: abs(share - wanted[name]) for name, share in shares.items()}
    furthest = max(apart, key=apart.get)
    print(f"{sum(taken):,} tokens of {sum(needs):,} that are needed")
    print(f"furthest from its share: {furthest}, by {apart[furthest]:.3%} of all tokens")
    few = [row.name for row, have, need in zip(listed, taken, needs) if have < 0.9 * need]
    if few:
        print(f"with fewer tokens than needed, so read more often: {some(few)}")
    print(f"documents left out: {left_out(report)}; see tokens.json")


def _mixture(args: argparse.Namespace) -> None:
    if args.processes < 1 or not 0 <= args.validation < 1 or not min(args.tokens) >= 0:
        raise ConfigError("--processes is 1 or more, --validation under 1, --tokens 0 or more")
    listed, out = read_list(args.list), Path(args.out)
    main_phase, annealing = args.tokens
    wanted = (main_phase * row.pretraining + annealing * row.annealing for row in listed)
    needs = [max(FEWEST, math.ceil(tokens)) for tokens in wanted]
    files, dues = files_of(listed, needs)
    out.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in out.rglob("tokens.*.bin"))
    disk, free, text = DISK * sum(needs), shutil.disk_usage(out).free + there, TEXT * sum(needs)
    hours = text / SPEED / args.processes / 3600
    print(f"{len(listed)} sources, {len(files):,} files; {sum(needs):,} tokens are needed")
    print(f"disk: {disk / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are available in {out}")
    took = f"{hours:,.1f} hours of {args.processes} processes, if the network keeps up"
    print(f"text to read: {text / 1e9:,.1f} GB, {took}", flush=True)
    if disk > free:
        raise DataError(f"{out}: needs {disk / 1e9:,.1f} GB: free some, or lower --tokens")
    tokenizer = fetch_tokenizer(args.tokenizer, out)
    options = Options(validation=args.validation, split_length=SAMPLES["pretraining"])
    how = (options, args.processes, "skip", args.overwrite, dues)
    report = tokenize(files, tokenizer, out / "tokens", *how)
    write_phases(out, listed, report)
    if args.validation:
        write_validation(out, listed, report, token_dtype(tokenizer.vocab_size))
    show_shares(listed, needs, report)


# --- a vocabulary --------------------------------------------------------------------------------


def sample_texts(
    texts: list[list[Source]], shares: list[float], text_field: str, on_error: str
) -> Iterator[str]:
    """Texts, cleaned, of each list of files its share of the bytes.

    A document is drawn or not by its text alone, so a share is met up to chance. The sample is as
    large as the text with the least for its share allows. Every text is read twice: measured, then
    drawn from. Raises DataError for a text that is empty.
    """

    def read(files: list[Source]) -> Iterator[str]:
        return map(clean, read_documents(files, None, text_field, on_error))

    bar = tqdm(texts, desc="measure")
    sizes = [sum(len(text.encode()) for text in read(files)) for files in bar]
    most = min(size / share for size, share in zip(sizes, shares))
    if not most:
        raise DataError(f"{texts[sizes.index(0)][0]}: no text")
    for files, size, share in zip(texts, sizes, shares):
        keep = share * most / size
        print(f"{files[0]}: {keep:.1%} of {size / 1e6:,.3f} MB are drawn")
        for text in read(files):
            if keep > 1 - 1e-9 or hash_fraction(text, b"sample") < keep:
                yield text


def _vocabulary(args: argparse.Namespace) -> None:
    if args.out.is_dir():
        raise ConfigError(f"{args.out}: is a folder; --out is the ranks file to write")
    if args.shares:
        if len(args.shares) != len(args.inputs) or min(args.shares) <= 0:
            raise ConfigError("--shares has a number over 0 for each of the inputs")
        texts = [find_files([given]) for given in args.inputs]
        sample = sample_texts(texts, args.shares, args.text_field, args.on_error)
    else:
        files = tqdm(find_files(args.inputs), desc="read")
        sample = map(clean, read_documents(files, None, args.text_field, args.on_error))
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    ranks = tokenizers.train(sample, args.vocab_size)
    tokenizers.save(ranks, args.out)
    print(f"{args.out}: {args.vocab_size:,} tokens")


# --- the command ---------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m data.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text files to token streams")
    train = commands.add_parser("vocabulary", help="text files to a vocabulary")
    mixture = commands.add_parser("mixture", help="a list of sources to the data of a run")
    for command in (tokens, train):
        add = command.add_argument
        add("inputs", nargs="+", help="files, folders, globs, addresses")
        add("--text_field", default="text", help="field or column that holds the text (text)")
        said = "stop at an unreadable document (default), or skip and report it"
        add("--on_error", choices=("stop", "skip"), default="stop", help=said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = tokens.add_argument
    add("--tokenizer", required=True, help="ranks file, tokenizer.json or its folder")
    add("--out", required=True, help="stream to write, without suffix")
    add("--split_by", nargs="+", default=(), metavar="FIELD", help="a stream for each value")
    add("--validation", type=float, default=0.0, help="share of the text to hold out (0)")
    add("--split_length", type=int, help="put documents of more tokens into OUT.long")
    add("--processes", type=int, default=cores, help="worker processes (all cores)")
    add("--overwrite", action="store_true", help="replace what other inputs or options gave")
    add = mixture.add_argument
    add("list", type=Path, help="CSV of the sources, such as data/mixtures/small.csv")
    add("--out", required=True, metavar="DIR", help="folder to write")
    needed = "of the main phase and of annealing; default: 6.4e9 0.32e9, for config/small_*.py"
    add("--tokens", type=float, nargs=2, default=(6.4e9, 0.32e9), metavar="N", help=needed)
    add("--tokenizer", default=LUCIES_TOKENIZER, help="file, folder or address; default: Lucie's")
    add("--validation", type=float, default=0.002, help="share of the text to hold out (0.002)")
    add("--processes", type=int, default=cores, help="worker processes (all cores)")
    add("--overwrite", action="store_true", help="replace what another list or options gave")
    add = train.add_argument
    add("--out", type=Path, required=True, help="ranks file to write")
    add("--vocab_size", type=int, default=65_024, help="special tokens included (65,024)")
    add("--shares", nargs="+", type=float, help="share of the bytes for each of the inputs")
    args = parser.parse_args(argv)
    {"vocabulary": _vocabulary, "tokens": _tokens, "mixture": _mixture}[args.command](args)


def _tokens(args: argparse.Namespace) -> None:
    if min(args.processes, 1 if args.split_length is None else args.split_length) < 1:
        raise ConfigError("--processes and --split_length must be 1 or more")
    if args.out.endswith("/") or not Path(args.out).name:
        raise ConfigError(f"--out {args.out}: must end in a name, such as out/mine/all")
    chosen = {option.name: getattr(args, option.name) for option in fields(Options)}
    options = Options(**chosen | {"split_by": tuple(args.split_by)})
    tokenizer, files = tokenizers.load(args.tokenizer), find_files(args.inputs)
    how = (options, args.processes, args.on_error, args.overwrite)
    report = tokenize(files, tokenizer, args.out, *how)
    for name, stream in report["streams"].items():
        print(f"{name}: documents {stream['documents']:,}, tokens {stream['tokens']:,}")
    read = f"{report['documents']:,} of {report['documents_in']:,}"
    print(f"documents {read}; left out: {left_out(report)}; see {args.out}.json")
    for error in report["errors"]:
        print(f"left out: {ascii(error)[1:-1]}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main, DataError)
