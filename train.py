"""Train Lucie: one phase, from a config file.

    python train.py config/demo_pretrain.py
    torchrun --nproc-per-node=8 train.py config/pretrain.py --micro_batch_size=2

Any option of config/__init__.py can follow. Read main() from top to bottom: it sets up the run and
then makes the steps of the schedule. The number of processes changes nothing but which samples each
of them reads.
"""

import csv
import json
import math
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

import checkpoint
import kernels
import parallel
from checkpoint import CheckpointError
from config import Config, load
from config.cli import ConfigError, lock, run_cli, write_file
from data.dataset import DataError, Mixture, Share, document_starts, read_share
from data.tokenizer import load as load_tokenizer
from model import Lucie
from schedule import Schedule, Step, revision_name

# Lucie's columns, with times in hours, then ours. data_seconds: how long the slowest rank waited
# for its samples since the row before.
LOG_COLUMNS = (
    "training_steps", "training_tokens", "training_loss", "walltime", "gputime", "learning_rate",
    "grad_norm", "tokens_per_second", "mfu", "validation_loss", "data_seconds",
)  # fmt: skip


def main(argv: list[str]) -> int:
    started = time.monotonic()
    signals = catch_signals()
    config = load(argv)

    # --- device, kernels, schedule, processes, model, optimizer, data
    try:
        device, dtype = parallel.pick_device(config.device, config.dtype)
        kernels.use(config.kernels)
        schedule = Schedule(config)
        if config.samples < schedule.batch_size(0):
            raise ValueError(f"samples must be at least {schedule.batch_size(0)}, those of a step")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config.dtype = str(dtype).removeprefix("torch.")
    rank, world = parallel.start_processes(device)
    expected = (ConfigError, DataError, CheckpointError, OSError)
    run = Path(config.out_dir, config.name)
    claimed = parallel.together(lambda: None if rank else claim(run), errors=expected)
    try:
        model, forward = build_model(config, device, dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    optimizer = build_optimizer(config, model)
    mixture, held_out = parallel.together(open_data, config, rank, world, errors=expected)
    if len(set(parallel.gather(mixture.fingerprint()))) > 1:
        raise ConfigError(f"{config.mixture}: its sources are not the same on every rank")

    # --- what the run starts from
    state = checkpoint.start(config, run, mixture.fingerprint(), model, optimizer)
    state |= {"config": asdict(config), "mixture": mixture.fingerprint()}
    state["versions"] = {} if rank else checkpoint.versions()
    saver = checkpoint.Saver(run / "checkpoints", config.keep_last)
    first, last = state["step"], schedule.num_steps()
    if rank == 0:
        print(describe(config, run, mixture, model, state), flush=True)
    log = parallel.together(lambda: None if rank else open_log(config, run, first), errors=expected)

    # --- the loop
    def steps_and_shares() -> Iterator[tuple[Step, Future[Share]]]:
        """Each step and this rank's share of it, read while the step before computes."""
        reader, ahead = ThreadPoolExecutor(1), []
        for step in schedule.steps_from(first):
            samples = range(step.samples_before, step.samples_before + step.batch_size)
            share = (mixture, samples, config.micro_batch_size, rank, world, device.type == "cuda")
            ahead.append((step, reader.submit(read_share, *share)))
            if len(ahead) == 2:
                yield ahead.pop(0)
        yield from ahead

    milestones = set(schedule.checkpoint_steps())
    flops, peak = model.flops_per_token(config.seq_len), parallel.peak_flops(device)
    bar = tqdm(desc=config.name, total=schedule.samples_after(last), initial=state["samples"],
               unit=" samples", smoothing=0.05, disable=rank > 0)  # fmt: skip
    stopping = diverged = False
    saved, step_began, row_began, row_tokens, waited = first, started, time.monotonic(), 0, 0.0
    for step, reading in steps_and_shares():
        asked = time.monotonic()
        share = reading.result()
        waited += time.monotonic() - asked

        losses = accumulate_gradients(forward, share, config, device)
        grad_norm = parallel.clip_gradients(model, config.clip_grad)

        # All ranks act on a signal or a failure of one of them, at the same step. This is the only
        # time in a step that the host waits for the device.
        late = 0 < config.max_minutes <= (time.monotonic() - started) / 60
        flags = {"stop": bool(signals) or late, "save_failed": saver.failed()}
        sums = parallel.named_sums(device, {"grad_norm": grad_norm}, loss=sum(losses), **flags)
        loss, grad_norm, stopping = sums["loss"], sums["grad_norm"], sums["stop"] > 0
        if sums["save_failed"]:
            saver.wait()  # raises the reason
        if not math.isfinite(loss + grad_norm):
            diverged = True
            where = not_finite(step, share, losses, config.micro_batch_size)
            if rank == 0:
                line = f"train.py: step {step.step}: loss {loss}, gradient norm {grad_norm} on "
                line += f"{where}; stopped before the update, the last step saved is {saved:,}"
                tqdm.write(line, file=sys.stderr)
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step.samples_before)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        now = time.monotonic()
        state["step"], state["samples"] = step.step, step.samples_before + step.batch_size
        state["tokens"] = state["samples"] * config.seq_len
        state["seconds"] += now - step_began
        state["gpu_seconds"] += (now - step_began) * world
        step_began = now
        row_tokens += step.batch_size * config.seq_len
        bar.update(step.batch_size)

        validate = held_out is not None and (
            step.step % config.eval_every == 0 or step.step == last
        )
        if validate or step.step % config.log_every == 0 or step.step == last:
            seconds, waits = now - row_began, max(parallel.gather(waited))
            speed, rate = row_tokens / seconds, schedule.learning_rate(state["samples"])
            shown = f"loss {loss:.3f}, lr {rate:.1e}, {speed:,.0f} tokens/s"
            if waits > 0.1 * seconds:
                shown += f", {waits / seconds:.0%} of the time waiting for data"
            bar.set_postfix_str(shown, refresh=False)
            held_out_loss = validation_loss(forward, held_out, config, device) if validate else None
            if rank == 0:
                hours = (state["seconds"] / 3600, state["gpu_seconds"] / 3600)
                mfu = speed * flops / (world * peak) if peak else None
                log((step.step, state["tokens"], loss, *hours, rate, grad_norm, speed, mfu,
                     held_out_loss, waits))  # fmt: skip
                if validate:
                    line = f"step {step.step:,}: validation loss {held_out_loss:.4f}"
                    tqdm.write(line, file=sys.stderr)
            # The validation does not count towards the speed.
            row_began, row_tokens, waited = time.monotonic(), 0, 0.0

        rolling = config.save_every and step.step % config.save_every == 0
        if step.step in milestones or rolling or stopping:
            name = revision_name(step.step, config.checkpoint_prefix)
            saver.save(name, model, optimizer, state, milestone=step.step in milestones)
            saved = step.step
        if stopping:
            break
    bar.close()
    saver.wait()
    if rank == 0 and not diverged:
        newest = run / "checkpoints" / revision_name(saved, config.checkpoint_prefix)
        print(summary(config, newest, first, saved, last))
    if claimed:
        claimed.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(diverged)


