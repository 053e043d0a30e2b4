"""The released Lucie tokenizer: its `tokenizer.json` read, and run through tiktoken.

**What it is.** A text is composed (NFC), loses "\\r" and "\\0", gets a space in front and after
each opener such as "(" or a line break that a word or a space follows; spaces become "▁". So a word
has one token wherever it stands. Decoding takes these spaces out again.

Then BPE: start from the characters, and of all neighbours that are in the list of merges join
those that come first in it, the leftmost first, until no neighbours are in the list. A character
that is not in the vocabulary is spelt by the bytes of its UTF-8, tokens <0x00> to <0xFF> (byte
fallback), and these join with nothing.

**As ranks for tiktoken.** tiktoken starts from bytes. It knows no list of pairs, only tokens, each
with a rank: neighbours that make a token of the smallest rank are joined first. Three steps take
one to the other, and none is an approximation.

1. A token's rank is that of the merge that makes it. There is one only: up to the moment when a
   token is made, all merges inside it are those that happen when it is encoded alone (a merge
   across its edge would have used up a part of it), so its last merge is the one that comes last
   there. A token that its own text does not give is made nowhere, by any merge, and is left out.
   So whenever two neighbours make a token of known rank, they are its merge and no other.
2. Before the merges come the characters: bytes are joined to a character of the vocabulary prefix
   by prefix, all at smaller ranks than any merge. A prefix starts with a byte that only starts
   characters, so nothing joins across characters. What remains of other characters, bytes and
   prefixes, is spelt in byte tokens afterwards.
3. tiktoken merges within pieces that a regex cuts. BPE would not cut at all; a cut changes nothing
   if no token contains both characters around it. Characters that are neighbours in some token
   form groups (Latin letters, signs, Greek ...), and a piece is a run of one group with the spaces
   before it. That every token is within one piece is checked when the file is read.

The gain is that pieces are short: a merge costs its piece, not its document.

**Unicode.** `unicodedata` and `re` follow the Unicode version of their Python, the `tokenizers`
library does not: its NFC is that of Unicode 9, its word characters are those of one release of the
Oniguruma regex library. unicode.json has both as hexadecimal ranges of code points, ends included.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import inf
from pathlib import Path

import numpy as np
import tiktoken

from data.dataset import BOS, EOS, DataError

SPECIAL_TOKENS = {"<s>": BOS, "</s>": EOS, "<unk>": 2, "<pad>": 3}
SPACE = "\u2581"  # what a space is in the vocabulary
BLANKS = (" ", "\xa0")  # become SPACE; vocabulary entries with one of them are never met
OPENERS = "\n\t([{/<'’\"«“‘‚‹—–―"  # a space is put after each, and taken out again
OPEN_SPACE = re.compile(f"([{re.escape(OPENERS)}]) ")
# Of what the released tokenizer.json says besides its vocabulary and its merges: `_model`.
RULES = "6cf6ba3d565576910af54b9f8af0322870cdc52467b4c5f4e7abd2640359ef63"


def _regex_class(ranges: list[str]) -> str:
    """What stands between [ and ] in a regex: ["30-39 5F"] to "0-9_"."""
    pairs = (ends.split("-") for ends in " ".join(ranges).split())
    return "".join(
        "-".join(re.escape(chr(int(end, 16))) for end in dict.fromkeys(pair)) for pair in pairs
    )


UNICODE = json.loads(Path(__file__).with_name("unicode.json").read_text("utf-8"))
# Oniguruma's [\w]: letters, marks, decimal digits, numerals that are letters, connectors like "_".
# (Its bare \w, by another of its tables, counts the signs ² ³ ¹ ¼ ½ ¾ too.)
WORD = _regex_class(UNICODE["word_characters"])
# Added after Unicode 9, up to 18, and not inert: marks of a combining class, precomposed
# characters, and what those are composed of.
NEWER = re.compile(f"([{_regex_class(UNICODE['newer_than_unicode_9'])}])")


def nfc(text: str) -> str:
    """The text with accents composed (Unicode's form NFC), as Unicode 9 has it.

    Unicode's stability policy: what one version composes, every later one composes alike. Only
    characters added since can differ, and for Unicode 9 nothing composes with such a character or
    moves across it. So text is cut there, and the parts are composed.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    parts = NEWER.split(text)
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    return "".join(parts)


class LucieBPE:
    """Lucie's tokenizer, from the content of its tokenizer.json, which `source` keeps.

    Ids and texts are those of version 0.23 of the `tokenizers` library. Raises DataError for
    a tokenizer.json with other rules than Lucie's; the vocabulary may be any.
    """

    def __init__(self, source: bytes) -> None:
        self.source = source
        try:
            vocab, merges = _model(json.loads(source))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise DataError("not a tokenizer.json, or not one of Lucie's form") from None
        self.vocab_size = len(vocab)
        self.tokens = sorted(vocab, key=vocab.__getitem__)
        self.byte_of = {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256)}

        byte_ids = list(self.byte_of)
        merged = _reachable(merges)
        characters = {
            c.replace(SPACE, " "): i for c, i in vocab.items() if len(c) == 1 and c not in BLANKS
        }
        known = {text.encode(): i for text, i in characters.items()}
        merged_keys = [token.replace(SPACE, " ").encode() for token in merged]
        known |= {key: vocab[token] for key, token in zip(merged_keys, merged)}
        prefixes = {c.encode()[:n] for c in characters for n in range(2, len(c.encode()) + 1)}
        # Those that are no character come first, so that the ranks tell whether any is left.
        keys = sorted(prefixes, key=lambda prefix: (prefix in known, len(prefix), prefix))
        self.partial = len(prefixes - known.keys())
        keys += [bytes([b]) for b in range(256)] + merged_keys
        self.encoding = tiktoken.Encoding(
            "lucie",
            pat_str=_pieces(merged),
            mergeable_ranks={key: rank for rank, key in enumerate(keys)},
            # One at least: without any, tiktoken halts at every character to look for one.
            special_tokens={"<s>": len(keys)},
        )
        # The ids of each rank: one, or one for each byte of what is not in the vocabulary.
        spelt = [[known[k]] if k in known else [byte_ids[b] for b in k] for k in keys]
        self.lengths = np.array([len(ids) for ids in spelt])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.spelt = np.concatenate(spelt).astype(np.int32)
        self.single = self.spelt[self.starts]

        # One regex for each opener: a class of all would be tried at every character.
        follows = f"(?=[ {WORD}])"
        self.open = [(c, re.compile(re.escape(c) + follows)) for c in OPENERS]

    def normalize(self, text: str) -> str:
        """The text as BPE sees it, with spaces where the vocabulary has U+2581."""
        text = nfc(text).replace("\r", "").replace("\0", "")
        for opener, pattern in self.open:
            if opener in text:
                text = pattern.sub(f"{opener} ", text)
        text = text.replace("\xa0", " ").replace(SPACE, " ")
        return f" {text}" if text else ""

    def ids(self, text: str) -> np.ndarray:
        """The ids of a text without lone surrogates; special tokens in it are plain text."""
        if not (text := self.normalize(text)):
            return np.empty(0, np.int32)
        ranks = self.encoding.encode_to_numpy(text, disallowed_special=())
        if ranks.min() >= self.partial:
            return self.single[ranks]
        # The i-th rank's ids, lengths[i] of them from starts[i] on, one after the other.
        lengths = self.lengths[ranks]
        ends = np.cumsum(lengths)
        place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        return self.spelt[np.repeat(self.starts[ranks], lengths) + place]

    def decoder(self) -> "LucieDecoder":
        return LucieDecoder(self.tokens, self.byte_of)


