"""Train Lucie: one phase, from a config file.

    python train.py config/demo_pretrain.py
    torchrun --nproc-per-node=8 train.py config/pretrain.py --micro_batch_size=2

Any option of config/__init__.py can follow. Read main() from top to bottom: it sets up the run and
then makes the steps of the schedule. The number of processes changes nothing but which samples each
of them reads.
"""

import csv
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
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
from config.cli import ConfigError, lock, run_cli
from config.log import energy_meter, open_log
from data.dataset import EOS, DataError, Mixture, Share, document_starts, read_share
from data.tokenizer import Tokenizer
from data.tokenizer import load as load_tokenizer
from model import Lucie
from schedule import Schedule, Step, revision_name

SAMPLE_TOKENS = 40  # of a completion of config.sample_prompts
LONGEST_PROMPT = 256  # tokens: the logits of all of them exist at once


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
    tokenizer, prompts = parallel.together(open_prompts, config, errors=expected)
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
    log = parallel.together(
        lambda: None if rank else open_log(config, run, [*held_out], first), errors=expected
    )

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
    joules_before, joules = state.setdefault("joules", 0.0), energy_meter(device)
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

        ends = step.step == last
        validate = bool(held_out) and (ends or step.step % config.eval_every == 0)
        sample = bool(prompts) and (ends or step.step % config.sample_every == 0)
        if validate or sample or ends or step.step % config.log_every == 0:
            seconds = now - row_began
            waits, used = zip(*parallel.gather((waited, joules())))
            state["joules"], waits = joules_before + sum(used), max(waits)
            speed, rate = row_tokens / seconds, schedule.learning_rate(state["samples"])
            shown = f"loss {loss:.3f}, lr {rate:.1e}, {speed:,.0f} tokens/s"
            if waits > 0.1 * seconds:
                shown += f", {waits / seconds:.0%} of the time waiting for data"
            bar.set_postfix_str(shown, refresh=False)
            validation = validation_losses(forward, held_out, config, device) if validate else {}
            texts = completions(forward, tokenizer, prompts, config, device) if sample else {}
            if rank == 0:
                hours = (state["seconds"] / 3600, state["gpu_seconds"] / 3600)
                mfu = speed * flops / (world * peak) if peak else None
                row = (step.step, state["tokens"], loss, *hours, rate, grad_norm, speed, mfu, waits)
                log(row, validation, texts)
            # Neither the validation nor the completions count towards the speed.
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
        print(summary(config, run, newest, first, state, last))
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


def open_data(config: Config, rank: int, world: int) -> tuple[Mixture, dict[str, Share]]:
    """(the mixture to train on, this rank's share of the held-out samples of each language).

    Sources without a language share one, called "unknown".
    """
    if config.tokenizer:
        load_tokenizer(config.tokenizer, config.vocab_size)
    common, of_language = (config.seq_len, config.seed, config.vocab_size), defaultdict(list)
    if config.validation:
        mixture = Mixture(config.validation, *common)
        for i in range(config.eval_samples):
            of_language[mixture.languages[mixture.locate(i).source]].append(i)
    held_out = {
        language: read_share(mixture, of_language[language], config.micro_batch_size, rank, world)
        for language in sorted(of_language)
    }
    mixture = Mixture(config.mixture, *common, partial=config.partial)
    return mixture, held_out


def open_prompts(config: Config) -> tuple[Tokenizer | None, dict[str, list[int]]]:
    """The tokenizer, and the ids of each prompt of config.sample_prompts, if they are sampled."""
    if not config.sample_every:
        return None, {}
    if not (config.tokenizer and config.sample_prompts):
        raise ConfigError("sample_every needs a --tokenizer and --sample_prompts")
    tokenizer = load_tokenizer(config.tokenizer, config.vocab_size)
    prompts = {prompt: tokenizer.encode(prompt) for prompt in config.sample_prompts.split("\n")}
    longest = max(map(len, prompts.values()))
    if longest > min(LONGEST_PROMPT, config.seq_len - SAMPLE_TOKENS):
        raise ConfigError(
            f"sample_prompts: a prompt of {longest:,} tokens is too long; {LONGEST_PROMPT} is the "
            f"most, and {SAMPLE_TOKENS} less than seq_len"
        )
    return tokenizer, prompts


def describe(config: Config, run: Path, mixture: Mixture, model: Lucie, state: dict) -> str:
    """What the run is about to do, for the person who started it."""
    device, steps = next(model.parameters()).device, Schedule(config).num_steps()
    cuda = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if cuda else device.type.upper()
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


