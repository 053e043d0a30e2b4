"""Speed and memory of decoding against transformers and bitsandbytes, in one run on this machine.

    python -m bench.decode [--batch 1 16] [--prompt 1920] [--new 128] [--out FILE]
    python -m bench.decode --layers 4 --hidden 512 --vocab 4096    # a size for a CPU

A Lucie of random weights (by default the 7B), greedy, in bf16 on a GPU and fp32 on a CPU:

    ours             generate.decode, a CUDA graph a step
    ours int4        the same with quantize.py's matrices
    transformers     generate, as it is
    bitsandbytes     generate with NF4 matrices, where it is installed
    compiled         generate with a static cache, which torch.compile serves; on a GPU

The time of a token is that of `new` tokens more after the first, so the prompt is not in it. The
floor of a step is what must be read: every matrix once, and the keys and values seen. It is held
against the speed of a large copy in the same run. Memory is the peak of what torch allocated, on a
GPU; a side that fails is told, and the others go on.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import quantize
from bench.kernels import machine
from checkpoint import write_text
from config.cli import ConfigError, Parser, run_cli
from data.tokenizer import EOS
from generate import Sampling, decode
from model import Lucie, LucieConfig

GREEDY = Sampling(temperature=0)
Generate = Callable[[list[list[int]], int], int]  # prompts, new tokens -> tokens a row


def random_lucie(config: LucieConfig, device: str, dtype: torch.dtype, int4: bool) -> Lucie:
    """Random weights, made on the device a matrix at a time; never says `</s>`."""
    with torch.device("meta"):
        model = Lucie(config).to(dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if int4:
        quantize.quantize_(model)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)

    def weights():
        for name, shape in shapes.items():
            value = torch.ones(shape, device=device, dtype=dtype)
            if len(shape) > 1:
                value.normal_(0, 0.02, generator=generator)
            if name == "lm_head.weight":
                value[EOS] = 0  # the likeliest of thousands is over 0
            yield name, 0, value

    quantize.fill(model, weights())
    return model


def ours(config: LucieConfig, device: str, dtype: torch.dtype, int4: bool) -> tuple[Generate, int]:
    """(what generates, the bytes of weights that a step reads)."""
    model = random_lucie(config, device, dtype, int4)
    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])

    def generate(prompts: list[list[int]], new: int) -> int:
        return sum(1 for _ in decode(model, prompts, new, GREEDY))

    return generate, held - model.embed_tokens.weight.nbytes


def theirs(config: LucieConfig, device: str, dtype: torch.dtype, kind: str) -> tuple[Generate, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            architecture = LlamaConfig(**vars(config), tie_word_embeddings=False)
            model = LlamaForCausalLM(architecture).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    if kind == "bitsandbytes":
        to_nf4(model.model, device, dtype)
    options = {"cache_implementation": "static"} if kind == "compiled" else {}

    def generate(prompts: list[list[int]], new: int) -> int:
        tokens = torch.tensor(prompts, device=device)
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=3,
            **options,
        )
        return out.shape[1] - tokens.shape[1]

    held = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    return generate, held - model.model.embed_tokens.weight.nbytes


def to_nf4(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Every linear layer as bitsandbytes' own, which packs its weights on the way to the device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                packed = Linear4bit(
                    child.in_features, child.out_features, False, dtype, quant_type="nf4"
                )
                weight = child.weight.detach().cpu()
                packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed.to(device))


def sides(device: str) -> dict[str, Callable]:
    """How to build each side that can run here."""
    found = {
        "ours": lambda *args: ours(*args, int4=False),
        "ours int4": lambda *args: ours(*args, int4=True),
    }
    if importlib.util.find_spec("transformers"):
        found["transformers"] = lambda *args: theirs(*args, "transformers")
        if importlib.util.find_spec("bitsandbytes"):
            found["bitsandbytes"] = lambda *args: theirs(*args, "bitsandbytes")
        if device == "cuda":
            found["compiled"] = lambda *args: theirs(*args, "compiled")
    return found


def seconds(generate: Generate, prompts: list[list[int]], new: int, device: str) -> float:
    begin = time.perf_counter()
    tokens = generate(prompts, new)
    if device == "cuda":
        torch.cuda.synchronize()
    if tokens != new:
        raise RuntimeError(f"{tokens} tokens instead of {new}")
    return time.perf_counter() - begin


def measure(
    generate: Generate,
    weights: int,
    config: LucieConfig,
    batch: int,
    args: argparse.Namespace,
    copied: float,
    itemsize: int,
) -> dict:
    """A row of the table. copied: bytes a second of a large copy."""
    device = args.device
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(4, config.vocab_size, (batch, args.prompt), generator=generator)
    prompts = prompts.tolist()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds(generate, prompts, args.new + 1, device)  # compiles
    times = []
    for _ in range(args.rounds):
        first = seconds(generate, prompts, 1, device)
        times.append((seconds(generate, prompts, args.new + 1, device) - first) / args.new)
    step = statistics.median(times)
    seen = args.prompt + args.new / 2  # on average
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    floor = (weights + batch * seen * kv) / copied
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "batch": batch,
        "ms_per_step": 1e3 * step,
        "tokens_per_second": batch / step,
        "floor_ms": 1e3 * floor,
        "of_floor": floor / step,
        "peak_bytes": peak,
        "weight_bytes": weights,
        "failure": None,
    }


def copy_speed(device: str, size: int) -> float:
    """Bytes read and written a second by a large copy, the median of ten."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target, times = torch.empty_like(source), []
    for _ in range(12):
        begin = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(times[2:])


