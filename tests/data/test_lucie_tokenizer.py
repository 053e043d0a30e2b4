"""Lucie's tokenizer against the `tokenizers` library: on the released file where it is at hand, and
on small ones of its form.
"""

import gzip
import json
import os
import random
import re
import unicodedata
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from text_cases import code_points, hard_strings, lucie_json

from data import lucie_tokenizer
from data.dataset import BOS, DataError
from data.lucie_tokenizer import LucieBPE, last_merge
from data.tokenizer import Tokenizer, load

tokenizers = pytest.importorskip("tokenizers")
RELEASED = SHARED / "lucie/tokenizer.json"
NFC = tokenizers.normalizers.NFC()
IN_CONTEXT = ("a{}a", "({}", "e\u0301{}\u0323")  # between letters, after an opener, among marks
LONG_RUNS = [c * 20_000 for c in ("a", " ", "\n", "(", "e\u0301", "🙂", "ab ", "\u0301")]


class Pair:
    """Our tokenizer, theirs, and theirs again reading no special tokens from texts."""

    def __init__(self, content: bytes):
        self.ours = Tokenizer(LucieBPE(content))
        self.theirs = tokenizers.Tokenizer.from_str(content.decode())
        self.plain = tokenizers.Tokenizer.from_str(content.decode())
        self.plain.encode_special_tokens = True

    def check(self, texts):
        """Compare ids, read as a prompt and as plain text, and their decoding; return how many."""
        count, texts = 0, iter(texts)
        while batch := list(islice(texts, 512)):
            theirs = [encoding.ids for encoding in self.theirs.encode_batch_fast(batch)]
            for text, ids in zip(batch, theirs):
                assert self.ours.encode(text) == ids, repr(text)
                if "<" in text:
                    plain = self.plain.encode(text).ids
                    assert [BOS, *self.ours.encode_ordinary(text)] == plain, repr(text)
            self.check_decoding(theirs)
            count += len(batch)
        return count

    def check_decoding(self, lines, skip_special=True):
        texts = self.theirs.decode_batch(lines, skip_special_tokens=skip_special)
        for ids, text in zip(lines, texts):
            assert self.ours.decode(ids, skip_special) == text, ids


@cache
def small_file() -> bytes:
    return json.dumps(lucie_json()).encode()


@cache
def pair_of(kind: str) -> Pair:
    if kind == "released":
        return Pair(RELEASED.read_bytes())
    content = json.loads(small_file())
    if kind == "shuffled":  # so that a token may outrank its parts
        random.Random(1).shuffle(content["model"]["merges"])
    return Pair(json.dumps(content).encode())


@pytest.fixture(params=["learnt", "shuffled", "released"])
def pair(request) -> Pair:
    if request.param == "released" and not RELEASED.is_file():
        pytest.skip("needs the shared reference data")
    return pair_of(request.param)


@pytest.fixture
def small() -> Pair:
    return pair_of("learnt")


def best() -> Pair:
    """The pair of the released file, or a small one where it is not at hand."""
    return pair_of("released" if RELEASED.is_file() else "learnt")


# --- text to ids ---------------------------------------------------------------------------------


def test_hard_strings_and_long_runs(pair):
    pair.check([*hard_strings(1000), *LONG_RUNS])


@pytest.mark.slow
def test_many_hard_strings():
    assert best().check(hard_strings(100_000, seed=1)) == 100_000


@given(st.text())
@settings(max_examples=200)
def test_any_text(text):
    best().check([text])


def in_context(characters):
    for start in range(0, len(characters), 512):
        for form in IN_CONTEXT:
            yield " ".join(map(form.format, characters[start : start + 512]))


def test_code_points_in_context():
    best().check(in_context(code_points()[::32]))


@pytest.mark.slow
def test_every_code_point_alone_and_in_context():
    best().check(code_points())
    best().check(in_context(code_points()))


