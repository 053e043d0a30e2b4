"""Speed and memory of the kernels against their peers, in one run on one GPU.

    python -m bench.kernels [op ...] [--suite lucie|quick] [--out DIR] [--minutes 7]
    python -m bench.kernels --replot DIR/kernels.json

Peers are eager torch, torch.compile, Liger where it is installed, and for attention torch's flash
and cuDNN backends and FlexAttention; everything in bf16 at Lucie's shapes. At the smallest number
of tokens each implementation is first compared with the definition in fp32, outputs and gradients;
one that is wrong is not timed. Times are medians by device events, the L2 cache flushed before each
run. Memory is the peak above what was allocated before the call.

Writes kernels.csv (Liger's columns), kernels.json, and a PNG for each operation, all into DIR.
Exit code 1 where one of ours failed or was wrong.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench import report
from bench.peers import DTYPE, OPS, OURS, Op, Provider, Suite
from bench.report import BenchError
from config.cli import ConfigError, Parser, run_cli
from kernels.launch import use

SUITES = {
    "lucie": Suite(tokens=(4096, 8192, 16384, 32000)),
    "quick": Suite(tokens=(4096, 16384)),
}
QUANTILES = (0.5, 0.2, 0.8)
TOLERANCE = 2e-2  # relative, in the Frobenius norm: bf16 kernels are near 4e-3

Timer = Callable[[Callable[[], object]], list[float]]  # a function's QUANTILES in milliseconds


def gpu_timer(function: Callable[[], object]) -> list[float]:
    import triton.testing

    return triton.testing.do_bench(function, warmup=25, rep=150, quantiles=QUANTILES)


def run(
    ops: dict[str, Op],
    suite: Suite,
    out: Path,
    timer: Timer = gpu_timer,
    device: str = "cuda",
    kernels: str = "triton",
    minutes: float = 7.0,
) -> dict:
    """Measure and return the results, which `out` holds as far as they are known after every row.

    kernels: what ours runs on (`kernels.use`). After `minutes`, or Ctrl-C, nothing more is begun.
    """
    deadline = time.monotonic() + 60 * minutes
    sizes = dict.fromkeys([*suite.tokens, *(t for op in ops.values() for t in op.tokens)])
    plan = [
        (name, tokens, mode, provider)
        for tokens in sizes
        for name, op in ops.items()
        if tokens in (op.tokens or suite.tokens)
        for mode in op.floor(suite, tokens)
        for provider in op.providers  # in turns: a GPU that grows warm favours nobody
    ]
    checks: dict[str, dict[str, dict]] = {}
    results = machine(device) | {"suite": asdict(suite), "stopped": None, "rows": []}
    try:
        results["ceilings"] = ceilings(suite, device, timer)
        for name, tokens, mode, provider in (bar := tqdm(plan, unit="row")):
            bar.set_description(f"{name} {mode} {tokens:,} {provider}", refresh=False)
            if time.monotonic() >= deadline:
                results["stopped"] = f"after {minutes:g} minutes"
                break
            op = ops[name]
            if name not in checks:
                checks[name] = compare(op, suite, device, kernels)
                tqdm.write(report.checks(name, checks[name]))
            row = {"op": name, "tokens": tokens, "mode": mode, "provider": provider}
            row |= dict.fromkeys(("ms", "ms_20", "ms_80", "speed", "unit", "of_ceiling", "peak_mb"))
            row |= checks[name][provider]
            if row["failure"] is None:
                inputs = op.inputs(suite, tokens, device)
                row |= measure(op.providers[provider], inputs, mode, timer)
            if row["failure"] is None:
                work = op.floor(suite, tokens)[mode] / (1e9 if op.unit == "TFLOP/s" else 1e6)
                row |= {"speed": work / row["ms"], "unit": op.unit}
                row["of_ceiling"] = row["speed"] / results["ceilings"][op.unit]
            results["rows"].append(row)
            results["not_begun"] = len(plan) - len(results["rows"])
            report.write(results, out)
            if row["failure"] and device == "cuda" and (lost := gpu_lost()):
                results["stopped"] = f"with the GPU: {lost}"  # the peers' rows would be no verdict
                break
    except KeyboardInterrupt:
        results["stopped"] = "by hand"
    finally:
        use("auto")
    results["not_begun"] = len(plan) - len(results["rows"])
    report.write(results, out)
    return results


def measure(provider: Provider, inputs: tuple[Tensor, ...], mode: str, timer: Timer) -> dict:
    """Times and peak memory, or the failure: a peer that cannot is a result too."""
    try:
        function = timed(provider, inputs, mode)
        ms, low, high = timer(function)
        peak = peak_memory(function) if inputs[0].is_cuda else None
    except Exception as error:
        return {"failure": describe(error)}
    return {"ms": ms, "ms_20": low, "ms_80": high, "peak_mb": peak}


def timed(provider: Provider, inputs: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """The function that is timed. Layouts and upstream gradients are made beforehand."""
    graph = mode != "no-grad-forward"
    leaves = [x.detach().requires_grad_(x.requires_grad and graph) for x in provider.enter(*inputs)]
    if mode in ("forward", "no-grad-forward"):
        return lambda: provider.call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    outputs = as_tuple(provider.call(*leaves))
    upstream = draw_upstream(outputs)
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(as_tuple(provider.call(*leaves)), wanted, upstream)


def peak_memory(function: Callable[[], object]) -> float:
    """MB (2^20 bytes, as Liger counts) that a call needs at its peak above what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(op: Op, suite: Suite, device: str, kernels: str) -> dict[str, dict]:
    """For each provider its relative error against the definition in fp32, and why it is refused.

    The error is the largest over outputs and gradients, at the smallest number of tokens.
    """

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = op.inputs(suite, min(op.tokens or suite.tokens), device)
        return tuple(
            x.detach().to(dtype).requires_grad_(x.requires_grad) if x.dtype == DTYPE else x
            for x in made
        )

    def check(provider: Provider) -> dict:
        try:
            pairs = zip(evaluate(provider, inputs(DTYPE)), exact)
            error = float(torch.tensor([relative_error(*pair) for pair in pairs]).max())
        except Exception as failure:
            return {"relative_error": None, "failure": describe(failure)}
        if error <= TOLERANCE:
            return {"relative_error": error, "failure": None}
        return {
            "relative_error": error if math.isfinite(error) else None,
            "failure": f"wrong, relative error {error:.1e}",
        }

    use("torch")
    try:
        exact = evaluate(op.providers[OURS], inputs(torch.float32))
    except Exception as failure:
        refused = {"relative_error": None, "failure": f"no reference: {describe(failure)}"}
        return dict.fromkeys(op.providers, refused)
    finally:
        use(kernels)
    return {name: check(provider) for name, provider in op.providers.items()}


