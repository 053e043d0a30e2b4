import base64
import csv
import gzip
import html
import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import SHARED, needs_shared

from config.cli import ConfigError
from data.dataset import DataError
from eval import curves
from eval.curves import BEHIND, COLOURS

matplotlib = pytest.importorskip("matplotlib")
LOG = "training_steps,training_tokens,training_loss,walltime,gputime,learning_rate"
TABLE = "training_phase,training_steps,training_tokens,benchmark,dataset,num_fewshot,score_name"
TABLE += ",score,stderr"
OPTIONS = dict(
    samples=40, global_batch_size=4, batch_ramp_samples=0, batch_ramp_start=4,
    batch_ramp_increment=1, learning_rate=1e-3, min_learning_rate=0.0, warmup_samples=0,
    lr_decay="constant", checkpoint_every=0, checkpoint_early_every=0, checkpoint_early_steps=0,
    vocab_size=1000, seq_len=10, tokenizer="<r>.tiktoken", mixture="a_long_name/" * 9,
)  # fmt: skip


def write(path, header, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", newline="") as f:
        csv.writer(f).writerows([header.split(","), *rows])
    return path


def row(phase, steps, tokens, dataset, score, shots="5.0", stderr="0.01"):
    return [phase, steps, tokens, "b", dataset, shots, "acc,none", score, stderr]


@pytest.fixture
def runs(tmp_path):
    """Two runs on a CPU: loss 8 to 4 over 100 of 400 tokens, then 3 to 2 over 50, with validation
    in the last row; scores, samples and a needle map of the first."""
    for name, tokens, losses in (("main", 100, (8, 6, 4)), ("annealing", 50, (3, 2))):
        count = len(losses)
        rows = [
            [n, tokens * n / count, loss, n / 4, n, 1e-3, "", loss + 0.5 if n == count else ""]
            for n, loss in enumerate(losses, 1)
        ]
        write(tmp_path / name / "log.csv", f"{LOG},mfu,validation_loss", rows)
        (tmp_path / name / "config.json").write_text(json.dumps(OPTIONS))
    main = tmp_path / "main"
    scores = [row("1_main", n, 50 * n, "arc", 0.25 * n) for n in (2, 1)]
    write(main / "evaluation.csv", TABLE, scores)
    said = [("step1", "Bon <b>", " jour & nuit\u2028\x1b"), ("step2", "Bon <b>", " soir</pre>")]
    lines = [dict(zip(("checkpoint", "prompt", "text"), line)) for line in said]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (main / "samples.jsonl").write_text(text + "\n", encoding="utf-8")
    cells = [(n, d, int(n < 65), 0, "", "") for n in (32, 64, 96) for d in (0, 50, 100)]
    file = main / "needle" / "step2" / "fr_likelihood.csv"
    write(file, "length,depth,score,position,expected,answer", cells)
    file.with_suffix(".json").write_text(json.dumps({"model": "main, step2", "trained": 64}))
    return tmp_path


@pytest.fixture
def phases(runs):
    return curves.read([runs / "main", runs / "annealing"]).curves


# --- the loss -------------------------------------------------------------------------------------


def test_what_a_log_holds(runs, phases):
    main, annealing = phases
    assert main.log["share"].tolist() == pytest.approx([1 / 12, 2 / 12, 3 / 12])  # of 10 x 4 x 10
    np.testing.assert_array_equal(main.log["validation_loss"], [math.nan, math.nan, 4.5])
    assert annealing.log["training_loss"].tolist() == [3, 2]
    assert curves.length_of(main) == "100 tokens, under an hour"
    with open(runs / "main" / "log.csv", "a") as f:
        f.write("4,120,3")  # cut short by a crash
    assert curves.read([runs / "main"]).curves[0].log["training_loss"].tolist() == [8, 6, 4]


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_each_phase_has_a_column_and_a_scale_of_its_own(phases):
    figure = curves.draw(phases, behind=phases[1:])
    loss, other_loss, rate, other_rate = figure.axes
    main = lines_of(loss)["loss 4.000"]
    assert main.get_xdata().tolist() == pytest.approx([100 / 3, 200 / 3, 100])
    assert main.get_ydata().tolist() == [8, 6, 4] and main.get_color() == COLOURS[0]
    assert lines_of(loss)["validation"].get_ydata().tolist() == [4.5]
    grey = lines_of(loss)["annealing 2.000"]
    assert grey.get_color() == BEHIND and grey.get_xdata().tolist() == [25, 50]
    assert grey.get_zorder() < main.get_zorder()
    assert list(lines_of(other_loss)) == ["loss 2.000", "validation"]  # nothing behind the second
    assert loss.get_xlim()[1] > 100 > other_loss.get_xlim()[1] > 50
    assert loss.get_ylim() == other_loss.get_ylim() and rate.get_ylim() == other_rate.get_ylim()
    assert rate.get_xlabel() == "tokens" and rate.get_yscale() == "log"
    assert [axes.get_title(loc="left") for axes in (loss, other_loss)] == ["main", "annealing"]
    share = curves.draw(phases[:1], x="share")
    assert share.axes[0].get_lines()[0].get_xdata().tolist() == pytest.approx([25 / 3, 50 / 3, 25])
    assert share.axes[1].get_xlabel() == "% of the phase's tokens"


def test_a_mean_bends_neither_end_and_the_first_fall_is_cut(phases):
    losses = [9.0, 1, 4, 7, 1, 1, 40]
    log = {name: np.ones(7) for name in phases[0].log} | {"training_loss": np.array(losses)}
    log |= {"training_tokens": np.arange(1, 8) * 1e9, "validation_loss": np.full(7, math.nan)}
    loss, rate = curves.draw([phases[0]._replace(log=log)], smooth=5).axes
    raw, mean = loss.get_lines()
    assert raw.get_ydata().tolist() == losses and mean.get_label().endswith("mean of 5 rows")
    assert list(mean.get_ydata()) == pytest.approx([9, 14 / 3, 22 / 5, 14 / 5, 53 / 5])
    assert list(mean.get_xdata()) == [1, 2, 3, 4, 5] and rate.get_xlabel() == "billion tokens"
    log["training_loss"] = np.array([9.0] + [2 - n / 100 for n in range(99)])
    log |= {name: np.arange(1, 101) for name in ("training_tokens", "learning_rate")}
    log["validation_loss"] = np.full(100, math.nan)
    loss = curves.draw([phases[0]._replace(log=log)]).axes[0]
    assert loss.get_ylim()[1] < 3 and "from 9.00" in [text.get_text() for text in loss.texts]


# --- benchmarks -----------------------------------------------------------------------------------

ROWS = [
    row("1_main", 20, 2e9, "hellaswag", 0.4),
    row("1_main", 10, 1e9, "hellaswag", 0.3),
    row("1_main", 10, 1e9, "mmlu", 0.25, ""),
    row("1_main", 10, 1e9, "mmlu_anatomy", 0.2),
    row("1_main", 10, 1e9, "mmlu_continuation", 0.3, ""),
    row("1_main", 10, 1e9, "mmlu_continuation_anatomy", 0.3),
    row("1_main", 10, 1e9, "stem", 0.2, ""),
    row("2_extension", 30, 2.1e9, "hellaswag", 0.5, stderr=""),
    row("2_extension", 30, 2.1e9, "hellaswag", 0.6, stderr="N/A"),  # evaluated twice: the mean
    row("4_instruct_lora", 40, 2.2e9, "hellaswag", 0.9),
]


def test_a_panel_for_each_benchmark(tmp_path):
    scores = curves.read([write(tmp_path / "e.csv", TABLE, ROWS)]).scores
    assert {score.model for score in scores} == {"1_main", "2_extension"}  # no tuned models
    header = TABLE.replace("training_phase,training_steps,training_tokens", "model_name")
    others = [["Llama", *ROWS[0][3:7], 0.7, ""], ["LlamaChat", *ROWS[0][3:]]]
    others += [["Llama", *row(0, 0, 0, "hellaswag", 0.1, "0.0")[3:]]]  # with other examples
    baselines = curves.read([write(tmp_path / "b.csv.gz", header, others)]).scores
    tests = curves.tests_of(scores)
    assert [name for name, _, _ in tests] == ["hellaswag", "mmlu", "mmlu_continuation"]
    behind = [score._replace(score=0.15) for score in scores if score.model == "1_main"]
    figure = curves.draw_scores(scores, tests, behind, baselines)
    hellaswag, mmlu, _ = figure.axes
    lines = lines_of(hellaswag)
    assert list(lines["main"].get_xdata()) == [1, 2] and list(lines["main"].get_ydata()) == [
        0.3,
        0.4,
    ]
    assert list(lines["extension"].get_ydata()) == [pytest.approx(0.55)]
    assert lines["extension"].get_xdata()[0] > 2  # a strip of its own, after the main phase
    assert set(lines["Llama"].get_ydata()) == {0.7} and lines["Llama"].get_linestyle() == "--"
    assert lines["behind"].get_color() == BEHIND and set(lines["behind"].get_ydata()) == {0.15}
    assert "Llama" not in lines_of(mmlu) and mmlu.get_title(loc="left") == "mmlu"
    assert hellaswag.get_title(loc="right") == "acc, 5-shot"
    assert hellaswag.get_xlabel() == "billion tokens" and max(hellaswag.get_xticks()) <= 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["Llama", "behind", "extension", "main"]
    shown = curves.draw_scores(scores, tests[:1], x="share").axes[0].get_lines()[0]
    assert list(shown.get_xdata()) == [50, 100]
    # A small run over one of a thousand times its tokens: one axis, in the unit of the larger.
    small = [s._replace(tokens=s.tokens / 1000, model=f"small {s.model}") for s in scores]
    panel = curves.draw_scores(small, tests[:1], scores).axes[0]
    assert panel.get_xlabel() == "billion tokens"
    found = [list(line.get_xdata()) for line in panel.get_lines()]
    assert found[0] == [1, 2] and found[2] == [0.001, 0.002]
    assert found[1] == found[3]  # the strips of the second phases


def test_runs_are_told_apart_and_tokens_may_be_unknown(runs):
    shutil.copytree(runs / "main", runs / "other" / "main")
    rows = [row("Lucie-7B", "", "", "arc", 0.4)]
    write(runs / "other" / "main" / "evaluation.csv", TABLE, rows)
    scores = curves.read([runs / "main", runs / "other" / "main"]).scores
    points = curves.points_of(scores, ("arc", "5", "acc,none"))
    assert [values[:, 1].tolist() for values in points.values()] == [[0.25, 0.5], [0.4]]
    assert list(points) == [str(runs / "main"), str(runs / "other" / "main")]
    (line,) = curves.draw_scores(scores[2:], curves.tests_of(scores[2:])).axes[0].get_lines()
    assert list(line.get_xdata()) == [0]


@needs_shared
def test_the_published_results():
    names = ("1_pretraining", "2_extension", "3_annealing")
    logs = [SHARED / f"lucie/training_logs_{name}.csv" for name in names]
    found = curves.read([*logs, SHARED / "lucie/evaluation_learning_curve.csv.gz"])
    assert [len(curve.log["share"]) for curve in found.curves] == [386, 49, 49]
    assert curves.length_of(found.curves[0]) == "3.12 trillion tokens, 950 h"
    figure = curves.draw(found.curves)
    drawn = figure.axes[0].get_lines()[0].get_xdata()
    assert len(drawn) == 386 and max(drawn) == pytest.approx(3.1217, abs=1e-4)
    tests = curves.tests_of(found.scores)
    names = {name for name, _, _ in tests}
    assert {"mmlu", "mmlu_continuation", "leaderboard_bbh", "arc_fr", "gsm8k"} <= names
    assert len(tests) == len(names) == 30
    points = curves.points_of(found.scores, ("hellaswag", "10", "acc_norm,none"))
    assert [len(values) for values in points.values()] == [31, 1, 3]
    baselines = curves.read([SHARED / "lucie/evaluation_baselines.csv.gz"]).scores
    assert len({score.model for score in baselines}) == 6


# --- the command and the page ---------------------------------------------------------------------


def test_the_command_of_the_demo(runs, capsys):
    args = [runs / "main", runs / "annealing", "--smooth", 3, "--png", runs / "new" / "c.png"]
    curves.main(list(map(str, [*args, "--scores", runs / "s.png"])))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "1 main: loss 4.000, validation 4.500, 65.1% of ln(1,000)",
        "2 annealing: loss 2.000, validation 2.500, 36.2% of ln(1,000)",
    ]
    image = matplotlib.image.imread(runs / "new" / "c.png")[..., :3]
    for colour in COLOURS[:2]:
        ink = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        assert (abs(image - ink).sum(-1) < 0.05).sum() > 300  # the curve
    assert (runs / "s.png").stat().st_size > 10_000


