"""Train Lucie: one phase, from a config file.

    python train.py config/demo_pretrain.py
    torchrun --nproc-per-node=8 train.py config/pretrain.py --micro_batch_size=2

Any option of config/__init__.py can follow as --name=value. Read main() from top to bottom: it sets
up the run, then loops over the steps of the schedule. Nothing in it depends on the number of
processes but which samples each one reads.
"""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import checkpoint
import kernels
import runlog
from checkpoint import CheckpointError
from config import Config, ConfigError, load
from data.dataset import DataError, Mixture
from data.tokenizer import TokenizerError
from data.tokenizer import load as load_tokenizer
from kernels.linear_cross_entropy import IGNORE
from model import Lucie, initial_weight
from schedule import Schedule, Step, revision_name

# Dense bf16, by a part of the name of the GPU. Other H100s (PCIe, NVL) are slower and not listed.
PEAK_FLOPS = {"A100": 312e12, "H100 80GB HBM3": 989.4e12, "H200": 989.4e12}
MAY_CHANGE = {  # on resuming a run; every other option would make it another run
    "init_from", "out_dir", "device", "kernels", "compile", "max_minutes", "micro_batch_size",
    "log_every", "eval_every", "eval_samples", "checkpoint_every", "checkpoint_early_every",
    "checkpoint_early_steps",
}  # fmt: skip


class Diverged(Exception):
    """The loss or the gradient is no longer a number."""


def main(argv: list[str]) -> None:
    started = time.monotonic()
    stop = catch_signals()
    config = load(argv)
    device, dtype = pick_device(config)
    pick_kernels(config, device)
    rank, world = start_processes(device)
    model = empty_model(config, device, dtype)
    check(config, model)
    schedule = schedule_of(config)
    mixture = Mixture(config.mixture, config.seq_len, config.seed, config.vocab_size)
    validation = None
    if config.validation:
        validation = Mixture(config.validation, config.seq_len, config.seed, config.vocab_size)

    # --- what to start from
    run = Path(config.out_dir, config.name)
    source, resume = find_start(config, run, mixture)
    model.to_empty(device=device)
    optimizer = build_optimizer(config, model)
    state = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "gpu_seconds": 0.0}
    if resume:
        state |= checkpoint.load(source, model, optimizer)
    elif source is None:
        for name, parameter in model.named_parameters():
            value = initial_weight(model.config, name, parameter.shape, config.seed)
            checkpoint.fill_rows(parameter, 0, value)
    elif isinstance(source, Path):
        checkpoint.load(source, model, None)
    else:
        checkpoint.load_hf(checkpoint.hf_folder(*source.split("@", 1)), model)
    state |= {"config": asdict(config), "mixture": mixture.fingerprint()}

    # --- logs
    flops, peak = model.flops_per_token(config.seq_len), peak_flops(device)
    log = board = None
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        runlog.write_whole(run / "config.json", json.dumps(asdict(config), indent=1))
        log = runlog.open_log(run, state["step"])
        board = runlog.open_board(run, state["step"])
    last, saves = schedule.num_steps(), set(schedule.checkpoint_steps())
    bar = tqdm(
        desc=config.name,
        total=schedule.samples_after(last),
        initial=state["samples"],
        unit=" samples",
        smoothing=0.05,
        disable=rank > 0,
    )

    # --- the loop
    steps = schedule.steps_from(state["step"])
    reader = ThreadPoolExecutor(1)  # reads the next step's data while this one computes
    upcoming = reader.submit(read_step, mixture, next(steps, None), config, rank, world)
    since, since_tokens = time.monotonic(), 0
    before, saved, stopping, unreadable = started, state["step"], False, None
    while state["step"] < last and not stopping:
        try:
            step, batches = upcoming.result()
            upcoming = reader.submit(read_step, mixture, next(steps, None), config, rank, world)
        except DataError as error:
            unreadable, batches = error, []

        # Loss and gradient are means over all target tokens of the step, on all ranks.
        count = sum(int((y != IGNORE).sum()) for _, y in batches)
        count, failures = sum_over_ranks(torch.tensor([count, unreadable is not None]), device)
        if failures:  # what is trained so far is kept
            unreadable = unreadable or DataError("another rank could not read its data")
            break
        loss = torch.zeros((), device=device)
        for tokens, targets in batches:
            with autocast(device, dtype):
                part = model(tokens.to(device), targets.to(device), reduction="sum") / count
            (part * world).backward()  # FSDP averages over ranks where a sum is wanted
            loss += part.detach()
        loss = sum_over_ranks(loss, device).item()
        grad_norm = clip_gradients(model, config.clip_grad)
        if not math.isfinite(loss + grad_norm):
            raise Diverged(
                f"step {step.step}: loss {loss}, gradient norm {grad_norm}, at the samples from "
                f"{step.samples_before:,} on; stopped before the update, nothing saved since"
            )
        learning_rate = schedule.learning_rate(step.samples_before)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        now = time.monotonic()
        state["step"] = step.step
        state["samples"] = step.samples_before + step.batch_size
        state["tokens"] = state["samples"] * config.seq_len
        state["seconds"] += now - before
        state["gpu_seconds"] += (now - before) * world
        before = now
        since_tokens += step.batch_size * config.seq_len
        bar.update(step.batch_size)

        validate = step.step % config.eval_every == 0 or step.step == last
        validate = validate and validation is not None
        if validate or step.step % config.log_every == 0 or step.step == last:
            speed = since_tokens / (now - since)
            row = {
                "training_steps": step.step,
                "training_tokens": state["tokens"],
                "training_loss": loss,
                "walltime": state["seconds"] / 3600,
                "gputime": state["gpu_seconds"] / 3600,
                "learning_rate": schedule.learning_rate(state["samples"]),
                "grad_norm": grad_norm,
                "tokens_per_second": speed,
                "mfu": speed * flops / (world * peak) if peak else None,
                "validation_loss": None,
            }
            if validate:
                row["validation_loss"] = validation_loss(
                    model, validation, config, device, dtype, rank, world
                )
            if rank == 0:
                runlog.write(log, board, row)
            bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}, {speed:,.0f} tokens/s")
            since, since_tokens = time.monotonic(), 0  # the validation is not part of the speed

        # One rank's signal stops all: the decision, unlike the signal, is everybody's at once.
        minutes = (time.monotonic() - started) / 60
        late = 0 < config.max_minutes <= minutes
        stopping = bool(sum_over_ranks(bool(stop) or late, device))
        if step.step in saves or stopping:
            save(run, config, model, optimizer, state)
            saved, since, since_tokens = step.step, time.monotonic(), 0
    bar.close()
    if unreadable:
        if saved != state["step"]:
            save(run, config, model, optimizer, state)
        raise unreadable
    if rank == 0:
        name = revision_name(saved, config.checkpoint_prefix)
        print(f"{config.name}: step {saved:,} of {last:,} in {run / 'checkpoints' / name}")


