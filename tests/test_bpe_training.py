"""Vocabularies against the tokenizers library, samples against exact counts."""

import csv
import gzip
import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from fractions import Fraction

import pytest
from conftest import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from config.cli import ConfigError
from data import bpe_training, demo_corpus, tokenizer
from data.bpe_training import choose, drawn, find_texts, measure, read_texts, shares_of
from data.dataset import DataError
from data.tokenizer import PATTERN, Tokenizer


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
    with pytest.raises(DataError, match="more text or a smaller vocabulary"):
        bpe_training.train(["abc abc abc"], 5000)


def test_a_token_that_two_merges_give_keeps_its_first_rank():
    ranks = bpe_training.ranks_of([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["abc", "d"]])
    assert ranks[b"abc"] == 4 + 256 + 2
    assert ranks[b"abcd"] == 4 + 256 + 3
    assert sorted(ranks.values()) == list(range(4, 4 + 256 + 4))


def test_accents_are_composed_before_counting():
    pytest.importorskip("tokenizers")
    texts = ["un été à Málaga, où es-tu né ?"] * 5
    apart = [unicodedata.normalize("NFD", text) for text in texts]
    ranks = bpe_training.train(apart, 270)
    assert apart != texts and ranks == bpe_training.train(texts, 270)
    assert "é".encode() in ranks and "e\u0301".encode() not in ranks


# --- texts ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """600 documents in French, 300 in English, 40 files of code, and their mixture."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiourstlnmd", k=rng.randint(1, 6))) for _ in range(200)]
    for language, count in (("fr", 600), ("en", 300)):
        with gzip.open(tmp_path / f"{language}.jsonl.gz", "wt", encoding="utf-8") as f:
            for n in range(count):
                text = f"{language} {n} été " + " ".join(rng.choices(words, k=n * n % 67))
                f.write(json.dumps({"text": text, "body": "other"}) + "\n")
    (tmp_path / "src/deep").mkdir(parents=True)
    for n in range(40):
        (tmp_path / f"src/{'deep/' * (n % 2)}{n}.py").write_text(f"code {n}\n" * (n % 50 + 1))
    (tmp_path / "m.csv").write_text(
        "name,path,weight,language,category\na,a,1,fr,web\nb,b,2,fr,book\nc,c,2,en,web\n"
        "d,d,4,code,code\ne,e,1,fr-en,aligned\n"
    )
    return tmp_path


def test_files_of_a_file_a_folder_and_a_glob(folder):
    code = find_texts(f"{folder}/src/**/*.py")
    assert sorted(path.name for path in code) == sorted(f"{n}.py" for n in range(40))
    assert find_texts(str(code[0])) == code[:1]
    assert [path.name for path in find_texts(str(folder))] == ["en.jsonl.gz", "fr.jsonl.gz"]
    both = find_texts(f"{folder}/*")  # the folder src, in which only .py are, and m.csv besides
    assert [path.name for path in both] == ["en.jsonl.gz", "fr.jsonl.gz", "m.csv"]
    for nothing in ("none.txt", "none/*.py"):
        with pytest.raises(DataError, match=f"^{re.escape(nothing)}: not a folder, a glob nor"):
            find_texts(nothing)
    with pytest.raises(DataError, match=r"src: no texts in it$"):
        find_texts(f"{folder}/src")


def test_texts_in_an_object_store():
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://vocabulary/a.jsonl", "wb") as f:
        f.write(b'{"text": "un"}\n{"text": "deux"}\n')
    texts = {"fr": find_texts("memory://vocabulary")}
    assert list(measure(texts)["fr"]) == [2, 4]
    assert list(drawn(texts, {"fr": bytearray([0, 1])})) == ["deux"]


