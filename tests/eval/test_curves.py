import json
import math

import pytest
from conftest import SHARED, needs_shared

from config.cli import ConfigError
from eval import curves
from eval.curves import CurveError

COLUMNS = "training_steps,training_tokens,training_loss,walltime,gputime,learning_rate"
SCHEDULE = dict(
    samples=40, global_batch_size=4, batch_ramp_samples=0, batch_ramp_start=4,
    batch_ramp_increment=1, learning_rate=1e-3, min_learning_rate=0.0, warmup_samples=0,
    lr_decay="constant", checkpoint_every=0, checkpoint_early_every=0, checkpoint_early_steps=0,
)  # fmt: skip
matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def runs(tmp_path):
    """Two runs: loss 8 to 4 over 100 of 400 tokens with validation, then 3 to 2 over 50."""
    for name, tokens, losses in (("main", 100, (8, 6, 4)), ("annealing", 50, (3, 2))):
        (tmp_path / name).mkdir()
        lines = [f"{COLUMNS},validation_loss"]
        for n, loss in enumerate(losses, 1):
            valid = loss + 0.5 if n == len(losses) else ""
            lines.append(f"{n},{tokens * n / len(losses)},{loss},{n / 4},{n},1e-3,{valid}")
        (tmp_path / name / "log.csv").write_text("\n".join(lines) + "\n")
        options = SCHEDULE | {"vocab_size": 1000, "seq_len": 10}
        (tmp_path / name / "config.json").write_text(json.dumps(options))
    return tmp_path


@pytest.fixture
def phases(runs):
    return [curves.read(runs / name) for name in ("main", "annealing")]


def test_what_a_curve_runs_along(phases):
    main, annealing = phases
    assert main.x["tokens"] == main.tokens == pytest.approx([100 / 3, 200 / 3, 100])
    assert main.x["time"] == [0.25, 0.5, 0.75] and main.x["gpu-hours"] == [1, 2, 3]
    assert main.x["share"] == pytest.approx([1 / 12, 2 / 12, 3 / 12])  # 10 steps of 4 x 10 tokens
    assert main.validation[2] == 4.5 and all(map(math.isnan, main.validation[:2]))
    assert annealing.loss == [3, 2] and annealing.vocab_size == 1000


def test_a_row_cut_short_is_left_out(runs):
    with open(runs / "main" / "log.csv", "a") as f:
        f.write("4,120,3")
    assert curves.read(runs / "main").loss == [8, 6, 4]


def test_how_long_a_phase_took(phases):
    assert curves.length(phases[0]) == "100.00 tokens, 45 min, 3 GPU h"
    phases[0].x.update({"time": [0.02], "gpu-hours": [0.02]})
    assert curves.length(phases[0]) == "100.00 tokens, 1.2 min"


def test_smoothing_is_a_mean_around_each_row():
    values = [10.0, 1, 4, 7, 1, 1, 40]
    assert curves.smoothed(values, 1) == values
    assert curves.smoothed(values, 3) == [10, 5, 4, 4, 3, 14, 40]
    assert curves.smoothed(values, 5) == [10, 5, 4.6, 2.8, 10.6, 14, 40]
    assert curves.smoothed([3.0] * 9, 99) == [3.0] * 9


def test_text_shows_where_the_loss_was(phases):
    lines = curves.as_text(phases, width=32, height=7).splitlines()
    assert [line.count("|") for line in lines[:7]] == [2] * 7
    plot = [line[8:].ljust(31) for line in lines[:7]]
    marks = {(n, row.index(mark)) for n, row in enumerate(plot) for mark in "12" if mark in row}
    # a phase has 15 characters: loss 8 on the first row at a third of it, loss 2 on the last
    assert (0, 5) in marks and (6, 16 + 14) in marks and (5, 16 + 7) in marks
    assert lines[0].startswith("  8.00") and lines[6].startswith("  2.00")
    assert lines[8].split() == ["100.00", "tokens", "50.00", "tokens"]
    assert "2 annealing: loss 2.000, validation 2.500, 36.2% of ln(1,000)" in lines[-1]


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_each_phase_has_a_column_and_a_scale_of_its_own(phases):
    figure = curves.draw(phases, behind=phases[1:], x="gpu-hours")
    loss, other_loss, rate, other_rate = figure.axes
    main = lines_of(loss)["loss 4.000"]
    assert list(main.get_xdata()) == [1, 2, 3] and list(main.get_ydata()) == [8, 6, 4]
    assert list(lines_of(loss)["validation"].get_ydata()) == [4.5]
    grey = lines_of(loss)["annealing 2.000"]
    assert grey.get_color() == curves.BEHIND and list(grey.get_xdata()) == [1, 2]
    assert grey.get_zorder() < main.get_zorder()
    assert list(lines_of(other_loss)) == ["loss 2.000", "validation"]  # nothing behind the second
    assert loss.get_xlim()[1] > 3 > other_loss.get_xlim()[1] > 2
    assert loss.get_ylim() == other_loss.get_ylim()
    assert rate.get_ylim() == other_rate.get_ylim() and other_rate.get_yscale() == "log"
    assert rate.get_xlabel() == "GPU hours" and rate.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in rate.get_lines()] == [[1e-3] * 2, [1e-3] * 3]
    assert [axes.get_title(loc="left") for axes in (loss, other_loss)] == ["main", "annealing"]


