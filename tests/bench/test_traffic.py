"""The step that is counted without a GPU: by hand for a tiny model, and each thing the check finds.

Kernels compile in a process of their own: those of this one may belong to the interpreter.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from bench import traffic
from bench.launches import WRITES, Made, Operation, size, total
from bench.savings import SAVINGS
from bench.traffic import Step
from config import Config
from config.cli import ConfigError
from gpuless.compiler import Launch

ROOT = Path(__file__).parents[2]
T, H, F, V, HEADS, KV, D, LAYERS = 256, 256, 384, 640, 2, 1, 128, 2
TINY = dict(
    hidden_size=H, intermediate_size=F, vocab_size=V, num_attention_heads=HEADS,
    num_key_value_heads=KV, num_hidden_layers=LAYERS, seq_len=T,
)  # fmt: skip

SCRIPT = f"""
import contextlib, io, json
from dataclasses import replace
import torch
import model, parallel, train
from bench import launches, traffic
from bench.launches import record
from bench.traffic import Step, faults, saved
from bench.savings import SAVINGS
from config import Config
from config.cli import ConfigError
from data.dataset import Share

config, found = Config(**{TINY}), {{}}

def say(config, micro_batches=1):
    step = Step(config, micro_batches, *record(config, micro_batches))
    rows = [
        (o.unit, o.phase, o.within, o.name, o.read, o.written, o.flops) for o in step.operations
    ]
    return {{"rows": rows, "faults": faults(step), "saved": [saved(step, s) for s in SAVINGS]}}

found["none"] = say(config)
found["three layers"] = say(replace(config, num_hidden_layers=3))
found["two"] = say(config, 2)
found["kept"] = say(replace(config, gather_each_micro_batch=False), 2)
for mode in ("selective", "full"):
    found[mode] = say(replace(config, activation_checkpointing=mode))

mlp = model.MLP.forward
model.MLP.forward = lambda self, x: mlp(self, x.float().bfloat16())
found["fp32 copy"] = say(config)
options = [f"--{{name}}={{value}}" for name, value in {TINY}.items() if name != "seq_len"]
options += ["--seq_len", "{T}"]
for check in ([], ["--check"]):
    hidden, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(said):
        code = traffic.main([*options, *check])
    found["main" + "".join(check)] = [code, said.getvalue()]
model.MLP.forward = lambda self, x: mlp(self, x * 2)
found["extra launch"] = say(config)
model.MLP.forward = lambda self, x: mlp(self, x * x[0, 0, 0].item())
try:
    say(config)
except ValueError as error:
    found["value asked for"] = str(error)
model.MLP.forward = mlp
writes = launches.WRITES.pop("_rope")
try:
    say(config)
except ValueError as error:
    found["unknown kernel"] = str(error)
launches.WRITES["_rope"] = writes

# the same step by train.py's own functions
def as_train_does(model, forward, optimizer, config, micro_batches, at):
    at("loss", "forward")
    ids = torch.empty(config.micro_batch_size, config.seq_len, dtype=torch.int64)
    share = Share(range(0), [(ids, ids)] * micro_batches, ids.numel() * micro_batches)
    train.accumulate_gradients(forward, share, config, torch.device("cpu"))
    at("clip", "step")
    parallel.clip_gradients(model, config.clip_grad)
    at("optimizer", "step")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

launches.make_step = as_train_does
launches.build_optimizer = lambda model: train.build_optimizer(config, model)
found["train"] = say(config, 2)
try:
    traffic.main(["--hidden_size=100"])
except ConfigError as error:
    found["said"] = str(error)
