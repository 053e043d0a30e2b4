"""Every operation of a training step, recorded without a GPU and without computing any.

    operations, made = record(Config(num_hidden_layers=2), micro_batches=1, chip=90)

The code that runs is model.py's, parallel.py's and torch's own FSDP2, on one rank, in a step like
train.py's. Under it lies a mode that torch asks before each of its operations: views are made, all
else only gets memory for its results, whose pages no one ever touches. Our kernels compile for the
chip and are launched on the driver of gpuless/compiler.py, which runs nothing. So a step of two
full-width blocks takes a second. What is not in the record is not done on a GPU either, but for
what torch does inside an operation. Of what ranks send each other there is nothing.

Bytes: each distinct tensor that an operation reads and each that it writes counts once, by its
elements (dimensions that only repeat, of stride 0, count as one). What is changed in place counts
twice, views nothing. A look-up reads the rows it takes. A norm with a wider dtype than its input
makes a copy in that dtype first, inside torch, which is counted with it.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime import JITFunction

import kernels
import parallel
from checkpoint import architecture
from config import Config
from gpuless.compiler import Launch, fake_gpu
from model import Lucie

# What each kernel writes, by the names of its arguments, and the products of T x T x D it makes for
# each head, half of each masked away. It reads all its other tensors.
WRITES = {
    "_rms_norm_forward": ("y_ptr total_ptr rstd_ptr", 0),
    "_rms_norm_backward": ("dx_ptr partial_ptr", 0),
    "_rope": ("q_out_ptr k_out_ptr", 0),
    "_swiglu_forward": ("y_ptr", 0),
    "_swiglu_backward": ("d_gate_up_ptr", 0),
    "_cross_entropy": ("losses_ptr logits_ptr", 0),
    "_attention_forward": ("out lse", 2),
    "_attention_backward_dq": ("delta_table dq_table", 3),
    "_attention_backward_dkdv": ("dk_table dv_table", 4),
}
IN_PLACE = {"_cross_entropy": "logits_ptr"}

SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64"}
SHORT |= {torch.int32: "i32"}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
OVERWRITING = ("copy_", "zero_", "fill_", "_foreach_copy_")  # write in place without reading
COMPOSITE = "CompositeImplicitAutograd"  # torch's word for an operation made of others
NO_LAUNCH = ("_unsafe_view", "lift_fresh")  # views, though their schemas do not say so


@dataclass(frozen=True)
class Operation:
    """A Triton kernel, or an operation of torch; one of those that take lists counts once."""

    name: str
    unit: str  # of the model: embed_tokens, layers.0 ..., norm, lm_head; or the part of the step
    phase: str  # forward | backward | weights forward | weights backward (FSDP's) | step
    within: str  # the custom operation it belongs to, if any
    shapes: str
    read: int  # bytes
    written: int
    flops: int
    launch: Launch | None  # of a Triton kernel

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def is_product(self) -> bool:
        return self.name in PRODUCTS

    @property
    def of_weights(self) -> bool:
        """Whether FSDP does it."""
        return self.phase.startswith("weights")

    @property
    def of_step(self) -> bool:
        """Whether it is done once a step, to parameters: clipping and the optimizer."""
        return self.phase == "step"

    @property
    def casts_again(self) -> bool:
        """Whether FSDP casts a weight for the backward, or copies what was cast."""
        narrows = self.name == "_to_copy" and self.written < self.read
        copies = self.name == "copy_" and "fp32" not in self.shapes
        return self.phase == "weights backward" and (narrows or copies)


@dataclass(frozen=True)
class Made:
    """A tensor that an operation of the forward or backward brought into being."""

    maker: str  # custom operation/operation
    unit: str
    phase: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def size(x: Tensor) -> int:
    """Bytes of the distinct elements of x."""
    counts = (n for n, stride in zip(x.shape, x.stride()) if stride)
    return x.element_size() * math.prod(counts) * (x.numel() > 0)


def total(tensors: list[Tensor]) -> int:
    """Bytes of the distinct ones."""
    return sum({(t.data_ptr(), t.shape, t.stride(), t.dtype): size(t) for t in tensors}.values())


def text(tensors: list[Tensor]) -> str:
    """Dtypes and shapes, of the first three."""
    shown = [f"{SHORT.get(t.dtype, t.dtype)}[{'x'.join(map(str, t.shape))}]" for t in tensors[:3]]
    return ", ".join(shown) + (f" and {len(tensors) - 3}" if len(tensors) > 3 else "")


class Recorder(TorchDispatchMode):
    """The mode. `unit` and `phase` say where in the step the code is that runs."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.made: list[Made] = []
        self.unit, self.phase, self.within = "", "", ""
        self.launches = launches

    def at(self, unit: str, phase: str) -> None:
        self.unit, self.phase = unit, phase

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if any(issubclass(t, FakeTensor) for t in types):  # torch asks itself about shapes
            return func(*args, **kwargs)
        if any(t not in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # DTensor comes back with what is in it
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) or kwargs.get("device") == torch.device("meta"):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense":
            raise ValueError(
                f"{self.unit} {self.phase}: the host asks the GPU for a value, and waits"
            )
        custom = func.namespace in ("nanolucie", "fsdp")
        if custom or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            outer, self.within = self.within, name if custom else self.within
            with self:  # its own code, which launches kernels and calls torch
                result = func.redispatch(torch._C.DispatchKeySet("CPU"), *args, **kwargs)
            self.within = outer
            return result
        if func.namespace in ("c10d", "profiler") or func.is_view or name in NO_LAUNCH:
            return func(*args, **kwargs)  # one rank has nobody to talk to
        if name.startswith(("empty", "new_empty")):
            result = func(*args, **kwargs)
        else:
            result = self.skip(func, args, kwargs)
            self.add(func, name, args, kwargs, result)
        unit, phase = self.where()
        if phase != "step" and not written_by(func, args, kwargs):
            for t in [result] if isinstance(result, Tensor) else tree_leaves(result):
                maker = f"{self.within}/{name}" if self.within else name
                self.made.append(Made(maker, unit, phase, t.dtype, tuple(t.shape)))
        return result

    def skip(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What the operation would return, not computed."""
        if written := written_by(func, args, kwargs):
            returns = len(func._schema.returns)
            return None if not returns else written[0] if returns == 1 else tuple(written)

        def on_meta(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

        def in_memory(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs = kwargs | {"device": "meta"}
        args, kwargs = tree_map_only(Tensor, on_meta, (args, kwargs))
        return tree_map_only(Tensor, in_memory, func(*args, **kwargs))

    def add(self, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        changed = tree_leaves(written_by(func, args, kwargs))
        read, written, flops = inputs, changed or outputs, 0
        if "out" in kwargs:
            read = tree_leaves(args)
        if name in OVERWRITING:
            read = tree_leaves(args[1:])
        if name.endswith("_like"):
            read = []
        read = [t for t in read if isinstance(t, Tensor)]
        if name == "_fused_adamw_":  # the schema lets it write gradients too: those it unscaled
            gradients = {id(t) for t in args[1]}
            written = [t for t in written if id(t) not in gradients]
        bytes_read, bytes_written = total(read), total(written)
        if name == "embedding":
            bytes_read = size(args[1]) + bytes_written
        if name == "linalg_vector_norm" and result.dtype.itemsize > inputs[0].dtype.itemsize:
            copy = inputs[0].numel() * result.element_size()
            bytes_read, bytes_written = bytes_read + copy, bytes_written + copy
        if name in PRODUCTS:
            a, b = inputs[-2:] if name.startswith(("addmm", "baddbmm")) else inputs[:2]
            flops = 2 * a.numel() * b.shape[-1]
        unit, phase = self.where()
        self.operations.append(
            Operation(
                name, unit, phase, self.within, text(inputs or outputs), bytes_read, bytes_written,
                flops, None,
            )
        )  # fmt: skip

    def kernel(self, name: str, arguments: dict[str, Any]) -> None:
        """A Triton launch, the last one in the driver's list."""
        tensors = {k: getattr(v, "base", v) for k, v in arguments.items()}  # of a descriptor
        tensors = {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
        if name not in WRITES:
            raise ValueError(f"kernel {name} has no row in WRITES of bench/launches.py")
        writes, products = WRITES[name]
        written = [tensors[k] for k in writes.split()]
        kept = set(writes.split()) - {IN_PLACE.get(name)}
        read = [t for k, t in tensors.items() if k not in kept]
        flops = 0
        if products:
            batch, tokens, heads, head_dim = tensors["q_table"].shape
            flops = products * batch * heads * head_dim * tokens**2
        unit, phase = self.where()
        self.operations.append(
            Operation(
                name, unit, phase, self.within, text(list(tensors.values())), total(read),
                total(written), flops, self.launches[-1],
            )
        )  # fmt: skip

    def where(self) -> tuple[str, str]:
        """(unit, phase) of the operation that is running. FSDP's own code knows its unit."""
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename.endswith("_fsdp_param_group.py"):
                if group := frame.f_locals.get("self"):
                    return group._module_fqn, f"weights {self.phase}"
            frame = frame.f_back
        return self.unit, self.phase


def written_by(func: Any, args: tuple, kwargs: dict) -> list:
    """The arguments, tensors or lists of them, that an operation writes to."""
    schema = func._schema.arguments
    named = dict(zip((a.name for a in schema), args)) | kwargs
    changed = [a.name for a in schema if a.alias_info and a.alias_info.is_write]
    return [named[name] for name in changed if named.get(name) is not None]


@contextmanager
def recording(chip: int) -> Iterator[Recorder]:
    """Nothing is computed inside, everything is recorded.

    Raises KernelError as fake_gpu does, and ValueError for a kernel that WRITES does not know and
    for a value that is asked for.
    """
    with fake_gpu(chip) as launches:
        before, recorder, run = kernels.use("triton"), Recorder(launches), JITFunction.run

        def and_record(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
            result = run(self, *args, **kwargs)
            recorder.kernel(self.fn.__name__, dict(zip(self.arg_names, args)) | kwargs)
            return result

        JITFunction.run = and_record
        try:
            with recorder:
                yield recorder
        finally:
            JITFunction.run = run
            kernels.use(before)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, as parallel.start_processes makes on one GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def record(
    config: Config, micro_batches: int = 1, chip: int = 90
) -> tuple[list[Operation], list[Made]]:
    """A step of so many micro-batches, in the order of its operations, and the tensors it makes.

    The second step of two: the first sets up FSDP, the optimizer's moments and the kernels.
    """
    device = torch.device("cpu")
    with one_rank():
        with torch.device("meta"):
            model = Lucie(architecture(asdict(config)))
        parallel.checkpoint_activations(model, config.activation_checkpointing)
        forward = parallel.parallelize(model, "fsdp", 0, device, torch.bfloat16)
        model.rope_tables(device)
        optimizer = build_optimizer(model)
        with recording(chip) as recorder:
            mark_units(model, recorder.at)
            for _ in range(2):
                recorder.operations.clear()
                recorder.made.clear()
                make_step(model, forward, optimizer, config, micro_batches, recorder.at)
    return recorder.operations, recorder.made


def build_optimizer(model: Lucie) -> torch.optim.Optimizer:
    """train.py's; numbers do not matter here."""
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": norms}], fused=True)


def make_step(
    model: Lucie,
    forward: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    micro_batches: int,
    at: Callable[[str, str], None],
) -> None:
    """What train.py does in a step, without reading data and without messages between ranks."""
    at("loss", "forward")
    ids = torch.empty(config.micro_batch_size, config.seq_len, dtype=torch.int64)
    targets = torch.tensor(ids.numel() * micro_batches, dtype=torch.float64).clamp(min=1)
    each = config.reduce_each_micro_batch, config.gather_each_micro_batch
    for number in range(1, micro_batches + 1):
        with parallel.micro_batch(forward, number == micro_batches, *each):
            loss = forward(ids, ids, reduction="sum") / targets
            (loss * dist.get_world_size()).backward()
    at("clip", "step")
    parallel.clip_gradients(model, config.clip_grad)
    at("optimizer", "step")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def mark_units(model: Lucie, at: Callable[[str, str], None]) -> None:
    """Say at(unit, phase) whenever the forward enters a unit, and the backward."""

    def entered(unit: str) -> Callable:
        return lambda *_: at(unit, "forward")

    def left(unit: str) -> Callable:
        # The gradient of what a unit returns arrives when its backward begins. Hooks of a tensor
        # launch nothing.
        def watch(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> None:
            output.register_hook(lambda _: at(unit, "backward"))

        return watch

    layers = {f"layers.{i}": block for i, block in enumerate(model.layers)}
    names = ("embed_tokens", "norm", "lm_head")
    for unit, module in (layers | {name: getattr(model, name) for name in names}).items():
        module.register_forward_pre_hook(entered(unit))
        module.register_forward_hook(left(unit))
