"""Compile Triton kernels for a GPU that is not there.

    with fake_gpu(90) as launches:
        rms_norm(x, weight, 1e-5)  # CPU tensors; every kernel[grid](...) compiles, none runs
    print(launches[0].registers, launches[0].spills)

Triton reaches the hardware through one driver object. Ours answers for a chip from a table, so the
host code above it is the real one: the same specialisation on alignment and strides, the same
compiler options, the same error where a kernel needs more shared memory than a block may have. A
launch leaves a record of itself with the machine code. Outputs stay uninitialised.

In a process with TRITON_INTERPRET=1 kernels are never compiled: there the driver only tells which
chip to imagine, and the list stays empty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from gpuless import sass

REGISTERS = 65_536  # of 32 bits, per multiprocessor, on every chip below


@dataclass(frozen=True)
class Chip:
    """What limits a launch (CUDA C++ Programming Guide, table of technical specifications)."""

    name: str
    multiprocessors: int
    block_shared: int  # most shared memory of one block, bytes
    shared: int  # of a multiprocessor, bytes
    warps: int  # most that are resident on a multiprocessor
    blocks: int  # likewise


CHIPS = {  # by ten times the compute capability
    80: Chip("A100", 108, 166_912, 167_936, 64, 32),
    86: Chip("RTX 3090", 82, 101_376, 102_400, 48, 16),
    90: Chip("H100, H200", 132, 232_448, 233_472, 64, 32),
    100: Chip("B200", 148, 232_448, 233_472, 64, 32),
    120: Chip("RTX 5090", 170, 101_376, 102_400, 48, 24),
}


class KernelError(RuntimeError):
    """A kernel does not compile or cannot be launched; `__cause__` is Triton's exception."""


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`, as the chip would have received it."""

    name: str  # of the kernel function
    grid: tuple[int, int, int]
    capability: int
    num_warps: int  # as compiled: warp specialisation may add some
    registers: int  # per thread
    spills: int  # bytes of local memory per thread: registers that did not fit
    shared: int  # bytes of dynamic shared memory per block
    constants: dict[str, Any] = field(repr=False)  # arguments compiled in: constexpr, None, 1
    cubin: bytes = field(repr=False)

    @cached_property
    def sass(self) -> sass.Program:
        """The machine code, disassembled."""
        return sass.disassemble(self.cubin)


def occupancy(launch: Launch) -> int:
    """Blocks of this launch that one multiprocessor of its chip holds at a time.

    The least of what registers, shared memory, warps and block slots allow (cuda_occupancy.h of the
    CUDA toolkit). A warp gets registers 256 at a time from its quarter of the multiprocessor; a
    block gets shared memory by 128 bytes, after 1 KB for the system.
    """
    chip = CHIPS[launch.capability]
    warp_registers = -(-launch.registers * 32 // 256) * 256
    return min(
        4 * (REGISTERS // 4 // warp_registers) // launch.num_warps,
        chip.shared // (1024 + -(-launch.shared // 128) * 128),
        chip.warps // launch.num_warps,
        chip.blocks,
    )


@contextmanager
def fake_gpu(capability: int = 90) -> Iterator[list[Launch]]:
    """Make Triton see one GPU of this compute capability (times ten; a key of CHIPS).

    Yields the list to which each launch inside is added. A launch that does not compile or does not
    fit raises KernelError, whose message begins with the kernel's name. Triton keeps compiled code
    in TRITON_CACHE_DIR as always. At the end the driver that was active before is active again.
    """
    if capability not in CHIPS:
        raise ValueError(f"fake_gpu knows {', '.join(map(str, CHIPS))}, not {capability}")
    active, run = driver._active, JITFunction.run

    def named_run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        except Exception as error:
            where = f"{self.fn.__name__} on sm_{capability}"
            raise KernelError(f"{where}: {type(error).__name__}: {error}") from error

    fake = _Driver(capability)
    driver.set_active(fake)
    JITFunction.run = named_run
    try:
        yield fake.launches
    finally:
        JITFunction.run = run
        driver._active = active


class _Driver:
    """The part of Triton's driver protocol that compiling and launching use."""

    def __init__(self, capability: int):
        self.capability, self.launches = capability, []
        self.utils, self.launcher_cls = self, _Launcher

    # Triton keeps compiled kernels by device number: each chip has its own, and no real GPU has it.
    def get_current_device(self) -> int:
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        chip = CHIPS[self.capability]
        return {
            "max_shared_mem": chip.block_shared,
            "multiprocessor_count": chip.multiprocessors,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, most threads of a block)"""
        return object(), cubin, *sass.resources(cubin), 1024


class _Launcher:
    """Made once for each compiled kernel, called at each launch. It outlives the driver that it was
    made under, so it asks for the active one."""

    def __init__(self, src: Any, metadata: Any):
        names = src.fn.arg_names
        self.constants = {
            ".".join([names[path[0]], *map(str, path[1:])]): value
            for path, value in src.constants.items()
        }
        self.name, self.metadata = src.fn.fn.__name__, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: bytes, *rest: Any) -> None:
        if self.metadata.global_scratch_size:  # for tensor descriptors that a kernel makes, say
            raise RuntimeError("needs scratch memory, and nobody has given Triton an allocator")
        registers, spills = sass.resources(function)
        driver.active.launches.append(
            Launch(
                name=self.name,
                grid=(x, y, z),
                capability=driver.active.capability,
                num_warps=self.metadata.num_warps,
                registers=registers,
                spills=spills,
                shared=self.metadata.shared,
                constants=self.constants,
                cubin=function,
            )
        )
