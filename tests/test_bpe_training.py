import gzip
import json
import unicodedata

import pytest
from conftest import SHARED, needs_shared

from data import bpe_training, demo_corpus, tokenizer
from data.tokenizer import PATTERN, Tokenizer, TokenizerError


def test_ids_equal_those_of_the_tokenizers_library():
    """The oracle trains on the same text with its own code and encodes with its own merges."""
    pytest.importorskip("tokenizers")
    texts = [t for source in ("fr", "de", "code") for t in demo_corpus.documents(source, "valid")]
    assert_same_as_library(texts, texts, Tokenizer(bpe_training.train(texts, 1000)), 1000)


@needs_shared
def test_ids_equal_the_library_on_real_text():
    def read(language):
        with gzip.open(SHARED / f"corpus/{language}.jsonl.gz", "rt", encoding="utf-8") as f:
            return [json.loads(line)["text"] for line in f][:300]

    training = read("fr") + read("de")
    ranks = bpe_training.train(training, 3000)
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


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(TokenizerError, match="more text or a smaller vocabulary"):
        bpe_training.train(["abc abc abc"], 5000)


def test_a_token_that_two_merges_give_keeps_its_first_rank():
    ranks = bpe_training.ranks_of([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["abc", "d"]])
    assert ranks[b"abc"] == 4 + 256 + 2
    assert ranks[b"abcd"] == 4 + 256 + 3
    assert sorted(ranks.values()) == list(range(4, 4 + 256 + 4))
