"""What saving costs while training goes on, in one run on this machine.

    python -m bench.saving [config/demo_pretrain.py] [--saves 10] [--interval 20] [--out FILE]

One process trains the config's model on random tokens, a micro-batch a step. Blocks of steps that
begin with a save (checkpoint.Saver, in the background) alternate with blocks without, each first in
turn, so that a machine whose speed drifts favours neither. A block has `interval` steps, and more
where the save needs them to end. 20 is closer than any config has its checkpoints (50 steps in the
demo, 5,000 at Lucie), so no run pays the share that is measured here; what one save costs is
printed too.

The time of a step is the mean over its block, for a save slows down few steps of many. Printed are
medians over blocks, and of the pairs of blocks the median ratio. Memory is the peak of the resident
set above its peak before the first save; files that the system keeps in memory are not in it.
"""

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import parallel
from bench.kernels import machine
from checkpoint import CheckpointError
from config import Config, load
from config.cli import ConfigError, Parser, run_cli
from model import Lucie, initial_weight
from schedule import revision_name

LIMIT = 0.05  # what saving may add to the time of a step


class Block(NamedTuple):
    """Times in seconds; those of the save are 0 in a block without."""

    steps: int
    step: float  # mean, the save included
    stall: float = 0.0  # from the call of Saver.save to its return
    complete: float = 0.0  # from that call until the checkpoint was complete
    beside: tuple[float, ...] = ()  # the steps begun meanwhile


