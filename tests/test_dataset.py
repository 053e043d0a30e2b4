import csv
import os
import random
import struct
import time
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from conftest import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from data import dataset
from data.dataset import DataError, Mixture, descend, huffman, permute
from data.mixture import read, run_of
from data.prepare import StreamWriter, write_mixture
from data.token_stream import HEADER, MAGIC


def shares(weights):
    total = sum(weights)
    return [w / total for w in weights]


def counts_at(tree, n):
    """Samples of each source among the first n, for an array of n: the tree, all at once."""
    if type(tree) is dataset.Leaf:
        return {tree.source: n}
    left = np.floor(tree.p * n + 0.5).astype(np.int64)
    return counts_at(tree.left, left) | counts_at(tree.right, n - left)


# --- which source


@settings(max_examples=20)
@given(st.lists(st.floats(-8, np.log10(0.05)), min_size=140, max_size=140))
def test_shares_of_140_sources_hold_at_every_prefix(exponents):
    weights = shares([10**e for e in exponents])
    tree = huffman(weights)
    far = 762_000_000
    for start in (0, far):
        n = np.arange(start, start + 20_000)
        for source, count in counts_at(tree, n).items():
            exact = weights[source] * n
            # within one sample of the nearest whole number of samples
            assert np.abs(count - np.rint(exact)).max() <= 1
            assert np.abs(count - exact).max() <= max(dataset._deviations(tree, 0.0).values())


def test_many_prefixes_are_within_one_sample():
    rng = random.Random(0)
    weights = shares([10 ** rng.uniform(-8, np.log10(0.05)) for _ in range(140)])
    worst = 0.0
    for start in (0, 762_000_000):
        n = np.arange(start, start + 50_000)
        for source, count in counts_at(huffman(weights), n).items():
            worst = max(worst, np.abs(count - weights[source] * n).max())
    print(f"largest deviation from the exact share: {worst:.3f} samples")
    assert worst <= 1


@given(st.lists(st.floats(1e-8, 1), min_size=1, max_size=30), st.integers(0, 2**40))
def test_descending_agrees_with_counting(weights, start):
    weights = shares(weights)
    tree = huffman(weights)
    counts = counts_at(tree, np.arange(start, start + 50))
    for k in range(49):
        source, rank = descend(tree, start + k)
        for other, count in counts.items():
            assert count[k + 1] - count[k] == (other == source)
        assert counts[source][k] == rank


@needs_shared
def test_the_published_mixture_is_within_its_stated_deviation():
    with open(SHARED / "lucie/mixture_pretraining.csv") as f:
        weights = shares([float(row["weight"]) for row in csv.DictReader(f)])
    tree = huffman(weights)
    bound = max(dataset._deviations(tree, 0.0).values())
    n = np.arange(761_644_586, 762_144_586)  # the end of the main phase
    worst = max(np.abs(c - weights[s] * n).max() for s, c in counts_at(tree, n).items())
    print(f"140 sources: deviation {worst:.3f} samples at the end, bound {bound:.3f}")
    assert worst <= bound < 1.3


def test_locating_a_late_sample_takes_microseconds(tmp_path):
    rng = random.Random(0)
    weights = {}
    for k in range(140):
        weights[f"s{k}"] = 10 ** rng.uniform(-8, np.log10(0.05))
        with StreamWriter(tmp_path / f"s{k}", 97) as stream:
            stream.add(np.zeros(rng.randint(100, 5000), np.int64))
    write_mixture(tmp_path / "mixture.csv", weights)
    mixture = Mixture(tmp_path / "mixture.csv", 8, 42, 97)
    started = time.perf_counter()
    for i in range(762_000_000, 762_000_000 + 2_000):
        mixture.locate(i)
    took = (time.perf_counter() - started) / 2_000
    print(f"sample 762,000,000 of 140 sources is located in {1e6 * took:.1f} microseconds")

    # What makes it fast: the mean path through the tree is within one of the entropy, as Huffman's
    # theorem has it, however many sources there are.
    def path(tree, depth=0):
        if type(tree) is dataset.Leaf:
            return depth * tree.weight
        return path(tree.left, depth + 1) + path(tree.right, depth + 1)

    entropy = -sum(w * np.log2(w) for w in mixture.weights)
    assert entropy <= path(mixture._tree) < entropy + 1 < 8


