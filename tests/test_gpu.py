"""The script for everything on a GPU: its parts one after the other, whatever becomes of them."""

import importlib.util
import json
import time
from dataclasses import replace

import pytest
from conftest import launch

from bench import gpu
from bench.gpu import PARTS, Part
from config.cli import ConfigError


def part(name, code, weight=1.0, headline=lambda out: ["found"], toy="pass"):
    return Part(
        name, weight, lambda out, minutes: ["-c", code], lambda out, minutes: ["-c", toy],
        headline, "not all",
    )  # fmt: skip


def run(tmp_path, *parts, minutes=2.0, toy=False):
    summary = gpu.run(list(parts), tmp_path, minutes, toy)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    return summary["parts"]


def states(found):
    return {name: (p["exit_code"], p["cut_short"]) for name, p in found.items()}


def test_one_that_fails_stops_none_after_it(tmp_path, capfd):
    found = run(
        tmp_path,
        part("a", "print('é seen'); import sys; print('err', file=sys.stderr); sys.exit(3)"),
        part("b", "raise OSError"),
        part("c", "print('fine')"),
    )
    assert states(found) == {"a": (3, False), "b": (1, False), "c": (0, False)}
    shown = capfd.readouterr().out
    assert "é seen" in shown and "err" in shown and "fine" in shown
    assert (tmp_path / "a.log").read_text() == "é seen\nerr\n"
    text = gpu.table({"seconds": 3.0, "parts": found})
    assert "NOT RIGHT, exit code 3" in text and text.count("right") == 1


@pytest.mark.slow  # so much time that each is under way when it is interrupted
def test_one_that_hangs_is_interrupted_and_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 5)
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job's is not
    tells = f"import signal, time; {heard}\ntry: time.sleep(300)\n"
    tells += "except KeyboardInterrupt: print('what is known')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(300)"
    begin = time.monotonic()
    found = run(
        tmp_path, part("tells", tells), part("deaf", deaf), part("last", "pass"), minutes=0.5
    )
    assert time.monotonic() - begin < 90
    assert states(found) == {"tells": (0, True), "deaf": (-9, True), "last": (0, False)}
    assert (tmp_path / "tells.log").read_text() == "what is known\n"


