import csv
import gzip
import itertools
import json
import random
import re

import pytest
import torch
from conftest import SHARED, TINY, needs_shared

from config.cli import ConfigError
from data import tokenizer as tokenizers
from data.dataset import DataError
from data.tokenizer import BOS, ByteLevelBPE, Tokenizer, save
from eval import needle
from eval.needle import (
    LANGUAGES,
    NEEDLES,
    draw,
    hide,
    log_probabilities,
    read_haystack,
    read_needles,
    room_for_answer,
    words_found,
)
from generate import Decoder, Sampling
from hf import to_hf
from model import Lucie, LucieConfig

SIZES = TINY | {"vocab_size": 260, "max_position_embeddings": 512}
BYTES = Tokenizer(ByteLevelBPE({bytes([b]): b + 4 for b in range(256)}))


# --- prompts --------------------------------------------------------------------------------------


def essays(count, seed=0):
    """Documents of sentences of 3 to 12 words, in lines of some sentences."""
    rng = random.Random(seed)
    words = "the year wind slowly opens <s> under 1984 café, market (old) turns".split()

    def sentence():
        text = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        return text.capitalize() + rng.choice(".!?…")

    return ["".join(sentence() + rng.choice(" \n") for _ in range(20)) for _ in range(count)]


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


def test_prompts_have_their_exact_length_and_parts():
    haystack = read_haystack(essays(40), BYTES, 20_000)
    check_random_prompts(BYTES, haystack, read_needles("en"), (400, 20_000), 300)


@needs_shared
def test_prompts_of_lucie():
    """On real text, up to the longest of the published lengths. Sentences are encoded one by one,
    which does not show in their ids."""
    lucie = tokenizers.load(SHARED / "lucie" / "tokenizer.json")
    with gzip.open(SHARED / "corpus" / "fr.jsonl.gz", "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"].strip() for line in itertools.islice(f, 600)]
    haystack = read_haystack(texts, lucie, 62_872)
    whole = lucie.encode_ordinary("\n\n".join(texts[:20]))
    assert haystack.ids[: len(whole)] == whole
    check_random_prompts(lucie, haystack, read_needles("fr"), (200, 62_872), 20)


def test_where_sentences_begin():
    text = "One. Two 3.5 times!  Three\n\nFour? \n Five"
    haystack = read_haystack([text], BYTES, 5)
    starts = [text[at:].split()[0] for at in haystack.borders]
    assert starts == ["One.", "Two", "Three", "Four?", "Five"] and haystack.borders[2] == 19


def test_a_haystack_is_read_as_far_as_needed_or_repeated(capsys):
    def texts():
        yield "  "
        yield "A first text. "
        yield "And a second."
        raise AssertionError("a third is not needed")

    haystack = read_haystack(texts(), BYTES, 28)
    assert BYTES.decode(haystack.ids) == "A first text.\n\nAnd a second."
    assert "repeated" not in capsys.readouterr().err
    haystack = read_haystack(["It rains. It pours."], BYTES, 50)
    assert BYTES.decode(haystack.ids) == "It rains. It pours.\n\n" * 3
    assert haystack.borders == [0, 9, 21, 30, 42, 51]
    assert "19 tokens of 50: it is repeated" in capsys.readouterr().err


def test_needles_of_a_file(tmp_path):
    file = tmp_path / "needles.json"
    form = {"fact": "{place}: {answer}.", "question": "{place}?", "needles": {"Oslo": "7"}}
    file.write_text(json.dumps({"fr": form}), encoding="utf-8-sig")  # as some editors do
    assert read_needles("fr", file) == [("Oslo: 7.", "Oslo?", "7")]
    with pytest.raises(DataError, match=r"needles.json: not of the form .*'en'"):
        read_needles("en", file)


@pytest.mark.parametrize("language", LANGUAGES)
def test_needles_hold_their_answers(language):
    needles = read_needles(language)
    assert len({known.answer for known in needles}) == len(needles) == 8
    places = json.loads(NEEDLES.read_text(encoding="utf-8"))[language]["needles"]
    for place, known in zip(places, needles):  # a question belongs to one fact
        assert known.fact.count(known.answer) == 1 and known.answer not in known.question
        assert place in known.question and "{" not in known.fact + known.question
        assert [place in other.fact for other in needles].count(True) == 1


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def model():
    return Lucie(LucieConfig(**SIZES))


