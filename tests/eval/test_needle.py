import csv
import json
import re

import pytest
import torch
from conftest import TINY
from test_haystack import BYTES, essays

from config.cli import ConfigError
from data.dataset import DataError
from data.tokenizer import EOS, save
from eval import needle
from eval.haystack import NEEDLES, continuation, read_needles, room_for_answer
from eval.needle import generator, log_probabilities, picker, words_found
from eval.opening import make_room
from generate import Sampling
from hf import to_hf
from model import Lucie, LucieConfig

SIZES = TINY | {"vocab_size": 260, "max_position_embeddings": 512}


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


def stand_in(monkeypatch, window=10**9, asked=None, picture=False):
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

    def decode(model, prompts, room, sampling):
        (prompt,) = prompts
        assert len(prompt) + room <= model.config.max_position_embeddings
        assert sampling == Sampling(temperature=0)
        text = answer(prompt)[1] or "I have not read of that"
        for token in BYTES.encode_ordinary(f" {text}\nQuestion: and yet")[:room]:
            yield [(0, token, -1.0)]

    def log_probabilities(model, prompt, continuations):
        """Of what it has not read it takes the answer for another place to be likely."""
        place, known = answer(prompt)
        others = [n.answer for n in read_needles("en") if f" {place} " not in n.fact]
        likely = BYTES.encode_ordinary(f" {known or others[0]}")
        assert all(
            len(prompt + ids) <= model.config.max_position_embeddings for ids in continuations
        )
        return [(-1.0 if ids == likely else -2.0) * len(ids) for ids in continuations]

    monkeypatch.setattr(needle, "decode", decode)
    monkeypatch.setattr(needle, "log_probabilities", log_probabilities)
    if not picture:
        monkeypatch.setattr(needle, "draw", lambda *args: None)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_a_model_that_reads_all_scores_one_everywhere(folder, monkeypatch, capsys, scoring):
    pytest.importorskip("matplotlib")
    asked, stem = [], f"en_{scoring}"
    stand_in(monkeypatch, asked=asked, picture=True)
    run(folder, "--scoring", scoring)
    found = rows(folder, stem)
    assert [(row["length"], row["depth"]) for row in found] == [
        (str(length), str(depth))
        for length in (500, 1000, 1500, 2000)
        for depth in (0, 25, 50, 75, 100)
    ]
    assert {row["score"] for row in found} == {"1.0000"}
    assert all(row["answer"] == row["expected"] for row in found)
    assert len({row["expected"] for row in found}) > 3
    room = room_for_answer(BYTES, read_needles("en"))
    assert [len(prompt) + room for prompt in asked] == [int(row["length"]) for row in found]
    assert all(prompt[0] == 0 and prompt.count(0) == 1 for prompt in asked)
    out, err = capsys.readouterr()
    assert "retrieval over 0.9 at every length up to 2,000 tokens; mean of the map 1.000" in out
    assert "2,000 tokens at once: the model was trained on 512" in err
    assert (folder / "out" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
@pytest.mark.parametrize("window", [400, 700, 1300])
def test_a_window_of_attention_is_the_map(folder, monkeypatch, capsys, window, scoring):
    stand_in(monkeypatch, window)
    run(folder, "--scoring", scoring, lengths=(500, 2500, 6), depths=11)
    room, found = room_for_answer(BYTES, read_needles("en")), rows(folder, f"en_{scoring}")
    answers = {n.answer for n in read_needles("en")}
    kept = 0
    for row in found:
        prompt = int(row["length"]) - room
        inside = int(row["position"]) >= prompt - window
        assert (row["answer"] == row["expected"]) == inside
        if scoring == "likelihood":
            assert float(row["score"]) == inside and row["answer"] in answers
        else:
            assert (float(row["score"]) == 1) if inside else (float(row["score"]) < 0.4)
            assert inside or row["answer"] == "I have not read of that"
        kept += inside
    assert 0.1 < kept / len(found) < 0.9


def test_a_random_model_finds_next_to_nothing(folder):
    """The real one, past the 512 positions it has; no needle is picked more than by chance."""
    grid = dict(lengths=(450, 700, 2), depths=2)
    run(folder, **grid)
    assert sum(float(row["score"]) for row in rows(folder)) / 4 < 0.05
    run(folder, "--scoring", "likelihood", **grid)
    picked = rows(folder, "en_likelihood")
    answers = [n.answer for n in read_needles("en")]
    assert all(row["answer"] in answers for row in picked)
    assert [float(row["score"]) for row in picked] == [
        row["answer"] == row["expected"] for row in picked
    ]
    assert sum(float(row["score"]) for row in picked) < 3


def test_goes_on_where_it_stopped(folder, monkeypatch, capsys):
    """After an interruption, and after a kill in the middle of a row."""
    stand_in(monkeypatch)
    run(folder)
    file = folder / "out" / "en_generate.csv"
    whole = file.read_text()
    file.unlink()

    asked = []

    class Seven(list):
        def append(self, prompt):
            if len(self) == 7:
                raise KeyboardInterrupt
            super().append(prompt)

    stand_in(monkeypatch, asked=Seven())
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert len(rows(folder)) == 7
    text = file.read_text()
    file.write_text(text[:-10])  # the seventh row is not whole
    stand_in(monkeypatch, asked=asked)
    run(folder)
    assert len(asked) == 20 - 6 and file.read_text() == whole
    run(folder)
    assert len(asked) == 14 and file.read_text() == whole
    # Another grid adds what is new and shows what was asked for.
    capsys.readouterr()
    run(folder, lengths=(1000, 2500, 4))
    assert len(asked) == 14 + 5 and file.read_text().startswith(whole)
    shown = capsys.readouterr().out
    assert "2,500" in shown and "   500" not in shown


@pytest.mark.parametrize("other", ["weights", "haystack", "needles", "seed"])
def test_a_csv_of_something_else_is_refused(folder, monkeypatch, other):
    stand_in(monkeypatch)
    run(folder)
    before, more = (folder / "out" / "en_generate.csv").read_text(), []
    if other == "weights":
        model = Lucie(LucieConfig(**SIZES), seed=43)
        to_hf(model, folder / "new")
        (folder / "new" / "model.safetensors").replace(folder / "hf" / "model.safetensors")
    elif other == "haystack":
        (folder / "essays" / "00.txt").write_text("Another text.")
    elif other == "needles":
        own = json.loads(NEEDLES.read_text(encoding="utf-8"))
        own["en"]["needles"].popitem()
        (folder / "own.json").write_text(json.dumps(own), encoding="utf-8")
        more = ["--needles", folder / "own.json"]
    else:
        more = ["--seed", "7"]
    with pytest.raises(ConfigError, match=f"is of other {other}: choose another --out"):
        run(folder, *more)
    assert (folder / "out" / "en_generate.csv").read_text() == before


def test_the_default_folder_tells_checkpoints_apart(tmp_path):
    for step in (5, 10):
        folder = tmp_path / "mine" / "checkpoints" / f"step00000{step:02}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert needle.label_of(str(tmp_path / "mine")) == "mine_step0000010"
    assert needle.label_of(str(tmp_path / "mine/checkpoints/step0000005")) == "mine_step0000005"
    assert needle.label_of("hf:OpenLLM-France/Lucie-7B@step0005000") == "Lucie-7B@step0005000"


@pytest.mark.parametrize("chunk", [32, 2048])
def test_log_probabilities_equal_those_of_whole_sequences(model, monkeypatch, chunk):
    """The cache, rewound for each continuation, leaves no trace of the one before."""
    monkeypatch.setattr(needle, "PREFILL", chunk)
    torch.manual_seed(0)
    prompt = torch.randint(4, 260, (100,)).tolist()
    continuations = [torch.randint(4, 260, (n,)).tolist() for n in (40, 1, 7, 40)]
    found = log_probabilities(model, prompt, continuations)
    for ids, ours in zip(continuations, found):
        with torch.no_grad():
            likely = model(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
        exact = sum(float(likely[len(prompt) - 1 + n, i]) for n, i in enumerate(ids))
        assert ours == pytest.approx(exact, abs=1e-3)


def test_the_picker_takes_the_largest_per_byte(model, monkeypatch):
    needles = read_needles("fr")
    sizes = [len(n.answer.encode()) for n in needles]
    values = [-1.0 * size for size in sizes]
    longest = sizes.index(max(sizes))
    values[longest] *= 0.9  # still the least likely as a whole
    assert values[longest] == min(values)
    given = []

    def log_probabilities(model, prompt, continuations):
        given.append((prompt, continuations))
        return values

    monkeypatch.setattr(needle, "log_probabilities", log_probabilities)
    assert picker(model, BYTES, needles)([0, 5, 6]) == needles[longest].answer
    assert given == [([0, 5, 6], [continuation(BYTES, f" {n.answer}") for n in needles])]


def test_a_generated_answer_is_its_first_line(model, monkeypatch):
    needles = read_needles("en")
    for said, expected in (
        (" Eat a sandwich.\nQuestion: What", "Eat a sandwich."),
        ("\n\n  In Lisbon \nor", "In Lisbon "),
        ("", ""),
        (" \n", ""),
    ):
        asked = []

        def decode(model, prompts, room, sampling, said=said, asked=asked):
            asked.append((prompts, room, sampling))
            for token in [*BYTES.encode_ordinary(said), EOS]:
                yield [(0, token, -1.0)]

        monkeypatch.setattr(needle, "decode", decode)
        assert generator(model, BYTES, needles)([0, 9]) == expected
        longest = max(len(f" {n.fact}".encode()) for n in needles)
        assert asked == [([[0, 9]], longest, Sampling(temperature=0))]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Eat a sandwich, and sit in DOLORES Park on a sunny day!", 1),
        ("sit and eat", 3 / 11),  # eleven words: "a" counts once
        ("sandwiches", 0),
        ("", 0),
    ],
)
def test_words_found(answer, score):
    expected = "eat a sandwich and sit in Dolores Park on a sunny day"
    assert words_found(answer, expected) == pytest.approx(score)
    assert words_found("s'asseoir, l'été", "s'asseoir l'été") == 1


