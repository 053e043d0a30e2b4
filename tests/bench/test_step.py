"""The benchmark of the step: which rows, in what order, what becomes of failures; its arithmetic.

Sides are imagined: a model of a few numbers that fails where it is told to. Real ones make their
steps in test_step_peers.py and test_gpu.py.
"""

import gc
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import launch
from torch import nn

import parallel
from bench import plan, step, step_peers, step_report, step_run
from bench.report import BenchError
from bench.step_run import Bench, layers_that_fit, settings
from config import Config
from config.cli import ConfigError

CPU = torch.device("cpu")
LARGE = 1e15
SHORT = Config(**step.TOY | dict(num_hidden_layers=8), seq_len=64, global_batch_size=4)
LONG = replace(SHORT, seq_len=160, global_batch_size=1, activation_checkpointing="full")


class Side:
    """Fails with what `fails(config)` returns; remembers what it was asked for."""

    def __init__(self, fails=lambda config: None):
        self.fails, self.asked = fails, []

    @contextmanager
    def __call__(self, config, device):
        self.asked.append(config)
        if error := self.fails(config):
            raise error
        model = nn.Embedding(config.vocab_size, 2)

        def loss(tokens, targets):
            assert tokens.shape == targets.shape == (config.micro_batch_size, config.seq_len)
            return model(tokens).square().mean()

        yield model, loss


def memory_for(layers, **more):
    """Out of memory with more layers."""

    def fails(config):
        if config.num_hidden_layers > layers or any(
            getattr(config, name) > most for name, most in more.items()
        ):
            return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return fails


FINE = dict.fromkeys(("loss", "grad_norm", "expected_loss", "expected_grad_norm"), 1.0)
FINE |= {"failure": None}


@pytest.fixture
def right(monkeypatch):
    """Every side is right, no profile is recorded, and a large product takes no time."""
    monkeypatch.setattr(step_peers, "compare", lambda side, device: FINE)
    monkeypatch.setattr(step_run.bench_kernels, "ceilings", lambda *args: {"GB/s": 1.0})
    monkeypatch.setattr(step_peers, "start", lambda device: None)
    monkeypatch.setattr(Bench, "profile", lambda *args: None)
    gc.freeze()  # what is here already need not be gone through after every row
    yield
    gc.unfreeze()


def run(tmp_path, sides, phases=(SHORT,), room=LARGE, minutes=5.0):
    sides = {name: side if isinstance(side, Side) else Side(side) for name, side in sides.items()}
    bench = Bench(list(phases), sides, CPU, tmp_path, room, minutes, most=1)
    results = bench.run()
    assert json.loads((tmp_path / "step.json").read_text()) == json.loads(json.dumps(results))
    return results


def told(results, *columns):
    return [tuple(row[column] for column in columns) for row in results["rows"]]


# --- order and choice -----------------------------------------------------------------------------


def test_what_matters_most_comes_first(right, tmp_path):
    sides = dict.fromkeys(["ours", "transformers", "transformers compiled", "liger"], None)
    results = run(tmp_path, {name: Side() for name in sides}, (SHORT, LONG))
    rows = told(results, "side", "seq_len", "micro_batches", "micro_batch_size")
    assert rows[:4] == [
        ("ours", 64, 4, 1),
        ("ours", 160, 1, 1),
        ("ours", 64, 2, 2),
        ("ours", 64, 1, 4),
    ]
    order = list(dict.fromkeys((side, length) for side, length, *_ in rows[4:]))
    assert order[:4] == [(s, n) for s in ("transformers", "liger") for n in (64, 160)]
    assert order[4:6] == [("transformers compiled", 64), ("transformers compiled", 160)]
    assert rows[-2:] == [("ours", 64, 4, 1), ("ours", 160, 2, 1)]
    assert results["rows"][-2]["gather_each_micro_batch"]  # and all others of ours do not
    mine = [row for row in results["rows"] if row["side"] == "ours"]
    assert sum(row["gather_each_micro_batch"] for row in mine) == 1
    assert results["stopped"] is None and results["not_begun"] == []


