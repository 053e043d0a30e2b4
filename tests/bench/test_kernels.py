"""The benchmark rehearsed at toy size on a CPU: everything but the GPU's own clock and memory."""

import csv
import json
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import kernels as bench
from bench import peers, report
from bench.peers import OPS, OURS, Op, Provider, Suite
from bench.report import BenchError
from config.cli import ConfigError

TOY = Suite(
    tokens=(32, 48),
    hidden=128,
    intermediate=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=97,
    copied=2**16,
    product=64,
)
# Liger's data, https://github.com/linkedin/Liger-Kernel/blob/main/benchmark/data
LIGER = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
    "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
    "liger_version"
)
MODES = {
    "linear_cross_entropy": ["no-grad-forward", "full"],
    "attention_decode": ["no-grad-forward"],
    "int4_linear": ["no-grad-forward"],
}


def clock(function):
    """Stands in for device events."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        function()
        seconds.append(1e3 * (time.perf_counter() - started))
    return [sum(seconds) / 2, min(seconds), max(seconds)]


def rehearse(ops, out, timer=clock, minutes=7.0, suite=TOY):
    return bench.run(ops, suite, out, timer, device="cpu", kernels="auto", minutes=minutes)


def only(name, *providers, **more) -> dict[str, Op]:
    """One operation with some of its providers, and others."""
    kept = {p: OPS[name].providers[p] for p in providers}
    return {name: replace(OPS[name], providers=kept | more)}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """All operations, ours and eager torch."""
    out = tmp_path_factory.mktemp("bench")
    ops = {name: only(name, OURS, "eager")[name] for name in OPS}
    return rehearse(ops, out), out


def test_every_row_is_measured(rehearsal):
    results, _ = rehearsal
    rows = results["rows"]
    found = [(r["op"], r["tokens"], r["mode"], r["provider"]) for r in rows]
    assert found == [
        (op, tokens, mode, provider)
        for tokens in (*TOY.tokens, 1, 4, 16)
        for op in OPS
        if tokens in (OPS[op].tokens or TOY.tokens)
        for mode in MODES.get(op, ["forward", "backward", "full"])
        for provider in (OURS, "eager")
    ]
    for row in rows:
        assert row["failure"] is None and 0 < row["relative_error"] < 1e-2
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
        work = OPS[row["op"]].floor(TOY, row["tokens"])[row["mode"]]
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[row["unit"]]
        assert row["speed"] == pytest.approx(work / (row["ms"] / 1e3) / scale)
        assert row["of_ceiling"] == row["speed"] / results["ceilings"][row["unit"]]
    assert results["stopped"] is None and results["not_begun"] == 0


def test_files(rehearsal):
    results, out = rehearsal
    assert json.loads((out / "kernels.json").read_text()) == results | {
        "suite": results["suite"] | {"tokens": list(TOY.tokens)}
    }
    assert results["torch"] and results["triton"] and results["date"] and results["system"]
    text = (out / "kernels.csv").read_text()
    assert text.splitlines()[0] == LIGER
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == 2 * len(results["rows"])
    speed, memory = lines[:2]
    first = results["rows"][0]
    assert (speed["kernel_name"], speed["kernel_operation_mode"]) == ("attention", "forward")
    assert (speed["metric_name"], speed["metric_unit"], speed["x_value"]) == ("speed", "ms", "32")
    assert float(speed["y_value_50"]) == first["ms"] and float(speed["y_value_80"]) >= first["ms"]
    assert json.loads(speed["extra_benchmark_config_str"])["head_dim"] == 64
    assert (memory["metric_name"], memory["metric_unit"]) == ("memory", "MB")
    assert memory["y_value_50"] == "nan"  # a CPU has no such meter


@pytest.mark.slow
def test_replot(rehearsal, tmp_path, capsys):
    """A saved run is shown again, without a GPU: a table and a picture for each operation."""
    image = pytest.importorskip("matplotlib.image")
    _, out = rehearsal
    assert bench.main(["--replot", str(out / "kernels.json"), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "attention backward, ms" in shown and "linear_cross_entropy no-grad-forward" in shown
    assert {path.stem for path in tmp_path.glob("*.png")} == set(OPS)
    widths = {}
    for path in tmp_path.glob("*.png"):
        pixels = image.imread(path)[..., :3]
        assert (abs(pixels - (0.84, 0.15, 0.16)).sum(-1) < 0.2).any()  # our red
        widths[path.stem] = pixels.shape[1]
    assert widths["attention"] > widths["linear_cross_entropy"] > widths["attention_decode"]
    for text in ("", "{}", "[]", '{"rows": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(BenchError, match=r"bad\.json: "):
            bench.main(["--replot", str(tmp_path / "bad.json")])
    with pytest.raises(BenchError, match=r"nowhere\.json: No such file"):
        bench.main(["--replot", str(tmp_path / "nowhere.json")])


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
    function = bench.timed(Provider(Square.apply, enter), (x,), mode)
    passes.clear()
    results = function(), function()
    assert [passes.count(p) for p in ("enter", "forward", "backward")] == [0, forwards, backwards]
    if "forward" in mode:  # a graph is kept where one would be in training
        assert [y.requires_grad for y in results] == 2 * [mode == "forward"]


def nbytes(*tensors):
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.unit == "GB/s"])
def test_floors_in_bytes(name):
    """Counted on tensors that exist: inputs read once, outputs written once."""
    inputs = OPS[name].inputs(TOY, 32, "cpu")
    provider = OPS[name].providers["eager"]
    outputs = bench.as_tuple(provider.call(*provider.enter(*inputs)))
    floor = OPS[name].floor(TOY, 32)
    forward = nbytes(*inputs, *outputs)
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
        gradients = gradients[1:]  # x and residual have the same one
    backward = nbytes(*needed[name], *outputs, *gradients)  # an upstream gradient for each output
    assert floor == {"forward": forward, "backward": backward, "full": forward + backward}


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_floors_in_flops():
    hidden, weight, targets = OPS["linear_cross_entropy"].inputs(TOY, 32, "cpu")

    def loss():
        return peers.eager_loss(hidden, weight, targets)

    floor = OPS["linear_cross_entropy"].floor(TOY, 32)
    assert floor["no-grad-forward"] == count(loss)
    assert floor["full"] == count(lambda: loss().backward())

    q, k, v = (x.transpose(1, 2) for x in OPS["attention"].inputs(TOY, 32, "cpu"))
    k, v = (x.repeat_interleave(TOY.heads // TOY.kv_heads, 1) for x in (k, v))

    def attend():
        return (q @ k.transpose(2, 3)).softmax(-1) @ v

    forward, full = count(attend), count(lambda: attend().sum().backward())
    floor = OPS["attention"].floor(TOY, 32)
    assert floor["forward"] == forward / 2  # half of it is masked away
    again = forward / 2  # the backward pass makes the scores a second time
    assert floor["backward"] == (full - forward + again) / 2
    assert floor["full"] == floor["forward"] + floor["backward"]


@pytest.mark.slow
def test_lucie_shapes():
    suite = bench.SUITES["lucie"]
    assert suite.tokens == (4096, 8192, 16384, 32000)
    packed = OPS["int4_linear"].inputs(suite, 1, "cpu")[1::3]
    assert [tuple(p.shape) for p in packed] == [
        (6144, 2048), (4096, 2048), (24576, 2048), (4096, 6144),
    ]  # fmt: skip
    shapes = [list(x.shape) for x in OPS["swiglu"].inputs(suite, 1, "cpu")]
    shapes += [list(x.shape) for x in OPS["attention"].inputs(suite, 2, "cpu")]
    shapes += [list(x.shape) for x in OPS["attention_decode"].inputs(suite, 2, "cpu")]
    assert shapes == [
        [1, 24576],
        *([1, 2, 32, 128], [1, 2, 8, 128], [1, 2, 8, 128]),
        *([1, 1, 32, 128], [1, 2, 8, 128], [1, 2, 8, 128]),
    ]
    assert (suite.hidden, suite.vocab) == (4096, 65024)
    # 2 products of 4,096^2 by 32 heads of 128, half masked: 137 GFLOP
    assert OPS["attention"].floor(suite, 4096)["forward"] == 2 * 4096**2 * 4096
    assert OPS["rms_norm"].floor(suite, 4096)["forward"] == 2 * (2 * 4096 + 1) * 4096


def test_a_failing_peer_is_a_row(tmp_path):
    def fail(x, weight):
        raise NotImplementedError("no such\nkernel")

    results = rehearse(only("rms_norm", OURS, "eager", liger=Provider(fail)), tmp_path)
    failures = {row["provider"]: row["failure"] for row in results["rows"]}
    assert failures == {
        OURS: None,
        "eager": None,
        "liger": "NotImplementedError: no such kernel",
    }
    assert len(results["rows"]) == 18
    shown = report.table(results)
    assert shown.count("failed") == 6 and shown.count("NotImplementedError") == 1
    report.plot(results, tmp_path)


def test_a_peer_may_fail_at_one_size_only(tmp_path):
    def short(x, weight):
        if len(x) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peers.eager_rms_norm(x, weight)

    results = rehearse(only("rms_norm", OURS, eager=Provider(short)), tmp_path)
    failed = [(r["tokens"], r["ms"]) for r in results["rows"] if r["failure"]]
    assert failed == [(48, None)] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight: 1.05 * peers.eager_rms_norm(x, weight),  # the output
        lambda x, weight: peers.eager_rms_norm(2 * x - x.detach(), weight),  # a gradient only
        lambda x, weight: peers.eager_rms_norm(x, weight) * torch.nan,
        lambda x, weight: peers.eager_rms_norm(x, weight)[:1],
        lambda x, weight: (peers.eager_rms_norm(x, weight), x),
    ],
)
def test_a_wrong_peer_is_refused(wrong, tmp_path):
    calls = []

    def peer(x, weight):
        calls.append(len(x))
        return wrong(x, weight)

    results = rehearse(only("rms_norm", OURS, eager=Provider(peer)), tmp_path)
    refused = [row for row in results["rows"] if row["provider"] == "eager"]
    assert len(refused) == 6 and all(row["failure"] and row["ms"] is None for row in refused)
    assert calls == [32]  # compared once, at the smallest size, never timed
    json.loads((tmp_path / "kernels.json").read_text(), parse_constant=pytest.fail)  # no NaN in it


def test_a_wrong_kernel_of_ours_is_an_exit_code(monkeypatch, tmp_path):
    good = OPS["rms_norm"].providers[OURS].call
    for factor, code in ((1.0, 0), (1.05, 1)):
        # right for the reference in fp32, scaled in bf16
        ours = Provider(lambda x, w, f=factor: good(x, w) * (f if x.dtype == peers.DTYPE else 1))
        results = rehearse(only("rms_norm", "eager", **{OURS: ours}), tmp_path)
        monkeypatch.setattr(bench, "benchmark", lambda *_, results=results: results)
        assert bench.main(["--out", str(tmp_path)]) == code


def test_time_is_kept(monkeypatch, tmp_path):
    """Each measurement takes ten seconds here; two are the ceilings'."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])

    def timer(function):
        now[0] += 10
        return clock(function)

    ops = only("rms_norm", OURS, "eager") | only("swiglu", OURS, "eager")
    results = rehearse(ops, tmp_path, timer, minutes=1)
    assert len(results["rows"]) == 4 and results["not_begun"] == 20
    assert results["stopped"] == "after 1 minutes"
    assert "stopped after 1 minutes: 20 rows not begun" in report.table(results)
    assert json.loads((tmp_path / "kernels.json").read_text())["not_begun"] == 20


