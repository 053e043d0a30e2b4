"""The benchmark of kernels at toy size on a CPU: everything but the GPU's own clock and memory."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines, measure
from bench import kernels as bench
from bench.baselines import OPS, OURS, Draw, Implementation
from bench.kernels import TOY_SIZES
from config.cli import ConfigError
from model import LucieConfig

MODES = {
    "linear_cross_entropy": ["no-grad-forward", "full"],
    "attention_decode": ["no-grad-forward"],
    "int4_linear": ["no-grad-forward"],
}


def run(ops, out, minutes=7.0):
    return bench.run(ops, TOY_SIZES, [32, 48], "cpu", out, minutes)


def only(name, *kept, **more):
    """One operation with some of its implementations, and others."""
    implementations = {n: OPS[name].implementations[n] for n in kept}
    return {name: replace(OPS[name], implementations=implementations | more)}


@pytest.mark.slow
def test_every_row_is_measured_and_written(tmp_path, capsys):
    assert bench.main(["--toy", f"--out={tmp_path}"]) == 0
    results = json.loads((tmp_path / "kernels.json").read_text())
    rows = results["rows"]
    found = [(r["op"], r["tokens"], r["mode"]) for r in rows if r["baseline"] == OURS]
    assert found == [
        (op, tokens, mode)
        for tokens in (32, 48, 1, 4, 16)
        for op in OPS
        if tokens in (OPS[op].tokens or (32, 48))
        for mode in MODES.get(op, ["forward", "backward", "full"])
    ]
    for row in rows:
        assert row["graph_ms"] is row["events_ms"] is row["host_us"] is row["timed_by"] is None
        assert row["failure"] is None and 0 < row["relative_error"] < 1e-2
        work = OPS[row["op"]].floor(TOY_SIZES, row["tokens"])[row["mode"]]
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[row["unit"]]
        assert row["speed"] == pytest.approx(work / (row["ms"] / 1e3) / scale)
        assert row["of_ceiling"] == row["speed"] / results["ceilings"][row["unit"]]
    assert results["stopped"] is None
    shown = capsys.readouterr().out
    assert "attention backward, ms" in shown and "int4_linear no-grad-forward, ms" in shown


# --- every baseline computes the operation --------------------------------------------------------


def liger_stand_in(function):
    """What a Liger kernel computes, in its layouts; Liger itself needs a GPU."""

    def rope(q, k, cos, sin):
        assert q.shape[1] == TOY_SIZES.num_attention_heads and q.transpose(1, 2).is_contiguous()
        assert cos.shape == sin.shape == (1, q.shape[2], TOY_SIZES.head_dim)
        return baselines.eager_rope(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    def silu_mul(gate, up):
        assert gate.is_contiguous() and up.is_contiguous()
        return F.silu(gate) * up

    def loss(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).float(), targets), None

    return {
        "LigerRMSNormFunction": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
        "LigerFusedAddRMSNormFunction": lambda x, r, w, e: baselines.eager_add_rms_norm(x, r, w),
        "LigerSiLUMulFunction": silu_mul,
        "LigerRopeFunction": rope,
        "LigerFusedLinearCrossEntropyFunction": loss,
    }[function]


@pytest.mark.parametrize("name", OPS)
def test_every_baseline_is_right(name, monkeypatch):
    """Outputs and gradients; torch.compile's run eagerly here, Liger's by stand-ins."""

    class Module:
        def __getattr__(self, function):
            return type("Function", (), {"apply": staticmethod(liger_stand_in(function))})

    monkeypatch.setattr(baselines, "import_module", lambda name: Module())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    op = OPS[name]
    found = measure.compare(op, TOY_SIZES, 32, "cpu")
    assert found.keys() == op.implementations.keys() and {OURS, "eager"} <= found.keys()
    not_here = {"cudnn"} | ({"flex"} if name == "attention" else set())  # no CPU backward
    failures = {n: f["failure"] for n, f in found.items() if n not in not_here}
    assert set(failures.values()) == {None}, failures


@pytest.mark.slow
def test_torch_compile_is_right_and_a_timed_backward_repeats(tmp_path):
    """It gives its saved tensors away at the first backward, unless told otherwise."""
    compiled = Implementation(baselines.compiled(baselines.eager_rms_norm))
    results = run(only("rms_norm", OURS, compile=compiled), tmp_path)
    assert [row["failure"] for row in results["rows"]] == [None] * 12


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight: 1.05 * baselines.eager_rms_norm(x, weight),  # the output
        lambda x, weight: baselines.eager_rms_norm(2 * x - x.detach(), weight),  # a gradient only
        lambda x, weight: baselines.eager_rms_norm(x, weight) * torch.nan,
    ],
)
def test_a_wrong_baseline_is_compared_once_and_never_timed(wrong, tmp_path):
    calls = []

    def baseline(x, weight):
        calls.append(len(x))
        return wrong(x, weight)

    results = run(only("rms_norm", OURS, eager=Implementation(baseline)), tmp_path)
    refused = [row for row in results["rows"] if row["baseline"] == "eager"]
    assert len(refused) == 6 and all(row["failure"] and row["ms"] is None for row in refused)
    assert calls == [32]
    json.loads((tmp_path / "kernels.json").read_text(), parse_constant=pytest.fail)  # no NaN in it


def test_a_wrong_kernel_of_ours_is_exit_code_1(monkeypatch, tmp_path):
    good = OPS["rms_norm"].implementations[OURS].call

    def scaled(x, weight):  # right in fp32, which is the reference
        return good(x, weight) * (1.05 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(bench, "OPS", only("rms_norm", "eager", **{OURS: Implementation(scaled)}))
    assert bench.main(["--toy", f"--out={tmp_path}"]) == 1


def nbytes(*tensors):
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.unit == "GB/s"])
def test_floors_in_bytes(name):
    """Counted on tensors that exist: inputs read once, outputs written once."""
    inputs = OPS[name].inputs(Draw("cpu"), TOY_SIZES, 32)
    eager = OPS[name].implementations["eager"]
    outputs = measure.as_tuple(eager.call(*eager.enter(*inputs)))
    floor, forward = OPS[name].floor(TOY_SIZES, 32), nbytes(*inputs, *outputs)
    if name in ("attention_decode", "int4_linear"):
        assert floor == {"no-grad-forward": forward}
        return
    needed = {  # of what the forward pass had, what no backward pass can do without
        "rms_norm": inputs,
        "add_rms_norm": (outputs[-1], inputs[-1]),
        "swiglu": inputs,
        "rope": inputs[2:],
    }
    gradients = [x for x in inputs if x.requires_grad]
    if name == "add_rms_norm":
        gradients = gradients[1:]  # x and residual share one
    backward = nbytes(*needed[name], *outputs, *gradients)  # an upstream gradient for each output
    assert floor == {"forward": forward, "backward": backward, "full": forward + backward}


def test_floors_in_flops():
    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    op = OPS["linear_cross_entropy"]
    inputs = op.inputs(Draw("cpu"), TOY_SIZES, 32)
    full = count(lambda: baselines.eager_loss(*inputs).backward())
    assert op.floor(TOY_SIZES, 32) == {"no-grad-forward": full // 3, "full": full}
    q, k, v = (x.transpose(1, 2) for x in OPS["attention"].inputs(Draw("cpu"), TOY_SIZES, 32))
    k, v = (
        x.repeat_interleave(TOY_SIZES.num_attention_heads // TOY_SIZES.num_key_value_heads, 1)
        for x in (k, v)
    )
    forward = count(lambda: (q @ k.transpose(2, 3)).softmax(-1) @ v)
    floor = OPS["attention"].floor(TOY_SIZES, 32)  # half is masked; the backward makes q k again
    assert floor == {"forward": forward / 2, "backward": 5 * forward / 4, "full": 7 * forward / 4}
    # Lucie-7B at 4,096 tokens: 2 products of 4,096^2 by 32 heads of 128, half masked: 137 GFLOP
    assert OPS["attention"].floor(LucieConfig(), 4096)["forward"] == 2 * 4096**2 * 4096


def test_nothing_is_begun_after_its_minutes(tmp_path):
    results = run(only("rms_norm", OURS, "eager"), tmp_path, minutes=0)
    assert results["rows"] == [] and "stopped after 0 minutes" in bench.table(results)
    assert json.loads((tmp_path / "kernels.json").read_text()) == results


def test_the_ratio_is_to_the_fastest_baseline():
    def row(baseline, ms, mb, failure=None, timed_by="graph"):
        row = dict(op="rope", mode="forward", tokens=4096, baseline=baseline, ms=ms, peak_mb=mb)
        row |= dict(speed=3000.0, unit="GB/s", of_ceiling=0.75, failure=failure)
        return row | dict(timed_by=timed_by, host_us=21.4)

    rows = [row(OURS, 0.5, 80.0), row("eager", 2.0, 320.0, timed_by="events")]
    rows += [row("compile", 0.6, 90.0), row("liger", None, None, "ValueError: no", None)]
    rows += [row("one pass", 0.4, 70.0)]  # is ours too
    about = measure.machine("cpu") | {"stopped": None}
    shown = bench.table(about | {"ceilings": {"GB/s": 4000.0}, "rows": rows})
    line = next(line for line in shown.splitlines() if "4,096" in line)
    expected = "4,096 0.5 2* 0.6 failed 0.4 3,000.0 GB/s 75% 21 1.20x compile, 80 MB to 90"
    assert line.split() == expected.split() and "liger: ValueError: no" in shown
    assert "replays of a CUDA graph; * by events" in shown.splitlines()[2]


def test_bad_input_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU here: --toy"):
        bench.main([])
    with pytest.raises(ConfigError, match="no op 'softmax'; there are attention"):
        bench.main(["--toy", "softmax"])
