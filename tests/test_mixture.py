"""Shares, epochs and warnings of a mixture, against the published figures and against counting."""

import csv
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared

from data import mixture
from data.dataset import DataError, Mixture
from data.mixture import read, run_of, shares

SAMPLES, SEQ_LEN = 762_144_586, 4096
MODEL_CARD = {
    "en": "33.2", "fr": "32.4", "de": "6.9", "es": "6.6", "it": "3.8", "parallel": "2.5",
    "code": "14.7",
}  # fmt: skip


def published(name):
    with open(SHARED / f"lucie/{name}.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def show(capsys, *args):
    """Lines of stdout."""
    mixture.main(["show", *map(str, args)])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["pretraining", "pretraining_by_year", "extension"])
def test_shares_by_language_are_the_model_cards_to_the_printed_digit(name, capsys):
    found = shares(read(f"data/mixtures/{name}.csv"), "language")
    assert {kind: f"{100 * after:.1f}" for kind, (_, after) in found.items()} == MODEL_CARD
    lines = show(capsys, f"data/mixtures/{name}.csv")
    printed = {line.split()[0]: line.split()[-2] for line in lines if line.endswith(" %")}
    assert MODEL_CARD.items() <= printed.items()


@needs_shared
@pytest.mark.parametrize("column", ["language", "category"])
def test_shares_before_and_after_upsampling(column):
    """From the published tokens and epochs in exact fractions; our weights are not looked at."""
    before, after = Counter(), Counter()
    for row in published("mixture_pretraining"):
        kind = row[column]
        if column == "language" and "-" in kind:
            kind = "parallel"
        before[kind] += int(row["tokens"])
        after[kind] += int(row["tokens"]) * Fraction(row["epochs"])
    found = shares(read("data/mixtures/pretraining.csv"), column)
    assert found.keys() == before.keys()
    for kind, (ours_before, ours_after) in found.items():
        assert ours_before == pytest.approx(float(Fraction(before[kind], before.total())), rel=1e-9)
        assert ours_after == pytest.approx(float(after[kind] / after.total()), rel=1e-6)
    assert list(found.values()) == sorted(found.values(), key=lambda pair: -pair[1])


@needs_shared
def test_the_published_columns_are_in_the_mixtures():
    def rows(name):
        with open(f"data/mixtures/{name}.csv", encoding="utf-8", newline="") as f:
            return list(csv.DictReader(f))

    columns = ("language", "category", "tokens", "documents", "epochs")
    main = {row["name"]: row for row in published("mixture_pretraining")}
    ours = rows("pretraining")
    assert len(ours) == len(main) == 140
    for row in ours:
        assert all(row[c] == main[row["name"]][c] for c in (*columns, "weight"))
    parts = {
        f"{row['name']}--{kind}": row
        for kind in ("long", "short")
        for row in published(f"mixture_documents_{kind}")
    }
    ours = rows("extension")
    assert len(ours) == len(parts) == 227
    assert all(row[c] == parts[row["name"]][c] for row in ours for c in columns)
    weights = {row["name"]: float(row["weight"]) for row in published("mixture_annealing")}
    ours = rows("annealing")
    assert {row["name"]: float(row["weight"]) for row in ours} == weights
    for row in ours:
        assert row["language"] and row["category"]
        for column in ("tokens", "documents"):  # epochs are not published
            assert row[column] == (main[row["name"]][column] if row["name"] in main else "")
    assert sum(row["name"] in main for row in ours) == 6


BELOW_500_SAMPLES = {  # a whole sample is over 0.1 % of these; they are all dialogues
    *("Claire--fr--PFC Claire--fr--FREDSum Claire--fr--CLAPI Claire--fr--CID").split(),
    *("Claire--fr--LINAGORA Stac Claire--fr--ACSYNT Claire--fr--OTG Claire--fr--Rhapsodie").split(),
    *("Claire--fr--ParisStories Claire--fr--UBS").split(),
}


