import gzip
import io
import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
from tqdm import tqdm

from data import prepare, remote, tokenizer
from data.dataset import DataError
from data.prepare import tokenize
from data.reading import find_files, parse, place, read_documents, records, size_of, version_of
from data.remote import HubDataset
from data.tokenizer import Tokenizer
from data.workers import Options

fsspec = pytest.importorskip("fsspec")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

OURS = Tokenizer({bytes([b]): b + 4 for b in range(256)})
TEXTS = [f"texte numéro {n}" for n in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


# --- an object store -----------------------------------------------------------------------------


@pytest.fixture
def store():
    """The files of memory://, under bucket/."""
    files = fsspec.filesystem("memory")
    table = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), table, row_group_size=70)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, pa.schema({"text": pa.string()})) as sink:
        sink.write_table(pa.table({"text": TEXTS}), max_chunksize=50)
    contents = {
        "a.jsonl": LINES,
        "b/a.jsonl.gz": gzip.compress(LINES),
        "b/a.jsonl.zst": zstandard.compress(LINES),
        "b/a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "b/c/a.parquet": table.getvalue(),
        "b/c/a.arrow": stream.getvalue(),
        "b/c/state.json": b"{}",
        "b/c/a.csv": b"no text",
    }
    files.pipe({f"/bucket/{name}": content for name, content in contents.items()})
    yield files
    files.rm("/bucket", recursive=True)


def found(*addresses):
    return [str(file).removeprefix("memory:///bucket/") for file in find_files(addresses)]


def test_files_folders_and_globs_of_a_store_are_found_in_order(store):
    inside = ["b/a.json", "b/a.jsonl.gz", "b/a.jsonl.zst", "b/c/a.arrow", "b/c/a.parquet"]
    assert found("memory://bucket") == ["a.jsonl", *inside]
    assert found("memory://bucket/b/", "memory://bucket/b/a.json") == inside
    assert found("memory://bucket/b/*.jsonl*", "memory://bucket/a.jsonl") == [
        *inside[1:3],
        "a.jsonl",
    ]
    assert found("memory://bucket/**/*.parquet") == ["b/c/a.parquet"]
    (file,) = find_files(["memory://bucket/a.jsonl"])
    assert size_of(file) == len(LINES) and str(file) == "memory:///bucket/a.jsonl"
    assert place(file, 7) == "memory:///bucket/a.jsonl, line 7"


def test_every_form_is_read_from_a_store_and_goes_on_after_any_record(store):
    for file in find_files(["memory://bucket"]):
        assert list(read_documents([file])) == TEXTS, file
        whole = list(records(file, "text"))
        positions = [record.position for record in whole]
        assert positions == sorted(positions) and positions[-1] <= size_of(file)
        for n in (0, 1, 150, 299):
            rest = list(records(file, "text", (), whole[n].number, whole[n].position))
            assert [r.content for r in rest] == [r.content for r in whole[n + 1 :]], file


def test_a_plain_file_of_a_store_is_not_read_again_to_go_on(store):
    (file,) = find_files(["memory://bucket/a.jsonl"])
    record = list(records(file, "text"))[99]
    store.pipe("/bucket/a.jsonl", b"?" * record.position + LINES[record.position :])
    rest = records(file, "text", (), record.number, record.position)
    assert [parse(r.content, "text")[0] for r in rest] == TEXTS[100:]


@pytest.mark.parametrize("address", ["memory://bucket/none.jsonl", "memory://bucket/b/c/a.csv"])
def test_what_is_not_in_a_store_is_named(store, address):
    with pytest.raises(DataError, match=address.replace(".", r"\.")):
        find_files([address])


def test_a_file_that_goes_away_is_named(store):
    (file,) = find_files(["memory://bucket/a.jsonl"])
    store.rm("/bucket/a.jsonl")
    with pytest.raises(DataError, match=r"^memory:///bucket/a\.jsonl: no such file$"):
        list(read_documents([file]))


def test_protocols_that_are_unknown_or_need_a_package_say_so(monkeypatch):
    with pytest.raises(
        DataError, match=r"^nope://x/y\.jsonl: ValueError: Protocol not known: nope"
    ):
        find_files(["nope://x/y.jsonl"])
    if find_spec("s3fs") is None:
        with pytest.raises(DataError, match=r"^s3://x/y\.jsonl: reading it needs: Install s3fs"):
            find_files(["s3://x/y.jsonl"])
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(DataError, match=r"needs: pip install fsspec$"):
        find_files(["s3://x/y.jsonl"])