def test_a_model_with_more_room_is_one_that_had_it_from_the_start(model):
    tokens = torch.randint(4, 260, (1, 700))
    with torch.no_grad():
        model(tokens[:, :10])  # its tables are those of 512 positions now
        make_room(model, 700)
        larger = Lucie(LucieConfig(**(SIZES | {"max_position_embeddings": 700})))
        assert torch.equal(model(tokens), larger(tokens))
        make_room(model, 600)
    assert model.config.max_position_embeddings == 700


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--haystack", "nowhere/"], "nowhere/: no such file"),
        (["--haystack", "{}/empty"], "the haystack holds no text"),
        (["--lengths", "50", "100", "2"], "length 50 is too short"),
        (["--lengths", "100", "50", "2"], "--lengths must be MIN <= MAX"),
        (["--depths", "0"], "--depths >= 1"),
        (["--needles", "{}/nowhere.json"], "No such file.*nowhere.json"),
        (["--tokenizer", "{}/nowhere"], "nowhere: No such file"),
        (
            ["--lengths", "1000", "100000000000", "2"],
            "1 x 100,000,000,000 tokens take",
        ),
    ],
)
def test_bad_input_is_an_error_and_writes_nothing(folder, more, message):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("")
    with pytest.raises((ConfigError, DataError, OSError, ValueError), match=message):
        run(folder, *(part.format(folder) for part in more))
    assert not (folder / "out").exists()


def test_settings_are_beside_the_scores(folder, monkeypatch):
    stand_in(monkeypatch)
    run(folder)
    known = json.loads((folder / "out" / "en_generate.json").read_text())
    assert known["dtype"] == "float32" and known["seed"] == 42
    assert [name for name, _ in known["haystack"]] == [f"{n:02}.txt" for n in range(12)]