@needs_shared
@pytest.mark.parametrize("name", ["pretraining", "pretraining_by_year"])
def test_the_full_run_sees_each_source_its_published_epochs(name):
    """762,144,586 samples by arithmetic: within 0.1 %, or within the sample that cannot be cut."""
    sources = read(f"data/mixtures/{name}.csv")
    epochs = {row["name"]: float(row["epochs"]) for row in published("mixture_pretraining")}
    assert len(sources) == len(epochs) == 140
    taken = run_of(sources, SAMPLES, SEQ_LEN)
    assert sum(drawn.samples for drawn in taken) == SAMPLES
    others = set()
    for source, drawn in zip(sources, taken):
        exact = source.weight * SAMPLES * SEQ_LEN / source.tokens  # were samples divisible
        assert exact == pytest.approx(epochs[source.name], rel=1e-8)
        assert drawn.epochs == drawn.samples * SEQ_LEN / source.tokens
        samples = epochs[source.name] * source.tokens / SEQ_LEN
        assert drawn.samples == pytest.approx(samples, abs=1)
        if drawn.epochs != pytest.approx(epochs[source.name], rel=1e-3):
            others.add(source.name)
            assert samples < 500
    assert others == BELOW_500_SAMPLES


def test_counts_by_arithmetic_are_counts_by_looking(tiny_data):
    mix = Mixture(tiny_data / "mixture.csv", 7, 42, 97)
    for n in (0, 1, 2, 999, 1000):
        seen = Counter(mix.locate(i).source for i in range(n))
        taken = run_of(read(tiny_data / "mixture.csv"), n, 7)
        assert [drawn.samples for drawn in taken] == [seen[k] for k in range(2)]


def write(folder, text):
    (folder / "m.csv").write_text(text)
    return folder / "m.csv"


def test_sizes_are_those_of_the_streams_and_else_of_the_csv(tiny_data, capsys):
    path = write(tiny_data, "name,path,weight,tokens\na,a,1,5\nb,b,1,5\nc,c,2,123\nd,d,1,\n")
    (tiny_data / "c.idx").write_bytes((tiny_data / "a.idx").read_bytes())  # half a stream is none
    streams = Mixture(tiny_data / "mixture.csv", 7, 42, 97).streams
    sources = read(path)
    assert [s.tokens for s in sources] == [*(stream.tokens for stream in streams), 123, None]
    assert [s.on_disk for s in sources] == [True, True, False, False]
    assert [s.weight for s in sources] == [0.2, 0.2, 0.4, 0.2]
    assert [drawn.epochs is None for drawn in run_of(sources, 100, 7)] == [False] * 3 + [True]
    lines = show(capsys, path, "--samples", 100)
    assert "without files, 2 of 4: c, d" in lines
    assert "of unknown size (no files, no column tokens): d" in lines
    left = read(path, partial=True)
    assert [(s.name, s.weight) for s in left] == [("a", 0.5), ("b", 0.5)]
    assert not any("without files" in line for line in show(capsys, path, "--partial"))


def test_a_series_is_shown_with_what_its_rows_take(tmp_path, capsys):
    path = write(
        tmp_path,
        "name,path,weight,tokens,series\na,a,1,1000,x\nb,b,2,1000,\nc,c,3,1000,x\nd,d,2,1000,y\n",
    )
    assert [drawn.samples for drawn in run_of(read(path), 800, 10)] == [100, 200, 300, 200]
    lines = show(capsys, path)
    assert [x for x in lines if x.startswith("one after")] == ["one after the other: a, c"]


