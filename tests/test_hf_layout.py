import json
import os
import random
import shutil
import sys
import types

import pytest
import torch
from conftest import SHARED, TINY, needs_shared
from safetensors.torch import load_file, save_file

import checkpoint
import hf_export
import hf_layout
import tensor_files
from checkpoint import CheckpointError
from hf_export import config_json, model_card
from model import Lucie, LucieConfig

CONFIG = LucieConfig(**TINY, max_position_embeddings=64)


def random_config(seed: int) -> LucieConfig:
    """Head counts odd as often as not, one group of keys or several, both thetas."""
    draw = random.Random(seed)
    kv, group = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3, 4))
    return LucieConfig(
        vocab_size=draw.randint(30, 200),
        hidden_size=kv * group * draw.choice((4, 6, 8, 10, 16)),
        intermediate_size=draw.randint(20, 150),
        num_hidden_layers=draw.randint(1, 3),
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        rms_norm_eps=draw.choice((1e-5, 1e-6)),
        rope_theta=(5e5, 2e7)[seed % 2],
        max_position_embeddings=600,
        initializer_range=0.05,
    )


def written_by_transformers(config, folder, dtype=torch.float32, shard_size="1GB"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = vars(config) | {"tie_word_embeddings": False}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype)
    for name, p in theirs.named_parameters():
        if name.endswith("norm.weight"):  # all ones hide a norm that was mixed up
            torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    # Read again, for in bf16 the model that wrote it has rounded its angles.
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights_in(folder):
    """All tensors, by safetensors' own reader."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("seed", [0, 3, 5, 6])  # theta, shards and dtype in pairs
def test_logits_are_those_of_transformers_and_the_way_back_is_bit_equal(tmp_path, seed):
    config, sharded = random_config(seed), seed // 2 % 2
    dtype = (torch.float32, torch.bfloat16)[seed // 4 % 2]
    size = "4KB" if sharded else "1GB"
    theirs = written_by_transformers(config, tmp_path / "theirs", dtype, size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == sharded
    ours = checkpoint.from_hf(str(tmp_path / "theirs"))
    assert ours.config == config
    tokens = torch.randint(config.vocab_size, (2, 600))
    with torch.no_grad():
        difference = ours(tokens) - theirs(input_ids=tokens).logits
    assert difference.abs().max() < 1e-4

    checkpoint.to_hf(ours, tmp_path / "ours", dtype)
    before, after = weights_in(tmp_path / "theirs"), weights_in(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    again = checkpoint.from_hf(str(tmp_path / "ours"))
    assert again.config == config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters()))


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_the_export_and_agrees(tmp_path, monkeypatch, sharded):
    transformers = pytest.importorskip("transformers")
    if sharded:
        monkeypatch.setattr(tensor_files, "SHARD_BYTES", 30_000)
    config = LucieConfig(**TINY, max_position_embeddings=600, rope_theta=2e7)
    ours = Lucie(config)
    checkpoint.to_hf(ours, tmp_path / "ours", torch.float32)
    names = sorted(os.listdir(tmp_path / "ours"))
    index = tmp_path / "ours/model.safetensors.index.json"
    assert ("model.safetensors" in names, index.is_file()) == (not sharded, sharded)
    if sharded:
        assert "model-00001-of-00012.safetensors" in names
        total = sum(t.nbytes for t in weights_in(tmp_path / "ours").values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total
        for file in (tmp_path / "ours").glob("*.safetensors"):
            assert len(tensors := load_file(file)) == 1 or (
                sum(t.nbytes for t in tensors.values()) <= 30_000
            )
    theirs, facts = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(facts.values())
    assert theirs.generation_config.eos_token_id == 1 and theirs.generation_config.pad_token_id == 3
    tokens = torch.randint(97, (1, 600))
    with torch.no_grad():
        assert (ours(tokens) - theirs(input_ids=tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_made_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    model = Lucie(CONFIG)
    checkpoint.to_hf(model, tmp_path / "hf", torch.float32)
    again = hf_layout.from_hf(str(tmp_path / "hf"), dtype=dtype)
    for p, q in zip(model.parameters(), again.parameters()):
        assert q.dtype == dtype and torch.equal(p.to(dtype), q)


# --- what config.json and the model card say


@needs_shared
def test_config_equals_the_released_one(tmp_path):
    """Lucie-7B's own config.json key by key, after three phases as train.py counts them."""
    released = json.loads((SHARED / "lucie/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = hf_layout.config_of(tmp_path)
    changed = {"rope_theta": 2e7, "max_position_embeddings": 32_000}
    assert config == LucieConfig(**changed, initializer_range=0.02)

    state = {"step": 753_851, "tokens": 3_121_742_086_144}
    for _ in range(2):  # extension, annealing
        before = checkpoint.trained(state)
        state = {"step": 1_220, "tokens": 4_997_120_000, "trained_before": before}
    ours = config_json(LucieConfig(**changed), torch.bfloat16, state)
    assert ours["rope_theta"] == 20_000_000 and ours["max_position_embeddings"] == 32_000
    # The training began from 0.009; the released file has the default of transformers there.
    assert ours.pop("initializer_range") == 0.009 and released.pop("initializer_range") == 0.02
    assert not ours.pop("mlp_bias")  # younger than the released file
    assert ours == released


def test_the_card_tells_what_the_state_tells():
    state = {
        "step": 20, "samples": 160, "tokens": 5120, "seconds": 7200.0, "gpu_seconds": 36_000.0,
        "config": {"name": "annealing", "mixture": "some.csv", "learning_rate": 3e-5},
        "versions": {"torch": "2.13"},
        "trained_before": {"training_steps": 7, "training_tokens": 880},
    }  # fmt: skip
    card = model_card(CONFIG, torch.bfloat16, state, False)
    for row in (
        "phase | annealing", "step of this phase | 20", "samples of this phase | 160",
        "training steps, all phases | 27", "training tokens, all phases | 6,000", "hours | 2.00",
        "GPU hours | 10.00", "mixture | some.csv", "learning_rate | 3e-05", "torch | 2.13",
        "hidden_size | 64", f"parameters | {Lucie(CONFIG).num_params():,}",
    ):  # fmt: skip
        assert f"| {row} |\n" in card, row
    assert "training" not in model_card(CONFIG, torch.bfloat16, None, False)


# --- bad input


def test_tensors_that_are_computed_here_are_passed_over(tmp_path):
    model = Lucie(CONFIG)
    checkpoint.to_hf(model, tmp_path, torch.float32)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, path)
    again = checkpoint.from_hf(str(tmp_path))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """What from_hf says of a copy of a good folder of several shards that something happened to;
    it says so before it reads any weights."""
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 30_000)
    checkpoint.to_hf(Lucie(CONFIG), tmp_path / "good")

    def unread(*_):
        raise AssertionError("weights were read")

    def say(config=None, happen=None):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path / "good", bad)
        if config:
            values = json.loads((bad / "config.json").read_text())
            (bad / "config.json").write_text(json.dumps(values | config))
        if happen:
            happen(bad)
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
            patch.setattr(hf_layout, "read_tensor", unread)
            checkpoint.from_hf(str(bad))
        assert "\n" not in str(error.value) and str(bad) in str(error.value)
        return str(error.value)

    return say