def planned(config):
    return sum(plan.peak(plan.Job(config, 1))[1].values())


def test_ours_takes_the_first_setting_that_fits(right, tmp_path):
    needs = [planned(choice) for choice in settings(LONG)]
    for room in sorted(needs):
        side = Side()
        run(tmp_path, {"ours": side}, (LONG,), room)
        first = next(i for i, need in enumerate(needs) if need <= room)
        assert side.asked[0] == list(settings(LONG))[first]
    names = [(c.activation_checkpointing, c.gather_each_micro_batch) for c in settings(LONG)]
    assert names == [(m, g) for m in ("none", "selective", "full") for g in (False, True)]


def test_where_the_plan_errs_the_next_setting_is_tried(right, tmp_path):
    def fails(config):
        if config.activation_checkpointing == "none":
            return RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    results = run(tmp_path, {"ours": fails}, (LONG,))
    first = [row for row in results["rows"] if row["micro_batches"] == 1]
    modes = [(r["activation_checkpointing"], r["memory"], bool(r["failure"])) for r in first]
    assert modes == [("none", True, True), ("none", True, True), ("selective", False, False)]


def test_a_peer_gets_its_best_setting(right, tmp_path):
    """Without recomputation one sample fits, weights gathered each time; with it two do."""

    def fails(config):
        none, size = config.activation_checkpointing == "none", config.micro_batch_size
        if size > (1 if none else 2) or (none and not config.gather_each_micro_batch):
            return torch.OutOfMemoryError("CUDA out of memory")

    peer = Side(fails)
    results = run(tmp_path, {"ours": Side(), "transformers": peer})
    tried = [
        (c.activation_checkpointing, c.micro_batch_size, c.gather_each_micro_batch)
        for c in peer.asked
    ]
    each = [("none", 1, False), ("none", 1, True), ("none", 2, False), ("none", 2, True)]
    assert tried == each + [("full", 4, False), ("full", 4, True), ("full", 2, False)]
    fastest = step_report.best(results)[64, 8, 4]["transformers"]
    speeds = [r["tokens_per_second"] for r in results["rows"] if r["side"] == "transformers"]
    assert fastest["tokens_per_second"] == max(filter(None, speeds))


def test_a_peer_is_not_asked_for_what_cannot_fit_it(right, tmp_path):
    """Some keep as little as we do when norms and gates are made again, nobody less."""
    phase = replace(LONG, seq_len=1024)
    modes = ("none", "selective", "full")
    needs = [planned(replace(phase, activation_checkpointing=mode)) for mode in modes]
    assert needs[0] > 1.1 * needs[1] > 1.1 * 1.1 * needs[2]
    for room, expected in ((needs[1], {"none", "full"}), (0.999 * needs[1], {"full"})):
        peer = Side()
        run(tmp_path, {"ours": Side(), "transformers": peer}, (phase,), room)
        assert {c.activation_checkpointing for c in peer.asked} == expected
        none = [c for c in peer.asked if c.activation_checkpointing == "none"]
        assert all(c.gather_each_micro_batch for c in none)


# --- failures -------------------------------------------------------------------------------------


def test_a_peer_that_cannot_is_told_once_and_the_others_go_on(right, tmp_path):
    broken = Side(lambda config: ValueError("no such\nattribute"))
    sides = {"ours": Side(), "transformers": broken, "liger": Side()}
    results = run(tmp_path, sides, (SHORT, LONG))
    rows = [row for row in results["rows"] if row["side"] == "transformers"]
    assert [row["failure"] for row in rows] == ["ValueError: no such attribute"]
    assert not rows[0]["memory"] and len(broken.asked) == 1
    assert any(row["side"] == "liger" and row["seq_len"] == 160 for row in results["rows"])
    assert "no such attribute" in step_report.table(results)


