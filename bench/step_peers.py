"""The sides that bench.step compares, our model and its peers, and the step that they all make.

    ours                  as train.py builds it
    transformers          LlamaForCausalLM with torch's SDPA
    liger                 the same with Liger's patch, the loss fused with the head
    transformers compiled its blocks and its loss under torch.compile
    ours compiled         the definitions in plain torch, each block under torch.compile

All under FSDP2 on one rank: weights, gradients and moments fp32, compute in one dtype. A side is
built by entering it, on memory that is not filled yet; what it changed in other modules is undone
when it is left.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import record_function

import checkpoint
import kernels
import parallel
from bench.kernels import Timer, gpu_timer
from bench.step_groups import CLIP, MICRO_BATCH, OPTIMIZER
from config import Config
from hf import rows_of
from model import Lucie, LucieConfig

Loss = Callable[[Tensor, Tensor], Tensor]  # of tokens and targets, a mean
Built = tuple[nn.Module, Loss]  # what has the parameters, and its loss
Side = Callable[[Config, torch.device], AbstractContextManager[Built]]
OURS = "ours"


def architecture(config: Config) -> LucieConfig:
    return checkpoint.architecture(asdict(config))


def start(device: torch.device) -> None:
    """One rank, sharded over itself; on a CPU too, where train.py does without."""
    if dist.is_initialized():
        return
    if device.type == "cpu":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        parallel.start_processes(device)


@contextmanager
def ours(
    config: Config, device: torch.device, implementation: str = "auto", compiled: bool = False
) -> Iterator[Built]:
    before = kernels.use(implementation)
    try:
        with torch.device("meta"):
            model = Lucie(architecture(config))
        parallel.checkpoint_activations(model, config.activation_checkpointing)
        if compiled:
            for block in model.layers:
                block.compile(dynamic=False)
        dtype = getattr(torch, config.dtype)
        forward = parallel.parallelize(model, "fsdp", 0, device, dtype)
        yield model, lambda tokens, targets: forward(tokens, targets)
    finally:
        kernels.use(before)


@contextmanager
def transformers(
    config: Config, device: torch.device, liger: bool = False, compiled: bool = False
) -> Iterator[Built]:
    from transformers.models.llama import modeling_llama

    patched = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
    try:
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
        with torch.device("meta"):
            llama = modeling_llama.LlamaConfig(
                **vars(architecture(config)), tie_word_embeddings=False, use_cache=False,
                attn_implementation="sdpa",
            )  # fmt: skip
            model = modeling_llama.LlamaForCausalLM(llama)
        if config.activation_checkpointing != "none":  # it knows one way, everything again
            with warnings.catch_warnings(action="ignore"):  # the name will change in version 6
                model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            for block in model.model.layers:
                block.compile(dynamic=False)
            model.loss_function = torch.compile(model.loss_function, dynamic=False)
        _shard(model, device, getattr(torch, config.dtype))
        model.to_empty(device=device)
        # The angles are no parameters, and made anew: to_empty has left them unfilled.
        with device:
            model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config=llama)
        model.train()

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            return model(input_ids=tokens, labels=targets, shift_labels=targets).loss

        yield model, loss
    finally:
        vars(modeling_llama).update(patched[0])
        modeling_llama.LlamaForCausalLM.forward = patched[1]


def _shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """As parallel.parallelize does with ours: the same policy, by blocks, one gathered ahead.

    Embedding, last norm and head belong to the root, which stays gathered: Liger reads the head's
    weight without calling the head.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = init_device_mesh(device.type, (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for before, after in pairwise(model.model.layers):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])


def sides(device: torch.device) -> dict[str, Side]:
    """Every side by name, ours first, then those that matter most."""
    mine = "triton" if device.type == "cuda" else "auto"  # the kernels, not whatever can run
    return {
        OURS: lambda *args: ours(*args, mine),
        "transformers": transformers,
        "liger": lambda *args: transformers(*args, liger=True),
        "ours compiled": lambda *args: ours(*args, "torch", compiled=True),
        "transformers compiled": lambda *args: transformers(*args, compiled=True),
    }


def fill(model: nn.Module, device: torch.device, std: float) -> None:
    """Random weights, made on the device, the same sizes for everybody; norms are ones."""
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        rows, _ = parallel.local_rows(parameter)
        rows.fill_(1) if rows.ndim == 1 else rows.normal_(0, std, generator=generator)


# --- do they compute the same? -------------------------------------------------------------------

SMALL = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    seq_len=128,
    dtype="bfloat16",
    rope_theta=1e4,
)
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-2, 3e-2  # relative: bf16 against fp32, and no more


