"""Speed of our tokenizers and of data.prepare, each beside its baseline.

    python -m bench.text tokenizer TOKENIZER FILES... [--megabytes 20] [--repeats 2]
    python -m bench.text prepare TOKENIZER FILES... [--megabytes 20] [--repeats 2] [--processes 2]

TOKENIZER is a tokenizer.json or the folder it is in; FILES are what data.prepare reads. Texts that
spell a special token ("<s>") are left out: `encode` and the library read it as that token, while
data.prepare reads it as text. All take turns, and the best of the repeats counts. MB are 10^6 bytes
of UTF-8.

tokenizer: encoding on one core, beside the `tokenizers` library.
prepare: writing token streams from a .jsonl, beside load_dataset("json").map(batched=True) with
encode_batch_fast and save_to_disk, with as many processes.

Exit code 1 where the numbers of tokens differ.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError
from data.files import find_files, read_documents
from data.streams import clean, tokenize
from data.tokenizer import SPECIAL_TOKENS, load


def documents(files: list, megabytes: float) -> Iterator[str]:
    """Cleaned documents of so many MB, the same share of each file, or all there are."""
    for file in files:
        left = megabytes * 1e6 / len(files)
        for text in map(clean, read_documents([file])):
            if left <= 0:
                break
            if text.strip() and not any(token in text for token in SPECIAL_TOKENS):
                yield text
                left -= len(text.encode())


def encoders(path: Path, texts: list[str]) -> dict[str, Callable[[], int]]:
    """Functions that encode all texts and return the number of tokens; ours first."""
    ours, theirs = load(path), library(path)
    return {
        "ours, encode": lambda: sum(len(ours.encode(text)) for text in texts),
        "ours, encode_document": lambda: sum(len(ours.encode_document(t)) - 1 for t in texts),
        "tokenizers, encode": lambda: sum(len(theirs.encode(text).ids) for text in texts),
        "tokenizers, encode_batch_fast": lambda: sum(map(len, theirs.encode_batch_fast(texts))),
    }


def preparations(
    path: Path, texts: list[str], folder: Path, processes: int
) -> dict[str, Callable[[], int]]:
    """Functions that write all texts as tokens into `folder` and return the number of tokens."""
    import datasets
    from pyarrow import compute

    datasets.disable_progress_bars()
    ours, theirs = load(path), library(path)
    file = folder / "texts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8")

    def encode(batch: dict) -> dict:
        return {"ids": [found.ids for found in theirs.encode_batch_fast(batch["text"])]}

    def by_prepare() -> int:
        out = Path(tempfile.mkdtemp(dir=folder), "x")
        report = tokenize(find_files([file]), ours, out, processes=processes)
        return report["streams"]["x"]["tokens"] - report["documents"]

    def by_datasets() -> int:
        out = tempfile.mkdtemp(dir=folder)
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=out)
        rows = rows.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
        rows.save_to_disk(f"{out}/saved")
        return compute.sum(compute.list_value_length(rows.data.column("ids"))).as_py()

    return {"data.prepare": by_prepare, "datasets.map": by_datasets}


def library(path: Path) -> object:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes as asked for, and no threads in them
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))


def compare(functions: dict[str, Callable[[], int]], megabytes: float, repeats: int) -> int:
    """Print MB/s of each, and how many times faster the first is; the exit code."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    tokens = {}
    for name in tqdm([*functions] * repeats, desc="measure", leave=False):
        begin = time.perf_counter()
        tokens[name] = functions[name]()
        rates[name].append(megabytes / (time.perf_counter() - begin))
    ours = max(next(iter(rates.values())))
    for name, found in rates.items():
        each = ", ".join(f"{rate:.2f}" for rate in found)
        print(f"{name:30} {max(found):7.2f} MB/s {ours / max(found):6.2f}x   each run: {each}")
    if differ := len(set(tokens.values())) > 1:
        print(f"the numbers of tokens differ: {tokens}")
    return int(differ)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.text", description=__doc__)
    parser.add_argument("command", choices=("tokenizer", "prepare"), help="what is measured")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, or the folder it is in")
    parser.add_argument("files", nargs="+", help="text, as data.prepare reads it")
    parser.add_argument("--megabytes", type=float, default=20, help="of text, at most")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the best counts")
    parser.add_argument("--processes", type=int, default=2, help="of each preparation")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.megabytes <= 0:
        raise ConfigError("--repeats must be at least 1, and --megabytes above 0")
    texts = list(documents(find_files(args.files), args.megabytes))
    if not texts:
        raise DataError("the files hold no text")
    size = sum(len(text.encode()) for text in texts) / 1e6
    cores = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{size:.1f} MB in {len(texts):,} documents; {cores}")
    try:
        if args.command == "tokenizer":
            return compare(encoders(args.tokenizer, texts), size, args.repeats)
        with tempfile.TemporaryDirectory(prefix="bench-text-") as folder:
            found = preparations(args.tokenizer, texts, Path(folder), args.processes)
            return compare(found, size, args.repeats)
    except ImportError as error:
        raise ConfigError(f"pip install tokenizers datasets, to compare with ({error})") from None


if __name__ == "__main__":
    run_cli(main, DataError)
