import csv
import itertools
import math
from types import SimpleNamespace

import pytest
from conftest import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from config import load
from schedule import Schedule, revision_name

# Rows of the published logs: step, tokens after it, learning rate shown.
MAIN = [
    (1865, 1955594240, 7.161599933169782e-05),
    (3790, 4114087936, 0.00015066239575389773),
    (7402, 9252634624, 0.000299999926937744),
]
EXTENSION = [(25, 102400000, 1.9999999494757503e-05), (1220, 4997120000, 2e-5)]
ANNEALING = [(25, 102400000, 2.938559919130057e-05), (100, 409600000, 2.7542400857782923e-05)]
LOGS = {"pretrain": "1_pretraining", "extension": "2_extension", "annealing": "3_annealing"}


def published(phase):
    config = load([f"config/{phase}.py"])
    return config, Schedule(config)


@pytest.mark.parametrize(
    "phase,rows", [("pretrain", MAIN), ("extension", EXTENSION), ("annealing", ANNEALING)]
)
def test_rows_of_the_published_logs(phase, rows):
    config, schedule = published(phase)
    for step, tokens, rate in rows:
        samples = schedule.samples_after(step)
        assert samples * config.seq_len == tokens
        assert schedule.learning_rate(samples) == pytest.approx(rate, rel=1e-7)


@needs_shared
@pytest.mark.parametrize("phase,count", [("pretrain", 386), ("extension", 49), ("annealing", 49)])
def test_every_row_of_the_published_logs(phase, count):
    config, schedule = published(phase)
    with open(SHARED / f"lucie/training_logs_{LOGS[phase]}.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == count
    for row in rows:
        samples = schedule.samples_after(int(row["training_steps"]))
        assert samples * config.seq_len == int(row["training_tokens"])
        assert schedule.learning_rate(samples) == pytest.approx(
            float(row["learning_rate"]), rel=1e-7
        )


def test_published_steps_and_tokens():
    config, schedule = published("pretrain")
    assert schedule.num_steps() == 753_851
    tokens = {step: schedule.samples_after(step) * config.seq_len for step in (5_000, 10_000)}
    assert tokens == {5_000: 5_700_059_136, 10_000: 13_884_194_816}
    assert schedule.samples_after(25_000) * 4096 == 64_719_421_440
    assert schedule.samples_after(753_851) * 4096 == 3_121_742_086_144
    for phase in ("extension", "annealing"):
        assert published(phase)[1].num_steps() == 1_220


def test_published_checkpoints():
    names = {}
    for phase in LOGS:
        config, schedule = published(phase)
        steps = schedule.checkpoint_steps()
        names[phase] = [revision_name(step, config.checkpoint_prefix) for step in steps]
    early = [f"step{step:07d}" for step in range(5_000, 25_001, 5_000)]
    assert names["pretrain"][:6] == [*early, "step0050000"]
    assert names["pretrain"][-2:] == ["step0750000", "step0753851"]
    assert len(names["pretrain"]) == 5 + 29 + 1
    assert names["extension"] == [f"extension_step{s:07d}" for s in (250, 500, 750, 1000, 1220)]
    assert len(names["annealing"]) == 1


def test_batch_ramp_of_the_main_phase():
    _, schedule = published("pretrain")
    stair = 10_000_000 / 12
    assert schedule.batch_size(int(stair) - 1) == 256
    assert schedule.batch_size(int(stair) + 1) == 320
    assert schedule.batch_size(10_000_001) == schedule.batch_size(700_000_000) == 1024
    sizes = [step.batch_size for step in itertools.islice(schedule, 20_000)]
    assert sizes == sorted(sizes) and sorted(set(sizes)) == list(range(256, 1025, 64))


def test_learning_rate_shapes():
    cosine = Schedule(options(samples=1000, warmup_samples=100))
    assert cosine.learning_rate(0) == 0
    assert cosine.learning_rate(50) == pytest.approx(0.5)
    assert cosine.learning_rate(100) == 1
    assert cosine.learning_rate(550) == pytest.approx(0.55)
    assert cosine.learning_rate(1000) == pytest.approx(0.1)
    half = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert cosine.learning_rate(325) == pytest.approx(half)
    linear = Schedule(options(samples=1000, lr_decay="linear", min_learning_rate=0.0))
    assert [linear.learning_rate(s) for s in (0, 250, 1000)] == [1, 0.75, 0]
    constant = Schedule(options(samples=1000, lr_decay="constant"))
    assert {constant.learning_rate(s) for s in (0, 500, 1000)} == {1}


def options(**change):
    values = dict(
        samples=1000,
        global_batch_size=8,
        batch_ramp_samples=0,
        batch_ramp_start=2,
        batch_ramp_increment=2,
        learning_rate=1.0,
        min_learning_rate=0.1,
        warmup_samples=0,
        lr_decay="cosine",
        checkpoint_every=10,
        checkpoint_early_every=0,
        checkpoint_early_steps=0,
    )
    return SimpleNamespace(**(values | change))


@given(
    samples=st.integers(1, 800),
    start=st.integers(1, 6),
    increment=st.integers(1, 4),
    stairs=st.integers(0, 5),
    ramp=st.integers(0, 900),
    resume=st.floats(0, 1),
)
def test_steps_cover_the_samples_once_from_wherever_they_start(
    samples, start, increment, stairs, ramp, resume
):
    schedule = Schedule(
        options(
            samples=samples,
            global_batch_size=start + stairs * increment,
            batch_ramp_start=start,
            batch_ramp_increment=increment,
            batch_ramp_samples=ramp,
        )
    )
    steps = list(schedule)
    assert len(steps) == schedule.num_steps()
    position = 0
    for number, step in enumerate(steps, start=1):
        assert step == (number, position, schedule.batch_size(position))
        position += step.batch_size
        assert schedule.samples_after(number) == position
    assert position <= samples < position + schedule.batch_size(position)
    done = int(resume * len(steps))
    assert list(schedule.steps_from(done)) == steps[done:]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"min_learning_rate": float("nan")}, "min_learning_rate"),
        ({"warmup_samples": 1000}, "warmup_samples"),
        ({"lr_decay": "cosin"}, "lr_decay"),
        ({"batch_ramp_samples": 9, "batch_ramp_start": 9}, "no more than global_batch_size 8"),
        ({"batch_ramp_samples": 9, "batch_ramp_start": 3}, "does not lead from 3 to 8"),
    ],
)
def test_impossible_schedules_name_the_option(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(options(**change))
