import json
import random
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from conftest import SHARED, launch, needs_shared
from hypothesis import given
from hypothesis import strategies as st
from text_cases import code_points, hard_strings, lucie_json

from data import bpe_training, demo_corpus, tokenizer, tokenizer_base
from data.token_stream import DataError
from data.tokenizer import BOS, EOS, LucieTokenizer, Tokenizer

SAMPLE = "L'été, à 18h30 :  «Où est-ce ?»\n\n    def f(x):\n\treturn x * 42\r\n🙂 ﬁn \u00a0 e\u0301"


@pytest.fixture(scope="module")
def texts():
    return [t for source in ("fr", "de", "code") for t in demo_corpus.documents(source, "valid")]


@pytest.fixture(scope="module")
def trained(texts) -> Tokenizer:
    pytest.importorskip("tokenizers")
    return Tokenizer(bpe_training.train(texts, 1000))


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


def test_special_tokens_are_read_from_prompts_never_from_documents(trained):
    assert trained.encode("<s>") == [BOS, BOS]
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
    ranks = bpe_training.train(texts, 1000)
    tokenizer.save(ranks, tmp_path / "new" / "r.tiktoken")
    loaded = tokenizer.load(tmp_path / "new" / "r.tiktoken")
    assert loaded.encode(SAMPLE) == trained.encode(SAMPLE)
    assert loaded.vocab_size == 1000


def test_the_vocabulary_of_a_model_is_that_of_its_tokenizer(tmp_path):
    path = tmp_path / "r.tiktoken"
    tokenizer.save({bytes([b]): b + 4 for b in range(256)}, path)
    assert tokenizer.load(path, 260).vocab_size == 260
    message = "r.tiktoken has 260 tokens, but the model's vocabulary has 65,024$"
    with pytest.raises(DataError, match=message):
        tokenizer.load(path, 65_024)
    with pytest.raises(DataError, match=r"^no tokenizer is known"):
        tokenizer.load("", 260)


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
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        tokenizer.load(path)


@pytest.fixture(scope="module")
def exported(trained):
    """The tokenizers library with our tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_tokenizer_json(trained)))


def check_ids(ours, theirs, texts):
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip), repr(text)


def test_the_library_gives_our_ids_with_our_tokenizer_json(texts, trained, exported):
    check_ids(trained, exported, [*texts, SAMPLE, "", "<s> a</s>", "x" * 10_000])
    check_ids(trained, exported, hard_strings(1000))


@pytest.mark.parametrize("step", [64, pytest.param(1, marks=pytest.mark.slow)])
def test_the_library_gives_our_ids_for_every_code_point(trained, exported, step):
    characters = code_points()[::step]
    for start in range(0, len(characters), 512):
        for form in ("a{}a", " {}"):
            text = " ".join(map(form.format, characters[start : start + 512]))
            assert trained.encode(text) == exported.encode(text).ids, hex(start)


@pytest.mark.slow
def test_the_library_gives_our_ids_for_many_hard_strings(trained, exported):
    check_ids(trained, exported, hard_strings(100_000, seed=1))


def random_ids(rng, size):
    return [rng.randrange(rng.choice((4, 260, size))) for _ in range(rng.randrange(12))]


def test_random_ids_decode_as_in_the_library(trained, exported):
    rng = random.Random(0)
    for _ in range(3000):
        ids = random_ids(rng, trained.vocab_size)
        for skip in (True, False):
            assert trained.decode(ids, skip) == exported.decode(ids, skip), ids


def test_a_stream_continues_what_was_shown(trained, exported):
    rng = random.Random(1)
    lines = [random_ids(rng, trained.vocab_size) for _ in range(1500)]
    lines += [trained.encode(text) for text in hard_strings(100, seed=2)]
    lines += [[b + 4 for b in "é🙂\ufffd\ufffdΩ".encode()], [4 + 0xEF, 4 + 0xBF, 4 + 0xBD]]
    continued = 0
    for ids in lines:
        text = exported.decode(ids)
        assert "".join(trained.stream(iter(ids))) == text
        for cut in range(len(ids) + 1):
            before = exported.decode(ids[:cut])
            if text.startswith(before):
                continued += 1
                pieces = list(trained.stream(iter(ids[cut:]), after=ids[:cut]))
                assert before + "".join(pieces) == text and "" not in pieces, (ids, cut)
    assert continued > 5000


def test_a_stream_is_prompt_and_never_shows_half_a_character():
    ours = Tokenizer({bytes([b]): b + 4 for b in range(256)})
    pieces = ours.stream(iter(ours.encode("aé🙂")))
    assert list(pieces) == ["a", "é", "🙂"]
    emoji = [b + 4 for b in "🙂".encode()]
    assert list(ours.stream(emoji[2:], after=emoji[:2])) == ["🙂"]


def test_merges_are_found_whatever_the_order_of_ranks(trained):
    """A token may outrank its parts; and one that no merge makes has no place in the file."""
    tokenizers = pytest.importorskip("tokenizers")
    single = [bytes([b]) for b in range(256)]
    ranks = {t: i for i, t in enumerate([*single, b"abc", b"bc", b"ab", b" a", b"abcabc"], start=4)}
    ours = Tokenizer(dict(reversed(ranks.items())))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_tokenizer_json(ours)))
    rng = random.Random(0)
    check_ids(ours, theirs, ("".join(rng.choices("abc ", k=20)) for _ in range(1000)))
    unmade = Tokenizer({t: i for i, t in enumerate([*single, b"abc"], start=4)})
    with pytest.raises(DataError, match="cannot be made by merges"):
        tokenizer.to_tokenizer_json(unmade)


def test_a_folder_is_read_by_transformers_and_by_load(tmp_path, texts, trained):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_folder(trained, tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in [*texts, SAMPLE, "<s> a</s>", *hard_strings(100)]:
        assert theirs(text).input_ids == trained.encode(text), repr(text)
        assert theirs.decode(trained.encode(text), skip_special_tokens=True) == trained.decode(
            trained.encode(text)
        )
    tokens = (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token)
    assert tokens == ("<s>", "</s>", "<unk>", "<pad>")
    assert tokenizer.load(tmp_path / "new").ranks == trained.ranks
    # What transformers writes of it is read as well.
    theirs.save_pretrained(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again").ranks == trained.ranks
    file = tmp_path / "new" / "tokenizer.json"
    assert tokenizer.load(file).ranks == trained.ranks
    assert not list(tmp_path.rglob("*.tmp"))


def test_lucies_folder_is_read_by_transformers_and_by_load(tmp_path):
    """Written again byte for byte, and not taken for Llama's by transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    content = json.dumps(lucie_json(), indent=1).encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    ours = tokenizer.load(tmp_path)
    assert isinstance(ours, LucieTokenizer)
    tokenizer.save_folder(ours, tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == content
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in [SAMPLE, "<s> a</s>", *hard_strings(100)]:
        assert theirs(text).input_ids == ours.encode(text), repr(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 3)


@needs_shared
def test_lucies_tokenizer_config_is_the_released_one():
    ours = tokenizer.tokenizer_config(tokenizer.load(SHARED / "lucie"))
    released = json.loads((SHARED / "lucie/tokenizer_config.json").read_text())
    assert ours == released | {"tokenizer_class": "PreTrainedTokenizerFast"}


def changed(written: dict, **options) -> bytes:
    return json.dumps(written | options).encode()


def test_another_tokenizer_json_is_refused_in_one_line(tmp_path, trained):
    good = tokenizer.to_tokenizer_json(trained)
    model = good["model"]
    contents = {
        "cut short": json.dumps(good).encode()[:-100],
        "not the tokenizer.json of a BPE": json.dumps({"model": {"type": "WordLevel"}}).encode(),
        "other rules": changed(good, normalizer={"type": "NFKC"}),
        "other rules or": changed(good, pre_tokenizer=None),
        "other rules or merges": changed(good, model=model | {"merges": model["merges"][:-1]}),
        "but not one": changed(good, model=model | {"vocab": model["vocab"] | {"☃": 1000}}),
        "without gaps": changed(good, model=model | {"vocab": model["vocab"] | {"aaaa": 1005}}),
        "Lucie's form": changed(good, model=model | {"byte_fallback": True}),
    }
    path = tmp_path / "tokenizer.json"
    for message, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}: .*{message}") as error:
            tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file or directory$"):
        (tmp_path / "empty").mkdir()
        tokenizer.load(tmp_path / "empty")