def run(config: LucieConfig, args: argparse.Namespace) -> dict:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    copied = copy_speed(args.device, 2**31 if args.device == "cuda" else 2**28)
    results = machine(args.device) | {"copy_gb_per_second": copied / 1e9, "dtype": str(dtype)}
    results |= {"config": vars(config), "prompt": args.prompt, "new": args.new, "rows": []}
    for name, build in (bar := tqdm(sides(args.device).items())):
        bar.set_description(name)
        generate = None
        for batch in args.batch:
            try:
                if generate is None:
                    generate, weights = build(config, args.device, dtype)
                row = measure(generate, weights, config, batch, args, copied, dtype.itemsize)
            except Exception as error:  # theirs to fail, of whatever kind; ours shows in the exit
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
                row = {"batch": batch, "failure": reason}
            results["rows"].append({"side": name} | row)
            if args.out:  # a run that is cut short still tells
                write_text(args.out, json.dumps(results, indent=1) + "\n")
        generate = None
        gc.collect()
        torch.compiler.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return results


def table(results: dict) -> str:
    c = results["config"]
    lines = [
        f"{c['num_hidden_layers']} layers of {c['hidden_size']:,}, {results['dtype']}, prompt "
        f"{results['prompt']}, {results['new']} tokens more; {results['gpu']}, torch "
        f"{results['torch']}; a copy moves {results['copy_gb_per_second']:,.0f} GB/s",
        f"{'':14} batch  tokens/s  ms a step  floor ms  of floor  peak GB",
    ]
    for row in results["rows"]:
        if row["failure"]:
            lines.append(f"{row['side']:14} {row['batch']:5}  {row['failure']}")
            continue
        peak = f"{row['peak_bytes'] / 1e9:8.2f}" if row["peak_bytes"] else ""
        lines.append(
            f"{row['side']:14} {row['batch']:5} {row['tokens_per_second']:9,.1f} "
            f"{row['ms_per_step']:10.2f} {row['floor_ms']:9.2f} {row['of_floor']:9.0%} {peak}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="bench.decode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=1920, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=128, help="tokens timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--hidden", type=int, default=4096, help="of it heads of 128 and 3 x the FFN"
    )
    parser.add_argument("--vocab", type=int, default=65_024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"device is cpu or cuda, not {args.device}")
    heads = args.hidden // 128
    if args.hidden % 128 or min(args.batch + [args.prompt, args.new, args.rounds, args.layers]) < 1:
        raise ConfigError("--hidden is a multiple of 128, and every other number 1 or more")
    config = LucieConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=args.prompt + args.new + 1,
    )
    results = run(config, args)
    print(table(results))
    return int(any(r["failure"] for r in results["rows"] if r["side"].startswith("ours")))


if __name__ == "__main__":
    run_cli(main)