@pytest.mark.parametrize(
    "config, message",
    [
        ({"tie_word_embeddings": True}, "tied"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_scaling {'rope_type"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": 3}, "rope_parameters 3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"head_dim": 32}, "head_dim 32 is not hidden_size / num_attention_heads = 16"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized by 'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "nanolucie_int4"}}, "4-bit"),
        ({"vocab_size": 96}, "is [97, 64], not [96, 64]"),
        ({"num_hidden_layers": 1}, "unknown tensor model.layers.1"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"hidden_size": "big"}, "config.json"),
        ({"num_attention_heads": 7}, "not a multiple"),
    ],
)
def test_another_architecture_is_named(broken, config, message):
    assert message in broken(config)


def rewrite(folder, change, name="model-00001-of-00006.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def index_says(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)


SHARD = "model-00002-of-00006.safetensors"
HAPPENINGS = {
    "shard gone": (lambda f: (f / SHARD).unlink(), f"lacks {SHARD}, which its index names"),
    "cut": (lambda f: os.truncate(f / SHARD, 2000), f"{SHARD}: cut short?"),
    "cut in the header": (lambda f: os.truncate(f / SHARD, 50), "or cut short"),
    "emptied": (lambda f: os.truncate(f / SHARD, 0), "not a safetensors file"),
    "one byte more": (lambda f: (f / SHARD).open("ab").write(b" ") and None, "cut short?"),
    "noise": (lambda f: (f / SHARD).write_bytes(b"\x10" + b"\0" * 7 + b"n" * 90), "damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "index a list": (lambda f: index_says(f, "[]"), "not a JSON object"),
    "index no JSON": (lambda f: index_says(f, "{"), "index.json"),
    "index of numbers": (lambda f: index_says(f, '{"weight_map": 3}'), "no weight_map"),
    "index of lists": (lambda f: index_says(f, '{"weight_map": {"a": []}}'), "no weight_map"),
    "elsewhere": (
        lambda f: index_says(f, '{"weight_map": {"a": "../x.safetensors"}}'), "not a file beside"
    ),
    "more": (
        lambda f: rewrite(f, lambda t: t.update(bias=torch.ones(3))), "unknown tensor bias"
    ),
    "lacking": (
        lambda f: rewrite(f, lambda t: t.pop("model.embed_tokens.weight")), "lacks model.embed_tok"
    ),
    "whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()})),
        "is I8, not one of",
    ),
    "twice": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.ones(97, 64)})),
        "lm_head.weight is in model-0000",
    ),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")] and None, "holds no safetensors"
    ),
    "a pickle": (
        lambda f: [p.unlink() for p in f.glob("model*")]
        and (f / "pytorch_model-00001-of-00002.bin").write_text("cos\n"),
        "is a pickle, which can run code and is not read; convert it with transformers: "
        "model.save_pretrained(NEW, safe_serialization=True)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAPPENINGS)
def test_a_broken_folder_is_named_before_weights_are_read(broken, name):
    happen, message = HAPPENINGS[name]
    assert message in broken(happen=happen)


def test_too_little_memory_is_known_before_weights_are_read(broken, monkeypatch):
    monkeypatch.setattr(hf_layout, "available_memory", lambda device: 1000)
    assert "0.0 GB are free on cpu; try bfloat16" in broken()


def test_too_little_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"takes 0\.00 GB and 0\.00 GB are free"):
        checkpoint.to_hf(Lucie(CONFIG), tmp_path / "hf")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_not_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something of this name"):
        checkpoint.to_hf(Lucie(CONFIG), tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
    with pytest.raises(CheckpointError, match="something of this name"):
        checkpoint.to_hf(Lucie(CONFIG), tmp_path / "mine.txt")


def test_fp16_that_would_overflow_is_refused(tmp_path):
    model = Lucie(CONFIG)
    checkpoint.to_hf(model, tmp_path / "fits", torch.float16)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = -1e5
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has values that fp16 cannot hold"):
        checkpoint.to_hf(model, tmp_path / "hf", torch.float16)
    assert os.listdir(tmp_path) == ["fits"]


def test_names_and_revisions_go_to_the_hub(tmp_path, monkeypatch):
    checkpoint.to_hf(Lucie(CONFIG), tmp_path / "hf")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if options["revision"] == "none":
            raise ValueError("404: no revision none\nand more")
        return str(tmp_path / "hf")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    name = "OpenLLM-France/Lucie-7B"
    for args, revision in (
        ((name,), None), ((name, "step0005000"), "step0005000"),
        ((f"{name}@extension_step0000250",), "extension_step0000250"),
    ):  # fmt: skip
        assert checkpoint.from_hf(*args).config == CONFIG
        assert asked[-1][0] == name and asked[-1][1]["revision"] == revision
    assert asked[-1][1]["allow_patterns"] == ["*.safetensors", "*.json"]
    assert asked[-1][1]["ignore_patterns"] == ["optimizer/*"]
    with pytest.raises(CheckpointError, match=r"Lucie-7B@none: not fetched \(ValueError: 404") as e:
        checkpoint.from_hf(f"{name}@none")
    assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="has no revision step5"):
        checkpoint.from_hf(f"{tmp_path}/hf@step5")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        checkpoint.from_hf(name)


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def read(name, start, end):
        if name == "model.lm_head.weight":
            raise OSError(5, "Input/output error", "somewhere")
        return torch.zeros(end - start, *([] if name.endswith("norm.weight") else [64]))

    with pytest.raises(CheckpointError):  # down_proj is of another shape
        hf_export.write_folder(CONFIG, read, tmp_path / "a")
    config = LucieConfig(**TINY | {"intermediate_size": 64}, max_position_embeddings=64)
    with pytest.raises(CheckpointError, match="somewhere: not written"):
        hf_export.write_folder(config, read, tmp_path / "b")
    assert os.listdir(tmp_path) == []