def test_processes_give_the_same_in_order(trained):
    texts = [text * (n % 100) for n, text in enumerate(hard_strings(3000))]
    arrays = list(trained.encode_batch(texts, processes=2))
    assert [a.tolist() for a in arrays] == [trained.encode_document(text) for text in texts]
    assert {a.dtype.name for a in arrays} == {"uint16"}
    assert list(trained.encode_batch([], processes=2)) == []


def test_reading_ahead_is_bounded():
    """A slow consumer holds the reader back: no more than `ahead` items are in flight."""

    class Now:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

    class Pool:
        def submit(self, function, item):
            return Now(function(item))

    read = []
    items = (read.append(n) or n for n in range(1000))
    results = tokenizer_base._ordered_map(Pool(), lambda n: 2 * n, items, ahead=8)
    assert next(results) == 0
    assert len(read) == 8
    assert list(results) == [2 * n for n in range(1, 1000)]


def test_batches_are_bounded_by_their_characters():
    texts = ["x" * 1000] * 1000 + [""] * 600_000 + ["y" * 10**6]
    batches = list(tokenizer_base._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    assert max(sum(map(len, batch[:-1])) + len(batch) for batch in batches) <= 2**18 + 1001


def test_the_commands_train_and_compare(tmp_path, texts):
    pytest.importorskip("tokenizers")

    command = partial(launch, "data.tokenizer")
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    ranks = tmp_path / "new/r.tiktoken"
    done = command("train", tmp_path, "--vocab_size", 500, "--out", ranks)
    assert done.returncode == 0, done.stderr
    assert tokenizer.load(ranks).vocab_size == 500
    done = command("compare", "--texts", f"t={tmp_path}", "--tokenizers", f"mine={ranks}")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    ours = tokenizer.load(ranks)
    tokens = sum(len(ours.encode_ordinary(text)) for text in texts)
    assert ["mine", f"{sum(len(text.encode()) for text in texts) / tokens:.3f}"] in lines
    for args in (["train", "--out", ranks], ["compare"], ["learn"], []):
        assert command(*args).returncode == 2
    shown = command("train", "-h").stdout
    assert "--mixture" in shown and "usage: data.tokenizer train" in shown
