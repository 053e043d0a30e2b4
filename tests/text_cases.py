"""Texts that tokenizers get wrong, a small tokenizer of Lucie's form, and the comparison with the
`tokenizers` library that the tests of both kinds of tokenizer share.
"""

import json
import random
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice

from data import demo
from data.dataset import BOS
from data.tokenizer import Tokenizer

OPENERS = "\n\t([{/<'’\"«“‘‚‹—–―"

# One of each line at random, several times over, makes a string.
HARD = (
    [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\0", "\xa0", "\u2009", "\u3000", "\u2028", "▁"],
    [*OPENERS, *")]}>”»`-…"],
    ["le", "maison", " der", "xyz", "É", "Straße", "_", "a_b", "I", "ﬁn", "3", "1984", "²", "½"],
    ["e\u0301", "\u0301", "\u0323\u0301", "A\u030a", "\u212b", "q\u0307\u0323", "\u0344", "\u0958"],
    ["\u1100\u1161\u11a8", "\uac00\u11a8", "\u1e9b\u0323", "\U0001d15e", "\u0f73", "\uf900"],
    # Newer than Unicode 9: to the tokenizers library these marks and letters do nothing.
    ["\u08d3", "\u1ac5", "\u0c3c", "\U000105d2\u0307", "\U00011935\U00011930", "e\u1ac1\u0323"],
    ["<s>", "</s>", "<unk>", "<pad>", "<s", "< s>", "<<s>", "<0x41>", "▁<s>", "<S>"],
    ["🙂", "👩\u200d🚀", "🇫🇷", "\ufe0f", "\U00010330", "ꙮ", "ܐ", "\U0001e922", "\U000e0041"],
    ["Москва", "Ωμέγα", "עִברִית", "العَرَبِيَّة", "हिन्दी", "ไทย", "日本語", "한국어", "Ⓐ", "Ⅷ"],
    list("\x01\x1b\x7f\x85\u200b\u200d\ufeff\ufffd\ufffe\U0010ffff"),
)


def hard_strings(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for n in range(count):
        pieces = [rng.choice(rng.choice(HARD)) for _ in range(rng.randint(0, 12))]
        if n % 4 == 0:
            pieces.append(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])))
        rng.shuffle(pieces)
        yield "".join(pieces)


def code_points(step: int = 1) -> list[str]:
    """Every character that UTF-8 can hold, or every step-th."""
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000][::step]


def in_context(characters: list[str]) -> Iterator[str]:
    """Characters alone, between letters, after an opener, and among marks."""
    for start in range(0, len(characters), 512):
        for form in ("{}", "a{}a", "({}", "e\u0301{}\u0323"):
            yield " ".join(map(form.format, characters[start : start + 512]))