# --- set-up --------------------------------------------------------------------------------------


def claim(run: Path) -> IO:
    """Keep other processes from training the same run, until the file returned is closed."""
    if (file := lock(run)) is None:
        raise CheckpointError(f"{run}: another process is training this run")
    return file


def catch_signals() -> list[int]:
    """A list to which the first SIGINT, SIGTERM or SIGUSR1 adds its number; a second signal ends
    the process at once."""
    received: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def stop(received_now: int, _frame: object) -> None:
        received.append(received_now)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, stop)
    return received


def build_model(
    config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Lucie, nn.Module]:
    """(the model, the module to call): allocated, on every rank its part, but not filled yet."""
    with torch.device("meta"):
        model = Lucie(checkpoint.architecture(asdict(config)))
    parallel.checkpoint_activations(model, config.activation_checkpointing)
    if config.compile:
        for block in model.layers:  # all blocks are identical, so they share one compilation
            block.compile()
    return model, parallel.parallelize(model, config.parallel, config.replica_size, device, dtype)


def build_optimizer(config: Config, model: Lucie) -> torch.optim.AdamW:
    """AdamW in torch's fused form. Matrices decay, norms do not."""
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    others = {"params": norms, "weight_decay": 0.0}
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW([decayed, others], betas=betas, eps=config.eps, fused=True)


