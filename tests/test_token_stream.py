import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
import pytest
from conftest import launch

from data.dataset import Mixture
from data.inspection import Index
from data.mixture import read
from data.stream_writer import StreamWriter
from data.token_stream import DataError, TokenStream, failures, read_bytes, size_of

# --- the format, by writers that are not ours


def write_from_the_description(path, documents, code, dtype):
    """Byte by byte, as Megatron documents it. A document is a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    with open(f"{path}.bin", "wb") as f:
        for sequence in sequences:
            f.write(np.array(sequence, dtype).tobytes())
    with open(f"{path}.idx", "wb") as f:
        f.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code))
        f.write(struct.pack("<QQ", len(sequences), len(documents) + 1))
        f.write(struct.pack(f"<{len(lengths)}i", *lengths))
        size = np.dtype(dtype).itemsize
        f.write(
            struct.pack(
                f"<{len(lengths)}q", *(size * sum(lengths[:k]) for k in range(len(lengths)))
            )
        )
        counts = [len(document) for document in documents]
        f.write(
            struct.pack(f"<{len(counts) + 1}q", *(sum(counts[:k]) for k in range(len(counts) + 1)))
        )


@pytest.fixture(scope="module")
def megatron():
    """Megatron's own writer and reader, which make test_slow installs."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def random_documents(vocab_size):
    rng = np.random.default_rng(vocab_size)
    return [
        [
            rng.integers(0, vocab_size, rng.integers(0, 40)).tolist()
            for _ in range(rng.integers(1, 5))
        ]
        for _ in range(30)
    ]


def check_reading(path, documents, vocab_size, dtype):
    flat = [*chain(*chain(*documents))]
    stream = TokenStream(path)
    assert (stream.tokens, stream.documents, stream.dtype) == (len(flat), len(documents), dtype)
    assert stream.sequences == sum(map(len, documents))
    assert stream.read(0, len(flat), vocab_size).tolist() == flat
    for start in range(0, len(flat) - 7, 101):
        assert stream.read(start, 7, vocab_size).tolist() == flat[start : start + 7]
    index, start = Index(stream), 0
    assert list(index.faults()) == []
    for number, document in enumerate(documents):
        length = sum(map(len, document))
        for token in range(start, start + length):
            assert index.document_at(token) == (number, start, start + length)
        start += length


CASES = [(8, np.uint16, 65_024), (4, np.int32, 128_256)]


