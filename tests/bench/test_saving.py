"""The benchmark of saving, rehearsed with a tiny model. Its times are nobody's oracle."""

import json
import mmap
from pathlib import Path

import pytest
from conftest import TINY

import checkpoint
from bench import saving
from config import Config

SMALL = TINY | dict(seq_len=16, micro_batch_size=2, dtype="float32", device="cpu")
# embedding and head; two blocks of q|k|v, its output, gate|up, down and two norms; the last norm
PARAMETERS = 2 * 97 * 64 + 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96 + 2 * 64) + 64


def test_what_is_measured_is_a_real_checkpoint(tmp_path):
    found = saving.measure(Config(**SMALL), tmp_path, saves=3, interval=2)
    assert found["parameters"] == PARAMETERS and found["copy_bytes"] == 12 * PARAMETERS
    assert found["tokens_per_step"] == 32 and found["saves"] == 3 and found["interval"] >= 2

    # Of those written in the background the last one stays: as large as told.
    (newest,) = tmp_path.glob("step*")
    checkpoint.verify(newest)
    sizes = {path.name: path.stat().st_size for path in newest.iterdir()}
    assert sum(sizes.values()) == found["bytes"]
    shard = newest / "shard-00001.safetensors"
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    assert sizes[shard.name] == 8 + header + 12 * PARAMETERS
    steps = checkpoint.read_state(newest)["step"]
    assert steps >= 1 + 2 * (3 + 3)  # one to begin with, then blocks of two with and without

    low, *_, high = found["added_of_pairs"]
    assert len(found["added_of_pairs"]) == 3 and low <= found["added"] <= high
    assert 0 < found["stall_ms"] <= found["complete_ms"]
    assert found["step_without_ms"] > 0


def test_damage_is_no_result(tmp_path, monkeypatch):
    wait = checkpoint.Saver.wait

    def damaging(self):
        wait(self)
        for shard in tmp_path.glob("step*/*.safetensors"):
            shard.write_bytes(shard.read_bytes()[:-1])

    monkeypatch.setattr(checkpoint.Saver, "wait", damaging)
    with pytest.raises(checkpoint.CheckpointError, match="shard-00001"):
        saving.measure(Config(**SMALL), tmp_path, saves=1, interval=1)


def test_the_peak_of_memory_is_seen_once():
    if saving.peak_memory() is None:
        pytest.skip("needs Linux")
    size = 64 << 20
    before = saving.peak_memory()
    with mmap.mmap(-1, size) as held:  # of its own, not what earlier tests have freed
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
    assert saving.peak_memory() - before == pytest.approx(size, rel=0.05)
    assert saving.peak_memory() - before < size / 2


def test_figures_and_machine_go_to_a_file_and_nothing_else_stays(tmp_path, capsys):
    config = tmp_path / "tiny.py"
    values = SMALL | {"out_dir": str(tmp_path / "out")}
    config.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    saving.main([str(config), "--saves=1", "--interval=1", f"--out={tmp_path / 'saving.json'}"])
    found = json.loads((tmp_path / "saving.json").read_text())
    assert found["config"] == str(config)
    assert {"torch", "date", "system", "cores", "gpu", "threads"} <= found.keys()
    printed = capsys.readouterr().out
    assert "0.07 M parameters" in printed and "a step, with a save every" in printed
    assert list(Path(values["out_dir"]).iterdir()) == []
