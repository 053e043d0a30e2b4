"""The demo's data: true facts, held-out questions that stay out, and clean, repeatable text."""

import hashlib
import re
import unicodedata
from functools import cache

import pytest

from data import demo, tokenizer
from data.dataset import BOS, EOS, Mixture

WRITTEN = ("fr", "de", "es", "it", "facts", "parallel", "arithmetic")  # wholly by data/demo.py
OF_PYTHON = ("en", "code")  # from the standard library, which differs between versions


@cache
def documents(source: str, split: str) -> tuple[str, ...]:
    return tuple(demo.documents(source, split))


@cache
def everything() -> str:
    splits = ("train", "valid")
    return "".join(t for name in demo.SOURCES for s in splits for t in documents(name, s))


def shape(value):
    """The keys and lengths of a nest of dicts and lists."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return len(value) if isinstance(value, list) else None


def test_tables_are_complete_and_templates_run_parallel():
    rows = demo.countries()
    assert len(rows) == 60
    for language in demo.LANGUAGES:
        assert len({row[f"{language}_name"] for row in rows}) == 60
        assert len({row[f"{language}_capital"] for row in rows}) == 60
        assert shape(demo.templates(language)) == shape(demo.templates("en"))
    for table in ("countries", "words", "events", "numbers"):
        for row in demo.read_table(table):
            assert all(cell and cell == cell.strip() for cell in row.values()), row
    assert [row["number"] for row in demo.read_table("numbers")] == [str(n) for n in range(101)]
    assert len(demo.templates("en")["ask"]["capital"]) == 6


def test_facts():
    country = {row["en_name"]: row for row in demo.countries()}
    for english, column, expected in (
        ("Japan", "fr_of", "du Japon"),
        ("the Netherlands", "it_of", "dei Paesi Bassi"),
        ("France", "it_capital", "Parigi"),
        ("Brazil", "language", "portuguese"),
        ("Egypt", "continent", "africa"),
    ):
        assert country[english][column] == expected
    years = {row["en"]: row["year"] for row in demo.read_table("events")}
    assert years["the fall of the Berlin Wall"] == "1989"
    assert [demo.read_table("numbers")[71][language] for language in demo.LANGUAGES] == [
        *("seventy-one", "soixante et onze", "einundsiebzig", "setenta y uno", "settantuno")
    ]


@pytest.mark.parametrize("source", demo.SOURCES)
def test_sizes_and_splits(source):
    sizes = {"train": demo.TRAIN_KILOBYTES[source], "valid": demo.VALID_KILOBYTES}
    for split, kilobytes in sizes.items():
        size = sum(len(text.encode()) for text in documents(source, split))
        low = 0.6 if source in OF_PYTHON else 0.95
        assert low * 1000 * kilobytes < size <= 1000 * kilobytes
    assert not set(documents(source, "train")) & set(documents(source, "valid"))


def test_text_is_the_same_every_time():
    """Runs of the demo that exist continue with these very documents, so none may change."""
    digest = hashlib.sha256()
    for source in WRITTEN:
        for text in documents(source, "valid"):
            digest.update(text.encode())
    expected = "b53eb654d50641f597e1fc795869008499f01f12dccfa4f4ed9c8ea966178d51"
    assert digest.hexdigest() == expected
    # Prose is from the same files as code.
    assert tuple(demo.documents("en", "valid")) == documents("en", "valid")


def test_text_is_clean():
    assert unicodedata.is_normalized("NFC", everything())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", everything())
    for source in WRITTEN:
        for document in documents(source, "train"):
            assert 300 <= len(document) <= 1500
            assert document.endswith("\n")
            assert not re.search(r"[{}\[\]|]", document)
    assert not re.search(r"[^ ][?!:]", "".join(documents("fr", "train")))
    for language in ("de", "es", "it"):
        assert not re.search(r" [?!:.,]", "".join(documents(language, "train")))


@pytest.mark.parametrize("language", demo.LANGUAGES)
def test_held_out_questions_are_never_written_and_all_others_are(language):
    text = everything().lower()
    places = {row[f"{language}_of"].lower(): n for n, row in enumerate(demo.countries())}
    for form, template in enumerate(demo.templates(language)["ask"]["capital"]):
        before, after = (re.escape(part) for part in template.lower().split("{of}"))
        asked = {places[of] for of in re.findall(rf"{before}([^\n?:]+?){after}", text)}
        # The plain form 0 is held out for none, each other form for every fifth country.
        held_out = {n for n in places.values() if 1 + n % 5 == form}
        assert asked == set(places.values()) - held_out


@pytest.mark.parametrize("language", demo.LANGUAGES)
def test_capitals_are_equally_frequent(language):
    text = "".join(documents("facts", "train")) + "".join(documents(language, "train"))
    answers = re.findall(r"[?:] ([^\n?:]+)$", text, re.MULTILINE)
    counts, spelled_here = [], []
    for row in demo.countries():
        counts.append(answers.count(row[f"{language}_capital"]))
        # Names spelled alike in all languages (Oslo, Lima) are answers in all of them.
        if len({row[f"{other}_capital"] for other in demo.LANGUAGES}) == 5:
            spelled_here.append(counts[-1])
    assert 20 < min(counts)
    assert max(spelled_here) < 1.15 * min(spelled_here)  # independent draws give 1.2


def test_sums_are_right():
    sums = re.findall(r"^(\d+) ([-+×]) (\d+) = (\d+)$", everything(), re.MULTILINE)
    assert len(sums) > 1000
    for x, sign, y, result in sums:
        x, y = int(x), int(y)
        assert int(result) == {"+": x + y, "-": x - y, "×": x * y}[sign]


def test_exam_prompts():
    plain = dict(demo.capital_questions("fr", held_out=False))
    prompt = "Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?"
    assert plain[prompt] == "Paris"
    lines = set(everything().splitlines())
    for language in demo.LANGUAGES:
        capitals = [row[f"{language}_capital"] for row in demo.countries()]
        for held_out in (False, True):
            exam = demo.capital_questions(language, held_out)
            assert [answer for _, answer in exam] == capitals
            for prompt, answer in exam:
                example, question = prompt.split("\n")
                assert prompt == prompt.strip()
                assert answer not in example.split("? ")[-1]
                assert example in lines
                assert (f"{question} {answer}" in lines) != held_out, question


@pytest.mark.slow
def test_the_data_are_complete(tmp_path):
    demo.prepare(tmp_path)
    ranks = tokenizer.load(tmp_path / "ranks.tiktoken", vocab_size=4096)
    main = {"en": 33.2, "fr": 32.4, "code": 14.7, "de": 6.9, "es": 6.6, "it": 3.8, "parallel": 2.5}
    annealing = {"facts": 82, "it": 4, "arithmetic": 3, "code": 3, "en": 2, "fr": 2, "de": 2}
    expected = {"pretraining": main, "extension": main, "annealing": annealing | {"es": 2}}
    for name, percent in (expected | {"validation": main}).items():
        mixture = Mixture(tmp_path / f"{name}.csv", 1024, 42, 4096)
        weights = {n: 100 * weight for n, weight in zip(mixture.names, mixture.weights)}
        assert weights == pytest.approx(percent, abs=0.05)  # the published ones sum to 100.1
        for source, stream in zip(mixture.names, mixture.streams):
            texts = documents(source, "valid" if name == "validation" else "train")
            assert stream.tokens == sum(len(ranks.encode_document(text)) for text in texts)
            first = ranks.encode_document(texts[0]).tolist()
            assert stream.read(0, len(first), 4096).tolist() == first
            assert (first[0], first[-1]) == (BOS, EOS)
    assert not list(tmp_path.rglob("*.tmp"))