def test_one_that_is_wrong_is_not_timed(right, tmp_path, monkeypatch):
    ours, peer = Side(), Side()
    found = {ours: FINE, peer: FINE | {"failure": "wrong: loss 5 for 4"}}

    def compare(side, device):
        if side is ours:
            return FINE
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    monkeypatch.setattr(step_peers, "compare", lambda side, _: found[side])
    results = run(tmp_path, {"ours": ours, "transformers": peer})
    assert peer.asked == [] and ours.asked
    rows = [row["failure"] for row in results["rows"] if row["side"] == "transformers"]
    assert rows == ["wrong: loss 5 for 4"]
    monkeypatch.setattr(step_peers, "compare", compare)
    results = run(tmp_path, {"ours": ours, "transformers": peer})
    rows = [row["failure"] for row in results["rows"] if row["side"] == "transformers"]
    assert rows == ["ModuleNotFoundError: No module named 'liger_kernel'"]


def test_an_interruption_leaves_what_is_known(right, tmp_path):
    def fails(config):
        if config.seq_len == 160:
            raise KeyboardInterrupt

    results = run(tmp_path, {"ours": fails, "transformers": Side()}, (SHORT, LONG))
    assert results["stopped"] == "by hand" and len(results["rows"]) == 1
    assert results["not_begun"][0] == "ours at 160" and len(results["not_begun"]) == 9
    assert list(tmp_path.iterdir()) == [tmp_path / "step.json"]  # no half of one beside it
    assert "stopped by hand; not begun: ours at 160" in step_report.table(results)


def test_a_time_table_without_a_kernel_is_none(tmp_path, monkeypatch):
    """On a GPU; the host's operations alone would be held against its floors."""
    bench = Bench([SHORT], {}, torch.device("cpu"), tmp_path, 1e9, 1)
    bench.device = torch.device("cuda")
    monkeypatch.setattr(step_run.step_profile, "record", lambda *_: 1.0)
    for category in ("cpu_op", "cuda_runtime"):
        monkeypatch.setattr(step_run.step_profile, "read", lambda _, c=category: [{"cat": c}])
        with pytest.raises(RuntimeError, match="no kernel was recorded"):
            bench.profile(SHORT, lambda: None, 1.0)


def test_a_setting_that_torch_does_not_have_ends_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", seen.append, raising=False)
    assert step.set_allocator("a:True") == "a:True" and seen == ["a:True"]
    monkeypatch.delattr(torch.cuda.memory, "_set_allocator_settings")
    assert step.set_allocator("a:True").startswith("not a:True: ")


