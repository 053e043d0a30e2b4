"""The static gate: the real kernels pass it, and each way of failing is reported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from bench.static import CASES, REQUIREMENTS, faults, main
from config.cli import ConfigError
from gpuless.compiler import Launch
from gpuless.sass import Program

ROOT = Path(__file__).parents[2]


def python(*args: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_our_kernels_pass_on_hopper():
    done = python("-m", "bench.static", "--check", "--chip", "90")
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.partition("\n\n")[0].splitlines()
    assert head.startswith("sm_90 (H100, H200)")
    assert {row.split()[0] for row in rows} == set(REQUIREMENTS)
    assert {row[81:90].strip() for row in rows} == {"0"}  # accesses to spilled bytes in loops


MUTANTS = """
import torch, triton, triton.language as tl
import kernels
from bench import static

@triton.jit
def _attention_forward(a, b, c, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = tl.dot(tl.load(a + i * SIZE + j), tl.load(b + i * SIZE + j))
    tl.store(c + i * SIZE + j, tile)

def misaligned():
    x = torch.empty(64 * 4096 + 1, dtype=torch.bfloat16)[1:].view(64, 4096)
    kernels.rms_norm(x, torch.empty(4096, dtype=torch.bfloat16), 1e-5)

def spilling():
    a = torch.empty(128, 128, dtype=torch.bfloat16)
    _attention_forward[(1,)](a, a, a.float(), SIZE=128, num_warps=1)

static.CASES = {"rms_norm": {"misaligned": misaligned, "spilling": spilling}}
raise SystemExit(static.main(["rms_norm", "--chip", "90", "--check"]))
"""


@pytest.mark.slow
def test_broken_kernels_are_reported(tmp_path):
    script = tmp_path / "mutants.py"
    script.write_text(MUTANTS, encoding="utf-8")
    done = python(script)
    assert done.returncode == 1, done.stderr
    assert "sm_90 rms_norm misaligned: _rms_norm_forward has " in done.stderr
    assert "sm_90 rms_norm spilling: _attention_forward spills " in done.stderr
    assert "_rms_norm_backward was not launched" in done.stderr


def launch(
    name: str, chip: int, *opcodes: str, spills: int = 0, constants: dict | None = None
) -> Launch:
    """A launch whose machine code consists of these opcodes, or of whole instructions."""
    text = "".join(f"/*{16 * n:04x}*/ {opcode} R0 ;\n" for n, opcode in enumerate(opcodes))
    record = Launch(name, (1, 1, 1), chip, 8, 128, spills, 1024, constants or {}, b"")
    record.__dict__["sass"] = Program(text)
    return record


DQ, DKDV, TMA = "_attention_backward_dq", "_attention_backward_dkdv", "UTMALDG.2D"
BACK = "@P0 BRA 0x50,"  # past four wide loads and one more instruction
WIDE, NARROW, WGMMA = ["LDG.E.128"] * 4, ["LDG.E.U16"], ["HGMMA.64x128x16"] * 8


@pytest.mark.parametrize(
    "record, expected",
    [
        (launch("_swiglu_forward", 90, *WIDE, *NARROW * 3), []),
        (launch("_swiglu_forward", 90, *WIDE, *NARROW * 4), ["128 bits among 8"]),
        (launch("_swiglu_forward", 90, *WIDE, *["STG.E"] * 3, "STG.E.128"), []),
        (launch("_swiglu_forward", 90, *WIDE, *["STG.E"] * 4, "STG.E.128"), ["stores of 128"]),
        (launch("_attention_decode", 90, *WIDE, *["HMMA.16816"] * 8), []),
        (launch("_attention_decode", 90, *WIDE), ["0 tensor-core"]),
        (launch("_swiglu_forward", 90), ["0 loads of 128 bits among 0"]),
        (launch("_swiglu_forward", 80, "LDGSTS.E.BYPASS.128"), []),
        (launch("_swiglu_forward", 80, *WIDE, "LDL", spills=8), ["spills 8 bytes, 1 access"]),
        (launch("_swiglu_forward", 100, *WIDE, "LDL", spills=8), []),
        (launch("_cross_entropy", 90, *WIDE, "STL", "FADD", BACK, "LDL.LU"), []),
        (launch("_cross_entropy", 90, *WIDE, "STL", "STL.64", "LDL", BACK), ["2 accesses"]),
        (launch(DQ, 80, *["HMMA.16816"] * 8), []),
        (launch(DQ, 80, *["HMMA.16816"] * 7), ["7 tensor-core"]),
        (launch(DQ, 90, *WGMMA), ["no TMA load"]),
        (launch(DQ, 90, *["HGMMA.64x128x16 gsb0,"] * 8, TMA), ["waits for each wgmma"]),
        (launch(DQ, 90, *["HMMA.16816"] * 8, TMA), ["0 wgmma"]),
        (launch(DQ, 100, *["UTCHMMA"] * 8, TMA), []),
        (launch("_attention_forward", 100, *["UTCHMMA"] * 8, TMA), []),
        (launch("_attention_forward", 90, *WGMMA, TMA), ["overlaps 0.00 of its softmax"]),
        (launch(DKDV, 90, *WGMMA, TMA, "UTMAREDG.3D", constants={"ONE_PASS": True}), []),
        (launch(DKDV, 90, *WGMMA, TMA, constants={"ONE_PASS": True}), ["does not add by TMA"]),
        (launch("_new_kernel", 90, *WIDE), ["no row in REQUIREMENTS"]),
    ],
)
def test_faults(record, expected):
    found = faults(record)
    assert len(found) == len(expected)
    assert all(phrase in fault for phrase, fault in zip(expected, found)), found


@pytest.mark.slow
def test_the_host_is_timed_for_every_op():
    done = python("-m", "bench.static", "--host")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [op for op, *_ in rows] == list(CASES)
    assert all(0 < int(us) < 1e6 for _, *times in rows for us in times)
    assert [op for op, *times in rows if len(times) < 2] == ["int4_linear"]  # has no backward


def test_every_op_is_measured():
    import kernels

    named = {op for needs in REQUIREMENTS.values() for op in needs.ops.split()}
    assert named == set(CASES)
    public = {name for name in kernels.__all__ if callable(getattr(kernels, name))}
    assert set(CASES) <= public


def test_what_cannot_run_says_so_in_one_line():
    with pytest.raises(ConfigError, match="no op 'softmax'; there are rms_norm, "):
        main(["softmax"])
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        main(["rope"])
    done = python("-c", "import sys; sys.modules['triton'] = None; import bench.static")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "needs pip install triton" in done.stderr
