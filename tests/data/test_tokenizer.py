"""Our own vocabularies: their training, their ids, their texts and their files.

The `tokenizers` and `transformers` libraries read the same vocabulary as a tokenizer.json and must
give the same ids and texts.
"""

import base64
import json
import random
import sys
import unicodedata

import pytest
from conftest import SHARED, needs_shared
from hypothesis import example, given
from hypothesis import strategies as st
from text_cases import Pair, code_points, hard_strings, in_context, lucie_json

from data import demo, tokenizer
from data.dataset import DataError
from data.tokenizer import BOS, EOS, PATTERN, ByteLevelBPE, LucieBPE, Tokenizer

tokenizers = pytest.importorskip("tokenizers")

SAMPLE = "L'été, à 18h30 :  «Où est-ce ?»\n\n    def f(x):\n\treturn x * 42\r\n🙂 ﬁn \u00a0 e\u0301"
BYTES = {bytes([b]): b + 4 for b in range(256)}


@pytest.fixture(scope="module")
def texts():
    return [t for source in ("fr", "de", "code") for t in demo.documents(source, "valid")]


@pytest.fixture(scope="module")
def trained(texts) -> Tokenizer:
    return Tokenizer(ByteLevelBPE(tokenizer.train(texts, 1000)))


def pair_of(bpe: ByteLevelBPE) -> Pair:
    return Pair(Tokenizer(bpe), json.dumps(tokenizer.to_tokenizer_json(bpe)).encode())


# --- ids and texts -------------------------------------------------------------------------------


@given(st.text(st.characters()))  # lone surrogates among them
@example("\ud83d\ude42 a\ud800b\udc00\ud800")
@example("\ud834\udd5e")  # a note of music, which composition takes apart
@example(SAMPLE)
@example("a" * 10_000)
def test_any_text_becomes_its_bytes_and_comes_back(text):
    """A pair of surrogates is one character, as in JSON, and a lone one is U+FFFD."""
    ours = Tokenizer(ByteLevelBPE(BYTES))
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    composed = tokenizers.normalizers.NFC().normalize_str(valid)
    assert ours.encode_ordinary(text) == [b + 4 for b in composed.encode()]
    assert ours.decode(ours.encode_ordinary(text)) == composed


@pytest.mark.parametrize("text", ["x </s> y <s>", "", "\ud800"])
def test_a_document_has_no_special_tokens_but_its_ends(text):
    document = Tokenizer(ByteLevelBPE(BYTES)).encode_document(text)
    plain = [b + 4 for b in text.replace("\ud800", "\ufffd").encode()]
    assert document.dtype == "uint16" and document.tolist() == [BOS, *plain, EOS]


@pytest.mark.parametrize(
    "count, step", [(1000, 256), pytest.param(100_000, 1, marks=pytest.mark.slow)]
)
def test_the_library_gives_our_ids_and_texts(texts, trained, count, step):
    pair = pair_of(trained.bpe)
    pair.check([*texts, SAMPLE, "", "x" * 10_000, *in_context(code_points(step))])
    pair.check(hard_strings(count))


def test_a_stream_continues_what_was_shown(trained):
    pair_of(trained.bpe).check_streams()


# --- files ---------------------------------------------------------------------------------------


def test_a_ranks_file_comes_back(tmp_path, trained):
    path = tmp_path / "new" / "r.tiktoken"
    tokenizer.save(trained.bpe.ranks, path)
    tokens = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    assert {token: i for i, token in enumerate(tokens, 4)} == trained.bpe.ranks
    assert tokenizer.load(path, 1000).bpe.ranks == trained.bpe.ranks
    message = "r.tiktoken has 1,000 tokens, but the model's vocabulary has 65,024$"
    with pytest.raises(DataError, match=message):
        tokenizer.load(path, 65_024)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"r\.tiktoken: No such file .*data\.prepare vocabulary"):
        tokenizer.load(tmp_path / "r.tiktoken")
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file or directory$"):
        tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"^no tokenizer is known"):
        tokenizer.load("")


def test_merges_are_found_whatever_the_order_of_ranks():
    """A token may outrank its parts; and one that no merge makes has no place in the file."""
    more = [b"abc", b"bc", b"ab", b" a", b"abcabc"]
    ranks = BYTES | {token: i for i, token in enumerate(more, 260)}
    bpe = ByteLevelBPE(dict(reversed(ranks.items())))
    rng = random.Random(0)
    strings = ("".join(rng.choices("abc ", k=20)) for _ in range(1000))
    pair_of(bpe).check(strings)
    with pytest.raises(DataError, match="cannot be made by merges"):
        tokenizer.to_tokenizer_json(ByteLevelBPE(BYTES | {b"abc": 260}))