# --- which place in it


@given(st.integers(1, 400), st.text(max_size=8))
def test_permutation_visits_everything_once(length, key):
    assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


@given(st.integers(20, 10**12), st.integers(0, 10**6))
def test_permutation_is_another_for_every_epoch(length, epoch):
    first = [permute(i, length, f"42 a {epoch}") for i in range(20)]
    second = [permute(i, length, f"42 a {epoch + 1}") for i in range(20)]
    assert first != second
    assert all(0 <= i < length for i in first)


def test_permutation_scatters():
    """Neighbours end up unrelated: the mean jump of a random order is a third of the length."""
    image = np.array([permute(i, 10_000, "key") for i in range(10_000)])
    assert np.abs(np.diff(image)).mean() == pytest.approx(10_000 / 3, rel=0.05)
    assert abs(np.corrcoef(image, np.arange(10_000))[0, 1]) < 0.03


# --- samples


def test_each_epoch_reads_every_sample_once_in_a_new_order(tiny_data):
    mixture = Mixture(tiny_data / "mixture.csv", 7, 42, 97)
    orders = {}
    for i in range(2_000):
        s = mixture.locate(i)
        orders.setdefault((s.source, s.epoch), []).append(s.position)
    for source, length in enumerate(mixture.lengths):
        epochs = [o for (s, _), o in sorted(orders.items()) if s == source]
        assert len(epochs) >= 3
        for order in epochs[:-1]:
            assert sorted(order) == list(range(length))
        assert sorted(set(epochs[-1])) == sorted(epochs[-1])
        assert epochs[0] != epochs[1] != epochs[2]


def test_samples_tile_the_stream_and_targets_are_one_ahead(tiny_data):
    mixture = Mixture(tiny_data / "mixture.csv", 7, 42, 97)
    raw = [np.fromfile(tiny_data / f"{name}.bin", np.uint16) for name in mixture.names]
    inputs = {}
    for i in range(1_500):
        source, _, position = mixture.locate(i)
        sample = mixture[i]
        assert sample.dtype == np.int64 and sample.shape == (8,)
        assert np.array_equal(sample, raw[source][7 * position : 7 * position + 8])
        inputs[source, position] = sample[:-1]
    for source, length in enumerate(mixture.lengths):
        joined = np.concatenate([inputs[source, p] for p in range(length)])
        assert np.array_equal(joined, raw[source][: 7 * length])  # no token skipped or repeated
        assert len(raw[source]) - 7 * length <= 7  # but for less than a sample at the end


def test_a_sample_is_a_function_of_its_number_mixture_and_seed(tiny_data):
    a, b = (Mixture(tiny_data / "mixture.csv", 7, 42, 97) for _ in range(2))
    c = Mixture(tiny_data / "mixture.csv", 7, 43, 97)
    numbers = random.Random(0).sample(range(10**9), 50)
    assert all(np.array_equal(a[i], b[i]) for i in numbers)
    assert any(not np.array_equal(a[i], c[i]) for i in numbers)


