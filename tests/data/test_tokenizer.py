"""Our own vocabularies: their training, their ids, their texts and their files.

The `tokenizers` and `transformers` libraries read the same vocabulary as a tokenizer.json and must
give the same ids and texts.
"""

import base64
import gzip
import json
import random
import sys
import unicodedata

import pytest
from conftest import SHARED, needs_shared
from hypothesis import example, given
from hypothesis import strategies as st
from text_cases import code_points, hard_strings, lucie_json

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


@pytest.fixture(scope="module")
def exported(trained):
    """The `tokenizers` library with the tokenizer.json of `trained`."""
    return library(trained.bpe)


def library(bpe: ByteLevelBPE):
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_tokenizer_json(bpe)))


def check_ids(ours, theirs, texts):
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip), repr(text)


# --- ids and texts -------------------------------------------------------------------------------


@given(st.text(st.characters()))  # lone surrogates among them
@example("\ud83d\ude42 a\ud800b\udc00\ud800")
@example(SAMPLE)
@example("a" * 10_000)
def test_any_text_becomes_its_bytes_and_comes_back(text):
    """A pair of surrogates is one character, as in JSON, and a lone one is U+FFFD."""
    ours = Tokenizer(ByteLevelBPE(BYTES))
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    composed = tokenizers.normalizers.NFC().normalize_str(valid)
    assert ours.encode_ordinary(text) == [b + 4 for b in composed.encode()]
    assert ours.decode(ours.encode_ordinary(text)) == composed


def test_special_tokens_are_read_from_prompts_never_from_documents():
    ours = Tokenizer(ByteLevelBPE(BYTES))

    def of_bytes(text):
        return [b + 4 for b in text.encode()]

    prompt = [BOS, *of_bytes("a"), BOS, *of_bytes("<"), EOS, 2, 3, *of_bytes("<S>")]
    assert ours.encode("a<s><</s><unk><pad><S>") == prompt
    for text in ("x </s> y <s>", "", "\ud800"):
        document = ours.encode_document(text)
        assert document.dtype == "uint16"
        assert document.tolist() == [BOS, *of_bytes(text.replace("\ud800", "\ufffd")), EOS]


def test_the_library_gives_our_ids_for_texts(texts, trained, exported):
    check_ids(trained, exported, [*texts, SAMPLE, "", "<s> a</s>", "x" * 10_000])
    apart = unicodedata.normalize("NFD", SAMPLE)
    assert apart != SAMPLE and trained.encode(apart) == trained.encode(SAMPLE)


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_library_gives_our_ids_for_hard_strings(trained, exported, count):
    check_ids(trained, exported, hard_strings(count))


@pytest.mark.parametrize("step", [64, pytest.param(1, marks=pytest.mark.slow)])
def test_the_library_gives_our_ids_for_every_code_point(trained, exported, step):
    characters = code_points()[::step]
    for start in range(0, len(characters), 512):
        for form in ("a{}a", " {}"):
            text = " ".join(map(form.format, characters[start : start + 512]))
            assert trained.encode(text) == exported.encode(text).ids, hex(start)


def test_a_stream_continues_what_was_shown(trained, exported):
    rng = random.Random(1)
    bounds = (4, 260, trained.vocab_size)
    lines = [
        [rng.randrange(rng.choice(bounds)) for _ in range(rng.randrange(12))] for _ in range(1500)
    ]
    lines += [trained.encode(text) for text in hard_strings(100, seed=2)]
    lines += [[b + 4 for b in "é🙂\ufffd\ufffdΩ".encode()], [4 + 0xEF, 4 + 0xBF, 4 + 0xBD]]
    continued = 0
    for ids in lines:
        assert trained.decode(ids, False) == exported.decode(ids, False), ids
        text = exported.decode(ids)
        assert trained.decode(ids) == text, ids
        for cut in range(len(ids) + 1):
            before = exported.decode(ids[:cut])
            if text.startswith(before):
                continued += 1
                pieces = list(trained.stream(iter(ids[cut:]), after=ids[:cut]))
                assert before + "".join(pieces) == text and "" not in pieces, (ids, cut)
    assert continued > 5000