@pytest.mark.parametrize(
    "card,flops",
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_the_peak_is_of_the_card(monkeypatch, card, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card)
    assert parallel.peak_flops(torch.device("cuda")) == flops


def test_an_error_of_the_measuring_itself_stops_nobody_else(right, tmp_path, monkeypatch):
    best = Bench.best

    def fails(self, name, config):
        if name == "transformers":
            raise ZeroDivisionError("by nothing")
        best(self, name, config)

    monkeypatch.setattr(Bench, "best", fails)
    results = run(tmp_path, {"ours": Side(), "transformers": Side(), "liger": Side()})
    assert results["errors"] == {"transformers at 64": "ZeroDivisionError: by nothing"}
    assert "transformers at 64: ZeroDivisionError: by nothing" in step_report.table(results)
    assert {row["side"] for row in results["rows"]} == {"ours", "liger"}
    assert results["stopped"] is None and results["not_begun"] == []


def test_a_start_that_fails_is_told(right, tmp_path, monkeypatch):
    def fails(device):
        raise RuntimeError("no process group")

    monkeypatch.setattr(step_peers, "start", fails)
    results = run(tmp_path, {"ours": Side()})
    assert results["stopped"] == "at the start: RuntimeError: no process group"
    assert json.loads((tmp_path / "step.json").read_text())["stopped"] == results["stopped"]
    assert "no process group" in step_report.table(results)


def test_the_file_is_whole_after_every_row(right, tmp_path):
    seen = []

    def fails(config):
        if (tmp_path / "step.json").exists():
            seen.append(len(json.loads((tmp_path / "step.json").read_text())["rows"]))

    run(tmp_path, {"ours": fails})
    assert seen == list(range(1, len(seen) + 1)) and len(seen) > 2


def test_nothing_is_begun_after_its_minutes(right, tmp_path, monkeypatch):
    side = Side()
    results = run(tmp_path, {"ours": side}, minutes=0)
    assert side.asked == [] and results["rows"] == []
    assert results["stopped"] == "after 0 minutes" and len(results["not_begun"]) == 5
    clock = iter(range(0, 100_000, 50))
    monkeypatch.setattr(step_run.time, "monotonic", lambda: next(clock))
    results = run(tmp_path, {"ours": Side()}, minutes=2)
    assert results["not_begun"] and 0 < len(results["rows"]) < 4


def test_a_profile_that_fails_costs_no_row(right, tmp_path, monkeypatch):
    def profile(*args):
        raise RuntimeError("CUPTI is busy")

    monkeypatch.setattr(Bench, "profile", profile)
    results = run(tmp_path, {"ours": Side()})
    assert results["rows"][0]["failure"] is None
    assert results["profiles"] == [{"seq_len": 64, "failure": "RuntimeError: CUPTI is busy"}]
    assert "no time table at 64: RuntimeError: CUPTI is busy" in step_report.table(results)


def test_a_lost_gpu_ends_it(right, tmp_path, monkeypatch):
    def lost(self):
        raise step_run.GPULost("illegal memory access")

    monkeypatch.setattr(Bench, "clear", lambda self: None)
    monkeypatch.setattr(
        Bench, "timed", lambda self, *a: monkeypatch.setattr(Bench, "clear", lost) or 1 / 0
    )
    results = run(tmp_path, {"ours": Side(), "transformers": Side()})
    assert results["stopped"] == "with the GPU: illegal memory access"
    assert [row["failure"] for row in results["rows"]] == ["ZeroDivisionError: division by zero"]


# --- fewer layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "peaks,room,layers",
    [
        ({2: 10.0, 4: 14.0}, 30.0, 12),  # 6 and 2 a layer
        ({2: 10.0, 4: 14.0}, 29.9, 11),
        ({4: 14.0, 2: 10.0}, 1000.0, 31),  # no more than asked for
        ({2: 10.0, 4: 14.0}, 7.9, 0),
        ({2: 10.0, 4: 14.0}, 8.0, 1),
        ({2: 10.0}, 30.0, 0),
        ({}, 30.0, 0),
    ],
)
def test_layers_that_fit(peaks, room, layers):
    assert layers_that_fit(peaks, room, most=31) == layers


def test_where_a_peer_does_not_fit_all_have_as_many_layers_as_it(right, tmp_path, monkeypatch):
    """Its two small models take 3 and 4 GB, of 7: 1 and 2 layers; so 5 fit it."""
    sides = {"ours": Side(), "transformers": Side(memory_for(5)), "liger": Side(memory_for(7))}
    peaks = iter([3e9, 4e9])
    small, reserved = [], {"reserved": None}

    def memory(device):
        last = sides["transformers"].asked[-1] if sides["transformers"].asked else None
        if last and last.num_hidden_layers < 3 and len(small) < 2:
            small.append(last)
            return {"allocated": next(peaks)} | reserved
        return {
            "allocated": 1e9 * (sides["liger"].asked or [LONG])[-1].num_hidden_layers
        } | reserved

    monkeypatch.setattr(step_run, "memory", memory)
    results = run(tmp_path, sides, (LONG,), room=7e9)
    assert [(c.num_hidden_layers, c.activation_checkpointing) for c in small] == [
        (1, "full"), (2, "full")
    ]  # fmt: skip
    at_5 = {row["side"] for row in results["rows"] if row["layers"] == 5 and not row["failure"]}
    assert at_5 == set(sides)
    assert {layers for _, layers, _ in step_report.best(results)} == {1, 2, 5, 8}