def test_epochs_as_weights(tiny_data):
    (tiny_data / "e.csv").write_text("name,path,epochs\na,a,2\nb,b,1\n")
    mixture = Mixture(tiny_data / "e.csv", 7, 42, 97)
    tokens = [stream.tokens for stream in mixture.streams]
    share = 2 * tokens[0] / (2 * tokens[0] + tokens[1])
    assert mixture.weights == pytest.approx([share, 1 - share])
    seen = Counter(mixture.locate(i).source for i in range(1000))
    assert abs(seen[0] - 1000 * share) <= 1


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_memory_is_flat_over_random_reads_of_a_large_file(tmp_path):
    """2 GB of tokens, sparse on disk, read at 10,000 places."""
    count = 2**30
    with open(tmp_path / "big.bin", "wb") as f:
        f.truncate(2 * count)
    with open(tmp_path / "big.idx", "wb") as f:
        f.write(HEADER.pack(MAGIC, 1, 8, 1, 2))
        f.write(struct.pack("<iqqq", count, 0, 0, 1))
    (tmp_path / "m.csv").write_text("name,path,weight\nbig,big,1\n")
    mixture = Mixture(tmp_path / "m.csv", 4096, 42, 97)
    assert mixture.lengths == [(count - 1) // 4096]
    for i in range(100):
        mixture[i]
    before, grown = resident_kilobytes(), 0
    for i in range(10_000):
        mixture[i]
        if i % 500 == 499:
            grown = max(grown, resident_kilobytes() - before)
    print(f"10,000 samples of 2 GB: {grown} kB more resident memory")
    assert grown < 4_000


def resident_kilobytes():
    """Now, not at the highest: a leak below an earlier peak must show."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


# --- bad data


def bad(tmp_path, change, message):
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        mixture = Mixture(tmp_path / "mixture.csv", 7, 42, 97)
        for i in range(2_000):
            mixture[i]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: os.remove(d / "a.bin"), r"a\.bin: no such file"),
        (lambda d: os.remove(d / "b.idx"), r"b\.idx: no such file"),
        (lambda d: os.truncate(d / "a.bin", 100), r"a\.bin: truncated, 100 bytes"),
        (lambda d: os.truncate(d / "a.idx", 100), r"a\.idx: truncated"),
        (lambda d: os.truncate(d / "a.idx", 34 + 12 * 30 + 8), r"a\.idx: truncated"),
        (
            lambda d: (d / "a.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 0)),
            r"a\.idx: lists no documents",
        ),
        (lambda d: (d / "mixture.csv").write_bytes(b"name,path,weight\n\xff,a,1"), "UTF-8"),
        (lambda d: (d / "a.idx").write_bytes(b"PK" * 40), r"a\.idx: not an index"),
        (lambda d: os.remove(d / "mixture.csv"), r"mixture\.csv: No such file"),
        (lambda d: (d / "mixture.csv").write_text("name,path\na,a\n"), "weight or epochs"),
        (lambda d: (d / "mixture.csv").write_text("name,path,weight\na,a,-1\n"), "line 2"),
        (lambda d: (d / "mixture.csv").write_text("name,path,weight\na,a,x\n"), "line 2"),
        (lambda d: (d / "mixture.csv").write_text("name,path,weight\n"), "columns"),
        (lambda d: (d / "mixture.csv").write_text("name,path,weight\na,a,0\n"), "at least one"),
        (
            lambda d: (d / "mixture.csv").write_text("name,path,weight\na,a,1\na,b,1\n"),
            "name of its own",
        ),
    ],
)
def test_bad_data_is_named(tiny_data, change, message):
    bad(tiny_data, change, message)


def test_an_id_past_the_vocabulary_names_file_and_place(tiny_data):
    tokens = np.fromfile(tiny_data / "b.bin", np.uint16)
    tokens[123] = 97
    tokens.tofile(tiny_data / "b.bin")
    bad(tiny_data, lambda d: None, r"b\.bin: token 123 has id 97, past the vocabulary of 97")


TOO_SHORT = r"a\.bin: 7 tokens are too few .* of 7 .*: take its row out of .*/mixture\.csv$"


def test_a_stream_too_short_for_a_sample(tiny_data):
    with StreamWriter(tiny_data / "a", 97) as stream:
        stream.add(np.zeros(7, np.int64))
    bad(tiny_data, lambda d: None, TOO_SHORT)
    with StreamWriter(tiny_data / "a", 97) as stream:
        stream.add(np.zeros(8, np.int64))
    assert Mixture(tiny_data / "mixture.csv", 7, 42, 97).lengths[0] == 1


def test_a_file_that_shrinks_under_a_run_is_an_error(tiny_data):
    mixture = Mixture(tiny_data / "mixture.csv", 7, 42, 97)
    os.truncate(tiny_data / "a.bin", 10)
    with pytest.raises(DataError, match=r"a\.bin: truncated after \d+ tokens"):
        for i in range(2_000):
            mixture[i]
    os.remove(tiny_data / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: No such file"):
        for i in range(2_000):
            mixture[i]


def test_fingerprint_is_of_what_decides_the_samples(tiny_data):
    def fingerprint():
        return Mixture(tiny_data / "mixture.csv", 7, 42, 97).fingerprint()

    first = fingerprint()
    write_mixture(tiny_data / "mixture.csv", {"a": 7, "b": 3})  # the same shares
    assert fingerprint() == first
    write_mixture(tiny_data / "mixture.csv", {"a": 0.6, "b": 0.4})
    assert fingerprint() != first
    write_mixture(tiny_data / "mixture.csv", {"a": 0.7, "b": 0.3})
    with StreamWriter(tiny_data / "a", 97) as stream:
        stream.add(np.zeros(500, np.int64))
    assert fingerprint() != first


# --- the published mixtures


def published(name):
    with open(f"data/mixtures/{name}.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_published_mixtures():
    main, extension, annealing = map(published, ("pretraining", "extension", "annealing"))
    assert (len(main), len(annealing)) == (140, 14)
    languages = Counter()
    for row in main:
        kind = "parallel" if row["category"] == "aligned" else row["language"]
        languages[kind] += 100 * float(row["weight"])
    shares = {"en": 33.19, "fr": 32.35, "code": 14.67, "de": 6.90, "es": 6.62, "it": 3.77}
    for language, share in (shares | {"parallel": 2.49}).items():
        assert languages[language] == pytest.approx(share, abs=0.01)
    for rows in (main, extension, annealing):
        assert len({row["name"] for row in rows}) == len({row["path"] for row in rows}) == len(rows)
    assert sum(float(row["weight"]) for row in main) == pytest.approx(1)
    assert sum(float(row["weight"]) for row in extension) == pytest.approx(1)
    # The extension changes lengths, not languages: each keeps its share of the main phase.
    of_language = Counter()
    for row in extension:
        kind = "parallel" if row["category"] == "aligned" else row["language"]
        of_language[kind] += 100 * float(row["weight"])
    assert of_language == pytest.approx(languages)


# --- sources read in the order of their files; sources that are not there


def test_a_source_in_the_order_of_its_file(tiny_data):
    (tiny_data / "m.csv").write_text("name,path,weight,order\na,a,0.7,file\nb,b,0.3,shuffled\n")
    ordered = Mixture(tiny_data / "m.csv", 7, 42, 97)
    shuffled = Mixture(tiny_data / "mixture.csv", 7, 42, 97)
    found = [ordered.locate(i) for i in range(1_000)]
    of_a = [sample for sample in found if sample.source == 0]
    length = ordered.lengths[0]
    assert len(of_a) > 3 * length
    for rank, sample in enumerate(of_a):  # first to last, epoch after epoch
        assert (sample.epoch, sample.position) == (rank // length, rank % length)
    # everything else is as it was
    for ours, theirs in zip(found, map(shuffled.locate, range(1_000))):
        assert (ours.source, ours.epoch) == (theirs.source, theirs.epoch)
        assert ours.source == 0 or ours == theirs
    assert ordered.fingerprint() != shuffled.fingerprint()
    for order in ("shuffled", ""):
        (tiny_data / "m.csv").write_text(f"name,path,weight,order\na,a,0.7,{order}\nb,b,0.3,\n")
        assert Mixture(tiny_data / "m.csv", 7, 42, 97).fingerprint() == shuffled.fingerprint()


def test_an_order_that_is_unknown(tiny_data):
    text = "name,path,weight,order\na,a,0.7,years\nb,b,0.3,\n"
    bad(tiny_data, lambda d: (d / "mixture.csv").write_text(text), "line 2: order is shuffled or")


def test_a_partial_mixture_is_that_of_the_sources_that_are_there(tiny_data):
    text = "name,path,weight\na,a,2\nb,b,1\nc,none/c,5\nd,d,2\n"
    (tiny_data / "m.csv").write_text(text)
    (tiny_data / "d.idx").write_bytes((tiny_data / "a.idx").read_bytes())  # and no tokens
    with pytest.raises(DataError, match=r"m\.csv: 2 of 4 sources lack files: c, d \("):
        Mixture(tiny_data / "m.csv", 7, 42, 97)
    partial = Mixture(tiny_data / "m.csv", 7, 42, 97, partial=True)
    assert partial.names == ["a", "b"] and partial.missing == ["c", "d"]
    (tiny_data / "rest.csv").write_text("name,path,weight\na,a,2\nb,b,1\n")
    rest = Mixture(tiny_data / "rest.csv", 7, 42, 97)
    assert partial.weights == rest.weights == pytest.approx([2 / 3, 1 / 3])
    assert all(partial.locate(i) == rest.locate(i) for i in range(500))
    # Once they are there it is another mixture, and with partial no other than without.
    for name in ("c", "d"):
        with StreamWriter(tiny_data / ("none/c" if name == "c" else name), 97) as stream:
            stream.add(np.zeros(50, np.int64))
    full = Mixture(tiny_data / "m.csv", 7, 42, 97)
    assert full.fingerprint() != partial.fingerprint()
    again = Mixture(tiny_data / "m.csv", 7, 42, 97, partial=True)
    assert again.fingerprint() == full.fingerprint() and again.missing == []


def test_partial_needs_one_source_and_forgives_no_broken_one(tiny_data):
    os.truncate(tiny_data / "b.bin", 10)
    with pytest.raises(DataError, match=r"b\.bin: truncated"):
        Mixture(tiny_data / "mixture.csv", 7, 42, 97, partial=True)
    for name in ("a.bin", "b.idx"):
        os.remove(tiny_data / name)
    with pytest.raises(DataError, match=r"2 of 2 sources lack files: a, b"):
        Mixture(tiny_data / "mixture.csv", 7, 42, 97, partial=True)


def test_counts_drawn_are_those_of_the_tree():
    rng = random.Random(1)
    tree = huffman(shares([10 ** rng.uniform(-8, -1) for _ in range(140)]))
    for n in (0, 1, 12_345, 762_144_586, 2**40):
        expected = {k: int(c) for k, c in counts_at(tree, np.array(n)).items()}
        assert dataset.drawn(tree, n) == expected and sum(expected.values()) == n


# --- series


@pytest.fixture(scope="module")
def seven_streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    rng = np.random.default_rng(0)
    for k in range(7):
        with StreamWriter(folder / f"s{k}", 97) as stream:
            stream.add(rng.integers(0, 97, 20 * (k + 1) ** 2))
    return folder


def write_series(folder, rows):
    """rows: (stream, weight, series, order)"""
    lines = [f"s{k},s{k},{weight!r},{series},{order}" for k, weight, series, order in rows]
    (folder / "m.csv").write_text("\n".join(["name,path,weight,series,order", *lines]) + "\n")
    return folder / "m.csv"


@settings(max_examples=40)
@given(
    st.permutations(range(7)),
    st.lists(st.floats(1e-3, 1), min_size=7, max_size=7),
    st.lists(st.sampled_from(["", "x", "y"]), min_size=7, max_size=7),
    st.lists(st.sampled_from(["", "file"]), min_size=7, max_size=7),
    st.integers(1, 1500),
)
def test_a_series_takes_turns_and_every_row_gets_its_share(
    seven_streams, order, weights, series, orders, samples
):
    rows = list(zip(order, weights, series, orders))
    path = write_series(seven_streams, rows)
    mixture = Mixture(path, 7, 42, 97, samples=samples)
    found = [mixture.locate(i) for i in range(samples)]
    numbers = random.Random(0).sample(range(samples), min(samples, 40))
    again = Mixture(path, 7, 42, 97, samples=samples)
    assert [again.locate(i) for i in numbers] == [found[i] for i in numbers]  # in any order
    counts = Counter(sample.source for sample in found)
    for k in range(7):
        assert abs(counts[k] - mixture.weights[k] * samples) <= mixture.deviation() + 1
    assert [drawn.samples for drawn in run_of(read(path), samples, 7)] == [
        counts[k] for k in range(7)
    ]
    for name in set(series) - {""}:
        members = [k for k in range(7) if series[k] == name]
        met = [k for k, _ in groupby(s.source for s in found if s.source in members)]
        assert met == sorted(met) and len(met) == len(set(met))  # one after the other, once each
        # and as evenly over the run as a single source
        share, seen = sum(mixture.weights[k] for k in members), 0
        for n, sample in enumerate(found, start=1):
            seen += sample.source in members
            assert abs(seen - share * n) <= mixture.deviation()
    # Within its turn a row is what it would be alone: epoch after epoch, in its own order.
    for k in range(7):
        path = write_series(seven_streams, [(rows[k][0], 1.0, "", rows[k][3])])
        alone = Mixture(path, 7, 42, 97)
        mine = [sample for sample in found if sample.source == k]
        assert mine == [alone.locate(i)._replace(source=k) for i in range(len(mine))]


def test_after_the_run_the_last_of_a_series_goes_on(seven_streams):
    path = write_series(seven_streams, [(3, 0.5, "x", "file"), (5, 0.5, "x", "file")])
    mixture = Mixture(path, 7, 42, 97, samples=10)
    assert [mixture.locate(i).source for i in range(12)] == [0] * 5 + [1] * 7
    assert [mixture.locate(i).position for i in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]


def test_a_row_too_light_for_a_sample_has_no_turn(seven_streams):
    path = write_series(seven_streams, [(1, 1e-3, "x", ""), (2, 1.0, "x", ""), (3, 1e-3, "x", "")])
    mixture = Mixture(path, 7, 42, 97, samples=10)
    assert {mixture.locate(i).source for i in range(10)} == {1}
    mixture = Mixture(path, 7, 42, 97, samples=1002)
    assert [mixture.locate(i).source for i in (0, 1, 1000, 1001)] == [0, 1, 1, 2]


def test_the_turns_of_a_series_need_the_length_of_the_run(seven_streams):
    rows = [(1, 0.4, "x", ""), (2, 0.3, "x", ""), (3, 0.3, "", "")]
    path = write_series(seven_streams, rows)
    with pytest.raises(DataError, match=r"m\.csv: the turns of its series depend on --samples"):
        Mixture(path, 7, 42, 97)
    prints = {Mixture(path, 7, 42, 97, samples=n).fingerprint() for n in (50, 100, 100)}
    assert len(prints) == 2
    path = write_series(seven_streams, [row[:2] + ("", "") for row in rows])
    prints |= {Mixture(path, 7, 42, 97, samples=n).fingerprint() for n in (0, 50, 100)}
    assert len(prints) == 3  # without a series the length of the run is no matter
    alone = Mixture(write_series(seven_streams, rows[:1] + rows[2:]), 7, 42, 97)  # a series of one
    assert {alone.locate(i).source for i in range(9)} == {0, 1}


def test_the_years_of_the_web_ascend_in_the_mixture_by_year():
    by_year, main = published("pretraining_by_year"), published("pretraining")
    series = [row.pop("series") for row in by_year]
    assert sorted(map(str, by_year)) == sorted(map(str, main))  # the same but for order and series
    web = [
        name.startswith(("RedPajama--", "FineWebEdu--")) for name in (r["name"] for r in by_year)
    ]
    assert sum(web) == 25 and [bool(name) for name in series] == web
    for name in set(series) - {""}:
        names = [row["name"] for row, of in zip(by_year, series) if of == name]
        years = [int(text.removeprefix(name).lstrip("-")) for text in names]
        assert years == sorted(years) and len(years) >= 3
    assert len(set(series) - {""}) == 5