def test_texts_are_cleaned_and_of_any_file(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(r'{"t": "a\u0000b\ud83d\ude42\ud800 e\u0301"}' + "\n")
    (tmp_path / "b.py").write_bytes(b"caf\xe9 \x0c x")
    files = [tmp_path / "a.jsonl", tmp_path / "b.py"]
    assert list(read_texts(files, "t")) == ["ab\U0001f642\ufffd \u00e9", "caf\ufffd \n x"]
    (tmp_path / "c.py").write_bytes(b"x = 1\0")
    with pytest.raises(DataError, match=r"c\.py: has NUL bytes"):
        list(read_texts([tmp_path / "c.py"]))
    monkeypatch.setattr(bpe_training, "LARGEST", 7)
    assert list(read_texts(files[:1], "t"))
    with pytest.raises(DataError, match=r"b\.py: over 7 bytes"):
        list(read_texts(files, "t"))


def test_bytes_are_counted_document_by_document(folder):
    texts = {"fr": [folder / "fr.jsonl.gz"], "code": find_texts(f"{folder}/src/**/*.py")}
    sizes = measure(texts)
    with gzip.open(folder / "fr.jsonl.gz", "rt", encoding="utf-8") as f:
        expected = [len(json.loads(line)["text"].encode()) for line in f]
    assert list(sizes["fr"]) == expected
    assert sorted(sizes["code"]) == sorted(f.stat().st_size for f in folder.rglob("*.py"))
    assert set(measure(texts | {"code": texts["fr"]}, "body")["code"]) == {5}


# --- the sample ----------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(["fr", "en", "code", "x=y"]),
        st.tuples(
            st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(0.01, 1), st.booleans()
        ),
        min_size=1,
    ),
    st.floats(0.001, 1),
)
def test_shares_are_exact_to_half_a_document(given, part):
    sizes = {name: documents for name, (documents, _, _) in given.items()}
    total_weight = sum(weight for _, weight, _ in given.values())
    shares = {name: weight / total_weight for name, (_, weight, _) in given.items()}
    most = min(sum(sizes[name]) / shares[name] for name in sizes)
    for total in (None, part * most):
        chosen = choose(sizes, shares, total)
        assert chosen == choose(sizes, shares, total) and chosen.keys() == sizes.keys()
        for name, flags in chosen.items():
            assert len(flags) == len(sizes[name]) and set(flags) <= {0, 1}
            taken = [size for size, flag in zip(sizes[name], flags) if flag]
            wanted = shares[name] * (most if total is None else total)
            assert sum(taken) == pytest.approx(wanted, abs=max(sizes[name]) / 2 + 1e-6) or (
                len(taken) == 1 and sum(taken) > wanted  # one at least
            )
    whole = choose(sizes, shares)
    assert any(all(flags) for flags in whole.values())  # of the scarce one, all is needed


def test_the_smallest_share_has_a_document():
    chosen = choose({"a": [100] * 20, "b": [100] * 5}, {"a": 0.99, "b": 0.01}, 1000.0)
    assert sum(chosen["a"]) == 10 and sum(chosen["b"]) == 1  # of 9.9 and 0.1


def test_documents_are_drawn_from_everywhere():
    """Half of 4,000: each quarter gives a fourth of them, within five standard deviations."""
    flags = choose({"a": [7] * 4000}, {"a": 1.0}, 14_000.0)["a"]
    assert sum(flags) == 2000
    for start in range(0, 4000, 1000):
        # hypergeometric: 2,000 * 1/4 * 3/4 * (4,000 - 2,000) / 3,999
        assert abs(sum(flags[start : start + 1000]) - 500) < 5 * (375 * 2000 / 3999) ** 0.5
    assert 900 < sum(a != b for a, b in itertools.pairwise(flags)) < 3100  # and not in runs
    other = choose({"b": [7] * 4000}, {"b": 1.0}, 14_000.0)["b"]
    assert 900 < sum(a and b for a, b in zip(flags, other)) < 1100


def test_a_text_too_small_for_its_share_says_how_large_a_sample_can_be():
    sizes = {"fr": [10_000] * 100, "en": [1000] * 123}
    with pytest.raises(DataError) as error:
        choose(sizes, {"fr": 0.75, "en": 0.25}, 2e6)
    assert str(error.value) == (
        "en: 0.123 MB of text, but 25.00% of 2.000 MB are 0.500 MB: more text, or "
        "--megabytes 0.492 at most"
    )
    chosen = choose(sizes, {"fr": 0.75, "en": 0.25}, 492_000.0)  # what it says is so
    assert all(chosen["en"]) and sum(chosen["fr"]) == 37


