import csv
import hashlib
import json
import os
import shutil

import pytest
import torch
from conftest import SHARED, TINY, launch, needs_shared
from safetensors.torch import load_file, save_file

import checkpoint
import tensor_files
import train
from data import tokenizer as tokenizers
from model import Lucie, LucieConfig
from schedule import revision_name

BYTES = {bytes([b]): 4 + b for b in range(256)} | {b"ab": 260, b" a": 261}
SMALL = TINY | dict(
    vocab_size=262,
    seq_len=16,
    samples=160,  # 20 steps of 8
    global_batch_size=8,
    micro_batch_size=8,
    learning_rate=1e-2,
    warmup_samples=24,
    log_every=1,
    checkpoint_every=10,
    dtype="float32",
    device="cpu",
)


@pytest.fixture
def ranks(tmp_path):
    tokenizers.save(BYTES, tmp_path / "ranks.tiktoken")
    return tmp_path / "ranks.tiktoken"


def options(data, **change):
    values = SMALL | {"mixture": data / "mixture.csv", "out_dir": data / "out", "name": "run"}
    return [f"--{name}={value}" for name, value in (values | change).items()]


def saved(folder, step=3, **change):
    """A checkpoint of a tiny model whose weights and moments are all different."""
    config = LucieConfig(**TINY | {"vocab_size": 262}, max_position_embeddings=600)
    model = Lucie(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randint(262, (2, 9)), torch.randint(262, (2, 9))).backward()
    optimizer.step()
    options = vars(config) | {"seq_len": 600, "name": "run", "tokenizer": ""}
    del options["max_position_embeddings"]
    state = {"step": step, "samples": 24, "tokens": 14_400, "config": options | change}
    checkpoint.save(folder / revision_name(step), model, optimizer, state)
    return model, optimizer