def test_the_page_holds_everything_and_asks_nothing_of_a_network(runs):
    """Needle maps elsewhere are found by their folder, which may be called as the run is."""
    (runs / "maps").mkdir()
    (runs / "main" / "needle").rename(runs / "maps" / "main")
    maps, page = runs / "maps" / "main", runs / "new" / "p.html"
    curves.main(list(map(str, [runs / "main", runs / "annealing", maps, "--html", page])))
    content = page.read_text(encoding="utf-8")
    words, title = html.unescape(content), r'<img alt="([^"\n]*)[^"]*"'
    svg = dict(re.findall(title + ' src="data:image/svg\\+xml;base64,(.*?)">', content))
    sections = ["Training", "Benchmarks", "Needle in a haystack", "Samples", "Configuration"]
    assert re.findall("<h2>(.*?)</h2>", content) == sections
    assert not re.search(r"<script|https?://|<b>|</pre>", content)
    for said in ("4.500, 65.1% of ln(1,000)", "25%", "under an hour", "Bon <b>", " jour & nuit",
                  " soir</pre>", "step2", "<r>.tiktoken"):  # fmt: skip
        assert said in words, said
    assert 'name="viewport"' in content and "overflow-x: auto" in content  # for a phone
    needles = "main, step2: a needle in a haystack"
    assert [*svg] == ["loss and learning rate", "scores over training", needles]
    drawn = "".join(base64.b64decode(data).decode() for data in svg.values())
    for said in ("loss 4.000", "validation", "acc, 5-shot", "trained on 64 tokens"):
        assert said in drawn, said


