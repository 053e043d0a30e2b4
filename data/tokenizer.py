"""The tokenizers: a byte-level BPE of our own, and the released one of Lucie; files of both.

A vocabulary of our own is a ranks file as tiktoken writes them: one token a line, its bytes in
base64 and its id. Ids 0 to 3 are Lucie's special tokens and not in the file, 4 to 259 the single
bytes, and the rest merges in the order in which they were learnt. A smaller id merges first.

Text is cut by PATTERN before merging, so no token spans two pieces. Every digit is a token of its
own, which is what lets a model carry out arithmetic digit by digit.

`load` reads a ranks file, a tokenizer.json of either kind, or a folder that holds one;
`save_folder` writes the files that Hugging Face's libraries read; `train` learns a vocabulary
(`python -m data.prepare vocabulary` does it from files).
"""

import base64
import binascii
import codecs
import copy
import json
import sys
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
import tiktoken

from config.cli import write_file
from data.dataset import BOS, EOS, DataError, token_dtype
from data.lucie_tokenizer import SPECIAL_TOKENS, LucieBPE, last_merge, nfc

# A word with the space before it | one digit | signs with the space before them | one kind of
# blank, repeated. The last space of a run is left for the word after it.
PATTERN = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\n+|\t+| +(?= )| +|\s"

CONFIG = Path(__file__).with_name("tokenizer_config.json")  # Lucie's, but for tokenizer_class
BYTE_LEVEL = Path(__file__).with_name("byte_level.json")  # a tokenizer.json of ours without tokens


class ByteLevelBPE:
    """A vocabulary of our own, {bytes of a token: id}, run by tiktoken."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.ranks = ranks
        self.encoding = tiktoken.Encoding(
            "ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL_TOKENS
        )
        self.vocab_size = self.encoding.n_vocab

    def ids(self, text: str) -> np.ndarray:
        """The ids of a text without lone surrogates; special tokens in it are plain text."""
        return self.encoding.encode_to_numpy(nfc(text), disallowed_special=())

    def decoder(self) -> "ByteDecoder":
        return ByteDecoder(self.encoding)


class ByteDecoder:
    """Ids to text, one by one; the bytes of a character that is not complete are held back."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding, self.pending = encoding, b""

    def feed(self, token: int) -> str:
        given = self.pending + self.encoding.decode_single_token_bytes(token)
        text, used = codecs.utf_8_decode(given, "replace", False)
        self.pending = given[used:]
        return text

    def finish(self) -> str:
        return self.pending.decode("utf-8", "replace")


class Tokenizer:
    """Text to ids and back, by either kind of BPE. vocab_size counts the special tokens.

    A BPE has `vocab_size`, `ids(text)` and `decoder()`: the latter's `feed(id)` returns the text
    that has become certain, and `finish()` the text held back, as it is if no id follows.
    """

    def __init__(self, bpe: ByteLevelBPE | LucieBPE) -> None:
        self.bpe, self.vocab_size = bpe, bpe.vocab_size

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text; "<s>" in it is three characters, no special token."""
        return self._ids(text).tolist()

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: `<s>`, then the text, in which `<s>`, `</s>`, `<unk>`, `<pad>` are read
        as special tokens. What stands between two of them is encoded as a text of its own.
        """
        ids, start = [BOS], 0
        at = text.find("<")
        while at >= 0:  # no special token begins inside another
            for token, special in SPECIAL_TOKENS.items():
                if text.startswith(token, at):
                    ids += [*self.encode_ordinary(text[start:at]), special]
                    start = at + len(token)
            at = text.find("<", at + 1)
        return ids + self.encode_ordinary(text[start:])

    def encode_document(self, text: str) -> np.ndarray:
        """Ids of a training document as it is stored: `<s> text </s>`, in `token_dtype`.

        No special token is read from the text.
        """
        ids = self._ids(text)
        document = np.empty(len(ids) + 2, token_dtype(self.vocab_size))
        document[0], document[1:-1], document[-1] = BOS, ids, EOS
        return document

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
        decoder = self.bpe.decoder()
        first = len(SPECIAL_TOKENS) if skip_special else 0
        for token in after:
            if token >= first:
                decoder.feed(int(token))
        # What decode(after) shows of what the decoder holds back.
        shown = copy.copy(decoder).finish()
        for token in ids:
            if token >= first and (text := decoder.feed(int(token))):
                if piece := text.removeprefix(shown):
                    yield piece
                shown = ""
        if piece := decoder.finish().removeprefix(shown):
            yield piece

    def _ids(self, text: str) -> np.ndarray:
        return self.bpe.ids(whole(text))


