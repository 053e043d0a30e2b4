"""What several test files share: where the published facts lie, tiny models and tiny data, a chip.

On a machine with a CUDA device the kernels are tested on it. On any other Triton's interpreter runs
them, repaired by gpuless/interpreter.py, which has to be asked for before triton is imported.

A test that compares bit for bit computes both sides here: that holds for one machine, one build of
torch and one number of threads. Any other tolerance is above rounding, on every processor.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

# Tiny tensors gain nothing from a second thread, which waits busily where cores are shared. To be
# set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile's cache does not tell apart the processors that torch imitates: it would run code of
# one on another, which can crash.
if isa := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{isa}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

import numpy as np
import pytest
import torch
from hypothesis import settings
from tqdm import tqdm

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import kernels.launch
from data import streams
from data.dataset import token_dtype
from data.streams import write_index, write_mixture
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


def write_stream(path: Path, documents: Iterable[Sequence[int]], vocab_size: int) -> None:
    """A token stream, path.bin and path.idx."""
    dtype, arrays = token_dtype(vocab_size), list(map(np.asarray, documents))
    Path(f"{path}.bin").write_bytes(b"".join(a.astype(dtype).tobytes() for a in arrays))
    write_index(f"{path}.idx", np.array(list(map(len, arrays)), np.int32), dtype)


def write_weights(path: Path, weights: dict[str, float]) -> None:
    """A mixture of streams that lie beside it."""
    write_mixture(path, [{"name": n, "path": n, "weight": w} for n, w in weights.items()])


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A folder with two streams of random ids under 97 and their mixture."""
    rng = np.random.default_rng(0)
    for name, documents in (("a", 30), ("b", 50)):
        made = [rng.integers(0, 97, rng.integers(5, 60)) for _ in range(documents)]
        write_stream(tmp_path / name, made, 97)
    write_weights(tmp_path / "mixture.csv", {"a": 0.7, "b": 0.3})
    return tmp_path


@pytest.fixture
def store():
    """fsspec's store in memory, which tests fill below bucket/."""
    files = pytest.importorskip("fsspec").filesystem("memory")
    yield files
    files.store.clear()


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    names, whole = [], streams.records

    def listed(source, columns):
        names.append(str(source).rpartition("/")[2])
        return whole(source, columns)

    monkeypatch.setattr(streams, "records", listed)
    monkeypatch.setattr(streams, "SAVE_EVERY", 0)
    return names


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


# Processes are forked from a server that has imported everything and computed nothing.
SERVER = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    SERVER.set_forkserver_preload(["test_faults", "torch.utils.tensorboard"])


def fork(function: Callable, *args: object) -> multiprocessing.Process:
    """A process that runs function(*args), both of which can be pickled."""
    tests = Path(__file__).parent
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # as torchrun has it
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (tests.parent, tests)))
    process = SERVER.Process(target=function, args=args)
    with mock.patch.dict(os.environ, environment):  # of the one it is forked off, which starts now
        process.start()
    return process


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each rank; nothing for one process without ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [group | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)] or [{}]


def torchrun(ranks: int) -> list[str]:
    """The command that a script is added to."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return command + ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def launch(script: object, *args: object, ranks: int = 0, timeout: float = 200):
    """A Python script, or a module of ours, as a process of its own, or as several ranks."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    if CUDA:  # the server has no GPU, nor does what is forked from it
        python = torchrun(ranks) if ranks else [sys.executable]
        command = [*python, *([] if str(script).endswith(".py") else ["-m"]), script, *args]
        command = list(map(str, command))
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        command = list(map(str, (script, *args)))
        each = [env | one for one in environments(ranks)]
        processes = [fork(_run, command, environment, outputs) for environment in each]
        late = end_of(processes, timeout)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
        assert not late, f"{len(late)} of {len(processes)} do not end: {err}"
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        return subprocess.CompletedProcess(command, code, out, err)


def end_of(processes: list, seconds: float) -> list:
    """Wait for all of them; those that have not ended after so many seconds, which are killed."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    return late


def begin(environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """In a forked process: what it adds to the environment, and files for what it prints."""
    for number, path in enumerate((stdout, stderr), 1):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind


def _run(command: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """In a forked process: the command, with its environment, stdout and stderr in files."""
    os.environ.clear()
    begin(environment, *outputs)
    os.chdir(environment["PYTHONPATH"])
    warnings.filterwarnings("ignore", module="runpy")  # what has been imported already
    sys.argv = command
    run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    run(command[0], run_name="__main__")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m gpu` runs all that can run on the chip, what was written for it alone first."""
    items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
    # The longest test begins early; else it would run alone at the end.
    items.sort(key=lambda item: item.name != "test_the_demo_has_room_to_spare")
    for item in items:
        if CUDA and {"chip", "device"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("gpu")


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the fp64 oracle."""
    return float(
        (ours.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30)
    )


settings.register_profile("project", deadline=None, derandomize=True)  # timing is not a test here
settings.load_profile("project")
