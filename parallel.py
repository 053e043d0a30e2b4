"""The devices and processes of a run, and how a model is parallelized over them.

A lone process without CUDA runs the model as it is. Else there are three strategies, all torch's:
- fsdp: every parameter, its gradient and its moments are cut into as many pieces as there are
  ranks (FSDP2, Zhao et al. 2023, arXiv:2304.11277). A block is gathered when it is needed, in the
  dtype of compute, and freed again: together the ranks hold 16 bytes a parameter
- hsdp: fsdp within groups of `replica_size` ranks, each of which holds a whole copy of the model.
  Weights are gathered within a group, usually one machine; only gradients travel between groups
- ddp: every rank has the whole model; gradients are averaged while the backward goes on

Parameters, gradients, moments and the reduction of gradients are fp32. Traffic of a step in bytes
per rank: python -m bench.plan.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import NamedTuple

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

STRATEGIES = ("fsdp", "ddp", "hsdp")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")


class Gpu(NamedTuple):
    part_of_name: str  # as CUDA reports it
    memory: float  # nominal, in bytes
    flops: float  # dense bf16, per second


# From NVIDIA's data sheets; of the H100 the SXM form. Its other forms (PCIe, NVL) and an RTX 4090 D
# or Laptop are slower and not listed. GeForce: with accumulation in fp32.
GPUS = {
    "h200": Gpu("H200", 141e9, 989.4e12),
    "h100": Gpu("H100 80GB HBM3", 80e9, 989.4e12),
    "a100": Gpu("A100", 80e9, 312e12),
    "l40s": Gpu("L40S", 48e9, 362e12),
    "rtx4090": Gpu("RTX 4090", 24e9, 165.2e12),
}


# --- devices and processes -----------------------------------------------------------------------


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device of this process and the dtype to compute in, from `Config.device` and `.dtype`.

    Raises ValueError for a device that is not available, or another dtype.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    available["mps"] = torch.backends.mps.is_available() and "RANK" not in os.environ
    kind = device
    if kind == "auto":  # never mps, on which nothing has been tested
        kind = "cuda" if available["cuda"] else "cpu"
    if not available.get(kind):
        raise ValueError(f"device {device!r} is not available here; use --device=cpu")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float32 or auto, not {dtype!r}")
    here = torch.device(kind)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(here)
    if dtype == "auto":
        # A processor without bf16 products emulates them, several times slower than fp32. An Apple
        # GPU computes in fp32, which all of its operations know.
        fast = kind == "cuda" or (kind == "cpu" and cpu_has_bfloat16())
        dtype = "bfloat16" if fast else "float32"
    return here, getattr(torch, dtype)


def cpu_has_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def exact(device: torch.device) -> torch.dtype:
    """The dtype of sums over many numbers there: fp64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def memory_of_machine(device: torch.device) -> int:
    """Bytes of all GPUs of this machine, or its main memory; 0 where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1] * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this GPU; None for a CPU or a GPU that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (gpu.flops for gpu in GPUS.values() if gpu.part_of_name in name)
    slower = {"NVL", "D", "Laptop"} & {*name.split()}
    return None if slower else next(known, None)


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of ranks): torchrun's, or those of a single process."""
    single = "RANK" not in os.environ
    if single and device.type != "cuda":
        return 0, 1
    # A single GPU is sharded over itself: one code path, and compute in bf16 beside fp32 weights.
    itself = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if single else {}
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **itself)
    else:
        dist.init_process_group("gloo", **itself)
    return dist.get_rank(), dist.get_world_size()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# --- the model over the ranks --------------------------------------------------------------------


