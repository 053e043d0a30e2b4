"""Lucie's tokenizer against the `tokenizers` library: on the released file where it is at hand, and
on small ones of its form.
"""

import copy
import gzip
import json
import re
from functools import cache
from itertools import islice

import pytest
from conftest import SHARED, needs_shared
from text_cases import Pair, code_points, hard_strings, in_context, lucie_json

from data import demo, lucie_tokenizer
from data.dataset import DataError
from data.lucie_tokenizer import LucieBPE
from data.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
RELEASED = SHARED / "lucie/tokenizer.json"
NFC = tokenizers.normalizers.NFC()
LONG_RUNS = [c * 20_000 for c in ("a", " ", "\n", "(", "e\u0301", "🙂", "ab ", "\u0301")]


@cache
def pair_of(kind: str) -> Pair:
    if kind == "released":
        content = RELEASED.read_bytes()
    else:
        content = json.dumps(lucie_json()).encode()
    return Pair(Tokenizer(LucieBPE(content)), content)


@pytest.fixture(params=["learnt", "released"])
def pair(request) -> Pair:
    if request.param == "released" and not RELEASED.is_file():
        pytest.skip("needs the shared reference data")
    return pair_of(request.param)


# --- ids and texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, step", [(700, 512), pytest.param(100_000, 1, marks=pytest.mark.slow)]
)
def test_hard_strings_long_runs_and_code_points(pair, count, step):
    pair.check([*hard_strings(count), *LONG_RUNS, *in_context(code_points(step))])


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_vocabulary_entries(pair, count):
    """The last ones: all of a small vocabulary and, in the slow form, all of the released one."""
    pair.check(token.replace("▁", " ") for token in pair.ours.bpe.tokens[-count:])
    pair.check_decoding([[i] for i in range(pair.ours.vocab_size)[-count:]])
    pair.check_decoding([[4, i, i] for i in range(1500)])


def real_texts():
    for path in sorted(SHARED.glob("corpus/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            yield from (json.loads(line)["text"] for line in f)
    yield from demo.documents("code", "train")  # Python's library


@needs_shared
@pytest.mark.parametrize("count", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_the_released_file_on_real_documents_and_code(count):
    texts = list(islice(real_texts(), count))
    assert len(texts) == count or len(texts) > 1000
    pair_of("released").check(texts)


def test_a_stream_continues_what_was_shown(pair):
    pair.check_streams()


def test_a_stream_holds_back_bytes_alone(pair):
    """After each id all is out that is certain: everything but a run of bytes at the end."""
    ids, fed, out = pair.ours.encode("Où (est) l'été 🙂 ?\n\n« Là »"), [], ""

    def feed():
        for i in ids:
            fed.append(i)
            yield i

    for piece in pair.ours.stream(feed()):
        out += piece
        assert out == pair.theirs.decode(fed) and "\ufffd" not in out
    assert out == pair.theirs.decode(ids)
    # A character that the prompt cuts comes whole.
    cut = [4 + byte for byte in "🙂".encode()]
    assert "".join(pair.ours.stream(cut[2:], after=cut[:2])) == "🙂"


# --- files ---------------------------------------------------------------------------------------


def only_merge(model, merge):
    """Leave one merge, and put what it makes into the vocabulary."""
    model["vocab"].setdefault(merge.replace(" ", ""), len(model["vocab"]))
    model["merges"] = [merge]


OTHER_FORM = r"not a tokenizer\.json, or not one of Lucie's form"
CHANGES = {
    "ignored merges": lambda f: f["model"].update(ignore_merges=True),
    "a hole in the ids": lambda f: f["model"]["vocab"].update(new=len(f["model"]["vocab"]) + 1),
    "a byte missing": lambda f: f["model"]["vocab"].update(new=f["model"]["vocab"].pop("<0x41>")),
    "a merge of no tokens": lambda f: f["model"].update(merges=["q zzz"]),
    "an opener less": lambda f: f["normalizer"]["normalizers"].pop(4),
    "a pre-tokenizer": lambda f: f.update(pre_tokenizer={"type": "Whitespace"}),
    "the first space kept": lambda f: f["decoder"]["decoders"][1].update(prepend_scheme="never"),
    "a token of two words": lambda f: only_merge(f["model"], "e ▁"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_with_other_rules_is_refused_in_one_line(change):
    content = copy.deepcopy(lucie_json())
    CHANGES[change](content)
    message = "a token holds more than one word: 'e▁'" if "two words" in change else OTHER_FORM
    with pytest.raises(DataError, match=f"^{message}$"):
        LucieBPE(json.dumps(content).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff\xfe\x00"])
def test_what_is_no_tokenizer_json_is_refused_in_one_line(content):
    with pytest.raises(DataError, match=f"^{OTHER_FORM}$"):
        LucieBPE(content)


# --- Unicode -------------------------------------------------------------------------------------


def test_word_characters_are_those_of_the_library():
    everything = "".join(code_points())
    theirs = tokenizers.normalizers.Replace(tokenizers.Regex(r"[ \w]+"), "")
    ours = re.compile(f"[ {lucie_tokenizer.WORD}]+")
    assert ours.sub("", everything) == theirs.normalize_str(everything)


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
def test_every_character_composes_as_in_the_library(form, step):
    check_nfc(list(map(form.format, code_points(step))))
