"""Texts that tokenizers get wrong, and a small tokenizer of Lucie's form, for their tests."""

import json
import random
from collections.abc import Iterator

from data import demo

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
    [
        "\x01",
        "\x1b",
        "\x7f",
        "\x85",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\U0010ffff",
    ],
)


def hard_strings(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for n in range(count):
        pieces = [rng.choice(rng.choice(HARD)) for _ in range(rng.randint(0, 12))]
        if n % 4 == 0:
            pieces.append(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])))
        rng.shuffle(pieces)
        yield "".join(pieces)


def code_points() -> list[str]:
    """Every character that UTF-8 can hold."""
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def lucie_json() -> dict:
    """A tokenizer.json of Lucie's form with about 1,700 tokens, its rules written out here.

    The tokenizers library learns it. Then come merges that learning does not give and a file may
    hold: tokens that another merge always forestalls, second pairs for a token, and blanks.
    """
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers, trainers

    def replace(kind, pattern, content):
        return {"type": "Replace", "pattern": {kind: pattern}, "content": content}

    escaped = {c: f"\\{c}" if c in "\n\t([{" else c for c in OPENERS}
    steps = [{"type": "NFC"}, replace("Regex", "[\\r\\x00]", "")]
    steps += [replace("Regex", rf"{escaped[c]}(?=[ \w])", f"{c} ") for c in OPENERS]
    steps += [{"type": "Prepend", "prepend": " "}, replace("Regex", "[ \\u00A0]", "▁")]
    normalizer = {"type": "Sequence", "normalizers": steps}

    special = ["<s>", "</s>", "<unk>", "<pad>", *(f"<0x{b:02X}>" for b in range(256))]
    empty = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    written = json.loads(empty.to_str()) | {"normalizer": normalizer}
    trainable = tokenizers.Tokenizer.from_str(json.dumps(written))
    words = r"▁*[\p{L}\p{M}_]+|\p{N}|▁*[^\p{L}\p{M}\p{N}\n▁]+|▁+|\n+"
    trainable.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    texts = [t for s in ("fr", "de", "code", "en") for t in demo.documents(s, "valid")]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    trainable.train_from_iterator(texts, trainer)
    model = json.loads(trainable.to_str())["model"]

    rng = random.Random(1)
    vocab, merges = model["vocab"], model["merges"]
    tokens = [a + b for a, b in merges]
    letters = [t for t in tokens if t.lstrip("▁").isalpha()]
    more = [[t[:n], t[n:]] for t in tokens for n in range(1, len(t))]
    more = [pair for pair in more if pair not in merges and set(pair) <= vocab.keys()]
    tails = [t for t in letters if "▁" not in t]
    more += [[rng.choice(letters), rng.choice(tails)] for _ in range(200)]
    for pair in more:
        if pair not in merges:
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    # The released file has such too; no text holds them once its blanks are "▁".
    for token in (" ", "\xa0", "e\xa0"):
        vocab[token] = len(vocab)
    merges.append(["e", "\xa0"])

    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": special[i], **plain, "special": True} for i in range(4)]
    bos = [{"SpecialToken": {"id": "<s>", "type_id": n}} for n in (0, 1)]
    text = [{"Sequence": {"id": "AB"[n], "type_id": n}} for n in (0, 1)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    decoders = [{"type": "ByteFallback"}, metaspace | {"add_prefix_space": True}, {"type": "Fuse"}]
    decoders += [replace("String", f"{c} ", c) for c in OPENERS]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos[0], text[0]],
            "pair": [bos[0], text[0], bos[1], text[1]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }
