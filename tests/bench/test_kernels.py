"""The benchmark of kernels at toy size on a CPU: everything but the GPU's own clock and memory."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines
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
    found = bench.compare(op, TOY_SIZES, 32, "cpu")
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


# --- what is timed, and against what --------------------------------------------------------------


@pytest.mark.parametrize(
    "mode,forwards,backwards",
    [("no-grad-forward", 2, 0), ("forward", 2, 0), ("backward", 0, 2), ("full", 2, 2)],
)
def test_a_mode_times_what_it_says(mode, forwards, backwards):
    passes = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            passes.append("backward")
            return 2 * dy * ctx.saved_tensors[0]

    def enter(x):
        passes.append("enter")
        return (x.clone(),)

    x = torch.ones(3, requires_grad=True)
    function = bench.timed(Implementation(Square.apply, enter), (x,), mode)
    passes.clear()
    results = function(), function()
    assert [passes.count(p) for p in ("enter", "forward", "backward")] == [0, forwards, backwards]
    if "forward" in mode:  # a graph is kept where there would be one in training
        assert [y.requires_grad for y in results] == 2 * [mode == "forward"]


class Device:
    """Stands in for torch.cuda: what would run is captured, or takes its milliseconds at once."""

    def __init__(self, monkeypatch):
        self.clock, self.capturing, self.graphs = 0.0, None, []
        self.sync_mode, self.synchronized, self.costs = "default", 0, {}
        replaced = {
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
            "graph": self.capture,
            "current_stream": lambda: "side",
            "synchronize": self.synchronize,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
            "get_device_properties": lambda: SimpleNamespace(L2_cache_size=1000),
            "Event": self.event,
        }
        for name, stand_in in replaced.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        flushed = SimpleNamespace(zero_=lambda: self.run("flush", 3.0))
        made = {((500,), torch.int32): flushed}  # 2,000 bytes
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: made[size, dtype])

    def run(self, name, ms):
        if self.capturing is None:
            self.clock += ms
        else:
            self.capturing.append(name)
            self.costs[name] = ms

    @contextlib.contextmanager
    def capture(self, graph, stream):
        assert stream == "side"
        self.graphs.append(parts := [])
        self.capturing = parts
        try:
            yield
        finally:
            self.capturing = None
        # A replay takes 0.25 ms to begin; the first one, much longer.
        begin = iter([100.0] + [0.25] * bench.REPLAYS)
        graph.replay = lambda: self.run("", next(begin) + sum(self.costs[name] for name in parts))

    def event(self, enable_timing):
        event = SimpleNamespace(time=None)
        event.record = lambda: setattr(event, "time", self.clock)
        event.elapsed_time = lambda end: end.time - event.time
        return event

    def synchronize(self):
        self.synchronized += 1


def test_a_graph_holds_calls_after_flushes_and_the_flushes_are_taken_off(monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(bench, "time_of", lambda function, device: 0.5)
    row = bench.times_of(lambda: device.run("call", 0.125), "cuda")
    assert device.graphs == [["flush", "call"] * 4, ["flush"] * 4]  # 2 ms of calls
    assert row["ms"] == row["graph_ms"] == 0.125 and row["events_ms"] == 0.5
    assert row["timed_by"] == "graph" and row["not_captured"] is None and row["host_us"] > 0
    assert bench.graph_time(lambda: device.run("call", 64.0), 1) == 64.0
    monkeypatch.setattr(bench, "time_of", lambda function, device: 50.0)
    device.graphs.clear()
    bench.times_of(lambda: device.run("call", 50.0), "cuda")
    assert device.graphs == [["flush", "call"], ["flush"]]


@pytest.mark.parametrize("when", ["waits for the device", "only in a capture"])
def test_what_cannot_be_captured_is_timed_by_events(when, monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(bench, "time_of", lambda function, device: 0.5)

    def call():
        waits = when == "waits for the device" and device.sync_mode == "error"
        if waits or device.capturing is not None:
            synchronized.append(device.synchronized)
            raise RuntimeError(f"not permitted: {when}")

    synchronized = []
    row = bench.times_of(call, "cuda")
    assert row["timed_by"] == "events" and row["ms"] == row["events_ms"] == 0.5
    assert row["graph_ms"] is None and row["not_captured"] == f"RuntimeError: not permitted: {when}"
    assert synchronized == [device.synchronized - 1] and device.sync_mode == "default"
    assert device.graphs == ([["flush"]] if when == "only in a capture" else [])


def test_the_host_is_timed_by_a_few_calls_that_nothing_waits_for(monkeypatch):
    device, calls = Device(monkeypatch), []
    assert 0 < bench.host_time(lambda: calls.append(device.synchronized), ms=4.0) < 1e4
    assert calls == [repeat for repeat in range(1, 11) for _ in range(5)]


def nbytes(*tensors):
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.unit == "GB/s"])
def test_floors_in_bytes(name):
    """Counted on tensors that exist: inputs read once, outputs written once."""
    inputs = OPS[name].inputs(Draw("cpu"), TOY_SIZES, 32)
    eager = OPS[name].implementations["eager"]
    outputs = bench.as_tuple(eager.call(*eager.enter(*inputs)))
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
    about = bench.machine("cpu") | {"stopped": None}
    shown = bench.table(about | {"ceilings": {"GB/s": 4000.0}, "rows": rows})
    line = next(line for line in shown.splitlines() if "4,096" in line)
    expected = "4,096 0.5 2* 0.6 failed 3,000.0 GB/s 75% 21 1.20x compile, 80 MB to 90"
    assert line.split() == expected.split() and "liger: ValueError: no" in shown
    assert "replays of a CUDA graph; * by events" in shown.splitlines()[2]


def test_bad_input_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU here: --toy"):
        bench.main([])
    with pytest.raises(ConfigError, match="no op 'softmax'; there are attention"):
        bench.main(["--toy", "softmax"])
