import gzip
import itertools
import json
import random

import pytest
from conftest import SHARED, needs_shared

from config.cli import ConfigError
from data import tokenizer as tokenizers
from data.dataset import DataError
from data.tokenizer import BOS, ByteLevelBPE, Tokenizer
from eval.haystack import (
    NEEDLES,
    Haystack,
    hide,
    read_haystack,
    read_needles,
    room_for_answer,
)

BYTES = Tokenizer(ByteLevelBPE({bytes([b]): b + 4 for b in range(256)}))
LANGUAGES = ("en", "fr", "de", "es", "it")


def essays(count, seed=0):
    """Documents of sentences of 3 to 12 words, in lines of some sentences."""
    rng = random.Random(seed)
    words = "the year wind slowly opens <s> under 1984 café, market (old) turns".split()

    def sentence():
        text = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        return text.capitalize() + rng.choice(".!?…")

    return ["".join(sentence() + rng.choice(" \n") for _ in range(20)) for _ in range(count)]


def corpus(language):
    with gzip.open(SHARED / "corpus" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in itertools.islice(f, 600)]


def check_random_prompts(tokenizer, haystack, needles, lengths, count):
    """Each prompt is taken apart again, its parts known from their texts."""
    rng, room = random.Random(1), room_for_answer(tokenizer, needles)
    dot = len(tokenizer.encode_ordinary("."))
    sentences = itertools.pairwise([*haystack.borders, len(haystack.ids)])
    longest = max(end - start for start, end in sentences)
    for _ in range(count):
        needle, length = rng.choice(needles), rng.randint(*lengths)
        depth = rng.choice([0, 100, rng.uniform(0, 100), rng.uniform(0, 100)])
        ids, position = hide(haystack, needle, length, depth, tokenizer, room)
        assert len(ids) + room == length
        assert ids[0] == BOS and ids.count(BOS) == 1

        fact = tokenizer.encode_ordinary(f".\n{needle.fact}\n")[dot:]
        question = tokenizer.encode_ordinary(f".\n\n{needle.question}")[dot:]
        filler, before = length - room - 1 - len(fact) - len(question), position - 1
        end = position + len(fact)
        assert ids[position:end] == fact and ids[-len(question) :] == question
        assert ids[1:position] + ids[end : -len(question)] == haystack.ids[:filler]

        assert before in haystack.borders or before == filler
        wanted = filler * depth / 100
        near = [*haystack.borders, filler]
        assert abs(before - wanted) <= longest / 2 + 1
        assert abs(before - wanted) <= min(abs(at - wanted) for at in near if at <= filler) + 1
        if depth in (0, 100):
            assert before == (filler if depth else 0)


def test_thousand_random_prompts():
    needles = read_needles("en")
    haystack = read_haystack(essays(40), BYTES, 20_000)
    check_random_prompts(BYTES, haystack, needles, (400, 20_000), 1000)


@pytest.fixture(scope="module")
def lucie():
    return tokenizers.load(SHARED / "lucie" / "tokenizer.json")


@needs_shared
@pytest.mark.parametrize("language", LANGUAGES)
def test_random_prompts_of_lucie(lucie, language):
    """On real text, up to the longest of the published lengths."""
    haystack = read_haystack(corpus(language), lucie, 62_872)
    check_random_prompts(lucie, haystack, read_needles(language), (200, 62_872), 40)


@needs_shared
def test_ids_are_those_of_the_text_as_a_whole(lucie):
    """Sentences are encoded one by one, which is not to be seen in their ids."""
    texts = [text.strip() for text in corpus("fr")[:40]]
    for tokenizer in (BYTES, lucie):
        haystack = read_haystack(texts, tokenizer, 1)
        assert haystack.ids == tokenizer.encode_ordinary(texts[0])
        whole = tokenizer.encode_ordinary("\n\n".join(texts))
        assert read_haystack(texts, tokenizer, len(whole)).ids == whole


def test_sentences_begin_where_they_do():
    text = "One. Two 3.5 times!  Three\n\nFour? \n Five"
    haystack = read_haystack([text], BYTES, 5)
    starts = [text[at:] for at in haystack.borders]
    first_words = [start.split()[0] for start in starts]
    assert first_words == ["One.", "Two", "Three", "Four?", "Five"]
    assert haystack.borders[:3] == [0, 4, 19]


def test_reads_no_more_than_it_takes(capsys):
    def texts():
        yield "  "
        yield "A first text. "
        yield "And a second."
        raise AssertionError("a third is not needed")

    haystack = read_haystack(texts(), BYTES, 28)
    assert BYTES.decode(haystack.ids) == "A first text.\n\nAnd a second."
    assert capsys.readouterr().err == ""


def test_a_short_haystack_is_repeated_and_that_is_said(capsys):
    haystack = read_haystack(["It rains. It pours."], BYTES, 50)
    assert BYTES.decode(haystack.ids) == "It rains. It pours.\n\n" * 3
    assert haystack.borders == [0, 9, 21, 30, 42, 51]
    assert "19 tokens of 50: it is repeated" in capsys.readouterr().err
    for nothing in ([], ["", " \n"]):
        with pytest.raises(DataError, match="holds no text"):
            read_haystack(nothing, BYTES, 50)


def test_needles_of_ones_own(tmp_path):
    file = tmp_path / "needles.json"
    form = {
        "fact": "{place}: {answer}.",
        "question": "{place}?",
        "needles": {"Oslo": "7", "Rome": "9"},
    }
    file.write_text(json.dumps({"fr": form}), encoding="utf-8-sig")  # as some editors do
    assert read_needles("fr", file) == [("Oslo: 7.", "Oslo?", "7"), ("Rome: 9.", "Rome?", "9")]
    with pytest.raises(DataError, match=r"needles.json: not of the form .*\(no 'en'\)"):
        read_needles("en", file)
    for other in ("[1]", "{", '{"fr": {"fact": "", "question": "", "needles": [1]}}'):
        file.write_text(other)
        with pytest.raises(DataError, match=r"needles.json: not of the form"):
            read_needles("fr", file)
    file.write_text('{"fr": {"fact": "", "question": "", "needles": {}}}')
    with pytest.raises(DataError, match=r"needles.json: no needles in fr"):
        read_needles("fr", file)


def test_a_length_without_room_is_refused_and_the_shortest_is_not():
    haystack, (needle, *_) = Haystack(list(range(4, 200)), [0]), read_needles("it")
    with pytest.raises(ConfigError, match=r"length 20 is too short: .* take \d+ tokens") as error:
        hide(haystack, needle, 20, 50, BYTES, 10)
    shortest = int(str(error.value).split()[-2])
    ids, position = hide(haystack, needle, shortest, 50, BYTES, 10)
    assert (len(ids), position) == (shortest - 10, 1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_needles_hold_their_answers(language):
    needles = read_needles(language)
    assert len({needle.answer for needle in needles}) == len(needles) == 8
    for needle in needles:
        assert needle.fact.count(needle.answer) == 1
        assert needle.answer not in needle.question
        assert "{" not in needle.fact + needle.question
    places = json.loads(NEEDLES.read_text(encoding="utf-8"))[language]["needles"]
    for place, needle in zip(places, needles):  # a question belongs to one fact
        assert place in needle.question
        assert [place in other.fact for other in needles].count(True) == 1