@pytest.fixture
def folder(model, tmp_path):
    """An exported model, its vocabulary, and a haystack."""
    save(BYTES.bpe.ranks, tmp_path / "ranks")
    to_hf(model, tmp_path / "hf")
    for number, text in enumerate(essays(12)):
        (tmp_path / "essays").mkdir(exist_ok=True)
        (tmp_path / "essays" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def run(folder, *more, lengths=(500, 2000, 4), depths=5):
    given = [folder / "hf", "--tokenizer", folder / "ranks", "--device", "cpu"]
    given += ["--haystack", folder / "essays", "--out", folder / "out"]
    given += ["--lengths", *lengths, "--depths", depths, *more]
    needle.main(list(map(str, given)))


def rows(folder, stem="en_generate"):
    with open(folder / "out" / f"{stem}.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def stand_in(monkeypatch, window=10**9, asked=None):
    """In place of the model's passes, those of one that sees the last `window` tokens of a prompt,
    and answers the question there from the fact if it is among them: ids in, ids out."""

    def answer(prompt):
        """(the place asked for, what the fact says of it, or None)."""
        if asked is not None:
            asked.append(prompt)
        seen = BYTES.decode(prompt[-window:])
        place = re.search(r"best thing to do in ([\w ]+)\?\nAnswer:$", seen)[1]
        fact = re.search(rf"\nThe best thing to do in {place} is (.*)\.\n", seen)
        return place, fact[1] if fact else None

    def decode(model, prompts, room, sampling, decoder):
        (prompt,) = prompts
        assert len(prompt) + room <= model.config.max_position_embeddings
        assert sampling == Sampling(temperature=0)
        text = answer(prompt)[1] or "I have not read of that"
        for token in BYTES.encode_ordinary(f" {text}\nQuestion: and yet")[:room]:
            yield [(0, token, -1.0)]

    def log_probabilities(decoder, prompt, continuations):
        """Of what it has not read it takes the answer for another place to be likely."""
        place, known = answer(prompt)
        others = [n.answer for n in read_needles("en") if f" {place} " not in n.fact]
        likely = BYTES.encode_ordinary(f" {known or others[0]}")
        return [(-1.0 if ids == likely else -2.0) * len(ids) for ids in continuations]

    monkeypatch.setattr(needle, "decode", decode)
    monkeypatch.setattr(needle, "log_probabilities", log_probabilities)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_a_window_of_attention_is_the_map(folder, monkeypatch, capsys, scoring, window=700):
    asked, stem = [], f"en_{scoring}"
    stand_in(monkeypatch, window, asked)
    run(folder, "--scoring", scoring, lengths=(500, 2500, 6), depths=11)
    room, found = room_for_answer(BYTES, read_needles("en")), rows(folder, stem)
    grid = [(n, d) for n in range(500, 2501, 400) for d in range(0, 101, 10)]
    assert [(int(row["length"]), int(row["depth"])) for row in found] == grid
    assert [len(prompt) + room for prompt in asked] == [length for length, _ in grid]
    assert all(prompt[0] == BOS and prompt.count(BOS) == 1 for prompt in asked)
    for row in found:
        inside = int(row["position"]) >= int(row["length"]) - room - window
        assert (row["answer"] == row["expected"]) == inside
        low = 0 if scoring == "likelihood" else 0.4
        assert float(row["score"]) == 1 if inside else float(row["score"]) <= low
    mean = sum(float(row["score"]) for row in found) / len(found)
    assert f"mean of the map: {mean:.3f}" in capsys.readouterr().out
    assert (folder / "out" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_a_random_model_finds_next_to_nothing(folder, capsys):
    """The real one, past the 512 positions it has."""
    for scoring in ("generate", "likelihood"):
        run(folder, "--scoring", scoring, lengths=(450, 600, 2), depths=1)
        assert sum(float(row["score"]) for row in rows(folder, f"en_{scoring}")) < 2
    assert "600 tokens at once: the model was trained on 512" in capsys.readouterr().err


def test_goes_on_where_it_stopped(folder, monkeypatch):
    stand_in(monkeypatch)
    run(folder)
    file = folder / "out" / "en_generate.csv"
    whole, asked = file.read_text(), []
    kept = whole.splitlines(keepends=True)[:8]
    file.write_text("".join(kept))  # as after seven cells
    stand_in(monkeypatch, asked=asked)
    for _ in range(2):
        run(folder)
        assert len(asked) == 20 - 7 and file.read_text() == whole
    run(folder, lengths=(1000, 2500, 4))  # another grid adds what is new
    assert len(asked) == 13 + 5 and file.read_text().startswith(whole)


def test_a_csv_of_something_else_is_refused(folder, monkeypatch):
    stand_in(monkeypatch)
    run(folder)
    file = folder / "out" / "en_generate.csv"
    before, own = file.read_text(), json.loads(NEEDLES.read_text(encoding="utf-8"))
    own["en"]["needles"].popitem()
    (folder / "own.json").write_text(json.dumps(own), encoding="utf-8")
    for other, path in (("haystack", "essays/01.txt"), ("needles", "own.json")):
        with pytest.raises(ConfigError, match=f"has another {other}: choose another --out"):
            run(folder, f"--{other}", folder / path)
    assert file.read_text() == before


@pytest.mark.parametrize("trained", [512, 32_000])
def test_default_lengths_fit_the_model(folder, monkeypatch, trained):
    stand_in(monkeypatch)
    to_hf(Lucie(LucieConfig(**(SIZES | {"max_position_embeddings": trained}))), folder / "long")
    given = [f"hf:{folder}/long", "--tokenizer", folder / "ranks", "--device", "cpu"]
    needle.main(list(map(str, [*given, "--haystack", folder / "essays", "--depths", 1])))
    with open(folder / "long" / "needle" / "en_generate.csv", newline="") as f:
        lengths = [int(row["length"]) for row in csv.DictReader(f)]
    room = max(len(f" {n.fact}") for n in read_needles("en"))
    least = 1 + room + max(len(f"\n{n.fact}\n\n\n{n.question}") for n in read_needles("en"))
    expected = (1000, 62_872) if trained == 32_000 else (least, 512)
    assert len(lengths) == 20 and (lengths[0], lengths[-1]) == expected


@pytest.mark.parametrize("chunk", [32, 2048])
def test_log_probabilities_equal_those_of_whole_sequences(model, monkeypatch, chunk):
    """The cache, rewound for each continuation, leaves no trace of the one before."""
    monkeypatch.setattr(needle, "PREFILL", chunk)
    torch.manual_seed(0)
    prompt = torch.randint(4, 260, (100,)).tolist()
    continuations = [torch.randint(4, 260, (n,)).tolist() for n in (40, 1, 7, 40)]
    found = log_probabilities(Decoder(model), prompt, continuations)
    for ids, ours in zip(continuations, found):
        with torch.no_grad():
            likely = model(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
        exact = sum(float(likely[len(prompt) - 1 + n, i]) for n, i in enumerate(ids))
        assert ours == pytest.approx(exact, abs=1e-3)


def test_words_found():
    expected = "eat a sandwich and sit in Dolores Park on a sunny day"
    assert words_found("Eat a sandwich, and sit in DOLORES Park on a sunny day!", expected) == 1
    assert words_found("sit and eat", expected) == 3 / 11  # eleven words: "a" counts once
    assert words_found("sandwiches", expected) == words_found("", expected) == 0
    assert words_found("s'asseoir, l'été", "s'asseoir l'été") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--haystack", "{}/empty"], "the haystack holds no text"),
        (["--lengths", "50", "100", "2"], "length 50 is too short"),
        (["--lengths", "100", "50", "2"], "--lengths must be MIN <= MAX"),
        (["--lengths", "1000", "100000000000", "2"], "1 x 100,000,000,000 tokens take"),
    ],
)
def test_bad_input_is_an_error_and_writes_nothing(folder, more, message):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("")
    with pytest.raises((ConfigError, DataError, OSError, ValueError), match=message):
        run(folder, *(part.format(folder) for part in more))
    assert not (folder / "out").exists()


# --- the map --------------------------------------------------------------------------------------


def test_the_picture_shows_cells_where_they_are_and_the_trained_length(tmp_path):
    """Lengths and depths of no order, with even distances or without, and one that is missing."""
    of_length = {4000: (1, 1, 1), 1000: (1, 0.5, 0), 2000: (0, 0, 1)}
    found = {(n, 50 * row): x for n, column in of_length.items() for row, x in enumerate(column)}
    del found[4000, 100]
    figure = draw(found, 2500, "a title in words")
    axes, _ = figure.axes
    (mesh,) = axes.collections
    across = mesh.get_coordinates()[0, :, 0].tolist()
    assert across == [500, 1500, 3000, 5000]  # half-way between neighbours
    assert mesh.get_coordinates()[:, 0, 1].tolist() == [-25, 25, 75, 125]
    assert mesh.get_array().tolist() == [[1, 0, 1], [0.5, 0, 1], [0, 1, None]]
    (line,) = axes.lines
    assert set(line.get_xdata()) == {2500}
    assert axes.yaxis_inverted() and axes.get_title(loc="left") == "a title in words"
    assert mesh.get_cmap().N == 256
    axes, bar = draw({(64, 0): 1.0, (64, 50): 0.0}, 64, "found or not").axes
    assert axes.collections[0].get_cmap().N == 2
    assert [text.get_text() for text in bar.get_yticklabels()] == ["not found", "found"]
    draw({(64, 0): 1.0}, 64, "one cell").savefig(tmp_path / "one.png")