class LucieDecoder:
    """Ids to text, one by one.

    A run of byte tokens is held back to its end, since one byte more can spoil it: a run that is
    not UTF-8 becomes one U+FFFD for each byte. Other text is certain at once; but the first token,
    or run, loses its spaces, and a space is dropped after an opener.
    """

    def __init__(self, tokens: list[str], byte_of: dict[int, bytes]) -> None:
        self.tokens, self.byte_of = tokens, byte_of
        self.first, self.run = True, bytearray()
        self.opened = False  # whether the character before is an opener

    def feed(self, token: int) -> str:
        if token in self.byte_of:
            self.run += self.byte_of[token]
            return ""
        return self.finish() + self._text(self.tokens[token])

    def finish(self) -> str:
        if not self.run:
            return ""
        run, self.run = self.run, bytearray()
        try:
            return self._text(run.decode())
        except UnicodeDecodeError:
            return self._text("\ufffd" * len(run))

    def _text(self, token: str) -> str:
        text = token.replace(SPACE, "" if self.first else " ")
        self.first = False
        if not text:
            return ""
        opened, self.opened = self.opened, text[-1] in OPENERS
        if opened and text[0] == " ":
            text = text[1:]
        return OPEN_SPACE.sub(r"\1", text) if text.rfind(" ") > 0 else text


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


def _reachable(merges: dict[tuple[str, str], int]) -> list[str]:
    """The tokens that BPE makes, in the order of the merges that make them: step 1 above."""
    rank = {}
    for token in dict.fromkeys(a + b for a, b in merges):
        if not any(blank in token for blank in BLANKS):
            pair = last_merge(token, merges)
            if pair:
                rank[token] = merges[pair]
    return sorted(rank, key=rank.__getitem__)


def _pieces(tokens: Iterable[str]) -> str:
    """The regex that cuts text where no token crosses: step 3 above."""
    group: dict[str, set[str]] = {}
    for token in tokens:
        word = token.lstrip(SPACE)
        if SPACE in word:
            raise DataError(f"a token holds more than one word: {token!r}")
        for c in word:
            group.setdefault(c, {c})
        for a, b in pairwise(word):
            if group[a] is not group[b]:
                group[a] |= group[b]
                group |= dict.fromkeys(group[b], group[a])
    groups = {min(g): "".join(rf"\x{{{ord(c):X}}}" for c in sorted(g)) for g in group.values()}
    return "|".join([*(f" *[{groups[c]}]+" for c in sorted(groups)), " +", "(?s:.)"])


def _model(released: dict) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Vocabulary and merges with their ranks. Raises ValueError where anything else is another."""
    rules = dict(released["model"])
    vocab, merges = rules.pop("vocab"), rules.pop("merges")
    # What newer versions of tokenizers write differently, or add.
    same = not rules.pop("ignore_merges", False)
    decoders = [dict(step) for step in released["decoder"]["decoders"]]
    for step in decoders:
        same &= step.pop("split", True) and step.pop("add_prefix_space", True)
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    rules = [rules, decoders, *(released[part] for part in parts)]
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    tokens = {part for pair in pairs for part in (*pair, "".join(pair))}
    if (
        not same
        or digest != RULES
        or sorted(vocab.values()) != list(range(len(vocab)))
        or {token: vocab.get(token) for token in SPECIAL_TOKENS} != SPECIAL_TOKENS
        or any(len(pair) != 2 for pair in pairs)
        or not tokens | {f"<0x{b:02X}>" for b in range(256)} <= vocab.keys()
    ):
        raise ValueError
    return vocab, {pair: rank for rank, pair in enumerate(pairs)}