def test_training_gives_a_series_the_length_of_the_run(tiny_data):
    import train
    from config import Config

    path = str(write(tiny_data, "name,path,weight,series\na,a,1,x\nb,b,3,x\n"))
    options = {"mixture": path, "seq_len": 7, "vocab_size": 97, "samples": 100}
    found, held_out = train.open_data(
        Config(**options, validation=path, eval_samples=8, micro_batch_size=8), 0, 1
    )
    assert [found.locate(i).source for i in range(100)] == [0] * 25 + [1] * 75
    # and what is held out the length of the validation
    both = Mixture(path, 7, 42, 97, samples=8)
    assert [both.locate(i).source for i in range(8)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert held_out.batches[0][0].tolist() == [both[i][:-1].tolist() for i in range(8)]


def test_weights_as_epochs_of_sources_that_are_not_there(tmp_path):
    path = write(tmp_path, "name,path,epochs,tokens\na,a,3,1000\nb,b,1,2000\n")
    assert [source.weight for source in read(path)] == [0.6, 0.4]
    # 3 epochs of a and 1 of b are 5,000 tokens
    assert [drawn.epochs for drawn in run_of(read(path), 500, 10)] == [3, 1]
    path = write(tmp_path, "name,path,epochs\na,a,3\n")
    with pytest.raises(DataError, match="a has epochs but neither files nor"):
        read(path)


def test_a_source_seen_over_four_times_is_warned_of(tmp_path, capsys):
    path = write(tmp_path, "name,path,weight,tokens\na,a,1,1000\nb,b,1,999\n")
    for samples, expected in ((800, ["warning: b is seen 4.0 times"]), (790, [])):
        lines = show(capsys, path, "--samples", samples, "--seq_len", 10)
        assert [line for line in lines if "warning" in line] == expected


def test_parallel_texts_are_a_language_of_their_own(tmp_path):
    path = write(
        tmp_path,
        "name,path,weight,language,category,tokens\na,a,1,fr-en,aligned,5\nb,b,3,en,web,15\n"
        "c,c,4,,,0\n",
    )
    found = shares(read(path), "language")
    assert found == {"unknown": (0, 0.5), "en": (0.75, 0.375), "parallel": (0.25, 0.125)}
    path.write_text(path.read_text().replace(",0\n", ",\n"))
    assert shares(read(path), "category")["web"] == (None, 0.375)


def test_the_charts(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    png = tmp_path / "new/chart.png"
    assert show(capsys, "data/mixtures/pretraining.csv", "--png", png)[-1] == str(png)
    from matplotlib.image import imread

    image = imread(png)
    assert image.shape[:2] == (720, 1560)
    # The two largest slices of the first pie and their legend: blue in a third of its circle.
    blue = (abs(image[..., :3] - (0.122, 0.467, 0.706)).max(axis=-1) < 0.02).sum(axis=0)
    disc = (image[..., :3].min(axis=-1) < 0.99).sum(axis=0)
    half = 520  # pixels from the left, past the first pie and before its legend
    assert blue[:half].sum() / disc[:half].sum() == pytest.approx(0.332, abs=0.02)


@pytest.mark.parametrize(
    "text, said",
    [
        ("name,path,weight,tokens\na,a,1,many\n", "'many' tokens"),
        ("name,path,epochs,tokens\na,a,1,0\n", "no tokens"),
        ("name,path\na,a\n", "weight or epochs"),
    ],
)
def test_what_cannot_be_shown_says_so_in_one_line(tmp_path, text, said):
    with pytest.raises(DataError, match=said) as error:
        mixture.main(["show", str(write(tmp_path, text))])
    assert "\n" not in str(error.value)


def test_partial_of_nothing_says_what_is_not_there(tmp_path):
    published = tmp_path / "annealing.csv"
    published.write_bytes(Path("data/mixtures/annealing.csv").read_bytes())
    with pytest.raises(DataError, match=r"14 of 14 sources lack files: OpenWeb.*PeS2o.* 9 more"):
        mixture.main(["show", str(published), "--partial"])


def test_training_on_what_is_there(tiny_data):
    import train
    from config import Config

    path = str(write(tiny_data, "name,path,weight\na,a,7\nb,b,3\nc,c,90\n"))
    options = {"mixture": path, "seq_len": 7, "vocab_size": 97}
    with pytest.raises(DataError, match="sources lack files: c"):
        train.open_data(Config(**options), 0, 1)
    found, _ = train.open_data(Config(**options, partial=True), 0, 1)
    assert found.names == ["a", "b"] and found.weights == pytest.approx([0.7, 0.3])
    assert found.missing == ["c"]
