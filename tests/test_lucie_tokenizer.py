"""LucieTokenizer against the tokenizers library: on the released file where it is at hand, and on
small ones of its form.
"""

import gzip
import json
import os
import random
from itertools import islice
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from text_cases import code_points, hard_strings, lucie_json

from data.lucie_tokenizer import LucieTokenizer
from data.token_stream import DataError
from data.tokenizer import load
from data.tokenizer_base import BOS, EOS, last_merge

tokenizers = pytest.importorskip("tokenizers")
RELEASED = SHARED / "lucie/tokenizer.json"


class Pair:
    """Ours, theirs, and theirs again reading no special tokens from texts."""

    def __init__(self, content: bytes):
        self.ours = LucieTokenizer(content)
        self.theirs = tokenizers.Tokenizer.from_str(content.decode())
        self.plain = tokenizers.Tokenizer.from_str(content.decode())
        self.plain.encode_special_tokens = True

    def check_ids(self, texts):
        for text in texts:
            assert self.ours.encode(text) == self.theirs.encode(text).ids, repr(text)
            assert [BOS, *self.ours.encode_ordinary(text)] == self.plain.encode(text).ids, repr(
                text
            )

    def check_text(self, ids):
        for skip in (True, False):
            assert self.ours.decode(ids, skip) == self.theirs.decode(ids, skip), ids


@pytest.fixture(scope="module", params=["learnt", "shuffled", "released"])
def pair(request) -> Pair:
    if request.param != "released":
        return Pair(json.dumps(lucie_json(request.param == "shuffled")).encode())
    if not RELEASED.is_file():
        pytest.skip("needs the shared reference data")
    return Pair(RELEASED.read_bytes())


@pytest.fixture(scope="module")
def small() -> Pair:
    return Pair(json.dumps(lucie_json()).encode())


@pytest.fixture(scope="module")
def best(small) -> Pair:
    """The released file, or the small one where it is not at hand."""
    return Pair(RELEASED.read_bytes()) if RELEASED.is_file() else small


def check_all(pair: Pair, texts):
    """Ids and their decoding, the library in batches of its own; returns how many."""
    count, texts = 0, iter(texts)
    while batch := list(islice(texts, 512)):
        theirs = [encoding.ids for encoding in pair.theirs.encode_batch_fast(batch)]
        assert [pair.ours.encode(text) for text in batch] == theirs
        assert [pair.ours.decode(ids) for ids in theirs] == pair.theirs.decode_batch(theirs)
        count += len(batch)
    return count


def random_ids(pair, rng):
    """Ids with many bytes, whole characters in bytes, special tokens and spaces among them."""
    ours, out = pair.ours, []
    of_byte = {byte: i for i, byte in ours.byte_of.items()}
    spaced = [ours.tokens.index(t) for t in ("▁", "(", "\n", "'", " ") if t in ours.tokens]
    for _ in range(rng.randrange(12)):
        kind = rng.randrange(5)
        if kind == 0:
            out.append(rng.choice(spaced))
        elif kind == 1:
            out += [of_byte[bytes([b])] for b in rng.choice("é🙂▁(Ω \n").encode()]
        else:
            out.append(rng.randrange((4, 260, ours.vocab_size)[kind - 2]))
    return out


def test_ids_and_texts_of_hard_strings(pair):
    strings = list(hard_strings(1000))
    pair.check_ids(strings)
    for text in strings:
        pair.check_text(pair.ours.encode(text))


@given(st.text())
@settings(max_examples=200)
def test_any_text(best, text):
    check_all(best, [text])


@pytest.mark.slow
def test_ids_and_texts_of_many_hard_strings(best):
    assert check_all(best, hard_strings(100_000, seed=1)) == 100_000


def test_code_points_in_context(best):
    """Between letters, after an opener, between marks; one in sixteen (the tables behind
    it are tested whole in test_unicode_tables.py)."""
    check_all(best, in_context(code_points()[::16]))


