"""From raw text to token streams.

    python -m data.prepare tokens INPUTS... --tokenizer ranks.tiktoken --out data/mine/fr
    python -m data.prepare demo --out out/demo_data

INPUTS are files, globs and folders of .txt, .md, .jsonl and .json, each also as .gz or .zst, and of
.parquet and .arrow (see data/reading.py), on this machine or at s3://, https:// ...; or
hf:NAME#SUBSET, a data set of the Hugging Face Hub (see data/remote.py). `tokens` writes OUT.bin and
OUT.idx (see data/dataset.py), each document cleaned (see data/cleaning.py) and as `<s> text </s>`,
and a report, OUT.json. Documents held out by --validation go to OUT.valid instead; --split_by
language makes streams OUT.fr, OUT.en ...; --split_length 4096 makes OUT.short and OUT.long,
together OUT.fr.short and OUT.fr.long.valid. OUT.csv and OUT.valid.csv are mixtures of them to train
on, every token as often as any other. A run that is cut short goes on where it was by the same
command. `demo` makes the corpus, vocabulary and mixtures of `make demo` without any network.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, replace
from itertools import accumulate
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data import bpe_training, demo_corpus, tokenizer
from data.cleaning import RULES
from data.dataset import DataError
from data.reading import LARGEST, Source, find_files, place, size_of, version_of
from data.remote import HubDataset
from data.stream_writer import Parts, StreamWriter, write_json
from data.tokenizer import LucieTokenizer
from data.workers import AnyTokenizer, LeftOut, Options, Part, process, read_batches

PART = 1 << 26  # bytes of input after which a part is finished and kept
ERRORS = 100  # listed in the report; all are counted
STREAMS = 1000  # that one run may write
REASONS = ("error", "empty", "short", "duplicate")  # for leaving a document out
DEFAULTS = Options()
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)

DEMO_VOCAB_SIZE = 4096
# Lucie's shares of the main phase by language; then, for the annealing phase, facts in place of the
# mathematics, science, encyclopedia and dialogue of the real one, and more of the rarest language.
PUBLISHED = {
    "en": 0.332, "fr": 0.324, "code": 0.147, "de": 0.069, "es": 0.066, "it": 0.038,
    "parallel": 0.025,
}  # fmt: skip
DEMO_MIXTURES = {
    "pretraining": PUBLISHED,
    "extension": PUBLISHED,
    "annealing": {
        "facts": 0.82, "arithmetic": 0.03, "code": 0.03, "en": 0.02, "fr": 0.02, "de": 0.02,
        "es": 0.02, "it": 0.04,
    },
}  # fmt: skip


def tokenize(
    files: list[Source],
    encoder: AnyTokenizer,
    out: str | Path,
    options: Options = DEFAULTS,
    workers: int = 1,
    on_error: str = "stop",
    part_size: int = PART,
) -> dict:
    """Write the documents of the files to the streams `out`..., and return what OUT.json says.

    Work is cut into parts of part_size bytes of input, kept in OUT.parts until all are joined, so
    a run that was cut short goes on from its last part. Every byte written is the same for any
    number of workers and of interruptions. Raises DataError for a document that cannot be read,
    unless on_error is "skip", and for a connection that fails.
    Memory: a part, a few batches for each worker, one document; 8 bytes a document when joining.
    Disk: the parts are kept until all is joined, so twice the output.
    """
    if not 0 <= options.validation < 1:
        raise DataError(f"validation is a share from 0 to under 1, not {options.validation}")
    out = Path(out)
    report, folder = Path(f"{out}.json"), Path(f"{out}.parts")
    files = [f for f in files if not isinstance(f, Path) or f.absolute() != report.absolute()]
    _refuse_to_lose(out)
    names, files = list(map(str, files)), _pinned(files, folder)
    parts = Parts(folder, _describe(names, files, encoder, options, part_size))
    if parts.begun_anew:
        print(f"{parts.folder}: inputs or options are others now; begun anew", file=sys.stderr)
    elif parts.records:
        print(f"{parts.folder}: {len(parts.records)} parts are done; going on", file=sys.stderr)
    try:
        for record in parts.records:
            _stop_at(record["errors"], on_error)
        _make_parts(parts, files, encoder, options, workers, on_error, part_size)
        summary = _join(parts, encoder, out, options)
    except DataError:
        if not parts.records:
            parts.remove()
        raise
    _write_mixtures(out, summary["streams"], options)
    write_json(report, summary)
    parts.remove()
    return summary


def _refuse_to_lose(out: Path) -> None:
    """Raises DataError where a file that this command did not write has the name of a result."""
    report = Path(f"{out}.json")
    if report.exists() and _report(report) is None:
        raise DataError(f"{report}: no report of data.prepare, and would be lost: another --out")
    if not report.exists() and not Path(f"{out}.parts").exists():
        for suffix in ("csv", "valid.csv"):
            if Path(f"{out}.{suffix}").exists():
                raise DataError(f"{out}.{suffix}: is not of data.prepare and would be lost")


def _report(file: Path) -> dict | None:
    """What OUT.json says, if it is one."""
    try:
        found = json.loads(file.read_bytes()) if file.stat().st_size < LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(found, dict) and found.keys() >= {"documents_in", "streams"}
    return found if known else None


def _remove_streams(out: Path) -> None:
    """Remove what an earlier run wrote: of other options, its streams would lie beside the new,
    and what was held out of the one may be trained on in the other."""
    if report := _report(Path(f"{out}.json")):
        for name in report["streams"]:
            for suffix in ("idx", "bin"):
                out.with_name(f"{name}.{suffix}").unlink(missing_ok=True)
        for suffix in ("csv", "valid.csv", "json"):
            Path(f"{out}.{suffix}").unlink(missing_ok=True)


def _write_mixtures(out: Path, streams: dict[str, dict], options: Options) -> None:
    """OUT.csv and OUT.valid.csv, with a column for each field that documents were split by."""
    columns = ["name", "path", "weight"]
    columns += [field for field in options.split_by if field not in columns]
    for held_out, file in ((False, f"{out}.csv"), (True, f"{out}.valid.csv")):
        rows = []
        for name, stream in streams.items():
            suffix = name.removeprefix(out.name)
            if suffix.endswith(".valid") == held_out:
                values = dict(zip(options.split_by, map(unquote, suffix.split(".")[1:])))
                rows.append(values | {"name": name, "path": name, "weight": stream["tokens"]})
        if rows:
            with open(file, "w", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def _pinned(files: list[Source], folder: Path) -> list[Source]:
    """Data sets of the Hub at one commit: that of the parts there are, or else today's."""
    try:
        run = json.loads((folder / "run.record").read_text(encoding="utf-8"))
        commits = {name: version for name, _, version in run["files"]}
    except (OSError, ValueError):
        commits = {}
    pinned = []
    for file in files:
        if isinstance(file, HubDataset):
            commit = commits.get(ascii(str(file)))
            file = replace(file, revision=commit) if commit else file.pinned()
            print(f"reading {file}", file=sys.stderr)
        pinned.append(file)
    return pinned