def parallelize(
    model: nn.Module, strategy: str, replica_size: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Allocate a model that is on the meta device: on every rank the part that it holds.

    Returns the module to call; `model` keeps the parameters and their names. They are not filled
    yet, so no rank ever holds more than its own part and the tensor that it is filling.
    replica_size: ranks that share one copy of the model (hsdp); 0 for those of this machine.
    Raises ValueError as `shards` does, and for a model that this machine cannot hold.
    """
    size = shards(strategy, replica_size, world_size())
    count = sum(p.numel() for p in model.parameters())
    # fp32 weight, gradient and two moments, of every rank on this machine
    need = 16 * count * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / size
    if 0 < memory_of_machine(device) < need:
        raise ValueError(
            f"training {count / 1e9:.2f} B parameters takes at least {need / 1e9:.0f} GB (16 bytes "
            f"each) and this machine has {memory_of_machine(device) / 1e9:.0f} GB: use more GPUs, "
            "or try config/demo_pretrain.py"
        )
    if dist.is_initialized() and strategy != "ddp":
        _shard(model, size, strategy, device, dtype)
    model.to_empty(device=device)
    if dist.is_initialized() and strategy == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=False,  # every rank fills its copy from the same seed or the same file
            gradient_as_bucket_view=True,
        )
    return model


def shards(strategy: str, replica_size: int, world: int) -> int:
    """Into how many parts one copy of the model is cut among `world` ranks.

    Raises ValueError for an unknown strategy, or ranks that cannot be divided into replicas.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"parallel must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if strategy != "hsdp":
        return world if strategy == "fsdp" else 1
    size = min(replica_size or int(os.environ.get("LOCAL_WORLD_SIZE", world)), world)
    if world % size:
        raise ValueError(f"replica_size {size} does not divide the {world} processes")
    return size


def _shard(
    model: nn.Module, size: int, strategy: str, device: torch.device, dtype: torch.dtype
) -> None:
    shape, names = (size,), ("shard",)
    if strategy == "hsdp":
        shape, names = (world_size() // size, size), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Inputs are not cast: the rotary tables among them must stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    common = {"mesh": mesh, "mp_policy": policy}
    fully_shard(model.embed_tokens, **common)
    model.embed_tokens.set_unshard_in_backward(False)  # a look-up's backward needs no weights
    for block in model.layers:
        fully_shard(block, **common)
    # The backward begins with the head: freeing it in between would gather it twice.
    fully_shard([model.norm, model.lm_head], **common, reshard_after_forward=False)
    fully_shard(model, **common)
    units = [model.embed_tokens, *model.layers, model.lm_head]
    for before, after in pairwise(units):  # gather the next one while this one computes
        before.set_modules_to_forward_prefetch([after])
    for before, after in pairwise(units[1:]):
        after.set_modules_to_backward_prefetch([before])


def free_gathered(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def micro_batch(
    model: nn.Module, last: bool, reduce_each: bool, gather_each: bool
) -> Iterator[None]:
    """Wrap the forward and backward of one micro-batch; last: whether it ends the step.

    Replicas of the model (ddp, hsdp) exchange gradients only at the last one, at no cost in memory.
    Ranks that share a replica reduce them each time, unless reduce_each is False: then each keeps
    the whole gradient until the last, 4 bytes a parameter, and the traffic is paid once a step. A
    single rank keeps the whole gradient anyway, and reducing it is a copy: it does so once.
    Weights are gathered for every forward and again for every backward, unless gather_each is
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


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Choose what each block keeps for its backward; the rest is computed again there.

    - none: keep everything
    - selective: keep the input, the matrix products and attention's output; norms, rotations and
      the gate are computed again, a few per cent of the time for a third of the memory
    - full: keep the input and attention's output (with its log-sum-exp); the products are computed
      again too, a quarter more of them. Attention never is: at 32,000 tokens it is two fifths of
      a step's FLOPs and its output is small

    Raises ValueError for another mode.
    """
    if mode not in ACTIVATION_CHECKPOINTING:
        raise ValueError(
            f"activation_checkpointing must be one of {', '.join(ACTIVATION_CHECKPOINTING)}, "
            f"not {mode!r}"
        )
    if mode == "none":
        return
    kept = {
        torch.ops.nanolucie.attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
    down_proj = model.layers[0].mlp.down_proj.weight.shape

    def policy(_, operation: object, *args: object, **__) -> CheckpointPolicy:
        keep = operation in kept
        if mode == "selective" and operation == torch.ops.aten.mm.default:
            # down_proj comes last: nothing within the block is computed from its result.
            keep = args[1].T.shape != down_proj
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(forward: Callable) -> Callable:
        # A function, since torch.compile passes over a block whose forward is a partial. There is
        # no dropout, so no state of a random generator has to be restored.
        def run(*args: object, **kwargs: object) -> Tensor:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
            return checkpoint(forward, *args, **how, **kwargs)

        return run

    for block in model.layers:
        block.forward = checkpointed(block.forward)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most max_norm (0: leave them alone).

    Returns the norm before scaling, an fp32 scalar on the device. Ranks never split a row:
    each row is summed in fp32 and their squares in fp64, which rounds to the same fp32 number
    however many ranks hold the rows. So clipping does not depend on the number of ranks.
    Floor: 12 bytes a parameter, 4 to sum and 8 to scale.
    """
    parameters = list(model.parameters())
    gradients = [local_rows(p.grad)[0] for p in parameters]
    norms = torch.cat(list(map(_norms_of_rows, gradients)))
    squares = (norms.to(exact(norms.device)) ** 2).sum()
    if isinstance(parameters[0], DTensor):
        mesh, dim = parameters[0].device_mesh, _sharded_dim(parameters[0])
        dist.all_reduce(squares, group=mesh.get_group(dim))
    norm = squares.sqrt().float()
    if max_norm:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, scale)
    return norm


def _norms_of_rows(gradient: Tensor) -> Tensor:
    """Norms of the rows of a matrix, or in fp64 of a whole vector, which ranks do cut.

    (In fp64 torch would copy a whole matrix on a GPU, 16 bytes a parameter more.)
    """
    if gradient.ndim == 1:
        return torch.linalg.vector_norm(gradient, dtype=exact(gradient.device)).reshape(1)
    return torch.linalg.vector_norm(gradient, dim=-1)


# --- what ranks tell each other ------------------------------------------------------------------


def to_device(number: float, device: torch.device) -> Tensor:
    """A scalar of the dtype `exact` on the device, without waiting for the work queued there."""
    here = torch.tensor(number, dtype=exact(device), pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=here.is_pinned())


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def named_sums(device: torch.device, equal: dict[str, Tensor], **values) -> dict[str, float]:
    """The sum over all ranks of each value, a number or a scalar tensor, in one message; and the
    values of `equal`, which are the same on all ranks. The host waits once for the device."""
    tensors = [v if isinstance(v, Tensor) else to_device(v, device) for v in values.values()]
    sums = sum_over_ranks(torch.stack([tensor.to(exact(device)) for tensor in tensors]))
    numbers = torch.stack([*sums, *equal.values()]).tolist()
    return dict(zip([*values, *equal], numbers))


def gather(value: object, group: dist.ProcessGroup | None = None) -> list:
    """What each rank passes, in the order of ranks. For messages, not for tensors."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def together(
    action: Callable,
    *args: object,
    errors: tuple[type[Exception], ...],
    group: dist.ProcessGroup | None = None,
) -> object:
    """action(*args) on every rank. One of `errors` on any rank is raised on all of them, marked
    `on_all_ranks`; without that, the others would wait for the one that stopped."""
    result = failure = None
    try:
        result = action(*args)
    except errors as error:
        failure = error
    for error in gather(failure, group):
        if error is not None:
            error.on_all_ranks = True
            raise error
    return result


# --- the rows of a parameter that this rank holds ------------------------------------------------


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that this rank holds, and the number of the first of them.

    FSDP gives every rank ceil(rows / ranks) consecutive rows of dimension 0, the last ranks fewer.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh, dim = parameter.device_mesh, _sharded_dim(parameter)
    per_rank = -(-parameter.shape[0] // mesh.size(dim))
    return parameter.to_local().detach(), per_rank * mesh.get_local_rank(dim)


def replica_of(parameter: Tensor) -> tuple[int, int]:
    """(which replica of the model this rank belongs to, the number of replicas)."""
    if not isinstance(parameter, DTensor):
        return rank(), world_size()
    mesh = parameter.device_mesh
    return (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim > 1 else (0, 1)


def _sharded_dim(parameter: DTensor) -> int:
    """The dimension of the mesh that cuts a parameter; another dimension repeats it."""
    return next(i for i, place in enumerate(parameter.placements) if place.is_shard())


def fill_rows(parameter: Tensor, start: int, values: Tensor) -> None:
    """Write `values` to the rows from `start` on, as far as this rank holds them."""
    rows, first = local_rows(parameter)
    a, b = max(start, first), min(start + len(values), first + len(rows))
    if a < b:
        rows[a - first : b - first].copy_(values[a - start : b - start])