@pytest.mark.slow
def test_every_code_point_in_context(best):
    check_all(best, in_context(code_points()))


@pytest.mark.slow
def test_every_code_point_alone(best):
    check_all(best, code_points())


def in_context(characters):
    for start in range(0, len(characters), 512):
        for form in ("a{}a", "({}", "e\u0301{}\u0323"):
            yield " ".join(map(form.format, characters[start : start + 512]))


def test_every_vocabulary_entry(pair):
    check_all(pair, (token.replace("▁", " ") for token in pair.ours.tokens))
    for ids in ([[i] for i in range(pair.ours.vocab_size)], [[4, i, i] for i in range(1500)]):
        theirs = pair.theirs.decode_batch(ids, skip_special_tokens=False)
        assert [pair.ours.decode(line, skip_special=False) for line in ids] == theirs


def test_random_ids_decode_alike(pair):
    rng = random.Random(0)
    for _ in range(3000):
        pair.check_text(random_ids(pair, rng))


def test_a_stream_continues_what_was_shown(pair):
    """From any place on, joined to the text before, it is the library's text of all ids."""
    rng = random.Random(1)
    ids = [pair.ours.encode(text) for text in hard_strings(300, seed=2)]
    ids += [random_ids(pair, rng) for _ in range(1500)]
    continued = 0
    for line in ids:
        text = pair.theirs.decode(line)
        assert "".join(pair.ours.stream(iter(line))) == text
        for cut in range(len(line) + 1):
            before = pair.theirs.decode(line[:cut])
            if text.startswith(before):
                continued += 1
                pieces = pair.ours.stream(iter(line[cut:]), after=line[:cut])
                assert before + "".join(pieces) == text, (line, cut)
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
        certain = [i for i in ids[:given] if i not in pair.ours.byte_of or i in ids[given:]]
        assert out == pair.theirs.decode(ids[:given]) and certain and "\ufffd" not in out
    assert out == pair.theirs.decode(ids)


def test_a_character_cut_by_the_prompt_comes_whole(small):
    ids = [small.ours.tokens.index(f"<0x{b:02X}>") for b in "🙂".encode()]
    assert "".join(small.ours.stream(ids[2:], after=ids[:2])) == "🙂"


def test_documents_are_framed_and_read_no_special_token(small):
    text = "x </s> y <pad>"
    document = small.ours.encode_document(text)
    assert document == [BOS, *small.plain.encode(text).ids[1:], EOS]
    assert small.ours.encode("a</s>b") == small.theirs.encode("a</s>b").ids
    assert EOS in small.ours.encode("a</s>b")


def test_lone_surrogates_become_the_replacement_character(small):
    """As JSON has them; tokenizers refuses such a string."""
    assert small.ours.encode("\ud83d\ude42 a\ud800b") == small.ours.encode("🙂 a\ufffdb")
    halves = "\ud834\udd5e"  # a note that composition takes apart
    assert small.ours.encode(halves) == small.theirs.encode("\U0001d15e").ids


def test_processes_give_the_same_in_order(small):
    texts = [text * (n % 200) for n, text in enumerate(hard_strings(2000))]
    one, two = small.ours.encode_batch(texts), small.ours.encode_batch(texts, processes=2)
    count = 0
    for text, a, b in zip(texts, one, two, strict=True):
        assert a.dtype == b.dtype == small.ours.dtype
        assert a.tolist() == b.tolist() == small.ours.encode_document(text)
        count += 1
    assert count == 2000


@pytest.mark.parametrize("unit", ["a", " ", "\n", "(", "e\u0301", "🙂", "ab ", "\u0301"])
def test_long_runs(pair, unit):
    pair.check_ids([unit * 20_000])


