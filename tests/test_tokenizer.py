import gzip
import json
import unicodedata
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from data import demo_corpus, tokenizer
from data.tokenizer import BOS, EOS, PATTERN, Tokenizer, TokenizerError

SAMPLE = "L'été, à 18h30 :  «Où est-ce ?»\n\n    def f(x):\n\treturn x * 42\r\n🙂 ﬁn \u00a0 e\u0301"


@pytest.fixture(scope="module")
def texts():
    return [t for source in ("fr", "de", "code") for t in demo_corpus.documents(source, "valid")]


@pytest.fixture(scope="module")
def trained(texts) -> Tokenizer:
    pytest.importorskip("tokenizers")
    return Tokenizer(tokenizer.train(texts, 1000))


def test_ids_equal_those_of_the_tokenizers_library(texts, trained):
    """The oracle trains on the same text with its own code and encodes with its own merges."""
    assert_same_as_library(texts, texts, trained, 1000)


@needs_shared
def test_ids_equal_the_library_on_real_text():
    def read(language):
        with gzip.open(SHARED / f"corpus/{language}.jsonl.gz", "rt", encoding="utf-8") as f:
            return [json.loads(line)["text"] for line in f][:300]

    training = read("fr") + read("de")
    ranks = tokenizer.train(training, 3000)
    assert_same_as_library(training, read("it") + read("es"), Tokenizer(ranks), 3000)


def assert_same_as_library(training, texts, ours, size):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 4, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(training, trainer)
    letters = {char: bytes([byte]) for byte, char in tokenizer.byte_characters().items()}
    assert set(letters) == set(alphabet)

    def as_bytes(token):
        return b"".join(letters[c] for c in token)

    for text in texts:
        composed = unicodedata.normalize("NFC", text)
        pieces = [as_bytes(token) for token in theirs.encode(composed).tokens]
        assert [ours.decode_bytes([i]) for i in ours.encode_ordinary(text)] == pieces


def test_the_demo_prompt_and_odd_texts_come_back(trained):
    for text in (SAMPLE, "", " ", "\n", "Paris", "a" * 10_000, "<s></s>"):
        composed = unicodedata.normalize("NFC", text)
        assert trained.decode(trained.encode_ordinary(text)) == composed


@given(st.text())
def test_any_text_comes_back(text):
    ours = Tokenizer({bytes([b]): b + 4 for b in range(256)})
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ours.decode(ours.encode_ordinary(text)) == unicodedata.normalize("NFC", valid)


def test_a_text_has_the_same_ids_however_its_accents_are_written(trained):
    composed, decomposed = "été à Málaga", unicodedata.normalize("NFD", "été à Málaga")
    assert composed != decomposed
    assert trained.encode(composed) == trained.encode(decomposed)


def test_special_tokens_are_added_never_read(trained):
    assert trained.encode("<s>")[0] == BOS and len(trained.encode("<s>")) > 2
    document = trained.encode_document("x </s> y")
    assert (document[0], document[-1]) == (BOS, EOS)
    assert not {BOS, EOS} & set(document[1:-1])
    assert trained.decode(document) == "x </s> y"


def test_every_digit_is_a_token(trained):
    assert len(trained.encode_ordinary("1234567890")) == 10
    tokens = [trained.decode([i]) for i in range(4, 1000)]
    digits = [token for token in tokens if sum(map(str.isdigit, token)) > 1]
    assert not digits


def test_ids_fill_the_vocabulary_from_four(trained):
    assert trained.vocab_size == 1000
    tokens = {trained.decode_bytes([i]) for i in range(4, 1000)}
    assert len(tokens) == 996


def test_a_ranks_file_comes_back(tmp_path, texts, trained):
    ranks = tokenizer.train(texts, 1000)
    tokenizer.save(ranks, tmp_path / "new" / "r.tiktoken")
    loaded = tokenizer.load(tmp_path / "new" / "r.tiktoken")
    assert loaded.encode(SAMPLE) == trained.encode(SAMPLE)
    assert loaded.vocab_size == 1000


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "No such file"),
        (b"<html>", "not a ranks file"),
        (b"YQ== x\n", "not a ranks file"),
        (b"YQ== 4\n", "cover all bytes"),
    ],
)
def test_bad_ranks_files_are_named(tmp_path: Path, content, message):
    path = tmp_path / "r.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=f"{path}.*{message}"):
        tokenizer.load(path)


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(TokenizerError, match="more text or a smaller vocabulary"):
        tokenizer.train(["abc abc abc"], 5000)


def test_a_token_that_two_merges_give_keeps_its_first_rank():
    ranks = tokenizer.ranks_of([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["abc", "d"]])
    assert ranks[b"abc"] == 4 + 256 + 2
    assert ranks[b"abcd"] == 4 + 256 + 3
    assert sorted(ranks.values()) == list(range(4, 4 + 256 + 4))
