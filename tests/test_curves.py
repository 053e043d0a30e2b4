import subprocess
import sys

import pytest
from conftest import SHARED, needs_shared

from eval import curves
from eval.curves import CurveError

COLUMNS = "training_steps,training_tokens,training_loss,walltime,gputime,learning_rate"


@pytest.fixture
def runs(tmp_path):
    """Two runs: loss 8 to 4 over 100 tokens with validation, then 3 to 2 over 50."""
    for name, tokens, losses in (("main", 100, (8, 6, 4)), ("annealing", 50, (3, 2))):
        (tmp_path / name).mkdir()
        lines = [f"{COLUMNS},validation_loss"]
        for n, loss in enumerate(losses, 1):
            valid = loss + 0.5 if n == len(losses) else ""
            lines.append(f"{n},{tokens * n / len(losses)},{loss},0.1,0.1,1e-3,{valid}")
        (tmp_path / name / "log.csv").write_text("\n".join(lines) + "\n")
        (tmp_path / name / "config.json").write_text('{"vocab_size": 1000}')
    return tmp_path


def test_phases_follow_each_other(runs):
    phases = [curves.read(runs / name) for name in ("main", "annealing", "annealing")]
    main, annealing, again = curves.chain(phases)
    assert again.tokens == [175, 200] and again.validation == [(200, 2.5)]
    assert main.tokens == pytest.approx([100 / 3, 200 / 3, 100])
    assert annealing.tokens == [125, 150]
    assert main.validation == [(100, 4.5)] and annealing.validation == [(150, 2.5)]


def test_text_shows_where_the_loss_was(runs):
    chained = curves.chain([curves.read(runs / n) for n in ("main", "annealing")])
    lines = curves.as_text(chained, width=15, height=7).splitlines()
    plot = [line[8:] for line in lines[:7]]
    marks = {(n, row.index(mark)) for n, row in enumerate(plot) for mark in "12" if mark in row}
    # loss 8 on the first row at token 33 of 150, loss 2 on the last at the end
    assert (0, 3) in marks and (6, 14) in marks
    assert lines[0].startswith("  8.00") and lines[6].startswith("  2.00")
    assert "2 annealing: loss 2.000, validation 2.500, 36.2% of ln(1,000)" in lines[-1]


def test_png_has_a_picture(runs):
    matplotlib = pytest.importorskip("matplotlib")
    chained = curves.chain([curves.read(runs / n) for n in ("main", "annealing")])
    curves.as_png(chained, runs / "sub" / "c.png")
    image = matplotlib.image.imread(runs / "sub" / "c.png")
    assert image.shape[0] > 500 and image[..., :3].std() > 0.05
    assert (abs(image[..., :3] - (0.12, 0.47, 0.71)).sum(-1) < 0.2).any()  # the first phase's blue


@needs_shared
def test_the_published_logs_are_read():
    names = ("1_pretraining", "2_extension", "3_annealing")
    read = [curves.read(SHARED / f"lucie/training_logs_{name}.csv") for name in names]
    assert [len(c.tokens) for c in read] == [386, 49, 49]
    assert "3.13 trillion tokens" in curves.as_text(curves.chain(read))


def test_bad_logs_are_one_line(runs, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CurveError, match="not a log"):
        curves.read(tmp_path / "x.csv")
    command = [sys.executable, "-m", "eval.curves", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "No such file" in done.stderr
    assert "Traceback" not in done.stderr
