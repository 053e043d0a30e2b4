"""The sides of bench.step compute the same loss, and make the step of an independent loop."""

import importlib.util
import math
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import CUDA
from torch import nn

import kernels
import parallel
from bench import step_peers
from config import Config
from model import Lucie

CPU = torch.device("cpu")
SMALL = Config(**step_peers.SMALL | dict(vocab_size=96, hidden_size=64, intermediate_size=96))
SMALL = replace(SMALL, seq_len=24, dtype="float32")
needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs transformers"
)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    step_peers.start(torch.device("cuda", 0) if CUDA else CPU)  # a GPU's serves a CPU, too
    yield
    dist.destroy_process_group()


def test_ours_comes_first():
    names = list(step_peers.sides(CPU))
    assert names[0] == step_peers.OURS and len(names) == 5


SLOW = {"ours compiled", "transformers compiled"}  # a compiler at work


@needs_transformers
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW))
        for n in ("ours", "transformers", *sorted(SLOW))
    ],
)
def test_losses_and_gradients_are_those_of_our_definitions(name):
    found = step_peers.compare(step_peers.sides(CPU)[name], CPU)
    assert found["failure"] is None
    assert found["loss"] == pytest.approx(found["expected_loss"], rel=1e-2)
    assert found["grad_norm"] == pytest.approx(found["expected_grad_norm"], rel=3e-2)
    assert found["loss"] < 0.6 * math.log(step_peers.SMALL["vocab_size"])  # no mere guess
    assert found["loss"] != found["expected_loss"]  # another way to compute it


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name,needed", [("ours", "torch"), ("liger", "liger_kernel")])
def test_so_they_are_on_the_chip(name, needed):
    pytest.importorskip(needed)
    device = torch.device("cuda", 0)
    found = step_peers.compare(step_peers.sides(device)[name], device)
    assert found["failure"] is None


@needs_transformers
@pytest.mark.parametrize(
    "change",
    [
        dict(rope_theta=2e4),
        dict(rms_norm_eps=0.1),
    ],
)
def test_a_side_that_computes_something_else_is_found_out(change):
    found = step_peers.compare(
        lambda config, device: step_peers.transformers(replace(config, **change), device), CPU
    )
    assert found["failure"].startswith("wrong: loss ")


def test_no_number_is_not_right_either():
    @contextmanager
    def side(config, device):
        with step_peers.ours(config, device) as (model, loss):
            yield model, lambda *args: loss(*args) * math.nan

    assert step_peers.compare(side, CPU)["failure"].startswith("wrong: loss nan")


def test_weights_that_are_not_all_there_are_an_error():
    model = Lucie(step_peers.architecture(SMALL))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model differ in more\.weight$"):
        model.more = nn.Linear(2, 2, bias=False)
        step_peers.load_ours(model, weights, model.config)


# --- what a side changes elsewhere ---------------------------------------------------------------


@needs_transformers
def test_ligers_patch_is_undone(monkeypatch):
    from transformers.models.llama import modeling_llama as llama

    def apply(fused_linear_cross_entropy):
        assert fused_linear_cross_entropy
        llama.LlamaRMSNorm = type("Patched", (llama.LlamaRMSNorm,), {})
        llama.apply_rotary_pos_emb = None
        llama.LlamaForCausalLM.forward = None

    liger = types.ModuleType("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    before = dict(vars(llama)), llama.LlamaForCausalLM.forward
    with step_peers.transformers(SMALL, CPU, liger=True) as (model, _):
        assert "Patched" in type(model.model.norm).__name__
        assert llama.LlamaForCausalLM.forward is None
    assert (dict(vars(llama)), llama.LlamaForCausalLM.forward) == before


@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="it is here")
def test_without_liger_its_side_cannot_be_built():
    with pytest.raises(ModuleNotFoundError, match="liger_kernel"):
        with step_peers.sides(CPU)["liger"](SMALL, CPU):
            pass