def _describe(
    names: list[str], files: list[Source], encoder: AnyTokenizer, options: Options, part_size: int
) -> dict:
    """All that the parts depend on; `names` are those of the files as they were given."""
    ranks = encoder.source if isinstance(encoder, LucieTokenizer) else repr(encoder.ranks).encode()
    return {
        "format": 1,
        "options": asdict(options),
        "part_size": part_size,
        "tokenizer": hashlib.sha256(ranks).hexdigest(),
        "files": [[ascii(name), size_of(f), version_of(f)] for name, f in zip(names, files)],
    }


def _make_parts(
    parts: Parts,
    files: list[Source],
    encoder: AnyTokenizer,
    options: Options,
    workers: int,
    on_error: str,
    part_size: int,
) -> None:
    start, seen, streams = (0, 0, 0), set(), set()
    for number, record in enumerate(parts.records):
        start = record["end"]
        streams |= record["streams"].keys()
        if options.deduplicate:
            seen.update(map(bytes, parts.arrays(number, "digests")[0]))
    sizes = list(map(size_of, files))
    known = None not in sizes
    begins = list(accumulate(sizes, initial=0)) if known else [0] * (len(files) + 1)
    part, tokens = Part(), 0
    with tqdm(
        total=begins[-1] if known else None, initial=begins[start[0]] + start[2], unit="B",
        unit_scale=True, desc="tokens", smoothing=0.05,
    ) as bar:  # fmt: skip
        batches = read_batches(files, options, start, part_size)
        for batch, done in process(batches, encoder, options, workers):
            part.count(done, seen if options.deduplicate else None)
            tokens += len(done.tokens)
            for (file, number), result in zip(batch.places, done.results):
                if isinstance(result, LeftOut) and result.error:
                    part.errors.append(f"{place(files[file], number)}: {result.error}")
                    del part.errors[ERRORS:]
                    _stop_at(part.errors, on_error)
            if len(streams | part.streams.keys()) > STREAMS:
                raise DataError(
                    f"over {STREAMS:,} streams: {', '.join(options.split_by)} has too many values"
                )
            file = batch.places[-1][0]
            bar.set_postfix_str(_per_second(tokens, bar), refresh=False)
            # Bytes of the files as stored, or of the documents where their size is unknown.
            bar.update(begins[file] + batch.position - bar.n if known else done.size)
            if batch.ends_part:
                parts.add(*part.packed(batch.end, encoder.dtype))
                streams |= part.streams.keys()
                part = Part()