# --- set-up --------------------------------------------------------------------------------------


def pick_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device of this process and the dtype to compute in."""
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {config.device!r}: not to be had here; --device=cpu")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if config.dtype == "auto":
        # On a processor without bf16 products they are emulated, several times slower than fp32.
        config.dtype = "bfloat16" if kind == "cuda" or cpu_has_bfloat16() else "float32"
    if config.dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype is bfloat16, float32 or auto, not {config.dtype!r}")
    return device, getattr(torch, config.dtype)


def pick_kernels(config: Config, device: torch.device) -> None:
    if config.kernels == "triton" and device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError("kernels=triton: not with --device=cpu")
    try:
        kernels.use(config.kernels)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"kernels={config.kernels}: {error}") from None


def cpu_has_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


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


def empty_model(config: Config, device: torch.device, dtype: torch.dtype) -> Lucie:
    """The model on the meta device, sharded by FSDP where there are processes to share it.

    Each block is gathered for its own forward and backward only; the embedding, last norm and head
    stay gathered with the root. Parameters, gradients and their reduction are fp32, compute dtype.
    """
    try:
        architecture = checkpoint.architecture(asdict(config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with torch.device("meta"):
        model = Lucie(architecture)
    if config.compile:
        for block in model.layers:  # all are alike: the first one's code serves the others
            block.compile()
    if dist.is_initialized():
        # Inputs are not cast: the rotary tables among them must stay fp32.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def check(config: Config, model: Lucie) -> None:
    """Raises ConfigError for what this machine cannot hold, or a vocabulary that does not fit."""
    # fp32 weight, gradient and two moments; activations come on top
    need = 16 * model.num_params() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if dist.is_initialized():
        need //= dist.get_world_size()
    have = machine_memory(config)
    if have and need > have:
        raise ConfigError(
            f"{model.num_params() / 1e9:.2f} B parameters train in {need / 1e9:.0f} GB at least "
            f"(16 bytes each) and there are {have / 1e9:.0f} GB here: use more GPUs, or try "
            "config/demo_pretrain.py"
        )
    if config.tokenizer:
        size = load_tokenizer(config.tokenizer).vocab_size
        if size != config.vocab_size:
            raise ConfigError(
                f"{config.tokenizer} has {size:,} tokens, but vocab_size is {config.vocab_size:,}"
            )


def machine_memory(config: Config) -> int:
    """Bytes of the GPUs of this machine, or its main memory; 0 where that cannot be known."""
    if torch.cuda.is_available() and config.device != "cpu":
        return torch.cuda.mem_get_info()[1] * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def schedule_of(config: Config) -> Schedule:
    try:
        schedule = Schedule(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not schedule.num_steps():
        raise ConfigError(f"samples {config.samples} are not enough for one step")
    return schedule


def find_start(config: Config, run: Path, mixture: Mixture) -> tuple[Path | str | None, bool]:
    """(where weights come from, whether the run resumes): what init_from stands for.

    A Path is a checkpoint of ours, a string a Hugging Face folder or name, None is from scratch.
    Giving the same command again resumes a run, whatever its first weights were.
    """
    wanted, existing = config.init_from, checkpoint.latest(run)
    if existing:
        state = checkpoint.read_state(existing)
        old, new = state["config"], asdict(config)
        if wanted not in ("resume", "auto", old.get("init_from")) or wanted == "scratch":
            raise ConfigError(f"{run} holds a run already: --init_from=resume, or another --name")
        differ = [n for n in new if n not in MAY_CHANGE and old.get(n) != new[n]]
        if differ:
            fields = ", ".join(f"{n} was {old.get(n)!r} and is {new[n]!r}" for n in differ)
            raise ConfigError(f"{run} holds another run: {fields}; choose another --name")
        if state.get("mixture") != mixture.fingerprint():
            raise ConfigError(
                f"{run}: the sources, weights or tokens of {config.mixture} changed since it was "
                "begun, so its samples would be others; choose another --name"
            )
        config.init_from = old["init_from"]
        return existing, True
    if wanted in ("auto", "scratch"):
        return None, False
    if wanted.startswith("hf:"):
        return wanted.removeprefix("hf:"), False
    if wanted == "resume" or not (source := checkpoint.latest(wanted)):
        where = run if wanted == "resume" else wanted
        raise ConfigError(f"init_from={wanted}: no complete checkpoint in {where}")
    return source, False


def build_optimizer(config: Config, model: Lucie) -> torch.optim.AdamW:
    """AdamW in torch's fused form. Matrices decay, norms do not."""
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)