def evaluate(provider: Provider, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs in our layout, then the gradients of the inputs that want one."""
    outputs = provider.leave(*as_tuple(provider.call(*provider.enter(*inputs))))
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, draw_upstream(outputs)) if wanted else ()
    return [x.detach() for x in (*outputs, *gradients)]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


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


def ceilings(suite: Suite, device: str, timer: Timer) -> dict[str, float]:
    """What this GPU reaches today: GB/s of a copy (read and written), TFLOP/s of a product."""
    source = torch.zeros(suite.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))[0]
    side = suite.product
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in "ab")
    product = timer(lambda: a @ b)[0]
    return {"GB/s": 2 * suite.copied / copy / 1e6, "TFLOP/s": 2 * side**3 / product / 1e9}


def machine(device: str) -> dict:
    """What the figures depend on."""
    gpu = {"gpu": "none"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    packages = ("torch", "triton", "liger-kernel")
    return gpu | {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[0]


def gpu_lost() -> str | None:
    """Why nothing can run any more after an illegal access; None after an ordinary failure."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return describe(error)
    return None


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def benchmark(names: list[str], suite: str, out: Path, minutes: float) -> dict:
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ConfigError(f"no op {unknown[0]!r}; there are {', '.join(OPS)}")
    if not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA GPU here: nothing to time; "
            "`python -m bench.static` shows what can be known without one"
        )
    out.mkdir(parents=True, exist_ok=True)
    try:
        use("triton")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    ops = {name: op for name, op in OPS.items() if not names or name in names}
    if importlib.util.find_spec("liger_kernel") is None:
        print("Liger is not here to be compared with: pip install liger-kernel")
        for name, op in ops.items():
            providers = {p: provider for p, provider in op.providers.items() if p != "liger"}
            ops[name] = replace(op, providers=providers)
    return run(ops, SUITES[suite], out, minutes=minutes)


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="bench.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all if none")
    parser.add_argument("--suite", choices=SUITES, default="lucie", help="quick: two token counts")
    parser.add_argument("--out", type=Path, help="folder of the results, default out/bench")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin nothing more after these")
    parser.add_argument("--replot", type=Path, metavar="JSON", help="draw saved results again")
    args = parser.parse_args(argv)
    if args.replot:
        out = args.out or args.replot.parent
        results = report.read(args.replot)
    else:
        out = args.out or Path("out/bench")
        results = benchmark(args.ops, args.suite, out, args.minutes)
    print(report.table(results))
    try:
        print(*report.plot(results, out), sep="\n")
    except ImportError:
        print(f"plots need: pip install matplotlib; then --replot {out}/kernels.json")
    return int(any(row["provider"] == OURS and row["failure"] for row in results["rows"]))


if __name__ == "__main__":
    run_cli(main, BenchError)