def test_a_file_of_a_size_that_is_not_told_is_refused(store, monkeypatch):
    info = type(store).info
    monkeypatch.setattr(type(store), "info", lambda *a, **k: {**info(*a, **k), "size": None})
    with pytest.raises(DataError, match=r"a\.jsonl: .* not tell its size: download it$"):
        find_files(["memory://bucket/a.jsonl"])


class Lost(Exception):
    """What a store raises when a connection is lost: not an OSError."""


def cut_connection(monkeypatch, store, after):
    """Files of the store fail when more bytes than `after` are asked for."""
    plain = type(store).open

    class File(io.BytesIO):
        def read(self, size=-1):
            if self.tell() + size > after:
                raise Lost("gone\nfor ever")
            return super().read(size)

    def open_(self, path, *args, **kwargs):
        return File(plain(self, path, *args, **kwargs).getvalue())

    monkeypatch.setattr(type(store), "open", open_)


@pytest.mark.parametrize("name", ["a.jsonl", "b/a.jsonl.gz", "b/a.json", "b/c/a.parquet"])
def test_a_lost_connection_ends_the_run_even_where_bad_documents_are_skipped(
    store, tmp_path, monkeypatch, name
):
    files = find_files([f"memory://bucket/{name}"])
    with monkeypatch.context() as patch:
        cut_connection(patch, store, 0)
        with pytest.raises(DataError, match=rf"^memory:///bucket/{name}: Lost: gone$"):
            tokenize(files, OURS, tmp_path / "x", on_error="skip")
    assert tokenize(files, OURS, tmp_path / "x")["documents"] == 300