def catch_signals() -> list[str]:
    """A list that SIGINT, SIGTERM or SIGUSR1 adds to; a second signal stops at once."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(signal.Signals(number).name)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)
    return received


# --- in the loop ---------------------------------------------------------------------------------


def read_step(
    mixture: Mixture, step: Step | None, config: Config, rank: int, world: int
) -> tuple[Step, list[tuple[Tensor, Tensor]]] | None:
    """This rank's micro-batches of a step: (tokens, targets), int64 `[<= micro_batch_size, T]`.

    Every rank makes the same number of passes, since each is a meeting of all ranks; one that has
    run out of samples passes with a sample whose targets do not count.
    """
    if step is None:
        return None
    samples = range(step.samples_before, step.samples_before + step.batch_size)
    mine, size = samples[rank::world], config.micro_batch_size
    batches = []
    for first in range(0, len(samples[::world]), size):  # rank 0 has the most samples
        block = [mixture[i] for i in mine[first : first + size]]
        if block:
            tokens = torch.from_numpy(np.stack(block))
            batches.append((tokens[:, :-1], tokens[:, 1:]))
        else:
            nothing = torch.zeros(1, config.seq_len, dtype=torch.int64)
            batches.append((nothing, nothing + IGNORE))
    return step, batches


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Compute in dtype where FSDP does not see to it already."""
    if dist.is_initialized() or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def sum_over_ranks(value: Tensor | float, device: torch.device) -> Tensor:
    value = torch.as_tensor(value, device=device)
    value = value.long() if value.dtype == torch.bool else value
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def clip_gradients(model: Lucie, largest: float) -> float:
    """Scale all gradients so that their joint norm is at most `largest`; the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def validation_loss(
    model: Lucie,
    mixture: Mixture,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    world: int,
) -> float:
    """Mean loss over the first eval_samples of the held-out mixture, the same ones every time."""
    _, batches = read_step(mixture, Step(0, 0, config.eval_samples), config, rank, world)
    loss = torch.zeros((), device=device)
    for tokens, targets in batches:
        with autocast(device, dtype):
            loss += model(tokens.to(device), targets.to(device), reduction="sum")
    if isinstance(model, FSDPModule):
        model.reshard()  # its root stays gathered after a forward that no backward follows
    count = sum(int((y != IGNORE).sum()) for _, y in batches)
    return (sum_over_ranks(loss, device) / sum_over_ranks(count, device)).item()


def save(
    run: Path, config: Config, model: Lucie, optimizer: torch.optim.AdamW, state: dict
) -> None:
    name = revision_name(state["step"], config.checkpoint_prefix)
    checkpoint.save(run / "checkpoints" / name, model, optimizer, state)


def command_line(argv: list[str]) -> None:
    """main, with errors as one line and an exit code: 2 for bad input, 1 for a diverged run."""
    try:
        main(argv)
    except (ConfigError, DataError, TokenizerError, CheckpointError) as error:
        sys.exit(_fail(2, error))
    except OSError as error:
        sys.exit(_fail(2, f"{error.filename or 'writing'}: {error.strerror}"))
    except Diverged as error:
        sys.exit(_fail(1, error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(code: int, message: object) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    command_line(sys.argv[1:])