@pytest.mark.parametrize("code, dtype, vocab_size", CASES)
def test_streams_written_from_the_description(tmp_path, code, dtype, vocab_size):
    documents = random_documents(vocab_size)
    write_from_the_description(tmp_path / "m", documents, code, dtype)
    check_reading(tmp_path / "m", documents, vocab_size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("code, dtype, vocab_size", CASES)
def test_streams_written_by_megatron(tmp_path, megatron, code, dtype, vocab_size):
    documents = random_documents(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype)
    for document in documents:
        builder.add_document([*chain(*document)], [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "m.idx"))
    check_reading(tmp_path / "m", documents, vocab_size, dtype)
    write_from_the_description(tmp_path / "d", documents, code, dtype)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"m.{kind}").read_bytes() == (tmp_path / f"d.{kind}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("code, dtype, vocab_size", CASES)
@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_reads_our_streams(tmp_path, megatron, code, dtype, vocab_size, mmap):
    documents = [[*chain(*document)] for document in random_documents(vocab_size)]
    with StreamWriter(tmp_path / "ours", vocab_size) as stream:
        lengths = [len(document) for document in documents[:9]]
        stream.add_many(np.array([*chain(*documents[:9])]), np.array(lengths))
        for document in documents[9:]:
            stream.add(np.array(document, np.int64))
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"), mmap=mmap)
    assert theirs.index.dtype == dtype and megatron.DType.optimal_dtype(vocab_size) == dtype
    assert [theirs[k].tolist() for k in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(31))
    longest = max(range(30), key=lambda k: len(documents[k]))
    assert theirs.get(longest, offset=3, length=5).tolist() == documents[longest][3:8]


# --- streams in an object store


@pytest.fixture
def store(tiny_data):
    """fsspec's store in memory with the streams of tiny_data, and their mixture on disk."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("a", "b"):
        for kind in ("bin", "idx"):
            memory.pipe_file(f"/bucket/{name}.{kind}", (tiny_data / f"{name}.{kind}").read_bytes())
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
    here, there = (Mixture(tiny_data / f"{n}.csv", 7, 42, 97) for n in ("mixture", "remote"))
    assert here.fingerprint() == there.fingerprint()
    assert sum(ranges) == 2 * (34 + 4 + 8)  # of the index: its head and where its tokens end
    ranges.clear()
    for i in range(300):
        assert np.array_equal(here[i], there[i])
    assert ranges == [16] * 300  # and of the tokens: those of the sample
    sources = read(tiny_data / "remote.csv")
    assert [source.on_disk for source in sources] == [True, True]
    assert [source.tokens for source in sources] == [stream.tokens for stream in here.streams]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.rm("/bucket/a.bin"), r"^memory://bucket/a\.bin: no such file"),
        (lambda m: m.pipe_file("/bucket/a.bin", bytes(9)), r"://bucket/a\.bin: truncated, 9 bytes"),
        (lambda m: m.pipe_file("/bucket/b.idx", bytes(99)), r"://bucket/b\.idx: not an index"),
    ],
)
def test_faults_of_an_object_store_are_named(tiny_data, store, change, message):
    change(store)
    with pytest.raises(DataError, match=message):
        Mixture(tiny_data / "remote.csv", 7, 42, 97)


def test_a_store_that_fails_is_one_line(tiny_data, store, monkeypatch):
    mixture = Mixture(tiny_data / "remote.csv", 7, 42, 97)
    store.rm("/bucket/a.bin")
    with pytest.raises(DataError, match=r"^memory://bucket/a\.bin: no such file$"):
        for i in range(20):
            mixture[i]

    def refuse(*_, **__):
        raise RuntimeError("no credentials\n  at all")

    monkeypatch.setattr(type(store), "info", refuse)
    with pytest.raises(DataError, match=r"^memory://bucket/a\.idx: RuntimeError: no credentials$"):
        Mixture(tiny_data / "remote.csv", 7, 42, 97, partial=True)  # not there is something else

    def down(*_, **__):
        raise FileNotFoundError("/bucket/a") from ConnectionRefusedError("it is down")

    monkeypatch.setattr(type(store), "info", down)
    with pytest.raises(DataError, match="ConnectionRefusedError: it is down"):
        Mixture(tiny_data / "remote.csv", 7, 42, 97, partial=True)
    (tiny_data / "remote.csv").write_text("name,path,weight\na,nowhere://a,1\n")
    with pytest.raises(DataError, match=r"^nowhere://a\.idx: .*nowhere"):
        Mixture(tiny_data / "remote.csv", 7, 42, 97)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(DataError, match=r"^nowhere://a\.idx: .* needs: pip install fsspec$"):
        Mixture(tiny_data / "remote.csv", 7, 42, 97)


def test_a_server_without_byte_ranges_is_refused(tiny_data, store, monkeypatch):
    mixture = Mixture(tiny_data / "remote.csv", 7, 42, 97)
    read_whole = type(store).cat_file
    monkeypatch.setattr(type(store), "cat_file", lambda s, path, **_: read_whole(s, path))
    for use in (lambda: mixture[0], lambda: Mixture(tiny_data / "remote.csv", 7, 42, 97)):
        with pytest.raises(DataError, match=r"^memory://bucket/.* sends whole files only .*ranges"):
            use()


def test_a_server_that_tells_no_size_is_not_without_the_file(tiny_data, store, monkeypatch):
    info = type(store).info
    monkeypatch.setattr(type(store), "info", lambda *a, **k: {**info(*a, **k), "size": None})
    for partial_too in (False, True):
        with pytest.raises(DataError, match=r"^memory://bucket/a\.idx: .* not tell its size"):
            Mixture(tiny_data / "remote.csv", 7, 42, 97, partial=partial_too)


@pytest.mark.slow
def test_pythons_own_web_server(tiny_data):
    """It sends whole files, whatever range it is asked for."""
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tiny_data)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert size_of(f"{address}/a.idx") == (tiny_data / "a.idx").stat().st_size
            assert size_of(f"{address}/none.idx") is None
            whole = (tiny_data / "a.idx").read_bytes()
            assert read_bytes(f"{address}/a.idx", 0, len(whole)) == whole
            with pytest.raises(DataError, match=r"/a\.idx: its server sends whole files only"):
                TokenStream(f"{address}/a")
        finally:
            server.shutdown()


class NotOnTheHub(FileNotFoundError):
    """As `datasets` has one, with a message of its own."""


@pytest.mark.parametrize(
    "error, message",
    [
        (FileNotFoundError("/bucket/x"), "x: no such file"),
        (NotOnTheHub("Dataset 'x' doesn't exist"), "x: NotOnTheHub: Dataset 'x' doesn't exist"),
        (PermissionError(13, "Forbidden"), "x: PermissionError: [Errno 13] Forbidden"),
        (RuntimeError(), "x: RuntimeError"),
        (RuntimeError("\ngone\nfor ever"), "x: RuntimeError: gone"),
        (ImportError("Install s3fs"), "x: reading it needs: Install s3fs"),
        (ModuleNotFoundError("No module named 'p'"), "x: reading it needs: pip install p"),
        (DataError("y: as it is"), "y: as it is"),
    ],
)
def test_what_packages_raise_is_one_line(error, message):
    with pytest.raises(DataError) as raised:
        with failures("x", "p"):
            raise error
    assert str(raised.value) == message
    with pytest.raises(KeyboardInterrupt), failures("x", "p"):
        raise KeyboardInterrupt


def test_a_partial_mixture_of_an_object_store(tiny_data, store):
    store.rm("/bucket/b.idx")
    mixture = Mixture(tiny_data / "remote.csv", 7, 42, 97, partial=True)
    assert mixture.names == ["a"] and mixture.missing == ["b"]


def test_files_on_disk_are_read_without_fsspec(tiny_data):
    code = (
        "import sys\nfrom data.dataset import Mixture\n"
        "Mixture(sys.argv[1], 7, 42, 97)[0]\nassert 'fsspec' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_data / "mixture.csv")], check=True)


@pytest.mark.parametrize(
    "command",
    [
        "data.mixture show {0}/none.csv",
        "data.dataset count {0}/none.csv",
        "data.prepare tokens {0}/none.txt --tokenizer {0}/none --out {0}/x",
        "data.passages fr={0}/none.txt --out {0}/x",
        "data.tokenizer train {0}/none.txt --out {0}/x",
        "data.tokenizer compare --texts {0}/none.txt --tokenizers {0}/none",
    ],
)
def test_a_command_reports_data_that_it_cannot_read_in_one_line(tmp_path, command):
    module, *args = command.format(tmp_path).split()
    done = launch(module, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{module}: {tmp_path}/none") and done.stderr.count("\n") == 1