def _per_second(tokens: int, bar: tqdm) -> str:
    elapsed = bar.format_dict["elapsed"]
    return f"{tqdm.format_sizeof(tokens / elapsed)} tokens/s" if elapsed else ""


def _stop_at(errors: list[str], on_error: str) -> None:
    if errors and on_error == "stop":
        raise DataError(f"{errors[0]} (--on_error skip leaves it out and goes on)")


def _join(parts: Parts, encoder: AnyTokenizer, out: Path, options: Options) -> dict:
    """Write the streams, one after another, and return the report."""
    counts, changed = Counter(), Counter()
    for record in parts.records:
        counts.update(record["counts"])
        changed.update(record["changed"])
    reasons = {reason: counts[reason] for reason in REASONS}
    assert counts["in"] == counts["out"] + sum(reasons.values()), counts
    names = list(dict.fromkeys(name for record in parts.records for name in record["streams"]))
    held_out = [name for name in names if name.endswith(".valid")]
    for part, found in (("training", len(names) > len(held_out)), ("validation", held_out)):
        if not found and (part == "training" or options.validation):
            kept = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            hint = "; --validation holds out whole documents" if counts["out"] else ""
            raise DataError(
                f"{out}: no document for {part}: of {counts['in']:,} read {counts['out']:,} were "
                f"kept ({kept}){hint}"
            )
    errors = [error for record in parts.records for error in record["errors"]][:ERRORS]
    _remove_streams(out)
    return {
        "options": asdict(options) | {"split_by": [*options.split_by]},
        "documents_in": counts["in"],
        "documents": counts["out"],
        "left_out": reasons,
        "changed": {rule: changed[rule] for rule in RULES},
        "errors": errors,
        "streams": {f"{out.name}{name}": _join_stream(parts, encoder, out, name) for name in names},
    }


