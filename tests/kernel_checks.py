"""What the tests of the kernels share: a table of the operations, layouts, and how good is enough.

An operation of the table is tested by kernels/test_all.py for everything that is asked of each of
them, and what is particular to one is tested in the file of its name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor

import kernels
from kernels.attention import _definition
from kernels.int4_linear import pack
from kernels.rope import rope_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")


def gpu(test: Callable) -> Callable:
    """Mark a test of tensors past 2^31 elements, which needs a CUDA device of 80 GB."""
    large = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > 75e9
    reason = "needs a CUDA device of 80 GB"
    return pytest.mark.gpu(pytest.mark.skipif(not large, reason=reason)(test))


@pytest.fixture(params=["definition", "kernels"])
def either(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs that is for both implementations; it takes this by the name of device."""
    cpu = torch.device("cpu")
    return cpu if request.param == "definition" else request.getfixturevalue("chip")


def draw(device: torch.device | str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """A normal tensor of each shape, always the same."""
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "row slice": lambda x: _inside(x, 2 * len(x), *x.shape[1:])[::2],
    "column slice": lambda x: _inside(x, *x.shape[:-1], x.shape[-1] + 5)[..., 3:-2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded scalar": lambda x: x.flatten()[0].expand(x.shape),  # what sum().backward() sends
    "storage offset": lambda x: _inside(x, x.numel() + 1)[1:].view(x.shape),
}


def _inside(x: Tensor, *shape: int) -> Tensor:
    """Memory to cut a view from. What the view leaves out is poison."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else 255)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another layout, with the values of x unless it is expanded."""
    view = LAYOUTS[layout](x)
    if "expanded" not in layout:
        view.copy_(x)
    return view


def all_laid_out(tensors: list[Tensor], shift: int) -> list[Tensor]:
    """Each float or uint8 tensor in another layout; over all shifts, each in every layout."""
    names = list(LAYOUTS)
    return [
        laid_out(x, names[(i + shift) % len(names)]) if x.itemsize < 8 else x
        for i, x in enumerate(tensors)
    ]


def far_apart(rows: Tensor) -> Tensor:
    """Three rows 2^30 elements from each other: the third is past int32. Memory is hardly touched.

    The layout of a huge tensor without its bytes; 4 GB of addresses in bf16. Bytes go in pairs.
    """
    if rows.dtype == torch.uint8:
        return far_apart(rows.view(torch.bfloat16)).view(torch.uint8)
    huge = torch.empty(2**31 + rows[0].numel(), dtype=torch.bfloat16)
    view = huge.as_strided(rows.shape, (2**30, *rows.stride()[1:]))
    view.copy_(rows)
    return view


# --- how good is enough ---------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN: what is read before it is written, or never written, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_as_good(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Our error against fp64 is at most twice that of plain torch in the same dtype."""
    assert ours.dtype == eager.dtype and ours.shape == exact.shape
    if exact.norm() < 1e-12:  # nothing but rounding: the gradient of a softmax of one score
        assert ours.norm() < 1e-4
        return
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
    Case(ours, eager, inputs, dys).check()


# --- the operations -------------------------------------------------------------------------------


@dataclass
class Case:
    """An operation, the same in plain torch, and what to call both with."""

    ours: Callable
    eager: Callable
    inputs: list[Tensor]
    dys: tuple[Tensor, ...] | list[Tensor] = ()
    differentiable: bool = True

    def results(self, function: Callable, inputs: list[Tensor], dys=()) -> list[Tensor]:
        """The outputs, then the gradients, if the operation has any."""
        if self.differentiable:
            return gradients(function, inputs, *dys)
        with torch.no_grad():
            return [function(*inputs)]

    def run(self) -> list[Tensor]:
        return self.results(self.ours, self.inputs, self.dys)

    def check(self) -> None:
        """Fail where ours is not as good as eager, in an output or a gradient."""
        inputs, dys = (
            [x.double() if x.is_floating_point() else x for x in tensors]
            for tensors in (self.inputs, self.dys)
        )
        eager = self.results(self.eager, self.inputs, self.dys)
        with poisoned():
            ours = self.run()
        for triple in zip(ours, eager, self.results(self.eager, inputs, dys)):
            assert_as_good(*triple)


def _rms_norm(device, dtype, *shape):
    x, weight, dy = draw(device, dtype, shape, shape[-1:], shape)
    return Case(
        lambda x, weight: kernels.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
        [x, weight],
        [dy],
    )


def _add_rms_norm(device, dtype, *shape):
    def ours(x, residual, weight):
        return kernels.add_rms_norm(x, residual, weight, 1e-5)

    def eager(x, residual, weight):
        total = residual + x.to(residual.dtype)
        return F.rms_norm(total, x.shape[-1:], weight, 1e-5), total

    x, residual, weight, *dys = draw(device, dtype, shape, shape, shape[-1:], shape, shape)
    return Case(ours, eager, [x, residual, weight], dys)


def eager_rope(q, k, positions=None, cos=None, sin=None):
    """Rotation as plain torch writes it; rounded once, at the end."""

    def rotate(x):
        at = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        a, b = x.chunk(2, dim=-1)
        c, s = (torch.cat((t[at], t[at]), -1).unsqueeze(-2) for t in (cos, sin))
        return (x * c + torch.cat((-b, a), -1) * s).to(x.dtype)

    return rotate(q), rotate(k)


def _rope(device, dtype, batch, tokens, heads=4, kv_heads=2, head_dim=8, length=64):
    def ours(q, k, positions=None):
        return kernels.rope(q, k, cos, sin, positions)

    shapes = (batch, tokens, heads, head_dim), (batch, tokens, kv_heads, head_dim)
    q, k, *dys = draw(device, dtype, *shapes, *shapes)
    cos, sin = rope_tables(head_dim, 10_000.0, length, device)
    return Case(ours, partial(eager_rope, cos=cos, sin=sin), [q, k], dys)


def _rope_positions(device, dtype, batch, tokens):
    case = _rope(device, dtype, batch, tokens)
    case.inputs.append(torch.randint(64, (batch, tokens), device=device))
    return case


def _swiglu(device, dtype, *shape):
    def eager(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    x, dy = draw(device, dtype, (*shape[:-1], 2 * shape[-1]), shape)
    return Case(kernels.swiglu, eager, [2 * x], [dy])


def _linear_cross_entropy(device, dtype, tokens, hidden=8, vocab=11):
    def eager(h, w, t):
        logits = F.linear(h, w)
        return F.cross_entropy(logits if h.dtype == torch.float64 else logits.float(), t)

    h, w = draw(device, dtype, (tokens, hidden), (vocab, hidden))
    t = torch.randint(vocab, (tokens,))
    t[::7], t[0] = -100, 1  # one counts at least
    return Case(kernels.linear_cross_entropy, eager, [h, w / 5, t.to(device)])


def draw_attention(device, dtype, batch, queries, keys, heads, kv_heads, head_dim):
    """q, k, v and the gradient of the output."""
    shapes = [(batch, queries, heads, head_dim), (batch, keys, kv_heads, head_dim)]
    return draw(device, dtype, *(shapes[i] for i in (0, 1, 1, 0)))


def _attention(device, dtype, batch, tokens, heads=4, kv_heads=2, head_dim=64):
    *qkv, dy = draw_attention(device, dtype, batch, tokens, tokens, heads, kv_heads, head_dim)
    return Case(kernels.attention, _definition, qkv, [dy])


def _attention_documents(device, dtype, batch, tokens, heads=4, kv_heads=2):
    case = _attention(device, dtype, batch, tokens, heads, kv_heads)
    case.inputs.append(torch.tensor([0, 2, batch * tokens], device=device))
    return case


def _attention_decode(device, dtype, batch, keys, heads=4, kv_heads=2, head_dim=64):
    *qkv, _ = draw_attention(device, dtype, batch, 1, keys, heads, kv_heads, head_dim)
    return Case(kernels.attention, _definition, qkv, differentiable=False)


def read_int4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight in fp64, element by element, from the words of the format's definition."""
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


def _int4_linear(device, dtype, rows, columns=3, inner=256, group_size=128):
    def eager(x, packed, scales):
        packed, scales = (t.cpu().contiguous() for t in (packed, scales.double()))
        weight = torch.from_numpy(read_int4(packed.numpy(), scales.numpy()))
        return F.linear(x, weight.to(x))

    x, weight = draw("cpu", torch.float32, (rows, inner), (columns, inner))
    inputs = [x.to(dtype), *pack(weight / inner**0.5, group_size)]
    inputs = [t.to(device) for t in inputs]
    return Case(kernels.int4_linear, eager, inputs, differentiable=False)


@dataclass
class Op:
    """How to make a case of an operation, and sizes for it."""

    make: Callable[..., Case]  # (device, dtype, *size)
    sizes: list[tuple[int, ...]]  # that the result is compared with fp64 in
    few: tuple[int, ...]  # of a case whose tensors other than weights begin with 3
    many: tuple[tuple[int, ...], ...]  # that differ in what must not lead to another compilation
    huge: tuple[int, ...] | None = None  # of a case with tensors one row past 2^31 elements
    dtypes: tuple = tuple(DTYPES)


ROWS = [(1, 3), (3, 8), (2, 5, 100), (70, 128), (2, 4096), (1, 5000)]
MANY = tuple((n, 40) for n in (7, 5, 17, 40))
OPS = {
    "rms_norm": Op(_rms_norm, ROWS, (3, 64), MANY, (2**31 // 4096 + 1, 4096)),
    "add_rms_norm": Op(_add_rms_norm, ROWS, (3, 64), MANY, (2**31 // 4096 + 1, 4096)),
    "rope": Op(
        _rope,
        [(1, 1, 1, 1, 2), (2, 7, 12, 3, 6), (1, 3, 32, 8, 128), (2, 65, 4, 4, 64, 68),
         (1, 2, 40, 1, 96)],
        (3, 5), tuple((2, n) for n in (3, 5, 17, 40)), (2**31 // 2**19 + 1, 128, 32, 8, 128, 128),
    ),
    "rope positions": Op(
        _rope_positions, [(2, 5), (1, 40)], (3, 5), tuple((2, n) for n in (3, 5, 17, 40))
    ),
    "swiglu": Op(
        _swiglu, [(1, 1), *ROWS[1:-1], (3, 5001)], (3, 32), MANY, (2**31 // 24_576 + 1, 12_288)
    ),
    "linear_cross_entropy": Op(
        _linear_cross_entropy, [(1, 24, 2), (40, 24, 128), (3, 24, 20_000), (130, 24, 211)],
        (10, 24, 50), ((3,), (5,), (17,), (150,)),
    ),
    "attention": Op(
        _attention,
        [(2, 70, 4, 1, 128)],
        (3, 20, 2, 1), ((1, 3), (1, 5), (1, 17)), (17, 32_768, 32, 8, 128),
    ),
    "attention documents": Op(
        _attention_documents, [(2, 12)], (3, 20, 2, 1), ((2, 7), (2, 5), (2, 17))
    ),
    "attention decode": Op(
        _attention_decode, [(2, 300, 4, 1, 128)],
        (3, 65), ((2, 3), (2, 5), (2, 17)),
    ),
    "int4_linear": Op(
        _int4_linear, [(40, 300, 4096), (2, 1, 128), (3, 16, 256, 64), (16, 33, 384)],
        (3, 3, 512), ((7,), (5,), (16,), (17,)), dtypes=tuple(DTYPES[1:]),
    ),
}  # fmt: skip
every_op = pytest.mark.parametrize("name", OPS)
