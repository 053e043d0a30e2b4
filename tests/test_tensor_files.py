import hashlib
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tensor_files
from tensor_files import CheckpointError

TENSORS = {
    "b": torch.randn(700, 2000),  # several chunks
    "a": torch.randn(5).to(torch.bfloat16),
    "empty": torch.ones(0, 3),
    "c": torch.randn(3, 2, 4).to(torch.float16),
}
ENTRIES = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def test_what_is_written_safetensors_reads(tmp_path):
    digest = hashlib.sha256()
    pieces = (piece for t in TENSORS.values() for piece in t.split(400))
    size = tensor_files.write(tmp_path / "x", ENTRIES, pieces, {"key": "value"}, digest)
    content = (tmp_path / "x").read_bytes()
    assert size == len(content) and digest.hexdigest() == hashlib.sha256(content).hexdigest()
    read = load_file(tmp_path / "x")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "x", framework="pt") as f:
        assert f.metadata() == {"key": "value"}


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x", metadata={"key": "value"})
    entries, metadata = tensor_files.read_header(tmp_path / "x")
    assert metadata == {"key": "value"} and entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensor_files.read_tensor(entries[name]), tensor)
    rows = tensor_files.read_tensor(entries["b"], torch.empty(60, 2000), 600)
    assert torch.equal(rows, TENSORS["b"][600:660])
    os.truncate(tmp_path / "x", 3_000_000)  # between looking and reading
    with pytest.raises(CheckpointError, match="cut short"):
        tensor_files.read_tensor(entries["b"])


def test_values_are_rounded_on_the_way(tmp_path):
    tensor = TENSORS["b"]
    entries = {"b": (torch.bfloat16, tuple(tensor.shape))}
    tensor_files.write(tmp_path / "x", entries, [tensor], {})
    assert torch.equal(load_file(tmp_path / "x")["b"], tensor.to(torch.bfloat16))


@pytest.mark.parametrize("change", [-1, 1])
def test_more_or_less_than_the_entries_is_an_error(tmp_path, change):
    entries = {"b": (torch.float32, (10,))}
    with pytest.raises(CheckpointError):
        tensor_files.write(tmp_path / "x", entries, [torch.ones(10 + change)], {})
    with pytest.raises(CheckpointError):
        pieces = [torch.ones(5)] * (2 + change)
        tensor_files.write(tmp_path / "x", entries, pieces, {})


def test_shards_keep_the_order_and_the_limit():
    entries = {f"t{n}": (torch.float32, (n,)) for n in (3, 4, 9, 20, 1, 1)}
    files = tensor_files.shards(entries, 40)
    assert [list(file) for file in files] == [["t3", "t4"], ["t9"], ["t20"], ["t1"]]
    assert tensor_files.size_of(entries) == 4 * 37


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with tensor_files.new_folder(tmp_path / "a", 10) as folder:
        (folder / "file").write_text("text")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a/file").read_text() == "text"
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), tensor_files.new_folder(tmp_path / "b", 10) as folder:
            (folder / "file").write_text("text")
            raise error
    with pytest.raises(CheckpointError, match="already"):
        with tensor_files.new_folder(tmp_path / "a", 10):
            raise AssertionError("not to be reached")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match="are free there"):
        with tensor_files.new_folder(tmp_path / "c", 2 * free):
            raise AssertionError("not to be reached")
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "empty").mkdir()
    with tensor_files.new_folder(tmp_path / "empty", 1) as folder:
        (folder / "file").touch()
    assert os.listdir(tmp_path / "empty") == ["file"]
