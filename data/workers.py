"""Records to documents: parsed, cleaned and tokenised by processes, collected in the order read."""

import hashlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from data.cleaning import clean, left_out
from data.reading import Source, parse, records
from data.tokenizer import LucieTokenizer, Tokenizer

BATCH = 1 << 18  # bytes handed to a process at a time
IN_FLIGHT = 4  # batches read in advance, for each process
OVERHEAD = 512  # bytes of memory that a document takes besides its text

AnyTokenizer = Tokenizer | LucieTokenizer


@dataclass(frozen=True)
class Options:
    """What is made of the documents."""

    text_field: str = "text"
    split_by: tuple[str, ...] = ()  # fields, whose every combination of values is a stream
    validation: float = 0.0  # share of documents held out; a document's text alone decides
    min_characters: int = 0  # shorter documents are left out
    deduplicate: bool = False  # all but the first of equal texts are; 100 bytes of memory for each
    split_length: int | None = None  # documents of more tokens, <s> and </s> included, are apart


class Document(NamedTuple):
    stream: str  # suffix of its stream
    characters: int
    size: int  # bytes
    digest: bytes  # of its text; empty if nothing asks for it
    changed: tuple[str, ...]  # the rules that did
    length: int  # tokens


class LeftOut(NamedTuple):
    reason: str
    error: str = ""


class Done(NamedTuple):
    """What a batch became. Arrays travel between processes at a price each, so there is one."""

    results: list[Document | LeftOut]
    tokens: np.ndarray  # of the documents, one after the other
    size: int  # bytes of the documents


class Batch(NamedTuple):
    contents: list  # of records, or their error as a LeftOut
    places: list[tuple[int, int]]  # file, record
    position: int  # bytes of the last file
    size: int
    ends_part: bool
    end: tuple[int, int, int]  # where to go on: file, records of it that are done, its position


def read_batches(
    files: list[Source], options: Options, start: tuple[int, int, int], part_size: int
) -> Iterator[Batch]:
    """The records after `start`, in batches that depend on the files and part_size alone."""
    first, done, position = end = start
    contents, places, size, part = [], [], 0, 0
    for file in range(first, len(files)):
        given = (done, position) if file == first else (0, 0)
        for record in records(files[file], options.text_field, options.split_by, *given):
            weight = record.size + OVERHEAD
            if contents and (size + weight > BATCH or part >= part_size):
                yield Batch(contents, places, position, size, part >= part_size, end)
                part = 0 if part >= part_size else part
                contents, places, size = [], [], 0
            content = LeftOut("error", record.error) if record.error else record.content
            contents.append(content)
            places.append((file, record.number))
            position, size, part = record.position, size + weight, part + weight
            end = (file, record.number, position)
        end = (file + 1, 0, 0)  # whole or broken, it is not read again
    if contents:
        yield Batch(contents, places, position, size, True, end)


def process(
    batches: Iterator[Batch], encoder: AnyTokenizer, options: Options, workers: int
) -> Iterator[tuple[Batch, Done]]:
    """The batches and what their records became, in order.

    Read in advance are IN_FLIGHT batches for each worker, or one batch, whatever its size.
    """
    if workers == 1:
        work = Worker(encoder, options)
        for batch in batches:
            yield batch, work(batch.contents)
        return
    pending: deque[tuple[Batch, Future]] = deque()
    # spawn: a forked child of a process that runs threads can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder, options)) as pool:
        held = 0
        try:
            for batch in batches:
                while pending and held + batch.size > IN_FLIGHT * workers * BATCH:
                    done, future = pending.popleft()
                    yield done, future.result()
                    held -= done.size
                future = pool.submit(_work, batch.contents)
                # The contents are the worker's now.
                pending.append((batch._replace(contents=[]), future))
                held += batch.size
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


class Stream:
    """The documents of a stream since the last finished part."""

    def __init__(self) -> None:
        self.tokens, self.lengths = bytearray(), array("i")
        self.characters = self.size = 0