def _join_stream(parts: Parts, encoder: AnyTokenizer, out: Path, name: str) -> dict:
    characters = size = 0
    with StreamWriter(f"{out}{name}", encoder.vocab_size) as stream:
        for part, record in enumerate(parts.records):
            if name in record["streams"]:
                number, more_characters, more_size = record["streams"][name]
                stream.add_many(*parts.arrays(part, f"tokens{number}", f"lengths{number}"))
                characters, size = characters + more_characters, size + more_size
    lengths = np.frombuffer(stream.lengths, np.int32)
    quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf").tolist()
    files = {suffix: Path(f"{out}{name}.{suffix}") for suffix in ("bin", "idx")}
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "characters": characters,
        "bytes": size,
        "tokens_per_document": {f"{q:.0%}": n for q, n in zip(QUANTILES, quantiles)},
        "sha256": {suffix: _sha256(file) for suffix, file in files.items()},
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_mixture(path: Path, weights: dict[str, float], place: str = "{}") -> None:
    """A mixture CSV of the streams that lie beside it; place: their paths, {} being the name."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("name", "path", "weight"))
        writer.writerows((name, place.format(name), weight) for name, weight in weights.items())


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
    for split in ("train", "valid"):
        file = out / "texts" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with open(file, "w", encoding="utf-8") as f:
            for source in demo_corpus.SOURCES:
                known = documents.get(source) if split == "train" else None
                for text in known or demo_corpus.documents(source, split):
                    f.write(json.dumps({"source": source, "text": text}) + "\n")
        tokenize([file], ranks, out / split, Options(split_by=("source",)))
    for name, weights in DEMO_MIXTURES.items():
        write_mixture(out / f"{name}.csv", weights, "train.{}")
    write_mixture(out / "validation.csv", PUBLISHED, "valid.{}")


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text files to token streams")
    tokens.add_argument("inputs", nargs="+")
    tokens.add_argument("--tokenizer", required=True, help="ranks file or tokenizer.json")
    tokens.add_argument("--out", required=True, help="stream to write, without suffix")
    tokens.add_argument("--text_field", default="text")
    tokens.add_argument(
        "--split_by", nargs="+", default=(), metavar="FIELD", help="a stream for each of its values"
    )
    tokens.add_argument("--validation", type=float, default=0.0, help="share of documents held out")
    tokens.add_argument("--min_characters", type=int, default=0, help="of a document to be kept")
    tokens.add_argument("--deduplicate", action="store_true", help="keep the first of equal texts")
    tokens.add_argument("--split_length", type=int, help="tokens; longer documents go to OUT.long")
    tokens.add_argument("--on_error", choices=("stop", "skip"), default="stop")
    tokens.add_argument("--processes", type=int, default=_cores())
    demo = commands.add_parser("demo", help="the corpus of make demo")
    demo.add_argument("--out", default="out/demo_data")
    args = parser.parse_args(argv)
    if args.command == "tokens" and (
        args.processes < 1 or args.min_characters < 0 or (args.split_length or 1) < 1
    ):
        raise ConfigError(
            "--processes and --split_length are 1 or more, --min_characters 0 or more"
        )
    if args.command == "demo":
        prepare_demo(Path(args.out))
    else:
        _tokens(args)


def _tokens(args: argparse.Namespace) -> None:
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    options = replace(options, split_by=tuple(options.split_by))
    encoder, files = tokenizer.load(args.tokenizer), find_files(args.inputs)
    began = time.monotonic()
    try:
        report = tokenize(files, encoder, args.out, options, args.processes, args.on_error)
    except BrokenProcessPool:
        raise DataError("a process died, perhaps out of memory; try --processes 1") from None
    seconds = time.monotonic() - began
    for name, stream in report["streams"].items():
        print(f"{name}: documents {stream['documents']:,}, tokens {stream['tokens']:,}")
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in report["left_out"].items())
    print(f"documents {report['documents']:,} of {report['documents_in']:,}; left out: {left_out}")
    for error in report["errors"]:
        print(f"left out: {ascii(error)[1:-1]}", file=sys.stderr)
    size = sum(stream["bytes"] for stream in report["streams"].values()) / 1e6
    here, worker = peak_memory()
    memory = f"peak memory {here:,.0f} MB" + (f" and {worker:,.0f} MB a worker" if worker else "")
    rate = f"{size:,.1f} MB of text in {seconds:,.1f} s, {size / seconds:,.1f} MB/s"
    print(f"{rate}, {memory}; see {args.out}.json")


def _cores() -> int:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> tuple[float, float]:
    """MB of this process, and of the largest of its children that ended; 0 where not known."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0.0, 0.0
    # Linux counts in kibibytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    here, children = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return tuple(resource.getrusage(who).ru_maxrss * unit / 1e6 for who in (here, children))


if __name__ == "__main__":
    run_cli(main, DataError)
