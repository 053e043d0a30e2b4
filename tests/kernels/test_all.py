"""What is asked of every operation alike; OPS in kernel_checks.py says how to call each.

The Triton kernels run on the chip where there is one, else interpreted.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from kernel_checks import (
    LAYOUTS,
    OPS,
    all_laid_out,
    either,
    every_op,
    far_apart,
    gpu,
    interpreted,
    poisoned,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.launch import runs_triton

bf16 = torch.bfloat16


device = either


@pytest.mark.parametrize(
    "name, dtype, size",
    [(name, dtype, size) for name, op in OPS.items() for dtype in op.dtypes for size in op.sizes],
)
def test_as_near_fp64_as_plain_torch(device, name, dtype, size):
    OPS[name].make(device, dtype, *size).check()


@pytest.mark.parametrize("name", [name for name in OPS if name != "attention documents"])
@pytest.mark.parametrize("shift", range(len(LAYOUTS)))
def test_any_layout(device, name, shift):
    case = OPS[name].make(device, bf16, *OPS[name].few)
    count = len(case.inputs)
    tensors = all_laid_out([*case.inputs, *case.dys], shift)
    plain = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
    laid_out = replace(case, inputs=tensors[:count], dys=tensors[count:])
    contiguous = replace(case, inputs=plain[:count], dys=plain[count:])
    with poisoned():
        ours = laid_out.run()
    # The kernels do the same whatever the layout. In torch's products the order of sums differs.
    torchs = name == "linear_cross_entropy" or not runs_triton(case.inputs[0])
    tolerance = 2**-5 if torchs else 0
    for one, other in zip(ours, contiguous.run()):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for x, before in zip(tensors, plain):  # no gradient, nor input, is computed in place
        assert torch.equal(x, before)


@every_op
def test_runs_repeat_bit_for_bit(chip, name):
    sizes = OPS[name].sizes
    size = sizes[min(3, len(sizes) - 1)] if chip.type == "cuda" else OPS[name].few
    case = OPS[name].make(chip, bf16, *size)
    runs = [case.run() for _ in range(5)]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
    if case.differentiable:  # two backwards of one graph
        leaves = [x.requires_grad_() for x in case.inputs if x.is_floating_point()]
        outputs = case.ours(*case.inputs)
        for keep in (True, False):
            found = torch.autograd.grad(outputs, leaves, case.dys or None, retain_graph=keep)
            assert all(map(torch.equal, found, runs[0][-len(leaves) :]))


DIFFERENTIABLE = ["rms_norm", "add_rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(chip, name):
    """Without a word it would be that of a constant."""
    case = OPS[name].make(chip, bf16, *OPS[name].few)
    leaves = [x.requires_grad_() for x in case.inputs if x.is_floating_point()]
    dys = [dy.requires_grad_() for dy in case.dys] or [torch.tensor(2.0, requires_grad=True)]
    gradient, *_ = torch.autograd.grad(case.ours(*case.inputs), leaves, dys, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE[:-1])
def test_nothing_in_nothing_out(device, name):
    case = OPS[name].make(device, bf16, *OPS[name].few)
    rows = len(case.dys[0])
    empty = [[x[:0] if len(x) == rows else x for x in xs] for xs in (case.inputs, case.dys)]
    results = replace(case, inputs=empty[0], dys=empty[1]).run()
    for ours, full in zip(results, case.run()):
        assert ours.shape == ((0, *full.shape[1:]) if len(full) == rows else full.shape)
        assert not ours.any()


class Operators(TorchDispatchMode):
    """The operators of ours that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "nanolucie":
            self.calls.append((op, args))
        return op(*args, **kwargs or {})


@every_op
def test_operators_keep_their_promises(chip, name):
    """Schema and fake results agree with what the operators do."""
    dtype = torch.float32 if OPS[name].make(chip, bf16, *OPS[name].few).dys else bf16
    with Operators() as operators:
        OPS[name].make(chip, dtype, *OPS[name].few).run()
    assert operators.calls
    for op, args in operators.calls:  # gradients are the business of what calls them
        copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, tuple(copies), test_utils=("test_schema", "test_faketensor"))


