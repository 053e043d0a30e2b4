import csv
import gzip
import math

import pytest
from conftest import SHARED, needs_shared

from eval import benchmarks
from eval.curves import BEHIND, CurveError

pytest.importorskip("matplotlib")
COLUMNS = "training_phase,training_steps,training_tokens,benchmark,dataset,num_fewshot,score_name"
COLUMNS += ",score,stderr"


def row(phase, steps, tokens, dataset, score, shots="5.0", kind="acc,none", stderr="0.01"):
    return [phase, steps, tokens, "b", dataset, shots, kind, score, stderr]


ROWS = [
    row("1_main", 20, 2e9, "hellaswag", 0.4),
    row("1_main", 10, 1e9, "hellaswag", 0.3),
    row("1_main", 10, 1e9, "mmlu", 0.25, ""),
    row("1_main", 10, 1e9, "mmlu_anatomy", 0.2),
    row("1_main", 10, 1e9, "mmlu_continuation", 0.3, ""),
    row("1_main", 10, 1e9, "mmlu_continuation_anatomy", 0.3),
    row("1_main", 10, 1e9, "stem", 0.2, ""),
    row("2_extension", 30, 2.1e9, "hellaswag", 0.5, stderr=""),
    row("2_extension", 30, 2.1e9, "hellaswag", 0.6, stderr="N/A"),
    row("4_instruct_lora", 40, 2.2e9, "hellaswag", 0.9),
]