@pytest.fixture(scope="module")
def lucie() -> Tokenizer:
    """A small tokenizer of Lucie's form."""
    return Tokenizer(LucieBPE(json.dumps(lucie_json(), indent=1).encode()))


@pytest.mark.parametrize("kind", ["trained", "lucie"])
def test_a_folder_is_read_by_transformers_and_by_load(tmp_path, request, kind):
    """transformers must not take it for Llama's, and what it writes again is read as well."""
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(kind)
    tokenizer.save_folder(ours, tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    tokens = (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token)
    assert tokens == ("<s>", "</s>", "<unk>", "<pad>")
    theirs.save_pretrained(tmp_path / "again")
    loaded = [tokenizer.load(tmp_path / path) for path in ("new", "new/tokenizer.json", "again")]
    for text in [SAMPLE, "<s> a</s>", *hard_strings(100)]:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        assert [one.encode(text) for one in loaded] == [ids] * 3, repr(text)
    if kind == "lucie":  # written as it was read, and as others write it
        assert loaded[0].bpe.source == ours.bpe.source != loaded[2].bpe.source


@needs_shared
def test_lucies_tokenizer_config_is_the_released_one(tmp_path, lucie):
    tokenizer.save_folder(lucie, tmp_path)
    ours = json.loads((tmp_path / "tokenizer_config.json").read_text())
    released = json.loads((SHARED / "lucie/tokenizer_config.json").read_text())
    assert ours == released | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_what_is_no_vocabulary_or_another_is_refused_in_one_line(tmp_path, trained):
    good = tokenizer.to_tokenizer_json(trained.bpe)
    model = good["model"]

    def changed(**options) -> bytes:
        return json.dumps(good | options).encode()

    contents = [
        (b"<html>", "not a ranks file"),
        (b"Y!Q== 4\n", "not a ranks file"),
        (b"YQ== 4\n", "ids must run from 4 without gaps and cover all bytes"),
        (changed()[:-100], "not the tokenizer.json of a BPE, or cut short"),
        (b'{"model": {"type": "WordLevel"}}', "not the tokenizer.json of a BPE"),
        (changed(normalizer={"type": "NFKC"}), "other rules or merges"),
        (changed(model=model | {"merges": model["merges"][:-1]}), "other rules or merges"),
        (changed(model=model | {"vocab": model["vocab"] | {"☃": 1000}}), "for no byte"),
        (changed(model=model | {"vocab": model["vocab"] | {"aaaa": 1005}}), "without gaps"),
        (changed(model=model | {"byte_fallback": True}), "Lucie's form"),
    ]
    path = tmp_path / "tokenizer.json"
    for content, message in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{path}: .*{message}") as error:
            tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)


# --- training ------------------------------------------------------------------------------------


def test_a_vocabulary_is_the_one_that_the_library_learns(texts, trained):
    """The library learns from the same texts, and encodes others with its own merges."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=996, initial_alphabet=level.alphabet(), show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    assert len(trained.encode_ordinary("1234567890")) == 10
    length_of = {i: len(token) for token, i in trained.bpe.ranks.items()}
    for text in [*texts, *demo.documents("it", "valid"), *demo.documents("es", "valid")]:
        ids, encoding = trained.encode_ordinary(text), theirs.encode(text)
        # The library has one character for each byte.
        assert [length_of[i] for i in ids] == list(map(len, encoding.tokens)), repr(text)
        assert all(i == j + 4 for i, j in zip(ids, encoding.ids) if j >= 256), repr(text)


def test_accents_are_composed_before_counting():
    texts = ["un été à Málaga, où es-tu né ?"] * 5
    apart = [unicodedata.normalize("NFD", text) for text in texts]
    ranks = tokenizer.train(apart, 270)
    assert apart != texts and ranks == tokenizer.train(texts, 270)
    assert "é".encode() in ranks and "e\u0301".encode() not in ranks


def test_what_cannot_be_learnt_is_said_in_one_line(monkeypatch):
    with pytest.raises(DataError, match=r"gives 263 tokens, not 5,000: give more text, .* 263$"):
        tokenizer.train(["abc abc abc"], 5000)
    with pytest.raises(DataError, match="a vocabulary has at least 260 tokens, not 259"):
        tokenizer.train(["abc"], 259)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        tokenizer.train(["abc"], 260)
