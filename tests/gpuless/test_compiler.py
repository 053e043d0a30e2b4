"""The driver for an absent GPU. What compiles does so in a process of its own, since the kernels of
this one may belong to the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from gpuless.compiler import CHIPS, Launch, fake_gpu, occupancy

slow = pytest.mark.slow
SCRIPT = """
import json
import torch, triton, triton.language as tl
from triton.runtime.driver import driver
from gpuless.compiler import CHIPS, KernelError, fake_gpu
from kernels import launch

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)

@triton.jit
def product(a, b, c, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = tl.dot(tl.load(a + i * SIZE + j), tl.load(b + i * SIZE + j))
    tl.store(c + i * SIZE + j, tile)

@triton.jit
def wrong(x):
    tl.store(x, no_such_name)

@triton.jit
def describes(x, y):
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    desc = tl.make_tensor_descriptor(x, [64, 64], [64, 1], [64, 64])
    tl.store(y + i * 64 + j, desc.load([0, 0]))

x, y = torch.zeros(4096), torch.full((4096,), 7.0)
before = driver._active
small, middle, big = (torch.zeros(n, n, dtype=torch.bfloat16) for n in (64, 128, 512))

def say(launches):
    names = "name", "grid", "num_warps", "registers", "spills", "shared", "constants"
    return [
        {name: getattr(l, name) for name in names}
        | {"counts": l.sass.counts, "head": l.sass.text[:40]}
        for l in launches
    ]

def run(chip):
    with fake_gpu(chip) as launches:
        kind = launch.gpu()
        double[(4,)](x, y, 4096, BLOCK=1024, num_warps=4)
        double[(2, 3)](x[1:], y[1:], 4095, BLOCK=1024, num_warps=8)
        product[(1,)](small, small, small.float(), SIZE=64, num_warps=4)
        if chip == 90:
            product[(1,)](middle, middle, middle.float(), SIZE=128, num_warps=1)
    return {"gpu": vars(kind), "launches": say(launches)}

def error(kernel, *args, **options):
    try:
        with fake_gpu(90):
            kernel[(1,)](*args, **options)
    except KernelError as e:
        return [str(e), type(e.__cause__).__name__]

print(json.dumps({
    "chips": {chip: run(chip) for chip in CHIPS},
    "again": run(90),
    "untouched": bool((y == 7).all()),
    "errors": [
        error(wrong, x),
        error(product, big, big, big, SIZE=512, num_warps=8),
        error(describes, x, y),
    ],
    "restored": driver._active is before,
}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the script prints."""
    script = tmp_path_factory.mktemp("compiled") / "script.py"  # triton reads its kernels' source
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment["TRITON_INTERPRET"] = "0"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@slow
def test_a_launch_is_recorded_and_not_run(compiled):
    first, second, third, spilling = compiled["chips"]["90"]["launches"]
    assert (first["name"], first["grid"], first["num_warps"]) == ("double", [4, 1, 1], 4)
    assert (second["name"], second["grid"], second["num_warps"]) == ("double", [2, 3, 1], 8)
    assert first["constants"] == {"BLOCK": 1024} and third["constants"] == {"SIZE": 64}
    assert 8 <= first["registers"] <= 255 and first["spills"] == first["shared"] == 0
    assert third["shared"] >= 2 * 64 * 64 * 2  # both operands of wgmma lie in shared memory
    assert spilling["spills"] > 0 and spilling["counts"]["LDL"] > 0
    assert compiled["untouched"] and compiled["restored"]
    assert compiled["again"] == compiled["chips"]["90"]  # compiled already, and recorded again


@slow
def test_alignment_is_that_of_the_tensor(compiled):
    aligned, shifted, *_ = compiled["chips"]["90"]["launches"]
    assert aligned["counts"]["LDG.128"] == aligned["counts"]["LDG"] == 2
    assert "LDG.128" not in shifted["counts"] and shifted["counts"]["LDG"] == 4


@slow
@pytest.mark.parametrize(
    "capability, kind, instruction",
    [
        (80, "sm_80", "HMMA"),
        (86, "default", "HMMA"),
        (90, "sm_90", "HGMMA"),
        (100, "sm_100", "UTCMMA"),
        (120, "default", "HMMA"),
    ],
)
def test_each_chip_gets_its_own_code(compiled, capability, kind, instruction):
    """One process compiles for all in turn: nothing of one chip may be kept for another."""
    of_chip = compiled["chips"][str(capability)]
    multiprocessors = CHIPS[capability].multiprocessors
    tma = capability >= 90
    assert of_chip["gpu"] == {"kind": kind, "multiprocessors": multiprocessors, "tma": tma}
    assert all(f"sm_{capability}" in launch["head"] for launch in of_chip["launches"])
    assert instruction in of_chip["launches"][2]["counts"]


@slow
def test_errors_name_the_kernel(compiled):
    unknown, too_large, needs_scratch = compiled["errors"]
    assert unknown[0].startswith("wrong on sm_90: ") and "no_such_name" in unknown[0]
    assert too_large[0].startswith("product on sm_90: OutOfResources: ")
    assert "232448" in too_large[0] and too_large[1] == "OutOfResources"
    # Triton keeps a descriptor that a kernel makes in memory from an allocator, which nobody sets.
    assert needs_scratch[0].startswith("describes on sm_90: RuntimeError: needs scratch memory")


def test_a_chip_that_is_not_known():
    with (
        pytest.raises(ValueError, match="fake_gpu knows 80, 86, 90, 100, 120, not 75"),
        fake_gpu(75),
    ):
        pass


@pytest.mark.parametrize(
    "capability, registers, warps, shared, blocks",
    [
        (86, 32, 4, 0, 12),  # 48 warps
        (90, 33, 4, 0, 12),  # rounded up to 40: 12 warps in each quarter
        (90, 200, 1, 0, 8),  # two warps in each quarter: ten would fit in the whole
        (86, 16, 1, 0, 16),  # block slots
        (80, 32, 4, 166_912, 1),  # the most one block may have
        (90, 32, 4, 115_600, 2),  # two of 115,712 with 1 KB each fill the 228 KB
        (90, 32, 4, 45_600, 4),  # rounded up to 45,696: five would fit as they are
    ],
)
def test_occupancy(capability, registers, warps, shared, blocks):
    launch = Launch("k", (1, 1, 1), capability, warps, registers, 0, shared, {}, b"")
    assert occupancy(launch) == blocks
