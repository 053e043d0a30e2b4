"""4-bit weights: their format, and what test_all.py does not ask of the product."""

import sys

import pytest
import torch
from conftest import relative_error
from kernel_checks import OPS, draw, read_int4

from kernels import int4_linear
from kernels.int4_linear import _QUARTERS, pack, unpack
from kernels.launch import GPU

bf16 = torch.bfloat16
make = OPS["int4_linear"].make  # (device, dtype, rows of x, columns, inner, group_size)


# The format


@pytest.mark.parametrize("group_size", [4, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float64])
def test_unpacked_is_what_the_format_says(dtype, group_size):
    _, packed, scales = make("cpu", torch.float32, 1, 7, 384, group_size).inputs
    assert packed.shape == (7, 192) and packed.dtype == torch.uint8
    assert scales.shape == (7, 384 // group_size) and scales.dtype == bf16
    weight = unpack(packed, scales, dtype)
    expected = torch.from_numpy(read_int4(packed.numpy(), scales.double().numpy()))
    assert torch.equal(weight.double(), expected)  # exact in bf16 too
    again = pack(weight, group_size)  # changes nothing
    assert torch.equal(unpack(*again, torch.float64), expected)


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


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e30])
def test_any_magnitude_is_packed(scale):
    weight = scale * draw("cpu", torch.float32, (8, 128))[0]
    weight[0] = 0
    weight[1, 5:] = 0
    again = unpack(*pack(weight), torch.float32)
    assert relative_error(again / scale, weight / scale) < 0.12
    assert torch.equal(again[0], weight[0])


def test_each_row_is_packed_for_itself():
    (weight,) = draw("cpu", bf16, (3000, 128))  # more than one step of rows
    whole = pack(weight)
    for some in (slice(0, 1), slice(2040, 2055), slice(2999, 3000)):
        assert all(torch.equal(a[some], b) for a, b in zip(whole, pack(weight[some])))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_cannot_be_packed_is_refused(bad):
    with pytest.raises(ValueError, match="groups of 96 do not divide rows of 100"):
        pack(torch.ones(2, 100), 96)
    weight = torch.ones(2, 128)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        pack(weight)


# The product


@pytest.mark.parametrize("rows", range(1, 18))
def test_any_number_of_rows(chip, rows):
    make(chip, bf16, rows, 20, 1152).check()  # 8 warps share nine groups


def test_wide_blocks(chip, monkeypatch):
    """Those of many columns, which the interpreter would take minutes for."""
    module = sys.modules["kernels.int4_linear"]
    monkeypatch.setattr(module, "gpu", lambda: GPU("sm_90", multiprocessors=0, tma=True))
    for rows in (1, 9):
        make(chip, bf16, rows, 70, 768).check()


def test_what_has_no_kernel_is_unpacked(chip):
    make(chip, torch.float32, 2, 20).check()
    make(chip, bf16, 2, 20, 256, 32).check()
    x, packed, scales = make("cpu", torch.float32, 3, 20).inputs
    make("cpu", torch.float32, 3, 20).check()  # the definition, in fp32 too
    assert int4_linear(x[:0], packed, scales).shape == (0, 20)


def test_a_row_does_not_depend_on_the_others(chip):
    """Decoding alone or in a batch of up to 8 gives the same bits, however rows are arranged."""
    x, packed, scales = make(chip, bf16, 8, 24, 512).inputs
    y = int4_linear(x, packed, scales)
    assert all(torch.equal(int4_linear(x[i], packed, scales), y[i]) for i in range(8))
    assert torch.equal(int4_linear(x.view(2, 1, 4, 512), packed, scales), y.view(2, 1, 4, 24))


def test_what_does_not_fit_is_refused(chip):
    x, packed, scales = make(chip, bf16, 2, 24).inputs
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


def test_an_instruction_unpacks_two_weights():
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
                    halves = [[as_bf16(v >> shift) for v in (a, *rest)] for shift in (0, 16)]
                    registers[target] = [(x * y + z).bfloat16() for x, y, z in halves]
                case _:
                    raise AssertionError(name)
        for half, word in zip(registers["$0"], (words, words.flip(0))):
            assert torch.equal(half.double() * 64, (word >> 4 * t).remainder(16).double() - 8)


def constant(text: str) -> int:
    return int(text, 0) if text[0].isdigit() else 0


def as_bf16(bits: torch.Tensor) -> torch.Tensor:
    return (bits & 0xFFFF).to(torch.uint16).view(bf16).double()