def cut_in_two(path):
    """The same checkpoint as two ranks would have written it: rows of every tensor in two files."""
    (shard,) = path.glob("shard-*")
    tensors = load_file(shard)
    shard.unlink()
    facts = json.loads((path / "manifest.json").read_text())["files"]
    del facts[shard.name]
    for number in (1, 2):
        part, places = {}, {}
        for name, tensor in tensors.items():
            middle = -(-len(tensor) // 2)
            part[name] = tensor[:middle] if number == 1 else tensor[middle:].clone()
            places[name] = {"saved_offsets": [(number - 1) * middle] + [0] * (tensor.ndim - 1)}
        file = path / f"shard-{number:05d}.safetensors"
        save_file(part, file, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        facts[file.name] = {"bytes": len(content), "sha256": digest}
    (path / "manifest.json").write_text(checkpoint.manifest(facts))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks_that_wrote", [1, 2])
def test_transformers_reads_what_is_exported(tmp_path, ranks, dtype, ranks_that_wrote, capsys):
    transformers = pytest.importorskip("transformers")
    model, _ = saved(tmp_path / "out/run/checkpoints", tokenizer=str(ranks))
    if ranks_that_wrote == 2:
        cut_in_two(tmp_path / "out/run/checkpoints/step0000003")
    to = tmp_path / "hf"
    checkpoint.main(["export", f"{tmp_path}/out/run", "--to", str(to), f"--dtype={dtype}"])
    assert capsys.readouterr().out == f"{tmp_path}/out/run/checkpoints/step0000003 is in {to}\n"
    assert sorted(os.listdir(to)) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to, dtype="auto")
    rounded = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert theirs.dtype == rounded
    model.to(rounded)
    tokens = torch.randint(262, (1, 600))
    with torch.no_grad():
        difference = model.float()(tokens) - theirs.float()(input_ids=tokens).logits
    if dtype == "fp32":  # in bf16 transformers 5 rounds the angles, too
        assert difference.abs().max() < 1e-4
    for name, tensor in theirs.state_dict().items():
        ours, start, end = checkpoint.hf_layout.rows_of(model.config)[name]
        assert torch.equal(tensor, dict(model.named_parameters())[ours][start:end]), name
    text = "ab a\nété <s> ab"
    ids = transformers.AutoTokenizer.from_pretrained(to)(text).input_ids
    assert ids == tokenizers.load(ranks).encode(text)
    config = json.loads((to / "config.json").read_text())
    assert (config["training_steps"], config["training_tokens"]) == (3, 14_400)
    assert "| step of this phase | 3 |" in (to / "README.md").read_text()


def test_without_a_tokenizer_the_export_says_so(tmp_path, capsys):
    saved(tmp_path)
    checkpoint.main(["export", f"{tmp_path}/step0000003", "--to", f"{tmp_path}/hf"])
    assert "without a tokenizer: the run names none" in capsys.readouterr().out
    assert not list((tmp_path / "hf").glob("token*"))


def log_of(run):
    with open(run / "log.csv", newline="") as f:
        names = ("training_steps", "training_loss", "grad_norm", "learning_rate")
        return [[row[n] for n in names] for row in csv.DictReader(f)]


def test_a_run_that_travelled_goes_on_bit_for_bit(tiny_data, monkeypatch):
    """10 steps, exported in bf16 with its optimizer, imported elsewhere, 10 more."""
    train.main(options(tiny_data, name="whole"))
    half = options(tiny_data, name="half")
    train.main([*half, "--init_from=auto"])
    shutil.rmtree(tiny_data / "out/half/checkpoints/step0000020")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 100_000)
    args = ["--to", f"{tiny_data}/hf", "--dtype=bf16", "--optimizer"]
    checkpoint.main(["export", f"{tiny_data}/out/half", *args])
    names = os.listdir(tiny_data / "hf/optimizer")
    assert "training_state.json" in names and "optimizer.safetensors.index.json" in names
    path = tiny_data / "out/half/checkpoints/step0000010"
    exported = {}
    for file in (tiny_data / "hf/optimizer").glob("*.safetensors"):
        exported |= load_file(file)
    (shard,) = path.glob("*.safetensors")
    moments = load_file(shard)["exp_avg_sq.layers.1.self_attn.qkv_proj.weight"]
    assert torch.equal(exported["exp_avg_sq.model.layers.1.self_attn.k_proj.weight"],
                       moments[64:96])  # fmt: skip
    shutil.rmtree(tiny_data / "out/half")

    checkpoint.main(["import", f"{tiny_data}/hf", "--to", f"{tiny_data}/elsewhere/on"])
    checkpoint.main(["inspect", f"{tiny_data}/elsewhere/on", "--verify"])
    shutil.rmtree(tiny_data / "hf")
    where = {"out_dir": tiny_data / "elsewhere", "name": "on", "init_from": "resume"}
    train.main(options(tiny_data, **where))
    on, whole = tiny_data / "elsewhere/on", tiny_data / "out/whole"
    assert log_of(on) == log_of(whole)[10:] and len(log_of(on)) == 10
    last = [load_file(next((run / "checkpoints/step0000020").glob("*.safetensors")))
            for run in (on, whole)]  # fmt: skip
    assert last[0].keys() == last[1].keys() and len(last[0]) == 3 * 15
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_alone_begin_any_phase_and_are_not_resumed(tiny_data, ranks, dtype, capsys):
    saved(tiny_data / "first", tokenizer=str(ranks))
    checkpoint.main(["export", f"{tiny_data}/first/step0000003", "--to", f"{tiny_data}/hf",
                     f"--dtype={dtype}"])  # fmt: skip
    run = tiny_data / "out/lucie"
    checkpoint.main(["import", f"{tiny_data}/hf", "--to", str(run)])
    path = run / "checkpoints/step0000003"
    assert f"{path} (weights only, for --init_from)" in capsys.readouterr().out
    checkpoint.verify(path)
    model, config = checkpoint.from_run(run)
    expected = checkpoint.from_hf(str(tiny_data / "hf"))
    for p, q in zip(model.parameters(), expected.parameters()):
        assert p.dtype == torch.float32 and torch.equal(p, q)
    assert config["tokenizer"] == str(run / "tokenizer")
    assert tokenizers.load(config["tokenizer"]).ranks == BYTES

    change = dict(learning_rate=0.0, min_learning_rate=0.0, warmup_samples=0, samples=8)
    train.main(options(tiny_data, name="next", init_from=run, **change))
    after, _ = checkpoint.from_run(tiny_data / "out/next")
    assert all(torch.equal(p, q) for p, q in zip(after.parameters(), expected.parameters()))
    told = checkpoint.trained(checkpoint.read_state(checkpoint.latest(tiny_data / "out/next")))
    assert told == {"training_steps": 4, "training_tokens": 14_400 + 8 * 16}
    train.main(options(tiny_data, name="from_hf", init_from=f"hf:{tiny_data}/hf", **change))
    state = checkpoint.read_state(checkpoint.latest(tiny_data / "out/from_hf"))
    assert checkpoint.trained(state) == told

    for wanted in ("resume", "auto"):
        with pytest.raises(train.ConfigError, match="weights without optimizer states") as error:
            train.main(options(tiny_data, name="lucie", init_from=wanted))
        assert f"--init_from={run}, under another --name" in str(error.value)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(checkpoint.CheckpointError, match="without optimizer states"):
        checkpoint.load(path, model, optimizer)
    args = ["--to", f"{tiny_data}/again", "--optimizer"]
    with pytest.raises(checkpoint.CheckpointError, match="has no optimizer states"):
        checkpoint.main(["export", str(run), *args])
    checkpoint.main(["export", str(run), "--to", f"{tiny_data}/again", f"--dtype={dtype}"])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tiny_data / "again" / name).read_bytes() == (tiny_data / "hf" / name).read_bytes()


