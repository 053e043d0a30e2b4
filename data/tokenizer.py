"""Byte-level BPE through tiktoken, and the training of a new vocabulary.

A vocabulary is a ranks file as tiktoken writes them: one token a line, its bytes in base64 and its
id. Ids 0 to 3 are Lucie's special tokens and not in the file, 4 to 259 the single bytes, and the
rest merges in the order in which they were learnt. A smaller id merges first.

Text is cut by PATTERN before merging, so no token spans two pieces. Every digit is a token of its
own, which is what lets a model carry out arithmetic digit by digit.

    python -m data.prepare tokenizer FILES... --vocab-size 65024 --out ranks.tiktoken
"""

import base64
import json
import sys
import unicodedata
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import tiktoken

SPECIAL_TOKENS = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}
BOS, EOS = SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"]

# A word with the space before it | one digit | signs with the space before them | one kind of
# blank, repeated. The last space of a run is left for the word after it.
PATTERN = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\n+|\t+| +(?= )| +|\s"


class TokenizerError(Exception):
    """A vocabulary that cannot be used; the message is one line."""


class Tokenizer:
    """Text to ids and back.

    vocab_size counts the special tokens; `encoding` is the tiktoken.Encoding underneath.
    """

    def __init__(self, ranks: dict[bytes, int], name: str = "ranks") -> None:
        self.encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL_TOKENS
        )
        self.vocab_size = self.encoding.n_vocab

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text, composed to NFC; "<s>" in it is three characters, no special token."""
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: `<s>`, then the text."""
        return [BOS, *self.encode_ordinary(text)]

    def encode_document(self, text: str) -> list[int]:
        """Ids of a training document: `<s> text </s>`."""
        return [BOS, *self.encode_ordinary(text), EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. A character may span tokens: join bytes first, then decode."""
        return self.encoding.decode_bytes([i for i in ids if i >= len(SPECIAL_TOKENS)])


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a ranks file. Raises TokenizerError if it is missing or not one."""
    try:
        with open(path, "rb") as f:
            ranks = {base64.b64decode(k): int(v) for k, v in (line.split() for line in f)}
    except OSError as error:
        raise TokenizerError(
            f"{path}: {error.strerror} (python -m data.prepare tokenizer makes one)"
        ) from None
    except ValueError:
        raise TokenizerError(f"{path}: not a ranks file (base64 of a token, its id)") from None
    first = len(SPECIAL_TOKENS)
    single_bytes = {bytes([b]) for b in range(256)}
    if sorted(ranks.values()) != list(range(first, first + len(ranks))) or not (
        single_bytes <= ranks.keys()
    ):
        raise TokenizerError(f"{path}: ids must run from {first} without gaps and cover all bytes")
    return Tokenizer(ranks, Path(path).stem)


def save(ranks: dict[bytes, int], path: str | Path) -> None:
    """Write a ranks file, ids ascending."""
    items = sorted(ranks.items(), key=itemgetter(1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.tmp")
    text = "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in items)
    unfinished.write_text(text, encoding="ascii")
    unfinished.replace(path)


def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn a vocabulary of vocab_size tokens, special ones included: {bytes of a token: id}.

    The `tokenizers` library counts and merges. Raises TokenizerError if it is not installed, or if
    the text holds too few different pairs for so many tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise TokenizerError(f"a vocabulary has at least {smallest} tokens, not {vocab_size}")
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable
    except ImportError:
        raise TokenizerError("training a vocabulary needs: pip install tokenizers") from None
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
    bpe.train_from_iterator(texts, trainer)
    ranks = ranks_of(json.loads(bpe.to_str())["model"]["merges"])
    if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
        raise TokenizerError(
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


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's).

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable}
    return characters | {b: chr(256 + n) for n, b in enumerate(others)}
