"""The demo corpus: true facts, held-out questions that stay out, and clean, repeatable text."""

import re
import unicodedata
from functools import cache

import pytest

from data import demo_corpus as corpus


@cache
def documents(source: str, split: str) -> tuple[str, ...]:
    return tuple(corpus.documents(source, split))


@cache
def everything() -> str:
    return "".join(
        text
        for source in corpus.SOURCES
        for split in ("train", "valid")
        for text in documents(source, split)
    )


def country(english: str) -> dict[str, str]:
    return next(row for row in corpus.countries() if row["en_name"] == english)


def test_tables_are_complete():
    rows = corpus.countries()
    assert len(rows) == 60
    for language in corpus.LANGUAGES:
        assert len({row[f"{language}_name"] for row in rows}) == 60
        assert len({row[f"{language}_capital"] for row in rows}) == 60
    for table in ("countries", "words", "events", "numbers"):
        for row in corpus.read_table(table):
            assert all(cell and cell == cell.strip() for cell in row.values()), row
    for row in rows:
        for kind in ("continent", "language", "currency"):
            assert row[kind] in corpus.words("en", kind)
    assert len(corpus.read_table("events")) >= 25
    assert [row["number"] for row in corpus.read_table("numbers")] == [str(n) for n in range(101)]


def test_facts():
    for english, column, expected in (
        ("France", "fr_of", "de la France"),
        ("Japan", "fr_of", "du Japon"),
        ("Spain", "fr_of", "de l'Espagne"),
        ("the United States", "fr_of", "des États-Unis"),
        ("Switzerland", "de_of", "der Schweiz"),
        ("the United Kingdom", "de_of", "des Vereinigten Königreichs"),
        ("the Netherlands", "it_of", "dei Paesi Bassi"),
        ("France", "it_capital", "Parigi"),
        ("Germany", "es_capital", "Berlín"),
        ("Poland", "de_capital", "Warschau"),
        ("China", "fr_capital", "Pékin"),
        ("Australia", "en_capital", "Canberra"),
        ("Canada", "en_capital", "Ottawa"),
        ("Brazil", "language", "portuguese"),
        ("Sweden", "currency", "swedish_krona"),
        ("Egypt", "continent", "africa"),
        ("New Zealand", "continent", "oceania"),
    ):
        assert country(english)[column] == expected
    years = {row["en"]: row["year"] for row in corpus.read_table("events")}
    assert years["the storming of the Bastille"] == "1789"
    assert years["the fall of the Berlin Wall"] == "1989"
    numbers = corpus.read_table("numbers")
    assert [numbers[71][language] for language in corpus.LANGUAGES] == [
        *("seventy-one", "soixante et onze", "einundsiebzig", "setenta y uno", "settantuno")
    ]


def shape(value):
    """The keys and lengths of a nest of dicts and lists."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return len(value) if isinstance(value, list) else None


def test_templates_run_parallel():
    for language in corpus.LANGUAGES:
        assert shape(corpus.templates(language)) == shape(corpus.templates("en"))
    assert len(corpus.templates("en")["ask"]["capital"]) == 6


@pytest.mark.parametrize("source", corpus.SOURCES)
def test_sizes_and_splits(source):
    for split, kilobytes in (
        ("train", corpus.TRAIN_KILOBYTES[source]),
        ("valid", corpus.VALID_KILOBYTES),
    ):
        size = sum(len(text.encode()) for text in documents(source, split))
        # The standard library, behind "en" and "code", differs between versions of Python.
        low = 0.6 if source in ("en", "code") else 0.95
        assert low * 1000 * kilobytes < size <= 1000 * kilobytes
    assert not set(documents(source, "train")) & set(documents(source, "valid"))


@pytest.mark.parametrize("source", corpus.SOURCES)
def test_same_text_every_time(source):
    assert tuple(corpus.documents(source, "valid")) == documents(source, "valid")
    if source != "code":
        assert tuple(corpus.documents(source, "valid", seed=1)) != documents(source, "valid")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="latin"):
        corpus.documents("latin", "train")
    with pytest.raises(ValueError, match="test"):
        corpus.documents("en", "test")


def test_text_is_clean():
    text = everything()
    assert unicodedata.is_normalized("NFC", text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    for source in ("fr", "de", "es", "it", "parallel", "facts", "arithmetic"):
        for document in documents(source, "train"):
            assert 300 <= len(document) <= 1500
            assert document.endswith("\n")
            assert not re.search(r"[{}\[\]|]", document)
    french = "".join(documents("fr", "train"))
    assert not re.search(r"[^ ][?!:]", french)
    for language in ("de", "es", "it"):
        assert not re.search(r" [?!:.,]", "".join(documents(language, "train")))


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_held_out_questions_are_never_written_and_all_others_are(language):
    text = everything().lower()
    places = {row[f"{language}_of"].lower(): n for n, row in enumerate(corpus.countries())}
    for form, template in enumerate(corpus.templates(language)["ask"]["capital"]):
        before, after = (re.escape(part) for part in template.lower().split("{of}"))
        asked = {places[of] for of in re.findall(rf"{before}([^\n?:]+?){after}", text)}
        held_out = {n for n in places.values() if corpus.held_out_form(n) == form}
        assert asked == set(places.values()) - held_out


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_capitals_are_equally_frequent(language):
    rows = corpus.countries()
    text = "".join(documents("facts", "train")) + "".join(documents(language, "train"))
    answers = re.findall(r"[?:] ([^\n?:]+)$", text, re.MULTILINE)
    counts = [answers.count(row[f"{language}_capital"]) for row in rows]
    assert 20 < min(counts)
    # Names spelled alike in all languages (Oslo, Lima) are answers in all of them.
    spelled_here = [
        count
        for count, row in zip(counts, rows, strict=True)
        if len({row[f"{other}_capital"] for other in corpus.LANGUAGES}) == 5
    ]
    assert max(spelled_here) < 1.5 * min(spelled_here)


def test_sums_are_right():
    sums = re.findall(r"^(\d+) ([-+×]) (\d+) = (\d+)$", everything(), re.MULTILINE)
    assert len(sums) > 1000
    for x, sign, y, result in sums:
        x, y = int(x), int(y)
        assert int(result) == {"+": x + y, "-": x - y, "×": x * y}[sign]


def test_exam_prompts():
    plain = dict(corpus.capital_questions("fr", held_out=False))
    prompt = "Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?"
    assert plain[prompt] == "Paris"
    assert "Quelle est la capitale de la France ? Paris\n" in "".join(documents("fr", "train"))
    for language in corpus.LANGUAGES:
        for held_out in (False, True):
            exam = corpus.capital_questions(language, held_out)
            assert [answer for _, answer in exam] == [
                row[f"{language}_capital"] for row in corpus.countries()
            ]
            for n, (prompt, answer) in enumerate(exam):
                example, question = prompt.split("\n")
                assert prompt == prompt.strip()
                assert answer not in example.split("? ")[-1]
                assert (f"{question} {answer}\n" in everything()) != held_out, (n, question)
                assert f"{example}\n" in everything()
