"""Speed of data.prepare in every form of input, against `datasets` with the `tokenizers` library.

    python -m bench.prepare TOKENIZER_JSON FILES... [--megabytes 200] [--processes 2] [--repeats 2]

FILES are what data.prepare reads. Their documents, repeated with other words until there are
enough, are written as .jsonl, .jsonl.gz, .jsonl.zst and .parquet. Each is made token streams by
data.prepare's tokenize(); the .jsonl also by load_dataset("json").map(..., batched=True), which
calls encode_batch_fast and keeps ids alone, and save_to_disk. All take turns, each in a process of
its own with as many workers. A time starts with the tokenizer loaded and ends with the output on
disk. MB are 10^6 bytes of text in UTF-8; peak memory is that of the main process and of the largest
worker.

The floor is the text read once and 2 bytes a token written, which a disk does at some GB/s; the
tokenizer bounds it.

Exit code 1 where the numbers of tokens differ. Needs: pip install datasets tokenizers pyarrow
backports.zstd.
"""

import argparse
import gzip
import io
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError
from data.prepare import clean, find_files, read_documents, tokenize, zstd
from data.tokenizer import SPECIAL_TOKENS, load

FORMS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
THEIRS = "datasets.map, jsonl"
NEEDED = ("datasets", "tokenizers", "pyarrow")
GROUP = 1000  # rows of a .parquet's group


class Figures(NamedTuple):
    seconds: float
    tokens: int  # with <s>, without </s>
    main: float  # peak memory in MB
    worker: float


def vary(text: str, copy: int) -> str:
    """A text whose every 50th word is another in each copy, so that no two copies are equal."""
    words = text.split(" ")
    for i in range(0, len(words), 50):
        words[i] += str(1000 * copy + i) if copy else ""
    return " ".join(words)


def documents(files: list[Path], megabytes: float) -> Iterator[str]:
    """Documents of so many MB in all, as cleaning leaves them, and without special tokens.

    Raises DataError if the files hold none.
    """
    left, copy = megabytes * 1e6, 0
    while left > 0:
        before = left
        for text in read_documents(files):
            text = clean(vary(text, copy))
            # tokenizers reads special tokens in a text; for us they are text.
            if text.strip() and not any(token in text for token in SPECIAL_TOKENS):
                yield text
                left -= len(text.encode())
                if left <= 0:
                    return
        if left == before:
            raise DataError("the files hold no text")
        copy += 1


def write_forms(files: list[Path], folder: Path, megabytes: float) -> tuple[int, int]:
    """The documents as folder/texts.FORM; how many there are, and their bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, size, rows = 0, 0, []
    schema = pa.schema({"text": pa.string()})
    with (
        open(folder / "texts.jsonl", "wb") as plain,
        gzip.open(folder / "texts.jsonl.gz", "wb", 6) as gz,
        zstd.open(folder / "texts.jsonl.zst", "wb") as zst,
        pq.ParquetWriter(folder / "texts.parquet", schema) as parquet,
        tqdm(total=megabytes, unit="MB", desc="write", leave=False) as bar,
    ):
        for text in documents(files, megabytes):
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            for file in (plain, gz, zst):
                file.write(line)
            rows.append(text)
            if len(rows) == GROUP:
                parquet.write_table(pa.table({"text": rows}, schema))
                rows = []
            count, size = count + 1, size + len(text.encode())
            bar.update(len(text.encode()) / 1e6)
        parquet.write_table(pa.table({"text": rows}, schema))
    return count, size


def ours(file: Path, tokenizer: Path, out: Path, processes: int) -> Figures:
    encoder = load(tokenizer)
    with redirect_stderr(io.StringIO()):  # its progress bar
        start = time.perf_counter()
        report = tokenize([file], encoder, out / "x", processes=processes)
        seconds = time.perf_counter() - start
    tokens = report["streams"]["x"]["tokens"] - report["documents"]
    return Figures(seconds, tokens, *peak_memory())


def theirs(file: Path, tokenizer: Path, out: Path, processes: int) -> Figures:
    import datasets
    import tokenizers

    # As many processes as are asked for, not threads in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    file_of_it = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    encoder = tokenizers.Tokenizer.from_file(str(file_of_it))

    def encode(batch: dict) -> dict:
        return {"ids": [found.ids for found in encoder.encode_batch_fast(batch["text"])]}

    start = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(out / "cache")
    )
    rows = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
    rows.save_to_disk(str(out / "saved"))
    seconds = time.perf_counter() - start
    peaks = peak_memory()
    lengths = (len(ids) for batch in rows.with_format("arrow").iter(GROUP) for ids in batch["ids"])
    return Figures(seconds, sum(lengths), *peaks)


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


def alone(function: Callable, *args: object) -> object:
    """The function's result, in a process of its own, whose peak memory is then its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *args).result()


def run(tokenizer: Path, folder: Path, processes: int, repeats: int) -> dict[str, list[Figures]]:
    """Figures of each of the repeats, in turns, by name."""
    peers = {f"ours, {form}": (ours, folder / f"texts.{form}") for form in FORMS}
    peers[THEIRS] = (theirs, folder / "texts.jsonl")
    found: dict[str, list[Figures]] = {name: [] for name in peers}
    turns = [name for _ in range(repeats) for name in peers]
    for name in tqdm(turns, desc="measure", leave=False):
        function, file = peers[name]
        out = folder / "out"
        out.mkdir()
        found[name].append(alone(function, file, tokenizer, out, processes))
        shutil.rmtree(out)
    return found


def show(found: dict[str, list[Figures]], size: int) -> None:
    """The best of each, all in brackets."""
    best = {name: min(figures).seconds for name, figures in found.items()}
    print(
        f"{'':24} {'MB/s':>7} {'tokens/s':>11} {'of datasets':>12} {'of jsonl':>9} "
        f"{'main MB':>8} {'worker MB':>10}   MB/s of each run"
    )
    for name, figures in found.items():
        rates = [size / 1e6 / f.seconds for f in figures]
        memory = [max(f[i] for f in figures) for i in (2, 3)]
        print(
            f"{name:24} {max(rates):7.2f} {figures[0].tokens / best[name]:11,.0f} "
            f"{best[THEIRS] / best[name]:11.2f}x {best['ours, jsonl'] / best[name]:8.2f}x "
            f"{memory[0]:8,.0f} {memory[1]:10,.0f}   {', '.join(f'{rate:.2f}' for rate in rates)}"
        )


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="bench.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, or the folder it is in")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--megabytes", type=float, default=200, help="of text")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing := missing + ([] if zstd else ["backports.zstd"]):
        raise ConfigError(f"what it measures with is missing: pip install {' '.join(missing)}")
    load(args.tokenizer)
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder, files = Path(name), find_files(args.files)
        count, size = alone(write_forms, files, folder, args.megabytes)
        found = run(args.tokenizer, folder, args.processes, args.repeats)
    print(
        f"{size / 1e6:.1f} MB, {count:,} documents; {args.processes} processes, {os.cpu_count()} "
        f"cores, Python {platform.python_version()}; best of {args.repeats}"
    )
    show(found, size)
    tokens = {name: figures[0].tokens for name, figures in found.items()}
    if len(set(tokens.values())) > 1:
        print(f"bench.prepare: the numbers of tokens differ: {tokens}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_cli(main, DataError)