def test_another_phase_of_other_weights_is_refused(tiny_data):
    saved(tiny_data / "first")
    checkpoint.main(["export", f"{tiny_data}/first/step0000003", "--to", f"{tiny_data}/hf"])
    path = tiny_data / "hf/config.json"
    values = json.loads(path.read_text())
    for change, message in (({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 \\(here 1e-05\\)"),
                            ({"rope_scaling": {"factor": 8}}, "rope_scaling")):  # fmt: skip
        path.write_text(json.dumps(values | change))
        with pytest.raises(checkpoint.CheckpointError, match=message):
            train.main(options(tiny_data, init_from=f"hf:{tiny_data}/hf"))


@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder"])
def test_inspect_tells_what_is_there(tmp_path, ranks, kind, capsys):
    model, _ = saved(tmp_path / "run/checkpoints", tokenizer=str(ranks))
    saved(tmp_path / "run/checkpoints", step=12, tokenizer=str(ranks))
    path = tmp_path / "run" / ("checkpoints/step0000012" if kind == "checkpoint" else "")
    if kind == "folder":
        checkpoint.main(["export", f"{tmp_path}/run", "--to", f"{tmp_path}/hf"])
        path = tmp_path / "hf"
    else:
        state = tmp_path / "run/checkpoints/step0000003/state.json"
        state.write_text(state.read_text().replace('"milestone": false', '"milestone": true'))
    capsys.readouterr()
    checkpoint.main(["inspect", str(path), *([] if kind == "folder" else ["--verify"])])
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    count = f"{model.num_params():,}"
    nbytes = sum(f.stat().st_size for f in path.rglob("*.safetensors"))
    if kind == "run":
        nbytes //= 2
    assert (told["parameters"], told["shards"], told["bytes"]) == (count, "1", f"{nbytes:,}")
    assert told["training steps, all phases"] == "12" and told["vocab_size"] == "262"
    if kind == "folder":
        assert told["Hugging Face folder"] == str(path) == told["tokenizer"]
        assert told["tensors"] == "21 BF16"
    else:
        assert told["checkpoint"] == f"{tmp_path}/run/checkpoints/step0000012"
        assert told["tensors"] == "45 F32" and told["tokenizer"] == str(ranks)
        assert told["manifest"] == "every byte is as it was written"
        assert told.get("milestones") == ("step0000003" if kind == "run" else None)


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, ranks, capfd):
    def refused(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            checkpoint.command_line(list(map(str, args)))
        error = capfd.readouterr().err
        assert ended.value.code == 2
        (line,) = [x for x in error.replace("\r", "\n").splitlines() if "checkpoint:" in x]
        return line

    saved(tmp_path / "run/checkpoints", tokenizer=str(ranks))
    run, hf, to = f"{tmp_path}/run", tmp_path / "hf", f"{tmp_path}/to"
    path = tmp_path / "run/checkpoints/step0000003"
    assert "no complete checkpoint" in refused("export", f"{tmp_path}/nowhere", "--to", to)
    assert "something of this name" in refused("export", run, "--to", run)
    assert "nowhere" in refused("export", run, "--to", to, "--tokenizer", f"{tmp_path}/nowhere")
    assert "config.json: No such file" in refused("inspect", tmp_path)
    checkpoint.main(["export", run, "--to", str(hf)])
    assert "something of this name" in refused("import", hf, "--to", run)
    assert "has no manifest" in refused("inspect", hf, "--verify")
    tokenizers.save(dict(list(BYTES.items())[:-1]), tmp_path / "small")
    line = refused("import", hf, "--to", to, "--tokenizer", tmp_path / "small")
    assert "small has 261 tokens, the model 262" in line
    shard = path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "shard-00001.safetensors: damaged" in refused("inspect", run, "--verify")
    assert "shard-00001.safetensors: damaged" in refused("export", run, "--to", to)
    os.truncate(shard, len(content) // 2)
    assert "shard-00001.safetensors: cut short" in refused("export", run, "--to", to)
    with pytest.raises(SystemExit, match="2"):
        checkpoint.main(["export", run])
    done = launch("checkpoint", "inspect", f"{tmp_path}/nowhere")
    line = f"checkpoint: {tmp_path}/nowhere/config.json: No such file or directory\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "to"))]


# An export dies at the k-th thing it does to the file system.
KILLED = """
import os, sys
import torch
import checkpoint

torch.set_num_threads(1)

def export(k):
    seen = [0]
    def count(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir") and ".hf.tmp" in str(args):
            seen[0] += 1
            if seen[0] == k:
                os._exit(9)
    sys.addaudithook(count)
    checkpoint.main(sys.argv[1:])
    os._exit(0)

for k in range(1, 200):
    child = os.fork()
    if child == 0:
        try:
            export(k)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(k, code, os.path.exists(sys.argv[4]), flush=True)
    if code == 0:
        break
"""


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path, ranks):
    saved(tmp_path / "run/checkpoints", tokenizer=str(ranks))
    (tmp_path / "killed.py").write_text(KILLED)
    done = launch(tmp_path / "killed.py", "export", f"{tmp_path}/run", "--to", f"{tmp_path}/hf",
                  "--optimizer")  # fmt: skip
    assert done.returncode == 0, done.stderr
    deaths = [line.split() for line in done.stdout.splitlines() if line[0].isdecimal()]
    assert len(deaths) > 15 and deaths[-1][1:] == ["0", "True"]
    assert all(rest == ["9", "False"] for _, *rest in deaths[:-1])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    checkpoint.main(["import", f"{tmp_path}/hf", "--to", f"{tmp_path}/back"])
    a, b = (
        load_file(next((tmp_path / run / "checkpoints/step0000003").glob("*.safetensors")))
        for run in ("run", "back")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@needs_shared
def test_the_released_tokenizer_travels_byte_for_byte(tmp_path):
    config = LucieConfig(**TINY | {"vocab_size": 65024}, max_position_embeddings=64)
    checkpoint.to_hf(Lucie(config), tmp_path / "hf")
    source = SHARED / "lucie/tokenizer.json"
    shutil.copy(source, tmp_path / "hf")
    checkpoint.main(["import", f"{tmp_path}/hf", "--to", f"{tmp_path}/run"])
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_bytes() == source.read_bytes()
    checkpoint.main(["export", f"{tmp_path}/run", "--to", f"{tmp_path}/again"])
    assert (tmp_path / "again/tokenizer.json").read_bytes() == source.read_bytes()


def test_rows_that_are_missing_or_come_twice_are_noticed(tmp_path):
    saved(tmp_path)
    path = tmp_path / "step0000003"
    cut_in_two(path)
    second = path / "shard-00002.safetensors"
    tensors = load_file(second)
    places = {name: {"saved_offsets": [0] * t.ndim} for name, t in tensors.items()}
    save_file(tensors, second, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    for _ in range(2):
        with pytest.raises(checkpoint.CheckpointError, match="damaged or incomplete"):
            checkpoint.from_run(path)
        second.unlink(missing_ok=True)