def test_every_row_is_on_disk_before_the_next(tmp_path):
    """So a run that is killed, or stopped by hand, still tells."""
    seen = []

    def timer(function):
        if (tmp_path / "kernels.json").exists():
            seen.append(len(json.loads((tmp_path / "kernels.json").read_text())["rows"]))
            assert len((tmp_path / "kernels.csv").read_text().splitlines()) == 1 + 2 * seen[-1]
        if len(seen) == 4:
            raise KeyboardInterrupt
        return clock(function)

    results = rehearse(only("rms_norm", OURS, "eager"), tmp_path, timer)
    assert seen == [1, 2, 3, 4]
    assert results["stopped"] == "by hand" and results["not_begun"] == 8


def test_ratio_is_to_the_fastest_peer():
    def row(provider, ms, mb, failure=None):
        return dict(
            op="rope",
            mode="forward",
            tokens=4096,
            provider=provider,
            ms=ms,
            peak_mb=mb,
            speed=3000.0,
            unit="GB/s",
            of_ceiling=0.75,
            failure=failure,
        )

    rows = [row(OURS, 0.5, 80.0), row("eager", 2.0, 320.0), row("compile", 0.6, 90.0)]
    rows.append(row("liger", None, None, "OutOfMemoryError: 2 GB"))
    about = dict.fromkeys(("gpu", "torch", "triton", "liger-kernel", "date", "stopped"))
    shown = report.table(about | {"ceilings": {"GB/s": 4000.0}, "rows": rows})
    line = next(line for line in shown.splitlines() if "4,096" in line)
    assert line.split() == ("4,096 0.5 2 0.6 failed 3,000 75% 1.20x compile, 80 MB to 90".split())
    assert "liger: OutOfMemoryError: 2 GB" in shown


