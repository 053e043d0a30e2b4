import math

import pytest
import torch
from conftest import TINY

from model import KVCache, Lucie, LucieConfig, initial_weight


def test_lucie_7b_has_exactly_its_published_size():
    with torch.device("meta"):
        model = Lucie(LucieConfig())
    assert model.num_params() == 6_706_958_336
    n = 6_706_958_336 - 65_024 * 4096
    assert model.flops_per_token(4096) == 6 * n + 6 * 32 * 4096 * 4096


def transformers_twin(config: LucieConfig, seed: int = 1):
    """transformers' model of this config with random weights, and ours holding the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**vars(config), tie_word_embeddings=False)
    )
    ours, state = Lucie(config), theirs.state_dict()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            joined = {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}
            kind = name.split(".")[-2]
            parts = [name.replace(kind, f"{part}_proj") for part in joined.get(kind, ())] or [name]
            parts = [part if part.startswith("lm_head") else f"model.{part}" for part in parts]
            p.copy_(torch.cat([state[part] for part in parts]))
    return ours, theirs


@pytest.mark.parametrize("theta", [500_000.0, 20_000_000.0])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 1, 64), (6, 3, 128)])
def test_logits_and_gradients_equal_transformers(theta, heads, kv_heads, head_dim):
    config = LucieConfig(
        vocab_size=301,
        hidden_size=heads * head_dim,
        intermediate_size=520,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        max_position_embeddings=1111,
        initializer_range=0.03,
    )
    ours, theirs = transformers_twin(config)
    tokens = torch.randint(301, (2, 1111))
    logits = ours(tokens)
    reference = theirs(input_ids=tokens).logits
    assert (logits - reference).abs().max() < 1e-4
    assert reference.std() > 0.3  # the comparison is about something

    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    loss = ours(tokens, targets)
    expected = theirs(input_ids=tokens, labels=tokens).loss  # shifts by one itself
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    grad, reference = ours.lm_head.weight.grad, theirs.lm_head.weight.grad
    assert (grad - reference).norm() < 1e-4 * reference.norm()
    grad = ours.layers[0].self_attn.qkv_proj.weight.grad[: heads * head_dim]
    reference = theirs.model.layers[0].self_attn.q_proj.weight.grad
    assert (grad - reference).norm() < 1e-4 * reference.norm()


def test_loss_is_the_mean_over_targets_that_count(tiny_config):
    model = Lucie(tiny_config)
    tokens, targets = torch.randint(97, (2, 9)), torch.randint(97, (2, 9))
    targets[0, :5] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    total = model(tokens, targets, reduction="sum")
    assert total.item() == pytest.approx(13 * expected.item(), rel=1e-6)


def test_documents_do_not_see_each_other(tiny_config):
    model = Lucie(tiny_config)
    a, b = torch.randint(97, (1, 6)), torch.randint(97, (1, 4))
    together = model(torch.cat([b, a], 1), cu_seqlens=torch.tensor([0, 4, 10]))
    # Positions differ by 4 for all of a: only distances matter.
    assert torch.allclose(together[:, 4:], model(a), atol=1e-5)


def test_cached_decoding_equals_the_whole_sequence(tiny_config):
    model = Lucie(tiny_config)
    tokens = torch.randint(97, (2, 40))
    whole = model(tokens)
    cache = KVCache(tiny_config, 2, 40)
    parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 20, 1, 10], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    with pytest.raises(ValueError, match="41 tokens"):
        model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match="65 tokens"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_casting_the_model_never_touches_the_rotary_tables(tiny_config):
    model = Lucie(tiny_config)
    model(torch.zeros(1, 3, dtype=torch.int64))
    model.to(torch.bfloat16)
    cos, sin = model.rope_tables(torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16


def test_initial_weights_depend_on_seed_and_name_alone():
    config = LucieConfig(**TINY)
    deeper = LucieConfig(**(TINY | {"num_hidden_layers": 5, "num_key_value_heads": 4}))
    a, b = (dict(Lucie(c).named_parameters()) for c in (config, deeper))
    name = "layers.1.mlp.gate_up_proj.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], a[name.replace(".1.", ".0.")])
    assert not torch.equal(a[name], dict(Lucie(config, seed=7).named_parameters())[name])


def test_initial_weights_have_megatrons_spread():
    config = LucieConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    shape = torch.Size((512, 2048))
    for name, std in (
        ("embed_tokens.weight", 0.009),
        ("layers.3.self_attn.qkv_proj.weight", 0.009),
        ("layers.3.self_attn.o_proj.weight", 0.009 / math.sqrt(16)),
        ("layers.3.mlp.down_proj.weight", 0.009 / math.sqrt(16)),
    ):
        weight = initial_weight(config, name, shape, 42)
        assert weight.std().item() == pytest.approx(std, rel=5e-3)
        assert abs(weight.mean().item()) < std / 300
    for name in ("norm.weight", "layers.0.input_layernorm.weight"):
        assert torch.equal(initial_weight(config, name, torch.Size((8,)), 42), torch.ones(8))


@pytest.mark.parametrize(
    "change,field",
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 60}, "must be even"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_impossible_configs_name_the_field(change, field):
    with pytest.raises(ValueError, match=field):
        LucieConfig(**(TINY | change))


def test_the_packed_projection_is_not_kept_for_the_backward(tiny_config):
    """A slice of it, kept by attention, would keep the whole: 12 KB a token and layer in Lucie."""
    model, kept = Lucie(tiny_config), []
    packed = 8 * 16  # heads of q, k and v
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(torch.arange(12)[None], torch.arange(12)[None])
    shapes = [x.shape for x in kept if x.ndim == 4]
    assert torch.Size([1, 2, 12, 16]) in shapes  # attention's values
    assert all(x.untyped_storage().nbytes() < 4 * 12 * packed for x in kept if x.ndim == 4)
