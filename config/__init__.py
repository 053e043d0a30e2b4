"""Every option of a training run, its default and its meaning; and `load`, which reads a config
file and the command line into them.

The defaults describe Lucie-7B; config/pretrain.py, extension.py and annealing.py set what a phase
changes. A config file is plain `name = literal` lines. It is parsed, never executed.
"""

import argparse
import ast
import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config.cli import KINDS, ConfigError, Parser, from_text, nearest


@dataclass
class Config:
    # --- run -----------------------------------------------------------------------------------
    name: str = "pretrain"  # the run is stored in out_dir/name
    out_dir: str = "out"  # the folder of all runs
    # scratch | resume | auto (resume if there is a checkpoint, else scratch) |
    # PATH of a checkpoint or run (its weights only) | hf:FOLDER_OR_NAME[@revision]
    init_from: str = "auto"
    seed: int = 42  # for the initial weights and the data order
    device: str = "auto"  # auto | cpu | cuda | mps (Apple's GPUs; untested, so never taken by auto)
    dtype: str = "auto"  # of compute: bfloat16 | float32 | auto (float32 where bfloat16 is slow)
    kernels: str = "auto"  # triton | torch (the definitions) | auto (triton on GPUs that can)
    compile: bool = False  # torch.compile each block; takes a minute or more at the start
    # Save and stop after this many minutes; 0: never. More reliable than a signal to torchrun,
    # which kills its processes 30 seconds later (or --shutdown-timeout), too soon for the 7B.
    max_minutes: float = 0.0

    # --- many GPUs -------------------------------------------------------------------------------
    # fsdp (all ranks share one copy of everything) | hsdp (each group of ranks shares a copy) |
    # ddp (every rank has a copy). A single CPU process needs none of them.
    parallel: str = "fsdp"
    replica_size: int = 0  # ranks that share a copy in hsdp; 0: those of one machine
    # False: sum gradients over ranks once a step instead of after every micro-batch. Each rank then
    # keeps the whole gradient, 4 bytes a parameter (27 GB at 7B). For fsdp and hsdp.
    reduce_each_micro_batch: bool = True
    # False: gather weights once a step instead of twice a micro-batch. Each rank then keeps all of
    # them in the dtype of compute, 2 bytes a parameter (13 GB at 7B). For fsdp and hsdp.
    gather_each_micro_batch: bool = True
    # none | selective (compute norms, rotation and gate again in the backward) | full (the matrix
    # products too). Attention is never computed again.
    activation_checkpointing: str = "none"

    # --- model (Hugging Face's names) ------------------------------------------------------------
    vocab_size: int = 65024  # special tokens included
    hidden_size: int = 4096  # width of the residual stream
    intermediate_size: int = 12288  # width of the feed-forward
    num_hidden_layers: int = 32  # blocks of attention and feed-forward
    num_attention_heads: int = 32  # query heads
    num_key_value_heads: int = 8  # each serves num_attention_heads / num_key_value_heads heads
    rms_norm_eps: float = 1e-5  # added to the mean of squares
    rope_theta: float = 500_000.0  # base of the rotary angles; a larger one turns slower
    initializer_range: float = 0.009  # standard deviation of the initial weights

    # --- data ------------------------------------------------------------------------------------
    tokenizer: str = ""  # ranks file (data/tokenizer.py), checked against vocab_size; "": none
    mixture: str = "data/mixtures/pretraining.csv"  # CSV: name, path, weight or epochs
    partial: bool = False  # train without the sources whose files are missing
    validation: str = ""  # mixture of held-out streams; "": no validation loss
    seq_len: int = 4096  # tokens in a sample, and positions of the model
    # True: a token attends only to its own document. Lucie attended over the whole sample.
    document_mask: bool = False

    # --- schedule, in samples (sequences) --------------------------------------------------------
    samples: int = 762_144_586  # length of the phase
    global_batch_size: int = 1024  # samples in an optimizer step
    batch_ramp_samples: int = 0  # the batch grows over this many samples; 0: no ramp
    batch_ramp_start: int = 256  # from this size
    batch_ramp_increment: int = 64  # in steps of this size
    learning_rate: float = 3e-4  # at its peak
    min_learning_rate: float = 3e-5  # where cosine and linear decay end
    warmup_samples: int = 0  # linear from 0 to learning_rate
    lr_decay: str = "cosine"  # cosine | linear | constant

    # --- optimizer (AdamW) -----------------------------------------------------------------------
    beta1: float = 0.9  # decay of the running mean of the gradient
    beta2: float = 0.95  # decay of the running mean of its square
    eps: float = 1e-5  # added to the root of the latter
    weight_decay: float = 0.1  # of matrices; norms do not decay
    clip_grad: float = 1.0  # largest gradient norm; 0: no clipping

    # --- one GPU's share -------------------------------------------------------------------------
    micro_batch_size: int = 1  # samples in one forward pass; gradients are accumulated

    # --- logs and checkpoints, in steps ----------------------------------------------------------
    log_every: int = 25  # steps between rows of log.csv
    eval_every: int = 1000  # steps between validation losses
    eval_samples: int = 64  # samples of a validation loss
    sample_every: int = 0  # steps between completions of the prompts below; 0: never
    sample_prompts: str = ""  # one a line
    checkpoint_every: int = 25_000  # 0: only the last step
    checkpoint_early_every: int = 0  # denser at the start of a run ...
    checkpoint_early_steps: int = 0  # ... up to this step
    save_every: int = 0  # rolling checkpoints to resume from; 0: only when the run is stopped
    keep_last: int = 2  # rolling checkpoints that are kept; the others always are
    checkpoint_prefix: str = ""  # Lucie's names: step0005000, extension_step0000250
    wandb_project: str = ""  # log to Weights & Biases as well (pip install wandb); "": no