def summary(config: Config, run: Path, newest: Path, first: int, state: dict, last: int) -> str:
    """How the run ended, what it took, and what to do with it."""
    step = state["step"]
    if step < last:
        launcher = "torchrun ..." if "RANK" in os.environ else "python"
        how = f"stopped after step {step:,} of {last:,}; to continue, run the same command: "
        how += f"{launcher} {shlex.join(sys.argv)}"
    else:
        how = f"{'had already finished' if first == last else 'finished'} ({last:,} steps)"
    took = f"{state['tokens']:,} tokens, {state['seconds'] / 3600:,.2f} hours"
    if state["gpu_seconds"] > state["seconds"]:
        took += f", {state['gpu_seconds'] / 3600:,.2f} of all GPUs"
    if state["joules"]:
        took += f", {state['joules'] / 3.6e6:,.2f} kWh"
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["validation_loss"]]
    if rows:
        best = min(rows, key=lambda row: float(row["validation_loss"]))
        took += f"\nbest validation loss {float(best['validation_loss']):.4f}, "
        took += f"after step {int(best['training_steps']):,}"
    ways = f"\nto complete prompts: python generate.py {run} --interactive"
    ways += f"\nto export it: python -m checkpoint export {run} --out {run}_hf"
    ways = ways if config.tokenizer else ""
    return f"{config.name}: {how}\n{took}\nnewest checkpoint: {newest}{ways}"


# --- in the loop ---------------------------------------------------------------------------------


def accumulate_gradients(
    forward: nn.Module, share: Share, config: Config, device: torch.device
) -> list[Tensor]:
    """Accumulate the gradient of the mean loss over the target tokens of all ranks.

    Returns what each micro-batch of this rank adds to that loss, on the device, in the dtype
    parallel.exact.
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
    x, y = (tokens.to(device, non_blocking=tokens.is_pinned()) for tokens in (x, y))
    with autocast(forward, config, device):
        return forward(x, y, reduction="sum", cu_seqlens=cu_seqlens)


def autocast(forward: nn.Module, config: Config, device: torch.device) -> torch.autocast:
    """Computes in config.dtype what FSDP, which casts its weights itself, does not."""
    casts = config.dtype == "bfloat16" and not isinstance(forward, FSDPModule)
    return torch.autocast(device.type, torch.bfloat16, enabled=casts)


@torch.no_grad()
def validation_losses(
    forward: nn.Module, held_out: dict[str, Share], config: Config, device: torch.device
) -> dict[str, float]:
    """Mean losses over the held-out samples of all ranks, the same ones every time: that of all
    samples, called "loss", then that of each language if there are several."""
    sums, targets = {}, {}
    for language, share in held_out.items():
        losses = (loss_sum(forward, x, y, config, device) for x, y in share.batches)
        sums[language] = sum(loss.to(parallel.exact(device)) for loss in losses)
        targets[language] = share.targets
    parallel.free_gathered(forward)
    sums, targets = (parallel.named_sums(device, {}, **each) for each in (sums, targets))
    means = {name: sums[name] / targets[name] for name in sums if len(sums) > 1}
    return {"loss": sum(sums.values()) / sum(targets.values())} | means


@torch.no_grad()
def completions(
    forward: nn.Module,
    tokenizer: Tokenizer,
    prompts: dict[str, list[int]],
    config: Config,
    device: torch.device,
) -> dict[str, str]:
    """How the model goes on after each prompt: SAMPLE_TOKENS likeliest tokens, one by one.

    Every rank takes part, since it holds a part of the weights. The whole text is read again for
    each token: at one shape, without a cache, and with no random number, it leaves the training
    alone, and its time is that of launching SAMPLE_TOKENS forward passes.
    """
    lengths = torch.tensor([len(ids) for ids in prompts.values()], device=device)
    text = torch.zeros(len(prompts), int(lengths.max()) + SAMPLE_TOKENS, dtype=torch.int64)
    for row, ids in zip(text, prompts.values()):
        row[: len(ids)] = torch.tensor(ids)
    text, rows = text.to(device), torch.arange(len(prompts), device=device)
    for number in range(SAMPLE_TOKENS):  # what stands after a token, attention does not see
        with autocast(forward, config, device):
            logits = forward(text)
        text[rows, lengths + number] = logits[rows, lengths + number - 1].argmax(-1)
    parallel.free_gathered(forward)
    found = {}
    for (prompt, ids), row in zip(prompts.items(), text.tolist()):
        new = row[len(ids) : len(ids) + SAMPLE_TOKENS]
        new = new[: new.index(EOS)] if EOS in new else new
        found[prompt] = "".join(tokenizer.stream(new, after=ids))
    return found


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