def test_time_that_is_left_goes_to_those_after(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(
        gpu, "call", lambda command, log, limit, toy: limits.append(limit) or (0, False)
    )
    minutes = []

    def noting(name, weight):
        return replace(
            part(name, "", weight), command=lambda out, m: minutes.append(60 * m) or ["-c", ""]
        )

    run(tmp_path, noting("a", 0.25), noting("b", 0.25), noting("c", 0.5), minutes=10)
    shares = [150, 200, 600]  # nothing took any time
    assert minutes == pytest.approx([0.75 * s for s in shares], abs=1)
    expected = [1.1 * 150 - gpu.GRACE, 1.1 * 200 - gpu.GRACE, 600 - gpu.GRACE]
    assert limits == pytest.approx(expected, abs=1)


def test_all_of_it_ends_in_its_time():
    """If every part takes all it may, with the time to end in."""
    left = total = 60 * 8.75
    for number, p in enumerate(PARTS):
        share = left * p.weight / sum(q.weight for q in PARTS[number:])
        left -= min(1.1 * share, left) - gpu.GRACE + gpu.GRACE
    assert left >= 0 and total < 9 * 60


def test_results_of_an_earlier_run_are_not_told_again(tmp_path):
    (tmp_path / "decode.json").write_text(
        '{"rows": [{"side": "ours", "batch": 1, "failure": "x"}]}'
    )
    found = run(tmp_path, part("decode", "raise OSError", headline=gpu.decode_headline))
    assert found["decode"]["headline"][0].startswith("no results: ")
    (tmp_path / "step.json").write_text("{}")
    found = run(tmp_path, part("step", "pass", headline=gpu.step_headline))
    assert "No such file" in found["step"]["headline"][0]


def test_a_toy_says_what_it_leaves_out(tmp_path):
    found = run(tmp_path, part("a", "raise OSError"), toy=True)
    assert found["a"]["toy"] == "not all" and found["a"]["exit_code"] == 0
    assert "toy: not all" in gpu.table({"seconds": 1.0, "parts": found})
    assert all(p.in_toy for p in PARTS)


@pytest.mark.parametrize(
    "codes,cut,expected", [([0, 0], False, 0), ([0, 1], False, 1), ([0, 0], True, 1)]
)
def test_the_exit_code(tmp_path, monkeypatch, capsys, codes, cut, expected):
    parts = {
        str(i): {"exit_code": c, "cut_short": cut, "seconds": 1.0, "headline": []}
        for i, c in enumerate(codes)
    }
    monkeypatch.setattr(gpu, "run", lambda *args: {"seconds": 1.0, "parts": parts})
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == expected


def test_without_a_gpu_only_the_toy_runs(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU here; --toy"):
        gpu.main([])


# --- headlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log,told",
    [
        ("..\n9 passed, 1 skipped, 5 warnings in 4s\n", "9 passed, 1 skipped, 5 warnings in 4s"),
        ("F\nFAILED x.py\n=== 1 failed, 2 passed in 3.0s ===\n", "1 failed, 2 passed in 3.0s"),
        ("1 error in 0.5s\n", "1 error in 0.5s"),
        ("!!! KeyboardInterrupt !!!\n7 passed in 1.2s (0:01:02)\n", "7 passed in 1.2s (0:01:02)"),
    ],
)  # fmt: skip
def test_what_pytest_says_last(tmp_path, log, told):
    (tmp_path / "tests.log").write_text(log)
    assert gpu.tests_headline(tmp_path) == [told]


def test_no_tests_no_headline(tmp_path):
    (tmp_path / "tests.log").write_text("No module named pytest\n")
    assert gpu.tests_headline(tmp_path) == []


def test_kernels_are_counted(tmp_path):
    def row(provider, ms, tokens=1, failure=None):
        case = {"op": "rope", "tokens": tokens, "mode": "full", "provider": provider}
        return case | {"ms": ms, "failure": failure}

    rows = [row("nanolucie", 1), row("eager", 2), row("nanolucie", 3, 2), row("eager", 2, 2)]
    rows += [row("nanolucie", None, 3, "wrong"), row("eager", 1, 3), row("nanolucie", 1, 4)]
    results = {"rows": rows, "stopped": "after 2 minutes", "not_begun": 4}
    (tmp_path / "kernels.json").write_text(json.dumps(results))
    assert gpu.kernels_headline(tmp_path) == [
        "7 rows; ours the fastest in 1 of 2 cases",
        "ours FAILED in rope",
        "stopped after 2 minutes, 4 rows not begun",
    ]


def test_the_step_in_a_few_lines(tmp_path):
    row = {"seq_len": 4096, "layers": 32, "micro_batches": 8, "micro_batch_size": 1}
    row |= {"mfu_causal": None, "mfu_full": None, "failure": None, "memory": False}
    rows = [row | {"side": "ours", "tokens_per_second": 12_000.0}]
    rows.append(row | {"side": "transformers", "tokens_per_second": 8_000.0})
    rows.append(row | {"side": "liger", "failure": "No module"})
    rows.append(row | {"side": "liger", "failure": "out of memory", "memory": True})
    worst = {"group": "gaps", "lost_ms": 123.4, "of_step": 0.05}
    profiles = [
        {"seq_len": 4096, "failure": None, "lossiest": worst, "title": "a step"},
        {"failure": "x"},
    ]
    results = {"rows": rows, "profiles": profiles, "checks": {}, "stopped": "by hand"}
    (tmp_path / "step.json").write_text(
        json.dumps(results | {"not_begun": ["a", "b"], "errors": {}})
    )
    assert gpu.step_headline(tmp_path) == [
        "8 x 4,096 tokens, 32 layers: 12,000 tokens/s; 1.50 x transformers, the fastest peer",
        "a step: most is lost in gaps, 123.4 ms, 5.0% of the step",
        "liger: No module",
        "stopped by hand; not begun: a, b",
    ]


def test_commands_are_those_that_exist():
    for p in PARTS:
        for command in (p.command, p.toy):
            arguments = command(gpu.ROOT / "out", 1.5)
            assert arguments[0] == "-c" or importlib.util.find_spec(arguments[1])
            assert all(isinstance(a, str) for a in arguments)


@pytest.mark.slow
def test_the_whole_of_it_at_toy_size(tmp_path):
    """What a GPU will run, on this CPU."""
    pytest.importorskip("transformers")
    (tmp_path / "rehearse.py").write_text(
        f"import sys; from bench import gpu; sys.exit(gpu.main(['--toy', '--out={tmp_path}']))"
    )
    done = launch(tmp_path / "rehearse.py", timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [*summary["parts"]] == ["tests", "kernels", "step", "decode"]
    for name, found in summary["parts"].items():
        assert found["headline"] and not found["headline"][0].startswith("no results"), name
        assert found["toy"]
    results = json.loads((tmp_path / "step.json").read_text())
    assert all(c["failure"] is None for c in results["checks"].values())
    assert {row["side"] for row in results["rows"]} == {"ours", "transformers"}
    assert {row["seq_len"] for row in results["rows"] if not row["failure"]} == {64, 384}
    modes = {r["activation_checkpointing"] for r in results["rows"] if r["side"] == "ours"}
    assert modes >= {"none", "selective"}  # there is little room
    assert len(results["profiles"]) == 2 and results["stopped"] is None
    for profiled in results["profiles"]:
        assert profiled["agrees"] and profiled["flops_found"] == profiled["flops_expected"]
        assert (tmp_path / profiled["events"]).stat().st_size > 1000
    if importlib.util.find_spec("matplotlib"):
        pictures = {path.name for path in tmp_path.glob("*.png")}
        assert pictures >= {"step.png", "step_64.png", "step_384.png", "attention.png"}
    assert "=== summary" in done.stdout
