"""The training step beside its baselines, rehearsed with a tiny model. Its times are no oracle."""

import importlib.util
import json
import math
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import kernels
import parallel
from bench import step
from bench.step import OURS
from config import Config
from config.cli import ConfigError
from model import Lucie

CPU = torch.device("cpu")
SMALL = replace(step.SMALL, vocab_size=96, hidden_size=64, intermediate_size=96)
SMALL = replace(SMALL, seq_len=24, dtype="float32", global_batch_size=4)
needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs transformers"
)


@pytest.fixture
def one_rank():
    """On a GPU there is a process group, and so FSDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- do they compute the same? --------------------------------------------------------------------


@needs_transformers
@pytest.mark.parametrize(
    "name", [OURS, "transformers", pytest.param("ours compiled", marks=pytest.mark.slow)]
)
def test_losses_and_gradients_are_those_of_our_definitions(name, one_rank):
    assert step.compare(step.IMPLEMENTATIONS[name], CPU) is None
    assert kernels.use("auto") == "auto"  # as it was before


@needs_transformers
def test_an_implementation_with_another_theta_is_found():
    def build(config, device):
        return step.transformers(replace(config, rope_theta=2e4), device)

    assert step.compare(build, CPU).startswith("wrong: loss ")


@pytest.mark.parametrize(
    "wrong,what",
    [
        (lambda loss: loss * math.nan, "loss nan"),
        (lambda loss: 2 * loss - loss.detach(), "gradient norm"),
    ],
)
def test_a_wrong_gradient_or_nan_is_found(wrong, what):
    @contextmanager
    def build(config, device):
        with step.ours(config, device) as (model, loss):
            yield model, lambda *args: wrong(loss(*args))

    assert step.compare(build, CPU).startswith(f"wrong: {what}")


@needs_transformers
def test_ligers_patch_is_undone(monkeypatch):
    from transformers.models.llama import modeling_llama as llama

    def apply(fused_linear_cross_entropy):
        assert fused_linear_cross_entropy
        llama.LlamaRMSNorm = type("Patched", (llama.LlamaRMSNorm,), {})
        llama.LlamaForCausalLM.forward = None

    liger = types.ModuleType("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    before = dict(vars(llama)), llama.LlamaForCausalLM.forward
    with step.IMPLEMENTATIONS["liger"](SMALL, CPU) as (model, _):
        assert "Patched" in type(model.model.norm).__name__
    assert (dict(vars(llama)), llama.LlamaForCausalLM.forward) == before


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size,gather_each,clip", [(1, False, 0.02), (2, True, 0)])
def test_the_step_is_that_of_a_plain_loop(size, gather_each, clip, sharded, request):
    """No sharding, no accumulation, torch's own clipping: all samples at once. eps is large, or
    AdamW would not tell a gradient from twice as much."""
    if sharded:
        request.getfixturevalue("one_rank")
    config = replace(SMALL, micro_batch_size=size, clip_grad=float(clip), weight_decay=5.0)
    config = replace(config, gather_each_micro_batch=gather_each, eps=1e-3)
    plain = Lucie(step.architecture(config))
    generator = torch.Generator().manual_seed(0)
    for p in plain.parameters():
        nn.init.ones_(p) if p.ndim == 1 else nn.init.normal_(p, 0, 0.1, generator)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    with step.ours(config, CPU) as (model, loss):
        for name, p in model.named_parameters():
            parallel.fill_rows(p, 0, start[name])
        make = step.make_step(model, loss, config, CPU)
        make(), make()
        end = {n: parallel.local_rows(p)[0].clone() for n, p in model.named_parameters()}
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 5.0},
        {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=betas, eps=config.eps)
    samples = torch.randint(96, (4, 25), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        plain(samples[:, :-1], samples[:, 1:]).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        assert norm > 0.02  # it does clip
        optimizer.step()
    for name, parameter in plain.named_parameters():
        moved = (parameter - start[name]).norm()
        # Each of both loops rounds a weight twice, by half a unit in its last place at most.
        rounding = 2 * torch.finfo(torch.float32).eps * parameter.norm()
        assert moved > 2 * rounding
        assert (end[name] - parameter).norm() < 2e-3 * moved + rounding, name


# --- the run --------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Measurements by hand: (name, mode, profiled) of each, and what each of them gives."""
    calls, speeds = [], {}

    def measure(name, config, device, profiled):
        calls.append((name, config.activation_checkpointing, profiled))
        found = speeds[name](config) if callable(speeds.get(name)) else speeds.get(name, 1.0)
        row = {"seconds": [found] * 3, "allocated": 5e9}
        return row | ({"operations": "aten::mm"} if profiled else {})

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "compare", lambda build, device: None)
    return calls, speeds