def test_a_stream_shows_every_character_at_once_and_never_half_of_one():
    ours = Tokenizer(ByteLevelBPE(BYTES))
    assert list(ours.stream(ours.encode("aé🙂"))) == ["a", "é", "🙂"]
    emoji = ours.encode_ordinary("🙂")
    assert list(ours.stream(emoji[2:], after=emoji[:2])) == ["🙂"]


# --- files ---------------------------------------------------------------------------------------


def test_a_ranks_file_comes_back(tmp_path, trained):
    path = tmp_path / "new" / "r.tiktoken"
    tokenizer.save(trained.bpe.ranks, path)
    tokens = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    assert {token: i for i, token in enumerate(tokens, 4)} == trained.bpe.ranks
    assert tokenizer.load(path).bpe.ranks == trained.bpe.ranks
    assert [file.name for file in path.parent.iterdir()] == ["r.tiktoken"]


def test_the_vocabulary_of_a_model_is_that_of_its_tokenizer(tmp_path):
    path = tmp_path / "r.tiktoken"
    tokenizer.save(BYTES, path)
    assert tokenizer.load(path, 260).vocab_size == 260
    message = "r.tiktoken has 260 tokens, but the model's vocabulary has 65,024$"
    with pytest.raises(DataError, match=message):
        tokenizer.load(path, 65_024)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"<html>", "not a ranks file"),
        (b"YQ== x\n", "not a ranks file"),
        (b"Y!Q== 4\n", "not a ranks file"),
        (b"YQ== 4\n", "ids must run from 4 without gaps and cover all bytes"),
        (b"\xff\xfe\x00", "not a ranks file"),
    ],
)
def test_a_damaged_ranks_file_is_named(tmp_path, content, message):
    path = tmp_path / "r.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        tokenizer.load(path)


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
    check_ids(Tokenizer(bpe), library(bpe), strings)
    with pytest.raises(DataError, match="cannot be made by merges"):
        tokenizer.to_tokenizer_json(ByteLevelBPE(BYTES | {b"abc": 260}))


def test_a_folder_is_read_by_transformers_and_by_load(tmp_path, texts, trained):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_folder(trained, tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in [*texts, SAMPLE, "<s> a</s>", *hard_strings(100)]:
        ids = trained.encode(text)
        assert theirs(text).input_ids == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == trained.decode(ids)
    tokens = (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token)
    assert tokens == ("<s>", "</s>", "<unk>", "<pad>")
    # What transformers writes of it is read as well.
    theirs.save_pretrained(tmp_path / "again")
    for path in ("new", "new/tokenizer.json", "again"):
        assert tokenizer.load(tmp_path / path).bpe.ranks == trained.bpe.ranks
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def lucie(tmp_path_factory):
    """A small tokenizer of Lucie's form, and the folder that it was saved to."""
    ours = Tokenizer(LucieBPE(json.dumps(lucie_json(), indent=1).encode()))
    folder = tmp_path_factory.mktemp("lucie")
    tokenizer.save_folder(ours, folder)
    return ours, folder


def test_lucies_folder_is_read_by_transformers_and_by_load(lucie):
    """It is written again byte for byte, and transformers does not take it for Llama's."""
    transformers = pytest.importorskip("transformers")
    ours, folder = lucie
    assert (folder / "tokenizer.json").read_bytes() == ours.bpe.source
    assert tokenizer.load(folder).bpe.source == ours.bpe.source
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [SAMPLE, "<s> a</s>", *hard_strings(100)]:
        assert theirs(text).input_ids == ours.encode(text), repr(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 3)


@needs_shared
def test_lucies_tokenizer_config_is_the_released_one(lucie):
    ours = json.loads((lucie[1] / "tokenizer_config.json").read_text())
    released = json.loads((SHARED / "lucie/tokenizer_config.json").read_text())
    assert ours == released | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_another_tokenizer_json_is_refused_in_one_line(tmp_path, trained):
    good = tokenizer.to_tokenizer_json(trained.bpe)
    model = good["model"]

    def changed(**options) -> bytes:
        return json.dumps(good | options).encode()

    contents = {
        "cut short": changed()[:-100],
        "not the tokenizer.json of a BPE": json.dumps({"model": {"type": "WordLevel"}}).encode(),
        "other rules": changed(normalizer={"type": "NFKC"}),
        "other rules or": changed(pre_tokenizer=None),
        "other rules or merges": changed(model=model | {"merges": model["merges"][:-1]}),
        "but not one": changed(model=model | {"vocab": model["vocab"] | {"☃": 1000}}),
        "without gaps": changed(model=model | {"vocab": model["vocab"] | {"aaaa": 1005}}),
        "Lucie's form": changed(model=model | {"byte_fallback": True}),
    }
    path = tmp_path / "tokenizer.json"
    for message, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{path}: .*{message}") as error:
            tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)


