import json
import os

import pytest
import torch
from conftest import TINY, launch

from bench import weights
from checkpoint import CheckpointError
from model import LucieConfig

MEASURED = """
import json
from pathlib import Path
from bench.weights import measure
from model import LucieConfig

config = LucieConfig(vocab_size=40_000, hidden_size=512, intermediate_size=1536,
                     num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2)
# What the first use of everything takes is not memory of weights.
measure(LucieConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=2), Path("{0}/first"))
print(json.dumps(measure(config, Path("{0}/second"))))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.slow
def test_memory_holds_one_tensor_to_write_and_the_model_and_one_to_read(tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED.format(tmp_path))
    done = launch(tmp_path / "measured.py")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["bytes"] > 2e8 and figures["largest tensor"] == 40_000 * 512 * 2
    slack = 25e6
    assert figures["export memory"] < figures["largest tensor"] + slack
    assert figures["import memory"] < figures["bytes"] + figures["largest tensor"] + slack
    assert figures["import memory"] > figures["bytes"]


def test_weights_are_random_and_moderate_and_a_function_of_their_place():
    a = weights.weight("norm.weight", 0, (3, 20_000))
    assert a.dtype == torch.bfloat16 and torch.equal(a, weights.weight("norm.weight", 0, a.shape))
    assert not torch.equal(a, weights.weight("norm.weight", 3, a.shape))
    assert a.abs().min() == 2**-7 and a.abs().max() < 2**-6
    assert len(a.unique()) == 256 and a.float().mean().abs() < 1e-4


def test_other_bits_than_were_written_are_an_error(tmp_path, monkeypatch):
    config = LucieConfig(**TINY)
    from_hf = weights.from_hf

    def flipping(*args, **kwargs):
        model = from_hf(*args, **kwargs)
        with torch.no_grad():
            model.layers[1].mlp.gate_up_proj.weight[100, 7] *= -1
        return model

    assert weights.measure(config, tmp_path / "a")["bytes"] > 0
    monkeypatch.setattr(weights, "from_hf", flipping)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate_up_proj\.weight"):
        weights.measure(config, tmp_path / "b")
