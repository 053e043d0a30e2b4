import dataclasses
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import CUDA

import kernels
from kernels import launch

needs_triton = pytest.mark.skipif(not launch.installed, reason="needs triton")
no_gpu = pytest.mark.skipif(CUDA, reason="there is a GPU here")


@pytest.fixture(autouse=True)
def no_mode_leaks():
    yield
    kernels.use("auto")
    launch.say_once.cache_clear()


class CudaTensor:
    """All that the choice looks at."""

    is_cuda = True


@needs_triton
@no_gpu
@pytest.mark.parametrize(
    "capability, gpu",
    [(80, ("sm_80", 108, False)), (86, ("default", 82, False)), (90, ("sm_90", 132, True)),
     (100, ("sm_100", 148, True)), (120, ("default", 170, True))],
)  # fmt: skip
def test_the_class_of_a_gpu(capability, gpu):
    from gpuless.compiler import fake_gpu

    with fake_gpu(capability):
        assert launch.gpu() == launch.GPU(*gpu)
        assert launch.runs_triton(CudaTensor())
        assert not launch.runs_triton(torch.zeros(1))


@needs_triton
@no_gpu
def test_an_old_card_gets_the_definitions_and_one_line(monkeypatch, capsys):
    from gpuless import compiler

    ampere = compiler.CHIPS[86]
    turing = dataclasses.replace(ampere, block_shared=65_536)
    monkeypatch.setitem(compiler.CHIPS, 75, turing)
    with compiler.fake_gpu(75):
        assert not launch.runs_triton(CudaTensor()) and not launch.runs_triton(CudaTensor())
        with pytest.raises(ValueError, match=r"capability 8\.0 and 99 KB.*cuda 75 with 64 KB"):
            kernels.use("triton")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "this is cuda 75 with 64 KB" in lines[0]
    assert lines[0].endswith("torch's own operations are used")


def test_modes():
    with pytest.raises(ValueError, match="kernels are auto, triton, torch, not 'cuda'"):
        kernels.use("cuda")
    kernels.use("torch")
    assert not launch.runs_triton(CudaTensor())
    if not CUDA:
        message = "need a CUDA GPU" if launch.installed else "need the triton package"
        with pytest.raises(ValueError, match=message):
            kernels.use("triton")
        assert not launch.runs_triton(CudaTensor())  # a refused mode changes nothing


def test_rows_are_copied_only_if_they_must_be():
    x = torch.randn(4, 6, 10)
    assert launch.as_rows(x).data_ptr() == x.data_ptr()
    assert launch.as_rows(x[:, :, 2:5]).stride() == (10, 1)
    assert launch.as_rows(x[:, :, ::2]).stride() == (5, 1)
    assert launch.as_rows(x.new_ones(()).expand(4, 6, 10)).stride() == (10, 1)


def test_without_triton_all_operations_are_their_definitions():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
from kernels import launch
from model import Lucie, LucieConfig
assert not launch.installed
config = LucieConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1)
tokens = torch.arange(10)[None]
Lucie(config)(tokens, tokens).backward()
try:
    kernels.use("triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    why = "the Triton kernels need the triton package, which is for Linux"
    assert done.stdout == f"kernels=triton: {why}\n", done.stderr


def _plus(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


def test_operators_run_on_the_device_of_their_first_tensor(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or nullcontext())
    x, y = torch.ones(2, 8), torch.ones(8)
    op = launch.operator("plus", fake=lambda x, y: torch.empty_like(x))(_plus)
    assert torch.equal(op(x, y), x + y) and len(entered) == 1 and entered[0] is x


def test_one_rank_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    launch.say_once("nothing")
    monkeypatch.setenv("RANK", "0")
    launch.say_once("something")
    assert capsys.readouterr().err == "kernels: something\n"
