"""From documents to token streams: cleaned, tokenized by several processes, written in order.

`tokenize` goes on where an earlier call with the same inputs and options stopped. Every byte that
it writes is the same for any number of processes and of interruptions.
"""

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from tqdm import tqdm

from config.cli import lock, write_file
from data import tokenizer as tokenizers
from data.dataset import (
    DTYPES,
    EOS,
    HEADER,
    MAGIC,
    DataError,
    open_store,
    size_of,
    store_errors,
    token_dtype,
)
from data.files import Record, Source, location, parse, records
from data.tokenizer import LucieBPE, Tokenizer

BATCH_BYTES = 1 << 18  # bytes handed to a process at a time
OVERHEAD = 512  # bytes of memory that a document takes besides its text
IN_FLIGHT = 4  # batches read in advance, for each process
SAVE_EVERY = 5.0  # seconds after which a finished input file is worth noting down
CHUNK = 1 << 20  # tokens looked at together
OTHER = "other inputs or options: choose another --out, or give --overwrite"
ERRORS = 100  # listed in the report; all are counted
STREAMS = 1000  # that one run may write
HELD_OUT = 10  # documents that should be held out; where fewer would be, tails are
REASONS = ("error", "empty")  # for leaving a document out
# Of a StreamWriter, in progress.json:
SAVED = {"run", "tails", "files_done", "counts", "errors", "sizes", "stored", "taken", "report"}


@dataclass(frozen=True)
class Options:
    """How documents are processed."""

    text_field: str = "text"
    split_by: tuple[str, ...] = ()  # fields, whose every combination of values is a stream
    validation: float = 0.0  # share of the text held out; a document's text alone decides
    split_length: int | None = None  # documents of more tokens, <s> and </s> included, are apart


class Due(NamedTuple):
    """What is due after an input file."""

    source: str
    tokens: int  # of this source, from this file and those before it


# --- what is done to a document ------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
LINE_ENDS = {"\v": "\n", "\f": "\n", "\x85": "\n"}


