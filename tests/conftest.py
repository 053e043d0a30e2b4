"""What several test files share: where the published facts lie, tiny models and tiny data, a chip.

On a machine with a CUDA device the kernels are tested on it. On any other Triton's interpreter runs
them, repaired by gpuless/interpreter.py, which has to be asked for before triton is imported.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Tiny tensors gain nothing from a second thread, which waits busily where cores are shared. To be
# set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import kernels.launch
from data.prepare import StreamWriter, write_mixture
from model import LucieConfig

if kernels.launch.installed and not CUDA:
    from gpuless import interpreter

    interpreter.install()

SHARED = Path(__file__).parents[2] / "shared"  # published logs and real text, where at hand
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared reference data")

TINY = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.05,
)


@pytest.fixture
def tiny_config() -> LucieConfig:
    return LucieConfig(**TINY, max_position_embeddings=64)


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A folder with two streams of random ids under 97 and their mixture."""
    rng = np.random.default_rng(0)
    for name, documents in (("a", 30), ("b", 50)):
        with StreamWriter(tmp_path / name, 97) as stream:
            for _ in range(documents):
                stream.add(rng.integers(0, 97, rng.integers(5, 60)))
    write_mixture(tmp_path / "mixture.csv", {"a": 0.7, "b": 0.3})
    return tmp_path


@pytest.fixture
def chip(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where kernels run, and Triton in force for every operation: for tensors of the test.

    The CUDA device, or the interpreter imagining an H100; another chip, 80 or 86, is asked for by
    parametrize(..., indirect=True).
    """
    if not kernels.launch.installed:
        pytest.skip("needs triton")
    if CUDA:
        if getattr(request, "param", 90) != 90:
            pytest.skip("the chip that is here is tested once")
        kernels.use("triton")
        yield torch.device("cuda")
    else:
        from gpuless.compiler import fake_gpu

        with fake_gpu(getattr(request, "param", 90)):
            kernels.use("triton")
            yield torch.device("cpu")
    kernels.use("auto")


def launch(script: object, *args: object, ranks: int = 0, timeout: float = 200):
    """A Python script as a process of its own, or as so many under torchrun."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *(torchrun if ranks else []), script, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=env, timeout=timeout
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m gpu` runs all that can run on the chip, what was written for it alone first."""
    items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
    for item in items:
        if CUDA and {"chip", "device"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("gpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line says how many tests were skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"{len(skipped)} skipped: {why}")


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the fp64 oracle."""
    return float(
        (ours.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30)
    )


settings.register_profile("project", deadline=None, derandomize=True)  # timing is not a test here
settings.load_profile("project")
