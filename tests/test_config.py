import dataclasses
import inspect

import pytest

import config
from config import Config, ConfigError, load


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "c.py"
    file.write_text('"""A phase."""\nseed = 7  # lucky\nlearning_rate = 1\nname = "x"\n')
    c = load([str(file), "--seed=8", "--rope-theta=2e7", "--samples=2e6", "--name=run1"])
    assert (c.seed, c.learning_rate, c.rope_theta, c.name) == (8, 1.0, 2e7, "run1")
    assert c.samples == 2_000_000 and type(c.samples) is int
    assert type(c.learning_rate) is float
    assert c.beta2 == 0.95  # untouched default


def test_a_mistyped_name_suggests_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"learning_rat.*did you mean 'learning_rate'"):
        load(["--learning_rat=1e-4"])
    file = tmp_path / "c.py"
    file.write_text("warmup = 3\n")
    with pytest.raises(ConfigError, match=r"c\.py.*'warmup'.*'warmup_samples'"):
        load([str(file)])


@pytest.mark.parametrize(
    "text,message",
    [
        ("seed = 'x'", "seed is of type int"),
        ("seed = 1.5", "seed is of type int"),
        ("seed = True", "seed is of type int"),
        ("learning_rate = 'high'", "learning_rate is of type float"),
        ("import os", "line 1: a config file holds only lines like"),
        ("name = open('/etc/passwd').read()", "line 1"),
        ("seed = 1\nseed: int = 2", "line 2"),
        ("seed = = 2", "not a config file"),
    ],
)
def test_bad_files_are_refused_and_never_executed(tmp_path, text, message):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load([str(file)])


def test_bad_arguments():
    with pytest.raises(ConfigError, match="--seed=VALUE"):
        load(["--seed"])
    with pytest.raises(ConfigError, match="No such file"):
        load(["nowhere.py"])


@pytest.mark.parametrize(
    "option",
    ["seq_len=0", "micro_batch_size=0", "clip_grad=-1", "beta1=2", "eps=-1", "max_minutes=-1"],
)
def test_senseless_values_name_the_option(option):
    with pytest.raises(ConfigError, match=option.partition("=")[0]):
        load([f"--{option}"])
    with pytest.raises(ConfigError, match="a run needs one"):
        load(["--name="])


def test_help_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(field.name in shown for field in dataclasses.fields(Config))


def test_a_run_may_be_called_by_a_number():
    assert load(["--name=7"]).name == "7"


def test_every_option_is_documented():
    source = inspect.getsource(config)
    for field in dataclasses.fields(Config):
        (line,) = [x for x in source.splitlines() if x.startswith(f"    {field.name}: ")]
        before = source[: source.index(line)].rstrip().splitlines()[-1]
        assert "#" in line or before.lstrip().startswith("#"), field.name


def test_published_numbers():
    pretrain, extension, annealing = (
        load([f"config/{phase}.py"]) for phase in ("pretrain", "extension", "annealing")
    )
    for c in (pretrain, extension, annealing):
        assert (c.beta1, c.beta2, c.eps, c.weight_decay, c.clip_grad) == (0.9, 0.95, 1e-5, 0.1, 1)
        assert (c.hidden_size, c.num_hidden_layers, c.vocab_size) == (4096, 32, 65024)
        assert (c.seed, c.initializer_range, c.max_minutes) == (42, 0.009, 1190)
    assert (pretrain.seq_len, pretrain.rope_theta) == (4096, 5e5)
    assert (pretrain.learning_rate, pretrain.min_learning_rate) == (3e-4, 3e-5)
    for c in (extension, annealing):
        assert (c.seq_len, c.rope_theta, c.global_batch_size) == (32_000, 2e7, 128)
    assert (extension.learning_rate, extension.lr_decay) == (2e-5, "constant")
    assert (annealing.learning_rate, annealing.min_learning_rate) == (3e-5, 0)


def test_the_demo_has_the_same_shape():
    phases = [load([f"config/demo_{p}.py"]) for p in ("pretrain", "extension", "annealing")]
    assert phases[0].batch_ramp_samples and phases[0].warmup_samples
    assert [c.lr_decay for c in phases] == ["cosine", "constant", "linear"]
    assert phases[1].seq_len > phases[0].seq_len and phases[1].rope_theta > phases[0].rope_theta
    assert phases[1].init_from.endswith(phases[0].name)
    assert phases[2].init_from.endswith(phases[1].name)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "tokenizer")
    for name in same:
        assert len({getattr(c, name) for c in phases}) == 1