def whole(text: str) -> str:
    """The text with halves of UTF-16 pairs, as JSON may write them, made characters or U+FFFD."""
    try:
        text.encode()  # the cheapest test for a surrogate: only they cannot be encoded
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- files ---------------------------------------------------------------------------------------


def load(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a ranks file, a tokenizer.json, or a folder with a tokenizer.json.

    The content of a file tells which it is. vocab_size: that of the model it is for. Raises
    DataError if the file is missing, is neither, or has another number of tokens.
    """
    if not str(path):
        raise DataError("no tokenizer is known: give --tokenizer a file or folder")
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer(_bpe_of(file.read_bytes()))
    except OSError as error:
        hint = "" if path.is_dir() else " (python -m data.prepare vocabulary makes one)"
        raise DataError(f"{file}: {error.strerror}{hint}") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    if vocab_size not in (None, tokenizer.vocab_size):
        raise DataError(
            f"{path} has {tokenizer.vocab_size:,} tokens, "
            f"but the model's vocabulary has {vocab_size:,}"
        )
    return tokenizer


def _bpe_of(content: bytes) -> ByteLevelBPE | LucieBPE:
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"{"):
        return ByteLevelBPE(_ranks_of_lines(content))
    try:
        written = json.loads(content)
        if written["model"]["byte_fallback"]:
            return LucieBPE(content)
        return ByteLevelBPE(_ranks_of_json(written))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError("not the tokenizer.json of a BPE, or cut short") from None


def _ranks_of_lines(content: bytes) -> dict[bytes, int]:
    try:
        lines = (line.split() for line in content.splitlines())
        ranks = {base64.b64decode(k, validate=True): int(v) for k, v in lines}
    except (ValueError, binascii.Error):
        raise DataError("not a ranks file (base64 of a token, its id)") from None
    _check(ranks)
    return ranks


def _ranks_of_json(written: dict) -> dict[bytes, int]:
    """The ranks of a tokenizer.json of to_tokenizer_json, also if `tokenizers` wrote it again."""
    byte_of = {char: byte for byte, char in byte_characters().items()}
    vocab, merges = written["model"]["vocab"], written["model"]["merges"]
    # Lists of two since tokenizers 0.20, "a b" before.
    merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    tokens = [token for token in vocab if token not in SPECIAL_TOKENS]
    if not {*"".join(tokens)} <= byte_of.keys():
        raise DataError("a byte-level tokenizer.json with characters that stand for no byte")
    ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in tokens}
    _check(ranks)
    expected = to_tokenizer_json(ByteLevelBPE(ranks))
    rules = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    same = all(written[key] == expected[key] for key in rules)
    if not same or merges != expected["model"]["merges"]:
        raise DataError("a byte-level tokenizer.json with other rules or merges than ours")
    return ranks


def _check(ranks: dict[bytes, int]) -> None:
    first = len(SPECIAL_TOKENS)
    single_bytes = {bytes([b]) for b in range(256)}
    if sorted(ranks.values()) != list(range(first, first + len(ranks))) or not (
        single_bytes <= ranks.keys()
    ):
        raise DataError(f"ids must run from {first} without gaps and cover all bytes")


def save(ranks: dict[bytes, int], path: str | Path) -> None:
    """Write a ranks file, ids ascending."""
    items = sorted(ranks.items(), key=itemgetter(1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, b"".join(b"%s %d\n" % (base64.b64encode(token), i) for token, i in items))


def save_folder(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the tokenizer.json and tokenizer_config.json that Hugging Face's libraries read.

    Lucie's tokenizer.json is written byte for byte as it was read. The tokenizer_config.json of
    Lucie is as released except for tokenizer_class, which was LlamaTokenizer: with that name
    transformers 5 replaces the rules of tokenizer.json by Llama's own, and ids are others.
    """
    bpe, config = tokenizer.bpe, json.loads(CONFIG.read_text("utf-8"))
    if isinstance(bpe, LucieBPE):
        content = bpe.source
    else:
        content = _json(to_tokenizer_json(bpe))
        del config["chat_template"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_file(Path(folder, "tokenizer.json"), content)
    write_file(Path(folder, "tokenizer_config.json"), _json(config))


def to_tokenizer_json(bpe: ByteLevelBPE) -> dict:
    """A tokenizer.json with which the `tokenizers` library gives our ids.

    tiktoken joins neighbours that make a token, tokenizers those that are in a list of pairs. Two
    neighbours only ever make a token as the last merge of its own text (data/lucie_tokenizer.py
    says why), so those pairs, in the order of ids, are the list. Raises DataError for ranks
    that no merges give, which a trained vocabulary does not have.
    """
    characters, ranks = byte_characters(), bpe.ranks
    spelt = {token: "".join(characters[b] for b in token) for token in ranks}
    vocab = SPECIAL_TOKENS | {spelt[t]: i for t, i in sorted(ranks.items(), key=itemgetter(1))}
    neighbours = ((token[:n], token[n:]) for token in ranks for n in range(1, len(token)))
    pairs = {(a, b): ranks[a + b] for a, b in neighbours if a in ranks and b in ranks}
    made = {last_merge(token, pairs): i for token, i in ranks.items() if len(token) > 1}
    if None in made or len(vocab) != bpe.vocab_size:
        raise DataError("some tokens of this vocabulary cannot be made by merges")
    merges = [[spelt[a], spelt[b]] for a, b in sorted(made, key=made.__getitem__)]
    written = json.loads(BYTE_LEVEL.read_text("utf-8"))
    written["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN
    written["model"] |= {"vocab": vocab, "merges": merges}
    return written


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's).

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable}
    return characters | {b: chr(256 + n) for n, b in enumerate(others)}


def _json(content: dict) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


# --- training ------------------------------------------------------------------------------------


def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn a vocabulary of vocab_size tokens, special ones included: {bytes of a token: id}.

    The `tokenizers` library counts and merges, with progress bars on a terminal. Memory: each
    different word once. Raises DataError if the library is not installed, or if the text holds too
    few different pairs for so many tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise DataError(f"a vocabulary has at least {smallest} tokens, not {vocab_size}")
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable
    except ImportError:
        raise DataError("training a vocabulary needs: pip install tokenizers") from None
    bpe = Trainable(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    # Composed as the tokenizer composes a text before it cuts it.
    bpe.train_from_iterator(map(nfc, texts), trainer)
    # tokenizers names a merge by its two parts, tiktoken by their concatenation; a token that a
    # second pair of parts gives as well keeps the rank of its first.
    byte_of = {char: byte for byte, char in byte_characters().items()}
    tokens = [bytes([b]) for b in range(256)]
    for a, b in json.loads(bpe.to_str())["model"]["merges"]:
        tokens.append(bytes(byte_of[c] for c in a + b))
    ranks = {t: i for i, t in enumerate(dict.fromkeys(tokens), start=len(SPECIAL_TOKENS))}
    if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
        raise DataError(
            f"the text gives {len(ranks) + len(SPECIAL_TOKENS):,} tokens, not {vocab_size:,}: "
            f"give more text, or --vocab_size {len(ranks) + len(SPECIAL_TOKENS)}"
        )
    return ranks