def build(
    config: Config,
) -> tuple[Lucie, torch.optim.Optimizer, Callable[[], None], torch.device]:
    """(model, optimizer, a function that makes one optimizer step, device), as in train.py."""
    try:
        device, dtype = parallel.pick_device(config.device, config.dtype)
        architecture = checkpoint.architecture(asdict(config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config.dtype = str(dtype).removeprefix("torch.")
    parallel.start_processes(device)
    with torch.device("meta"):
        model = Lucie(architecture)
    parallel.parallelize(model, "fsdp", 0, device, dtype)
    for name, parameter in model.named_parameters():
        value = initial_weight(model.config, name, parameter.shape, config.seed)
        parallel.fill_rows(parameter, 0, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.micro_batch_size, config.seq_len + 1)

    def step() -> None:
        block = torch.randint(config.vocab_size, size, generator=generator).to(device)
        with torch.autocast("cpu", dtype, enabled=device.type == "cpu" and dtype != torch.float32):
            loss = model(block[:, :-1], block[:, 1:].contiguous())
        loss.backward()
        parallel.clip_gradients(model, config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # the device is done with it too

    return model, optimizer, step, device


def measure(config: Config, folder: Path, saves: int = 10, interval: int = 20) -> dict:
    """The figures, in the units that their names say; the checkpoints stay in `folder`.

    Raises CheckpointError if one cannot be written, or is not what was written.
    """
    model, optimizer, train_one_step, device = build(config)
    saver = checkpoint.Saver(folder, keep_last=1)
    state = {"step": 0, "config": asdict(config)}
    bar = tqdm(total=2 * (saves + 1) * interval + 1, unit=" steps")

    def step() -> None:
        train_one_step()
        bar.update()
        state["step"] += 1

    def without() -> Block:
        begin = time.perf_counter()
        for _ in range(interval):
            step()
        return Block(interval, (time.perf_counter() - begin) / interval)

    def with_save() -> Block:
        written.append(folder / revision_name(state["step"]))
        begin = time.perf_counter()
        saver.save(written[-1].name, model, optimizer, state)
        stall = time.perf_counter() - begin
        ending = waiting.submit(lambda: (saver.wait(), time.perf_counter()))
        begun = []
        while len(begun) < interval or not ending.done():
            begun.append(time.perf_counter())
            step()
        end = time.perf_counter()
        complete = ending.result()[1]
        lasted = zip(begun, [*begun[1:], end])
        beside = tuple(b - a for a, b in lasted if a < complete)
        mean = (end - begin) / len(begun)
        return Block(len(begun), mean, stall, complete - begin, beside)

    step()  # the optimizer makes its moments
    gc.collect()
    gc.freeze()
    pairs, written = [], []
    with ThreadPoolExecutor(1) as waiting, bar:
        peak_memory()
        without()
        before = peak_memory()
        with_save()  # the first one allocates the copy, the others find it there
        for number in range(saves):
            if number % 2:
                plain, saving = without(), with_save()
            else:
                saving, plain = with_save(), without()
            pairs.append((plain, saving))
        after = peak_memory()
    checkpoint.verify(written[-1])

    synchronous = []
    for number in range(saves):
        begin = time.perf_counter()
        checkpoint.save(folder / f"synchronous{number}", model, optimizer, state)
        synchronous.append(time.perf_counter() - begin)
        shutil.rmtree(folder / f"synchronous{number}")
    gc.unfreeze()
    plain, saving = zip(*pairs)
    ratios = sorted(b.step / a.step - 1 for a, b in pairs)
    beside = [seconds for block in saving for seconds in block.beside]
    # What a save takes from the steps that it meets, whatever those of its block did otherwise.
    costs = [b.stall + sum(seconds - a.step for seconds in b.beside) for a, b in pairs]
    return {
        "parameters": model.num_params(),
        "tokens_per_step": config.micro_batch_size * config.seq_len,
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
        "saves": saves,
        "interval": statistics.median_high(block.steps for block in saving),
        "step_without_ms": median_ms(block.step for block in plain),
        "step_with_ms": median_ms(block.step for block in saving),
        "added": statistics.median(ratios),
        "added_of_pairs": ratios,
        "save_costs_ms": median_ms(costs),
        "step_while_saving_ms": median_ms(beside) if beside else None,
        "steps_while_saving": len(beside),
        "stall_ms": median_ms(block.stall for block in saving),
        "complete_ms": median_ms(block.complete for block in saving),
        "synchronous_ms": median_ms(synchronous),
        "bytes": sum(path.stat().st_size for path in written[-1].iterdir()),
        "copy_bytes": 12 * model.num_params(),  # weights and two moments in fp32
        "peak_extra_bytes": None if before is None else after - before,
    } | machine(device.type)


def median_ms(seconds: Iterable[float]) -> float:
    return 1e3 * statistics.median(seconds)


def peak_memory() -> int | None:
    """Bytes of the largest resident set since the last call; None where the system is not Linux."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def table(found: dict) -> str:
    """The figures for a reader."""
    low, high = found["added_of_pairs"][0], found["added_of_pairs"][-1]
    peak = found["peak_extra_bytes"]
    names = [name for name, value in found.items() if name.endswith("_ms") and value is not None]
    ms = {name: f"{found[name]:,.1f} ms" for name in names}
    share = found["save_costs_ms"] / (found["interval"] * found["step_without_ms"])
    rows = {
        "a step": ms["step_without_ms"],
        f"a step, with a save every {found['interval']}": f"{ms['step_with_ms']}, "
        f"{found['added']:+.1%} ({low:+.1%} to {high:+.1%} in {found['saves']} pairs); "
        f"under {LIMIT:.0%}: {'yes' if found['added'] < LIMIT else 'no'}",
        "a save costs": f"{ms['save_costs_ms']}, {share:.1%} of the steps from one to the next",
        "of that the loop stands still": ms["stall_ms"],
        "a step while a save goes on": f"{ms.get('step_while_saving_ms', 'none')} "
        f"({found['steps_while_saving']} steps in {found['saves']} saves)",
        "a checkpoint is complete after": ms["complete_ms"],
        "a synchronous save takes": ms["synchronous_ms"],
        "written": f"{found['bytes'] / 1e6:,.1f} MB",
        "peak of extra memory": "not known here" if peak is None else f"{peak / 1e6:,.1f} MB",
        "the copy that is being written": f"{found['copy_bytes'] / 1e6:,.1f} MB",
    }
    first = (
        f"{found['config']}: {found['parameters'] / 1e6:.2f} M parameters, "
        f"{found['tokens_per_step']:,} tokens a step, {found['dtype']}; "
        f"{found['threads']} threads, GPU {found['gpu']}, torch {found['torch']}, {found['date']}"
    )
    return "\n".join([first, *(f"{name:<32}{value}" for name, value in rows.items())])


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="bench.saving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="config/demo_pretrain.py")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--interval", type=int, default=20, help="steps from one save to the next")
    parser.add_argument("--out", type=Path, help="a JSON file; without it, a line on the screen")
    args = parser.parse_args(argv)
    config = load([args.config])
    out = Path(config.out_dir)  # the disk that the checkpoints of a run go to
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_saving_", dir=out) as folder:
        found = {"config": args.config} | measure(config, Path(folder), args.saves, args.interval)
    if dist.is_initialized():
        dist.destroy_process_group()
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    run_cli(main, CheckpointError)
