"""Speed of a training step beside its baselines, and which operations take our step's time.

    python -m bench.step [CONFIG] [--seq_len=32000] [--out DIR] [--minutes 5]
    python -m bench.step --toy                     a rehearsal at toy size on a CPU

CONFIG and all other options are train.py's; the default is config/pretrain.py (Lucie-7B) on a CUDA
machine and config/demo_pretrain.py on a CPU. A step is train.py's, with random tokens and weights:
micro-batches of at most 32,768 tokens in all on a GPU, one micro-batch on a CPU.

    ours            Lucie as train.py builds it
    transformers    LlamaForCausalLM with torch's SDPA
    liger           the same with Liger's patch, its loss fused with the head
    ours compiled   the definitions in plain torch, each block under torch.compile

On a GPU all are under FSDP2 on one rank: weights, gradients and moments fp32, compute in bf16. At
small size each is first compared with our definitions in fp32, loss and gradient norm; one that is
wrong is not timed. Each runs with the least activation checkpointing that fits. All take turns, and
a ratio is the median over the rounds. MFU counts 6 N + 6 L D S FLOPs a token against the card's
nominal peak. Writes DIR/step.json. Exit code 1 where ours failed or was wrong.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import profile
from tqdm import tqdm

import checkpoint
import kernels
import parallel
from bench.measure import describe, heading, machine, write_json
from config import Config, load
from config.cli import ConfigError, Parser, run_cli
from hf import rows_of
from model import Lucie, LucieConfig

Loss = Callable[[Tensor, Tensor], Tensor]  # of tokens and targets, a mean
Built = tuple[nn.Module, Loss]
OURS = "ours"
TOY = [
    "--vocab_size=512", "--hidden_size=128", "--intermediate_size=384", "--num_hidden_layers=2",
    "--num_attention_heads=4", "--num_key_value_heads=1", "--seq_len=64", "--micro_batch_size=2",
]  # fmt: skip
STEPS = 3  # timed in a row, after one that compiles and makes the moments


# --- the implementations: each is built, with memory that is not filled yet, by entering it -------


def architecture(config: Config) -> LucieConfig:
    return checkpoint.architecture(asdict(config))


@contextmanager
def ours(config: Config, device: torch.device, compiled: bool = False) -> Iterator[Built]:
    before = kernels.use("torch" if compiled else "triton" if device.type == "cuda" else "auto")
    try:
        with torch.device("meta"):
            model = Lucie(architecture(config))
        parallel.checkpoint_activations(model, config.activation_checkpointing)
        for block in model.layers if compiled else ():
            block.compile(dynamic=False)
        yield model, parallel.parallelize(model, "fsdp", 0, device, getattr(torch, config.dtype))
    finally:
        kernels.use(before)


@contextmanager
def transformers(config: Config, device: torch.device, liger: bool = False) -> Iterator[Built]:
    from transformers.models.llama import modeling_llama

    patched = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
    try:
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
        options = {"tie_word_embeddings": False, "use_cache": False, "attn_implementation": "sdpa"}
        llama = modeling_llama.LlamaConfig(**vars(architecture(config)), **options)
        with torch.device("meta"):
            model = modeling_llama.LlamaForCausalLM(llama)
        if config.activation_checkpointing != "none":  # it has one kind, the full one
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if dist.is_initialized():
            shard(model, device, getattr(torch, config.dtype))
        model.to_empty(device=device)
        with device:  # its angles are a buffer, which to_empty leaves unfilled
            model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config=llama)
        model.train()

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            return model(input_ids=tokens, labels=targets, shift_labels=targets).loss

        yield model, loss
    finally:
        vars(modeling_llama).update(patched[0])
        modeling_llama.LlamaForCausalLM.forward = patched[1]


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """As parallel.parallelize does with ours: the same policy, by blocks, one gathered ahead.

    Embedding, last norm and head belong to the root, which stays gathered: Liger reads the head's
    weight without calling the head.
    """
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    common = {"mesh": init_device_mesh(device.type, (1,)), "mp_policy": policy}
    for block in model.model.layers:
        fully_shard(block, **common)
    fully_shard(model, **common, reshard_after_forward=False)
    for before, after in pairwise(model.model.layers):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])


IMPLEMENTATIONS: dict[str, Callable[..., AbstractContextManager[Built]]] = {
    OURS: ours,
    "transformers": transformers,
    "liger": lambda *args: transformers(*args, liger=True),
    "ours compiled": lambda *args: ours(*args, compiled=True),
}


# --- do they compute the same? --------------------------------------------------------------------

SMALL = Config(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, seq_len=128, rope_theta=1e4, dtype="bfloat16",
)  # fmt: skip
TOLERANCES = {"loss": 1e-2, "gradient norm": 3e-2}  # relative: bf16 against fp32, and no more


def compare(build: Callable[..., AbstractContextManager], device: torch.device) -> str | None:
    """Why an implementation is wrong; None if its loss and gradient norm, with equal weights, are
    those of our definitions in fp32.

    The targets are what the exact model finds likeliest, so its loss is far below that of a guess,
    and whatever is computed in another way raises it.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SMALL.vocab_size, (2, SMALL.seq_len), generator=generator).to(device)

    def loss_and_norm(model: nn.Module, loss: Loss) -> tuple[float, float]:
        value = loss(tokens, targets)
        value.backward()
        return value.item(), parallel.clip_gradients(model, 0).item()

    before = kernels.use("torch")
    try:
        exact = Lucie(architecture(SMALL)).to(device)
        with torch.no_grad():
            for p in exact.parameters():
                drawn = torch.randn(p.shape, generator=generator) * 2 * p.shape[-1] ** -0.5
                p.copy_(torch.ones(p.shape) if p.ndim == 1 else drawn)
            targets = exact(tokens).argmax(-1)
        expected = loss_and_norm(exact, exact)
    finally:
        kernels.use(before)
    weights = dict(exact.named_parameters())
    with build(SMALL, device) as (model, loss), autocast(SMALL, device):
        for name, parameter in model.named_parameters():
            # transformers has q, k, v and gate, up apart, under Hugging Face's names
            source = (name, 0, None) if name in weights else rows_of(exact.config)[name]
            parallel.fill_rows(parameter, 0, weights[source[0]].detach()[source[1] : source[2]])
        found = loss_and_norm(model, loss)
    for (what, tolerance), value, right in zip(TOLERANCES.items(), found, expected):
        if not abs(value - right) <= tolerance * right:  # true for NaN
            return f"wrong: {what} {value:.4f} for {right:.4f}"
    return None


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """What train.py computes in on a lone CPU, where no FSDP casts the weights."""
    narrow = config.dtype != "float32" and not dist.is_initialized()
    return torch.autocast("cpu", getattr(torch, config.dtype), enabled=narrow)