def test_what_was_chosen_is_read(folder):
    texts = {"fr": [folder / "fr.jsonl.gz"], "code": find_texts(f"{folder}/src/**/*.py")}
    everything = {name: list(read_texts(files)) for name, files in texts.items()}
    flags = {name: bytearray(n % 3 == 1 for n in range(len(everything[name]))) for name in texts}
    expected = [text for name in texts for text in everything[name][1::3]]
    assert list(drawn(texts, flags)) == expected


@needs_shared
def test_shares_are_those_of_the_published_mixture():
    """Languages given, in exact fractions of the published tokens and epochs."""
    from data import mixture

    seen = Counter()
    with open(SHARED / "lucie/mixture_pretraining.csv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            seen[row["language"]] += int(row["tokens"]) * Fraction(row["epochs"])
    table = mixture.shares(mixture.read("data/mixtures/pretraining.csv"), "language")
    weights = {language: after for language, (_, after) in table.items()}
    names = ["fr", "en", "de", "es", "it", "code"]
    shares = shares_of(weights, names, "m.csv", partial=True)
    total = sum(seen[name] for name in names)
    assert shares.keys() == set(names) and sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert all(shares[k] == pytest.approx(float(seen[k] / total), rel=1e-6) for k in names)
    with pytest.raises(ConfigError, match=r"^m.csv: no text for parallel \(2\.5%\); --partial"):
        shares_of(weights, names, "m.csv")


# --- the command ---------------------------------------------------------------------------------


def run(capsys, *args):
    """Lines of stdout."""
    bpe_training.main(list(map(str, args)))
    return capsys.readouterr().out.splitlines()


SHARES = ("--shares", "fr=3", "en=1", "code=1")
MIXTURE = ("--mixture", "{0}/m.csv")


@pytest.mark.parametrize(
    "options, fifths",  # of the sample
    [
        (("--mixture", "{0}/m.csv", "--by=language", "--partial"), {"fr": 3, "en": 2, "code": 4}),
        (SHARES, {"fr": 3, "en": 1, "code": 1}),
        ((*SHARES, "--megabytes=0.01"), {"fr": 3, "en": 1, "code": 1}),
    ],
)
def test_the_vocabulary_is_that_of_a_sample_by_the_shares(
    folder, capsys, monkeypatch, options, fifths
):
    """Every document begins with its text's name, so the sample is counted from without."""
    pytest.importorskip("tokenizers")
    sample, train = [], bpe_training.train

    def listening(texts, vocab_size, count):
        sample.extend(texts)
        assert count == len(sample)
        return train(sample, vocab_size)

    monkeypatch.setattr(bpe_training, "train", listening)
    texts = [f"{name}={folder}/{name}.jsonl.gz" for name in ("fr", "en")]
    lines = run(
        capsys,
        *(*texts, f"code={folder}/src/*.py", f"code={folder}/src/deep/*.py", "--vocab_size=280"),
        *("--out", folder / "new/r.tiktoken", "--folder", folder / "json"),
        *(option.format(folder) for option in options),
    )
    assert lines[-2:] == [
        f"{folder}/new/r.tiktoken: 280 tokens",
        f"{folder}/json: tokenizer.json, tokenizer_config.json",
    ]
    assert len(set(sample)) == len(sample)  # none twice
    seen = Counter()
    for text in sample:
        seen[text.split()[0]] += len(text.encode())
    for name, weight in fifths.items():
        wanted = seen.total() * weight / sum(fifths.values())
        assert seen[name] == pytest.approx(wanted, abs=400)  # a document has 400 bytes at most
    if "--megabytes=0.01" in options:
        assert seen.total() == pytest.approx(10_000, abs=600)
    else:
        assert seen.total() > 8_000 and "code" in {x.split()[0] for x in lines if " 40 " in x}
    printed = {line.split()[0]: line.split() for line in lines[1:4]}
    for name in fifths:
        assert printed[name][3] == f"{100 * seen[name] / seen.total():.2f}"
        assert printed[name][5] == f"{seen[name] / 1e6:.3f}"
        documents = sum(text.split()[0] == name for text in sample)
        assert printed[name][7:] == [str(documents), {"fr": "600", "en": "300", "code": "40"}[name]]
    assert tokenizer.load(folder / "new/r.tiktoken").ranks == tokenizer.load(folder / "json").ranks
    assert_same_as_library(sample, sample, tokenizer.load(folder / "new/r.tiktoken"), 280)


def test_without_shares_all_is_read_and_gives_the_same_file_each_time(folder, capsys):
    pytest.importorskip("tokenizers")
    args = (f"{folder}/*.gz", f"{folder}/src/**/*.py", "--vocab_size=290", "--out")
    for name in ("a", "b"):
        lines = run(capsys, *args, folder / name)
        assert lines[1].split()[-2:] == ["940", "940"]
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    texts = [text for files in args[:2] for text in read_texts(find_texts(files))]
    assert_same_as_library(texts, texts, tokenizer.load(folder / "a"), 290)


@pytest.mark.parametrize(
    "args, said",
    [
        (("fr={0}/fr.jsonl.gz",), "a name needs --mixture or --shares"),
        (("{0}/fr.jsonl.gz", *SHARES), "a text is NAME=PATH"),
        (("fr={0}/fr.jsonl.gz", *SHARES), "--shares: no text for code (20.0%), en (20.0%); --part"),
        (("nl={0}/fr.jsonl.gz", *SHARES), "nl: has no share in --shares, which has fr, en, code"),
        (("fr={0}/fr.jsonl.gz", *MIXTURE), "m.csv, which has d, b, c, a, e"),
        (("{0}/fr.jsonl.gz", "--shares", "fr=x"), "fr=x: write --shares NAME=NUMBER"),
        (("{0}/fr.jsonl.gz", "--shares", "fr=-1"), "fr=-1: write --shares NAME=NUMBER"),
        (("{0}/fr.jsonl.gz", "--shares", "fr=1", "fr=2"), "fr=2: write --shares NAME=NUMBER"),
        (("fr={0}/fr.jsonl.gz", "--mixture", "{0}/none.csv"), "none.csv: No such file"),
        (("fr=none.txt", *SHARES), "none.txt: not a folder"),
        (("{0}/empty.txt",), "no text in {0}/empty.txt"),
        (("{0}/cut.jsonl.gz",), "cut.jsonl.gz, line"),
        (("{0}/fr.jsonl.gz", "--text_field=x"), "fr.jsonl.gz, line 1: no field 'x'"),
        (("{0}/fr.jsonl.gz", "--megabytes=1"), "more text, or --megabytes 0.093 at most"),
        (("{0}/fr.jsonl.gz", "--megabytes=-1"), "--megabytes must be over 0"),
        (("{0}/fr.jsonl.gz", "--vocab_size=65024"), "more text or a smaller vocabulary"),
        (("{0}/fr.jsonl.gz", "--vocab_size=-5"), "at least 260 tokens, not -5"),
        (("{0}/fr.jsonl.gz", "--out={0}/src"), "src: is a folder"),
        (("{0}/fr.jsonl.gz", "--out=/dev/null/x"), "/dev/null"),
    ],
)
def test_what_cannot_be_learnt_says_so_in_one_line(folder, args, said):
    pytest.importorskip("tokenizers")
    (folder / "empty.txt").write_text("")
    (folder / "cut.jsonl.gz").write_bytes((folder / "fr.jsonl.gz").read_bytes()[:-500])
    with pytest.raises((ConfigError, DataError, OSError)) as error:
        bpe_training.main(["--out", f"{folder}/r", *(arg.format(folder) for arg in args)])
    assert said.format(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "r").exists() and not list(folder.glob("*.tmp"))
