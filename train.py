"""Train Lucie: one phase, from a config file.

    python train.py config/demo_pretrain.py
    torchrun --nproc-per-node=8 train.py config/pretrain.py --micro_batch_size=2

Any option of config/__init__.py can follow as --name=value. Read main() from top to bottom: it sets
up the run, then loops over the steps of the schedule. Nothing in it depends on the number of
processes but which samples each one reads.
"""

import gc
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

import checkpoint
import hardware
import parallel
import runlog
from checkpoint import CheckpointError
from config import Config, ConfigError, load
from data.dataset import Mixture
from data.loader import Share, read_share
from data.tokenizer import load as load_tokenizer
from model import Lucie
from schedule import Schedule, Step, revision_name
from start import EXPECTED, fill, find_start


class Diverged(Exception):
    """The loss or the gradient is no longer a number."""


def main(argv: list[str]) -> None:
    started = time.monotonic()
    stop = catch_signals()
    config = load(argv)
    device, dtype = hardware.pick_device(config)
    hardware.pick_kernels(config, device)
    rank, world = parallel.start_processes(device)
    model, forward = build_model(config, device, dtype)
    optimizer = build_optimizer(config, model)
    schedule = schedule_of(config)
    mixture, held_out = parallel.together(open_data, config, rank, world, errors=EXPECTED)
    if len(set(parallel.gather(mixture.fingerprint()))) > 1:
        raise ConfigError(f"{config.mixture}: its sources are not the same on every rank")

    # --- what to start from
    run = Path(config.out_dir, config.name)
    source, resume = find_start(config, run, mixture, rank, world)
    state = fill(model, optimizer, source, resume, config, rank)
    state |= {"config": asdict(config), "mixture": mixture.fingerprint()}
    state["versions"] = runlog.versions() if rank == 0 else {}

    # --- logs and checkpoints
    flops, peak = model.flops_per_token(config.seq_len), hardware.peak_flops(device)
    log, board = parallel.together(open_logs, run, state, rank, errors=EXPECTED)
    last, milestones = schedule.num_steps(), set(schedule.checkpoint_steps())
    saver = checkpoint.Saver(run / "checkpoints", config.keep_last, device.type == "cuda")
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

    def read_ahead() -> tuple[Step, Future[Share]] | None:
        if (step := next(steps, None)) is None:
            return None
        samples = range(step.samples_before, step.samples_before + step.batch_size)
        share = (mixture, samples, config.micro_batch_size, rank, world, device.type == "cuda")
        return step, reader.submit(read_share, *share)

    upcoming = read_ahead()
    arrived = watch_samples(model)
    gc.collect()
    gc.freeze()  # what lives now lives to the end: no later collection goes through it
    since, since_tokens, waited = time.monotonic(), 0, 0.0
    before, saved = started, state["step"]
    stopping = unsaved = unread = False
    while state["step"] < last and not stopping:
        (step, reading), upcoming = upcoming, read_ahead()
        waits, asked = [0.0] * world, time.monotonic()
        mine = reading.result()
        waits[rank] = time.monotonic() - asked

        arrived.clear()
        loss = gradients(forward, mine, config, device, dtype, world)
        grad_norm = parallel.clip_gradients(model, config.clip_grad)

        # One rank's trouble or signal is everybody's, at the same step. To learn of it is the only
        # time in a step that the host waits for the device.
        late = 0 < config.max_minutes <= (time.monotonic() - started) / 60
        flags = [bool(stop) or late, saver.failed(), mine.error is not None]
        told = parallel.sum_over_ranks(torch.cat([loss[None], to_device(flags + waits, device)]))
        loss, stopping, unsaved, unread, *waits, grad_norm = torch.cat([told, grad_norm]).tolist()
        if unread or unsaved:
            break  # without the update
        if not math.isfinite(loss + grad_norm):
            found = (
                f"step {step.step}: loss {loss}, gradient norm {grad_norm}, from "
                f"{at_fault(mine, arrived, config)}; stopped before the update, step {saved:,} "
                "is the last one saved"
            )
            try:
                saver.wait()
            except CheckpointError as error:
                found += f", or was to be: {error}"
            raise Diverged(found)
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
        waited += max(waits)  # the others wait for the last one
        bar.update(step.batch_size)

        validate = step.step % config.eval_every == 0 or step.step == last
        validate = validate and held_out is not None
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
                "data_seconds": waited,
            }
            if validate:
                row["validation_loss"] = validation_loss(model, held_out, device, dtype)
            if rank == 0:
                runlog.write(log, board, row)
            shown = f"loss {loss:.3f}, lr {learning_rate:.1e}, {speed:,.0f} tokens/s"
            if waited > 0.1 * (now - since):
                shown += f", {waited / (now - since):.0%} of the time waiting for data"
            bar.set_postfix_str(shown)
            # the validation is not part of the speed
            since, since_tokens, waited = time.monotonic(), 0, 0.0

        milestone = step.step in milestones
        passing = config.save_every and step.step % config.save_every == 0
        if milestone or passing or stopping:
            name = revision_name(step.step, config.checkpoint_prefix)
            saver.save(name, model, optimizer, state, milestone)
            saved = step.step
    bar.close()
    saver.wait()
    name = revision_name(state["step"], config.checkpoint_prefix)
    if unread:
        if state["step"] != saved:
            saver.save(name, model, optimizer, state)
            saver.wait()
        parallel.raise_together(mine.error)
    if rank == 0:
        print(f"{config.name}: step {saved:,} of {last:,} in {run / 'checkpoints' / name}")


