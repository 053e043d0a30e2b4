"""The full optimizer step of Lucie-7B on one GPU, beside its peers, and where its time goes.

    python -m bench.step [--out DIR] [--minutes 5]    on a GPU: at 4,096 and at 32,000 tokens
    python -m bench.step --toy                        the same at toy size, on a CPU too
    python -m bench.step config/demo_pretrain.py [--dtype=float32] [--rounds 7]
    python -m bench.step --plan ...    memory, speed and traffic of a phase by arithmetic: plan.py

A step is train.py's: micro-batches accumulated, the gradient clipped, fused AdamW; random tokens
and weights. It is timed whole, the host waiting for the device before and after and never within;
figures are medians. Ours takes the least recomputation that fits by bench.plan's arithmetic, peers
(bench/step_peers.py) the best of all settings that fit. Where a side does not fit, the largest
number of layers that fits everybody is measured too, for all alike. Each side is first held against
our definitions in fp32 at small size; one that is wrong is not timed. MFU counts 6 N + 6 L D S
FLOPs a token (causal), or 6 N + 12 L D S (full), against the card's nominal peak.

Writes step.json, recorded events and two pictures into DIR. Exit code 1 where ours failed.

With a config, and on a CPU: training speed of that model against transformers' on the CPU, the two
taking turns, a step each and each first in turn, so that a machine whose speed drifts favours
neither; the ratio is the median over the pairs.
"""

import argparse
from pathlib import Path

import torch

import parallel
from bench import plan, step_peers, step_report
from bench.report import BenchError
from bench.step_peers import OURS
from bench.step_run import Bench
from config import Config, load
from config.cli import ConfigError, Parser, run_cli

# Samples in a step: with several micro-batches at 4,096, for all sizes alike.
PHASES = [
    ["config/pretrain.py", "--global_batch_size=8", "--batch_ramp_samples=0"],
    ["config/extension.py", "--global_batch_size=1"],
]
TOY = dict(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=1, dtype="bfloat16",
)  # fmt: skip
TOY_PHASES = [
    Config(**TOY, seq_len=64, global_batch_size=4),
    Config(**TOY, seq_len=384, global_batch_size=1, activation_checkpointing="full"),
]
# Of the memory a card has: the rest is for its context and what lies unused between tensors. The
# nominal gigabytes of parallel.GPUS are as much.
ROOM = 0.94
# Models of several sizes follow each other; without it each would leave holes behind.
ALLOCATOR = "expandable_segments:True"
TOY_ROOM = 10.8e6  # so little that not every setting fits


def phases_of(toy: bool, lengths: list[int] | None) -> list[Config]:
    phases = TOY_PHASES if toy else [load(phase) for phase in PHASES]
    known = [config.seq_len for config in phases]
    for length in lengths or ():
        if length not in known:
            raise ConfigError(f"--seq_len is one of {', '.join(map(str, known))}, not {length}")
    return [config for config in phases if config.seq_len in (lengths or known)]


def full_step(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    allocator = "the default"
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        allocator = set_allocator(ALLOCATOR)
    sides = step_peers.sides(device)
    for name in args.sides or ():
        if name not in sides:
            raise ConfigError(f"no side {name!r}; there are {', '.join(sides)}")
    sides = {name: side for name, side in sides.items() if name in (args.sides or sides)}
    phases = phases_of(args.toy, args.seq_len)
    args.out.mkdir(parents=True, exist_ok=True)
    room = ROOM * parallel.memory_of_machine(device)
    if args.toy:
        room = TOY_ROOM
        torch.set_num_threads(1)  # tiny tensors gain nothing from a second
    bench = Bench(phases, sides, device, args.out, room, args.minutes, 2 if args.toy else 5)
    bench.results["allocator"] = allocator
    results = bench.run()
    step_report.show(results, args.out)
    torch.distributed.destroy_process_group()
    return int(not ours_ran(results))


def set_allocator(settings: str) -> str:
    """What came of it: it is torch's own, and not everywhere."""
    try:
        torch.cuda.memory._set_allocator_settings(settings)
    except (AttributeError, RuntimeError, ValueError) as error:
        return f"not {settings}: {error}"
    return settings


def ours_ran(results: dict) -> bool:
    """Once at least, and wherever there was memory for it."""
    mine = [row for row in results["rows"] if row["side"] == OURS]
    failed = any(row["failure"] and not row["memory"] for row in mine)
    failed |= any(OURS in task for task in results["errors"])
    return not failed and any(row["failure"] is None for row in mine)


def main(argv: list[str]) -> int:
    if "--plan" in argv:
        plan.main([argument for argument in argv if argument != "--plan"])
        return 0
    parser = Parser(
        prog="bench.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="compare this model with transformers' on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU")
    parser.add_argument("--seq_len", type=int, nargs="*", help="only these lengths")
    parser.add_argument("--sides", nargs="*", help="only these sides")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin nothing more after these")
    parser.add_argument("--replot", type=Path, metavar="JSON", help="show saved results again")
    args = parser.parse_args(argv)
    if args.replot:
        step_report.show(step_report.read(args.replot), args.replot.parent)
        return 0
    if args.toy or (args.config is None and torch.cuda.is_available()):
        return full_step(args)
    path = args.config or "config/demo_pretrain.py"
    dtypes = args.dtype or ["float32", "bfloat16"]
    try:
        step_peers.show_turns(path, load([path]), dtypes, args.rounds)
    except ImportError as error:
        raise ConfigError(f"pip install transformers, to compare with it ({error})") from None
    return 0


if __name__ == "__main__":
    run_cli(main, BenchError)
