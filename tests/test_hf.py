"""The Hugging Face layout, in and out: against transformers, and for folders that are not right."""

import json
import os
import shutil
import sys
import types
import weakref
from unittest.mock import Mock

import pytest
import torch
from conftest import SHARED, TINY, needs_shared
from safetensors.torch import load_file, save_file

import hf
from checkpoint import open_model
from hf import CheckpointError, config_json, config_of, to_hf
from model import Lucie, LucieConfig

CONFIG = LucieConfig(**TINY, max_position_embeddings=64)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A good folder of one file."""
    to_hf(Lucie(CONFIG), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A good folder of twelve files; the first of them holds the embedding alone."""
    monkeypatch.setattr(hf, "SHARD_BYTES", 30_000)
    to_hf(Lucie(CONFIG), tmp_path / "hf")
    return tmp_path / "hf"


def read(folder, dtype=None):
    return open_model(f"hf:{folder}", "cpu", dtype)[0]


def weights_in(folder):
    """All tensors, by safetensors' own reader."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def set_json(file, **values):
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# --- against transformers


@pytest.mark.parametrize(
    "heads, kv_heads, dtype, shard_bytes",
    [
        (4, 2, torch.float32, 10**9),
        (15, 5, torch.float32, 4000),
        (5, 1, torch.bfloat16, 4000),
    ],
)
def test_what_transformers_writes_is_read_and_the_other_way_round(
    tmp_path, monkeypatch, heads, kv_heads, dtype, shard_bytes
):
    """The same logits; and what we write has the same names, dtypes and bits as what we read."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": 2e7}
    shape |= {"hidden_size": 6 * heads, "rms_norm_eps": 1e-6, "max_position_embeddings": 600}
    config = LucieConfig(**TINY | shape)
    torch.manual_seed(0)
    values = vars(config) | {"tie_word_embeddings": False}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype)
    for name, p in theirs.named_parameters():
        if name.endswith("norm.weight"):  # all ones hide a norm that was mixed up
            torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    ours = read(tmp_path / "theirs")
    assert ours.config == config
    to_hf(ours, tmp_path / "ours", dtype)
    before, after = weights_in(tmp_path / "theirs"), weights_in(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name

    tokens = torch.randint(config.vocab_size, (2, 600))
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes == 4000)
        assert (folder / INDEX).exists() == (shard_bytes == 4000)
        # Read again, because in bf16 the model that wrote it has rounded its angles.
        model, facts = theirs.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(facts.values())
        with torch.no_grad():
            assert (ours(tokens) - model(input_ids=tokens).logits).abs().max() < 1e-4
    assert model.generation_config.eos_token_id == ours.eos_token_ids[0]


# --- what a folder says


