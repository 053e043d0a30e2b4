"""What the tests of all kernels share: layouts, when a result is good enough, mutants, graphs."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch._dynamo.testing
from conftest import relative_error
from torch import Tensor

import kernels.launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "row slice": lambda x: _inside(x, 2 * len(x), *x.shape[1:])[::2],
    "column slice": lambda x: _inside(x, *x.shape[:-1], x.shape[-1] + 5)[..., 3:-2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded scalar": lambda x: x.flatten()[0].expand(x.shape),  # what sum().backward() sends
    "storage offset": lambda x: _inside(x, x.numel() + 1)[1:].view(x.shape),
}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")


def gpu(test: Callable) -> Callable:
    """Mark a test of tensors past 2^31 elements, which needs a CUDA device of 80 GB."""
    large = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > 75e9
    reason = "needs a CUDA device of 80 GB"
    return pytest.mark.gpu(pytest.mark.skipif(not large, reason=reason)(test))


def _inside(x: Tensor, *shape: int) -> Tensor:
    return x.new_full(shape, torch.nan)  # to be cut: what the view leaves out is poison


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another layout, with the values of x unless it is expanded."""
    view = LAYOUTS[layout](x)
    if "expanded" not in layout:
        view.copy_(x)
    return view


every_layout = pytest.mark.parametrize("shift", range(len(LAYOUTS)))


def all_laid_out(tensors: list[Tensor], shift: int) -> list[Tensor]:
    """Each in another layout; over all shifts, each in every one."""
    names = list(LAYOUTS)
    return [laid_out(x, names[(i + shift) % len(names)]) for i, x in enumerate(tensors)]


def assert_as_good(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Our error against fp64 is at most twice that of plain torch in the same dtype."""
    assert ours.dtype == eager.dtype and ours.shape == exact.shape
    # Of few elements plain torch may happen to hit all; the more there are, the less it can. How
    # well it does in fp32 differs between processors too: a few of its epsilons are rounding.
    floor = torch.finfo(eager.dtype).eps / max(exact.numel(), 1) ** 0.5
    floor += 8 * torch.finfo(torch.float32).eps
    assert relative_error(ours, exact) <= 2 * relative_error(eager, exact) + floor


def gradients(function: Callable, inputs: list[Tensor], *dys: Tensor) -> list[Tensor]:
    """What function(*inputs) returns, then the gradients of the inputs that are not integers."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, dys if dys else None)
    return [y.detach() for y in outputs] + [x.grad for x in inputs if x.requires_grad]


def check(ours: Callable, eager: Callable, inputs: list[Tensor], *dys: Tensor) -> None:
    """Outputs and gradients of ours against eager, once in its own dtype and once in fp64."""
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = gradients(eager, doubled, *(dy.double() for dy in dys))
    for triple in zip(gradients(ours, inputs, *dys), gradients(eager, inputs, *dys), exact):
        assert_as_good(*triple)


def far_apart(rows: Tensor) -> Tensor:
    """Three rows 2^30 elements from each other: the third is past int32. Memory is hardly touched.

    The layout of a huge tensor without its bytes; bf16, 4 GB of addresses.
    """
    huge = torch.empty(2**31 + rows[0].numel(), dtype=torch.bfloat16)
    view = huge.as_strided(rows.shape, (2**30, *rows.stride()[1:]))
    view.copy_(rows)
    return view


def mutant(folder: Path, name: str, old: str, new: str) -> ModuleType:
    """kernels/NAME.py with old replaced by new as a module of its own."""
    source = Path(kernels.launch.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    assert old in source
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new).replace("nanolucie::", "mutant::"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count_graphs(function: Callable, calls: list[list[Tensor]]) -> int:
    """How often torch.compile traces function over these calls, forward and backward."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for inputs in calls:
        compiled_results = gradients(compiled, inputs)
        for ours, expected in zip(compiled_results, gradients(function, inputs)):
            assert torch.equal(ours, expected)
    return counter.frame_count


def compiled_variants(code: str, folder: Path) -> Counter[str]:
    """How often each kernel is compiled by this code on an imagined H100, in a fresh process.

    The interpreter never compiles, and one process is either interpreted or compiled.
    """
    script = f"""
import torch, kernels, kernels.launch
from gpuless.compiler import fake_gpu
with fake_gpu(90):
    kernels.launch.use("triton")
    {textwrap.indent(textwrap.dedent(code).strip(), "    ").strip()}
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    root = Path(kernels.launch.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return Counter(cubin.stem for cubin in folder.rglob("*.cubin"))
