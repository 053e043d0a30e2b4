import json
import os
import shutil

import pytest
import torch
from conftest import SHARED, TINY, needs_shared
from safetensors.torch import load_file, save_file

import checkpoint
import hf_layout
from checkpoint import CheckpointError
from model import Lucie, LucieConfig

CONFIG = LucieConfig(**TINY, max_position_embeddings=64)


@pytest.mark.parametrize("theta", [500_000.0, 20_000_000.0])
def test_their_folder_gives_the_same_logits_and_comes_back(tmp_path, theta):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = vars(LucieConfig(**TINY, max_position_embeddings=600, rope_theta=theta))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**values, tie_word_embeddings=False)
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = checkpoint.from_hf(str(tmp_path / "theirs"))
    assert ours.config == LucieConfig(**values)
    tokens = torch.randint(97, (1, 600))
    assert (ours(tokens) - theirs(input_ids=tokens).logits).abs().max() < 1e-4

    checkpoint.to_hf(ours, tmp_path / "ours", torch.float32)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    again = checkpoint.from_hf(str(tmp_path / "ours"))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters()))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["rope_theta"] == theta and config["tie_word_embeddings"] is False


@needs_shared
def test_config_equals_the_released_one(tmp_path):
    """Lucie-7B's own config.json, key by key: architecture is compared, training facts are not."""
    released = json.loads((SHARED / "lucie/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = hf_layout.config_of(tmp_path)
    changed = {"rope_theta": 2e7, "max_position_embeddings": 32_000, "initializer_range": 0.02}
    assert config == LucieConfig(**changed)
    small = LucieConfig(**TINY, max_position_embeddings=32_000, rope_theta=2e7)
    checkpoint.to_hf(Lucie(small), tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    told = {"training_steps", "training_tokens", "transformers_version"}
    assert released.keys() - ours.keys() == told
    sizes = TINY.keys()
    for key in released.keys() - told - sizes:
        assert ours[key] == released[key], key


def test_tensors_that_are_computed_here_are_passed_over(tmp_path):
    model = Lucie(CONFIG)
    checkpoint.to_hf(model, tmp_path, torch.float32)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, path)
    again = checkpoint.from_hf(str(tmp_path))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_foreign_or_broken_folders_are_named(tmp_path):
    model = Lucie(CONFIG)
    checkpoint.to_hf(model, tmp_path / "good")

    def broken(config=None, shard=None):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        if config:
            path = tmp_path / "bad" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if shard:
            shard(next((tmp_path / "bad").glob("*.safetensors")))
        with pytest.raises(CheckpointError) as error:
            checkpoint.from_hf(str(tmp_path / "bad"))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "tied" in broken({"tie_word_embeddings": True})
    assert "rope_scaling" in broken({"rope_scaling": {"rope_type": "llama3", "factor": 8}})
    assert "attention_bias" in broken({"attention_bias": True})
    assert "model_type 'gpt2'" in broken({"model_type": "gpt2"})
    assert "is [97, 64], not [96, 64]" in broken({"vocab_size": 96})
    assert "unknown tensor model.layers.1" in broken({"num_hidden_layers": 1})
    assert "lacks model.layers.2" in broken({"num_hidden_layers": 3})
    assert "rope_theta" in broken({"rope_theta": 0})
    assert "config.json" in broken({"rope_theta": None})
    index = tmp_path / "good" / "model.safetensors.index.json"
    whole = index.read_text()
    for text in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(text)
        assert "index.json" in broken()
    index.write_text(whole)
    assert "safetensors" in broken(shard=lambda path: os.truncate(path, 50))
    assert "No such file" in broken(shard=lambda path: path.unlink())
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.from_hf(str(tmp_path / "nowhere"))
