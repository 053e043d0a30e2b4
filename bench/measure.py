"""How the benchmarks check an implementation, time a call, and name the machine.

A call is timed in two ways, and both are kept: `events_ms`, by device events around each call, and
`graph_ms`, by replays of a CUDA graph. Events also count what the device waits for the host, which
for a kernel of some microseconds can be most of the time; a graph holds the launches, so its
replay does not. A training step keeps the device busy, so `ms` is graph_ms wherever the call can be
captured, and `timed_by` says which one it is. In both the L2 cache is flushed before each
call: a kernel's inputs never lie there in a model, since other layers ran in between. `host_us` is
the time after which a call returns, while the device still works.
"""

import importlib.metadata
import json
import math
import platform
import statistics
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.baselines import DTYPE, OURS, Draw, Implementation, Op
from config.cli import write_file
from kernels.launch import use
from model import LucieConfig

TOLERANCE = 2e-2  # relative, in the Frobenius norm: bf16 kernels are near 4e-3
REPLAYS = 10  # of each CUDA graph
TIMES = ("ms", "timed_by", "graph_ms", "events_ms", "host_us", "not_captured")


# --- the machine ----------------------------------------------------------------------------------


def time_of(function: Callable[[], object], device: str) -> float:
    """The median time of the function in milliseconds, on a GPU by events around each call."""
    if device == "cuda":
        import triton.testing

        return triton.testing.do_bench(function, warmup=25, rep=150, return_mode="median")
    function()
    return 1e3 * statistics.median(timeit.repeat(function, number=1, repeat=5))


def copy_speed(device: str) -> float:
    """GB/s of a large copy, read and written."""
    size = 2**31 if device == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_of(lambda: target.copy_(source), device) / 1e6


def product_speed(device: str) -> float:
    """TFLOP/s of a large product in bf16."""
    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in "ab")
    return 2 * side**3 / time_of(lambda: a @ b, device) / 1e9


def machine(device: str) -> dict:
    """What the figures depend on."""
    found = {"gpu": torch.cuda.get_device_name() if device == "cuda" else "none"}
    for package in ("torch", "triton", "transformers", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found |= {"cuda": torch.version.cuda, "python": platform.python_version()}
    return found | {"system": platform.platform(), "date": time.strftime("%Y-%m-%d %H:%M:%S")}


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def heading(results: dict) -> str:
    """The first line of a table: what `machine` found."""
    names = ("torch", "triton", "transformers", "liger-kernel", "date")
    return f"GPU {results['gpu']}, " + ", ".join(f"{name} {results[name]}" for name in names)


def write_json(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(results, indent=1) + "\n").encode())


# --- is an implementation right? ------------------------------------------------------------------