print(json.dumps(found))
"""


def python(*args: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret}
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def found() -> dict:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_of(rows: list, unit: str, phase: str) -> list[tuple]:
    return [
        (name, read, written) for u, p, _, name, read, written, _ in rows if (u, p) == (unit, phase)
    ]


# bytes of the stream, of a norm's weight, of its rstd
X, NORM, ROWS = 2 * T * H, 2 * H, 4 * T
Q, K, TABLES = 2 * T * HEADS * D, 2 * T * KV * D, 2 * 4 * T * D // 2
LSE = 4 * HEADS * (T + 256)  # padded
PACKED = (HEADS + 2 * KV) * D


def mm(m: int, k: int, n: int) -> tuple:
    return "mm", 2 * (m * k + k * n), 2 * m * n


FORWARD = [
    ("_rms_norm_forward", X + NORM, X + ROWS),
    mm(T, H, PACKED),
    ("_rope", Q + K + TABLES, Q + K),
    ("clone", K, K),
    ("zeros", 0, 4 * T),
    ("_attention_forward", Q + 2 * K + 4 * T, Q + LSE),
    mm(T, H, H),
    ("_rms_norm_forward", 2 * X + NORM, 2 * X + ROWS),
    mm(T, H, 2 * F),
    ("_swiglu_forward", 2 * T * 2 * F, 2 * T * F),
    mm(T, F, H),
    ("add", 2 * X, X),
]
PARTIAL = 4 * H * (T // 16)  # a row of d weight from each program, 16 rows of x to one
NORM_SUM = [("sum", PARTIAL, 4 * H), ("_to_copy", 4 * H, NORM)]
BACKWARD = [
    mm(H, T, F),
    mm(T, H, F),
    ("_swiglu_backward", 2 * T * F + 2 * T * 2 * F, 2 * T * 2 * F),
    mm(2 * F, T, H),
    mm(T, 2 * F, H),
    ("_rms_norm_backward", 3 * X + NORM + ROWS, X + PARTIAL),
    *NORM_SUM,
    mm(H, T, H),
    mm(T, H, H),
    ("_attention_backward_dq", 3 * Q + 2 * K + LSE, Q + LSE),
    ("_attention_backward_dkdv", 2 * Q + 2 * K + 2 * LSE, 2 * K),
    ("_rope", Q + K + TABLES, Q + K),
    ("cat", Q + 2 * K, Q + 2 * K),
    mm(PACKED, T, H),
    mm(T, PACKED, H),
    ("_rms_norm_backward", 2 * X + NORM + ROWS, X + PARTIAL),
    *NORM_SUM,
    ("add", 2 * X, X),
]
WEIGHTS = [H, PACKED * H, H * H, H, 2 * F * H, H * F]  # in the order of the block
GATHER = [op for n in WEIGHTS for op in (("_to_copy", 4 * n, 2 * n), ("copy_", 2 * n, 2 * n))]
BLOCK = sum(WEIGHTS)
REDUCE = [("_chunk_cat", 2 * BLOCK, 4 * BLOCK), ("copy_", 4 * BLOCK, 4 * BLOCK)]


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_block_by_hand(found, layer):
    rows, unit = found["none"]["rows"], f"layers.{layer}"
    assert rows_of(rows, unit, "forward") == FORWARD
    # the order of the two products of a layer is autograd's affair
    assert sorted(rows_of(rows, unit, "backward")) == sorted(BACKWARD)
    assert rows_of(rows, unit, "weights forward") == GATHER
    assert rows_of(rows, unit, "weights backward") == GATHER + REDUCE


@pytest.mark.slow
def test_the_rest_by_hand(found):
    rows = found["none"]["rows"]
    assert rows_of(rows, "embed_tokens", "forward") == [("embedding", 8 * T + X, X)]
    embedding = rows_of(rows, "embed_tokens", "backward")
    assert ("embedding_dense_backward", X + 8 * T, 2 * V * H) in embedding
    head = rows_of(rows, "lm_head", "forward")
    chunks = [(128, T), (128, T - 128)]  # rows, and targets from there to the end
    for n, rest in chunks:
        logits = 2 * n * V
        assert ("_cross_entropy", logits + 8 * rest, logits + 4 * rest) in head
    assert [row for row in head if row[0] == "mm"] == [
        mm(128, H, V),
        mm(128, V, H),
        mm(V, 128, H),
    ] * 2
    assert head.count(("add_", 6 * V * H, 4 * V * H)) == 2 and ("zero_", 0, 4 * V * H) in head
    assert ("ones_like", 0, 8) in head
    assert rows_of(rows, "lm_head", "backward") == [
        ("mul", X + 4, X),
        ("mul", 4 * V * H + 4, 4 * V * H),
        ("_to_copy", 4 * V * H, 2 * V * H),
    ]
    n = LAYERS * BLOCK + 2 * V * H + H
    adamw = [row for row in rows_of(rows, "optimizer", "step") if row[0] == "_fused_adamw_"]
    tensors = LAYERS * 6 + 3
    assert sum(read for _, read, _ in adamw) == 16 * n + 4 * tensors
    assert sum(written for *_, written in adamw) == 12 * n
    norms = [row for row in rows_of(rows, "clip", "step") if row[0] == "linalg_vector_norm"]
    assert (
        norms.count(("linalg_vector_norm", 12 * H, 8 * H + 8)) == 2 * LAYERS + 1
    )  # by way of fp64
    scaled = [row for row in rows_of(rows, "clip", "step") if row[0] == "_foreach_mul_"]
    assert scaled == [("_foreach_mul_", 4 * n + 4, 4 * n)]


@pytest.mark.slow
def test_products_make_the_flops_of_the_model(found):
    from model import Lucie, LucieConfig

    names = set(LucieConfig.__dataclass_fields__) & set(TINY)
    with torch.device("meta"):
        lucie = Lucie(LucieConfig(**{name: TINY[name] for name in names}))
    norms = sum(p.numel() for p in lucie.parameters() if p.ndim == 1)
    of_products = lucie.flops_per_token(T) - 6 * LAYERS * H * T - 6 * norms
    rows = found["none"]["rows"]
    assert sum(row[6] for row in rows if row[3] == "mm") == T * of_products
    attention = sum(row[6] for row in rows if "attention" in row[3])
    assert attention == LAYERS * (2 + 3 + 4) * HEADS * D * T**2


@pytest.mark.slow
def test_the_step_is_that_of_train(found):
    assert found["two"]["rows"] == found["train"]["rows"]


@pytest.mark.slow
def test_micro_batches_and_recomputation(found):
    two, kept = found["two"]["rows"], found["kept"]["rows"]
    assert rows_of(two, "layers.0", "forward") == 2 * FORWARD
    assert sorted(rows_of(two, "layers.1", "backward")) == sorted(2 * BACKWARD)
    assert rows_of(two, "layers.1", "weights forward") == 2 * GATHER
    assert rows_of(kept, "layers.1", "weights forward") == GATHER
    forward = [name for name, _, _ in FORWARD]
    for mode, again in (("selective", ["mm", "mm", "mm", "mm"]), ("full", ["mm"])):
        rows = found[mode]["rows"]
        assert rows_of(rows, "layers.0", "forward") == FORWARD
        backward = [name for name, _, _ in rows_of(rows, "layers.0", "backward")]
        left_out = [*again, "zeros", "_attention_forward", "add"]
        more = list(forward)
        for name in left_out:
            more.remove(name)
        assert sorted(backward) == sorted([name for name, _, _ in BACKWARD] + more)


@pytest.mark.slow
def test_the_check_finds_what_is_planted(found):
    for mode in ("none", "three layers", "two", "kept", "selective", "full"):
        assert found[mode]["faults"] == [], mode
    planted = found["fp32 copy"]["faults"]
    assert f"layers.0 forward: _to_copy makes float32 [1, {T}, {H}]" in planted
    assert f"layers.1 backward: _to_copy makes float32 [1, {T}, {H}]" in planted
    assert found["main"][0] == 0 and found["main--check"][0] == 1
    assert found["main"][1].splitlines() == found["main--check"][1].splitlines() == planted
    assert found["extra launch"]["faults"] == [
        f"layers.{layer} {phase}: {most + 1} launches, {most} are expected"
        for layer in range(LAYERS)
        for phase, most in (("forward", len(FORWARD)), ("backward", len(BACKWARD)))
    ]
    asked = found["value asked for"]
    assert asked == "layers.0 forward: the host asks the GPU for a value, and waits"
    assert found["unknown kernel"] == "kernel _rope has no row in WRITES of bench/launches.py"


@pytest.mark.slow
def test_savings_of_all_of_lucie_do_not_depend_on_the_blocks_recorded(found):
    for saving, two, three in zip(SAVINGS, found["none"]["saved"], found["three layers"]["saved"]):
        assert two == pytest.approx(three, rel=1e-3), saving.what
    by_what = dict(zip((saving.what for saving in SAVINGS), found["none"]["saved"]))
    every = traffic.LAYERS * BLOCK + 2 * V * H + H
    cast, again = (by_what[what] for what in by_what if "cast" in what)
    assert cast == pytest.approx((10 - 2) * every / T)
    assert again == pytest.approx(10 * traffic.LAYERS * BLOCK / T)
    fused = by_what["each block's last sum fused into the next one's norm"]
    assert fused == pytest.approx(traffic.LAYERS * 3 * X / T)


@pytest.mark.slow
def test_the_two_full_width_blocks_pass():
    done = python("-m", "bench.traffic", "--check")
    assert done.returncode == 0 and done.stderr == ""
    for kernel in WRITES:
        assert kernel in done.stdout
    assert "NOT ALLOWED" not in done.stdout
    table = done.stdout.partition("KB a token and block")[2].partition("\n\n")[0].splitlines()[1:]
    floors = {line.split("  ")[1]: line.split()[-2] for line in table}
    kv, hidden, wide, tokens = 2048, 8192, 24_576, 4096  # bytes of a token, and how many
    weights = 2 * 4096 * (4096 + 2048 + 4096 + 3 * 12_288)
    by_hand = {
        "products": 3 * (6 * hidden + 2 * kv + 3 * wide + weights / tokens),
        "attention": 6 * hidden + 6 * kv + 2 * 4 * 32,
        "norms and residual sums": 16 * hidden + 2 * 3 * hidden / tokens,
        "rotation, split of q|k|v": 4 * (hidden + kv) + 2 * 2 * 4 * 64,
        "SwiGLU": 8 * wide,
    }
    for name, figure in by_hand.items():
        assert floors[name] == f"{figure / 1e3:,.1f}", name
    assert table[0].split() == ["products", "221.2", "442.4", "663.6", "663.6", "1.00"]


# --- without compiling ----------------------------------------------------------------------------


def operation(name: str, unit: str = "layers.0", phase: str = "forward", spills: int = 0):
    launch = Launch(name, (1, 1, 1), 90, 8, 128, spills, 1024, {}, b"")
    return Operation(name, unit, phase, "", "bf16[1]", 2, 2, 0, launch)


def step(operations: list = (), made: list = (), **options: object) -> Step:
    return Step(replace(Config(**TINY), **options), 1, list(operations), list(made))


def test_spilling_kernels_are_named():
    record = step([operation("_rope", spills=8), operation("_swiglu_forward")])
    assert traffic.faults(record) == ["layers.0 forward: _rope spills 8 bytes"]


@pytest.mark.parametrize(
    "unit, phase, maker, dtype, shape, fault",
    [
        ("layers.1", "forward", "_to_copy", torch.float32, (1, T, D), True),
        ("layers.1", "forward", "mul", torch.float64, (T, H), True),
        ("layers.1", "forward", "mul", torch.float32, (T, D - 1), False),  # smaller than a head
        ("layers.1", "forward", "mul", torch.bfloat16, (T, H), False),
        ("lm_head", "forward", "linear_cross_entropy/new_empty", torch.float32, (V, H), False),
        ("lm_head", "forward", "linear_cross_entropy/new_empty", torch.float32, (T, H), True),
        ("lm_head", "backward", "mul", torch.float32, (V, H), False),
        ("lm_head", "backward", "mul", torch.float32, (T, H), True),
        ("norm", "backward", "rms_norm_backward/new_empty", torch.float32, (264, H), False),
        ("norm", "backward", "rms_norm_backward/new_empty", torch.float32, (4096, H), True),
        ("layers.1", "weights backward", "empty", torch.float32, (BLOCK,), False),
        ("layers.1", "backward", "empty", torch.float32, (BLOCK,), True),
    ],
)
def test_fp32_tensors(unit, phase, maker, dtype, shape, fault):
    found = traffic.faults(step(made=[Made(maker, unit, phase, dtype, shape)]))
    assert len(found) == fault
    if fault:
        assert found[0].startswith(f"{unit} {phase}: {maker} makes float")


def test_launches_past_those_expected():
    limit = traffic.EXPECTED["full"]["backward"]
    right = [operation("_rope", phase="backward")] * limit
    full = {"activation_checkpointing": "full"}
    assert traffic.faults(step(right, **full)) == []
    found = traffic.faults(step(right + right[:1], **full))
    assert found == [f"layers.0 backward: {limit + 1} launches, {limit} are expected"]
    cast = [operation("_to_copy", phase="weights forward")] * 13
    assert traffic.faults(step(cast)) == ["layers.0 weights forward: 13 launches, 12 are expected"]


def test_bytes_of_tensors():
    x = torch.empty(4, 6, dtype=torch.bfloat16)
    assert size(x) == 48 and size(x[:, :3]) == 24 and size(x.T) == 48
    assert size(x[:1].expand(4, 6)) == 12 and size(x[:0]) == 0 and size(torch.tensor(1.0)) == 4
    assert total([x, x, x.view(24)]) == 96  # another shape is another reading
    assert total([x[:2], x[2:]]) == 48


def test_every_kernel_of_the_step_says_what_it_writes():
    """Against the source: what the stores of a kernel point at."""
    stored = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name in WRITES:
                stored[node.name] = pointers(node)
    assert stored == {name: set(writes.split()) for name, (writes, _) in WRITES.items()}


def pointers(function) -> set[str]:
    """The arguments from which the first operand of each tl.store is made, tensors among them."""
    arguments = {a.arg for a in function.args.args}
    sources: dict[str, set[str]] = {}
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            sources.setdefault(node.targets[0].id, set()).update(names)
    tensors = {
        a for a in arguments if a.endswith(("_ptr", "_table")) or a in ("out", "lse", "starts")
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store":
            names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
            if not names & tensors:
                names = set().union(*(sources[name] for name in names if name in sources))
            found |= names & tensors
    return found


@pytest.mark.parametrize(
    "args, said",
    [
        (["--seq_len", "0"], "seq_len must be at least 1"),
        (["--micro_batches", "0"], "must be positive"),
        (["--bandwidth", "0"], "must be positive"),
        (["--widht=3"], "no option is called --widht"),
        ([], "TRITON_INTERPRET is set"),
    ],
)
def test_bad_input_is_an_error(args, said, monkeypatch):
    monkeypatch.setattr(traffic.triton.knobs.runtime, "interpret", True)
    with pytest.raises(ConfigError, match=said):
        traffic.main(args)


@pytest.mark.slow
def test_a_model_that_cannot_be_is_an_error(found):
    assert found["said"].startswith("hidden_size 100 is not a multiple")


@pytest.mark.slow
def test_without_triton():
    code = (
        "import runpy, sys; sys.modules['triton'] = None; sys.argv = ['bench.traffic'];"
        "runpy.run_module('bench.traffic', run_name='__main__')"
    )
    done = python("-c", code)
    assert done.returncode == 2 and "pip install triton" in done.stderr
    assert done.stderr.count("\n") == 1
