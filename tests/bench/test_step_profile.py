"""The time table of a step: of events as of a GPU, and of a step on this CPU."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parallel
from bench import step_groups, step_peers, step_profile
from bench.step_groups import KERNELS, NODE, Piece, Shapes, Span, floors, group_of
from config import Config
from model import Lucie, LucieConfig

CPU = torch.device("cpu")
SMALL = LucieConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=128,
)  # fmt: skip
SHAPES = Shapes(SMALL, seq_len=128, micro_batch_size=1, micro_batches=3)  # as many as hidden_size
CEILINGS = {"GB/s": 4000.0, "TFLOP/s": 800.0}


# --- events of a GPU ------------------------------------------------------------------------------


def host(name, start, end, category="cpu_op", thread=1, **arguments):
    event = {"ph": "X", "name": name, "cat": category, "ts": start, "dur": end - start}
    return event | {"tid": thread, "args": arguments}


def launch(at, correlation, name="cudaLaunchKernel", thread=1):
    return host(name, at, at + 0.5, "cuda_runtime", thread, correlation=correlation)


def device(name, start, end, correlation=None, category="kernel", **arguments):
    if correlation is not None:
        arguments["correlation"] = correlation
    event = {"ph": "X", "name": name, "cat": category, "ts": start, "dur": end - start}
    return event | {"tid": 7, "args": arguments}


def step(start, end):
    return host("bench.step", start, end, "user_annotation")


def analyse(events, wall, shapes=SHAPES):
    return step_profile.analyse(events, shapes, CEILINGS, 1_000_000, wall)


def groups(found):
    return {row["group"]: row["ms"] for row in found["rows"]}


def test_a_kernel_belongs_to_what_launched_it():
    """By correlation with the launch, on whatever thread, or by the id of the operation."""
    events = [
        step(0, 100),
        host("nanolucie::attention", 1, 4),
        launch(2, 11),
        host(NODE + "GeneratedBackwardFor_nanolucie_rope_defaultBackward", 5, 30, thread=2),
        host("nanolucie::rope", 6, 9, thread=2),
        launch(7, 12, "cuLaunchKernelEx", thread=2),
        host("bench.optimizer", 40, 50, "user_annotation"),
        host("aten::_fused_adamw_", 41, 49, **{"External id": 77}),
        device("kernel_of_ours", 10, 30, 11),
        device("kernel_of_ours", 30, 40, 12),
        device("multi_tensor_apply", 50, 65, None, **{"External id": 77}),
        device("ncclDevKernel", 70, 75, 999),
    ]
    found = analyse(events, 100e-6)
    assert groups(found) == pytest.approx(
        {"attention, forward": 0.02, "rope, backward": 0.01, "optimizer": 0.015, "other": 0.005}
        | {"gaps": 0.05}
    )
    assert found["other"] == pytest.approx({"ncclDevKernel": 0.005})
    assert found["agrees"] and found["sum_ms"] == pytest.approx(0.1)


def test_a_kernel_whose_launch_is_unknown_is_told_by_its_name():
    for name, group in KERNELS.items():
        assert group_of(Piece(name, 0, 1, None), SHAPES) == group
        assert group_of(Piece(name + "_0d1d2", 0, 1, None), SHAPES) == group
    assert group_of(Piece("_rope_of_others", 0, 1, None), SHAPES) == "other"
    assert group_of(Piece("Memcpy DtoD (Device -> Device)", 0, 1, None), SHAPES) == (
        "activations copied"
    )
    # what launched it says less than its own name
    span = Span("aten::empty", "cpu_op", 0, 1)
    assert group_of(Piece("_swiglu_backward", 0, 1, span), SHAPES) == "swiglu, backward"


def test_every_kernel_that_a_step_launches_has_a_group():
    launched = set()
    for path in Path("kernels").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        defined = set(re.findall(r"@triton\.jit.*\ndef (\w+)\(", source))
        if path.stem not in ("attention_decode", "int4_linear"):
            launched |= {n for n in defined if re.search(rf"^ *{n}\[", _all_sources(), re.M)}
    assert launched == KERNELS.keys()


def _all_sources():
    return "\n".join(p.read_text(encoding="utf-8") for p in Path("kernels").glob("*.py"))


def test_gaps_where_streams_overlap():
    events = [step(0, 40), device("a", 0, 10), device("b", 5, 15), device("c", 20, 30)]
    events.append(device("b", 22, 28, None, "gpu_memset"))
    found = analyse(events, 40e-6)
    assert groups(found)["gaps"] == pytest.approx(0.015)
    assert found["together_ms"] == pytest.approx(0.011)
    # of those that run at once each has its part
    assert found["other"] == pytest.approx({"a": 0.0075, "b": 0.0105, "c": 0.007})
    assert found["sum_ms"] == pytest.approx(0.04)


def test_three_at_once_and_one_that_begins_where_another_ends():
    pieces = [Piece("", *times, None) for times in ((0, 9), (0, 9), (3, 6), (9, 12), (5, 5))]
    took, together = step_profile.shares(pieces)
    assert took == pytest.approx([4, 4, 1, 3, 0]) and together == pytest.approx(9)


def test_on_a_cpu_an_operation_has_what_those_within_it_leave():
    events = [step(0, 20), host("_SwiGLU", 1, 11), host("aten::mul", 3, 5), host("aten::mul", 7, 9)]
    events += [host("bench.optimizer", 12, 18, "user_annotation"), host("aten::_adamw", 13, 16)]
    events.append(host("aten::mul", 30, 40))  # after the step
    spans = step_profile.nest(events)
    pieces = step_profile.pieces_of(events, spans)
    assert [(p.name, p.start, p.end) for p in pieces if p.name == "_SwiGLU"] == [
        ("_SwiGLU", 1, 3), ("_SwiGLU", 5, 7), ("_SwiGLU", 9, 11),
    ]  # fmt: skip
    found = groups(analyse(events, 20e-6))
    assert found == pytest.approx({"swiglu, forward": 0.01, "optimizer": 0.003, "gaps": 0.007})


def test_a_sum_that_is_not_the_steps_time_is_told():
    events = [step(0, 100), device("a", 10, 60)]
    assert analyse(events, 100.9e-6)["agrees"]
    for wall, more in ((102e-6, []), (100e-6, [device("late", 100, 120)])):
        found = analyse(events + more, wall)
        assert not found["agrees"]
        assert "MORE THAN 1 % APART" in step_profile.table(found, "")


def test_waits_between_the_first_forward_and_the_optimizer():
    def mark(name, start, end):
        return host(f"bench.{name}", start, end, "user_annotation")

    def sync(at):
        return host("cudaStreamSynchronize", at, at + 1, "cuda_runtime")

    events = [step(0, 100), mark("micro_batch", 10, 20), mark("micro_batch", 20, 30)]
    events += [mark("optimizer", 40, 50), sync(5), sync(12), sync(39), sync(60)]
    events += [host("aten::item", 35, 36), host("cudaMalloc", 21, 22, "cuda_runtime")]
    events += [host("aten::add", 37, 38), device("a", 0, 1)]
    found = analyse(events, 100e-6)
    assert found["waits"] == {"cudaStreamSynchronize": 2, "aten::item": 1, "cudaMalloc": 1}
    assert "cudaStreamSynchronize 2 x" in step_profile.table(found, "")
    assert "optimizer: none" in step_profile.table(analyse(events[:1] + events[-1:], 1e-4), "")


# --- which product --------------------------------------------------------------------------------


def chain(*names, **arguments):
    """The innermost of spans that lie within each other, the outermost first."""
    span = None
    for name in names:
        inner = Span(name, "cpu_op", 0, 1, parent=span)
        if span:
            span.children.append(inner)
        span = inner
    span.arguments = arguments
    return span


def product(a, b, transposed, *within, name="aten::mm"):
    strides = [[1, a[0]] if transposed else [a[1], 1], [b[1], 1]]
    dims = [list(a), list(b)]
    if name.startswith("aten::addmm"):
        dims, strides = [[a[0], b[1]], *dims], [[b[1], 1], *strides]
    return chain(*within, name, **{"Input Dims": dims, "Input Strides": strides})


MATRICES = {"qkv": (128, 192), "o": (128, 128), "gate_up": (128, 768), "down": (384, 128)}
BACKWARD = (NODE + "MmBackward0", "MmBackward0")


@pytest.mark.parametrize("tokens", [128, 384, 768, 80])  # some are as many as a matrix has rows
@pytest.mark.parametrize("matrix", MATRICES)
def test_products_are_told_by_shapes_and_place(matrix, tokens):
    given, out = MATRICES[matrix]
    shapes = replace(SHAPES, seq_len=tokens)

    def group(span):
        return group_of(Piece("gemm", 0, 1, span), shapes)

    x, y, w, w_t = (tokens, given), (tokens, out), (out, given), (given, out)
    assert group(product(x, w_t, False, "aten::linear")) == f"{matrix}, forward"
    again = product(x, w_t, False, *BACKWARD, "aten::linear", "aten::matmul")
    assert group(again) == f"{matrix}, recomputed"
    assert group(product(y, w, False, *BACKWARD)) == f"{matrix}, input gradient"
    assert group(product((out, tokens), x, True, *BACKWARD)) == f"{matrix}, weight gradient"
    assert group(product((96, 7), (7, 96), False, *BACKWARD)) == "other"


@pytest.mark.parametrize("op", ["nanolucie::linear_cross_entropy", "_LinearCrossEntropy"])
def test_products_of_the_head_lie_within_the_loss(op):
    def group(*args, **kwargs):
        return group_of(Piece("gemm", 0, 1, product(*args, **kwargs)), SHAPES)

    assert group((128, 128), (128, 512), False, op) == "head, forward"
    assert group((128, 512), (512, 128), False, op) == "head, input gradient"
    assert group((512, 128), (128, 128), True, op) == "head, weight gradient"
    added = group((512, 128), (128, 128), True, op, name="aten::addmm_")
    assert added == "head, weight gradient"
    kernel = Piece("_cross_entropy", 0, 1, chain(op))
    assert group_of(kernel, SHAPES) == "loss"


def test_a_product_that_was_kept_is_not_made_again():
    span = product((128, 128), (128, 192), False, *BACKWARD, "aten::linear")
    assert step_groups.product_size(span) == (128, 128, 192)
    span.children.append(Span("aten::detach", "cpu_op", 0, 1, parent=span))
    assert step_groups.product_size(span) is None
    span.children.append(Span("aten::mm", "cpu_op", 0, 1, parent=span))  # kept after it was made
    assert step_groups.product_size(span) == (128, 128, 192)


ACTIVATION = {"Input Dims": [[1, 128, 128], [1, 128, 128]]}
PLACES = {
    ("nanolucie::rms_norm",): "norms, forward",
    (NODE + "MmBackward0", "nanolucie::rms_norm"): "norms, recomputed",
    (NODE + "GeneratedBackwardFor_nanolucie_rms_norm_defaultBackward", "aten::sum"): (
        "norms, backward"
    ),
    (NODE + "_RMSNormBackward", "_RMSNormBackward", "aten::mul"): "norms, backward",
    ("_SwiGLU", "aten::silu"): "swiglu, forward",
    ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention"): (
        "attention, forward"
    ),
    (NODE + "ScaledDotProductFlashAttentionBackward0", "aten::_flash_attention_backward"): (
        "attention, backward"
    ),
    ("aten::embedding", "aten::index_select"): "embedding, forward",
    (NODE + "EmbeddingBackward0", "aten::embedding_dense_backward"): "embedding, backward",
    (NODE + "GeneratedBackwardFor_nanolucie_linear_cross_entropy_defaultBackward", "aten::mul"): (
        "loss"
    ),
    ("FSDP::pre_forward (layers.0)", "FSDP::all_gather (layers.0)", "aten::_foreach_copy_"): (
        "weights gathered and cast"
    ),
    (NODE + "X", "FSDP::pre_backward (layers.0)", "FSDP::backward_prefetch for y", "aten::copy_"): (
        "weights gathered and cast"
    ),
    (NODE + "X", "FSDP::post_backward_reduce (layers.0)", "fsdp::chunk_cat"): (
        "gradients cast and added"
    ),
    (NODE + "torch::autograd::AccumulateGrad", "aten::add_"): "gradients cast and added",
    ("FSDP::root_post_backward_callback", "aten::add_"): "gradients cast and added",
    ("bench.clip", "aten::linalg_vector_norm"): "gradient norm",
    ("bench.optimizer", "Optimizer.step#AdamW.step", "aten::_fused_adamw_"): "optimizer",
    ("bench.micro_batch", "aten::add"): "sums of activations",
    (NODE + "AddBackward0", "aten::add_"): "sums of activations",
    ("aten::contiguous", "aten::clone", "aten::copy_"): "activations copied",
    (NODE + "SplitWithSizesBackward0", "aten::cat"): "activations copied",
    ("aten::index_select",): "other",
}


@pytest.mark.parametrize("place,group", PLACES.items())
def test_other_operations_are_told_by_what_they_are_part_of(place, group):
    piece = Piece("elementwise_kernel", 0, 1, chain(*place, **ACTIVATION))
    assert group_of(piece, SHAPES) == group


def test_small_sums_and_lists_of_tensors_are_no_activations():
    small = chain("aten::add", **{"Input Dims": [[1], []]})
    assert group_of(Piece("k", 0, 1, small), SHAPES) == "other"
    lists = chain("aten::add", **{"Input Dims": [[[128, 128], [128]], []]})
    assert group_of(Piece("k", 0, 1, lists), SHAPES) == "other"


# --- floors ---------------------------------------------------------------------------------------


def test_floors_by_hand():
    found = floors(SHAPES, CEILINGS, parameters=1_000_000)
    ms = {"flops": 1e-9 / 800, "bytes": 1e-6 / 4000}
    rows = 3 * 128  # tokens of a step
    for name, (given, out) in MATRICES.items():
        for kind in ("forward", "recomputed", "input gradient", "weight gradient"):
            hand = 2 * rows * given * out * 2 * ms["flops"]
            assert found[f"{name}, {kind}"] == pytest.approx(hand)
    assert found["head, forward"] == pytest.approx(2 * rows * 128 * 512 * ms["flops"])
    # two products of 4 heads of 32, half masked, in two layers and three micro-batches
    forward = 2 * 3 * 2 * 2 * 128 * 128 * 4 * 32 / 2
    assert found["attention, forward"] == pytest.approx(forward * ms["flops"])
    assert found["attention, backward"] == pytest.approx(2.5 * forward * ms["flops"])
    x = 2 * 128 * 128  # bytes of an activation
    norms = 3 * (2 * (2 * x + 256 + 4 * x + 256) + 2 * x + 256)
    assert found["norms, forward"] == pytest.approx(norms * ms["bytes"])
    assert found["swiglu, backward"] == pytest.approx(3 * 2 * 5 * 2 * 128 * 384 * ms["bytes"])
    assert found["optimizer"] == pytest.approx(28e6 * ms["bytes"])
    assert found["gradient norm"] == pytest.approx(4e6 * ms["bytes"])
    assert found["weights gathered and cast"] == pytest.approx(2e6 * ms["bytes"])
    assert found["gradients cast and added"] == pytest.approx((4 + 8 + 8) * 1e6 * ms["bytes"])
    assert found["loss"] == pytest.approx(3 * 4 * 128 * 512 * ms["bytes"])
    assert "gaps" not in found and "activations copied" not in found


def test_attention_counts_each_sample_for_itself():
    longer = floors(replace(SHAPES, seq_len=256, micro_batches=1), CEILINGS, 1)
    two = floors(replace(SHAPES, micro_batch_size=2, micro_batches=1), CEILINGS, 1)
    assert longer["attention, forward"] == pytest.approx(2 * two["attention, forward"])
    assert longer["qkv, forward"] == pytest.approx(two["qkv, forward"])


def test_the_last_line_names_what_loses_most():
    """Over its floor, not in all: the product takes longer and could not be much faster."""
    slow = CEILINGS | {"TFLOP/s": 1e-3}
    floor = floors(SHAPES, slow, 1_000_000)["qkv, forward"] * 1e3
    long = floor + 1
    assert long > 100
    mm = {"Input Dims": [[128, 128], [128, 192]], "Input Strides": [[128, 1], [1, 128]]}
    events = [step(0, long + 10), host("aten::linear", 0, 9), host("aten::mm", 1, 8, **mm)]
    events += [launch(2, 1), host("bench.optimizer", 10, 20, "user_annotation"), launch(12, 2)]
    events += [device("gemm", 0, long, 1), device("adam", long, long + 8, 2)]
    found = step_profile.analyse(events, SHAPES, slow, 1, (long + 10) / 1e6)
    assert found["lossiest"]["group"] == "optimizer"
    assert found["lossiest"]["lost_ms"] == pytest.approx(0.008, rel=1e-2)
    last = step_profile.table(found, "").splitlines()[-1]
    assert last.startswith("most is lost in: optimizer, 0.01 ms over its floor")
    assert found["flops_found"] == 2 * 128 * 128 * 192
    assert "some were not told apart" in step_profile.table(found, "")


# --- a step on this CPU ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank():
    step_peers.start(CPU)
    yield
    dist.destroy_process_group()


def recorded(tmp_path, **change):
    options = asdict(SMALL) | dict(dtype="float32", seq_len=128, global_batch_size=2)
    options.pop("max_position_embeddings")
    config = Config(**options | change)
    shapes = Shapes.of(config, step_peers.architecture(config))
    with step_peers.ours(config, CPU) as (model, loss):
        step_peers.fill(model, CPU, 0.02)
        make = step_peers.make_step(model, loss, config, CPU)
        make()
        wall = step_profile.record(make, CPU, tmp_path / "events.json.gz")
    events = step_profile.read(tmp_path / "events.json.gz")
    return step_profile.analyse(events, shapes, CEILINGS, 1, wall), config, wall, shapes


@pytest.mark.parametrize("mode", parallel.ACTIVATION_CHECKPOINTING)
def test_a_real_step_is_told_apart(one_rank, tmp_path, mode):
    found, config, wall, _ = recorded(tmp_path, activation_checkpointing=mode)
    with torch.device("meta"):
        model = Lucie(step_peers.architecture(config))
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    attention = 6 * 2 * 128 * 128
    products = (model.flops_per_token(128) - attention - 6 * norms) * 2 * 128
    assert found["flops_found"] == found["flops_expected"] == products

    flops = {row["group"]: row["flops"] for row in found["rows"]}
    for name, (given, out) in (MATRICES | {"head": (128, 512)}).items():
        layers = 1 if name == "head" else 2
        for kind in ("forward", "input gradient", "weight gradient"):
            assert flops[f"{name}, {kind}"] == 2 * 2 * 128 * given * out * layers
    again = {name: f for name, f in flops.items() if f and name.endswith("recomputed")}
    expected = MATRICES.keys() - {"down"} if mode == "full" else ()  # nothing reads down's again
    assert again.keys() == {f"{name}, recomputed" for name in expected}
    for name in expected:
        assert again[f"{name}, recomputed"] == flops[f"{name}, forward"]

    both = {f"{g}, {way}" for g in step_groups.TWO_WAYS for way in ("forward", "backward")}
    once = step_groups.RULES.keys() - set(step_groups.TWO_WAYS)
    copies = {"activations copied", "sums of activations", "gaps"}
    assert flops.keys() >= both | once | copies
    assert ("swiglu, recomputed" in flops) == (mode != "none")
    assert found["agrees"] and found["sum_ms"] == pytest.approx(1e3 * wall, rel=0.01)
    assert all(row["ms"] >= 0 for row in found["rows"])
    assert math.isclose(sum(row["of_step"] for row in found["rows"]), 1)


def test_a_profile_is_read_again(one_rank, tmp_path, capsys):
    found, _, wall, shapes = recorded(tmp_path, global_batch_size=1)
    profiled = {"title": "once more", "events": "events.json.gz", "shapes": asdict(shapes)}
    profiled |= {"parameters": 1, "failure": None, "wall_ms": 1e3 * wall}
    results = {"ceilings": CEILINGS, "profiles": [profiled, {"failure": "none"}]}
    results = json.loads(json.dumps(results))
    assert step_profile.again(results, tmp_path) == step_profile.table(found, "once more")
