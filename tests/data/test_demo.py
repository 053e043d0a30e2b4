"""The demo's data: true facts, held-out questions that stay out, and clean, repeatable text."""

import hashlib
import re
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


# Runs that exist continue with these very documents, and the published results of the demo rest on
# them, so none may change.
DIGESTS = {
    "train": "85d329bc62f9ea33ab5ad881e2b53b4fd90253fcc5ee1e7071d6309037035980",
    "valid": "b53eb654d50641f597e1fc795869008499f01f12dccfa4f4ed9c8ea966178d51",
}


@pytest.mark.parametrize("split", DIGESTS)
def test_the_text_is_what_it_was(split):
    texts = [text for source in WRITTEN for text in documents(source, split)]
    assert hashlib.sha256("".join(texts).encode()).hexdigest() == DIGESTS[split]


@pytest.mark.parametrize("source", demo.SOURCES)
def test_sizes_and_splits(source):
    sizes = {"train": demo.TRAIN_KILOBYTES[source], "valid": demo.VALID_KILOBYTES}
    for split, kilobytes in sizes.items():
        size = sum(len(text.encode()) for text in documents(source, split))
        low = 0.6 if source in OF_PYTHON else 0.95
        assert low * 1000 * kilobytes < size <= 1000 * kilobytes
    assert not set(documents(source, "train")) & set(documents(source, "valid"))


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