@every_op
def test_one_graph_for_all_lengths(chip, name):
    op = OPS[name]
    dtype = bf16 if name == "int4_linear" else torch.float32
    cases = [op.make(chip, dtype, *size) for size in op.many]

    def loss(*inputs):
        outputs = cases[0].ours(*inputs)
        return sum(y.square().sum() for y in ((outputs,) if torch.is_tensor(outputs) else outputs))

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for case in cases:
        expected = case.results(loss, case.inputs)
        assert all(map(torch.equal, case.results(compiled, case.inputs), expected))
    assert counter.frame_count == 1


COMPILED = """
import torch, kernels, kernels.launch
from gpuless.compiler import fake_gpu
from kernels.rope import rope_tables

def run(n):
    x, weight = torch.randn(2, n, 64).requires_grad_(), torch.randn(64)
    kernels.rms_norm(x, weight, 1e-5).sum().backward()
    kernels.swiglu(x).sum().backward()
    qkv = torch.randn(2, n, 4, 64).requires_grad_()
    q, k = kernels.rope(*qkv.split([3, 1], 2), *rope_tables(64, 1e4, n + 1))
    (q.sum() + k.sum()).backward()
    hidden, targets = torch.randn(n, 16).requires_grad_(), torch.zeros(n, dtype=torch.int64)
    kernels.linear_cross_entropy(hidden, torch.randn(512, 16), targets)

def attend(length):
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, deterministic in ((bf16, True), (bf16, False), (fp32, True)):
        qkv = torch.randn(2, length, 4, 64).to(dtype).requires_grad_().split([2, 1, 1], 2)
        kernels.attention(*qkv, deterministic=deterministic).sum().backward()
    with torch.no_grad():
        q, kv = torch.randn(2, 1, 2, 64), torch.randn(2, 2, 1025 + length, 1, 64)
        kernels.attention(q.bfloat16(), *kv.bfloat16())

with fake_gpu(90):
    kernels.launch.use("triton")
    for n in (*range(1, 19), 1100, 1300):  # of 1300, every second chunk of the loss is unaligned
        run(n)
    for length in range(1, 421, 21):  # 1, odd ones, and multiples of 16
        attend(length)
    with torch.no_grad():
        for rows in range(1, 17):
            packed = torch.zeros(64, 2048, dtype=torch.uint8)
            x, scales = torch.zeros(rows, 4096).bfloat16(), torch.zeros(64, 32).bfloat16()
            kernels.int4_linear(x, packed, scales)
"""


@pytest.mark.slow
def test_lengths_do_not_recompile(tmp_path):
    """Each kernel is compiled once for 20 row counts, on an imagined H100 in a fresh process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILED]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    once = (
        "_rms_norm_forward _rms_norm_backward _swiglu_forward _swiglu_backward _cross_entropy "
        "_attention_backward_delta _attention_decode _attention_combine"
    )
    expected = dict.fromkeys(once.split(), 1) | {
        "_rope": 2,  # there and back
        "_attention_forward": 2,  # bf16, fp32
        "_attention_backward_dq": 2,
        "_attention_backward_dkdv": 3,  # the same, and in one pass
        "_int4_linear": 2,  # up to 8 rows, up to 16
    }
    assert Counter(cubin.stem for cubin in tmp_path.rglob("*.cubin")) == expected


@interpreted
@pytest.mark.parametrize("name", [name for name in OPS if name != "linear_cross_entropy"])
def test_rows_past_int32(chip, name):
    """That of the loss is in its own file: what counts are its logits, which nobody passes in."""
    case = OPS[name].make(chip, bf16, *OPS[name].few)
    far = [
        [far_apart(x) if len(x) == 3 and x.itemsize < 8 else x for x in xs]
        for xs in (case.inputs, case.dys)
    ]
    assert all(map(torch.equal, replace(case, inputs=far[0], dys=far[1]).run(), case.run()))


@gpu
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.huge])
def test_one_row_past_int32(chip, name, monkeypatch):
    """All rows but the last are zero, so it and the weights get what they get of it alone."""

    def draw(device, dtype, *shapes):
        drawn = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        for x in drawn:
            (x[-1] if x.ndim > 1 else x).normal_()
        return drawn

    monkeypatch.setattr("kernel_checks.draw", draw)
    case = OPS[name].make(chip, bf16, *OPS[name].huge)
    rows = len(case.dys[0])
    last = [[x[-1:] if len(x) == rows else x for x in xs] for xs in (case.inputs, case.dys)]
    expected = replace(case, inputs=last[0], dys=last[1]).run()
    for whole, alone in zip(case.run(), expected):
        assert torch.equal(whole[-1:] if len(whole) == rows else whole, alone)
