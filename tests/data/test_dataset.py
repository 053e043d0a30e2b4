"""Which samples a mixture has, and that they are read from disk or from a store as they are."""

import os
import random
import struct
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import write_stream, write_weights
from hypothesis import given
from hypothesis import strategies as st

from data import dataset
from data.dataset import BOS, HEADER, IGNORE, MAGIC, DataError, Leaf, Mixture, TokenStream
from data.inspect import index_faults

# --- which source


def normalized(weights):
    return [weight / sum(weights) for weight in weights]


def counts_at(tree, n):
    """Samples of each source among the first n, for an array of n, by the rule for each node."""
    if type(tree) is Leaf:
        return {tree.source: n}
    left = np.floor(tree.p * n + 0.5).astype(np.int64)
    return counts_at(tree.left, left) | counts_at(tree.right, n - left)


def bounds(tree, at_node):
    """How far each source may be from its share: a part of its parent's deviation, and a half."""
    if type(tree) is Leaf:
        return [at_node]
    left = bounds(tree.left, tree.p * at_node + 0.5)
    return left + bounds(tree.right, (1 - tree.p) * at_node + 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_shares_of_140_sources_hold_at_every_prefix(seed):
    rng = random.Random(seed)
    weights = normalized([10 ** rng.uniform(-8, np.log10(0.05)) for _ in range(140)])
    tree, worst = dataset.huffman(weights), 0.0
    for start in (0, 762_000_000):
        n = np.arange(start, start + 50_000)
        for source, count in counts_at(tree, n).items():
            exact = weights[source] * n
            assert np.abs(count - np.rint(exact)).max() <= 1
            worst = max(worst, np.abs(count - exact).max())
    print(f"largest deviation from the exact share: {worst:.3f} samples")
    assert worst <= max(bounds(tree, 0.0)) < 1.5


@given(st.lists(st.floats(1e-8, 1), min_size=1, max_size=30), st.integers(0, 2**40))
def test_descending_the_tree_agrees_with_counting(weights, start):
    tree = dataset.huffman(normalized(weights))
    counts = counts_at(tree, np.arange(start, start + 50))
    for k in range(49):
        source, rank = dataset.descend(tree, start + k)
        assert rank == counts[source][k]
        for other, count in counts.items():
            assert count[k + 1] - count[k] == (other == source)
    assert dataset.drawn(tree, start) == {source: count[0] for source, count in counts.items()}


# --- which place in the source


@given(st.integers(1, 300), st.text(max_size=8))
def test_a_permutation_visits_everything_once(length, key):
    assert sorted(dataset.permute(i, length, key) for i in range(length)) == list(range(length))


# --- samples


def mixture_of(folder, name="mixture", **options):
    return Mixture(folder / f"{name}.csv", 7, 42, 97, **options)


def test_each_epoch_reads_every_sample_once_and_samples_tile_the_stream(tiny_data):
    for name, count in (("b", 7 * 20), ("c", 7 * 20 + 1)):  # the last token is only a target
        write_stream(tiny_data / name, [np.arange(count) % 97], 97)
    rows = "name,path,epochs\na,a,4\nb,b,3.5\nc,c,20\n"
    # Excel begins a file with a byte order mark.
    (tiny_data / "m.csv").write_text(rows, encoding="utf-8-sig")
    mixture = mixture_of(tiny_data, "m")
    raw = [np.fromfile(tiny_data / f"{name}.bin", np.uint16) for name in mixture.names]
    tokens = [epochs * len(stream) for epochs, stream in zip((4, 3.5, 20), raw)]
    assert mixture.weights == pytest.approx(normalized(tokens))
    orders, inputs = {}, {}
    for i in range(int(sum(tokens)) // 7):
        (source, epoch, position), sample = mixture.locate(i), mixture[i]
        assert sample.dtype == np.int64 and sample.shape == (8,)
        assert np.array_equal(sample, raw[source][7 * position : 7 * position + 8])
        orders.setdefault((source, epoch), []).append(position)
        inputs[source, position] = sample[:-1]
    for source, length in enumerate(mixture.lengths):
        epochs = [order for (of, _), order in sorted(orders.items()) if of == source]
        assert len(epochs) >= 3
        assert all(sorted(order) == list(range(length)) for order in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1] != epochs[2]
        joined = np.concatenate([inputs[source, p] for p in range(length)])
        assert np.array_equal(joined, raw[source][: 7 * length])  # no token is skipped or repeated
        assert len(raw[source]) - 7 * length <= 7
    (tiny_data / "m.csv").write_text(rows.replace("20", "21"))
    assert mixture_of(tiny_data, "m").fingerprint() != mixture.fingerprint()


# A run that is resumed must read the samples that it would have read, so these never change.
PUBLISHED = {
    "pretraining": (
        4096,
        {0: (4, 0, 18186371), 1: (36, 0, 1548941), 762_000_000: (25, 1, 4863831)},
        "1d623d3bd3c19aceedfe5df21e383d56f35e52ff2790e1709d33f78a139c5d81",
    ),
    "extension": (  # one source is too small for samples of 32,000
        1024,
        {0: (4, 0, 1134017), 1: (18, 0, 10670737), 40_000: (28, 0, 10851058)},
        "d5056ac8761722d19c9afed6bd8ff25bc51fe7c192441f3e425d1e40961b1fc9",
    ),
    "annealing": (  # a billion tokens where no size is published
        32_000,
        {0: (0, 0, 20265), 1: (12, 0, 28860), 40_000: (0, 0, 16073)},
        "8ab7f08fab0bb7021f65e916b4c98726cadbb0db0ccaaeefccd6b89fa4206bcb",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_samples_of_the_published_mixtures_are_what_they_were(name, monkeypatch):
    path = f"data/mixtures/{name}.csv"
    tokens = {row["path"]: int(row["tokens"] or 10**9) for row in dataset.read_rows(path)}

    class Published:  # in the place of terabytes
        def __init__(self, path):
            self.tokens = tokens[path]

    monkeypatch.setattr(dataset, "TokenStream", Published)
    monkeypatch.setattr(dataset, "size_of", lambda file: 0)
    seq_len, samples, fingerprint = PUBLISHED[name]
    mixture = Mixture(path, seq_len, 42, 65_024)
    assert {i: mixture.locate(i) for i in samples} == samples
    assert mixture.fingerprint() == fingerprint
    assert max(bounds(dataset.huffman(mixture.weights), 0.0)) < 1.25


def resident_kilobytes():
    """What is resident now: the maximum would hide a leak below an earlier peak."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_memory_is_flat_over_random_reads_of_a_large_file(tmp_path):
    count = 2**30  # tokens: 2 GB, which take no room on disk
    with open(tmp_path / "big.bin", "wb") as f:
        f.truncate(2 * count)
    index = HEADER.pack(MAGIC, 1, 8, 1, 2) + struct.pack("<iqqq", count, 0, 0, 1)
    (tmp_path / "big.idx").write_bytes(index)
    write_weights(tmp_path / "m.csv", {"big": 1})
    mixture = Mixture(tmp_path / "m.csv", 4096, 42, 97)
    for i in range(100):
        mixture[i]
    before, grown = resident_kilobytes(), 0
    for i in range(10_000):
        mixture[i]
        if i % 500 == 499:
            grown = max(grown, resident_kilobytes() - before)
    print(f"10,000 samples of 2 GB: {grown} kB more resident memory")
    assert grown < 4_000


# --- bad data


def write_ids(path, dtype, wrong):
    ids = np.where(np.arange(500) == 123, wrong, 0).astype(dtype)
    write_stream(path, [ids], 97 if dtype is np.uint16 else 2**17)


def write_rows(folder, *lines):
    (folder / "mixture.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: os.remove(d / "a.bin"), r"mixture\.csv: 1 of 2 sources lack files: a \("),
        (lambda d: os.truncate(d / "a.bin", 100), r"a\.bin: truncated, 100 bytes"),
        (lambda d: os.truncate(d / "a.idx", 34 + 12 * 30 + 8), r"a\.idx: truncated"),
        (lambda d: (d / "a.idx").write_bytes(b"PK" * 40), r"a\.idx: not an index"),
        (lambda d: (d / "a.idx").write_bytes(HEADER.pack(MAGIC, 1, 7, 0, 1)), "type 7 is not"),
        (lambda d: write_stream(d / "a", [np.zeros(7)], 97), r"a\.bin: 7 tokens .* take its row"),
        (lambda d: write_ids(d / "b", np.uint16, 97), r"b\.bin: token 123 has id 97, past .* 97"),
        (lambda d: write_ids(d / "b", np.int32, -1), r"b\.bin: token 123 has id -1, past .* 97"),
        (lambda d: os.remove(d / "mixture.csv"), r"mixture\.csv: No such file"),
        (lambda d: (d / "mixture.csv").write_bytes(b"name,path,weight\n\xff,a,1"), "UTF-8"),
        (lambda d: write_rows(d, "name,path", "a,a"), "weight or epochs"),
        (lambda d: write_rows(d, "name,path,weight", "a,a,1", "b,b,x"), "line 3"),
        (lambda d: write_rows(d, "name,path,weight", "a,a,1", "a,b,1"), "name of its own"),
        (lambda d: write_rows(d, "name,path,weight", "a,nowhere://a,1"), r"^nowhere://a\.idx: "),
    ],
)
def test_bad_data_is_named_in_one_line(tiny_data, change, message):
    change(tiny_data)
    with pytest.raises(DataError, match=message) as error:
        mixture = mixture_of(tiny_data)
        for i in range(2_000):
            mixture[i]
    assert "\n" not in str(error.value)


def test_a_partial_mixture_is_that_of_the_sources_that_are_there(tiny_data):
    (tiny_data / "m.csv").write_text("name,path,weight\na,a,7\nb,b,3\nc,none/c,5\nd,d,2\n")
    (tiny_data / "d.idx").write_bytes((tiny_data / "a.idx").read_bytes())  # without its tokens
    with pytest.raises(DataError, match=r"m\.csv: 2 of 4 sources lack files: c, d \("):
        mixture_of(tiny_data, "m")
    left, rest = mixture_of(tiny_data, "m", partial=True), mixture_of(tiny_data)
    assert left.names == ["a", "b"] and left.missing == ["c", "d"]
    assert left.weights == pytest.approx([0.7, 0.3])
    assert all(left.locate(i) == rest.locate(i) for i in range(500))
    os.truncate(tiny_data / "b.bin", 10)
    with pytest.raises(DataError, match=r"b\.bin: truncated"):  # a broken source is not forgiven
        mixture_of(tiny_data, "m", partial=True)


# --- the format, by writers that are not ours


def write_from_the_description(path, documents, code, dtype):
    """Byte by byte, as Megatron documents it. A document is a list of sequences."""
    sequences = [*chain(*documents)]
    lengths = [len(sequence) for sequence in sequences]
    offsets = [np.dtype(dtype).itemsize * sum(lengths[:k]) for k in range(len(lengths))]
    boundaries = [sum(map(len, documents[:k])) for k in range(len(documents) + 1)]
    with open(f"{path}.bin", "wb") as f:
        for sequence in sequences:
            f.write(np.array(sequence, dtype).tobytes())
    with open(f"{path}.idx", "wb") as f:
        f.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code))
        f.write(struct.pack("<QQ", len(sequences), len(documents) + 1))
        f.write(struct.pack(f"<{len(lengths)}i", *lengths))
        f.write(struct.pack(f"<{len(offsets)}q", *offsets))
        f.write(struct.pack(f"<{len(boundaries)}q", *boundaries))


def random_documents(vocab_size):
    """Lists of sequences, some of which are empty."""
    rng = np.random.default_rng(0)
    sizes = [[rng.integers(0, 40) for _ in range(rng.integers(1, 5))] for _ in range(30)]
    return [[rng.integers(0, vocab_size, size).tolist() for size in part] for part in sizes]


@pytest.mark.parametrize(
    "code, dtype, vocab_size",
    [(8, np.uint16, 65_024), (4, np.int32, 128_256), (5, np.int64, 2**40)]
    + [(1, np.uint8, 256), (2, np.int8, 128), (3, np.int16, 2**15)],
)
def test_streams_written_from_the_description(tmp_path, code, dtype, vocab_size):
    documents = random_documents(vocab_size)
    write_from_the_description(tmp_path / "m", documents, code, dtype)
    flat = [*chain(*chain(*documents))]
    stream = TokenStream(tmp_path / "m")
    assert (stream.tokens, stream.documents, stream.dtype) == (len(flat), 30, dtype)
    for start in range(0, len(flat) - 7, 101):
        assert stream.read(start, 7, vocab_size).tolist() == flat[start : start + 7]
    assert list(index_faults(stream)) == []


def test_ids_are_stored_in_two_bytes_where_they_fit():
    assert [dataset.token_dtype(n) for n in (97, 65_535, 65_536)] == [np.uint16] * 2 + [np.int32]


# --- streams in an object store


@pytest.fixture
def store(tiny_data):
    """fsspec's store in memory with the streams of tiny_data, and their mixture on disk."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        memory.pipe_file(f"/bucket/{name}", (tiny_data / name).read_bytes())
    text = "name,path,weight\na,memory://bucket/a,7\nb,memory://bucket/b,3\n"
    (tiny_data / "remote.csv").write_text(text)
    yield memory
    memory.rm("/bucket", recursive=True)


def test_streams_of_an_object_store_are_those_on_disk(tiny_data, store, monkeypatch):
    read_range, ranges = type(store).cat_file, []

    def noting(self, path, start=None, end=None, **options):
        ranges.append(end - start)
        return read_range(self, path, start, end, **options)

    monkeypatch.setattr(type(store), "cat_file", noting)
    here, there = mixture_of(tiny_data), mixture_of(tiny_data, "remote")
    assert here.fingerprint() == there.fingerprint()
    assert sum(ranges) == 2 * (34 + 4 + 8)  # of an index: its head and where its tokens end
    ranges.clear()
    assert all(np.array_equal(here[i], there[i]) for i in range(300))
    assert ranges == [16] * 300  # no more than the tokens of a sample
    store.rm("/bucket/a.bin")
    with pytest.raises(DataError, match=r"^memory://bucket/a\.bin: no such file$"):
        for i in range(20):
            there[i]
    left = mixture_of(tiny_data, "remote", partial=True)
    assert left.names == ["b"] and left.missing == ["a"]


def unreachable(original, *arguments):
    raise FileNotFoundError("/bucket/a") from ConnectionRefusedError("it is down")


@pytest.mark.parametrize(
    "method, replacement, message",
    [
        ("info", unreachable, r"a\.idx: ConnectionRefusedError: it is down$"),
        ("info", lambda f, *a: f(*a) | {"size": None}, r"a\.idx: .* does not tell its size"),
        ("cat_file", lambda f, self, path: f(self, path), r"a\.idx: .* sends whole files only"),
    ],
)
def test_a_server_with_a_fault_is_not_one_without_the_file(
    tiny_data, store, monkeypatch, method, replacement, message
):
    original = getattr(type(store), method)
    monkeypatch.setattr(
        type(store), method, lambda self, path, **_: replacement(original, self, path)
    )
    with pytest.raises(DataError, match=rf"^memory://bucket/{message}"):
        mixture_of(tiny_data, "remote", partial=True)


def test_files_on_disk_are_read_without_slow_imports(tiny_data):
    code = "import sys; from data.dataset import Mixture; Mixture(sys.argv[1], 7, 42, 97)[0]; "
    code += "assert not {'fsspec', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tiny_data / "mixture.csv")], check=True)


# --- what one rank reads for a step


class Numbers:
    """The tokens of sample i count up from i."""

    seq_len = 16

    def __getitem__(self, i):
        return np.arange(i, i + self.seq_len + 1)


@given(
    world=st.integers(1, 9),
    size=st.integers(1, 40),
    micro=st.integers(1, 5),
    first=st.integers(0, 10**12),
)
def test_ranks_read_everything_once_in_as_many_passes(world, size, micro, first):
    read, passes, counted = [], set(), 0
    for rank in range(world):
        share = dataset.read_share(Numbers(), range(first, first + size), micro, rank, world)
        ours = []
        passes.add(len(share.batches))
        counted += share.targets
        for x, y in share.batches:
            assert x.shape == y.shape and 1 <= x.shape[0] <= micro and x.dtype == torch.int64
            assert x.is_contiguous() and y.is_contiguous()
            if (y != IGNORE).all():
                assert torch.equal(y, x + 1)  # each target is the token that follows
                ours += x[:, 0].tolist()
            else:
                assert (y == IGNORE).all()
        assert ours == list(share.samples) == [*range(first + rank, first + size, world)]
        read += ours
    assert sorted(read) == list(range(first, first + size))
    assert len(passes) == 1
    assert counted == size * 16


@given(st.lists(st.lists(st.sampled_from([BOS, 1, 7]), min_size=5, max_size=5), min_size=1))
def test_documents_start_with_each_row_and_each_bos(rows):
    flat = [*chain(*rows)]
    expected = [k for k, token in enumerate(flat) if k % 5 == 0 or token == BOS]
    starts = dataset.document_starts(torch.tensor(rows))
    assert starts.dtype == torch.int32 and starts.tolist() == [*expected, len(flat)]