def stand_in(module, function):
    """What Liger's kernels compute, in their layouts: rope turns its inputs in place."""

    def rope(q, k, cos, sin):
        assert q.shape[1] == TOY.heads and q.transpose(1, 2).is_contiguous()
        assert cos.shape == sin.shape == (1, q.shape[2], TOY.head_dim)
        q, k = q.clone(), k.clone()
        return peers.eager_rope(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    def silu_mul(gate, up):
        assert gate.is_contiguous() and up.is_contiguous()
        return F.silu(gate) * up

    return {
        "LigerRMSNormFunction": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
        "LigerFusedAddRMSNormFunction": lambda x, r, w, eps: peers.eager_add_rms_norm(x, r, w),
        "LigerSiLUMulFunction": silu_mul,
        "LigerRopeFunction": rope,
        "LigerFusedLinearCrossEntropyFunction": lambda h, w, t: (
            F.cross_entropy((h @ w.T).float(), t),
            None,
        ),
    }[function]


def test_layouts_of_the_peers(monkeypatch, tmp_path):
    """Each is given its tensors as it wants them, and the answer comes back as ours is."""
    monkeypatch.setattr(peers, "liger", stand_in)
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(flash):  # torch has it for CPUs too
        ops = only("attention", "sdpa_flash", OURS)
        ops |= {name: only(name, OURS, "liger")[name] for name in OPS if "liger" in peers_of(name)}
        results = rehearse(ops, tmp_path)
    assert {row["provider"] for row in results["rows"]} == {OURS, "liger", "sdpa_flash"}
    assert [row["failure"] for row in results["rows"] if row["failure"]] == []


def peers_of(name):
    return OPS[name].providers


@pytest.mark.slow
def test_a_timed_backward_repeats(tmp_path):
    """torch.compile's, too, which by default gives its saved tensors away the first time."""
    results = rehearse(
        only("rms_norm", "compile", OURS), tmp_path, suite=replace(TOY, tokens=(32,))
    )
    assert [row["failure"] for row in results["rows"]] == [None] * 6


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no CUDA GPU here: .* `python -m bench.static` shows"):
        bench.main([])


def test_unknown_names_are_answered_with_the_list():
    with pytest.raises(ConfigError, match=f"no op 'softmax'; there are {', '.join(OPS)}$"):
        bench.main(["rope", "softmax"])
    with pytest.raises(ConfigError, match="invalid choice: 'huge'"):
        bench.main(["--suite", "huge"])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu(tmp_path):
    assert bench.main(["rope", "--suite", "quick", "--out", str(tmp_path), "--minutes", "1"]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["provider"] for row in rows} >= {OURS, "eager", "compile"}
    assert all(row["failure"] is None and row["peak_mb"] >= 0 for row in rows)
    assert all(0 < row["of_ceiling"] < 1.2 for row in rows)