def test_the_choice_of_kernels_is_restored():
    with pytest.raises(ZeroDivisionError), step_peers.ours(SMALL, CPU, "torch"):
        assert kernels.use("torch") == "torch"
        raise ZeroDivisionError
    assert kernels.use("auto") == "auto"


@needs_transformers
def test_transformers_recomputes_when_asked():
    for mode, asked in (("none", False), ("full", True)):
        config = replace(SMALL, activation_checkpointing=mode)
        with step_peers.transformers(config, CPU) as (model, _):
            assert model.is_gradient_checkpointing == asked


# --- the step -------------------------------------------------------------------------------------


def weights_after(config, steps=2):
    with step_peers.ours(config, CPU) as (model, loss):
        step_peers.fill(model, CPU, 0.1)
        start = {n: parallel.local_rows(p)[0].clone() for n, p in model.named_parameters()}
        step = step_peers.make_step(model, loss, config, CPU)
        for _ in range(steps):
            step()
        assert all(p.grad is None for p in model.parameters())
        end = {n: parallel.local_rows(p)[0].clone() for n, p in model.named_parameters()}
    return start, end


@pytest.mark.parametrize(
    "size,gather_each,clip", [(1, False, 0.02), (1, False, 0), (2, True, 0), (4, False, 0.02)]
)
def test_the_step_is_that_of_a_plain_loop(size, gather_each, clip):
    """No sharding, no accumulation, torch's own clipping: all samples at once. eps is large, or
    AdamW would not tell a gradient from twice as much."""
    config = replace(SMALL, global_batch_size=4, micro_batch_size=size, clip_grad=float(clip))
    config = replace(config, gather_each_micro_batch=gather_each, weight_decay=5.0, eps=1e-3)
    start, end = weights_after(config)
    plain = Lucie(step_peers.architecture(config))
    plain.load_state_dict(start)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.ndim == 2]},
            {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0},
        ],
        lr=1e-5,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=5.0,
    )
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(96, (4, 25), generator=generator)
    for _ in range(2):
        optimizer.zero_grad()
        loss = plain(samples[:, :-1], samples[:, 1:])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        assert norm > 0.02  # it does clip
        optimizer.step()
    for name, parameter in plain.named_parameters():
        moved = (parameter - start[name]).norm()
        # Each of both loops rounds a weight twice, by half a unit in its last place at most.
        rounding = 2 * torch.finfo(torch.float32).eps * parameter.norm()
        assert moved > 2 * rounding
        assert (end[name] - parameter).norm() < 2e-3 * moved + rounding, name


def test_only_the_last_micro_batch_is_said_to_be(monkeypatch):
    said, real = [], parallel.micro_batch

    def micro_batch(model, last, *how):
        said.append((last, *how))
        return real(model, last, *how)

    monkeypatch.setattr(parallel, "micro_batch", micro_batch)
    config = replace(SMALL, global_batch_size=3, gather_each_micro_batch=False)
    weights_after(config, steps=1)
    assert said == [(False, True, False), (False, True, False), (True, True, False)]


def test_random_weights_are_as_asked():
    with step_peers.ours(SMALL, CPU) as (model, _):
        step_peers.fill(model, CPU, 0.009)
        for parameter in model.parameters():
            rows, _ = parallel.local_rows(parameter)
            if rows.ndim == 1:
                assert (rows == 1).all()
            else:
                assert rows.std() == pytest.approx(0.009, rel=0.1)


# --- in turns, on a CPU ---------------------------------------------------------------------------


@needs_transformers
def test_the_table_of_turns(capsys):
    config = replace(SMALL, micro_batch_size=2)
    step_peers.show_turns("config/x.py", config, ["float32"], rounds=2)
    first, _, _, row = capsys.readouterr().out.splitlines()
    assert first == "config/x.py: 2 x 24 tokens a step, CPU,"
    name, mine, _, theirs, _, ratio = row.split()
    assert name == "float32" and float(mine.replace(",", "")) > 0 < float(theirs.replace(",", ""))
    assert float(ratio) > 0