def test_a_file_that_newer_libraries_wrote_again_is_the_same(small, tmp_path):
    small.theirs.save(str(tmp_path / "tokenizer.json"))
    again = load(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != small.ours.source
    for text in hard_strings(300):
        assert again.encode(text) == small.ours.encode(text)


def changed(path, value):
    content = json.loads(json.dumps(SMALL))
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(content).encode()


SMALL = lucie_json()
VOCAB = SMALL["model"]["vocab"]
THREE = next(token for token in VOCAB if len(token) == 3 and set(token) <= VOCAB.keys())
NORMALIZERS = SMALL["normalizer"]["normalizers"]
BAD = {
    "empty": b"",
    "cut": json.dumps(SMALL).encode()[:-100],
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "binary": b"\xff\xfe\x00",
    "no model": b"{}",
    "no rules": json.dumps({"model": SMALL["model"]}).encode(),
    "another model": changed(["model", "type"], "Unigram"),
    "dropout": changed(["model", "dropout"], 0.1),
    "ignore merges": changed(["model", "ignore_merges"], True),
    "no byte fallback": changed(["model", "byte_fallback"], False),
    "vocabulary a list": changed(["model", "vocab"], ["a"]),
    "a hole in the ids": changed(["model", "vocab"], VOCAB | {"new": len(VOCAB) + 1}),
    "no byte": changed(["model", "vocab", "<0x41>"], 1),
    "merge of three": changed(["model", "merges"], [" ".join(THREE)]),
    "merge of no tokens": changed(["model", "merges"], ["q zzz"]),
    "NFKC": changed(["normalizer", "normalizers", 0], {"type": "NFKC"}),
    "one opener less": changed(["normalizer", "normalizers"], NORMALIZERS[:4] + NORMALIZERS[5:]),
    "openers in another order": changed(
        ["normalizer", "normalizers"], [*NORMALIZERS[:2], NORMALIZERS[3], NORMALIZERS[2]]
    ),
    "a pre-tokenizer": changed(["pre_tokenizer"], {"type": "Whitespace"}),
    "no first space dropped": changed(["decoder", "decoders", 1, "prepend_scheme"], "never"),
    "split": changed(["decoder", "decoders", 1, "split"], False),
    "no <s> in front": changed(["post_processor"], None),
    "more special tokens": changed(["added_tokens"], [*SMALL["added_tokens"], {"id": 4}]),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_another_file_is_refused_in_one_line(content):
    with pytest.raises(DataError, match=r"not a tokenizer\.json, or not one of Lucie's form"):
        LucieTokenizer(content)


def test_a_token_of_two_words_is_refused():
    content = json.loads(json.dumps(SMALL))
    content["model"]["vocab"]["e▁"] = len(content["model"]["vocab"])
    content["model"]["merges"] = ["e ▁"]
    with pytest.raises(DataError, match="more than one word: 'e▁'"):
        LucieTokenizer(json.dumps(content).encode())


def test_the_last_merge_by_hand():
    merges = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2, ("ab", "c"): 3}
    assert last_merge("abc", merges) == ("a", "bc")
    assert last_merge("ab", merges) == ("a", "b")
    assert last_merge("ac", merges) is None
    assert last_merge("aaa", {("a", "a"): 0, ("a", "aa"): 1}) is None  # leftmost first: aa a
    assert last_merge(b"ab", {(b"a", b"b"): 0}) == (b"a", b"b")


def corpus():
    for path in sorted(SHARED.glob("corpus/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            yield from (json.loads(line)["text"] for line in f)


@needs_shared
def test_the_released_file_on_real_documents(best):
    assert check_all(best, islice(corpus(), 100)) == 100


@needs_shared
@pytest.mark.slow
def test_the_released_file_on_all_documents_and_lines(best):
    assert check_all(best, corpus()) > 1000
    assert check_all(best, (line for text in corpus() for line in text.splitlines(True))) > 10_000


@needs_shared
@pytest.mark.slow
def test_the_released_file_on_the_standard_library(best):
    sources = sorted(Path(os.__file__).parent.rglob("*.py"))
    texts = (p.read_text("utf-8", "replace") for p in sources if "site-packages" not in p.parts)
    assert check_all(best, texts) > 1000