def compare(side: Side, device: torch.device) -> dict:
    """Loss and gradient norm of a side with our weights, beside our definitions' in fp32.

    The targets are what the exact model finds likeliest, so that the loss is far below that of a
    guess, and grows with everything that is computed otherwise.
    """
    config = Config(**SMALL)
    before = kernels.use("torch")
    try:
        exact = Lucie(architecture(config)).to(device)
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.ones(p.shape) if p.ndim == 1
            else torch.randn(p.shape, generator=generator) * 2 * p.shape[1] ** -0.5
            for name, p in exact.named_parameters()
        }  # fmt: skip
        tokens = torch.randint(config.vocab_size, (2, config.seq_len), generator=generator)
        tokens = tokens.to(device)
        with torch.no_grad():
            for name, parameter in exact.named_parameters():
                parameter.copy_(weights[name])
            targets = exact(tokens).argmax(-1)
        expected = _loss_and_norm(exact, exact, tokens, targets)
    finally:
        kernels.use(before)
    with side(config, device) as (model, loss):
        load_ours(model, weights, architecture(config))
        found = _loss_and_norm(model, loss, tokens, targets)
    errors = [abs(a - b) / b for a, b in zip(found, expected)]
    right = errors[0] <= LOSS_TOLERANCE and errors[1] <= NORM_TOLERANCE  # not so of NaN
    return {
        "loss": found[0],
        "grad_norm": found[1],
        "expected_loss": expected[0],
        "expected_grad_norm": expected[1],
        "failure": None
        if right
        else f"wrong: loss {found[0]:.4f} for {expected[0]:.4f}, "
        f"gradient norm {found[1]:.4f} for {expected[1]:.4f}",
    }


def _loss_and_norm(
    model: nn.Module, loss: Loss, tokens: Tensor, targets: Tensor
) -> tuple[float, float]:
    value = loss(tokens, targets)
    value.backward()
    return value.item(), parallel.clip_gradients(model, 0).item()


def load_ours(model: nn.Module, weights: dict[str, Tensor], config: LucieConfig) -> None:
    """Our weights into our model, or into transformers', whose q, k, v, gate and up are apart."""
    parameters = dict(model.named_parameters())
    parts = {name: (name, 0, len(weight)) for name, weight in weights.items()}
    if "lm_head.weight" in parameters and "embed_tokens.weight" not in parameters:
        parts = rows_of(config)
    if differing := parts.keys() ^ parameters.keys():
        raise ValueError(f"weights and model differ in {', '.join(sorted(differing))}")
    for name, (source, first, end) in parts.items():
        parallel.fill_rows(parameters[name], 0, weights[source][first:end])


# --- the step, the same for all ------------------------------------------------------------------


def make_step(
    model: nn.Module, loss: Loss, config: Config, device: torch.device
) -> Callable[[], None]:
    """A function that makes one optimizer step on random tokens, as train.py's loop does."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-5,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    generator = torch.Generator(device).manual_seed(1)
    size = (config.global_batch_size, config.seq_len + 1)
    samples = torch.randint(config.vocab_size, size, device=device, generator=generator)
    batches = [
        (batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        for batch in samples.split(config.micro_batch_size)
    ]

    def step() -> None:
        for number, (tokens, targets) in enumerate(batches, 1):
            last = number == len(batches)
            with (
                record_function(MICRO_BATCH),
                parallel.micro_batch(
                    model, last, config.reduce_each_micro_batch, config.gather_each_micro_batch
                ),
            ):
                part = loss(tokens, targets) * (len(tokens) / len(samples))
                part.backward()
        with record_function(CLIP):
            parallel.clip_gradients(model, config.clip_grad)
        with record_function(OPTIMIZER):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begin


def memory(device: torch.device) -> dict[str, int | None]:
    """Peaks of what tensors took, and of what torch took from the driver for them: bytes."""
    if device.type != "cuda":
        return {"allocated": None, "reserved": None}
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def step_timer(device: torch.device) -> Timer:
    if device.type == "cuda":
        return gpu_timer

    def timer(function: Callable[[], object]) -> list[float]:
        function()
        times = [1e3 * seconds(function, device) for _ in range(5)]
        return [statistics.median(times), min(times), max(times)]

    return timer


# --- the demo model on a CPU, in turns ------------------------------------------------------------


def training_step(
    model: nn.Module, loss: Loss, config: Config, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], float]:
    """A function that makes one optimizer step and returns the seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(tokens, targets)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        return time.perf_counter() - started

    return step


def in_turns(config: Config, dtype: torch.dtype, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, ours and theirs, after two warm-up steps of both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = architecture(config)
    ours = Lucie(shape)
    theirs = LlamaForCausalLM(
        LlamaConfig(**vars(shape), tie_word_embeddings=False, attn_implementation="sdpa")
    )

    def theirs_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return theirs(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    pair = [
        training_step(ours, ours, config, dtype),
        training_step(theirs, theirs_loss, config, dtype),
    ]
    generator = torch.Generator().manual_seed(0)
    size = (config.micro_batch_size, config.seq_len + 1)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        block = torch.randint(config.vocab_size, size, generator=generator)
        turns = list(zip(pair, times))
        for side, seconds in turns if number % 2 else reversed(turns):
            took = side(block[:, :-1], block[:, 1:].contiguous())
            if number >= 2:
                seconds.append(took)
    return times


def show_turns(path: str, config: Config, dtypes: list[str], rounds: int) -> None:
    """The table of `make bench`. Raises ImportError without transformers."""
    tokens = config.micro_batch_size * config.seq_len
    print(f"{path}: {config.micro_batch_size} x {config.seq_len} tokens a step, CPU,")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {rounds}")
    print(f"{'':10} {'nanoLucie':>16} {'transformers':>16} {'ratio':>7}")
    for name in dtypes:
        mine, theirs = in_turns(config, getattr(torch, name), rounds)
        ratio = statistics.median(b / a for a, b in zip(mine, theirs))
        speeds = [f"{tokens / statistics.median(s):,.0f} tokens/s" for s in (mine, theirs)]
        print(f"{name:10} {speeds[0]:>16} {speeds[1]:>16} {ratio:>7.2f}")
