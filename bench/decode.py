"""Speed and memory of decoding beside its baselines, in one run on this machine.

    python -m bench.decode [CONFIG] [--batch 1 16] [--prompt 1920] [--new 128] [--out DIR]
    python -m bench.decode --toy                   a rehearsal at toy size on a CPU

CONFIG and all other options are train.py's and give the architecture: by default Lucie-7B on a CUDA
machine, the demo's model on a CPU. Weights are random, decoding is greedy, in bf16 on a GPU and in
fp32 on a CPU:

    ours                    generate.decode, a CUDA graph a step
    ours int4               the same with quantize.py's matrices
    transformers            generate, as it is
    transformers compiled   generate with a static cache, which torch.compile serves; on a GPU
    bitsandbytes            generate with NF4 matrices; on a GPU

The time of a step is that of `new` tokens more after the first, so the prompt is not in it. The
floor of a step is what it must read, every matrix once and the keys and values so far, at the speed
of a large copy. Memory is the peak of what torch allocated. For ours on a GPU, host_ms is the time
that the host takes to launch a step, as one graph and kernel by kernel; without the graph, a step
cannot take less. Writes DIR/decode.json. Exit code 1 where ours failed.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import quantize
from bench.measure import copy_speed, describe, heading, machine, write_json
from bench.step import architecture, read_config
from config.cli import ConfigError, Parser, run_cli
from generate import Decoder, Sampling, decode, plain_step
from model import Lucie, LucieConfig

Generate = Callable[[list[list[int]], int], int]  # prompts, new tokens -> tokens of a row
Built = tuple[Generate, int, Decoder | None]  # bytes of weights that a step reads; None: not ours


def random_lucie(config: LucieConfig, device: str, dtype: torch.dtype, int4: bool) -> Lucie:
    """Random weights; no token ends a text."""
    with torch.device("meta"):
        model = Lucie(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.fill_(1) if p.ndim == 1 else p.normal_(0, 0.02, generator=generator)
    model.eos_token_ids = ()
    return quantize.quantize_(model) if int4 else model


def ours(config: LucieConfig, device: str, dtype: torch.dtype, int4: bool = False) -> Built:
    model = random_lucie(config, device, dtype, int4)
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    decoder = Decoder(model)

    def generate(prompts: list[list[int]], new: int) -> int:
        greedy = Sampling(temperature=0)
        return sum(1 for _ in decode(model, prompts, new, greedy, decoder=decoder))

    return generate, weights - model.embed_tokens.weight.nbytes, decoder


def transformers(
    config: LucieConfig, device: str, dtype: torch.dtype, nf4: bool = False, **options: str
) -> Built:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    llama = LlamaConfig(**vars(config), tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama, dtype=dtype).eval()
    if nf4:
        to_nf4(model.model, device, dtype)
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])

    def generate(prompts: list[list[int]], new: int) -> int:
        tokens = torch.tensor(prompts, device=device)
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 3}
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, do_sample=False, **lengths, **options)
        return out.shape[1] - tokens.shape[1]

    return generate, weights - model.model.embed_tokens.weight.nbytes, None


def to_nf4(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Replace every linear layer by that of bitsandbytes, which packs its weights when they move to
    the device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                size = child.in_features, child.out_features
                packed = Linear4bit(*size, False, dtype, quant_type="nf4")
                weight = child.weight.detach().cpu()
                packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed.to(device))


IMPLEMENTATIONS: dict[str, Callable[..., Built]] = {
    "ours": ours,
    "ours int4": lambda *args: ours(*args, int4=True),
    "transformers": transformers,
    "transformers compiled": lambda *args: transformers(*args, cache_implementation="static"),
    "bitsandbytes": lambda *args: transformers(*args, nf4=True),
}
ON_A_GPU = ("transformers compiled", "bitsandbytes")


def run(config: LucieConfig, dtype: torch.dtype, device: str, args: argparse.Namespace) -> dict:
    """Measure, and return the results. No implementation is begun after args.minutes.

    DIR/decode.json holds what is known after each of them.
    """
    deadline = time.monotonic() + 60 * args.minutes
    copied = copy_speed(device)
    results = machine(device) | {"copy_gb_per_second": copied, "dtype": str(dtype)}
    results |= {"config": vars(config), "prompt": args.prompt, "new": args.new}
    results |= {"stopped": None, "rows": [], "failures": {}}
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kv *= dtype.itemsize * (args.prompt + args.new / 2)  # bytes a row, on average
    names = [name for name in IMPLEMENTATIONS if device == "cuda" or name not in ON_A_GPU]
    for name in (bar := tqdm(names, desc="decode")):
        bar.set_description(name)
        if time.monotonic() >= deadline:
            results["stopped"] = f"after {args.minutes:g} minutes, before {name}"
            break
        try:
            generate, weights, decoder = IMPLEMENTATIONS[name](config, device, dtype)
            for batch in args.batch:
                step, peak = measure(generate, config.vocab_size, device, batch, args)
                floor = (weights + batch * kv) / copied / 1e9
                row = {"name": name, "batch": batch, "tokens_per_second": batch / step}
                row |= {"ms_per_step": 1e3 * step, "floor_ms": 1e3 * floor}
                row |= {"of_floor": floor / step, "weight_bytes": weights, "peak_bytes": peak}
                row["host_ms"] = host_ms(decoder) if decoder and device == "cuda" else None
                results["rows"].append(row)
        except Exception as error:  # a baseline that cannot run is a result too
            results["failures"][name] = describe(error)
        write_json(results, args.out / "decode.json")
        generate = decoder = None  # frees the model
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()  # does nothing on a CPU
    write_json(results, args.out / "decode.json")
    return results


def measure(
    generate: Generate, vocab_size: int, device: str, batch: int, args: argparse.Namespace
) -> tuple[float, int | None]:
    """Seconds of a step, and bytes allocated at the peak; None without a GPU."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(4, vocab_size, (batch, args.prompt), generator=generator).tolist()

    def seconds(new: int) -> float:
        begin = time.perf_counter()
        if generate(prompts, new) != new:
            raise RuntimeError(f"not {new} tokens")
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds(args.new + 1)  # compiles
    times = [seconds(args.new + 1) - seconds(1) for _ in range(args.rounds)]
    return statistics.median(times) / args.new, torch.cuda.max_memory_allocated() or None