def clean(text: str) -> str:
    """The text as it is trained on.

    Halves of UTF-16 pairs, as JSON may write them, become their character, single ones U+FFFD.
    Windows line ends become a line feed, as do control characters that end a line or a page
    (vertical tab, form feed, next line); other control characters go, except tab, line feed and
    carriage return. Unicode is composed (NFC), as the tokenizers see it.
    """
    text = CONTROL.sub(lambda found: LINE_ENDS.get(found[0], ""), tokenizers.whole(text))
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def hash_fraction(text: str, salt: bytes = b"") -> float:
    """A number from 0 to under 1, even over texts, that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode() + salt).digest()[:8], "big") / 2**64


def split_tail(text: str, share: float) -> list[tuple[str, bool]]:
    """The text in two, each part with whether it is held out: about `share` of it at the end.

    The tail begins where a paragraph does, or else a line or a word.
    """
    tail = max(1, round(len(text) * share))
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    at = max(first + 1, last - tail)  # so that neither part is blank
    for border in ("\n\n", "\n", " "):
        if (found := text.rfind(border, max(first + 1, at - tail), at)) >= 0:
            at = found + len(border)
            break
    return [(part, held_out) for part, held_out in ((text[:at], False), (text[at:], True)) if part]


def suffix_of(values: list[str], length: str, held_out: bool) -> str:
    """What follows OUT in the name of a stream. length: "short", "long" or ""."""
    words = [*map(_escaped, values), length, "valid" if held_out else ""]
    return "".join(f".{word}" for word in words if word)


def _escaped(value: str) -> str:
    # No value makes a folder, or one of the words that may follow it.
    name = quote(value, safe="").replace(".", "%2E")
    return f"%{ord(name[0]):02X}{name[1:]}" if name in ("short", "long", "valid") else name


class Result(NamedTuple):
    """What became of a batch of records."""

    counts: Counter[str]  # of "out" and the REASONS
    errors: list[str]
    documents: list[tuple[str, int, int]]  # the suffix of its stream, bytes, tokens
    tokens: np.ndarray  # one array, because many small ones are sent slowly between processes


def to_documents(
    batch: list[tuple[Source, Record]],
    tokenizer: Tokenizer,
    options: Options,
    tails: bool,
    names: dict[Source, str],
) -> Result:
    """Parse, clean and tokenize records, each with its file.

    tails: see `holds_out_tails`. names: the first part of a stream's name, of files that give one.
    """
    empty = np.empty(0, token_dtype(tokenizer.vocab_size))
    counts, errors, documents, tokens = Counter(), [], [], [empty]
    for source, record in batch:
        reason, parts, ids = "error", [], []
        try:
            text, *values = parse(record, [options.text_field, *options.split_by])
            for name, value in zip(options.split_by, values):
                if not value or not value.isprintable() or len(_escaped(value)) > 100:
                    raise ValueError(f"its field {name!r} cannot be part of a file's name")
            text = clean(text)
            if not text.strip():
                reason = "empty"
            else:
                if tails:
                    parts = split_tail(text, options.validation)
                else:
                    parts = [(text, hash_fraction(text) < options.validation)]
                ids = [tokenizer.encode_document(part) for part, _ in parts]
                reason = "out"
        except ValueError as error:  # tiktoken's regex gives up on a million spaces in a row, too
            errors.append(f"{location(source, record.number)}: {error}")
        counts[reason] += 1
        tokens += ids
        for (part, held_out), document in zip(parts, ids):
            length = ""
            if options.split_length is not None:
                length = "long" if len(document) > options.split_length else "short"
            named = [names[source]] if source in names else []
            suffix = suffix_of(named + values, length, held_out)
            documents.append((suffix, len(part.encode()), len(document)))
    return Result(counts, errors, documents, np.concatenate(tokens))


# --- processes -----------------------------------------------------------------------------------


# Records with their files, the number of the last of these, from 1, and whether it ends here and is
# worth noting down.
Batch = tuple[list[tuple[Source, Record]], int, bool]


def read_batches(
    files: list[Source],
    columns: list[str],
    first: int = 0,
    enough: Callable[[int], bool] | None = None,
) -> Iterator[Batch]:
    """The records of the files from number `first` on, each with its file, in batches.

    enough: whether the file of this number need not be read, or read further. With it no batch has
    records of two files.
    """
    batch, size, saved = [], 0, time.monotonic()
    for number, file in enumerate(files[first:], start=first + 1):
        for record in () if enough and enough(number) else records(file, columns):
            if enough and enough(number):
                break
            weight = record.size + OVERHEAD
            if batch and size + weight > BATCH_BYTES:
                yield batch, number, False
                batch, size = [], 0
            batch.append((file, record))
            size += weight
        ends = number == len(files) or time.monotonic() - saved >= SAVE_EVERY
        if ends or (enough and batch):
            yield batch, number, ends
            batch, size = [], 0
            saved = time.monotonic() if ends else saved


def process(
    batches: Iterable[Batch], work: Callable[[list], Result], processes: int
) -> Iterator[tuple[Result, int, bool]]:
    """What becomes of each batch, in order; IN_FLIGHT for each process are read ahead."""
    if processes == 1:
        yield from ((work(batch), *where) for batch, *where in batches)
        return
    pending: deque = deque()
    # spawn: a forked child of a process that runs threads can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (work,)) as pool:
        try:
            for batch, *where in chain(batches, repeat(([], 0, False), IN_FLIGHT * processes)):
                pending.append((pool.submit(_to_documents, batch), where))
                if len(pending) > IN_FLIGHT * processes:
                    future, where = pending.popleft()
                    yield future.result(), *where
        except BrokenProcessPool:
            raise DataError("a process died, perhaps out of memory; try --processes 1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_process(work: Callable[[list], Result]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _to_documents(batch: list) -> Result:
    return _work(batch)


# --- writing streams -----------------------------------------------------------------------------


class StreamWriter:
    """The streams of a run, in the folder OUT.unfinished, whose progress.json counts what is done.

    A run goes on after the last input file that is counted; what later files gave is cut off. `run`
    identifies inputs and options. dues: see `tokenize`. Raises DataError where another run has
    begun, unless `overwrite`.
    """

    def __init__(self, out: Path, run: str, overwrite: bool, dues: list[Due] | None = None) -> None:
        self.out, self.overwrite, self.dues = out, overwrite, dues
        self.folder = Path(f"{out}.unfinished")
        self.run, self.tails, self.files_done = run, False, 0
        self.counts: Counter[str] = Counter()  # of "out" and the REASONS
        self.errors: list[str] = []
        self.sizes: Counter[str] = Counter()  # bytes of the text of each stream, by its suffix
        self.stored: Counter[str] = Counter()  # bytes of tokens in its file
        self.taken: Counter[str] = Counter()  # tokens to train on of each source of `dues`
        self.closed = 0  # the number of the last file of which documents were left out
        self.report: dict = {}  # once all is done
        known = read_json(self.folder / "progress.json")
        if known.get("run") != run:
            if known.get("files_done") and not overwrite:
                raise DataError(f"{out}: holds an unfinished run of {OTHER}")
            self.discard()
            self.folder.mkdir()
            self.save()
            return
        for name in SAVED & known.keys():
            setattr(self, name, type(getattr(self, name))(known[name]))
        for suffix, size in self.stored.items() if not self.report else ():
            if (size_of(self.file(suffix)) or 0) < size:
                raise DataError(f"{self.file(suffix)}: truncated; remove {self.folder}")
            os.truncate(self.file(suffix), size)
        print(f"{out}: {self.files_done} input files are done; going on", file=sys.stderr)

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.out.name}{suffix}.bin"

    def discard(self) -> None:
        # progress.json first: without it nothing goes on from a folder that is half removed.
        (self.folder / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> None:
        """Note down how far the run is, once what is counted is on disk."""
        for suffix in self.stored:
            with open(self.file(suffix), "ab") as f:
                os.fsync(f.fileno())
        write_json(self.folder / "progress.json", {name: getattr(self, name) for name in SAVED})

    def enough(self, number: int) -> bool:
        """Whether the file of this number has given what is due."""
        source, due = self.dues[number - 1]
        return self.taken[source] >= due or number <= self.closed

    def up_to_due(self, result: Result, number: int) -> Result:
        """The documents of a result, all of one file, up to the one that would lead further from
        what is due than towards it."""
        if not number or self.enough(number):
            return Result(Counter(), [], [], result.tokens[:0])
        source, due = self.dues[number - 1]
        kept = length = 0
        for suffix, _, tokens in result.documents:
            if self.taken[source] and self.taken[source] + tokens / 2 > due:
                self.closed = number
                break
            if not suffix.endswith(".valid"):
                self.taken[source] += tokens
            kept, length = kept + 1, length + tokens
        counts = result.counts - Counter(out=len(result.documents) - kept)
        return Result(counts, result.errors, result.documents[:kept], result.tokens[:length])

    def add(self, result: Result) -> None:
        """Append what a batch became to its streams.

        Raises DataError for over STREAMS streams, and for one that has the name of another that is
        there, unless `overwrite`.
        """
        self.counts.update(result.counts)
        self.errors += result.errors[: ERRORS - len(self.errors)]
        parts, start = defaultdict(list), 0
        for suffix, size, length in result.documents:
            parts[suffix].append(result.tokens[start : start + length])
            self.sizes[suffix] += size
            start += length
        for suffix, tokens in parts.items():
            there = self.out.with_name(self.file(suffix).name)
            if suffix not in self.stored and there.exists() and not self.overwrite:
                raise DataError(f"{there}: was made from {OTHER}")
            with open(self.file(suffix), "ab" if suffix in self.stored else "wb") as f:
                f.write(np.concatenate(tokens).tobytes())
                self.stored[suffix] = f.tell()
        if len(self.stored) > STREAMS:
            raise DataError(f"over {STREAMS:,} streams: the fields to split by have many values")

    def fill(self, results: Iterable[tuple[Result, int, bool]], on_error: str) -> None:
        """Append all batches. Raises DataError for an error in one, unless on_error is "skip"."""
        shown: dict = {"initial": sum(self.counts.values()), "unit": " documents"}
        if self.dues:
            total = sum({due.source: due.tokens for due in self.dues}.values())
            shown = {"initial": sum(self.taken.values()), "unit": " tokens", "total": total}
            shown["unit_scale"] = True
        with tqdm(**shown, desc="tokens", smoothing=0.05) as bar:
            for result, number, ends in results:
                if self.dues:
                    result = self.up_to_due(result, number)
                self.add(result)
                if self.errors and on_error == "stop":
                    raise DataError(f"{self.errors[0]} (--on_error skip leaves it out and goes on)")
                if ends:
                    self.files_done = number
                    self.save()
                done = sum((self.taken if self.dues else self.counts).values())
                bar.update(done - bar.n)

    def index(self, split_by: tuple[str, ...], dtype: np.dtype) -> dict[str, dict]:
        """Write an .idx beside each .bin, and return what the report says of the streams."""
        found = {}
        for suffix, stored in tqdm(self.stored.items(), desc="index", leave=False):
            lengths, digest, begun, file = array("i"), hashlib.sha256(), 0, self.file(suffix)
            with open(file, "rb") as f:
                while content := f.read(CHUNK * dtype.itemsize):
                    digest.update(content)
                    tokens = np.frombuffer(content, dtype)
                    # Every document ends with </s>, which no text gives.
                    ends = np.flatnonzero(tokens == EOS) + 1
                    lengths.frombytes(np.diff(ends, prepend=-begun).astype(np.int32).tobytes())
                    begun = len(tokens) - int(ends[-1]) if len(ends) else begun + len(tokens)
            index = write_index(file.with_suffix(".idx"), np.frombuffer(lengths, np.int32), dtype)
            found[file.stem] = {
                "split_by": dict(zip(split_by, map(unquote, suffix.split(".")[1:]))),
                "held_out": suffix.endswith(".valid"),
                "documents": len(lengths),
                "tokens": stored // dtype.itemsize,
                "bytes": self.sizes[suffix],
                "sha256": {"bin": digest.hexdigest(), "idx": index},
            }
        return found


def write_index(file: Path | str, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Write an .idx of Megatron's format, and return its SHA-256.

    lengths: tokens of each document, int32.
    """
    count = len(lengths)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sizes = lengths.astype(np.int64) * dtype.itemsize
    offsets, boundaries = np.cumsum(sizes) - sizes, np.arange(count + 1, dtype=np.int64)
    arrays = (array.tobytes() for array in (lengths, offsets, boundaries))
    content = HEADER.pack(MAGIC, 1, code, count, count + 1) + b"".join(arrays)
    write_file(file, content)
    return hashlib.sha256(content).hexdigest()