OPTIONS = {field.name: field for field in dataclasses.fields(Config)}


def load(args: Sequence[str]) -> Config:
    """Read `["config/pretrain.py", "--key=value", ...]`: defaults, then files, then the options.

    Raises ConfigError for an unknown name (it suggests the nearest one), a value of another type,
    a value out of range, or a file that is missing or holds anything but `name = literal`.
    """
    parser = Parser(usage="train.py [CONFIG.py] [--option value ...]", description=_documentation())
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    for name, option in OPTIONS.items():
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{name}", type=from_text(option.type), **hidden)
    given = vars(parser.parse_args(_with_bare_booleans(args)))
    config = Config()
    for file in given.pop("files"):
        for name, value in read_file(file).items():
            _set(config, name, value, file)
    planned = config.samples
    for name, value in given.items():
        setattr(config, name, value)
    _check_ranges(config)
    if "samples" in given and "warmup_samples" not in given:
        _shorten_warmup(config, planned, given)
    return config


def read_file(path: str | Path) -> dict[str, object]:
    """The `name = literal` lines of a config file."""
    try:
        # Some editors begin a file with a byte order mark.
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: not a config file ({error})") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        try:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise ConfigError(
                f"{path}, line {node.lineno}: a config file holds only lines like name = 1.5"
            ) from None
    return values


def _set(config: Config, name: str, value: object, file: str) -> None:
    """Set an option to the literal that a config file gives it."""
    if name not in OPTIONS:
        raise ConfigError(f"{file}: no option is called {name!r}{nearest(name, OPTIONS)}")
    kind = OPTIONS[name].type
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 2e6 samples
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{file}: {name} is {KINDS[kind][1]}, not {value!r}")
    setattr(config, name, value)


def _check_ranges(config: Config) -> None:
    positive = ("seq_len", "micro_batch_size", "log_every", "eval_every", "eval_samples")
    not_negative = ("weight_decay", "clip_grad", "max_minutes", "save_every", "replica_size")
    not_negative += (
        "sample_every",
        "checkpoint_every",
        "checkpoint_early_every",
        "checkpoint_early_steps",
    )
    for name in (*positive, "keep_last"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name in not_negative:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must be 0 or more, not {getattr(config, name)}")
    if not (0 <= config.beta1 < 1 and 0 <= config.beta2 < 1 and config.eps > 0):
        raise ConfigError("beta1 and beta2 must be at least 0 and below 1, and eps above 0")
    if not config.init_from:
        raise ConfigError("init_from must not be empty; auto is the default")
    # Checkpoints that are hidden or in another folder would not be found again.
    if not all(part.strip(".") and part[0] != "." for part in config.name.split("/")):
        raise ConfigError(f"name must be a relative path without hidden parts, not {config.name!r}")
    if "/" in config.checkpoint_prefix or config.checkpoint_prefix.startswith("."):
        prefix = config.checkpoint_prefix
        raise ConfigError(f"checkpoint_prefix must not begin with . or contain /, not {prefix!r}")


def _shorten_warmup(config: Config, planned: int, given: Iterable[str]) -> None:
    """Fit warm-up and batch ramp to a run of fewer samples than its config file plans.

    Without it, a short trial of a long recipe would be refused, or would never leave its warm-up.
    """
    if not 0 < config.samples <= config.warmup_samples:
        return
    changes = []
    for name in [n for n in ("warmup_samples", "batch_ramp_samples") if n not in given]:
        if before := getattr(config, name):
            setattr(config, name, int(before * (config.samples / planned)))
            changes.append(f"{name} from {before:,} to {getattr(config, name):,}")
    if os.environ.get("RANK", "0") == "0":
        print(f"--samples={config.samples} shortens {' and '.join(changes)}", file=sys.stderr)


def _with_bare_booleans(args: Sequence[str]) -> list[str]:
    """`--compile` alone means `--compile=true`."""
    out = list(args)
    for i, (arg, following) in enumerate(zip(args, [*args[1:], "--"])):
        option = OPTIONS.get(arg.removeprefix("--").replace("-", "_"))
        if arg.startswith("--") and option and option.type is bool:
            if following.startswith("--") or following.endswith(".py"):
                out[i] = f"{arg}=true"
    return out


def _documentation() -> str:
    """The options with their comments, as they stand in this file."""
    source = Path(__file__).read_text(encoding="utf-8")
    options = source[source.index("    # --- run") : source.index("OPTIONS = ")].rstrip()
    example = "python train.py config/demo_pretrain.py --seed 1 --learning_rate=1e-3"
    return f"    {example}\n\nThe options and their defaults:\n\n{options}"