def compare(op: Op, sizes: LucieConfig, tokens: int, device: str) -> dict[str, dict]:
    """For each implementation `relative_error`, the largest over outputs and gradients against the
    definition in fp32, and `failure`: why it is not timed, or None."""

    def inputs(dtype: torch.dtype) -> list[Tensor]:
        made = op.inputs(Draw(device), sizes, tokens)
        cast = [x.detach().to(dtype) if x.dtype == DTYPE else x for x in made]
        return [x.requires_grad_(y.requires_grad) for x, y in zip(cast, made)]

    def check(implementation: Implementation) -> dict:
        try:
            found = evaluate(implementation, inputs(DTYPE))
            errors = [(a.float() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
            error = float(torch.stack(errors).max())
        except Exception as failure:  # a baseline that cannot run is a result too
            return {"relative_error": None, "failure": describe(failure)}
        wrong = None if error <= TOLERANCE else f"wrong, relative error {error:.1e}"
        return {"relative_error": error if math.isfinite(error) else None, "failure": wrong}

    before = use("torch")
    try:
        exact = evaluate(op.implementations[OURS], inputs(torch.float32))
    finally:
        use(before)
    return {name: check(implementation) for name, implementation in op.implementations.items()}


def evaluate(implementation: Implementation, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs in our layout, then the gradients of the inputs that want one."""
    outputs = as_tuple(implementation.call(*implementation.enter(*inputs)))
    outputs = implementation.leave(*outputs)
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, draw_upstream(outputs)) if wanted else ()
    return [x.detach() for x in (*outputs, *gradients)]


def draw_upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A gradient for each output, 1 for a loss: the same numbers whatever its dtype and strides."""
    torch.manual_seed(1)
    return [
        torch.ones_like(x)
        if x.ndim == 0
        else torch.empty_like(x).copy_(torch.randn(x.shape, dtype=DTYPE, device=x.device))
        for x in outputs
    ]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# --- how long does it take? -----------------------------------------------------------------------


def timed(implementation: Implementation, inputs: tuple, mode: str) -> Callable[[], object]:
    """The function that is timed. Layouts and upstream gradients are made beforehand."""
    graph = mode != "no-grad-forward"
    leaves = implementation.enter(*inputs)
    leaves = [x.detach().requires_grad_(x.requires_grad and graph) for x in leaves]
    if mode in ("forward", "no-grad-forward"):
        return lambda: implementation.call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    outputs = as_tuple(implementation.call(*leaves))
    upstream = draw_upstream(outputs)
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(as_tuple(implementation.call(*leaves)), wanted, upstream)


def graph_time(function: Callable[[], object], calls: int) -> float:
    """Milliseconds of a call, by replays of a CUDA graph of so many calls, each after a flush of
    the L2 cache, less the replays of a graph of the flushes alone.

    Flushing writes twice the size of the cache. What it leaves to be written back is a cost of the
    next flush or call, so it is in both graphs. Call it after a first call of the function, on the
    stream where the function's tensors were made, which must not be the default one. Raises
    RuntimeError where the function cannot be captured.
    """
    torch.cuda.set_sync_debug_mode("error")  # waiting for the device would break off a capture
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    flushed = torch.empty(size // 4, dtype=torch.int32, device="cuda")

    def capture(*parts: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # A backward pass runs on the stream of its forward: the capture must be on that one.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                for part in parts:
                    part()
        return graph

    def replay(graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    graphs = capture(flushed.zero_, function), capture(flushed.zero_)
    pairs = [[replay(graph) for graph in graphs] for _ in range(REPLAYS)]
    both, flushes = map(statistics.median, zip(*pairs))
    return (both - flushes) / calls


def host_time(function: Callable[[], object], ms: float) -> float:
    """Microseconds of the host for one of five calls in a row, the least of some repeats.

    Five are few enough for the device's queue of launches, which would make the host wait.
    """
    times = []
    for _ in range(max(2, min(20, int(40 / ms)))):
        torch.cuda.synchronize()
        times.append(timeit.timeit(function, number=5) / 5)
    torch.cuda.synchronize()
    return 1e6 * min(times)


def times_of(function: Callable[[], object], device: str) -> dict[str, float | str | None]:
    """The times of a row, as the docstring of this file explains them."""
    row = dict.fromkeys(TIMES) | {"ms": time_of(function, device)}
    if device != "cuda":
        return row
    row |= {"timed_by": "events", "events_ms": row["ms"]}
    row["host_us"] = host_time(function, row["ms"])
    try:
        calls = max(1, min(20, int(2 / row["ms"])))
        row["ms"] = row["graph_ms"] = graph_time(function, calls)
        row["timed_by"] = "graph"
    except Exception as error:
        row["not_captured"] = describe(error)
        torch.cuda.synchronize()
    return row


def measure(implementation: Implementation, inputs: tuple, mode: str, device: str) -> dict:
    """Times, and on a GPU MB (2^20 bytes, as Liger counts) at the peak of a call."""
    function = timed(implementation, inputs, mode)
    row = times_of(function, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row
