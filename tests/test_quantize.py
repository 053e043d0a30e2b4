"""4-bit models: what they weigh, how they are filled and saved, and how well they predict."""

import json
import math
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import nn

import quantize
import tensor_files
from hf_layout import CheckpointError
from kernels.int4_linear import unpack
from model import KVCache, Lucie, LucieConfig
from quantize import Int4Linear, bytes_of, fill, load, quantize_, save


def small(**changes) -> LucieConfig:
    shape = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 128}
    return LucieConfig(**TINY | shape | changes)


def weights_of(model: Lucie) -> dict[str, torch.Tensor]:
    """The parameters of the model as it was, the quantised among them as they are unpacked."""
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            weights[f"{name}.weight"] = unpack(module.packed, module.scales, torch.float32)
    return weights


def empty(config: LucieConfig) -> Lucie:
    with torch.device("meta"):
        model = Lucie(config)
    return quantize_(model).to_empty(device="cpu")


def same(a: Lucie, b: Lucie) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(x, theirs[n]) and x.dtype == theirs[n].dtype for n, x in ours.items())


def test_what_is_quantised_and_what_is_not():
    model = Lucie(small())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantize_(model)
    assert not any(isinstance(m, nn.Linear) for m in model.layers.modules())
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 4 * 2
    after = weights_of(model)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        error = float((after[name] - weight).norm() / weight.norm())
        packed = name.startswith("layers.") and "norm" not in name
        assert (0.05 < error < 0.11) if packed else error == 0, name


def test_the_quantised_model_is_the_model_of_its_unpacked_weights():
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
    model(tokens, tokens)  # no torch.no_grad() is needed


def test_parts_in_any_order_give_what_the_whole_gives():
    whole = Lucie(small())
    parts = []
    for name, p in whole.named_parameters():
        cuts = [0, 1, len(p) // 3, len(p)] if p.ndim == 2 else [0, len(p)]
        parts += [(name, a, p.detach()[a:b]) for a, b in pairwise(cuts)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist()
    filled = empty(small())
    fill(filled, (parts[i] for i in order))
    assert same(filled, quantize_(whole))


def test_what_is_filled_in_is_in_the_dtype_of_the_model():
    whole = Lucie(small())
    with torch.device("meta"):
        model = Lucie(small()).bfloat16()
    quantize_(model).to_empty(device="cpu")
    fill(model, ((n, 0, p.detach()) for n, p in whole.named_parameters()))
    assert same(model, quantize_(whole).bfloat16())
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.append(("layers.9.mlp.down_proj.weight", 0, torch.ones(2, 256))), "unknown"),
        (lambda s: s.append(("norm.weight", 0, torch.ones(128))), "norm.weight: rows of it from 0"),
        (lambda s: s.append(("norm.weight", 100, torch.ones(40))), "no part of [128]"),
        (lambda s: s.append(("lm_head.weight", -1, torch.ones(1, 128))), "no part of"),
        (lambda s: s.append(("lm_head.weight", 0, torch.ones(1, 127))), "[1, 127] from row 0"),
        (lambda s: s.pop(), "lacks lm_head.weight or rows of it, and 0 more"),
        (lambda s: s.__setitem__(-1, (s[-1][0], 0, s[-1][2][1:])), "lacks lm_head.weight or rows"),
        (lambda s: s[3][2].__setitem__((3, 5), torch.nan), "not finite"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(change, said):
    stream = [(n, 0, p.detach()) for n, p in Lucie(small()).named_parameters()]
    assert stream[3][0].endswith("proj.weight") and stream[-1][0] == "lm_head.weight"
    change(stream)
    with pytest.raises(CheckpointError) as error:
        fill(empty(small()), stream)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_columns_that_groups_do_not_divide_leave_the_model_alone():
    model = Lucie(small(intermediate_size=192))
    with pytest.raises(ValueError, match="groups of 128 do not divide 192 columns"):
        quantize_(model, 128)
    assert not any(isinstance(m, Int4Linear) for m in model.modules())
    assert model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="multiples of 32, not 128 and 200"):
        quantize_(Lucie(small(intermediate_size=200)))
    for size in (384, 192, 96):  # three times the largest group that divides it
        chosen = quantize_(Lucie(small(intermediate_size=size))).layers[0].mlp.down_proj
        assert chosen.group_size == size // 3
    quantize_(model, 64)


# On the disk


@pytest.fixture
def saved(tmp_path) -> tuple[Lucie, Path]:
    model = quantize_(Lucie(small()).bfloat16())
    save(model, tmp_path / "int4")
    return model, tmp_path / "int4"


def test_saved_and_loaded_is_the_same(saved):
    model, folder = saved
    assert same(load(folder), model)
    assert load(folder).config == model.config
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "nanolucie_int4", "group_size": 128}
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert set(vars(model.config)) < set(config)


