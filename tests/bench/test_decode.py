"""The benchmark of decoding, rehearsed with a tiny model. Its times are nobody's oracle."""

import json

import pytest
import torch

from bench import decode
from config.cli import ConfigError
from data.tokenizer import EOS
from model import LucieConfig

TINY = ["--layers=2", "--hidden=128", "--vocab=300", "--prompt=7", "--new=3", "--rounds=1"]


@pytest.mark.slow
def test_every_side_generates_and_is_held_against_its_floor(tmp_path, capsys):
    pytest.importorskip("transformers")
    decode.main([*TINY, "--batch", "1", "3", "--device=cpu", f"--out={tmp_path / 'f.json'}"])
    found = json.loads((tmp_path / "f.json").read_text())
    rows = {(row["side"], row["batch"]): row for row in found["rows"]}
    assert {side for side, _ in rows} >= {"ours", "ours int4", "transformers"}
    # q|k|v, its output, gate|up, down and two norms, twice; the last norm; the head
    matrices = 2 * (3 * 128 * 128 + 128 * 128 + 3 * 384 * 128)
    read = 4 * (matrices + 5 * 128 + 300 * 128)
    for (side, batch), row in rows.items():
        if row["failure"] and side == "bitsandbytes":
            continue
        assert row["failure"] is None, row
        assert row["tokens_per_second"] == pytest.approx(1000 * batch / row["ms_per_step"])
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_step"])
        if side in ("ours", "transformers"):
            assert row["weight_bytes"] == pytest.approx(read, rel=1e-3)
            seen = batch * (7 + 1.5) * 2 * 2 * 128 * 4  # keys and values of two layers
            floor = (row["weight_bytes"] + seen) / found["copy_gb_per_second"] / 1e6
            assert row["floor_ms"] == pytest.approx(floor)
    assert rows["ours int4", 1]["weight_bytes"] < rows["ours", 1]["weight_bytes"] / 3
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_side_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys):
    def failing(*args):
        raise RuntimeError("out of luck")

    sides = decode.sides("cpu") | {"transformers": failing}
    monkeypatch.setattr(decode, "sides", lambda device: sides)
    assert decode.main([*TINY, "--batch", "1", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "out of luck" in out and "ours int4" in out
    sides["ours"] = failing
    assert decode.main([*TINY, "--batch", "1", "--device=cpu"]) == 1  # ours must not


def test_the_random_model_never_ends():
    config = LucieConfig(
        vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=20,
    )  # fmt: skip
    model = decode.random_lucie(config, "cpu", torch.float32, int4=False)
    tokens = torch.randint(300, (40, 20), generator=torch.Generator().manual_seed(0))
    assert not (model(tokens).argmax(-1) == EOS).any()
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("args", [["--hidden=100"], ["--new=0"], ["--batch", "0"]])
def test_impossible_sizes_are_refused(args):
    with pytest.raises(ConfigError, match="multiple of 128"):
        decode.main([*TINY, *args])
