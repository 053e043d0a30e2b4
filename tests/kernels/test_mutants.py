"""Deliberate faults in the kernels, each of which a check of the other test files must notice."""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType

import pytest
import torch
from kernel_checks import OPS, check, far_apart, interpreted
from test_attention import (
    FAR,
    check_decoding,
    check_others_untouched,
    run_far,
    run_far_outputs,
)
from test_linear_cross_entropy import check_kernel_alone, launch_far, rows_of_logits
from test_rope import FAR_BY, check_unknown_positions, run_rope_far

import kernels.launch
from gpuless.interpreter import MemoryFault
from kernels import attention
from kernels.attention import _definition

bf16 = torch.bfloat16
WRONG, FAULT = AssertionError, MemoryFault


# The checks


def compare(name, *size):
    return lambda chip: OPS[name].make(chip, bf16, *size).check()


def run_far_apart(name):
    def run(chip):
        case = OPS[name].make(chip, bf16, *OPS[name].few)
        case.results(case.ours, [far_apart(x) if len(x) == 3 else x for x in case.inputs], case.dys)

    return run


def run_rope_far_by(what):
    return lambda chip: list(run_rope_far(chip, FAR_BY[what]))


def attend(chip):
    case = OPS["attention"].make(chip, bf16, 1, 300)
    case.check()
    cu_seqlens = torch.tensor([0, 90, 91, 260, 300], device=chip)
    functions = [partial(f, cu_seqlens=cu_seqlens) for f in (attention, _definition)]
    check(*functions, case.inputs, *case.dys)


def attend_in_one_pass(chip):
    case = OPS["attention"].make(chip, bf16, 1, 70)
    replace(case, ours=partial(attention, deterministic=False)).check()


def attend_with_nan_in_others(chip):
    for document in ((0, 128), (128, 256)):
        check_others_untouched(chip, torch.nan, [0, 128, 256, 384, 512], document)


def attend_far(chip):
    for far in FAR.values():
        list(run_far(chip, *far))
    run_far_outputs(chip)


def decode(chip):
    for keys in (70, 129, 300):
        check_decoding(chip, bf16, [keys - 1] * 2, 4, 2, 64, ragged=False)


def decode_ragged(chip):
    check_decoding(chip, bf16, [40, 299, 131], 4, 2, 64)


# The faults: (file, check, [(how it shows, what is replaced, by what), ...])