def write_mixture(path: Path, rows: list[dict]) -> None:
    """A mixture CSV; the columns are the keys of the first row: name, path, weight ..."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def write_json(path: str | Path, content: dict) -> None:
    # In ASCII, because names of files may not be UTF-8.
    write_file(path, json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: str | Path) -> dict:
    """What a report or a progress file says; {} where it is not there or something else."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(Path(path).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


# --- tokens --------------------------------------------------------------------------------------


def tokenize(
    files: list[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    options: Options | None = None,
    processes: int = 1,
    on_error: str = "stop",
    overwrite: bool = False,
    dues: list[Due] | None = None,
) -> dict:
    """Write the documents of the files to the streams `out`..., and return what OUT.json says.

    dues: of each file, the source that it belongs to, which becomes part of the names of its
    streams, and how many tokens to train on that source is to have after it. Later documents are
    left out, and not read; whole documents are held out.

    Every byte written is the same for any number of processes and of interruptions. Raises
    DataError for a document that cannot be read, unless on_error is "skip", for a connection that
    fails, where another process writes to `out`, and where the results of other inputs or options
    would be lost, unless `overwrite`.
    """
    options, out = options or Options(), Path(out)
    if not 0 <= options.validation < 1:
        raise DataError(f"validation is a share from 0 to under 1, not {options.validation}")
    if (lock_file := lock(out)) is None:
        raise DataError(f"{out}: another process is writing to it")
    with lock_file:
        if not dues:  # else the files are listed, and the results do not lie among them
            own = re.compile(re.escape(os.path.realpath(out)) + r"(\.json$|\.unfinished/)")
            files = [file for file in files if not own.match(os.path.realpath(file))]
        run, report = _identity(files, tokenizer, options, dues), Path(f"{out}.json")
        before = read_json(report)
        if before.get("run") == run:
            print(f"{out}: already up to date", file=sys.stderr)
            return before
        if report.exists() and not overwrite:
            raise DataError(f"{report}: was made from {OTHER}")
        writer = StreamWriter(out, run, overwrite, dues)
        if not writer.report:
            if options.validation and not (writer.files_done or dues):
                writer.tails = holds_out_tails(files, options)
            work = partial(
                to_documents,
                tokenizer=tokenizer,
                options=options,
                tails=writer.tails,
                names={file: due.source for file, due in zip(files, dues or ())},
            )
            columns = [options.text_field, *options.split_by]
            enough = writer.enough if dues else None
            batches = read_batches(files, columns, writer.files_done, enough)
            writer.fill(process(batches, work, processes), on_error)
            _finish(writer, options, token_dtype(tokenizer.vocab_size))
        _put_in_place(writer, before.get("streams", ()))
        return writer.report


def _identity(
    files: list[Source], tokenizer: Tokenizer, options: Options, dues: list[Due] | None
) -> str:
    """A digest of all that the streams depend on."""
    bpe = tokenizer.bpe
    ranks = bpe.source if isinstance(bpe, LucieBPE) else repr(bpe.ranks).encode()
    versions = []
    for file in files:  # what changes with its content: a time or a checksum
        if isinstance(file, Path):
            version = file.stat().st_mtime_ns
        else:
            with store_errors(file):
                store, path = open_store(file)
                version = store.ukey(path)
        versions.append((str(file), size_of(file), version))
    known = ("format 3", hashlib.sha256(ranks).hexdigest(), options, versions)
    known += (dues,) if dues else ()
    return hashlib.sha256(ascii(known).encode()).hexdigest()


def _put_in_place(writer: StreamWriter, old: Iterable[str]) -> None:
    """Replace the streams of an earlier run by those in OUT.unfinished.

    The report goes first and comes last: where it is, there is all that it describes.
    """
    out = writer.out
    names = [f"{out.name}.{suffix}" for suffix in ("json", "csv", "valid.csv") if old]
    for name in names + [f"{name}.{suffix}" for name in old for suffix in ("idx", "bin")]:
        out.with_name(name).unlink(missing_ok=True)
    for file in sorted(writer.folder.iterdir()):
        if file.suffix in (".bin", ".idx", ".csv"):
            os.replace(file, out.with_name(file.name))
    write_json(f"{out}.json", writer.report)
    writer.discard()


def holds_out_tails(files: list[Source], options: Options) -> bool:
    """Whether the tail of each document is held out, and not whole documents. Says which.

    Tails are for a single book, or a folder with three files: where fewer documents than HELD_OUT
    would be expected in the validation stream, there might be none.
    """
    enough = math.ceil(HELD_OUT / options.validation)
    every = (record for file in files for record in records(file, [options.text_field]))
    tails = sum(1 for _ in islice(every, enough)) < enough
    chosen = "documents are few; the tail of each is" if tails else "whole documents are"
    print(f"validation: {chosen} held out", file=sys.stderr)
    return tails


def _finish(writer: StreamWriter, options: Options, dtype: np.dtype) -> None:
    """Write indexes, mixtures and the report. Raises DataError for a run without documents."""
    counts = writer.counts
    tails = "the tail of each document" if writer.tails else "whole documents"
    report = {
        "run": writer.run,
        "held_out": tails if options.validation else "nothing",
        "documents_in": sum(counts.values()),
        "documents": counts["out"],
        "left_out": {reason: counts[reason] for reason in REASONS},
        "errors": writer.errors,
    }
    if not counts["out"]:
        writer.discard()
        raise DataError(f"{writer.out}: no document was kept; left out: {left_out(report)}")
    report["streams"] = streams = writer.index(options.split_by, dtype)
    for held_out, suffix in ((False, ".csv"), (True, ".valid.csv")):
        rows = []
        for name, stream in streams.items():
            if stream["held_out"] == held_out:
                row = {"name": name, "path": name, "weight": stream["tokens"]}
                rows.append(row | {k: v for k, v in stream["split_by"].items() if k not in row})
        if rows:
            write_mixture(writer.folder / f"{writer.out.name}{suffix}", rows)
    writer.report = report
    writer.save()


def left_out(report: dict) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in report["left_out"].items())
