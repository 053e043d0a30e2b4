"""How a call is timed, with stand-ins for the parts of a GPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import measure
from bench.baselines import Implementation


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
    function = measure.timed(Implementation(Square.apply, enter), (x,), mode)
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
        # A replay takes 0.25 ms to begin; the first one, much longer: the median leaves it out.
        begin = iter([100.0] + [0.25] * (measure.REPLAYS - 1))
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
    monkeypatch.setattr(measure, "time_of", lambda function, device: 0.5)
    row = measure.times_of(lambda: device.run("call", 0.125), "cuda")
    assert device.graphs == [["flush", "call"] * 4, ["flush"] * 4]  # 2 ms of calls
    assert row["ms"] == row["graph_ms"] == 0.125 and row["events_ms"] == 0.5
    assert row["timed_by"] == "graph" and row["not_captured"] is None and row["host_us"] > 0
    assert measure.graph_time(lambda: device.run("call", 64.0), 1) == 64.0
    monkeypatch.setattr(measure, "time_of", lambda function, device: 50.0)
    device.graphs.clear()
    measure.times_of(lambda: device.run("call", 50.0), "cuda")
    assert device.graphs == [["flush", "call"], ["flush"]]


@pytest.mark.parametrize("when", ["waits for the device", "only in a capture"])
def test_what_cannot_be_captured_is_timed_by_events(when, monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(measure, "time_of", lambda function, device: 0.5)

    def call():
        waits = when == "waits for the device" and device.sync_mode == "error"
        if waits or device.capturing is not None:
            synchronized.append(device.synchronized)
            raise RuntimeError(f"not permitted: {when}")

    synchronized = []
    row = measure.times_of(call, "cuda")
    assert row["timed_by"] == "events" and row["ms"] == row["events_ms"] == 0.5
    assert row["graph_ms"] is None and row["not_captured"] == f"RuntimeError: not permitted: {when}"
    assert synchronized == [device.synchronized - 1] and device.sync_mode == "default"
    assert device.graphs == ([["flush"]] if when == "only in a capture" else [])


def test_the_host_is_timed_by_a_few_calls_that_nothing_waits_for(monkeypatch):
    device, calls = Device(monkeypatch), []
    assert 0 < measure.host_time(lambda: calls.append(device.synchronized), ms=4.0) < 1e4
    assert calls == [repeat for repeat in range(1, 11) for _ in range(5)]
