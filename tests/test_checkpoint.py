import errno
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from conftest import TINY, fork, launch
from safetensors.torch import load_file, save_file

import checkpoint
import hf
from checkpoint import CheckpointError
from config.cli import ConfigError
from data import tokenizer as tokenizers
from data.dataset import DataError
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
    state = checkpoint.load(tmp_path / "c" / "step0000003", again, fresh)
    assert state == STATE | {"milestone": False}
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][name], fresh.state[q][name])
            assert optimizer.state[p][name].dtype == fresh.state[q][name].dtype
    model, options = checkpoint.from_run(tmp_path / "c" / "step0000003")
    assert options["seq_len"] == model.config.max_position_embeddings == 64
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_latest_goes_by_number(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    folder = tmp_path / "checkpoints"
    for name in ("step0000900", "extension_step0001000", "step9999999", "step10000000", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    (folder / ".step99999999.tmp").mkdir()
    (folder / "step99999999.damaged").mkdir()
    (folder / "step99999998").write_text("a file")
    assert checkpoint.latest(tmp_path) == folder / "step10000000"
    assert checkpoint.latest(folder / "step0000900") == folder / "step0000900"


def test_a_save_goes_on_while_the_weights_change(tmp_path):
    model, optimizer = trained()
    saver = checkpoint.Saver(tmp_path / "checkpoints")
    expected = [p.detach().clone() for p in model.parameters()]
    state = dict(STATE)
    saver.save("step0000003", model, optimizer, state)
    state["samples"] = 99
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            optimizer.state[p]["exp_avg"].zero_()
    saver.save("step0000004", model, optimizer, state | {"step": 4})  # waits for the one before
    saver.wait()
    assert not saver.failed()
    first, second = (tmp_path / f"checkpoints/step000000{n}" for n in (3, 4))
    assert checkpoint.read_state(first) == STATE | {"milestone": False}
    assert checkpoint.read_state(second)["samples"] == 99
    for path in (first, second):
        checkpoint.verify(path)
    loaded, _ = checkpoint.from_run(first)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected))
    assert not any(p.any() for p in checkpoint.from_run(second)[0].parameters())


def test_only_the_newest_rolling_ones_stay_and_all_milestones(tmp_path):
    model, optimizer = trained()
    (tmp_path / "step0000008.damaged").mkdir()
    for step in range(1, 9):
        if step in (1, 6):  # a milestone of an earlier life is one for ever
            saver = checkpoint.Saver(tmp_path, keep_last=2)
        state = STATE | {"step": step}
        saver.save(f"long_step{step:07d}", model, optimizer, state, step in (2, 5))
        saver.wait()
    names = [f"long_step{step:07d}" for step in (2, 5, 7, 8)] + ["step0000008.damaged"]
    assert sorted(os.listdir(tmp_path)) == names


def killed_save(folder, k):
    """In a forked process: save step 4, and die at the k-th thing done to the file system."""
    model, optimizer = trained()
    seen, fsync = itertools.count(1), os.fsync

    def count():
        if next(seen) == k:
            os._exit(9)

    touching = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree")
    sys.addaudithook(
        lambda event, args: event in touching and args and "step000000" in str(args[0]) and count()
    )
    os.fsync = lambda handle: (count(), fsync(handle))
    checkpoint.save(folder / "step0000004", model, optimizer, STATE | {"step": 4})