def test_smoothing_is_stated_and_the_rows_stay(phases):
    loss = curves.draw(phases[:1], smooth=3).axes[0]
    assert [list(line.get_ydata()) for line in loss.get_lines()[:2]] == [[8, 6, 4], [8, 6, 4]]
    assert "loss 4.000, mean of 3 rows" in lines_of(loss)
    steep = phases[0]._replace(loss=[9.0, 3, 3])
    _, mean, _ = curves.draw([steep], smooth=3).axes[0].get_lines()
    assert list(mean.get_ydata()) == [9, 5, 3]


def test_units_are_those_of_the_longest_curve(phases):
    longer = phases[0]._replace(x={"tokens": [1e9, 2e9, 3e9]} | {"share": [0.1, 0.2, 0.3]})
    at = dict(tokens="billion tokens", share="% of the phase's tokens")
    for x, unit in at.items():
        longer.x.update(time=[1, 2, 3], **{"gpu-hours": [1, 2, 3]})
        figure = curves.draw([longer], x=x)
        assert figure.axes[1].get_xlabel() == unit
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == pytest.approx([10, 20, 30])


def test_the_first_fall_is_cut_and_said(phases):
    losses = [9.0] + [2 - n / 100 for n in range(99)]
    long = phases[0]._replace(
        loss=losses, x={key: list(range(1, 101)) for key in curves.X}, validation=[math.nan] * 100,
        learning_rate=[1e-3] * 100,
    )  # fmt: skip
    loss = curves.draw([long]).axes[0]
    low, high = loss.get_ylim()
    assert low < 1.02 and 2 < high < 3
    assert "from 9.00" in [text.get_text() for text in loss.texts]


def test_png_and_svg(runs, capsys):
    files = [runs / "sub" / "c.png", runs / "sub" / "c.svg"]
    args = [str(runs / "main"), "--png", str(files[0]), "--svg", str(files[1])]
    curves.main(args)
    image = matplotlib.image.imread(files[0])[..., :3]
    assert image.shape[0] > 500
    blue = [int(curves.COLOURS[0][n : n + 2], 16) / 255 for n in (1, 3, 5)]
    assert (abs(image - blue).sum(-1) < 0.05).sum() > 500  # the curve
    first = files[1].read_bytes()
    assert first.startswith(b"<?xml") and b"loss" in first
    assert str(files[0]) in capsys.readouterr().out
    curves.main(args)
    assert files[1].read_bytes() == first


@needs_shared
def test_the_published_logs_are_read_and_drawn():
    names = ("1_pretraining", "2_extension", "3_annealing")
    read = [curves.read(SHARED / f"lucie/training_logs_{name}.csv") for name in names]
    assert [len(c.tokens) for c in read] == [386, 49, 49]
    assert [c.name for c in read] == ["Lucie pretraining", "Lucie extension", "Lucie annealing"]
    assert "3.12 trillion tokens" in curves.as_text(read)
    assert curves.length(read[0]) == "3.12 trillion tokens, 950 h, 486,654 GPU h"
    figure = curves.draw(read)
    drawn = [len(axes.get_lines()[0].get_xdata()) for axes in figure.axes]
    assert drawn == [386, 49, 49] * 2
    assert max(figure.axes[0].get_lines()[0].get_xdata()) == pytest.approx(3.1217, abs=1e-4)


def test_bad_logs_are_one_line(runs, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text(COLUMNS + "\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name, message in (("x", "not a log"), ("empty", "without rows"), ("bytes", "not a log")):
        with pytest.raises(CurveError, match=message):
            curves.read(tmp_path / f"{name}.csv")
    with pytest.raises(CurveError, match="xyz"):
        curves.main([str(runs / "main"), "--png", str(tmp_path / "c.xyz")])
    with pytest.raises(CurveError, match="No such file"):
        curves.main([str(tmp_path / "nowhere")])
    for rows in (0, 4):
        with pytest.raises(ConfigError, match="--smooth is an odd number"):
            curves.parse([str(runs / "main"), f"--smooth={rows}"])
