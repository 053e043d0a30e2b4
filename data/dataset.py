"""The training data: token streams on disk, and the mixture that turns a number into a sample.

Sample i of a run is a pure function of (mixture, seed, seq_len, i). There is no shuffled index on
disk, no iterator to save, no dependence on the number of GPUs: a checkpoint stores one integer, and
sample 762,000,000 is found as fast as sample 0. Three steps lead from i to its tokens:

1. Which source, and which of its samples: i goes down a Huffman tree of the sources. At each node
   with n arrivals so far, a branch holding the share p of the weight has received round(p n) of
   them, so i either goes there or to the other side, and its rank among the arrivals is known.
2. Which place in the source: rank = epoch * length + position, and the position goes through a
   permutation keyed by (seed, source, epoch), computed for this one position (a Feistel cipher).
3. The tokens there: seq_len + 1 of them, read from the file.

The file format is Megatron's indexed one: NAME.bin holds the tokens of all documents back to back,
NAME.idx their type and the documents' lengths. Files made for Megatron, GPT-NeoX or NeMo load, and
a stream may lie in an object store. `data.prepare` makes streams, `data.inspect` looks at them.
"""

import csv
import hashlib
import heapq
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import, and data.prepare's processes do without it
    from torch import Tensor

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
BOS, EOS = 0, 1  # the ids of <s> and </s>, which begin and end every document
IGNORE = -100  # torch's and Hugging Face's mark for a target that does not count


class DataError(Exception):
    """Data that cannot be used; the message names the file and what is wrong, in one line."""


class Sample(NamedTuple):
    source: int  # index into Mixture.names
    epoch: int  # how often the whole source was seen before
    position: int  # which of its samples, in the order of the file