def test_killed_at_any_file_boundary_leaves_a_sound_one(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder / "step0000003", *trained(), STATE)
    found, code = [], 9
    while code:
        shutil.rmtree(folder / "step0000004", ignore_errors=True)
        process = fork(killed_save, folder, len(found) + 1)
        process.join(60)
        code = process.exitcode
        assert code in (0, 9)
        found.append(checkpoint.read_state(checkpoint.newest_sound(tmp_path))["step"])
        left = sorted(os.listdir(folder))
        assert left == [f"step{step:07d}" for step in range(3, found[-1] + 1)]
    assert len(found) > 10
    # The old one up to the renaming, the new one from then on, though its name is not synced yet.
    assert set(found) == {3, 4} and found == sorted(found)


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b" ",
    "emptied": lambda content: b"",
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
    "removed": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["shard-00001.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_used(tmp_path, capsys, file, damage):
    model, optimizer = trained()
    saver = checkpoint.Saver(tmp_path / "checkpoints")
    for step in (900, 1000):
        saver.save(f"step{step:07d}", model, optimizer, STATE | {"step": step})
    saver.wait()
    path = tmp_path / "checkpoints/step0001000"
    content = (path / file).read_bytes()
    (path / file).unlink()
    if DAMAGES[damage]:
        (path / file).write_bytes(DAMAGES[damage](content))
    with pytest.raises(CheckpointError, match=f"step0001000/{file}: (damaged|missing)"):
        checkpoint.verify(path)
    sound = checkpoint.newest_sound(tmp_path)
    assert sound == tmp_path / "checkpoints/step0000900"
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"step0001000/{file}: " in line
    assert "renamed to step0001000.damaged" in line
    assert checkpoint.load(sound, model, optimizer)["step"] == 900
    names = ["step0000900", "step0001000.damaged"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names
    assert checkpoint.newest_sound(tmp_path) == sound and not capsys.readouterr().err


def test_a_run_of_which_all_is_damaged_is_not_begun_anew(tmp_path):
    path = tmp_path / "checkpoints/step0000003"
    checkpoint.save(path, *trained(), STATE)
    save_file({"model.norm.weight": torch.ones(64)}, path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more\.safetensors: not in the manifest"):
        checkpoint.verify(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            checkpoint.newest_sound(tmp_path)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "checkpoints/step0000003", model, optimizer, STATE)
    opening = open

    def failing(path, *args, **kwargs):
        if str(path).endswith(".safetensors"):
            raise OSError(5, "Input/output error", str(path))
        return opening(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing)
        with pytest.raises(CheckpointError, match=r"safetensors: Input/output error"):
            checkpoint.newest_sound(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step0000003"]
    path = tmp_path / "checkpoints/step0000003"
    (path / "state.json").rename(tmp_path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json: missing") as caught:
        checkpoint.verify(path, 1, 2)  # a rank that sees less than rank 0
    assert not isinstance(caught.value, checkpoint.Damaged)
    with pytest.raises(checkpoint.Damaged, match=r"state\.json: missing"):
        checkpoint.verify(path, 0, 2)


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    model, optimizer = trained()
    path = tmp_path / "checkpoints/step0000003"
    checkpoint.save(path, model, optimizer, STATE)
    names = [file.name for file in path.iterdir()]
    for name in (*names, ".metadata", "shard-00002.safetensors", "__0_0.distcp"):
        run = tmp_path / f"copy{name}"
        copy = run / "checkpoints/step0000003"
        shutil.copytree(path, copy)
        (copy / name).write_bytes(pickle.dumps(Bomb()))
        for read in (
            lambda copy=copy: checkpoint.load(copy, model, optimizer),
            lambda run=run: checkpoint.from_run(run),
            lambda run=run: checkpoint.newest_sound(run),
        ):
            with suppress(CheckpointError):
                read()
        assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()  # the bomb is one


def test_what_was_saved_is_not_written_over_nor_read_into_another_architecture(tmp_path):
    path = tmp_path / "checkpoints" / "step0000003"
    checkpoint.save(path, *trained(), STATE)
    message = "step0000003: not saved .*a checkpoint of this name exists"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(path, *trained(), STATE | {"samples": 99})
    checkpoint.verify(path)
    assert checkpoint.read_state(path) == STATE | {"milestone": False}
    other = Lucie(LucieConfig(**(TINY | {"hidden_size": 128}), max_position_embeddings=64))
    with pytest.raises(CheckpointError, match="hidden_size is 64 there and 128 here"):
        checkpoint.load(path, other, None)


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])  # full, and become read-only
def test_an_error_of_the_disk_keeps_the_one_before(tmp_path, monkeypatch, call, number):
    model, optimizer = trained()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder / "step0000003", model, optimizer, STATE)

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    saver = checkpoint.Saver(folder)
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        saver.save("step0000004", model, optimizer, STATE)
        deadline = time.monotonic() + 30
        while not saver.failed():  # which training asks after every step
            assert time.monotonic() < deadline
        with pytest.raises(
            CheckpointError, match=f"step0000004: not saved .*{os.strerror(number)}"
        ):
            saver.wait()
    assert not saver.failed()
    assert os.listdir(folder) == ["step0000003"]
    checkpoint.verify(folder / "step0000003")
    saver.save("step0000004", model, optimizer, STATE)  # when there is room again
    saver.wait()
    assert sorted(os.listdir(folder)) == ["step0000003", "step0000004"]


# --- inspect and export

BYTES = {bytes([b]): 4 + b for b in range(256)} | {b"ab": 260, b" a": 261}


def saved(folder, step=3, tokenizer=""):
    """A checkpoint whose tokenizer is known, or not."""
    config = LucieConfig(**TINY | {"vocab_size": 262}, max_position_embeddings=600)
    model = Lucie(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randint(262, (2, 9)), torch.randint(262, (2, 9))).backward()
    optimizer.step()
    options = vars(config) | {"seq_len": 600, "name": "run", "tokenizer": str(tokenizer)}
    del options["max_position_embeddings"]
    state = {"step": step, "samples": 24, "tokens": 14_400, "config": options}
    checkpoint.save(folder / f"step{step:07d}", model, optimizer, state)
    return model


@pytest.fixture
def ranks(tmp_path):
    tokenizers.save(BYTES, tmp_path / "ranks.tiktoken")
    return tmp_path / "ranks.tiktoken"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_is_exported(tmp_path, ranks, dtype, capsys):
    transformers = pytest.importorskip("transformers")
    model = saved(tmp_path / "out/run/checkpoints", tokenizer=ranks)
    run, out = tmp_path / "out/run", tmp_path / "hf"
    checkpoint.main(["export", str(run), "--out", str(out), f"--dtype={dtype}"])
    assert capsys.readouterr().out == f"exported {run}/checkpoints/step0000003 to {out}\n"
    assert sorted(os.listdir(out)) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    rounded = getattr(torch, dtype)
    assert theirs.dtype == rounded
    model.to(rounded)
    tokens = torch.randint(262, (1, 600))
    with torch.no_grad():
        difference = model.float()(tokens) - theirs.float()(input_ids=tokens).logits
    if dtype == "float32":  # in bf16 transformers 5 rounds the angles, too
        assert difference.abs().max() < 1e-4
    for name, tensor in theirs.state_dict().items():
        ours, start, end = hf.rows_of(model.config)[name]
        assert torch.equal(tensor, dict(model.named_parameters())[ours][start:end]), name
    text = "ab a\nété <s> ab"
    ids = transformers.AutoTokenizer.from_pretrained(out)(text).input_ids
    assert ids == tokenizers.load(ranks).encode(text)
    config = json.loads((out / "config.json").read_text())
    assert (config["training_steps"], config["training_tokens"]) == (3, 14_400)
    assert "| training_steps | 3 |" in (out / "README.md").read_text()


def test_inspect_tells_what_is_there_and_verifies_it(tmp_path, ranks, capsys):
    for step in (3, 12):
        model = saved(tmp_path / "run/checkpoints", step, tokenizer=ranks)
    checkpoint.main(["inspect", str(tmp_path / "run")])
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/run/checkpoints/step0000012"
    told = dict(line.strip().split("  ", 1) for line in lines)
    told = {name: value.strip() for name, value in told.items()}
    assert told["parameters"] == f"{model.num_params():,}" and told["vocab_size"] == "262"
    assert told["training_steps, all phases"] == "12" and told["tokenizer"] == str(ranks)
    assert last == "    verified: no byte has changed"


def test_bad_input_of_the_command(tmp_path, ranks):
    saved(tmp_path / "run/checkpoints", tokenizer=ranks)
    tokenizers.save(dict(list(BYTES.items())[:-1]), tmp_path / "small")
    export = ["export", tmp_path / "run", "--out", tmp_path / "out"]
    refused = [
        (["inspect", tmp_path], "no complete checkpoint"),
        ([*export[:2], "--out", tmp_path / "run"], "exists already"),
        ([*export, "--tokenizer", tmp_path / "nowhere"], "nowhere"),
        ([*export, "--tokenizer", tmp_path / "small"], "small has 261 tokens, but the model's"),
        (export[:2], "--out"),
    ]
    for args, message in refused:
        with pytest.raises((ConfigError, CheckpointError, DataError), match=message) as caught:
            checkpoint.main(list(map(str, args)))
        assert "\n" not in str(caught.value)
    shard = tmp_path / "run/checkpoints/step0000003/shard-00001.safetensors"
    shard.write_bytes(DAMAGES["last bit"](shard.read_bytes()))
    for args in (["inspect", tmp_path / "run"], export):
        with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors: damaged"):
            checkpoint.main(list(map(str, args)))
    done = launch("checkpoint", "inspect", f"{tmp_path}/nowhere")
    line = f"checkpoint: {tmp_path}/nowhere: no complete checkpoint there"
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "out"))]


def test_rows_that_are_missing_or_come_twice_are_noticed(tmp_path):
    saved(tmp_path)
    path = tmp_path / "step0000003"
    halves = load_file(path / "shard-00001.safetensors")
    halves = {name: rows[: len(rows) // 2].clone() for name, rows in halves.items()}
    places = {name: {"saved_offsets": [0] * rows.ndim} for name, rows in halves.items()}
    for shard in ("shard-00001.safetensors", "shard-00002.safetensors"):
        save_file(halves, path / shard, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            checkpoint.from_run(path)


def test_versions_name_the_libraries_and_the_code():
    found = checkpoint.versions()
    assert found["torch"] == torch.__version__ and len(found["python"].split(".")) == 3
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = found["code"].removesuffix("-dirty")
    assert head.stdout.strip().startswith(commit) or commit == "not a git checkout"