def test_what_cannot_fit_is_said_in_gb_and_not_tried(right, tmp_path):
    """Ours and peers alike; then as many layers as the plan finds room for."""
    room = planned(replace(SHORT, num_hidden_layers=5)) * 1.001
    ours, peer = Side(), Side()
    results = run(tmp_path, {"ours": ours, "transformers": peer}, (SHORT,), room)
    all_layers = [row for row in results["rows"] if row["layers"] == 8]
    assert {row["side"] for row in all_layers} == {"ours", "transformers"}
    needed = min(planned(choice) for choice in settings(SHORT))
    for row in all_layers:
        assert row["memory"] and row["failure"].startswith("does not fit: needs ")
        assert row["failure"].endswith(f"there are {room / 1e9:.1f} GB")
    assert f"needs {needed / 1e9:.1f} GB" in all_layers[0]["failure"]
    assert {c.num_hidden_layers for c in ours.asked} >= {5}
    assert max(c.num_hidden_layers for c in ours.asked + peer.asked) <= 5
    choice = replace(SHORT, num_hidden_layers=6)
    assert planned(choice) > room  # one more would not have


# --- arithmetic -----------------------------------------------------------------------------------


def test_both_conventions_of_mfu():
    """Lucie-7B by hand; 989.4 TFLOP/s."""
    n = 6_706_958_336 - 65_024 * 4096
    for config in step.phases_of(False, None):
        causal, full = step_run.flops_per_token(config)
        assert causal == 6 * n + 6 * 32 * 4096 * config.seq_len
        assert full == 6 * n + 12 * 32 * 4096 * config.seq_len


def test_a_row_by_hand(right, tmp_path, monkeypatch, capsys):
    times = iter([9.0, 2.0, 0.5, 1.0])  # the first step compiles
    monkeypatch.setattr(step_run, "seconds", lambda *args: next(times))
    bench = Bench([SHORT], {"ours": Side()}, CPU, tmp_path, LARGE, 5, most=3)
    bench.results["peak_flops"] = 1e12
    bench.ours(replace(SHORT, activation_checkpointing="none"))
    (row,) = bench.results["rows"]
    assert row["seconds"] == [2.0, 0.5, 1.0] and row["tokens_per_second"] == 4 * 64 / 1.0
    causal, full = step_run.flops_per_token(SHORT)
    assert row["mfu_causal"] == pytest.approx(256 * causal / 1e12)
    assert row["mfu_full"] == pytest.approx(256 * full / 1e12)
    assert row["planned"] == planned(next(settings(SHORT)))
    line = step_report.line(row | {"allocated": 3e9, "reserved": 4e9, "planned": 5e9})
    assert line.split()[-6:-3] == ["256", f"{row['mfu_causal']:.1%}", f"{row['mfu_full']:.1%}"]
    assert line.split()[-3:] == ["3.0", "4.0", "5.0"]


