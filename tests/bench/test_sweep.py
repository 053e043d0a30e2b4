"""The sweep over launch tables: what is tried, what is dropped, what is chosen."""

import importlib.util
import json
import operator
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import triton

from bench import kernels as bench
from bench import measure, sweep
from bench.baselines import OURS, Implementation
from bench.static import REQUIREMENTS
from bench.sweep import SWEEPS
from config.cli import ConfigError
from model import LucieConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", SWEEPS)
def test_candidates_are_like_what_is_in_the_table(op):
    for name, kernel in SWEEPS[op].items():
        present = sweep.launch_table(op)["sm_90" if op.startswith("attention") else "default"][name]
        assert {len(c) for c in [present, *kernel.candidates]} == {len(kernel.fields.split(", "))}
    for kernel in SWEEPS[op].values():
        launched_by = REQUIREMENTS[kernel.function].ops.split()
        assert {op, sweep.MODULES.get(op)} & set(launched_by)
        assert kernel.mode in sweep.OPS[op].floor(LucieConfig(), 32)
        assert 8 <= len(set(kernel.candidates)) == len(kernel.candidates) <= 12


SCRIPT = """
import os, sys
from dataclasses import replace
import kernels
from bench import kernels as bench, sweep
from bench.baselines import OPS, OURS, Draw
from bench.measure import timed
from gpuless.compiler import fake_gpu
from model import LucieConfig

if __name__ == "__main__":
    kernel = sweep.SWEEPS["swiglu"]["backward"]
    tried = replace(kernel, candidates=[(4096, 4), (8192, 2), (3000, 4)])
    sweep.SWEEPS["swiglu"] = {"backward": tried}
    assert bench.main(["--sweep=swiglu", "--toy", "--out", sys.argv[1]]) == 0
    cache = os.environ["TRITON_CACHE_DIR"]
    for candidate in (4096, 4), (512, 4):  # compiled by another process, and by none
        before = set(os.listdir(cache))
        with fake_gpu(90), sweep.launched_as("swiglu", "backward", candidate):
            kernels.use("triton")
            inputs = OPS["swiglu"].inputs(Draw("cpu"), LucieConfig(), 1024)
            timed(OPS["swiglu"].implementations[OURS], inputs, "backward")()
        print("compiled:", set(os.listdir(cache)) != before)
"""


@pytest.mark.slow
def test_candidates_are_compiled_for_the_process_that_measures(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, tmp_path / "script.py", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/sweep_swiglu.json").read_text())["rows"]
    assert [row["candidate"] for row in rows] == [[2048, 4], [4096, 4], [8192, 2], [3000, 4]]
    assert [row["dropped"] for row in rows[:2]] == [None, None]
    assert rows[2]["dropped"].startswith("spills ")
    assert "KernelError: _swiglu_backward on sm_90" in rows[3]["dropped"]
    assert all(row["ms"] is None and row["registers"] > 16 for row in rows[:3])
    *_, pasted, hit, missed = done.stdout.splitlines()
    assert pasted == "LAUNCH[\"sm_90\"] = {'forward': (2048, 4), 'backward': (2048, 4)}"
    assert (hit, missed) == ("compiled: False", "compiled: True")


@pytest.mark.slow
def test_a_compiler_that_hangs_or_dies_costs_one_candidate(monkeypatch):
    monkeypatch.setattr(sweep, "compile_candidate", operator.call)
    good = (dict, {"dropped": None})
    found = list(sweep.compile_all([good, (os._exit, 1), (time.sleep, 999), good], seconds=20))
    late = "did not compile in time"
    assert [row["dropped"] for row in found] == [None, late, late, None]


def test_a_candidate_is_in_force_while_it_is_compared_and_measured(chip, monkeypatch):
    ours, seen, wrong = sweep.OPS["swiglu"].implementations[OURS], [], 1.0

    def call(x):
        seen.append(sweep.present("swiglu")["forward"])
        return ours.call(x) * (wrong if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(sweep, "LucieConfig", lambda: bench.TOY_SIZES)
    op = replace(sweep.OPS["swiglu"], implementations={OURS: Implementation(call)})
    monkeypatch.setitem(sweep.OPS, "swiglu", op)
    monkeypatch.setattr(measure, "time_of", lambda function, device: function() is None or 7.0)
    row = {"kernel": "forward", "candidate": (128, 4)}
    found = sweep.measure_candidate("swiglu", row, 32, chip.type)
    assert found["ms"] == 7.0 and set(seen) == {(128, 4)} and len(seen) == 3
    assert sweep.present("swiglu")["forward"] == (2048, 4)
    wrong = 1.05
    found = sweep.measure_candidate("swiglu", row, 32, chip.type)
    assert found["dropped"].startswith("wrong, relative error") and len(seen) == 5


def test_only_what_gains_replaces_the_present_table(chip, monkeypatch, tmp_path):
    found = {  # what is not here takes 2 ms
        ("forward", (2048, 4)): {"ms": 1.0},
        ("forward", (1024, 2)): {"ms": 0.995},
        ("backward", (2048, 4)): {"ms": 1.0},
        ("backward", (4096, 2)): {"ms": 0.9},
        ("backward", (4096, 4)): {"ms": 0.8},
        ("backward", (4096, 8)): {"dropped": "wrong"},
    }

    def measured(op, row, tokens, device):
        return found.get((row["kernel"], row["candidate"]), {"ms": 2.0})

    monkeypatch.setattr(sweep, "measure_candidate", measured)
    monkeypatch.setattr(sweep, "machine", lambda device: measure.machine("cpu"))
    # No chip that the compiler knows: all are measured as they are.
    results = sweep.sweep("swiglu", 8192, 89, "cuda", tmp_path, minutes=1)
    assert results["best"] == {"forward": (2048, 4), "backward": (4096, 4)}
    written = json.loads((tmp_path / "sweep_swiglu.json").read_text())
    assert written == json.loads(json.dumps(results)) and written["stopped"] is None
    shown = sweep.table(results)
    assert ["(4096,", "4)", "0.8", "1.25"] in [line.split() for line in shown.splitlines()]
    assert any(
        line.startswith("(4096, 8)") and line.endswith("  wrong") for line in shown.split("\n")
    )
    assert shown.endswith("LAUNCH[\"sm_90\"] = {'forward': (2048, 4), 'backward': (4096, 4)}")
    results = sweep.sweep("swiglu", 8192, 89, "cuda", tmp_path, minutes=0)
    assert results["best"]["backward"] == (2048, 4) and "stopped after 0 min" in sweep.table(
        results
    )
    # The present row is timed even where the compiler would drop it, and only a faster one wins.
    spills = {"dropped": "spills 8 bytes", "registers": 255}
    monkeypatch.setattr(
        sweep, "compile_all", lambda jobs, _: [spills if j[2] == (2048, 4) else {} for j in jobs]
    )
    found["backward", (2048, 4)] = {"ms": 0.7}
    results = sweep.sweep("swiglu", 8192, 90, "cuda", tmp_path, minutes=1)
    assert results["best"] == {"forward": (2048, 4), "backward": (2048, 4)}
    assert [row["ms"] for row in results["rows"] if row["candidate"] == (2048, 4)] == [1.0, 0.7]


def test_bad_input_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no op 'atention' to sweep; did you mean 'attention'"):
        bench.main(["--sweep=atention"])
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        bench.main(["--sweep=rope"])
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="no CUDA GPU here: --toy"):
        bench.main(["--sweep=rope"])
    with pytest.raises(ConfigError, match="sm_80 has no kernel 'one pass'"):
        bench.main(["--sweep=attention_one_pass", "--toy", "--chip=80"])
