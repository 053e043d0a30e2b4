import sys

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import relative_error
from kernel_checks import (
    LAYOUTS,
    assert_as_good,
    compiled_variants,
    far_apart,
    interpreted,
    laid_out,
    mutant,
)

from gpuless.interpreter import MemoryFault
from kernels import int4_linear
from kernels.int4_linear import _QUARTERS, pack, unpack
from kernels.launch import GPU


def draw(device, dtype, rows, columns, inner, group_size=128):
    """x, a packed weight, and that weight as the format's definition reads it, in fp64."""
    torch.manual_seed(0)
    x = torch.randn(rows, inner).to(dtype)
    packed, scales = pack(torch.randn(columns, inner) / inner**0.5, group_size)
    weight = torch.from_numpy(read(packed.numpy(), scales.double().numpy()))
    return [t.to(device) for t in (x, packed, scales, weight)]


def read(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Element by element, from the words of the format's definition."""
    rows, groups = scales.shape
    words = packed.view("<u2").astype(int)
    quarter = words.shape[1] // groups
    weight = np.empty((rows, groups, 4, quarter))
    for group in range(groups):
        for t in range(4):
            for j in range(quarter):
                q = (words[:, group * quarter + j] >> 4 * t) % 16 - 8
                weight[:, group, t, j] = q * scales[:, group]
    return weight.reshape(rows, -1)


def assert_right(function, x, packed, scales, weight):
    eager = F.linear(x, weight.to(x.dtype))
    assert_as_good(function(x, packed, scales), eager, F.linear(x.double(), weight))


# The format


@pytest.mark.parametrize("group_size", [4, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unpacked_is_what_the_format_says(dtype, group_size):
    _, packed, scales, weight = draw("cpu", torch.float32, 1, 7, 384, group_size)
    assert packed.shape == (7, 192) and packed.dtype == torch.uint8
    assert scales.shape == (7, 384 // group_size) and scales.dtype == torch.bfloat16
    assert torch.equal(unpack(packed, scales, dtype).double(), weight)  # exact in bf16 too


def test_packing_is_nearly_the_best_there_is():
    """Against every scale of a fine grid, on normal weights and on weights with outliers."""
    torch.manual_seed(0)
    for weight in (torch.randn(16, 256), torch.randn(16, 256) * torch.rand(16, 256).exp() ** 3):
        ours = unpack(*pack(weight), torch.float32)
        groups = weight.view(-1, 128)
        best = torch.full((32,), torch.inf)
        largest = groups.abs().amax(1, keepdim=True)
        for factor in torch.linspace(0.4, 1.2, 200):
            for sign in (1, -1):
                scale = sign * factor * largest / 8
                q = (groups / scale).round().clamp(-8, 7)
                best = torch.minimum(best, (q * scale - groups).square().sum(1))
        assert relative_error(ours, weight) < 1.01 * float(best.sum().sqrt() / weight.norm())
    normal = torch.randn(128, 4096)
    assert relative_error(unpack(*pack(normal), torch.float32), normal) < 0.098


def test_packing_the_unpacked_changes_nothing():
    weight = draw("cpu", torch.float32, 1, 16, 512)[-1]
    assert torch.equal(unpack(*pack(weight), torch.float64), weight)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e30])
def test_any_magnitude_is_packed(scale):
    torch.manual_seed(0)
    weight = scale * torch.randn(8, 128)
    weight[0] = 0
    weight[1, 5:] = 0
    again = unpack(*pack(weight), torch.float32)
    assert relative_error(again / scale, weight / scale) < 0.12
    assert torch.equal(again[0], weight[0])


def test_each_row_is_packed_for_itself():
    torch.manual_seed(0)
    weight = torch.randn(3000, 128).bfloat16()  # more than one step of rows
    whole = pack(weight)
    for some in (slice(0, 1), slice(2040, 2055), slice(2999, 3000)):
        assert all(torch.equal(a[some], b) for a, b in zip(whole, pack(weight[some])))


def test_what_cannot_be_packed_is_refused():
    for group_size in (128, 6, 96):
        with pytest.raises(ValueError, match=f"groups of {group_size} do not divide rows of 100"):
            pack(torch.ones(2, 100), group_size)
    for bad in (torch.nan, torch.inf):
        weight = torch.ones(2, 128)
        weight[1, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            pack(weight)


# The product, in torch and by the kernel: on the chip where there is one, else interpreted.

SHAPES = [(1, 128), (16, 256), (33, 384), (70, 1152)]  # N, K; 8 warps share a row's groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, inner", [*SHAPES, (300, 4096)])
def test_definition_matches_fp64(dtype, columns, inner):
    for rows in (1, 3, 40):
        assert_right(int4_linear, *draw("cpu", dtype, rows, columns, inner))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, inner", SHAPES)
@pytest.mark.parametrize("group_size", [64, 128])
def test_kernel_matches_fp64(chip, dtype, columns, inner, group_size):
    assert_right(int4_linear, *draw(chip, dtype, 2, columns, inner, group_size))


@pytest.mark.parametrize("rows", range(1, 20))
def test_kernel_takes_any_number_of_rows(chip, rows):
    assert_right(int4_linear, *draw(chip, torch.bfloat16, rows, 20, 256))


def test_kernel_matches_fp64_in_wide_blocks(chip, monkeypatch):
    """Those of many columns, which the interpreter would take minutes for."""
    module = sys.modules["kernels.int4_linear"]
    monkeypatch.setattr(module, "gpu", lambda: GPU("sm_90", multiprocessors=0))
    for rows in (1, 9):
        assert_right(int4_linear, *draw(chip, torch.bfloat16, rows, 70, 768))


def test_what_has_no_kernel_is_unpacked(chip):
    assert_right(int4_linear, *draw(chip, torch.float32, 2, 20, 256))
    assert_right(int4_linear, *draw(chip, torch.bfloat16, 2, 20, 256, 32))


def bytes_laid_out(packed, layout):
    """laid_out, whose poison is no byte."""
    like = laid_out(packed.float(), layout)
    memory = torch.empty(0, device=packed.device).set_(like.untyped_storage())
    memory = memory.nan_to_num(nan=255).to(torch.uint8)
    return memory.as_strided(like.shape, like.stride(), like.storage_offset())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_kernel_takes_any_layout(chip, which, layout):
    *inputs, _ = draw(chip, torch.bfloat16, 6, 24, 512)
    lay_out = bytes_laid_out if which == 1 else laid_out
    inputs[which] = lay_out(inputs[which], layout)
    packed, scales = (t.cpu().contiguous() for t in inputs[1:])
    weight = torch.from_numpy(read(packed.numpy(), scales.double().numpy())).to(chip)
    assert_right(int4_linear, *inputs, weight)


def test_leading_dimensions(chip):
    x, packed, scales, _ = draw(chip, torch.bfloat16, 6, 24, 256)
    y = int4_linear(x, packed, scales)
    assert torch.equal(int4_linear(x.view(2, 1, 3, 256), packed, scales), y.view(2, 1, 3, 24))
    assert torch.equal(int4_linear(x[2], packed, scales), y[2])
    assert int4_linear(x[:0], packed, scales).shape == (0, 24)


def test_a_row_does_not_depend_on_the_others(chip):
    """Decoding alone or in a batch of up to 8 gives the same bits, and so does a second run."""
    x, packed, scales, _ = draw(chip, torch.bfloat16, 8, 24, 512)
    y = int4_linear(x, packed, scales)
    assert all(torch.equal(int4_linear(x[i], packed, scales), y[i]) for i in range(8))


def test_what_does_not_fit_is_refused(chip):
    x, packed, scales, _ = draw(chip, torch.bfloat16, 2, 24, 256)
    for bad in (
        (x[:, :128], packed, scales),
        (x, packed[:5], scales),
        (x, packed, scales[:, :0]),
        (x[:, :252], packed[:, :126], scales[:, :1].expand(24, 5)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            int4_linear(*bad)
    with pytest.raises(RuntimeError, match="has no gradient"):
        int4_linear(x.requires_grad_(), packed, scales)
    with torch.no_grad():
        int4_linear(x, packed, scales)


def test_operator_keeps_its_promises(chip):
    x, packed, scales, _ = draw(chip, torch.bfloat16, 6, 24, 256)
    torch.library.opcheck(
        torch.ops.nanolucie.int4_linear.default,
        (x.view(2, 3, 256), packed, scales),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_one_graph_for_all_row_counts(chip):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(int4_linear, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 5, 16, 17, 30):
        x, packed, scales, _ = draw(chip, torch.bfloat16, rows, 24, 256)
        assert torch.equal(compiled(x, packed, scales), int4_linear(x, packed, scales))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_row_counts_do_not_recompile(tmp_path):
    """Once for up to 8 rows, once for up to 16."""
    for rows, times in (("1, 9", 1), ("1, 17", 2)):
        folder = tmp_path / rows
        compiled = compiled_variants(
            f"""
            for rows in range({rows}):
                x = torch.zeros(rows, 4096, dtype=torch.bfloat16)
                packed = torch.zeros(64, 2048, dtype=torch.uint8)
                scales = torch.zeros(64, 32, dtype=torch.bfloat16)
                kernels.int4_linear(x, packed, scales)
            """,
            folder,
        )
        assert compiled == {"_int4_linear": times}


def test_two_weights_an_instruction():
    """What the interpreter cannot run, the assembly, on every word: as PTX defines its parts."""
    words = torch.arange(2**16, dtype=torch.int64)
    pairs = words | words.flip(0) << 16  # another one in the upper half
    for t, source in enumerate(_QUARTERS.value):
        body = source.strip("{} ").split("; ")
        registers = {"$1": pairs}
        for line in body:
            name, _, arguments = line.strip("; ").partition(" ")
            target, *operands = arguments.split(", ")
            a, *rest = (registers[o] if o in registers else constant(o) for o in operands or "0")
            match name:
                case ".reg":
                    continue
                case "mov.b32":
                    registers[target] = torch.full_like(pairs, a)
                case "shr.u32":
                    registers[target] = a >> rest[0]
                case "and.b32":
                    registers[target] = a & rest[0]
                case "fma.rn.bf16x2":
                    halves = [[bf16(v >> shift) for v in (a, *rest)] for shift in (0, 16)]
                    registers[target] = [(x * y + z).bfloat16() for x, y, z in halves]
                case _:
                    raise AssertionError(name)
        for half, word in zip(registers["$0"], (words, words.flip(0))):
            assert torch.equal(half.double() * 64, (word >> 4 * t).remainder(16).double() - 8)


def constant(text: str) -> int:
    return int(text, 0) if text[0].isdigit() else 0


def bf16(bits: torch.Tensor) -> torch.Tensor:
    return (bits & 0xFFFF).to(torch.uint16).view(torch.bfloat16).double()


@interpreted
def test_rows_past_int32(chip):
    x, packed, scales, _ = draw(chip, torch.bfloat16, 2, 3, 512)
    apart = far_apart(packed.view(torch.bfloat16)).view(torch.uint8)
    assert apart.stride(0) == 2**31
    expected = int4_linear(x, packed, scales)
    assert torch.equal(int4_linear(x, apart, scales), expected)
    assert torch.equal(int4_linear(x, packed, far_apart(scales)), expected)


MUTANTS = {
    "rows past the last": (MemoryFault, "tl.minimum(n, N - 1)", "n"),
    "groups past the last": (MemoryFault, "tl.minimum(first + split, groups - 1)", "first + split"),
    "32-bit rows": (MemoryFault, "tl.minimum(n, N - 1).to(tl.int64)", "tl.minimum(n, N - 1)"),
    "the last group again": (AssertionError, ", mask=inside[:, None], other=0.0", ""),
    "rows of x that are not there": (MemoryFault, "mask=present, other=0.0", ""),
    "columns that are not there": (MemoryFault, "& (n < N)[:, None]", ""),
    "an offset of 7": (AssertionError, "& 15) - 8", "& 15) - 7"),
    "quarters of another order": (AssertionError, "t * QUARTER, mask", "(3 - t) * QUARTER, mask"),
    "one warp's share": (AssertionError, "tl.sum(acc, 0) * 64", "tl.max(acc, 0) * 64"),
    "half the group": (AssertionError, "tl.static_range(4)", "tl.static_range(2)"),
}  # fmt: skip


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("fault", MUTANTS)
def test_broken_kernels_are_caught(chip, tmp_path, fault):
    error, old, new = MUTANTS[fault]
    broken = mutant(tmp_path, "int4_linear", old, new)
    x, packed, scales, weight = draw(chip, torch.bfloat16, 3, 3, 1152)
    if fault == "32-bit rows":
        packed = far_apart(packed.view(torch.bfloat16)).view(torch.uint8)
    with pytest.raises(error):
        assert_right(broken.int4_linear, x, packed, scales, weight)