def write(path, header, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as f:
        csv.writer(f).writerows([header.split(","), *rows])
    return path


@pytest.fixture
def scores(tmp_path):
    return benchmarks.read(write(tmp_path / "evaluation.csv", COLUMNS, ROWS))


@pytest.fixture
def baselines(tmp_path):
    header = COLUMNS.replace("training_phase,training_steps,training_tokens", "model_name")
    rows = [["Llama", *row(0, 0, 0, "hellaswag", 0.7)[3:]], ["CroissantLLMChat-v0.1", *ROWS[0][3:]]]
    rows += [["Llama", *row(0, 0, 0, "hellaswag", 0.1, "0.0")[3:]]]  # another number of examples
    return benchmarks.read(write(tmp_path / "baselines.csv.gz", header, rows))


def test_rows_are_read_without_tuned_models(scores, baselines):
    assert [score.model for score in scores] == ["1_main"] * 7 + ["2_extension"] * 2
    assert scores[0].test == ("hellaswag", "5", "acc,none") and scores[0].tokens == 2e9
    assert math.isnan(scores[7].stderr) and scores[2].test[1] == ""
    assert [(b.model, b.score) for b in baselines] == [("Llama", 0.7), ("Llama", 0.1)]


def test_what_stands_for_a_benchmark(scores):
    found = [name for name, _, _ in benchmarks.tests_of(scores)]
    assert found == ["hellaswag", "mmlu", "mmlu_continuation"]
    asked = benchmarks.tests_of(scores, ["mmlu_anatomy", "stem"])
    assert [name for name, _, _ in asked] == ["mmlu_anatomy", "stem"]
    with pytest.raises(CurveError, match=r"no scores of arc$"):
        benchmarks.tests_of(scores, ["arc", "mmlu"])
    with pytest.raises(CurveError, match="no scores to draw"):
        benchmarks.tests_of([])


def test_checkpoints_in_order_and_the_mean_of_repetitions(scores):
    found = benchmarks.phases_of([s for s in scores if s.test[0] == "hellaswag"])
    assert list(found) == ["1_main", "2_extension"]
    assert found["1_main"] == [(1e9, 0.3, 0.01), (2e9, 0.4, 0.01)]
    assert found["2_extension"][0][:2] == (2.1e9, pytest.approx(0.55))


def test_a_panel_a_test(scores, baselines):
    behind = [score._replace(score=0.15) for score in scores if score.model == "1_main"]
    tests = benchmarks.tests_of(scores, ["hellaswag", "mmlu"])
    figure = benchmarks.draw(scores, tests, behind, baselines)
    hellaswag, mmlu = figure.axes
    lines = {line.get_label(): line for line in hellaswag.get_lines()}
    assert list(lines["main"].get_xdata()) == [1e9, 2e9]
    assert list(lines["main"].get_ydata()) == [0.3, 0.4]
    assert list(lines["extension"].get_ydata()) == [pytest.approx(0.55)]
    assert lines["extension"].get_xdata()[0] > 2e9  # a strip of its own, after the main phase
    assert set(lines["Llama"].get_ydata()) == {0.7} and lines["Llama"].get_linestyle() == "--"
    assert lines["behind"].get_color() == BEHIND and set(lines["behind"].get_ydata()) == {0.15}
    assert "Llama" not in [line.get_label() for line in mmlu.get_lines()]
    assert [a.get_title(loc="left") for a in figure.axes] == ["hellaswag", "mmlu"]
    assert hellaswag.get_title(loc="right") == "acc, 5-shot"
    assert hellaswag.get_xlabel() == "billion tokens"
    shown = benchmarks.draw(scores, tests[:1], x="share").axes[0].get_lines()[0]
    assert list(shown.get_xdata()) == [0.5, 1]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["Llama", "behind", "extension", "main"]


def runs_called(tmp_path, *names):
    """Runs of a phase that all call pretraining, each with a score of its own."""
    for number, name in enumerate(names, 1):
        (tmp_path / name).mkdir(parents=True)
        rows = [row("1_main", 10, 1e9, "hellaswag", number / 10)]
        write(tmp_path / name / "evaluation.csv", COLUMNS, rows)
    return [tmp_path / name for name in names]


def test_runs_are_not_averaged(tmp_path):
    paths = runs_called(tmp_path, "pretrain_a", "pretrain_b", "ChatLLM", "x/same", "y/same")
    found = benchmarks.phases_of(benchmarks.read_all(paths))
    names = ["pretrain_a", "pretrain_b", "ChatLLM", str(paths[3]), str(paths[4])]
    assert {name: points[0][1] for name, points in found.items()} == {
        name: number / 10 for number, name in enumerate(names, 1)
    }


def test_a_run_without_its_tuning(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    rows = [row(phase, 1, 1, "x", 0.5) for phase in ("4_instruct_lora", "1_main", "MyChat")]
    write(tmp_path / "mine" / "evaluation.csv", COLUMNS, rows)
    monkeypatch.chdir(tmp_path / "mine")
    assert [s.model for s in benchmarks.read(benchmarks.Path("."))] == ["mine", "mine"]
    assert len(benchmarks.read(tmp_path / "mine" / "evaluation.csv")) == 2


@pytest.mark.parametrize("x", ["tokens", "share"])
def test_scores_whose_tokens_are_not_known(tmp_path, x):
    rows = [row("Lucie-7B", "", "", "hellaswag", 0.4)]
    scores = benchmarks.read(write(tmp_path / "e.csv", COLUMNS, rows))
    (panel,) = benchmarks.draw(scores, benchmarks.tests_of(scores), x=x).axes
    (line,) = panel.get_lines()
    assert list(line.get_xdata()) == [0] and list(line.get_ydata()) == [0.4]


def test_the_command(scores, tmp_path, capsys):
    file = str(tmp_path / "evaluation.csv")
    benchmarks.main([file, "--png", str(tmp_path / "b.png")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["hellaswag", "1_main", "40.0%,", "2_extension", "55.0%"]
    assert (tmp_path / "b.png").stat().st_size > 10_000


@needs_shared
def test_the_published_tables():
    scores = benchmarks.read(SHARED / "lucie/evaluation_learning_curve.csv.gz")
    baselines = benchmarks.read(SHARED / "lucie/evaluation_baselines.csv.gz")
    tests = benchmarks.tests_of(scores)
    names = [name for name, _, _ in tests]
    assert {"mmlu", "mmlu_continuation", "leaderboard_bbh", "arc_fr", "gsm8k"} <= set(names)
    assert len(tests) == 30 and len(set(names)) == 30
    assert len({b.model for b in baselines}) == 6
    hellaswag = next(test for test in tests if test[0] == "hellaswag")
    phases = benchmarks.phases_of([score for score in scores if score.test == hellaswag])
    assert [len(points) for points in phases.values()] == [31, 1, 3]
    assert phases["1_main"][-1][0] == 3_121_742_086_144


def test_bad_tables_are_one_line(tmp_path):
    with pytest.raises(CurveError, match="No such file"):
        benchmarks.read(tmp_path)
    write(tmp_path / "a.csv", "x,y", [[1, 2]])
    (tmp_path / "b.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe")
    write(tmp_path / "d.csv", COLUMNS, [row("1_main", 1, 1, "x", "high")])
    for name in ("a.csv", "b.csv.gz", "c.csv", "d.csv"):
        with pytest.raises(CurveError, match=name):
            benchmarks.read(tmp_path / name)