# --- set-up --------------------------------------------------------------------------------------


def open_data(config: Config, rank: int, world: int) -> tuple[Mixture, Share | None]:
    """(the mixture to train on, this rank's share of the held-out samples).

    A vocabulary that does not fit is an error.
    """
    if config.tokenizer:
        size = load_tokenizer(config.tokenizer).vocab_size
        if size != config.vocab_size:
            raise ConfigError(
                f"{config.tokenizer} has {size:,} tokens, but vocab_size is {config.vocab_size:,}"
            )
    common, held_out = (config.seq_len, config.seed, config.vocab_size), None
    if config.validation:
        samples, size = range(config.eval_samples), config.micro_batch_size
        mixture = Mixture(config.validation, *common, samples=config.eval_samples)
        held_out = read_share(mixture, samples, size, rank, world)
        if held_out.error:
            raise held_out.error
    mixture = Mixture(config.mixture, *common, partial=config.partial, samples=config.samples)
    if mixture.missing and rank == 0:
        print(f"{config.mixture}: trained without {', '.join(mixture.missing)}", file=sys.stderr)
    return mixture, held_out


def build_model(
    config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Lucie, nn.Module]:
    """(the model, what to call in its stead): in memory, on every rank its part, not filled yet."""
    try:
        with torch.device("meta"):
            model = Lucie(checkpoint.architecture(asdict(config)))
        check_memory(config, model, device)
        parallel.recompute(model, config.activation_checkpointing)
        if config.compile:
            for block in model.layers:  # all are alike: the first one's code serves the others
                block.compile()
        return model, parallel.spread(model, config.parallel, config.replica_size, device, dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_memory(config: Config, model: Lucie, device: torch.device) -> None:
    """Raises ConfigError for a model that this machine cannot hold."""
    # fp32 weight, gradient and two moments, of each rank that runs on this machine
    shards = parallel.shards(config.parallel, config.replica_size, parallel.world_size())
    need = 16 * model.num_params() * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / shards
    have = hardware.memory_of_machine(device)
    if have and need > have:
        raise ConfigError(
            f"{model.num_params() / 1e9:.2f} B parameters train in {need / 1e9:.0f} GB at least "
            f"(16 bytes each) and there are {have / 1e9:.0f} GB here: use more GPUs, or try "
            "config/demo_pretrain.py"
        )


def schedule_of(config: Config) -> Schedule:
    try:
        schedule = Schedule(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not schedule.num_steps():
        raise ConfigError(f"samples {config.samples} are not enough for one step")
    return schedule


def open_logs(run: Path, state: dict, rank: int) -> tuple[IO[str] | None, Any]:
    """(log.csv, TensorBoard's writer) on rank 0, and the config beside them."""
    if rank > 0:
        return None, None
    run.mkdir(parents=True, exist_ok=True)
    runlog.write_whole(run / "config.json", json.dumps(state["config"], indent=1))
    return runlog.open_log(run, state["step"]), runlog.open_board(run, state["step"])


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


def catch_signals() -> list[int]:
    """A list that SIGINT, SIGTERM or SIGUSR1 adds its number to; a second signal stops at once.

    Within a second it counts as the same: torchrun passes on what a whole process group has got.
    A thread of its own hears of the second one, for Python's handlers wait until the operation of
    the main thread returns, and the ranks that it waits for may be gone.
    """
    received: list[int] = []

    def listen() -> None:
        first = None
        while number := os.read(hears, 1):
            first = first or time.monotonic()
            if time.monotonic() - first > 1:
                os._exit(128 + number[0])

    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _frame: received.append(number))
    return received


# --- in the loop ---------------------------------------------------------------------------------


def gradients(
    forward: nn.Module,
    mine: Share,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    world: int,
) -> Tensor:
    """Leave in the parameters the gradient of the mean loss over all target tokens of a step, on
    all ranks; this rank's part of that loss, an fp64 scalar on the device."""
    targets = parallel.sum_over_ranks(to_device(mine.targets, device)).clamp(min=1)
    loss = to_device(0.0, device)
    for number, (x, y) in enumerate(mine.batches, start=1):
        final = number == len(mine.batches)
        with parallel.micro_batch(
            forward, final, config.reduce_each_micro_batch, config.gather_each_micro_batch
        ):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with autocast(forward, device, dtype):
                part = forward(x, y, reduction="sum") / targets
            (part * world).backward()  # ranks are averaged where a sum is wanted
        loss += part.detach()
    return loss


def autocast(
    forward: nn.Module, device: torch.device, dtype: torch.dtype
) -> AbstractContextManager:
    """Compute in dtype where FSDP does not see to it already."""
    if isinstance(forward, FSDPModule) or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def to_device(numbers: float | list[float], device: torch.device) -> Tensor:
    """fp64 numbers on the device, without waiting for what it is doing."""
    cuda = device.type == "cuda"
    here = torch.tensor(numbers, dtype=torch.float64, pin_memory=cuda)
    return here.to(device, non_blocking=True)


def watch_samples(model: Lucie) -> list[Tensor]:
    """A list to which each backward adds, per sample, the sum of the gradient at its embeddings.

    Whatever is no number on the way back from a sample's loss arrives there, and nowhere else is
    it still known whose it was: gradients of weights are sums over samples and ranks.
    """
    arrived: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: object, embedded: Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(
                lambda gradient: arrived.append(gradient.sum((1, 2), dtype=torch.float32))
            )

    model.embed_tokens.register_forward_hook(watch)
    return arrived


def at_fault(mine: Share, arrived: list[Tensor], config: Config) -> str:
    """Which rank's samples brought what is not a number."""
    broken, size = [], config.micro_batch_size
    for number, sums in enumerate(arrived):
        of_batch = mine.samples[number * size : (number + 1) * size]
        broken += [i for i, total in zip(of_batch, sums.tolist()) if not math.isfinite(total)]
    found = [
        f"rank {r}, samples {', '.join(map(str, ids))}"
        for r, ids in enumerate(parallel.gather(broken))
        if ids
    ]
    return "; ".join(found) or "no sample of its own on any rank: their sum, or a faulty device"


@torch.no_grad()
def validation_loss(
    model: Lucie, held_out: Share, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean loss over the held-out samples of all ranks, the same ones every time."""
    sums = to_device([0, held_out.targets], device)  # of losses, of targets
    for x, y in held_out.batches:
        with autocast(model, device, dtype):
            sums[0] += model(x.to(device), y.to(device), reduction="sum")
    parallel.drop_gathered(model)
    loss, targets = parallel.sum_over_ranks(sums).tolist()
    return loss / targets


def command_line(argv: list[str]) -> None:
    """main, with errors as one line and an exit code: 2 for bad input, 1 for a run that failed.

    Once the ranks can talk, an error that is to be expected is raised on all of them and rank 0
    tells of it; one from before that, the first rank of each machine; one of a system, each rank.
    """
    rank, code = os.environ.get("RANK", "0"), 0
    try:
        main(argv)
    except (*EXPECTED, Diverged) as found:
        code, error = 1 if isinstance(found, Diverged) else 2, found
        if isinstance(found, OSError):
            error = f"{found.filename or 'writing'}: {found.strerror}"
        everywhere = isinstance(found, (CheckpointError, Diverged))
        everywhere = everywhere or hasattr(found, "on_all_ranks")
        if rank == "0":
            tqdm.write(f"train.py: {error}", file=sys.stderr)  # on a line of its own
        elif not everywhere and (
            isinstance(found, OSError) or os.environ.get("LOCAL_RANK", "0") == "0"
        ):
            tqdm.write(f"train.py: rank {rank}: {error}", file=sys.stderr)
    except Exception as error:  # of this rank alone: the others wait for it, so be quick
        text = str(error).strip()
        if isinstance(error, dist.DistError) or "gloo" in text:
            line = f"train.py: rank {rank} lost another: {text.splitlines()[0]}"
            tqdm.write(line, file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    if code:
        sys.stderr.flush()
        os._exit(code)  # threads that save or read may wait for ranks that are gone
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(sys.argv[1:])
