"""The processes of a run, and how a model is spread over them. The model itself knows of neither.

Four ways, all of them torch's own:
- one CPU process runs the model as it is
- fsdp: every parameter, its gradient and its moments are cut into as many pieces as there are
  ranks (FSDP2, Zhao et al. 2023, arXiv:2304.11277). A block is gathered when it is needed, in the
  dtype of compute, and dropped again: 16 bytes a parameter are shared by all ranks
- hsdp: the same within groups of `replica_size` ranks, each group a whole copy of the model. The
  gathering stays inside a group, as a rule one machine; between groups only gradients travel
- ddp: every rank has the whole model; gradients are averaged while the backward goes on

Parameters, gradients, moments and the reduction of gradients are fp32. Traffic of a step in bytes
per rank: python -m bench.step --plan.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

WAYS = ("fsdp", "ddp", "hsdp")
RECOMPUTATION = ("none", "selective", "full")


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of ranks): torchrun's, or one process."""
    lone = "RANK" not in os.environ
    if lone and device.type == "cpu":
        return 0, 1
    # A lone GPU is sharded over itself: one code path, and compute in bf16 beside fp32 weights.
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if lone else {}
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **alone)
    else:
        dist.init_process_group("gloo", **alone)
    return dist.get_rank(), dist.get_world_size()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def spread(
    model: nn.Module, way: str, replica_size: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Give a model on the meta device its memory, on every rank the part that is its own.

    Returns what is to be called in its stead; `model` keeps the parameters and their names. They
    are not filled yet: no rank ever holds more than its own part and the tensor it is filling.
    replica_size: ranks that hold a copy of the model between them (hsdp); 0 for those of this
    machine. Raises ValueError as `shards` does.
    """
    size = shards(way, replica_size, world_size())
    if dist.is_initialized() and way != "ddp":
        _shard(model, _mesh(way, size, device), dtype)
    model.to_empty(device=device)
    if dist.is_initialized() and way == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=False,  # every rank fills its copy from the same seed or the same file
            gradient_as_bucket_view=True,
        )
    return model


def shards(way: str, replica_size: int, world: int) -> int:
    """Into how many parts a copy of the model is cut among `world` ranks.

    Raises ValueError for another way than those above, or ranks that cannot be divided so.
    """
    if way not in WAYS:
        raise ValueError(f"parallel is {', '.join(WAYS)}, not {way!r}")
    if way != "hsdp":
        return world if way == "fsdp" else 1
    size = min(replica_size or int(os.environ.get("LOCAL_WORLD_SIZE", world)), world)
    if world % size:
        raise ValueError(f"replica_size {size} does not divide the {world} processes")
    return size


def _mesh(way: str, size: int, device: torch.device) -> dist.DeviceMesh:
    if way == "fsdp":
        return init_device_mesh(device.type, (size,))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=names)


def _shard(model: nn.Module, mesh: dist.DeviceMesh, dtype: torch.dtype) -> None:
    # Inputs are not cast: the rotary tables among them must stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    common = {"mesh": mesh, "mp_policy": policy}
    fully_shard(model.embed_tokens, **common)
    model.embed_tokens.set_unshard_in_backward(False)  # a look-up's backward needs no weights
    for block in model.layers:
        fully_shard(block, **common)
    # The backward begins with the head: to drop it in between would gather it twice.
    fully_shard([model.norm, model.lm_head], **common, reshard_after_forward=False)
    fully_shard(model, **common)
    units = [model.embed_tokens, *model.layers, model.lm_head]
    for before, after in pairwise(units):  # gather the next one while this one computes
        before.set_modules_to_forward_prefetch([after])
    for before, after in pairwise(units[1:]):
        after.set_modules_to_backward_prefetch([before])


def drop_gathered(model: nn.Module) -> None:
    """Drop what a forward pass that no backward follows has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def micro_batch(
    model: nn.Module, last: bool, reduce_each: bool, gather_each: bool
) -> Iterator[None]:
    """Around the forward and backward of one micro-batch of a step; `last` of the step or not.

    Copies of the model (ddp, hsdp) exchange gradients at the last one only, which costs nothing.
    Ranks that share a copy reduce them each time, unless reduce_each is False: then each keeps the
    whole gradient until the last, 4 bytes a parameter, and its traffic is paid once a step. A lone
    rank keeps the whole one anyway, and to it reducing is but copying: it does so once.
    Weights are gathered for the forward and again for the backward of each, unless gather_each is
    False: then they stay from the first forward to the last backward, 2 bytes a parameter in bf16.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or (reduce_each and world_size() > 1))
        model.set_requires_all_reduce(last)
        if not gather_each:
            model.set_reshard_after_forward(False)
            model.set_reshard_after_backward(last)
    waits = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if waits else nullcontext():
        yield


def recompute(model: nn.Module, mode: str) -> None:
    """Activation checkpointing: what each block keeps for its backward.

    - none: everything
    - selective: its input, its matrix products and attention's output; norms, rotations and the
      gate are computed again, a few per cent of the time for a third of the memory
    - full: its input and attention's output (with its log-sum-exp); the products are computed
      again too, a quarter more of them. Attention never is: at 32,000 tokens it is two fifths of
      a step's FLOPs and its output is small

    Raises ValueError for another mode.
    """
    if mode not in RECOMPUTATION:
        raise ValueError(f"activation_checkpointing is {', '.join(RECOMPUTATION)}, not {mode!r}")
    if mode == "none":
        return
    kept = _kept_operations(mode == "selective", model.layers[0].mlp.down_proj.weight.shape)
    for block in model.layers:
        block.forward = _recomputing(block.forward, kept)


def _recomputing(forward: Callable, kept: Callable) -> Callable:
    def contexts() -> tuple:
        return create_selective_checkpoint_contexts(kept)

    def forward_and_again(*args: object) -> Tensor:
        # No dropout anywhere, so no state of a random generator to restore.
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    return forward_and_again


def _kept_operations(products: bool, down_proj: torch.Size) -> Callable:
    """The policy: which operations of a block leave their result for the recomputation."""
    attention = {
        torch.ops.nanolucie.attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }

    def policy(_, operation: object, *args: object, **__) -> CheckpointPolicy:
        keep = operation in attention
        if products and operation == torch.ops.aten.mm.default:
            # down_proj comes last, nothing is computed from its result within the block
            keep = args[1].T.shape != down_proj
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `largest` (0: leave them alone).

    Returns the norm before that, fp32 `[1]` on the device. Rows are never cut among ranks: each is
    summed in fp32, their squares in fp64, which rounds to the same fp32 number however many ranks
    the rows are on. So any number of them clips alike.
    Floor: 12 bytes a parameter, 4 to sum and 8 to scale.
    """
    parameters = list(model.parameters())
    gradients = [local_rows(p.grad)[0] for p in parameters]
    squares = (torch.cat(list(map(_norms_of_rows, gradients))).double() ** 2).sum()
    if isinstance(parameters[0], DTensor):
        mesh, shared = parameters[0].device_mesh, _sharded_dim(parameters[0])
        dist.all_reduce(squares, group=mesh.get_group(shared))
    norm = squares.sqrt().float()
    if largest:
        scale = (largest / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, scale)
    return norm.reshape(1)


def _norms_of_rows(gradient: Tensor) -> Tensor:
    """Of a vector its own, in fp64, for a vector is cut among ranks. (In fp64 alone torch would
    copy a whole matrix on a GPU, 16 bytes a parameter more.)"""
    if gradient.ndim == 1:
        return torch.linalg.vector_norm(gradient, dtype=torch.float64).reshape(1)
    return torch.linalg.vector_norm(gradient, dim=-1)


# --- what ranks tell each other ------------------------------------------------------------------


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather(value: object) -> list:
    """What each rank passes, in the order of ranks. For messages and verdicts, not for tensors."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what the first of those has that bring an error, if any does.

    Without it the others would wait for the one that stopped. It is marked `on_all_ranks`.
    """
    for found in gather(error):
        if found is not None:
            found.on_all_ranks = True
            raise found


def together(action: Callable, *args: object, errors: tuple[type[Exception], ...]) -> object:
    """action(*args) on every rank; one of `errors` on any rank is raised on all of them."""
    result = failure = None
    try:
        result = action(*args)
    except errors as error:
        failure = error
    raise_together(failure)
    return result


# --- the rows of a parameter that are here -------------------------------------------------------


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that this rank holds, and the number of the first of them.

    FSDP gives every rank ceil(rows / ranks) consecutive rows of dimension 0, the last ones fewer.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh, shared = parameter.device_mesh, _sharded_dim(parameter)
    per_rank = -(-parameter.shape[0] // mesh.size(shared))
    return parameter.to_local().detach(), per_rank * mesh.get_local_rank(shared)


def _sharded_dim(parameter: DTensor) -> int:
    """The dimension of the mesh over which a parameter is cut; over another one it is repeated."""
    return next(i for i, place in enumerate(parameter.placements) if place.is_shard())


def fill_rows(parameter: Tensor, start: int, values: Tensor) -> None:
    """Write `values` to the rows from `start` on, as far as this rank holds them."""
    rows, first = local_rows(parameter)
    a, b = max(start, first), min(start + len(values), first + len(rows))
    if a < b:
        rows[a - first : b - first].copy_(values[a - start : b - start])
