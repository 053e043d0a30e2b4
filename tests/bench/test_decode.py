"""The benchmark of decoding, rehearsed with a tiny model. Its times are no oracle."""

import json

import pytest
import torch
from conftest import TINY

from bench import decode
from config.cli import ConfigError
from generate import Decoder, prefill
from model import Lucie, LucieConfig


def run(tmp_path, *arguments):
    code = decode.main(["--toy", "--rounds=1", f"--out={tmp_path}", *arguments])
    return code, json.loads((tmp_path / "decode.json").read_text())


@pytest.mark.slow
def test_rows_and_their_floor(tmp_path, capsys):
    pytest.importorskip("transformers")
    code, found = run(tmp_path, "--batch", "1", "3")
    assert code == 0 and found["failures"] == {} and "ours int4" in capsys.readouterr().out
    rows = {(row["name"], row["batch"]): row for row in found["rows"]}
    assert {name for name, _ in rows} == {"ours", "ours int4", "transformers"}
    # 4 heads of 32 and 1 for keys: q|k|v, its output, gate|up, down, twice; 5 norms; the head
    matrices = 2 * (192 * 128 + 128 * 128 + 3 * 384 * 128)
    read = 4 * (matrices + 5 * 128 + 512 * 128)
    for (name, batch), row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(1000 * batch / row["ms_per_step"])
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_step"])
        if name != "ours int4":
            assert row["weight_bytes"] == pytest.approx(read, rel=1e-3)
        seen = batch * (7 + 8) * 2 * 2 * 32 * 4  # keys and values of two layers
        floor = (row["weight_bytes"] + seen) / found["copy_gb_per_second"] / 1e6
        assert row["floor_ms"] == pytest.approx(floor)
        assert row["host_ms"] is None  # a CPU does not launch
    assert rows["ours int4", 1]["weight_bytes"] < rows["ours", 1]["weight_bytes"] / 2


def test_time_of_the_host(monkeypatch):
    """The device is waited for before each step, not in it. A clock that counts what is called."""
    model, calls = Lucie(LucieConfig(**TINY, max_position_embeddings=64)), []
    decoder = Decoder(model)
    decoder.step = lambda ids: calls.append("graph")
    monkeypatch.setattr(decode, "plain_step", lambda *args: lambda ids: calls.extend("kernels"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(decode.time, "perf_counter", lambda: len(calls))
    prefill(model, [[5, 6]], decoder.reserve(1, 9))
    assert decode.host_ms(decoder) == {"graph": 1000, "kernels": 7000}
    assert calls.count("wait") == calls.count("graph") * 2 == 24


def test_one_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fails(*args):
        raise RuntimeError("out of luck")

    def right(*args):
        return lambda prompts, new: new, 1000, None

    for name, code in (("transformers", 0), ("ours", 1)):  # ours must not fail
        chosen = dict.fromkeys(("ours", "transformers"), right) | {name: fails}
        monkeypatch.setattr(decode, "IMPLEMENTATIONS", chosen)
        found, _ = run(tmp_path, "--batch", "1")
        assert found == code and "out of luck" in capsys.readouterr().out
    _, found = run(tmp_path, "--batch", "1", "--minutes=0")
    assert found["rows"] == [] and found["stopped"] == "after 0 minutes, before ours"


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        decode.main(["--toy", "--new=0"])
    with pytest.raises(ConfigError, match="not a multiple"):
        decode.main(["--toy", "--hidden_size=90"])
