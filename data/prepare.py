"""From raw text to token streams, and to a vocabulary.

    python -m data.prepare vocabulary INPUTS... --vocab_size 8000 --out out/mine/ranks.tiktoken
    python -m data.prepare tokens INPUTS... --tokenizer out/mine/ranks.tiktoken --out out/mine/fr

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

`vocabulary` learns a byte-level BPE from the texts, whole or each in a share of the bytes, as in
`vocabulary french/ english/ --shares 0.6 0.4`.

Filtering web text by language, quality or similarity is out of scope: see Hugging Face's datatrove.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data import tokenizer as tokenizers
from data.dataset import (
    DataError,
)
from data.files import Source, find_files, read_documents
from data.streams import Options, _left_out, clean, hash_fraction, tokenize

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
    add = train.add_argument
    add("--out", type=Path, required=True, help="ranks file to write")
    add("--vocab_size", type=int, default=65_024, help="special tokens included (65,024)")
    add("--shares", nargs="+", type=float, help="share of the bytes for each of the inputs")
    args = parser.parse_args(argv)
    (_vocabulary if args.command == "vocabulary" else _tokens)(args)


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
    print(f"documents {read}; left out: {_left_out(report)}; see {args.out}.json")
    for error in report["errors"]:
        print(f"left out: {ascii(error)[1:-1]}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main, DataError)