def open_data(config: Config, rank: int, world: int) -> tuple[Mixture, Share | None]:
    """(the mixture to train on, this rank's share of the held-out samples)."""
    if config.tokenizer:
        load_tokenizer(config.tokenizer, config.vocab_size)
    common, held_out = (config.seq_len, config.seed, config.vocab_size), None
    if config.validation:
        samples = range(config.eval_samples)
        mixture = Mixture(config.validation, *common)
        held_out = read_share(mixture, samples, config.micro_batch_size, rank, world)
    mixture = Mixture(config.mixture, *common, partial=config.partial)
    return mixture, held_out


def describe(config: Config, run: Path, mixture: Mixture, model: Lucie, state: dict) -> str:
    """What the run is about to do, for the person who started it."""
    device, steps = next(model.parameters()).device, Schedule(config).num_steps()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    begins = f"resumes after step {state['step']:,}" if state["step"] else "begins at step 0"
    if state["step"] == 0 and config.init_from not in ("auto", "scratch"):
        begins += f" with the weights of {config.init_from}"
    text = (
        f"{config.name}: {model.num_params():,} parameters, {config.dtype}, "
        f"{parallel.world_size()} x {kind}\n{steps:,} steps, {config.samples:,} samples, "
        f"{config.samples * config.seq_len:,} tokens; {begins}; writes to {run}"
    )
    epochs = [config.samples * w / n for w, n in zip(mixture.weights, mixture.lengths)]
    if max(epochs) > 1:
        most = max(zip(epochs, mixture.names))
        text += f"\n{sum(n > 1 for n in epochs)} of {len(epochs)} sources are read more than once, "
        text += f"{most[1]} the most often: {most[0]:.1f} times"
    if mixture.missing:
        text += f"\nsources left out, because their files are missing: {', '.join(mixture.missing)}"
    return text


def summary(config: Config, newest: Path, first: int, step: int, last: int) -> str:
    """How the run ended, and how it goes on."""
    if step < last:
        launcher = "torchrun ..." if "RANK" in os.environ else "python"
        how = f"stopped after step {step:,} of {last:,}; to continue, run the same command: "
        how += f"{launcher} {shlex.join(sys.argv)}"
    else:
        how = f"{'had already finished' if first == last else 'finished'} ({last:,} steps)"
    return f"{config.name}: {how}\nnewest checkpoint: {newest}"