class Part:
    """The documents since the last finished part."""

    def __init__(self) -> None:
        self.counts, self.changed = Counter(), Counter()
        self.errors: list[str] = []
        self.streams: dict[str, Stream] = defaultdict(Stream)
        self.digests: list[bytes] = []

    def count(self, done: Done, seen: set[bytes] | None) -> None:
        self.counts["in"] += len(done.results)
        end = 0
        for result in done.results:
            if isinstance(result, LeftOut):
                self.counts[result.reason] += 1
                continue
            start, end = end, end + result.length
            if seen is not None:
                if result.digest in seen:
                    self.counts["duplicate"] += 1
                    continue
                seen.add(result.digest)
                self.digests.append(result.digest)
            self.counts["out"] += 1
            if result.changed:
                self.changed.update(result.changed)
            stream = self.streams[result.stream]
            stream.tokens += done.tokens[start:end].tobytes()
            stream.lengths.append(result.length)
            stream.characters += result.characters
            stream.size += result.size

    def packed(self, end: tuple[int, int, int], dtype: np.dtype) -> tuple[dict, dict]:
        """Its record, with `end`, where to go on (see Batch), and its arrays."""
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, 16)
        streams, arrays = {}, {"digests": digests}
        for number, (name, stream) in enumerate(self.streams.items()):
            streams[name] = [number, stream.characters, stream.size]
            arrays[f"tokens{number}"] = np.frombuffer(stream.tokens, dtype)
            arrays[f"lengths{number}"] = np.frombuffer(stream.lengths, np.int32)
        record = {"end": end, "counts": self.counts, "changed": self.changed}
        return record | {"errors": self.errors, "streams": streams}, arrays


class Worker:
    """Records to documents: parsed, cleaned and tokenised."""

    def __init__(self, encoder: AnyTokenizer, options: Options) -> None:
        self.encoder, self.options = encoder, options

    def __call__(self, contents: list) -> Done:
        results, tokens, size = [], [np.empty(0, self.encoder.dtype)], 0
        for content in contents:
            found = content if isinstance(content, LeftOut) else self._document(content)
            if not isinstance(found, LeftOut):
                found, ids = found
                tokens.append(ids)
                size += found.size
            results.append(found)
        return Done(results, np.concatenate(tokens), size)

    def _document(self, content: object) -> tuple[Document, np.ndarray] | LeftOut:
        options = self.options
        try:
            text, *values = parse(content, options.text_field, options.split_by)
            stream = "".join(map(_part_of_name, options.split_by, values))
        except ValueError as error:
            return LeftOut("error", str(error))
        text, changed = clean(text)
        if reason := left_out(text, options.min_characters):
            return LeftOut(reason)
        data, digest = text.encode(), b""
        if options.deduplicate or options.validation:
            digest = hashlib.sha256(data).digest()
        try:
            tokens = next(self.encoder.encode_batch([text]))
        except ValueError as error:  # the regex of tiktoken gives up on a million spaces in a row
            return LeftOut("error", f"cannot be tokenised: {error}")
        if options.split_length is not None:
            stream += ".long" if len(tokens) > options.split_length else ".short"
        if options.validation and int.from_bytes(digest[:8], "big") / 2**64 < options.validation:
            stream += ".valid"
        return Document(stream, len(text), len(data), digest[:16], changed, len(tokens)), tokens


def _part_of_name(field: str, value: str) -> str:
    # No two values make one name, and none a folder or what follows the name.
    name = quote(value, safe="", errors="replace").replace(".", "%2E")
    if not name or not value.isprintable() or len(name) > 100:
        raise ValueError(f"its field {field!r} cannot be part of a file's name")
    return f".{name}"


def _start_worker(encoder: AnyTokenizer, options: Options) -> None:
    global _work_here
    _work_here = Worker(encoder, options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(contents: list) -> Done:
    return _work_here(contents)
