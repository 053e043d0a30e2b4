import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import SHARED, TINY, needs_shared
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import CheckpointError
from model import Lucie, LucieConfig

CONFIG = LucieConfig(**TINY, max_position_embeddings=64)
STATE = {"step": 3, "samples": 24, "config": TINY | {"seq_len": 64, "rope_theta": 5e5}}


def trained(seed: int = 0):
    """A tiny model and its optimizer after three steps."""
    model = Lucie(CONFIG, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(seed)
    for _ in range(3):
        model(torch.randint(97, (2, 9)), torch.randint(97, (2, 9))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_everything_comes_back_bit_for_bit(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "c" / "step0000003", model, optimizer, STATE)
    assert os.listdir(tmp_path / "c") == ["step0000003"]
    again, fresh = Lucie(CONFIG, 9), None
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-3, fused=True)
    assert checkpoint.load(tmp_path / "c" / "step0000003", again, fresh) == STATE
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][name], fresh.state[q][name])
            assert optimizer.state[p][name].dtype == fresh.state[q][name].dtype
    model, options = checkpoint.from_run(tmp_path / "c" / "step0000003")
    assert options["seq_len"] == model.config.max_position_embeddings == 64
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_latest_goes_by_number_and_only_counts_complete_ones(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    folder = tmp_path / "checkpoints"
    for name in ("step0000900", "extension_step0001000", "step9999999", "step10000000", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
    (folder / "step99999999").mkdir()  # no state: not complete
    (folder / ".step99999999.tmp").mkdir()
    (folder / ".step99999999.tmp" / "state.json").write_text("{}")
    assert checkpoint.latest(tmp_path) == folder / "step10000000"
    assert checkpoint.latest(folder / "step0000900") == folder / "step0000900"


def test_killed_at_any_moment_of_a_save_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = trained()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder / "step0000003", model, optimizer, STATE)

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    def half_a_shard(_, storage_writer, **__):
        (storage_writer.path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
        raise Killed

    places = {
        "checkpoint.dcp.save": half_a_shard,
        "checkpoint.json.dump": die,
        "checkpoint.os.replace": die,
    }
    for place, death in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, death)
            with pytest.raises(Killed):
                checkpoint.save(folder / "step0000004", model, optimizer, STATE | {"step": 4})
        assert checkpoint.latest(tmp_path) == folder / "step0000003"
    checkpoint.save(folder / "step0000004", model, optimizer, STATE | {"step": 4})
    assert checkpoint.latest(tmp_path) == folder / "step0000004"
    assert sorted(os.listdir(folder)) == ["step0000003", "step0000004"]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    model, optimizer = trained()
    path = tmp_path / "step0000003"
    checkpoint.save(path, model, optimizer, STATE)
    (shard,) = path.glob("*.safetensors")
    if damage == "removed":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(CheckpointError, match="step0000003: damaged or incomplete"):
        checkpoint.load(path, model, optimizer)


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    model, optimizer = trained()
    path = tmp_path / "step0000003"
    checkpoint.save(path, model, optimizer, STATE)
    names = [file.name for file in path.iterdir()]
    for name in (*names, ".metadata"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        (copy / name).write_bytes(pickle.dumps(Bomb()))
        try:
            checkpoint.load(copy, model, optimizer)
        except CheckpointError:
            pass
        assert not (tmp_path / "exploded").exists()


def test_saving_again_never_leaves_neither(tmp_path, monkeypatch):
    model, optimizer = trained()
    path = tmp_path / "checkpoints" / "step0000003"
    checkpoint.save(path, model, optimizer, STATE)
    checkpoint.save(path, model, optimizer, STATE | {"samples": 99})
    assert checkpoint.read_state(path)["samples"] == 99
    assert os.listdir(path.parent) == ["step0000003"]


def test_a_full_disk_keeps_the_one_before(tmp_path, monkeypatch):
    model, optimizer = trained()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder / "step0000003", model, optimizer, STATE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoint.dcp.save", full)
    with pytest.raises(CheckpointError, match=r"step0000004: not saved .*No space left"):
        checkpoint.save(folder / "step0000004", model, optimizer, STATE)
    assert os.listdir(folder) == ["step0000003"]


def test_a_damaged_state_is_named(tmp_path):
    for text in ("{}", "", "[]", '{"step": 1, "config": {}}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json: damaged"):
            checkpoint.read_state(tmp_path)


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    model, optimizer = trained()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not saved"):
        checkpoint.save(tmp_path / "file" / "step0000003", model, optimizer, STATE)


def test_another_architecture_is_named(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "c", model, optimizer, STATE)
    other = Lucie(LucieConfig(**(TINY | {"hidden_size": 128}), max_position_embeddings=64))
    with pytest.raises(CheckpointError, match=r"hidden_size 64 \(here 128\)"):
        checkpoint.load(tmp_path / "c", other, None)


def test_weights_pass_to_a_longer_context(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "c", model, optimizer, STATE)
    longer = Lucie(LucieConfig(**TINY, max_position_embeddings=256, rope_theta=2e7), 5)
    checkpoint.load(tmp_path / "c", longer, None)
    assert torch.equal(longer.norm.weight, model.norm.weight)
    assert torch.equal(longer.embed_tokens.weight, model.embed_tokens.weight)


# --- Hugging Face


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
    config = checkpoint.hf_config(tmp_path)
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