def open_log(config: Config, run: Path, step: int) -> Callable[[tuple], None]:
    """A function that adds a row to log.csv, TensorBoard and, if asked for, Weights & Biases.

    A resumed run continues log.csv, without rows past its checkpoint that a crash left behind.
    """
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / "config.json", json.dumps(asdict(config), indent=1).encode())
    path, rows = run / "log.csv", []
    if step and path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file, restval="cut short"):
                number = row.get("training_steps") or ""
                if number.isdecimal() and int(number) <= step and "cut short" not in row.values():
                    rows.append(",".join(row.get(column, "") for column in LOG_COLUMNS))
    write_file(path, ("\n".join([",".join(LOG_COLUMNS), *rows]) + "\n").encode())
    file = open(path, "a", newline="", encoding="utf-8", buffering=1)
    boards: dict[str, Callable[[dict, int], object]] = {}

    @contextmanager
    def optional(name: str) -> Iterator[None]:
        """A board that fails is dropped, and the run continues."""
        try:
            yield
        except Exception as error:
            boards.pop(name, None)
            tqdm.write(f"train.py: continuing without {name} ({error!r})", file=sys.stderr)

    if find_spec("tensorboard"):
        with optional("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            add = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1).add_scalar
            boards["TensorBoard"] = lambda row, step: [add(n, v, step) for n, v in row.items()]
    if config.wandb_project:
        with optional("Weights & Biases"):
            import wandb

            if step == 0 or not (run / "wandb_id").is_file():
                write_file(run / "wandb_id", secrets.token_hex(8).encode())
            options = {"id": (run / "wandb_id").read_text(), "resume": "allow", "dir": str(run)}
            options |= {"project": config.wandb_project, "name": config.name}
            board = wandb.init(config=asdict(config), **options)
            boards["Weights & Biases"] = lambda row, step: board.log(row, step=step)

    def write(values: tuple) -> None:
        try:
            csv.writer(file, lineterminator="\n").writerow(values)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        numbers = {n: v for n, v in zip(LOG_COLUMNS, values, strict=True) if v is not None}
        step = numbers.pop("training_steps")
        for name, add_row in list(boards.items()):
            with optional(name):
                add_row(numbers, step)

    return write


# --- in the loop ---------------------------------------------------------------------------------


def accumulate_gradients(
    forward: nn.Module, share: Share, config: Config, device: torch.device
) -> list[Tensor]:
    """Accumulate the gradient of the mean loss over the target tokens of all ranks.

    Returns what each micro-batch of this rank adds to that loss, fp64 on the device.
    """
    targets = parallel.sum_over_ranks(parallel.to_device(share.targets, device)).clamp(min=1)
    losses = []
    for number, (x, y) in enumerate(share.batches, start=1):
        final = number == len(share.batches)
        with parallel.micro_batch(
            forward, final, config.reduce_each_micro_batch, config.gather_each_micro_batch
        ):
            loss = loss_sum(forward, x, y, config, device) / targets
            (loss * parallel.world_size()).backward()  # torch averages over ranks; we need the sum
        losses.append(loss.detach())
    return losses


def loss_sum(
    forward: nn.Module, x: Tensor, y: Tensor, config: Config, device: torch.device
) -> Tensor:
    """The loss of a micro-batch, summed over its targets, computed in config.dtype."""
    cu_seqlens = document_starts(x).to(device) if config.document_mask else None
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    casts = config.dtype == "bfloat16" and not isinstance(forward, FSDPModule)  # which casts itself
    with torch.autocast(device.type, torch.bfloat16, enabled=casts):
        return forward(x, y, reduction="sum", cu_seqlens=cu_seqlens)


@torch.no_grad()
def validation_loss(
    forward: nn.Module, held_out: Share, config: Config, device: torch.device
) -> float:
    """Mean loss over the held-out samples of all ranks, the same ones every time."""
    losses = (loss_sum(forward, x, y, config, device) for x, y in held_out.batches)
    loss = sum(loss.double() for loss in losses)
    parallel.free_gathered(forward)
    sums = parallel.named_sums(device, {}, loss=loss, targets=held_out.targets)
    return sums["loss"] / sums["targets"]


def not_finite(step: Step, share: Share, losses: list[Tensor], micro_batch_size: int) -> str:
    """Which ranks and samples have a loss that is not finite."""
    broken = []
    for first, loss in zip(range(0, len(share.samples), micro_batch_size), losses):
        if not math.isfinite(loss):
            broken += share.samples[first : first + micro_batch_size]
    found = [f"rank {r}: {ids}" for r, ids in enumerate(parallel.gather(broken)) if ids]
    samples = f"samples {step.samples_before} to {step.samples_before + step.batch_size - 1}"
    return f"{samples} ({', '.join(found) or 'the loss of every sample is finite'})"


if __name__ == "__main__":
    run_cli(main, DataError, CheckpointError)