@needs_shared
def test_config_equals_the_released_one(tmp_path):
    """Lucie-7B's own config.json key by key, after three phases as train.py counts them."""
    released = json.loads((SHARED / "lucie/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(released))
    changed = {"rope_theta": 2e7, "max_position_embeddings": 32_000}
    assert config_of(tmp_path) == LucieConfig(**changed, initializer_range=0.02)

    state = {"step": 753_851, "tokens": 3_121_742_086_144}
    for _ in range(2):  # extension, annealing
        before = hf.trained(state)
        state = {"step": 1_220, "tokens": 4_997_120_000, "trained_before": before}
    with torch.device("meta"):
        ours = config_json(Lucie(LucieConfig(**changed)), torch.bfloat16, state)
    # The training began from 0.009; the released file has the default of transformers there.
    assert ours.pop("initializer_range") == 0.009 and released.pop("initializer_range") == 0.02
    assert not ours.pop("mlp_bias")  # younger than the released file
    assert ours == released


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope, theta",
    [
        ({"type": "default"}, 5e5),
        ({"rope_theta": 2e7, "rope_type": "default", "factor": 1.0}, 2e7),
        ({"type": "linear", "factor": 2}, None),
        ({"rope_theta": 5e5, "factor": 4.0}, None),
        ({"partial_rotary_factor": 0.5}, None),
    ],
)
def test_angles_have_a_theta_and_are_not_scaled(folder, key, rope, theta):
    """In whichever of the two keys: transformers 4 and 5 differ. None: refused."""
    here = None if "rope_theta" in rope else 5e5
    set_json(folder / "config.json", **{"rope_theta": here, key: rope})
    if theta:
        assert config_of(folder).rope_theta == theta
        return
    with pytest.raises(CheckpointError, match=f"config.json: {key} .* is not supported"):
        config_of(folder)


@pytest.mark.parametrize(
    "generation, config, ids",
    [([5, 6], 7, (5, 6)), (None, [7, 8], (7, 8)), (5, None, (5,)), (None, None, (1,))],
)
def test_the_ids_that_end_a_text_are_read_and_written(folder, generation, config, ids):
    set_json(folder / "generation_config.json", eos_token_id=generation)
    set_json(folder / "config.json", eos_token_id=config)
    model = read(folder)
    assert model.eos_token_ids == ids
    to_hf(model, folder / "again")
    assert hf.eos_token_ids(folder / "again") == ids


def test_the_dtype_is_the_models_own_or_the_one_asked_for(folder):
    model = read(folder, torch.float16)
    for p, q in zip(Lucie(CONFIG).parameters(), model.parameters()):
        assert q.dtype == torch.float16 and torch.equal(p.half(), q)
    to_hf(model, folder / "own")
    assert {t.dtype for t in weights_in(folder / "own").values()} == {torch.float16}
    assert json.loads((folder / "own/config.json").read_text())["torch_dtype"] == "float16"


# --- which files are read, and how


def test_without_an_index_exactly_one_file_is_read(folder):
    """Whatever lies beside it; a stored table of angles is ignored."""
    weights = weights_in(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(weights, folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    (folder / "other.safetensors.index.json").write_text("{}")
    assert torch.equal(read(folder).lm_head.weight, weights["lm_head.weight"])


def test_a_folder_is_recognized_by_its_model_type(folder):
    set_json(folder / "config.json", architectures=None)
    assert open_model(str(folder), "cpu")[1] == str(folder)
    set_json(folder / "config.json", model_type=None)  # as in the config.json of a run
    with pytest.raises(CheckpointError, match="hf: no complete checkpoint there"):
        open_model(str(folder), "cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf/config\.json: not valid JSON"):
        open_model(str(folder), "cpu")


def test_reading_holds_one_tensor_and_only_the_rows_asked_for(folder):
    parameters, earlier = dict(Lucie(CONFIG).named_parameters()), []
    pieces = hf.pieces_of(folder, CONFIG)
    for name, first, rows in hf.read(pieces):
        assert torch.equal(rows, parameters[name][first : first + len(rows)])
        assert all(ref() is None for ref in earlier)
        earlier.append(weakref.ref(rows))
    assert len(earlier) == len(pieces)
    held = {name: (min(60, len(p)), min(100, len(p))) for name, p in parameters.items()}
    parts = {name: [] for name in held}
    for name, first, rows in hf.read(pieces, held):  # these rows of q|k|v are in three tensors
        parts[name].append((first, rows))
    for name, p in parameters.items():
        rows = [rows for _, rows in sorted(parts[name], key=lambda part: part[0])]
        assert torch.equal(torch.cat(rows), p[60:100]), name


def test_names_and_revisions_go_to_the_hub(folder, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if options["revision"] == "none":
            raise ValueError("404: no revision none\nand more")
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert read("OpenLLM-France/Lucie-7B@step0005000").config == CONFIG
    patterns = {"allow_patterns": ["*.safetensors", "*.json"], "ignore_patterns": ["*/*"]}
    assert asked == [("OpenLLM-France/Lucie-7B", patterns | {"revision": "step0005000"})]
    with pytest.raises(CheckpointError, match=r"x@none: could not be fetched .*: 404: .* none\)$"):
        read("x@none")
    with pytest.raises(CheckpointError, match="@step5: no such folder"):
        read(f"{folder}@step5")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        read("x")


# --- folders that cannot be read or written


SHARD = "model-00001-of-00012.safetensors"


def write(text, name=INDEX):
    return lambda folder: (folder / name).write_text(text)


def replace(name, tensor):
    return lambda folder: save_file(load_file(folder / SHARD) | {name: tensor}, folder / SHARD)


def only_a_pickle(folder):
    for file in folder.glob("model*"):
        file.rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and False in a Lucie"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"head_dim": 32}, "head_dim is 32, and 16 in a Lucie"),
        ({"quantization_config": {"quant_method": "gptq"}}, "holds quantized weights"),
        ({"vocab_size": 96}, "is F32 [97, 64], not [96, 64]"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"hidden_size": "big"}, "config.json"),
        (write("[]", "config.json"), "not a JSON object"),
        (write('{"weight_map": 3}'), "no weight_map"),
        (write('{"weight_map": {"a": "../x.safetensors"}}'), "is not a file beside it"),
        (lambda folder: (folder / SHARD).unlink(), f"lacks {SHARD}"),
        (lambda folder: os.truncate(folder / SHARD, 2000), f"{SHARD}: damaged, or not readable"),
        (replace("model.embed_tokens.weight", torch.ones(97, 64).int()), "is I32 [97, 64]"),
        (replace("lm_head.weight", torch.ones(97, 64)), "lm_head.weight is unknown or comes twice"),
        (only_a_pickle, "lacks model.safetensors; pickles (.bin, .pt) can run code"),
    ],
)
def test_a_broken_folder_is_named_before_weights_are_read(sharded, monkeypatch, change, message):
    if isinstance(change, dict):
        set_json(sharded / "config.json", **change)
    else:
        change(sharded)
    monkeypatch.setattr(hf, "read", None)
    with pytest.raises(CheckpointError) as error:
        read(sharded)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and str(sharded) in str(error.value)


def test_too_little_memory_is_known_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(hf, "read", None)
    monkeypatch.setattr(hf, "available_memory", lambda device: 1000)
    with pytest.raises(CheckpointError, match=r"0\.0 GB are free on cpu; try bfloat16"):
        read(folder)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_appears_as_a_whole_and_never_replaces_another(tmp_path, monkeypatch, error):
    """The disk fails, Ctrl-C: nothing is left."""
    model, name = Lucie(CONFIG), tmp_path / "hf"
    with monkeypatch.context() as patch, pytest.raises((CheckpointError, KeyboardInterrupt)):
        patch.setattr(hf, "sync", Mock(side_effect=error))
        to_hf(model, name)
    assert os.listdir(tmp_path) == []
    to_hf(model, name)
    for path in (name, name / "config.json"):
        with pytest.raises(CheckpointError, match="exists already; choose another name"):
            to_hf(model, path)
    assert os.listdir(tmp_path) == ["hf"] and len(os.listdir(name)) == 4