def run(tmp_path, names, rounds=2, minutes=1.0, config=SMALL):
    return step.run(config, names, CPU, tmp_path, rounds, minutes)


def test_all_take_turns_and_the_ratio_is_the_median_of_the_rounds(measured, tmp_path, monkeypatch):
    calls, speeds = measured
    slow = iter([1.0, 3.0, 2.0])
    speeds |= {OURS: 1.0, "transformers": lambda config: next(slow)}
    monkeypatch.setattr(parallel, "peak_flops", lambda device: 1e12)
    results = run(tmp_path, [OURS, "transformers"], rounds=3)
    assert "".join(name[0] for name, _, _ in calls) == "ottoot"
    assert [profiled for _, _, profiled in calls] == [True] + [False] * 5
    tokens = 4 * 24  # a second
    assert results["rows"][0]["tokens_per_second"] == tokens
    flops = Lucie(step.architecture(SMALL)).flops_per_token(24)
    assert results["rows"][0]["mfu"] == pytest.approx(tokens * flops / 1e12)
    lines = step.table(results).splitlines()
    assert lines[-1] == "aten::mm"
    assert lines[3].split() == ["ours", "none", "96", f"{tokens * flops / 1e12:.1%}", "5.0"]
    assert lines[4].split()[-1] == "2.00"
    assert json.loads((tmp_path / "step.json").read_text()) == results


def test_where_memory_fails_the_next_activation_checkpointing_is_tried(measured, tmp_path):
    calls, speeds = measured

    def only_full(config):
        if config.activation_checkpointing != "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return 1.0

    def never(config):
        raise RuntimeError("CUBLAS error: out of memory")

    speeds |= {OURS: only_full, "transformers": only_full, "liger": never}
    results = run(tmp_path, [OURS, "transformers", "liger"])
    modes = {n: [mode for name, mode, _ in calls if name == n] for n in (OURS, "transformers")}
    assert modes[OURS] == ["none", "selective", "full", "full"]  # not tried again
    assert modes["transformers"] == ["none", "full", "full"]
    assert results["rows"][0]["activation_checkpointing"] == "full"
    assert [name for name, _, _ in calls].count("liger") == 2  # none, full; not in the next round
    assert "CUBLAS error: out of memory" in step.table(results)


def test_one_that_is_wrong_or_fails_stops_none_of_the_others(measured, tmp_path, monkeypatch):
    _, speeds = measured

    def fails(config):
        raise NotImplementedError("no such\nkernel")

    def compare(build, device):
        return "wrong: loss 1" if build is step.IMPLEMENTATIONS["transformers"] else None

    speeds["liger"] = fails
    monkeypatch.setattr(step, "compare", compare)
    results = run(tmp_path, ["transformers", "liger", OURS])
    assert [row["name"] for row in results["rows"]] == [OURS, OURS]
    assert results["failures"]["transformers"] == "ValueError: wrong: loss 1"
    assert results["failures"]["liger"] == "NotImplementedError: no such kernel"


def test_nothing_is_begun_after_its_minutes(measured, tmp_path):
    results = run(tmp_path, [OURS], minutes=0)
    assert results["stopped"] == "after 0 minutes" and results["rows"] == []
    assert json.loads((tmp_path / "step.json").read_text()) == results


@needs_transformers
@pytest.mark.slow
def test_the_command_at_toy_size(tmp_path, capsys):
    assert step.main(["--toy", "--rounds=2", f"--out={tmp_path}", "--num_hidden_layers=1"]) == 0
    results = json.loads((tmp_path / "step.json").read_text())
    assert {row["name"] for row in results["rows"]} == {OURS, "transformers"}
    assert results["failures"] == {} and results["config"]["num_hidden_layers"] == 1
    shown = capsys.readouterr().out
    assert "1 layers of 128" in shown and "aten::mm" in shown
    assert Config(**results["config"]).global_batch_size == 2


def test_an_impossible_model_is_told_in_a_line():
    with pytest.raises(ConfigError, match="hidden_size 90 is not a multiple"):
        step.main(["--toy", "--hidden_size=90"])
