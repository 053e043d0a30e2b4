"""The data of the miniature: every question has its fact above it, and nothing else tells it."""

import csv
import json
import re
from random import Random

import pytest

from config.cli import ConfigError
from data import passages
from data.dataset import DataError, Mixture
from data.tokenizer import load

LANGUAGES = passages.LANGUAGES
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def text(language="en", documents=200, seed=0):
    """Documents of random words, which no template contains."""
    rng = Random(f"{language} {seed}")
    word = ["".join(rng.choices("bcdfgklmnprst" + "aeiou" * 3, k=6)) for _ in range(500)]
    return [
        [" ".join(rng.choices(word, k=12)) + "." for _ in range(rng.randint(3, 9))]
        for _ in range(documents)
    ]


def pattern(template):
    """The places and answers of a template's uses."""
    escaped = re.escape(template).replace(r"\{place\}", "(.+)").replace(r"\{answer\}", "(.+)")
    return re.compile(f"^{escaped}$", re.M)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_question_follows_its_fact_and_repeats_its_answer(language):
    asked = set()
    for seed in range(20):
        made = passages.passage(language, text(language), WORDS, 2000, Random(seed))
        for kind in range(2):
            form = passages.FORMS[language]
            facts = {
                found[1]: (found[2], found.start())
                for found in pattern(form["fact"][kind]).finditer(made)
            }
            for found in pattern(form["question"][kind] + " {answer}").finditer(made):
                answer, at = facts[found[1]]
                assert found[2] == answer and at < found.start()
                asked.add((kind, found[1]))
    assert len(asked) > 40 and {kind for kind, _ in asked} == {0, 1}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_needle_test_asks_for_is_never_seen(language):
    """Neither its places nor its codes; and its sentences are those of the passages."""
    form, asked = passages.FORMS[language], passages.needles()[language]
    assert asked["fact"] == form["fact"][0] and asked["question"] == form["question"][0]
    assert len(asked["needles"]) == len(set(asked["needles"].values())) == 8
    assert not set(passages.places(language)[0]) & asked["needles"].keys()
    made = passages.passage(language, text(language), WORDS, 50_000, Random(0))
    for place, code in asked["needles"].items():
        assert place not in made and code not in made


def test_a_place_has_one_fact_in_a_document():
    made = passages.passage("en", text(), WORDS, 30_000, Random(3))
    named = [found[1] for found in pattern(passages.FORMS["en"]["fact"][0]).finditer(made)]
    named += [found[1] for found in pattern(passages.FORMS["en"]["fact"][1]).finditer(made)]
    assert sorted(named) == sorted(passages.places("en")[0])  # all: a document may be longer


def test_an_echo_is_of_few_codes_again_and_again():
    numbers = set()
    for size in (300, 900):
        for seed in range(50):
            made = passages.echo(size, Random(seed))
            assert size <= len(made) < size + 21
            codes = set(made.splitlines())
            assert all(6 <= len(code) <= 20 and " " not in code for code in codes)
            assert len(codes) < len(made.splitlines())
            numbers.add(len(codes))
    assert numbers == {1, 2, 3, 4}


def test_words_are_those_of_the_text_once():
    known = [['The cat, the "cat" and an 8-bit ox.', "(Zebra) naïve!"]]
    assert passages.words_of(known) == ["The", "Zebra", "and", "cat", "naïve", "the"]


@pytest.mark.parametrize("size", [1, 700, 5000])
def test_the_size_of_a_document(size):
    for seed in range(10):
        made = passages.passage("fr", text("fr"), WORDS, size, Random(seed))
        assert size <= len(made) < size + 1500


def test_sentences_are_cut_at_their_ends_and_at_lines():
    one = "This one ends here, surely. And is this the second one? It is not the last one!"
    lines = "- a line without a full stop\n" + "x" * 301 + "\ntoo short"
    assert list(passages.sentences([one + "\n" + lines, "Only one sentence here."])) == [
        [
            "This one ends here, surely.",
            "And is this the second one?",
            "It is not the last one!",
            "- a line without a full stop",
        ]
    ]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(passages, "CHARACTERS", 20_000)
    monkeypatch.setattr(passages, "VALID", 4_000)
    monkeypatch.setattr(passages, "VOCAB_SIZE", 400)


def write(out):
    texts = {language: text(language) for language in LANGUAGES}
    return passages.write(texts, out)


def test_streams_mixtures_and_vocabulary_fit_together(tmp_path, small, capfd):
    tokens = write(tmp_path / "a")
    assert tokens.keys() == {
        f"train.{name}_{kind}" for name in LANGUAGES for kind in ("short", "long", "echo")
    }
    needles = json.loads((tmp_path / "a/needles.json").read_text(encoding="utf-8"))
    assert needles == passages.needles()
    hay = (tmp_path / "a/haystack/es.txt").read_text(encoding="utf-8")
    train = (tmp_path / "a/texts/train.jsonl").read_text(encoding="utf-8")
    there = [[sentence in hay for sentence in document] for document in text("es")]
    assert sum(map(all, there)) == sum(map(any, there)) == 200 // 40  # whole documents
    assert not [s for document in text("es") for s in document if s in hay and s in train]
    ranks = load(tmp_path / "a/ranks.tiktoken")
    assert ranks.vocab_size == 400
    for split in ("train", "valid"):
        for kind in passages.SIZES:
            file = tmp_path / "a" / f"{split}_{kind}.csv"
            rows = list(csv.DictReader(open(file, encoding="utf-8")))
            weights = {row["name"]: float(row["weight"]) for row in rows}
            echoes = sum(w for name, w in weights.items() if name.endswith("_echo"))
            assert echoes / sum(weights.values()) == pytest.approx(0.6 * (split == "train"))
            assert len(set(weights.values())) == 1 + (split == "train")
            mixture = Mixture(str(file), 64, 0, 400, samples=10)
            assert len(ranks.decode(mixture[3].tolist())) > 64
    write(tmp_path / "b")
    for file in sorted((tmp_path / "a").rglob("*.*")):
        if file.suffix in (".bin", ".csv", ".tiktoken", ".jsonl"):
            assert (
                file.read_bytes()
                == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
            )


def test_what_is_held_out_is_of_other_documents(tmp_path, small, capfd):
    write(tmp_path)
    words = {}
    for split in ("train", "valid"):
        lines = (tmp_path / "texts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        said = "\n".join(json.loads(line)["text"] for line in lines)
        words[split] = {sentence for doc in text("de") for sentence in doc if sentence in said}
    assert len(words["valid"]) >= 5 and len(words["train"]) > 20
    assert not words["valid"] & words["train"]


def test_texts_of_ones_own_and_of_the_demo(tmp_path):
    file = tmp_path / "it.jsonl"
    documents = text("it", 90)
    file.write_text("".join(json.dumps({"text": "\n".join(d)}) + "\n" for d in documents))
    found = passages.read([f"it={file}"])
    assert list(found) == list(LANGUAGES)
    assert found["it"] == documents
    assert len(found["en"]) > 500


@pytest.mark.parametrize(
    "given,told",
    [
        (["nl=x"], "nl=x: write LANGUAGE=FILES"),
        (["en"], "en: write LANGUAGE=FILES"),
        (["en="], "en=: write LANGUAGE=FILES"),
    ],
)
def test_bad_arguments(given, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        passages.read(given)


def test_too_little_text_is_an_error(tmp_path):
    (tmp_path / "en.txt").write_text("One sentence of some length. " * 5)
    with pytest.raises(DataError, match="en: 1 documents of three sentences or more"):
        passages.read([f"en={tmp_path / 'en.txt'}"])