@pytest.mark.parametrize("count", [8000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_vocabulary_entries(pair, count):
    """The last ones: all of a small vocabulary and, in the slow form, all of the released one."""
    size = pair.ours.vocab_size
    pair.check(token.replace("▁", " ") for token in pair.ours.bpe.tokens[-count:])
    pair.check_decoding([[i] for i in range(size)[-count:]], skip_special=False)
    pair.check_decoding([[4, i, i] for i in range(1500)], skip_special=False)


def test_surrogates_become_characters_or_the_replacement_character(small):
    """JSON can hold them. A note of music is a pair of them that composition takes apart."""
    text, expected = "\ud834\udd5e🙂 a\ud800b", "\U0001d15e🙂 a\ufffdb"
    assert small.ours.encode(text) == small.theirs.encode(expected).ids


def corpus():
    for path in sorted(SHARED.glob("corpus/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            yield from (json.loads(line)["text"] for line in f)


@needs_shared
def test_the_released_file_on_real_documents():
    assert best().check(islice(corpus(), 100)) == 100


@needs_shared
@pytest.mark.slow
def test_the_released_file_on_all_documents_and_on_code():
    assert best().check(corpus()) > 1000
    sources = sorted(Path(os.__file__).parent.rglob("*.py"))
    sources = [path for path in sources if "site-packages" not in path.parts]
    assert best().check(path.read_text("utf-8", "replace") for path in sources[::8]) > 100


# --- ids to text ---------------------------------------------------------------------------------


def random_ids(bpe, rng):
    """Ids with many bytes, whole characters in bytes, special tokens and spaces among them."""
    id_of = {byte: i for i, byte in bpe.byte_of.items()}
    spaced = [bpe.tokens.index(t) for t in ("▁", "(", "\n", "'", " ") if t in bpe.tokens]
    while True:
        ids = []
        for _ in range(rng.randrange(12)):
            kind = rng.randrange(5)
            if kind == 0:
                ids.append(rng.choice(spaced))
            elif kind == 1:
                ids += [id_of[bytes([b])] for b in rng.choice("é🙂▁(Ω \n").encode()]
            else:
                ids.append(rng.randrange((4, 260, bpe.vocab_size)[kind - 2]))
        yield ids


def test_a_stream_continues_what_was_shown(pair):
    """From any place on, joined to the text before, it is the library's text of all ids."""
    lines = [pair.ours.encode(text) for text in hard_strings(300, seed=2)]
    lines += islice(random_ids(pair.ours.bpe, random.Random(1)), 1500)
    pair.check_decoding(lines)
    pair.check_decoding(lines, skip_special=False)
    continued = 0
    for ids in lines:
        text = pair.theirs.decode(ids)
        for cut in range(len(ids) + 1):
            before = pair.theirs.decode(ids[:cut])
            if text.startswith(before):
                continued += 1
                pieces = pair.ours.stream(iter(ids[cut:]), after=ids[:cut])
                assert before + "".join(pieces) == text, (ids, cut)
    assert continued > 5000


def test_a_stream_holds_back_bytes_alone(pair):
    """After each id all is out that is certain: everything but a run of bytes at the end."""
    ids = pair.ours.encode("Où (est) l'été 🙂 ?\n\n« Là »")
    given = 0

    def counted():
        nonlocal given
        for i in ids:
            given += 1
            yield i

    out = ""
    for piece in pair.ours.stream(counted()):
        out += piece
        assert out == pair.theirs.decode(ids[:given]) and "\ufffd" not in out
    assert out == pair.theirs.decode(ids)


def test_a_character_that_the_prompt_cuts_comes_whole(small):
    ids = [small.ours.bpe.tokens.index(f"<0x{b:02X}>") for b in "🙂".encode()]
    assert "".join(small.ours.stream(ids[2:], after=ids[:2])) == "🙂"


# --- files ---------------------------------------------------------------------------------------


def test_a_file_that_newer_libraries_wrote_again_is_the_same(small, tmp_path):
    small.theirs.save(str(tmp_path / "tokenizer.json"))
    again = load(tmp_path)
    assert again.bpe.source != small.ours.bpe.source
    for text in hard_strings(300):
        assert again.encode(text) == small.ours.encode(text)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff\xfe\x00", b"{}", None])
def test_what_is_no_tokenizer_json_is_refused_in_one_line(content):
    content = small_file()[:-100] if content is None else content
    with pytest.raises(DataError, match=r"^not a tokenizer\.json, or not one of Lucie's form$"):
        LucieBPE(content)


def of_three_parts(model):
    """A merge of three tokens that make a fourth."""
    vocab = model["vocab"]
    return " ".join(next(t for t in vocab if len(t) == 3 and set(t) <= vocab.keys()))


def exchange(items, a, b):
    items[a], items[b] = items[b], items[a]


CHANGES = {
    "no rules": lambda f: f.pop("normalizer"),
    "another model": lambda f: f["model"].update(type="Unigram"),
    "dropout": lambda f: f["model"].update(dropout=0.1),
    "ignored merges": lambda f: f["model"].update(ignore_merges=True),
    "no byte fallback": lambda f: f["model"].update(byte_fallback=False),
    "a list for a vocabulary": lambda f: f["model"].update(vocab=["a"]),
    "a hole in the ids": lambda f: f["model"]["vocab"].update(new=len(f["model"]["vocab"]) + 1),
    "other special tokens": lambda f: f["model"]["vocab"].update({"<s>": 1, "</s>": 0}),
    "a byte missing": lambda f: f["model"]["vocab"].update(new=f["model"]["vocab"].pop("<0x41>")),
    "a merge of three": lambda f: f["model"].update(merges=[of_three_parts(f["model"])]),
    "a merge of no tokens": lambda f: f["model"].update(merges=["q zzz"]),
    "NFKC": lambda f: f["normalizer"]["normalizers"][0].update(type="NFKC"),
    "an opener less": lambda f: f["normalizer"]["normalizers"].pop(4),
    "openers in another order": lambda f: exchange(f["normalizer"]["normalizers"], 2, 3),
    "a pre-tokenizer": lambda f: f.update(pre_tokenizer={"type": "Whitespace"}),
    "the first space kept": lambda f: f["decoder"]["decoders"][1].update(prepend_scheme="never"),
    "words split": lambda f: f["decoder"]["decoders"][1].update(split=False),
    "no <s> in front": lambda f: f.update(post_processor=None),
    "more special tokens": lambda f: f["added_tokens"].append({"id": 4}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_with_other_rules_is_refused_in_one_line(change):
    content = json.loads(small_file())
    change(content)
    with pytest.raises(DataError, match=r"^not a tokenizer\.json, or not one of Lucie's form$"):
        LucieBPE(json.dumps(content).encode())


def test_a_token_of_two_words_is_refused():
    content = json.loads(small_file())
    content["model"]["vocab"]["e▁"] = len(content["model"]["vocab"])
    content["model"]["merges"] = ["e ▁"]
    with pytest.raises(DataError, match="more than one word: 'e▁'"):
        LucieBPE(json.dumps(content).encode())


def test_the_last_merge_by_hand():
    merges = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2, ("ab", "c"): 3}
    assert last_merge("abc", merges) == ("a", "bc")
    assert last_merge("ab", merges) == ("a", "b")
    assert last_merge("ac", merges) is None
    assert last_merge("aaa", {("a", "a"): 0, ("a", "aa"): 1}) is None  # leftmost first: aa a
    assert last_merge(b"ab", {(b"a", b"b"): 0}) == (b"a", b"b")


# --- Unicode -------------------------------------------------------------------------------------


def test_word_characters_are_those_of_the_library():
    everything = "".join(code_points())
    theirs = tokenizers.normalizers.Replace(tokenizers.Regex(r"[ \w]+"), "")
    ours = re.compile(f"[ {lucie_tokenizer.WORD}]+")
    assert ours.sub("", everything) == theirs.normalize_str(everything)


@pytest.fixture(params=["unicodedata", pytest.param("unicodedata2", marks=pytest.mark.slow)])
def version(request, monkeypatch):
    """Python's own Unicode, and a newer one."""
    module = pytest.importorskip(request.param)
    if not hasattr(module, "is_normalized"):
        monkeypatch.setattr(
            module, "is_normalized", lambda form, text: module.normalize(form, text) == text, False
        )
    monkeypatch.setattr(lucie_tokenizer, "unicodedata", module)
    return module


def check_nfc(texts):
    joined = "\n".join(texts)  # a line break composes with nothing
    if NFC.normalize_str(joined) != lucie_tokenizer.nfc(joined):
        for text in texts:
            assert NFC.normalize_str(text) == lucie_tokenizer.nfc(text), ascii(text)


# The second puts a character between marks of the highest class, 240, and the lowest, 1, so that
# whatever has a class moves; the third puts it into a syllable of Hangul.
@pytest.mark.parametrize(
    "form", ["{}", "a\u0345{}\u0334\u0301", "\u1100{}\u1161\u11a8\u0334"], ids=range(3)
)
@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_composes_as_in_the_library(version, form, step):
    check_nfc(list(map(form.format, code_points()[::step])))


@pytest.mark.slow
def test_every_pair_composes_as_in_the_library(version):
    """Of all characters that can compose or move, in the newest Unicode at hand."""
    newest = pytest.importorskip("unicodedata2") if version is not unicodedata else version
    parts = {c: newest.decomposition(c).split() for c in code_points()}
    parts = {c: p for c, p in parts.items() if p and not p[0].startswith("<")}
    ideographs = {c for c in parts if len(parts[c]) == 1}
    firsts = {chr(int(p[0], 16)) for c, p in parts.items() if c not in ideographs}
    seconds = {chr(int(p[-1], 16)) for c, p in parts.items() if c not in ideographs}
    seconds |= {c for c in code_points() if newest.combining(c)}
    for a in sorted(firsts | seconds | parts.keys() - ideographs):
        check_nfc([f"{a}{b}\u0301" for b in sorted(seconds)])
