"""Defaults, config files and the command line become a Config, or one line says why not."""

import dataclasses
import inspect

import pytest
import torch

import config
from bench import plan
from checkpoint import architecture
from config import Config, ConfigError, load
from model import Lucie
from schedule import Schedule


def test_defaults_then_file_then_command_line(tmp_path):
    """The file begins with a byte order mark, as some editors write it."""
    file, text = tmp_path / "c.py", '"""A phase."""\nseed = 7  # lucky\nlearning_rate = 1\n'
    file.write_text(text + "samples = 2e6\n", encoding="utf-8-sig")
    c = load([str(file), "--seed=8"])
    assert (c.seed, c.learning_rate, c.samples, c.beta2) == (8, 1.0, 2_000_000, 0.95)
    assert (type(c.learning_rate), type(c.samples)) == (float, int)


@pytest.mark.parametrize(
    "args, name, value",
    [
        (["--name=2024_01"], "name", "2024_01"),
        (["--name=None"], "name", "None"),
        (["--samples=2e6"], "samples", 2_000_000),
        (["--rope-theta=20000000"], "rope_theta", 2e7),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--compile", "config/pretrain.py"], "compile", True),
        (["--reduce-each-micro-batch", "False"], "reduce_each_micro_batch", False),
    ],
)
def test_an_option_is_read_as_its_type_and_never_evaluated(args, name, value):
    found = getattr(load(args), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--learning_rat=1e-4"], "--learning_rat; did you mean '--learning_rate'?"),
        (["--compile", "yes"], "--compile: must be true or false, not 'yes'"),
        (["--rope_theta=12e3456"], "--rope_theta: must be a number, not '12e3456'"),
        (["nowhere.py"], "nowhere.py: No such file"),
        (["--seq_len=0"], "seq_len must be at least 1, not 0"),
        (["--clip_grad=-1"], "clip_grad must be 0 or more, not -1.0"),
        (["--name=/tmp/x"], "name must be a relative path without hidden parts, not '/tmp/x'"),
        (["--checkpoint_prefix=a/b"], "checkpoint_prefix must not begin with . or contain /"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ConfigError) as error:
        load(args)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("warmup = 3", "no option is called 'warmup'; did you mean 'warmup_samples'"),
        ("seed = 'x'", "seed is a whole number, not 'x'"),
        ("learning_rate = 1e999", "learning_rate is a number, not inf"),
        ("name = open('/etc/passwd').read()", "line 1: a config file holds only lines like"),
        ("seed = = 2", "not a config file"),
    ],
)
def test_bad_files_are_refused_and_never_executed(tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.py.*{message}"):
        load([str(tmp_path / "c.py")])


def test_fewer_samples_shorten_warmup_and_ramp_in_proportion(tmp_path, capsys):
    (tmp_path / "c.py").write_text("samples = 1000\nwarmup_samples = 200\nbatch_ramp_samples = 50")

    def schedule(*args):
        c = load([str(tmp_path / "c.py"), *args])
        return c.warmup_samples, c.batch_ramp_samples

    assert schedule("--samples=100") == (20, 5)
    told = "warmup_samples from 200 to 20 and batch_ramp_samples from 50 to 5"
    assert capsys.readouterr().err == f"--samples=100 shortens {told}\n"
    assert schedule("--samples=100", "--warmup_samples=150") == (150, 50)
    assert schedule("--samples=500") == schedule() == (200, 50)  # long enough
    assert not capsys.readouterr().err
    assert schedule("--samples=100", "--batch_ramp_samples=40") == (20, 40)
    assert capsys.readouterr().err == "--samples=100 shortens warmup_samples from 200 to 20\n"


def test_every_option_is_documented_and_shown_by_help(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    shown, source = capsys.readouterr().out, inspect.getsource(config)
    assert stop.value.code == 0
    for field in dataclasses.fields(Config):
        (line,) = [x for x in source.splitlines() if x.startswith(f"    {field.name}: ")]
        before = source[: source.index(line)].rstrip().splitlines()[-1]
        assert line in shown and ("#" in line or before.lstrip().startswith("#")), field.name


def test_published_numbers():
    phases = ("pretrain", "extension", "annealing")
    pretrain, extension, annealing = (load([f"config/{phase}.py"]) for phase in phases)
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


def test_the_small_run_is_lucies_scaled_by_its_rules():
    """By compute as in DeepSeek LLM (arXiv:2401.02954), by length as in Chinchilla, by shares."""
    phases = ("pretrain", "extension", "annealing")
    theirs = [load([f"config/{phase}.py"]) for phase in phases]
    ours = [load([f"config/small_{phase}.py"]) for phase in phases]
    compute, models = [], []
    for phase in (theirs[0], ours[0]):
        with torch.device("meta"):
            models.append(model := Lucie(architecture(vars(phase))))
        tokens = phase.samples * phase.seq_len
        compute.append(model.flops_per_token(phase.seq_len) * tokens)
    parameters, less = models[1].num_params(), compute[0] / compute[1]
    assert 320e6 < parameters < 340e6
    assert ours[0].samples * 4096 / parameters == pytest.approx(20, rel=0.03)
    assert ours[0].learning_rate / 3e-4 == pytest.approx(less**0.125, rel=0.06)
    assert 1024 / ours[0].global_batch_size / less**0.3271 == pytest.approx(1, rel=0.25)
    for name in ("warmup_samples", "batch_ramp_samples"):
        shares = [getattr(c, name) / c.samples for c in (ours[0], theirs[0])]
        assert shares[0] == pytest.approx(shares[1], rel=2e-3), name
    rate, theirs_rate = ours[0].learning_rate, theirs[0].learning_rate
    for our, their in zip(ours, theirs):
        assert our.global_batch_size * 16 == their.global_batch_size
        assert our.learning_rate / rate == pytest.approx(
            their.learning_rate / theirs_rate, rel=0.01
        )
        same = ("seq_len", "rope_theta", "lr_decay", "beta1", "beta2", "eps", "weight_decay")
        assert [getattr(our, n) for n in same] == [getattr(their, n) for n in same]
        fixed = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "tokenizer",
        )
        assert [getattr(our, n) for n in fixed] == [getattr(ours[0], n) for n in fixed]
        assert our.hidden_size / our.num_attention_heads == 128
        assert our.initializer_range == pytest.approx((3 * our.hidden_size) ** -0.5, rel=0.01)
        moment, parts = plan.peak(plan.Job(our, 1))
        assert sum(parts.values()) < 24e9 * 0.9, moment  # one card of 24 GB, with room to spare
    assert [Schedule(c).num_steps() for c in ours[1:]] == [
        Schedule(c).num_steps() for c in theirs[1:]
    ]
    assert [c.init_from for c in ours] == ["auto", "out/small_pretrain", "out/small_extension"]
    total = sum(c.samples * c.seq_len for c in ours)
    assert total == pytest.approx(7e9, rel=0.01)