class Mixture:
    """The weighted mixture of a CSV file with the columns name, path and weight or epochs.

    path is relative to the CSV and has no suffix. Weights need not sum to one. Given epochs
    instead, the weight of a source is epochs * tokens. `mixture[i]` is sample i: int64
    `[seq_len + 1]` tokens, of which the first seq_len are input and the last seq_len targets.

    A source without files raises DataError; if partial, it is left out, `missing` names it, and the
    weights of the others are scaled up.

    Of the first n samples, whatever n is, the number taken from a source differs from its exact
    share weight * n by at most 1.24 samples for Lucie's 140 sources (see `huffman`).
    """

    def __init__(
        self, path: str | Path, seq_len: int, seed: int, vocab_size: int, partial: bool = False
    ) -> None:
        self.seq_len, self.seed, self.vocab_size = seq_len, seed, vocab_size
        self.names, self.languages, self.streams, self.weights = [], [], [], []
        rows, self.missing = present_rows(path, partial)
        for row in rows:
            stream = TokenStream(row["path"])
            if stream.tokens <= seq_len:
                raise DataError(
                    f"{stream.bin}: {stream.tokens:,} tokens are too few for one sample of "
                    f"{seq_len:,} (and the token after it): take its row out of {path}, or give a "
                    "smaller --seq_len"
                )
            self.names.append(row["name"])
            self.languages.append(row.get("language") or "unknown")
            self.streams.append(stream)
            weight = row["weight"]
            self.weights.append(row["epochs"] * stream.tokens if weight is None else weight)
        total = sum(self.weights)
        self.weights = [weight / total for weight in self.weights]
        self.lengths = [(stream.tokens - 1) // seq_len for stream in self.streams]
        self._tree = huffman(self.weights)

    def __getitem__(self, i: int) -> np.ndarray:
        sample = self.locate(i)
        stream = self.streams[sample.source]
        return stream.read(sample.position * self.seq_len, self.seq_len + 1, self.vocab_size)

    def locate(self, i: int) -> Sample:
        """Where sample i comes from."""
        source, rank = descend(self._tree, i)
        epoch, position = divmod(rank, self.lengths[source])
        key = f"{self.seed} {self.names[source]} {epoch}"
        return Sample(source, epoch, permute(position, self.lengths[source], key))

    def fingerprint(self) -> str:
        """A digest of what decides the samples: names, weights and sizes of the sources."""
        sizes = [stream.tokens for stream in self.streams]
        parts = list(zip(self.names, self.weights, sizes))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def present_rows(path: str | Path, partial: bool = False) -> tuple[list[dict], list[str]]:
    """(the rows of a mixture whose streams have their files, the names of the others).

    Raises DataError if there are others and not partial, or if nothing is there.
    """
    rows = read_rows(path)
    absent = [row for row in rows if any(size_of(f) is None for f in stream_files(row["path"]))]
    if not absent or (partial and len(absent) < len(rows)):
        return [row for row in rows if row not in absent], [row["name"] for row in absent]
    names = ", ".join(row["name"] for row in absent[:5])
    if len(absent) > 5:
        names += f" and {len(absent) - 5} more (python -m data.inspect shares {path} names all)"
    raise DataError(
        f"{path}: {len(absent)} of {len(rows)} sources lack files: {names} "
        "(python -m data.prepare makes .bin and .idx, --partial does without)"
    )


def read_rows(path: str | Path) -> list[dict]:
    """The sources of a mixture with a weight or epochs over 0.

    A row has name; path, found from the CSV's folder, or the address in an object store; weight or
    else epochs as a number, the other one None; and what else the CSV has, as text.
    """
    path = Path(path)
    try:
        # Excel begins a file with a byte order mark
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    columns = set(rows[0]) if rows else set()
    if not columns >= {"name", "path"} or not columns & {"weight", "epochs"}:
        raise DataError(f"{path}: a mixture has the columns name, path and weight or epochs")
    kind = "weight" if "weight" in columns else "epochs"
    out = []
    for line, row in enumerate(rows, start=2):
        try:
            value = float(row[kind])
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value < float("inf") or not row["path"]:
            raise DataError(f"{path}, line {line}: needs a path and a {kind} of 0 or more")
        if value:
            place = row["path"] if "://" in row["path"] else path.parent / row["path"]
            out.append(row | {"path": place, "weight": None, "epochs": None, kind: value})
    if len({row["name"] for row in out}) < len(out) or not out:
        raise DataError(f"{path}: needs at least one source, each with a name of its own")
    return out


# --- 1. which source -----------------------------------------------------------------------------


class Node(NamedTuple):
    """A branch point of the tree: left gets the share p of what arrives here, right the rest."""

    weight: float
    p: float
    left: "Node | Leaf"
    right: "Node | Leaf"


class Leaf(NamedTuple):
    weight: float
    source: int


def huffman(weights: list[float]) -> Node | Leaf:
    """The Huffman tree of the sources: the two lightest trees are joined until one is left.

    Sources sampled often are near the root, which makes look-ups short, and siblings are of similar
    weight, which makes shares exact: a branch with the share p takes p times the deviation of its
    node and adds 1/2 for rounding, so the halves of halves sum to about one sample.
    """
    heap = [(weight, order, Leaf(weight, order)) for order, weight in enumerate(weights)]
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        a, _, light = heapq.heappop(heap)
        b, _, heavy = heapq.heappop(heap)
        heapq.heappush(heap, (a + b, order, Node(a + b, b / (a + b), heavy, light)))
        order += 1
    return heap[0][2]


def descend(tree: Node | Leaf, i: int) -> tuple[int, int]:
    """(source, rank) of sample i: the source it falls to, and how many fell there before it."""
    while type(tree) is Node:
        p = tree.p
        left = int(p * i + 0.5)  # of the first i arrivals; below 2^53 the product is exact enough
        if int(p * (i + 1) + 0.5) > left:
            tree, i = tree.left, left
        else:
            tree, i = tree.right, i - left
    return tree.source, i


def drawn(tree: Node | Leaf, n: int) -> dict[int, int]:
    """How many of the first n samples each source gets: one rounding a node, whatever n is."""
    if type(tree) is Leaf:
        return {tree.source: n}
    left = int(tree.p * n + 0.5)
    return drawn(tree.left, left) | drawn(tree.right, n - left)


# --- 2. which place in the source ----------------------------------------------------------------


def permute(position: int, length: int, key: str) -> int:
    """The image of position under a permutation of 0 .. length - 1 that `key` selects.

    A four-round Feistel network permutes the smallest even power of two that holds length; an image
    outside is permuted again until it falls inside, which takes at most 4 turns on average.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = struct.unpack("<4Q", hashlib.sha256(key.encode()).digest())
    while True:
        left, right = position >> half, position & mask
        for secret in rounds:
            left, right = right, left ^ (_mix(right ^ secret) & mask)
        position = left << half | right
        if position < length:
            return position


def _mix(x: int) -> int:
    """Scatter the bits of a 64-bit number (the finaliser of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


# --- 3. the tokens there -------------------------------------------------------------------------


class TokenStream:
    """The tokens of one source, `path` being the common part of its .bin and .idx.

    Tokens are read, not mapped: a mapped page counts as the process's own memory once touched, and
    140 sources of a trillion tokens would seem to fill any machine.
    Raises DataError for a missing, truncated or foreign file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, (self.idx, self.bin) = path, stream_files(path)
        sizes = [size_of(file) for file in (self.idx, self.bin)]
        for file, size in zip((self.idx, self.bin), sizes):
            if size is None:
                raise DataError(f"{file}: no such file (python -m data.prepare makes it)")
        head = read_bytes(self.idx, 0, HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise DataError(f"{self.idx}: not an index of Megatron's format")
        _, version, code, count, boundaries = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise DataError(f"{self.idx}: version {version} or token type {code} is not known")
        self.dtype = np.dtype(DTYPES[code])
        # lengths (int32) and offsets (int64) of the sequences, then the documents' boundaries
        if sizes[0] < HEADER.size + 12 * count + 8 * boundaries:
            raise DataError(f"{self.idx}: truncated")
        if not boundaries:
            raise DataError(f"{self.idx}: lists no documents")
        end = 0
        if count:  # where the last sequence ends, from its own length and offset
            length = read_bytes(self.idx, HEADER.size + 4 * (count - 1), 4)
            offset = read_bytes(self.idx, HEADER.size + 4 * count + 8 * (count - 1), 8)
            end = int.from_bytes(length, "little") * self.dtype.itemsize
            end += int.from_bytes(offset, "little")
        if sizes[1] < end:
            raise DataError(f"{self.bin}: truncated, {sizes[1]:,} bytes, its index says {end:,}")
        self.tokens = end // self.dtype.itemsize
        # Megatron may cut a document into sequences; data.prepare makes one of each.
        self.sequences, self.documents = count, boundaries - 1

    def read(self, start: int, count: int, vocab_size: int) -> np.ndarray:
        """Tokens start .. start + count as int64 `[count]`, all checked to be under vocab_size."""
        size = self.dtype.itemsize
        raw = read_bytes(self.bin, start * size, count * size)
        tokens = np.frombuffer(raw, self.dtype, len(raw) // size)
        if len(tokens) < count:
            raise DataError(f"{self.bin}: truncated after {start + len(tokens):,} tokens")
        if tokens.max() >= vocab_size or tokens.min() < 0:
            at = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
            raise DataError(
                f"{self.bin}: token {start + at:,} has id {tokens[at]}, "
                f"past the vocabulary of {vocab_size}"
            )
        return tokens.astype(np.int64)


def token_dtype(vocab_size: int) -> np.dtype:
    """What ids are stored as: uint16 where they fit, else int32, as in Megatron."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.int32)


def stream_files(path: str | Path) -> tuple[Path, Path] | tuple[str, str]:
    """The index and the tokens of the stream `path`; strings for an address in an object store."""
    files = f"{path}.idx", f"{path}.bin"
    return files if "://" in files[0] else (Path(files[0]), Path(files[1]))


def size_of(file: Path | str) -> int | None:
    """The bytes of a file, None if it is not there. Raises DataError as read_bytes does."""
    if isinstance(file, Path):
        return file.stat().st_size if file.is_file() else None
    with store_errors(file):
        store, path = open_store(file)
        try:
            size = store.info(path)["size"]
        except FileNotFoundError as error:
            # fsspec also raises it for a server that is down.
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from None
            return None
    if size is None:
        raise DataError(f"{file}: its server does not tell its size: download it")
    return size


def read_bytes(file: Path | str, start: int, count: int) -> bytes:
    """Bytes start .. start + count of a file, fewer at its end.

    Raises DataError for what cannot be read.
    """
    if isinstance(file, Path):
        try:
            with open(file, "rb") as f:
                f.seek(start)
                return f.read(count)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
    with store_errors(file):
        store, path = open_store(file)
        piece = store.cat_file(path, start=start, end=start + count)
    if len(piece) > count:  # a web server may ignore the range and send everything
        raise DataError(f"{file}: its server sends whole files only (no byte ranges): download it")
    return piece


def open_store(address: str) -> tuple:
    """(the file system of fsspec that an address lies in, its path there).

    Call it, and use the file system, within `store_errors`.
    """
    from fsspec.core import url_to_fs

    return url_to_fs(address)


@contextmanager
def store_errors(address: object) -> Iterator[None]:
    """Turns whatever a file system of fsspec raises into a DataError that names the address."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:  # fsspec says which package a protocol needs
        raise DataError(f"{address}: {error}") from None
    except Exception as error:  # they have no class in common
        if type(error) is FileNotFoundError:  # it names the path only; its subclasses say more
            raise DataError(f"{address}: no such file") from None
        first_line = str(error).strip().splitlines()[:1]
        raise DataError(": ".join([str(address), type(error).__name__, *first_line])) from None


# --- what one rank reads for a step --------------------------------------------------------------


class Share(NamedTuple):
    """One rank's part of a step."""

    samples: Sequence[int]  # their numbers
    batches: list[tuple["Tensor", "Tensor"]]  # (tokens, targets), int64 `[<= micro_batch_size, T]`
    targets: int  # the number of targets that count


def read_share(
    mixture: Mixture,
    samples: Sequence[int],
    micro_batch_size: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Share:
    """Read every `world`-th of the samples, beginning with number `rank` of them.

    Every forward pass involves all ranks, so all need the same number of micro-batches. A rank that
    has run out of samples gets one whose targets are all IGNORE. pin: in pinned memory, for a copy
    to a GPU that does not wait. Raises DataError for a sample that cannot be read.
    """
    import torch

    mine, batches = samples[rank::world], []
    for first in range(0, len(samples[::world]), micro_batch_size):  # rank 0 has the most samples
        block = mine[first : first + micro_batch_size]
        if block:
            tokens = torch.from_numpy(np.stack([mixture[i] for i in block]))
            # Contiguous, because a copy of a view to a GPU would begin with another copy here.
            x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        else:
            x = torch.zeros(1, mixture.seq_len, dtype=torch.int64)
            y = torch.full_like(x, IGNORE)
        batches.append((x.pin_memory(), y.pin_memory()) if pin else (x, y))
    return Share(mine, batches, sum(int((y != IGNORE).sum()) for _, y in batches))


def document_starts(tokens: "Tensor") -> "Tensor":
    """Where documents start in int64 `[B, T]` tokens: the cu_seqlens of kernels.attention.

    int32 `[documents + 1]`, offsets in the rows laid end to end: every row starts a document, so
    does every `<s>`, and B * T comes last.
    """
    import torch

    starts = tokens == BOS
    starts[:, 0] = True
    end = torch.tensor([tokens.numel()], device=tokens.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end]).int()