MUTANTS = [
    ("rms_norm", compare("rms_norm", 70, 100), [
        (FAULT, "(column < columns)\n    x = ", "(column >= 0)\n    x = "),
        (FAULT, "partial_ptr + program * columns", "partial_ptr"),
        (WRONG, "tl.sum(g * n,", "tl.sum(g,"),
    ]),
    ("rms_norm", run_far_apart("rms_norm"), [
        (FAULT, "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS"),
        (FAULT, "[:, None].to(tl.int64)", "[:, None]"),
    ]),
    ("rope", compare("rope", 1, 3, 5, 3, 12), [
        (FAULT, " & (kv_head < kv_heads)", ""),
        (WRONG, "if INVERSE:", "if False:"),
    ]),
    ("rope", check_unknown_positions, [
        (FAULT, "(position >= 0) & (position < length)", "position >= 0"),
    ]),
    ("rope", run_rope_far_by("tokens"), [
        (FAULT, "tl.program_id(0).to(tl.int64) * TOKENS", "tl.program_id(0) * TOKENS"),
    ]),
    ("rope", run_rope_far_by("heads"), [
        (FAULT, "[None, :, None].to(tl.int64)", "[None, :, None]"),
    ]),
    ("swiglu", compare("swiglu", 3, 100), [
        (FAULT, "inside = column < columns", "inside = column >= 0"),
        (WRONG, "(1 + gate * (1 - sigmoid))", "(1 + gate)"),
    ]),
    ("swiglu", run_far_apart("swiglu"), [
        (FAULT, "(program // blocks).to(tl.int64)", "program // blocks"),
    ]),
    ("linear_cross_entropy", lambda chip: check_kernel_alone(*rows_of_logits(chip)), [
        (FAULT, "column < columns).to", "column >= 0).to"),
        (FAULT, "(target >= 0) & (target < columns)", "target < columns"),
        (WRONG, "total * tl.exp(before - largest)", "total"),
        (WRONG, "tl.where(column == hot, 1.0, 0.0)", "0.0"),
    ]),
    ("linear_cross_entropy", launch_far, [
        (FAULT, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    ]),
    ("int4_linear", compare("int4_linear", 3, 3, 1152), [
        (FAULT, "tl.minimum(n, N - 1)", "n"),
        (WRONG, ", mask=inside[:, None], other=0.0", ""),  # the last group again
        (FAULT, "mask=present, other=0.0", ""),
        (WRONG, "& 15) - 8", "& 15) - 7"),
        (WRONG, "tl.sum(acc, 0) * 64", "tl.max(acc, 0) * 64"),  # the share of one warp
    ]),
    ("int4_linear", run_far_apart("int4_linear"), [
        (FAULT, "tl.minimum(n, N - 1).to(tl.int64)", "tl.minimum(n, N - 1)"),
    ]),
    ("attention_forward", attend, [
        (WRONG, ">= (n + BLOCK_M - BLOCK_N)[", ">= (0 * n)["),
        (WRONG, ">= first_key[:, None]", ">= 0 * first_key[:, None]"),
        (WRONG, "tl.load(first_keys_ptr + tl.minimum(first_m + BLOCK_M, queries) - 1)", "lowest"),
        (WRONG, "head // (HEADS // KV_HEADS) * D", "head % KV_HEADS * D"),
        (WRONG, "acc * alpha[:, None], new_max", "acc, new_max"),
        (WRONG, "tl.range(0, unmasked, BLOCK_N,", "tl.range(BLOCK_N, unmasked, BLOCK_N,"),
        (WRONG, "tl.range(0, rest,", "tl.range(0, 0 * rest,"),
        (FAULT, "mask=inside[:, None])\n", "mask=inside[:, None] | True)\n"),
        (WRONG, "mask = last & (queries", "mask = (tail < 0) & (queries"),  # lse not padded
    ]),
    ("attention_forward", attend_with_nan_in_others, [
        (WRONG, "lowest = tl.load(first_keys_ptr + first_m)", "lowest = first_m * 0"),
    ]),
    ("attention_backward", attend, [
        (WRONG, "(offs_m + shift)[:, None] >= offs_n[None, :]", "offs_n[None, :] >= -10000"),
        (WRONG, "offs_n[None, :] >= first_key[:, None]", "offs_n[None, :] >= -10000"),
        (WRONG, "head // (HEADS // KV_HEADS) * D", "head % KV_HEADS * D"),
        (WRONG, "tl.range(0, unmasked, BLOCK_N,", "tl.range(BLOCK_N, unmasked, BLOCK_N,"),
        (WRONG, "tl.range(0, rest,", "tl.range(0, 0 * rest,"),
        (WRONG, "0.0, mask=last)", "0.0, mask=last & (tail < 0))"),  # delta not padded
        (WRONG, "offs_n[:, None] >= first_key[None, :]", "offs_n[:, None] >= 0"),
        (WRONG, "kv_head * GROUP + g", "kv_head + g * KV_HEADS"),
        (FAULT, "dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None]",
         "dv.to(dv_ptr.dtype.element_ty)"),
    ]),
    ("attention_backward", attend_in_one_pass, [
        (WRONG, "dq = tl.dot(ds.T, k,", "dq = tl.dot(p.to(q.dtype).T, k,"),
        (WRONG, "dq_desc.atomic_add([batch, first_m,", "dq_desc.atomic_add([batch, first_m + 1,"),
    ]),
    ("attention_backward", attend_with_nan_in_others, [
        (WRONG, "lowest = tl.load(first_keys_ptr + first_m)", "lowest = 0"),
        (WRONG, "end = tl.load(ends_ptr", "end += 0 * tl.load(ends_ptr"),
    ]),
    ("attention_backward", attend_far, [
        (FAULT, "offs_m.to(tl.int64)[:, None] * d_out", "offs_m[:, None] * d_out"),
    ]),
    ("attention_forward", attend_far, [
        (FAULT, "offs_m.to(tl.int64)[:, None] * (HEADS", "offs_m[:, None] * (HEADS"),
    ]),
    ("attention_decode", decode, [
        (WRONG, "kv_head * GROUP + member", "kv_head + member * KV_HEADS"),
        (WRONG, 'tl.where(seen[None, :], scores, float("-inf"))', "scores"),
        (FAULT, "seen = start + offs_n < keys", "seen = start + offs_n < keys + 64"),
        (WRONG, "tl.range(first, keys, step,", "tl.range(first, keys, 2 * step,"),
        (WRONG, "tl.dot(p, v, acc,", "tl.dot(p, v, acc * 0.5,"),
        (FAULT, "inside = member < GROUP", "inside = member >= 0"),
        (WRONG, "partial * weight[:, None]", "partial"),
    ]),
    ("attention_decode", decode_ragged, [
        (FAULT, "tl.load(positions_ptr + batch) + 1", "tl.load(positions_ptr + batch) * 0 + 2000"),
        (WRONG, "tl.load(positions_ptr + batch) + 1", "tl.load(positions_ptr + batch)"),
        (WRONG, "tl.where(row_sum > 0, row_sum, 1)[:, None]", "row_sum[:, None]"),
    ]),
]  # fmt: skip
# Pointers have offsets to get wrong, descriptors have not.
WITH_POINTERS = [
    ("attention_forward", attend_far, [
        (FAULT, "x_in + batch.to(tl.int64) * strides[0]", "x_in + batch * strides[0]"),
    ]),
    ("attention_decode", attend_far, [
        (FAULT, "k_ptr += batch.to(tl.int64)", "k_ptr += batch"),
        (FAULT, "v_ptr += step.to(tl.int64)", "v_ptr += step"),
    ]),
]  # fmt: skip
EACH = [
    pytest.param(chip, module, check, *fault, id=f"{module}: {' '.join(fault[2].split())}")
    for chip, mutants in ((90, MUTANTS), (80, WITH_POINTERS))
    for module, check, faults in mutants
    for fault in faults
]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("chip, module, attempt, error, old, new", EACH, indirect=["chip"])
def test_broken_kernels_are_caught(chip, monkeypatch, tmp_path, module, attempt, error, old, new):
    """What kernels/MODULE.py defines, with old replaced by new, takes the place of our own."""
    source = Path(kernels.launch.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    assert old in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(kernels.launch, "operator", lambda name, fake: lambda function: function)
    spec = importlib.util.spec_from_file_location("mutant", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    ours = sys.modules["kernels.attention" if "attention" in module else f"kernels.{module}"]
    for name, value in vars(broken).items():
        kernel = type(value).__name__ == "InterpretedFunction"
        function = isinstance(value, FunctionType) and value.__module__ == "mutant"
        if (kernel or function) and hasattr(ours, name):
            monkeypatch.setattr(ours, name, value)
    with pytest.raises(error):
        attempt(chip)