# --- the step, the same for all -------------------------------------------------------------------


def make_step(
    model: nn.Module, loss: Loss, config: Config, device: torch.device
) -> Callable[[], None]:
    """A function that makes one optimizer step on random tokens, as train.py's loop does."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    groups.append({"params": others, "weight_decay": 0.0})
    betas = config.beta1, config.beta2
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=betas, eps=config.eps, fused=True)
    generator = torch.Generator(device).manual_seed(1)
    size = (config.global_batch_size, config.seq_len + 1)
    samples = torch.randint(config.vocab_size, size, device=device, generator=generator)
    batches = [
        (batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        for batch in samples.split(config.micro_batch_size)
    ]
    each = config.reduce_each_micro_batch, config.gather_each_micro_batch

    def step() -> None:
        for number, (tokens, targets) in enumerate(batches, 1):
            with parallel.micro_batch(model, number == len(batches), *each):
                with autocast(config, device):
                    part = loss(tokens, targets) * (len(tokens) / len(samples))
                part.backward()
        parallel.clip_gradients(model, config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(name: str, config: Config, device: torch.device, profiled: bool) -> dict:
    """Seconds of each step, bytes allocated at the peak (None on a CPU), and if asked for a table
    of the operations of one more step."""
    with IMPLEMENTATIONS[name](config, device) as (model, loss):
        generator = torch.Generator(device).manual_seed(0)
        for parameter in model.parameters():
            rows, _ = parallel.local_rows(parameter)
            std = config.initializer_range
            rows.fill_(1) if rows.ndim == 1 else rows.normal_(0, std, generator=generator)
        step = make_step(model, loss, config, device)
        seconds(step, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = {"seconds": [seconds(step, device) for _ in range(STEPS)]}
        found["allocated"] = torch.cuda.max_memory_allocated() or None  # 0 without a GPU
        if profiled:
            with profile(record_shapes=True) as profiler:
                seconds(step, device)
            events = profiler.key_averages(group_by_input_shape=True)
            order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
            columns = {"max_name_column_width": 40, "max_shapes_column_width": 40}
            found["operations"] = events.table(sort_by=order, row_limit=20, **columns)
        return found


# --- the run --------------------------------------------------------------------------------------


def attempt(name: str, configs: list[Config], device: torch.device, profiled: bool) -> dict:
    """A row of the first config for which there is memory; those before it leave the list."""
    while True:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing on a CPU
        try:
            found = measure(name, configs[0], device, profiled)
            mode = configs[0].activation_checkpointing
            return {"name": name, "activation_checkpointing": mode} | found
        except Exception as error:
            if "out of memory" not in str(error).lower() or len(configs) == 1:
                raise
        del configs[0]


def run(
    config: Config, names: list[str], device: torch.device, out: Path, rounds: int, minutes: float
) -> dict:
    """Measure until `minutes` are over, and return the results.

    out/step.json holds what is known after every row.
    """
    deadline = time.monotonic() + 60 * minutes
    modes = [replace(config, activation_checkpointing=m) for m in ("none", "selective", "full")]
    of_transformers = [modes[0], modes[2]]  # it does not know the other
    configs = {name: modes[:] if "ours" in name else of_transformers[:] for name in names}
    with torch.device("meta"):
        flops = Lucie(architecture(config)).flops_per_token(config.seq_len)
    peak, tokens = parallel.peak_flops(device), config.global_batch_size * config.seq_len
    results = machine(device.type) | {"config": asdict(config), "peak_flops": peak}
    results |= {"stopped": None, "rows": [], "failures": {}}
    turns = [(r, name) for r in range(rounds) for name in (names if r % 2 == 0 else names[::-1])]
    for number, name in (bar := tqdm(turns, desc="step", unit="measurement")):
        bar.set_description(f"{name}, round {number + 1}")
        if time.monotonic() >= deadline:
            results["stopped"] = f"after {minutes:g} minutes"
            break
        if name in results["failures"]:
            continue
        try:
            if number == 0 and (wrong := compare(IMPLEMENTATIONS[name], device)):
                raise ValueError(wrong)
            row = attempt(name, configs[name], device, profiled=name == OURS and number == 0)
            speed = tokens / statistics.median(row["seconds"])
            row |= {"round": number, "tokens_per_second": speed}
            row["mfu"] = speed * flops / peak if peak else None
            results["rows"].append(row)
        except Exception as error:  # a baseline that cannot run is a result too
            results["failures"][name] = describe(error)
        write_json(results, out / "step.json")
    write_json(results, out / "step.json")
    return results


def table(results: dict) -> str:
    """Medians over the rounds, and the operations of our step that take most time."""
    c, rows = results["config"], results["rows"]
    lines = [
        heading(results),
        f"{c['num_hidden_layers']} layers of {c['hidden_size']:,}, {c['dtype']}, a step of "
        f"{c['global_batch_size']} x {c['seq_len']:,} tokens in micro-batches of "
        f"{c['micro_batch_size']}",
        f"{'':16}{'checkpointing':>14}{'tokens/s':>10}{'MFU':>7}{'GB':>7}{'ours/it':>9}",
    ]
    ours = {row["round"]: row["tokens_per_second"] for row in rows if row["name"] == OURS}
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row for row in rows if row["name"] == name]
        last, speed = found[-1], statistics.median(row["tokens_per_second"] for row in found)
        line = f"{name:16}{last['activation_checkpointing']:>14}{speed:10,.0f}"
        line += (
            f"{last['mfu'] * speed / last['tokens_per_second']:7.1%}" if last["mfu"] else " " * 7
        )
        line += f"{last['allocated'] / 1e9:7.1f}" if last["allocated"] else " " * 7
        pairs = [(ours.get(row["round"]), row["tokens_per_second"]) for row in found]
        if name != OURS and (ratios := [mine / its for mine, its in pairs if mine]):
            line += f"{statistics.median(ratios):9.2f}"
        lines.append(line.rstrip())
    lines += [f"{name:16} {failure}" for name, failure in results["failures"].items()]
    lines += [row["operations"] for row in rows if "operations" in row]
    return "\n".join(lines + [f"stopped {results['stopped']}"] * bool(results["stopped"]))


def read_config(options: list[str], toy: bool, *more: str) -> Config:
    """The config of options in train.py's form; without a file, Lucie-7B's on a CUDA machine and
    the demo's on a CPU. `more` options count less than those given."""
    cuda = torch.cuda.is_available() and not toy
    files = [option for option in options if option.endswith(".py")]
    options = [option for option in options if option not in files]
    files = files or ["config/pretrain.py" if cuda else "config/demo_pretrain.py"]
    return load([*files, *(TOY if toy else ()), *more, *options])


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.step", description=__doc__)
    parser.add_argument(
        "--baselines", nargs="+", choices=list(IMPLEMENTATIONS),
        help="what runs beside ours; default: all on a GPU, transformers on a CPU",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="turns of each; default: 2 on a GPU, 5 on a CPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin nothing more after these")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of step.json")
    parser.add_argument("--toy", action="store_true", help="toy size on a CPU")
    args, options = parser.parse_known_args(argv)
    # Models follow each other, and without this option they would leave holes in the GPU's memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cuda = torch.cuda.is_available() and not args.toy
    wanted = args.baselines or (list(IMPLEMENTATIONS) if cuda else ["transformers"])
    names = [name for name in IMPLEMENTATIONS if name == OURS or name in wanted]
    if any("activation_checkpointing" in option for option in options):
        raise ConfigError("bench.step chooses the least activation checkpointing that fits")
    config = read_config(options, args.toy)
    samples = max(config.micro_batch_size, 32_768 // config.seq_len if cuda else 1)
    config = read_config(options, args.toy, f"--global_batch_size={samples}")
    try:
        device, dtype = parallel.pick_device("cuda" if cuda else "cpu", config.dtype)
        config = replace(config, dtype=str(dtype).removeprefix("torch."))
        architecture(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if cuda:
        parallel.start_processes(device)
    results = run(config, names, device, args.out, args.rounds or (2 if cuda else 5), args.minutes)
    print(table(results))
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(OURS in results["failures"] or not results["rows"])


if __name__ == "__main__":
    run_cli(main)