@torch.no_grad()
def host_ms(decoder: Decoder) -> dict[str, float]:
    """Milliseconds until a step is launched, as one graph and kernel by kernel."""
    cache, found = decoder.cache, {}
    ids = torch.zeros_like(cache.positions)
    steps = {"graph": decoder.step, "kernels": plain_step(decoder.model, cache)}
    for name, step in steps.items():
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step(ids)
            times.append(time.perf_counter() - begin)
        found[name] = 1e3 * statistics.median(times[2:])  # the first ones find cold caches
    return found


def table(results: dict) -> str:
    c = results["config"]
    lines = [
        heading(results),
        f"{c['num_hidden_layers']} layers of {c['hidden_size']:,}, {results['dtype']}, prompt "
        f"{results['prompt']}, {results['new']} tokens more; a copy moves "
        f"{results['copy_gb_per_second']:,.0f} GB/s",
        f"{'':22} batch  tokens/s  ms a step  floor ms  of floor  peak GB",
    ]
    for row in results["rows"]:
        line = f"{row['name']:22} {row['batch']:5}  {row['tokens_per_second']:8,.1f} "
        line += f"{row['ms_per_step']:10.2f} {row['floor_ms']:9.3f} {row['of_floor']:9.0%}"
        line += f"{row['peak_bytes'] / 1e9:9.2f}" if row["peak_bytes"] else ""
        if host := row["host_ms"]:
            line += f"  host {host['graph']:.2f} ms a step, {host['kernels']:.2f} without a graph"
        lines.append(line)
    lines += [f"{name:22} {failure}" for name, failure in results["failures"].items()]
    return "\n".join(lines + [f"stopped {results['stopped']}"] * bool(results["stopped"]))


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=1920, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=128, help="tokens timed")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin nothing more after these")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of decode.json")
    parser.add_argument("--toy", action="store_true", help="toy size on a CPU")
    args, options = parser.parse_known_args(argv)
    cuda = torch.cuda.is_available() and not args.toy
    if args.toy:
        args.prompt, args.new = min(args.prompt, 7), min(args.new, 16)
    if min([*args.batch, args.prompt, args.new, args.rounds]) < 1:
        raise ConfigError("--batch, --prompt, --new and --rounds must be at least 1")
    config = read_config(options, args.toy)
    try:
        shape = architecture(replace(config, seq_len=args.prompt + args.new + 1))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    dtype = torch.bfloat16 if cuda else torch.float32
    results = run(shape, dtype, "cuda" if cuda else "cpu", args)
    print(table(results))
    return int(any(name.startswith("ours") for name in results["failures"]))


if __name__ == "__main__":
    run_cli(main)
