"""Which implementation runs, and on what kind of GPU.

Every operation has its definition in plain torch and its Triton kernels. `use` chooses between
them; "auto", the default, takes Triton for CUDA tensors if the GPU can run it. Block sizes are
constants in the table LAUNCH of each operation's file, by class of GPU and kernel. They are never
tuned at run time: ranks could choose differently, and two runs would differ.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    installed = True
except ImportError:  # macOS, Windows: @triton.jit then returns this placeholder, which never runs

    class _Absent:
        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: object, **options: object) -> "_Absent":
            return self

    triton = tl = TensorDescriptor = _Absent()
    installed = False

MODES = ("auto", "triton", "torch")
_mode = "auto"

# Class of GPU: ten times the least compute capability, and the least shared memory of a block in
# bytes. The first class that fits is taken.
CLASSES = {
    "sm_100": (100, 232_448),  # B200
    "sm_90": (90, 232_448),  # H100, H200
    "sm_80": (80, 166_912),  # A100
    "default": (80, 101_376),  # RTX 3090 to 5090, L4, L40S
}


@dataclass(frozen=True)
class GPU:
    """What a kernel's launch options depend on."""

    kind: str  # a key of CLASSES
    multiprocessors: int
    tma: bool  # has a tensor memory accelerator, which loads what a tensor descriptor describes


def use(mode: str) -> str:
    """Choose for all operations: "auto", "triton" or "torch" (the definitions).

    Returns the previous choice. Raises ValueError for another word, or if "triton" cannot run.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"kernels are {', '.join(MODES)}, not {mode!r}")
    if mode == "triton":
        try:
            gpu()
        except RuntimeError as error:
            raise ValueError(f"kernels={mode}: {error}") from None
    before, _mode = _mode, mode
    return before


def gpu() -> GPU:
    """The current GPU. Raises RuntimeError with a one-line reason if it cannot run the kernels."""
    if not installed:
        raise RuntimeError("the Triton kernels need the triton package, which is for Linux")
    try:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
    except RuntimeError:  # no driver is active
        raise RuntimeError("the Triton kernels need a CUDA GPU, and there is none here") from None
    return _classify(driver, device)


@lru_cache
def _classify(driver: object, device: int) -> GPU:
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(device)
    shared = properties["max_shared_mem"]
    if target.backend == "cuda":
        for kind, (capability, least) in CLASSES.items():
            if target.arch >= capability and shared >= least:
                return GPU(kind, properties["multiprocessor_count"], target.arch >= 90)
    raise RuntimeError(
        f"the Triton kernels need an NVIDIA GPU of compute capability 8.0 and 99 KB of shared "
        f"memory; this is {target.backend} {target.arch} with {shared // 1024} KB"
    )


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on x uses its Triton kernels."""
    if _mode == "auto":
        return x.is_cuda and _card_can()
    return _mode == "triton"


@torch.compiler.assume_constant_result
def _card_can() -> bool:
    try:
        gpu()
    except RuntimeError as error:
        say_once(f"{error}: torch's own operations are used")
        return False
    return True


def forced() -> bool:
    """Whether use("triton") is in force, so that kernels run even where they are slow."""
    return _mode == "triton"


def not_offered(why: str) -> None:
    """Say once that there is no kernel for these inputs; raise ValueError if Triton is forced."""
    if forced():
        raise ValueError(why)
    _say(why + ": torch's own operation is used")


@torch.compiler.assume_constant_result
def _say(line: str) -> None:
    say_once(line)


@lru_cache
def say_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {line}", file=sys.stderr)


def launch_rows(launch: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The rows of a table LAUNCH for the class of the current GPU: {kernel: row}."""
    return launch.get(gpu().kind, launch["default"])


_library = torch.library.Library("nanolucie", "DEF")


def operator(name: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function that launches kernels as an operator, torch.ops.nanolucie.NAME.

    fake(*args): empty outputs of the right shapes. torch.compile then keeps the function whole
    instead of tracing into Triton, and selective checkpointing can name it. torch.library.custom_op
    does the same with checks on every call that take longer than a small kernel runs. Gradients
    come from an autograd.Function around the operator.
    """

    def register(function: Callable) -> Callable:
        def guarded(*args: object) -> object:
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device_of(args[0]):
                return function(*args)

        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, guarded, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nanolucie::{name}", fake, lib=_library)
        return getattr(torch.ops.nanolucie, name).default

    return register


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes 30 times as long, which a small kernel would notice."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two from n on, n >= 1."""
    return 1 << (n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x as `[rows, columns]` with contiguous columns, copied only if necessary."""
    if x.ndim == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