def test_other_group_sizes_and_dtypes_are_kept(tmp_path):
    model = quantize_(Lucie(small(hidden_size=64, intermediate_size=96)), 32)
    save(model, tmp_path / "int4")
    assert same(load(tmp_path / "int4"), model)
    assert load(tmp_path / "int4").norm.weight.dtype == torch.float32


def test_several_files(saved, tmp_path, monkeypatch):
    model, _ = saved
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 40_000)
    save(model, tmp_path / "shards")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 60_000 for file in files)
    assert same(load(tmp_path / "shards"), model)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=files[1].name):
        load(tmp_path / "shards")


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | tensors
    save_file({n: t for n, t in state.items() if t is not None}, folder / "model.safetensors")


def reconfigure(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


HEAD, PACKED = "lm_head.weight", "layers.1.mlp.down_proj.packed"


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: rewrite(f, **{PACKED: None}), f"lacks {PACKED} and 0 more"),
        (lambda f: rewrite(f, extra=torch.ones(1)), "unknown tensor extra"),
        (
            lambda f: rewrite(f, **{HEAD: torch.ones(3, 128).bfloat16()}),
            f"{HEAD} is torch.bfloat16 [3, 128], not torch.bfloat16 [97, 128]",
        ),
        (lambda f: rewrite(f, **{HEAD: torch.ones(97, 128)}), f"{HEAD} is torch.float32"),
        (lambda f: (f / "model.safetensors").write_bytes(b"0" * 100), "model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: reconfigure(f, quantization_config={"quant_method": "gptq"}), "'gptq'"),
        (lambda f: reconfigure(f, quantization_config=None), "quantised by None"),
        (lambda f: reconfigure(f, torch_dtype="int4"), "torch_dtype 'int4'"),
        (
            lambda f: reconfigure(
                f, quantization_config={"quant_method": "nanolucie_int4", "group_size": 100}
            ),
            "groups of 100",
        ),
        (
            lambda f: reconfigure(f, quantization_config={"quant_method": "nanolucie_int4"}),
            "group_size None",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(saved, damage, said):
    _, folder = saved
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_read_where_memory_does_not_suffice(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(quantize, "available_memory", lambda device: 1000)
    monkeypatch.setattr(quantize, "safe_open", None)
    with pytest.raises(CheckpointError, match=r"take 0\.\d GB, 0\.0 are free on cpu"):
        load(folder)


def test_nothing_is_written_over(saved):
    model, folder = saved
    with pytest.raises(CheckpointError, match="something of this name"):
        save(model, folder)
    with pytest.raises(CheckpointError, match="is not quantised"):
        save(Lucie(small()), folder.parent / "plain")
    assert same(load(folder), model)


# Memory and quality


@pytest.mark.parametrize(
    "config", [LucieConfig(), LucieConfig(max_position_embeddings=32_000), small()]
)
def test_bytes_are_those_of_the_tensors(config):
    with torch.device("meta"):
        model = quantize_(Lucie(config).bfloat16())
    weights = sum(x.nbytes for x in model.state_dict().values())
    for context, batch in ((64, 1), (128, 3)):
        cache = KVCache(config, batch, context, "meta", torch.bfloat16)
        assert bytes_of(config, context, batch) == (weights, cache.k.nbytes + cache.v.nbytes)


def test_lucie_7b_with_2048_tokens_takes_less_than_5_gb():
    weights, cache = bytes_of(LucieConfig(), 2048)
    assert weights + cache < 5e9
    packed = 6_174_015_488 * 33 // 64  # of the parameters 4 bits, and 2 bytes for every 128
    plain = 6_706_958_336 - 6_174_015_488
    assert (weights, cache) == (packed + 2 * plain, 268_435_456)


def read_texts(count: int) -> torch.Tensor:
    """Python's own library as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.tensor(list(b"\n".join(f.read_bytes() for f in files)[:count]))


@pytest.mark.slow
def test_perplexity_rises_by_less_than_3_per_cent():
    config = LucieConfig(
        vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.02,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    text = read_texts(300_000)
    training, held_out = text[:-20_000], text[-20_000:]
    model = Lucie(config)
    steps = 80
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(training) - 129, (8,))
        batch = torch.stack([training[s : s + 129] for s in starts.tolist()])
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()

    def perplexity() -> float:
        rows = held_out[: len(held_out) // 129 * 129].view(-1, 129)
        with torch.no_grad():
            return math.exp(model(rows[:, :-1], rows[:, 1:]))

    before = perplexity()
    assert before < 16  # 256 at the start, 23 for who knows how frequent each byte is
    quantize_(model)
    after = perplexity()
    print(f"perplexity {before:.3f}, in 4 bits {after:.3f}: {after / before - 1:+.2%}")
    assert before != after < 1.03 * before