def test_a_run_from_a_store_goes_on_and_gives_the_bytes_of_a_local_one(
    store, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    tokenize(find_files([tmp_path / "a.jsonl"]), OURS, tmp_path / "local", part_size=40_000)
    monkeypatch.setattr(remote, "BUFFER", 1 << 12)
    files = find_files(["memory://bucket/a.jsonl"])
    with monkeypatch.context() as patch:
        cut_connection(patch, store, len(LINES) - 100)
        with pytest.raises(DataError, match="Lost"):
            tokenize(files, OURS, tmp_path / "x", part_size=40_000)
    assert len(list((tmp_path / "x.parts").glob("0*.record"))) >= 2
    tokenize(files, OURS, tmp_path / "x", part_size=40_000)
    assert "parts are done; going on" in capsys.readouterr().err
    for suffix in ("bin", "idx"):
        ours, local = (tmp_path / f"{name}.{suffix}" for name in ("x", "local"))
        assert ours.read_bytes() == local.read_bytes()


def test_a_file_of_a_store_that_changed_is_another(store):
    store.pipe("/bucket/a.jsonl", LINES)
    (before,) = find_files(["memory://bucket/a.jsonl"])
    info = {"name": "x", "type": "file", "size": 3, "ETag": '"1"', "LastModified": "today"}
    assert remote.version(info) == '"1"'
    assert remote.version({**info, "ETag": None}) == "today"
    store.pipe("/bucket/a.jsonl", LINES)
    (after,) = find_files(["memory://bucket/a.jsonl"])
    assert version_of(before) != version_of(after) and before.size == after.size


# --- data sets of the Hub ------------------------------------------------------------------------


class Rows:
    """An IterableDataset, as far as it is used."""

    def __init__(self, tables, done=0, fails_after=None):
        self.tables, self.done, self.fails_after = tables, done, fails_after

    def skip(self, done):
        return Rows(self.tables, done, self.fails_after)

    def with_format(self, name):
        assert name == "arrow"
        return self

    def iter(self, size):
        rows = pa.concat_tables(self.tables)
        for start in range(self.done, rows.num_rows, size):
            if self.fails_after is not None and start >= self.fails_after:
                raise Lost("no answer")
            yield rows.slice(start, size)


@pytest.fixture
def hub(monkeypatch):
    """`datasets` and `huggingface_hub` with one data set of two subsets, and its newest commit."""
    here = types.SimpleNamespace(commit="c1", asked=[], fails_after=None)
    here.subsets = {
        ("c1", "fr"): [pa.table({"text": TEXTS, "n": range(300)})],
        ("c2", "fr"): [pa.table({"text": TEXTS[::-1], "n": range(300)})],
    }

    def load_dataset(name, subset, *, split, revision, streaming):
        assert (name, split, streaming) == ("me/texts", "train", True)
        here.asked.append(revision)
        if (revision, subset) not in here.subsets:
            raise ValueError(f"BuilderConfig {subset!r} not found.\nAvailable: fr")
        return Rows(here.subsets[revision, subset], fails_after=here.fails_after)

    class HfApi:
        def dataset_info(self, name, *, revision=None):
            return types.SimpleNamespace(sha=revision if revision else here.commit)

    datasets, client = types.ModuleType("datasets"), types.ModuleType("huggingface_hub")
    datasets.load_dataset, client.HfApi = load_dataset, HfApi
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return here


def test_addresses_of_data_sets():
    for address, parts in {
        "hf:a/b": ("a/b", None, None),
        "hf:a/b#fr": ("a/b", None, "fr"),
        "hf:a/b@v1.2": ("a/b", "v1.2", None),
        "hf:a/b@0af#Wiki--fr": ("a/b", "0af", "Wiki--fr"),
    }.items():
        (source,) = find_files([address])
        assert (source.name, source.revision, source.subset) == parts
        assert str(source) == address and size_of(source) is None
    assert place(source, 1234) == "hf:a/b@0af#Wiki--fr, row 1,234"
    for wrong in ("hf:", "hf:#fr", "hf:@x"):
        with pytest.raises(DataError, match=r"is hf:NAME\[@REVISION\]\[#SUBSET\]"):
            find_files([wrong])


def test_a_data_set_is_read_from_any_row(hub):
    (source,) = find_files(["hf:me/texts@c1#fr"])
    assert list(read_documents([source])) == TEXTS
    whole = list(records(source, "text"))
    for n in (0, 1, 63, 64, 65, 298, 299):
        assert list(records(source, "text", (), n + 1, 0)) == whole[n + 1 :]
    (error,) = records(source, "body")
    assert error.error == "cannot be read further: no column 'body'; it has text, n"


def test_a_run_that_goes_on_later_reads_the_commit_that_it_began_with(hub, tmp_path, capsys):
    files = find_files(["hf:me/texts#fr"])
    tokenize(files, OURS, tmp_path / "whole", Options(validation=0.1), part_size=40_000)
    printed = capsys.readouterr().err
    assert "reading hf:me/texts@c1#fr" in printed
    size = tqdm.format_sizeof(sum(len(text.encode()) for text in TEXTS), "B")
    assert f"\rtokens: {size} [" in printed  # without a total
    hub.fails_after = 192
    with pytest.raises(DataError, match=r"^hf:me/texts@c1#fr: Lost: no answer$"):
        tokenize(files, OURS, tmp_path / "x", Options(validation=0.1), 1, "skip", 40_000)
    assert len(list((tmp_path / "x.parts").glob("0*.record"))) >= 1
    hub.fails_after, hub.commit, hub.asked = None, "c2", []
    tokenize(files, OURS, tmp_path / "x", Options(validation=0.1), 2, part_size=40_000)
    printed = capsys.readouterr().err
    assert "parts are done; going on" in printed and "tokens: " in printed
    assert hub.asked == ["c1"]
    for suffix in ("bin", "idx", "valid.bin", "valid.idx"):
        ours, whole = (tmp_path / f"{name}.{suffix}" for name in ("x", "whole"))
        assert ours.read_bytes() == whole.read_bytes()
    # A new run reads what is there today.
    tokenize(files, OURS, tmp_path / "x", part_size=40_000)
    assert hub.asked == ["c1", "c2"]


def test_a_data_set_that_is_not_there_is_one_line(hub, tmp_path):
    tokenizer.save({bytes([b]): b + 4 for b in range(256)}, tmp_path / "r.tiktoken")
    args = ["tokens", "hf:me/texts#de", f"--tokenizer={tmp_path}/r.tiktoken"]
    message = "^hf:me/texts@c1#de: ValueError: BuilderConfig 'de' not found.$"
    with pytest.raises(DataError, match=message):
        prepare.main([*args, f"--out={tmp_path}/x"])
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("missing", ["datasets", "huggingface_hub"])
def test_without_the_package_it_is_named(hub, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match=r"^hf:me/texts.*: reading it needs: pip install datasets$"):
        tokenize([HubDataset("me/texts", None, "fr")], OURS, tmp_path / "x")


@pytest.mark.slow
def test_the_real_package_gives_the_same(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for n in range(3):
        lines = LINES.splitlines(keepends=True)[100 * n : 100 * (n + 1)]
        Path(tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{n}.jsonl").write_bytes(b"".join(lines))
    load_dataset = datasets.load_dataset

    def local(name, subset, *, revision, **options):
        return load_dataset(str(tmp_path / "folder"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    (source,) = find_files(["hf:me/texts"])
    assert list(read_documents([source])) == TEXTS
    rest = records(source, "text", (), 150)
    assert [parse(r.content, "text")[0] for r in rest] == TEXTS[150:]