def test_no_more_steps_are_timed_than_needed(right, tmp_path, monkeypatch):
    times = iter([50.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(step_run, "seconds", lambda *args: next(times))
    Bench([SHORT], {"ours": Side()}, CPU, tmp_path, LARGE, 5, most=3).measure("ours", SHORT)
    assert next(times) == 4.0  # 8 seconds are over ENOUGH


def test_the_verdict_is_against_the_fastest_peer_in_the_same_step():
    common = {"mfu_causal": 0.5, "mfu_full": 0.6, "failure": None, "micro_batches": 1}

    def row(side, speed, layers=32, size=1, **change):
        row = common | {"side": side, "tokens_per_second": speed, "layers": layers}
        return row | {"seq_len": 4096, "micro_batch_size": size} | change

    rows = [row("ours", 90.0), row("ours", 100.0, micro_batches=1), row("transformers", 40.0)]
    rows += [row("liger", 80.0), row("ours compiled", 50.0), row("ours", 300.0, size=2)]
    rows += [row("liger", 1.0, layers=8), row("transformers", 999.0, failure="no")]
    both, alone = step_report.verdicts({"rows": rows})
    assert (both["tokens_per_second"], both["peer"], both["ratio"]) == (100.0, "liger", 1.25)
    assert (alone["samples"], alone["peer"], alone["ratio"]) == (2, None, None)
    assert step_report.verdict_line(both) == (
        "1 x 4,096 tokens, 32 layers: 100 tokens/s, MFU 50.0% causal, 60.0% full; "
        "1.25 x liger, the fastest peer"
    )
    assert step_report.verdict_line(alone).endswith("no peer ran")


@pytest.mark.parametrize(
    "rows,expected",
    [
        ([], False),
        ([("ours", None, False)], True),
        ([("ours", "out of memory", True)], False),
        ([("ours", "out of memory", True), ("ours", None, False)], True),
        ([("ours", "wrong", False), ("ours", None, False)], False),
        ([("ours", None, False), ("liger", "wrong", False)], True),
        ([("liger", None, False)], False),
    ],
)
def test_what_counts_as_a_failure(rows, expected):
    columns = ("side", "failure", "memory")
    rows = [dict(zip(columns, row)) for row in rows]
    assert step.ours_ran({"rows": rows, "errors": {}}) == expected
    assert step.ours_ran({"rows": rows, "errors": {"liger at 64": "x"}}) == expected
    assert not step.ours_ran({"rows": rows, "errors": {"ours at 64": "x"}})


# --- the 7B, planned ------------------------------------------------------------------------------


def test_lucie_on_an_h200(right, tmp_path):
    """141 GB: nothing recomputed at 4,096, everything but attention at 32,000."""
    side = Side()
    bench = Bench(step.phases_of(False, None), {"ours": side}, CPU, tmp_path, 141e9, 5)
    first = [next(c for c in settings(p) if bench.planned(c) <= 141e9) for p in bench.phases]
    assert [c.activation_checkpointing for c in first] == ["none", "full"]
    assert [c.seq_len for c in first] == [4096, 32_000]
    assert [c.num_hidden_layers for c in first] == [32, 32]
    assert 10 < Bench.layers_planned(bench_with(bench, 80e9), bench.phases[0]) < 24
    assert 10 < Bench.layers_planned(bench_with(bench, 80e9), bench.phases[1]) < 24


def bench_with(bench, room):
    bench.room = room
    return bench


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--toy", "--seq-len", "7"], "--seq_len is one of 64, 384, not 7"),
        (["--toy", "--sides", "theirs"], "no side 'theirs'; there are ours, transformers"),
        (["--replot", "nowhere.json"], "nowhere.json: No such file"),
        (["--replot", "pyproject.toml"], "pyproject.toml: not a step.json"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(arguments, told):
    with pytest.raises((BenchError, ConfigError)) as caught:
        step.main(arguments)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_the_exit_code_is_2():
    done = launch("bench.step", "--replot", "nowhere.json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "bench.step: nowhere.json: No such file or directory\n"
    with pytest.raises(ConfigError, match="nowhere"):
        step.main(["nowhere.py"])


def test_on_a_cpu_the_demo_model_takes_turns(monkeypatch):
    asked = []
    monkeypatch.setattr(step_peers, "show_turns", lambda *args: asked.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.main(["--rounds", "3"]) == 0
    ((path, config, dtypes, rounds),) = asked
    assert path == "config/demo_pretrain.py" and config.name == "demo_pretrain"
    assert dtypes == ["float32", "bfloat16"] and rounds == 3


@pytest.mark.slow
def test_pictures(right, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    sides = {"ours": Side(), "transformers": Side(), "liger": Side()}
    results = run(tmp_path, sides, (SHORT, LONG))
    for row in results["rows"]:
        row["mfu_causal"] = row["tokens_per_second"] and row["tokens_per_second"] / 1e5
    rows = [
        {"group": "gaps", "ms": 9.0, "floor_ms": 0.0, "of_step": 0.9},
        {"group": "norms, forward", "ms": 1.0, "floor_ms": 2.0, "of_step": 0.1},
        {"group": "other", "ms": 0.001, "floor_ms": 0.0, "of_step": 0.0001},
    ]
    results["profiles"] = [{"seq_len": 64, "failure": None, "title": "a step", "rows": rows}]
    results["profiles"].append({"seq_len": 160, "failure": "none"})
    paths = step_report.plot(results, tmp_path)
    assert [path.name for path in paths] == ["step.png", "step_64.png"]
    for path in paths:
        pixels = image.imread(path)[..., :3]
        assert (abs(pixels - (0.84, 0.15, 0.16)).sum(-1) < 1.2).any()  # our red
