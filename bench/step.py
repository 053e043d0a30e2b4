"""Training speed against transformers' LlamaForCausalLM, in one run on this machine.

    python -m bench.step [config/demo_pretrain.py] [--dtype=float32] [--rounds 7]

Same shape, weights of the same size, batch, dtype and fused AdamW. The two take turns, a step each
and each first in turn, so that a machine whose speed drifts favours neither; the ratio is the
median over the pairs.

    python -m bench.step --plan ...    memory, speed and traffic of a phase by arithmetic: plan.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

import checkpoint
from bench import plan
from config import Config, ConfigError, load
from model import Lucie


def training_step(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], config: Config, dtype: torch.dtype
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


def compare(config: Config, dtype: torch.dtype, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, ours and theirs, after two warm-up steps of both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = checkpoint.architecture(asdict(config))
    ours = Lucie(architecture)
    theirs = LlamaForCausalLM(
        LlamaConfig(**vars(architecture), tie_word_embeddings=False, attn_implementation="sdpa")
    )

    def theirs_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return theirs(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    sides = [
        training_step(ours, ours, config, dtype),
        training_step(theirs, theirs_loss, config, dtype),
    ]
    generator = torch.Generator().manual_seed(0)
    size = (config.micro_batch_size, config.seq_len + 1)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        block = torch.randint(config.vocab_size, size, generator=generator)
        turns = list(zip(sides, times))
        for side, seconds in turns if number % 2 else reversed(turns):
            took = side(block[:, :-1], block[:, 1:].contiguous())
            if number >= 2:
                seconds.append(took)
    return times


def main(argv: list[str]) -> None:
    if "--plan" in argv:
        plan.main([argument for argument in argv if argument != "--plan"])
        return
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__)
    parser.add_argument("config", nargs="?", default="config/demo_pretrain.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    config = load([args.config])
    tokens = config.micro_batch_size * config.seq_len
    print(f"{args.config}: {config.micro_batch_size} x {config.seq_len} tokens a step, CPU,")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {args.rounds}")
    print(f"{'':10} {'nanoLucie':>16} {'transformers':>16} {'ratio':>7}")
    for name in args.dtype or ("float32", "bfloat16"):
        ours, theirs = compare(config, getattr(torch, name), args.rounds)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs))
        speeds = [f"{tokens / statistics.median(s):,.0f} tokens/s" for s in (ours, theirs)]
        print(f"{name:10} {speeds[0]:>16} {speeds[1]:>16} {ratio:>7.2f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"bench.step: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"bench.step: needs pip install transformers ({error})", file=sys.stderr)
        sys.exit(2)
