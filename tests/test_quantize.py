"""4-bit models: what they weigh, how they are filled and saved, and how well they predict."""

from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_hf import set_json
from torch import nn

import hf
from hf import CheckpointError
from kernels.int4_linear import unpack
from model import KVCache, Lucie, LucieConfig
from quantize import Int4Linear, build, is_int4, load, quantize_, save


def small(**changes) -> LucieConfig:
    shape = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 128}
    return LucieConfig(**TINY | shape | changes)


def weights_of(model: Lucie) -> dict[str, torch.Tensor]:
    """The parameters of the model as it was, the quantized ones as they are unpacked."""
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            weights[f"{name}.weight"] = unpack(module.packed, module.scales, torch.float32)
    return weights


def same(a: Lucie, b: Lucie) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(x, theirs[n]) and x.dtype == theirs[n].dtype for n, x in ours.items())


def test_the_matrices_of_the_blocks_are_quantized_and_nothing_else():
    model = Lucie(small())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantize_(model)
    assert not any(isinstance(m, nn.Linear) for m in model.layers.modules())
    after = weights_of(model)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        error = float((after[name] - weight).norm() / weight.norm())
        packed = name.startswith("layers.") and "norm" not in name
        assert (0.05 < error < 0.11) if packed else error == 0, name


def test_the_quantized_model_is_the_model_of_its_unpacked_weights():
    """Logits, loss and decoding against a cache; by prompt and token by token."""
    model = quantize_(Lucie(small()))
    plain = Lucie(small())
    plain.load_state_dict(weights_of(model))
    tokens = torch.randint(97, (2, 24))
    with torch.no_grad():
        expected = plain(tokens)
        assert torch.allclose(model(tokens), expected, atol=1e-5)
        assert torch.allclose(model(tokens, tokens), plain(tokens, tokens), atol=1e-5)
        cache = KVCache(model.config, 2, 24)
        steps = [model(tokens[:, :5], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(5, 24)]
        assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_folder_is_quantized_as_it_is_read(tmp_path):
    whole = Lucie(small())
    hf.to_hf(whole, tmp_path / "hf")
    pieces = hf.pieces_of(tmp_path / "hf", small())
    model = build(small(), pieces, torch.bfloat16, "cpu", "hf")
    assert same(model, quantize_(whole).bfloat16())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()
    broken = Lucie(small())
    with torch.no_grad():
        broken.layers[0].mlp.down_proj.weight[3, 5] = torch.nan
    hf.to_hf(broken, tmp_path / "nan")
    pieces = hf.pieces_of(tmp_path / "nan", small())
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj.*not finite"):
        build(small(), pieces, torch.bfloat16, "cpu", "hf")


def test_groups_divide_the_columns():
    with pytest.raises(ValueError, match="groups of 128 do not divide 192 columns"):
        quantize_(Lucie(small(intermediate_size=192)), 128)
    with pytest.raises(ValueError, match="multiples of 32, not 128 and 200"):
        quantize_(Lucie(small(intermediate_size=200)))
    for size in (384, 192, 96):  # three times the largest group that divides it
        chosen = quantize_(Lucie(small(intermediate_size=size))).layers[0].mlp.down_proj
        assert chosen.group_size == size // 3


# --- on the disk


@pytest.fixture
def saved(tmp_path) -> tuple[Lucie, Path]:
    model = quantize_(Lucie(small()).bfloat16())
    save(model, tmp_path / "int4")
    return model, tmp_path / "int4"


def test_saved_and_loaded_is_the_same(saved, tmp_path, monkeypatch):
    model, folder = saved
    assert is_int4(folder) and same(load(folder), model) and load(folder).config == model.config
    with pytest.raises(CheckpointError, match="exists already; choose another name"):
        save(model, folder)

    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)  # several files, smaller groups, fp32
    model = quantize_(Lucie(small(hidden_size=64, intermediate_size=96)), 32)
    save(model, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(load(tmp_path / "shards"), model)
    with pytest.raises(CheckpointError, match="is not quantized"):
        save(Lucie(small()), tmp_path / "plain")


def rewrite(**tensors):
    def change(folder):
        state = load_file(folder / "model.safetensors") | tensors
        save_file({n: t for n, t in state.items() if t is not None}, folder / "model.safetensors")

    return change


def reconfigure(**values):
    return lambda folder: set_json(folder / "config.json", **values)


HEAD, PACKED = "lm_head.weight", "layers.1.mlp.down_proj.packed"
OURS = {"quant_method": "nanolucie_int4"}


@pytest.mark.parametrize(
    "change, message",
    [
        (rewrite(**{PACKED: None}), f"lacks {PACKED} and 0 more"),
        (rewrite(extra=torch.ones(1)), "extra is unknown or comes twice"),
        (rewrite(**{HEAD: torch.ones(3, 128).bfloat16()}), f"{HEAD} is torch.bfloat16 [3, 128]"),
        (rewrite(**{HEAD: torch.ones(97, 128)}), f"{HEAD} is torch.float32"),
        (reconfigure(quantization_config={"quant_method": "gptq"}), "does not hold nanoLucie's"),
        (reconfigure(quantization_config=OURS | {"group_size": 100}), "groups of 100"),
        (reconfigure(torch_dtype="int3"), "config.json: nn.Module.to only accepts floating point"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(saved, change, message):
    _, folder = saved
    change(folder)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_lucie_7b_with_2048_tokens_takes_less_than_5_gb():
    with torch.device("meta"):
        model = quantize_(Lucie(LucieConfig()).bfloat16())
        cache = KVCache(model.config, 1, 2048, "meta", torch.bfloat16)
    packed = 6_174_015_488 * 33 // 64  # of the parameters 4 bits, and 2 bytes for every 128
    plain = 6_706_958_336 - 6_174_015_488
    weights = sum(x.nbytes for x in model.state_dict().values())
    assert weights == packed + 2 * plain and cache.k.nbytes == cache.v.nbytes == 134_217_728
    assert weights + cache.k.nbytes + cache.v.nbytes < 5e9