def test_languages_and_completions_of_a_run_that_goes_on(runs):
    """On the page are the loss of each language, and of 100 completions the first, the last and
    some ten between."""
    rows = [
        [n, 10 * n, 4, n, n, 1e-3, *last] for n, last in ((1, ["", "", ""]), (2, [3, 2.5, 3.5]))
    ]
    columns = f"{LOG},validation_loss,validation_de,validation_fr-en"
    write(runs / "main" / "log.csv", columns.replace("grad_norm,", ""), rows)
    texts = [[step, "Es", f' war {step}, "<i>"\nund'] for step in range(5, 501, 5)]
    write(runs / "main" / "completions.csv", "training_steps,prompt,text", texts)
    found = curves.read([runs / "main", runs / "annealing"])
    (panel,) = curves.draw_languages(found.curves).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
    assert lines == {"de": [2.5], "fr-en": [3.5]} and panel.get_title(loc="left") == "main"
    steps = [step for _, step, *_ in found.samples if step.startswith("step ")]
    assert steps == [f"step {n}" for n in (*range(5, 500, 50), 500)]
    page = runs / "p.html"
    curves.main([str(runs / "main"), "--html", str(page)])
    content = page.read_text(encoding="utf-8")
    assert "<h2>Languages</h2>" in content and 'alt="validation loss by language"' in content
    assert ' war 500, "<i>"\nund' in html.unescape(content) and "<i>" not in content


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: No such file"),
        (["x.csv"], r"x.csv: no run, log, table .*KeyError"),
        (["bad.csv.gz"], "bad.csv.gz: "),
        (["high.csv"], "high.csv: no run, log, .*high"),
        (["maps"], "fr_generate.json: No such file"),
        (["annealing", "--scores=s.png"], "no scores to draw"),
        (["main", "--png=c.xyz"], "xyz"),
    ],
)
def test_bad_input_is_one_line(runs, monkeypatch, args, message):
    monkeypatch.chdir(runs)
    (runs / "x.csv").write_text("a,b\n1,2\n")
    (runs / "bad.csv.gz").write_bytes(b"no gzip")
    write(runs / "high.csv", TABLE, [row("1_main", 1, 1, "x", "high")])
    write(runs / "maps" / "fr_generate.csv", "length,depth,score", [[1, 2, 3]])
    with pytest.raises((ConfigError, DataError, OSError, ValueError), match=message):
        curves.main(args)