class Pair:
    """Our tokenizer, theirs, and theirs again reading no special tokens from texts."""

    def __init__(self, ours: Tokenizer, content: bytes) -> None:
        from tokenizers import Tokenizer as Theirs

        self.ours, self.theirs, self.plain = ours, *(Theirs.from_buffer(content) for _ in "ab")
        self.plain.encode_special_tokens = True

    def check(self, texts: Iterable[str]) -> None:
        """Compare ids, read as a prompt and as plain text, and their decoding."""
        texts = iter(texts)
        while batch := list(islice(texts, 512)):
            theirs = [encoding.ids for encoding in self.theirs.encode_batch_fast(batch)]
            for text, ids in zip(batch, theirs):
                assert self.ours.encode(text) == ids, repr(text)
                if "<" in text:
                    plain = self.plain.encode(text).ids
                    assert [BOS, *self.ours.encode_ordinary(text)] == plain, repr(text)
            self.check_decoding(theirs, [True])

    def check_decoding(self, lines: list[list[int]], skips: Iterable[bool] = (True, False)) -> None:
        for skip in skips:
            for ids, text in zip(lines, self.theirs.decode_batch(lines, skip_special_tokens=skip)):
                assert self.ours.decode(ids, skip) == text, ids

    def check_streams(self) -> None:
        """From any place on, joined to the text before, a stream is the text of all ids."""
        lines = [self.ours.encode(text) for text in hard_strings(200, seed=2)]
        lines += [self.random_ids(random.Random(seed)) for seed in range(1000)]
        self.check_decoding(lines)
        continued = 0
        for ids in lines:
            text = self.theirs.decode(ids)
            for cut in range(len(ids) + 1):
                before = self.theirs.decode(ids[:cut])
                if text.startswith(before):
                    continued += 1
                    pieces = list(self.ours.stream(iter(ids[cut:]), after=ids[:cut]))
                    assert before + "".join(pieces) == text and "" not in pieces, (ids, cut)
        assert continued > 5000

    def random_ids(self, rng: random.Random) -> list[int]:
        """Ids with many bytes, whole characters in bytes, special tokens and spaces among them."""
        spaced = [i for c in "▁(\n' " if (i := self.theirs.token_to_id(c)) is not None]
        ids = []
        for _ in range(rng.randrange(12)):
            kind = rng.randrange(5)
            if kind == 0:
                ids.append(rng.choice(spaced))
            elif kind == 1:  # both kinds of tokenizer have the 256 bytes from id 4 on
                ids += [4 + b for b in rng.choice("é🙂▁(Ω \n\ufffd").encode()]
            else:
                ids.append(rng.randrange((4, 260, self.ours.vocab_size)[kind - 2]))
        return ids


@cache
def lucie_json() -> dict:
    """A tokenizer.json of Lucie's form with 1,500 tokens, its rules written out here.

    The tokenizers library learns it. Callers share it: whoever changes it changes a copy.
    """
    import tokenizers
    from tokenizers import Regex, decoders, normalizers

    escaped = {c: f"\\{c}" if c in "\n\t([{" else c for c in OPENERS}
    steps = [normalizers.NFC(), normalizers.Replace(Regex("[\\r\\x00]"), "")]
    steps += [normalizers.Replace(Regex(rf"{escaped[c]}(?=[ \w])"), f"{c} ") for c in OPENERS]
    steps += [normalizers.Prepend(" "), normalizers.Replace(Regex("[ \\u00A0]"), "▁")]
    back = [decoders.ByteFallback(), decoders.Metaspace("▁", "always"), decoders.Fuse()]
    back += [decoders.Replace(f"{c} ", c) for c in OPENERS]
    template = "<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 0)]
    words = r"▁*[\p{L}\p{M}_]+|\p{N}|▁*[^\p{L}\p{M}\p{N}\n▁]+|▁+|\n+"

    model = tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer, bpe.decoder = normalizers.Sequence(steps), decoders.Sequence(back)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(*template)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Split(Regex(words), "isolated")
    special = ["<s>", "</s>", "<unk>", "<pad>", *(f"<0x{b:02X}>" for b in range(256))]
    texts = [t for s in ("fr", "de", "code") for t in demo.documents(s, "valid")]
    options = {"vocab_size": 1500, "special_tokens": special, "show_progress": False}
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**options))
    written = json.loads(bpe.to_str())
    # Lucie's has no pre-tokenizer, and it was written by an older version of the library.
    written |= {"pre_tokenizer": None, "added_tokens": written["added_tokens"][:4]}
    metaspace = written["decoder"]["decoders"][1]
    metaspace["add_prefix_space"] = metaspace.pop("split")
    del written["model"]["ignore_merges"]
    # No text holds such a token once its blanks are "▁"; the released file has them too.
    vocab, merges = written["model"]["vocab"], written["model"]["merges"]
    for token in (" ", "\xa0", "e\xa0"):
        vocab[token] = len(vocab)
    merges.append(["e", "\xa0"])
    written["model"]["merges"] = [" ".join(pair) for pair in merges]
    return written