# --- training ------------------------------------------------------------------------------------


def check_training(training, texts, ours, size):
    """The `tokenizers` library learns from the same texts, and encodes with its own merges."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 4, initial_alphabet=level.alphabet(), show_progress=False
    )
    theirs.train_from_iterator(training, trainer)
    length_of = {i: len(token) for token, i in ours.bpe.ranks.items()}
    for text in texts:
        ids, encoding = ours.encode_ordinary(text), theirs.encode(text)
        # The library has one character for each byte.
        assert [length_of[i] for i in ids] == list(map(len, encoding.tokens)), repr(text)
        assert all(i == j + 4 for i, j in zip(ids, encoding.ids) if j >= 256), repr(text)


def test_a_vocabulary_is_the_one_that_the_library_learns(texts, trained):
    check_training(texts, texts, trained, 1000)


@needs_shared
@pytest.mark.slow
def test_a_vocabulary_of_real_text_is_the_one_that_the_library_learns():
    def read(language):
        with gzip.open(SHARED / f"corpus/{language}.jsonl.gz", "rt", encoding="utf-8") as f:
            documents = [json.loads(line)["text"] for line in f][:300]
        return [tokenizers.normalizers.NFC().normalize_str(text) for text in documents]

    training = read("fr") + read("de")
    ours = Tokenizer(ByteLevelBPE(tokenizer.train(training, 3000)))
    check_training(training, read("it") + read("es"), ours, 3000)


def test_ids_fill_the_vocabulary_and_tokens_keep_within_a_word(trained):
    assert trained.vocab_size == 1000
    ranks = trained.bpe.ranks
    assert sorted(ranks.values()) == list(range(4, 1000))
    assert all(ranks[bytes([b])] == b + 4 for b in range(256))
    for token in (token.decode("utf-8", "replace") for token in ranks):
        assert len(token) == 1 or not any(map(str.isdigit, token)), token
        assert token.isspace() or " " not in token[1:], token
    assert len(trained.encode_ordinary("1234567890")) == 10


def test_accents_are_composed_before_counting():
    texts = ["un été à Málaga, où es-tu né ?"] * 5
    apart = [unicodedata.normalize("NFD", text) for text in texts]
    ranks = tokenizer.train(apart, 270)
    assert apart != texts and ranks == tokenizer.train(texts, 270)
    assert "é".encode() in ranks and "e\u0301".encode() not in ranks


def test_what_cannot_be_learnt_is_said_in_one_line(monkeypatch):
    with pytest.raises(DataError, match="the text gives 263 tokens, not 5,000: more text"):
        tokenizer.train(["abc abc abc"], 5000)
    with pytest.raises(DataError, match="a vocabulary has at least 260 tokens, not 259"):
        tokenizer.train(["abc"], 259)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        tokenizer.train(["abc"], 260)
