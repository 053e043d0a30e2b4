import os
import subprocess
import sys

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from gpuless import interpreter
from gpuless.interpreter import MemoryFault

interpreter.install()

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


def same(ours, exact):
    """Equal bits, where any NaN equals any other: what a NaN carries differs between chips."""
    assert ours.dtype == exact.dtype and ours.shape == exact.shape
    assert torch.equal(ours.isnan(), exact.isnan())
    bits = {2: torch.int16, 4: torch.int32}[ours.itemsize]
    ok = ~exact.isnan()
    assert torch.equal(ours[ok].view(bits), exact[ok].view(bits))


def randn(*shape, dtype=f32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Numbers


@triton.jit
def convert(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


EVERY_BF16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(bf16)


@pytest.mark.parametrize("below", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_to_bf16_rounds_to_nearest_even(below):
    """Every bf16 with something below its last bit: halfway cases, infinities, NaN, subnormals."""
    x = (EVERY_BF16.view(torch.int16).int() << 16 | below).view(f32)
    y = torch.empty_like(EVERY_BF16)
    convert[(1,)](x, y, N=2**16)
    same(y, x.bfloat16())


@triton.jit
def unrepaired(x, y, KIND: tl.constexpr):
    if KIND == "rounded toward zero":
        tl.store(y, tl.load(x).to(tl.bfloat16, fp_downcast_rounding="rtz"))
    if KIND == "bitcast":
        tl.store(y, tl.load(y).to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True))
    if KIND == "atomic_rmw":
        tl.atomic_add(x, 1.0)
    if KIND == "atomic_cas":
        tl.atomic_cas(x, 1.0, 2.0)
    if KIND == "atomic .*ADD of bf16":
        desc = tl.make_tensor_descriptor(y, [8], [1], [8])
        desc.atomic_add([0], tl.zeros([8], tl.bfloat16))


@pytest.mark.parametrize(
    "kind",
    ["rounded toward zero", "bitcast", "atomic_rmw", "atomic_cas", "atomic .*ADD of bf16"],
)
def test_what_is_not_repaired_is_refused(kind):
    with pytest.raises(InterpreterError, match=kind):
        unrepaired[(1,)](torch.ones(8), torch.ones(8, dtype=bf16), KIND=kind)


@triton.jit
def elementwise(x, y, out, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    u, v = tl.load(x + at), tl.load(y + at)
    if OP == "scalar":
        r = 1.7 * u - 0.3
    if OP == "abs":
        r = tl.abs(u)
    if OP == "where":
        r = tl.where(u < v, u, u + v * v)
    if OP == "less":
        r = (u < v).to(tl.bfloat16)
    tl.store(out + at, r)


ELEMENTWISE = {
    "scalar": lambda u, v: torch.tensor(1.7, dtype=bf16) * u - torch.tensor(0.3, dtype=bf16),
    "abs": lambda u, v: u.abs(),
    "where": lambda u, v: torch.where(u < v, u, u + v * v),
    "less": lambda u, v: (u < v).bfloat16(),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_bf16_arithmetic_is_torchs(op):
    x, y = 3 * randn(4096, dtype=bf16), 3 * randn(4096, dtype=bf16, seed=1)
    x[:6] = torch.tensor([0.0, 1.0, 3e38, float("inf"), -1.0, 1e-38])
    y[:6] = torch.tensor([1.0, 1.0, 3e38, 2.0, float("inf"), 1e-38])
    out = torch.empty_like(x)
    elementwise[(1,)](x, y, out, OP=op, N=4096)
    same(out, ELEMENTWISE[op](x, y))


@triton.jit
def combine(u, v):
    return u * 0.5 + v


@triton.jit
def reduce(x, total, largest, where, running, custom, full, N: tl.constexpr, M: tl.constexpr):
    row, at = tl.arange(0, N), tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    u = tl.load(x + at)
    tl.store(total + row, tl.sum(u, 1))
    tl.store(largest + row, tl.max(u, 1))
    tl.store(where + row, tl.argmax(u, 1))
    tl.store(running + at, tl.cumsum(u, 1))
    tl.store(custom + row, tl.reduce(u, 1, combine))
    tl.store(full + row, tl.zeros([N], tl.bfloat16) + tl.full([N], 1.2345, tl.bfloat16))


def test_bf16_reductions_scans_and_constants():
    x = randn(8, 32, dtype=bf16)
    total, largest, custom, full = (torch.empty(8, dtype=bf16) for _ in range(4))
    where, running = torch.empty(8, dtype=torch.int32), torch.empty_like(x)
    reduce[(1,)](x, total, largest, where, running, custom, full, N=8, M=32)
    same(total, x.double().sum(1).bfloat16())
    same(largest, x.amax(1))
    assert torch.equal(where, x.argmax(1).int())
    same(running, x.double().cumsum(1).bfloat16())
    expected = x[:, 0]
    for column in x.T[1:]:
        expected = expected * 0.5 + column
    same(custom, expected)
    same(full, torch.full((8,), 1.2345).bfloat16())


@triton.jit
def dot(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HOW: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    u = tl.load(x + m[:, None] * K + k[None, :])
    v = tl.load(y + n[:, None] * K + k[None, :])
    acc = tl.full([M, N], 1.0, tl.float32)
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(u, v.T, acc, input_precision=HOW))


@pytest.mark.parametrize("dtype", [bf16, f16, f32])
def test_dot_adds_up_in_float32(dtype):
    x, y = randn(32, 256, dtype=dtype), randn(64, 256, dtype=dtype, seed=1)
    out = torch.empty(32, 64)
    dot[(1,)](x, y, out, M=32, N=64, K=256, HOW="ieee")
    assert (out - (1 + x.double() @ y.double().T)).abs().max() < 1e-4


@pytest.mark.parametrize("how, kept", [("tf32", 2**-10), ("ieee", 2**-10 + 2**-11 + 2**-20)])
def test_dot_cuts_to_tf32_only_where_asked(how, kept):
    """In tf32 1 + 2^-10 stays, and all below goes."""
    x, y, out = torch.zeros(16, 64), torch.zeros(16, 64), torch.empty(16, 16)
    x[0, 0], y[0, 0] = 1 + 2**-10 + 2**-11 + 2**-20, 1
    dot[(1,)](x, y, out, M=16, N=16, K=64, HOW=how)
    assert out[0, 0] == 2 + kept


# Language


@triton.jit
def move_tile(source, target, row, column):
    target.store([row, column], source.load([row, column]))


@triton.jit
def shifted_tile(source, y, row, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y + at, source.load([row, 0]))


@pytest.mark.parametrize("row,column", [(8, 8), (12, 16), (-3, 0), (-8, -8), (40, 0)])
def test_descriptors_past_the_edges(row, column):
    """Loads there give zeros, and stores are dropped."""
    x, y = randn(20, 24, dtype=bf16), torch.full((20, 24), 7.0, dtype=bf16)
    move_tile[(1,)](*(TensorDescriptor.from_tensor(t, [8, 8]) for t in (x, y)), row, column)
    expected = torch.full_like(y, 7.0)
    tile = slice(max(row, 0), max(row + 8, 0)), slice(max(column, 0), max(column + 8, 0))
    expected[tile] = x[tile]
    same(y, expected)
    y = torch.empty(8, 8, dtype=bf16)
    shifted_tile[(1,)](TensorDescriptor.from_tensor(x, [8, 8]), y, row, N=8)
    padded = torch.nn.functional.pad(x, (0, 0, 8, 28))
    same(y, padded[row + 8 : row + 16, :8])


# Memory: broken kernels are caught


@triton.jit
def copy(x, y, n, LOAD: tl.constexpr, STORE: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, N)
    u = tl.load(x + at, mask=at < n) if LOAD else tl.load(x + at)
    if STORE:
        tl.store(y + at, u, mask=at < n)
    else:
        tl.store(y + at, u)


@pytest.mark.parametrize("dtype", [bf16, torch.int64])
def test_forgotten_masks(dtype):
    x, y = randn(1000).to(dtype), torch.empty(1000, dtype=dtype)
    copy[(4,)](x, y, 1000, LOAD=True, STORE=True, STEP=256, N=256)
    assert torch.equal(x, y)
    with pytest.raises(MemoryFault, match=r"copy, program \(3, 0, 0\): load .* 24 of 256 lanes"):
        copy[(4,)](x, y, 1000, LOAD=False, STORE=True, STEP=256, N=256)
    with pytest.raises(MemoryFault, match=r"copy, program \(3, 0, 0\): store .* of y"):
        copy[(4,)](x, y, 1000, LOAD=True, STORE=False, STEP=256, N=256)


@triton.jit
def store_in_the_last(y, n, N: tl.constexpr):
    at = tl.arange(0, N)
    last = tl.program_id(0) == tl.num_programs(0) - 1
    tl.store(y + at, 1.0, mask=last & (at < n))


def test_mask_of_a_scalar_and_a_block():
    """The interpreter makes it of integers 0 and 1, which numpy would take for positions."""
    y = torch.zeros(5)
    store_in_the_last[(3,)](y, 5, N=8)
    assert torch.equal(y, torch.ones(5))
    with pytest.raises(MemoryFault, match=r"program \(2, 0, 0\): store .* 1 of 6 lanes"):
        store_in_the_last[(3,)](y, 6, N=8)


def test_two_programs_store_to_one_address():
    x, y = randn(1000), torch.empty(1000)
    with pytest.raises(MemoryFault, match=r"program \(1, 0, 0\): race: store .* \(0, 0, 0\)"):
        copy[(7,)](x, y, 1000, LOAD=True, STORE=True, STEP=128, N=256)


@triton.jit
def mark(y, A, B, C, N: tl.constexpr):
    at = tl.program_id(0) * A + tl.program_id(1) * B + tl.program_id(2) * C
    tl.store(y + tl.arange(0, N) * 2**18 + at, 1.0)


def test_races_are_told_by_all_axes_of_the_grid():
    y = torch.empty(3 * 2**18 + 12)  # megabytes
    mark[(2, 3, 2)](y, 3, 1, 6, N=4)
    for strides in ((0, 1, 6), (3, 0, 6), (3, 1, 0)):
        with pytest.raises(MemoryFault, match="race"):
            mark[(2, 3, 2)](y, *strides, N=4)


@triton.jit
def add_rows(y_ptr, y_desc, WHAT: tl.constexpr):
    """Each program adds its number to rows 2 to 9 of y, which has 6; a last one may touch one."""
    number = tl.program_id(0)
    last = number == tl.num_programs(0) - 1
    y_desc.atomic_add([2, 0], tl.zeros([8, 4], tl.float32) + number)
    if WHAT == "load":
        tl.store(y_ptr, tl.load(y_ptr + 23, mask=last, other=0.0), mask=last)
    if WHAT == "store":
        tl.store(y_ptr + 23, 1.0, mask=last)


def test_programs_may_add_to_one_address_but_not_touch_it_otherwise():
    y = torch.ones(6, 4)
    desc = TensorDescriptor(y, [6, 4], [4, 1], [8, 4])
    add_rows[(4,)](y, desc, WHAT="")
    assert torch.equal(y[:, 0], torch.tensor([1.0, 1, 7, 7, 7, 7]))
    for what in ("load", "store"):
        with pytest.raises(MemoryFault, match=rf"race: {what} where others add, 1 lanes"):
            add_rows[(4,)](y, desc, WHAT=what)


@triton.jit
def from_neighbour(x, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    before = tl.load(x + at - 1, mask=at > 0, other=0.0)
    tl.store(x + at, before, mask=at < n)


def test_loading_what_another_program_stores():
    with pytest.raises(MemoryFault, match=r"program \(1, 0, 0\): race: load .* \(0, 0, 0\)"):
        from_neighbour[(2,)](torch.zeros(16), 16, N=8)


@triton.jit
def copy_row(x, y, row, stride, WIDE: tl.constexpr, N: tl.constexpr):
    start = row.to(tl.int64) * stride if WIDE else row * stride
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + start + at))


def test_int32_offsets_that_overflow():
    """The third row lies one past what int32 can say; the gigabytes between are never touched."""
    stride = 2**30
    x, y = torch.empty(2 * stride + 16, dtype=torch.uint8), torch.empty(16, dtype=torch.uint8)
    x = x.as_strided((3, 16), (stride, 1))
    x[2] = torch.arange(16)
    copy_row[(1,)](x, y, 2, stride, WIDE=True, N=16)
    assert torch.equal(y, x[2])
    with pytest.raises(MemoryFault, match="load outside"):
        copy_row[(1,)](x, y, 2, stride, WIDE=False, N=16)


# Memory: correct kernels are not accused


@triton.jit
def add_views(x, y, z, sx, sy, sz, N: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, N)
    tl.store(z + row * sz + at, tl.load(x + row * sx + at) + tl.load(y + row * sy + at))


def test_views_of_one_packed_tensor():
    packed = randn(6, 48, dtype=bf16)
    x, y, z = packed.split(16, dim=1)
    expected = x + y
    add_views[(6,)](x, y, z, 48, 48, 48, N=16)
    same(z, expected)
    add_views[(6,)](x, z, z, 48, 48, 48, N=16)  # in place
    same(z, x + expected)


def test_stride_zero_transposed_and_sliding_inputs():
    row, z = randn(16, dtype=bf16), torch.empty(6, 16, dtype=bf16)
    add_views[(6,)](row.expand(6, 16), z, z, 0, 16, 16, N=16)
    windows = randn(21, dtype=bf16).as_strided((6, 16), (1, 1))
    add_views[(6,)](windows, row.expand(6, 16), z, 1, 0, 16, N=16)
    same(z, windows + row)
    scalar = torch.tensor(2.0)
    copy[(1,)](scalar, torch.empty(1), 1, LOAD=True, STORE=True, STEP=8, N=8)


def test_empty_tensors_and_empty_grids():
    x, y = torch.empty(0), torch.empty(4)
    copy[(1,)](x, y, 0, LOAD=True, STORE=True, STEP=8, N=8)
    copy[(0,)](x, x, 0, LOAD=True, STORE=True, STEP=8, N=8)
    for empty in (x, torch.empty(8)[:0], torch.empty(8).as_strided((4, 0), (1, 1))):
        with pytest.raises(MemoryFault, match="load outside"):
            copy[(1,)](empty, y, 0, LOAD=False, STORE=True, STEP=8, N=8)


def test_every_element_of_odd_views_is_allowed_and_nothing_else():
    """Spans against a map of the storage, element by element."""
    storage = torch.zeros(4096, dtype=torch.uint8).view(torch.int32)
    for shape, stride in (
        ((3, 5), (7, 1)),
        ((2, 3, 4), (100, 8, 1)),
        ((2, 3, 4), (20, 8, 1)),  # the second block starts where the last row of the first ends
        ((4, 3, 2), (1, 8, 200)),
        ((3, 4), (40, 3)),
        ((2, 1, 3), (20, 4, 3)),  # the stride of a single row means nothing
        ((), ()),
    ):
        x = storage.as_strided(shape, stride, 3)
        owned = np.zeros(storage.numel(), bool)
        for index in np.ndindex(*shape):
            owned[3 + sum(i * s for i, s in zip(index, stride))] = True
        address = np.uint64(storage.data_ptr()) + np.arange(0, storage.nbytes, 4, dtype=np.uint64)
        held = interpreter._Span("x", x, 0).holds(address, 4)
        assert np.array_equal(held, owned), (shape, stride)
    windows = storage.as_strided((3, 3), (3, 2), 3)  # not nested: all between first and last
    held = interpreter._Span("x", windows, 0).holds(address, 4)
    assert held[3:14].all() and held.sum() == 11


# Installing


def test_install_after_triton_is_refused():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; "
    code += "from gpuless.interpreter import install; install()"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: set TRITON_INTERPRET=1 before triton is imported")
