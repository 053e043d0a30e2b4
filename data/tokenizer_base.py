"""What every tokenizer here has: special tokens, the steps of BPE, batches, streams."""

import copy
import multiprocessing
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import chain, pairwise
from math import inf
from typing import Protocol

import numpy as np

SPECIAL_TOKENS = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}
BOS, EOS = SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"]

BATCH = 1 << 18  # characters handed to a process at a time
IN_FLIGHT = 4  # batches read in advance, for each process


class Decoder(Protocol):
    """Ids to text, one by one: text that a later id may still change is held back."""

    def feed(self, token: int) -> str:
        """The text that is certain now, and was not before."""

    def finish(self) -> str:
        """The text held back, as it is if no id follows."""


class BaseTokenizer(ABC):
    """Text to ids and back. vocab_size counts the special tokens."""

    vocab_size: int

    @abstractmethod
    def ids(self, text: str) -> np.ndarray:
        """Ids of a text without lone surrogates, special tokens being mere text; any dtype."""

    @abstractmethod
    def decoder(self) -> Decoder: ...

    @property
    def dtype(self) -> np.dtype:
        """What ids are stored as: uint16 where they fit, else int32, as Megatron does."""
        return np.dtype(np.uint16 if self.vocab_size <= 65_535 else np.int32)

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text; "<s>" in it is three characters, no special token."""
        return self._ids(text).tolist()

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: `<s>`, then the text, in which `<s>`, `</s>`, `<unk>`, `<pad>` are read
        as special tokens. What stands between two of them is encoded as a text of its own.
        """
        ids, start = [BOS], 0
        if "<" in text:
            for at, token in _special_tokens_in(text):
                ids += [*self.encode_ordinary(text[start:at]), SPECIAL_TOKENS[token]]
                start = at + len(token)
        return ids + self.encode_ordinary(text[start:])

    def encode_document(self, text: str) -> list[int]:
        """Ids of a training document: `<s> text </s>`, and no special token read from the text."""
        return [BOS, *self.encode_ordinary(text), EOS]

    def encode_batch(self, texts: Iterable[str], processes: int = 1) -> Iterator[np.ndarray]:
        """The ids of encode_document for each text, in order, as arrays of `dtype`.

        Texts are read as results are taken: 4 batches of a quarter of a million characters for
        each process, no more.
        """
        if processes == 1:
            yield from map(self._document, texts)
            return
        # spawn: a forked child of a process that runs threads can deadlock
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _start_worker, (self,)) as pool:
            batches = _batches(texts)
            done = _ordered_map(pool, _encode_in_worker, batches, IN_FLIGHT * processes)
            yield from chain.from_iterable(done)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids, skip_special=skip_special))

    def stream(
        self, ids: Iterable[int], after: Iterable[int] = (), skip_special: bool = True
    ) -> Iterator[str]:
        """The text of ids, as they arrive, in pieces that are never taken back.

        The pieces joined are decode(after + ids) less decode(after), with which it begins. (It
        does not only if `after` ends inside a character: the whole character comes then.)
        """
        decoder = self.decoder()
        for token in self._without_special(after, skip_special):
            decoder.feed(token)
        # What decode(after) shows of what the decoder holds back.
        shown = copy.copy(decoder).finish()
        for token in self._without_special(ids, skip_special):
            if text := decoder.feed(token):
                if piece := text.removeprefix(shown):
                    yield piece
                shown = ""
        if piece := decoder.finish().removeprefix(shown):
            yield piece

    def _without_special(self, ids: Iterable[int], skip: bool) -> Iterator[int]:
        return (int(i) for i in ids if not skip or i >= len(SPECIAL_TOKENS))

    def _ids(self, text: str) -> np.ndarray:
        try:
            return self.ids(text)
        except UnicodeEncodeError:
            # JSON's \ud83d\ude42 in two halves: pairs become their character, single ones U+FFFD
            return self.ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _document(self, text: str) -> np.ndarray:
        ids = self._ids(text)
        document = np.empty(len(ids) + 2, self.dtype)
        document[0], document[1:-1], document[-1] = BOS, ids, EOS
        return document


def last_merge(parts: Sequence, merges: Mapping[tuple, int]) -> tuple | None:
    """The last merge by which BPE makes one token of `parts`, or None where it stops before.

    This is byte pair encoding as it is defined: of all neighbours that are a merge, join those of
    the smallest rank, the leftmost first, until none are. merges: {(a, b): rank}. parts: a string
    (its characters) or bytes, each one a string of its own in merges.
    """
    pair, parts = None, [parts[i : i + 1] for i in range(len(parts))]
    while len(parts) > 1:
        ranks = [merges.get(neighbours, inf) for neighbours in pairwise(parts)]
        smallest = min(ranks)
        if smallest == inf:
            return None
        i = ranks.index(smallest)
        pair = (parts[i], parts[i + 1])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return pair


def added_tokens() -> list[dict]:
    """The special tokens as a tokenizer.json lists them."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": True} for token, i in SPECIAL_TOKENS.items()
    ]


def bos_template() -> dict:
    """The post-processor of a tokenizer.json that puts `<s>` before every text."""

    def text(name: str, number: int) -> list[dict]:
        bos = {"SpecialToken": {"id": "<s>", "type_id": number}}
        return [bos, {"Sequence": {"id": name, "type_id": number}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }


def _special_tokens_in(text: str) -> Iterator[tuple[int, str]]:
    """(where, which) of the special tokens in a text; none begins inside another."""
    at = text.find("<")
    while at >= 0:
        for token in SPECIAL_TOKENS:
            if text.startswith(token, at):
                yield at, token
        at = text.find("<", at + 1)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _ordered_map(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Results in the order of items, with no more than `ahead` of them read in advance.

    The executor's own map would read a whole terabyte into its queue.
    """
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _start_worker(tokenizer: BaseTokenizer) -> None:
    global _worker
    _worker = tokenizer


def _encode_in_worker(batch: list[str]) -> list[np.ndarray]:
    return list(_worker.encode_batch(batch))
