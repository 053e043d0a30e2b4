"""Every option of a training run, its default and its meaning; and `load`, which reads a config
file and the command line into them.

The defaults describe Lucie-7B; config/pretrain.py, extension.py and annealing.py set what a phase
changes. A config file is plain `name = literal` lines. It is parsed, never executed.
"""

import ast
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class ConfigError(Exception):
    """An option that cannot be used; the message is one line for the person who wrote it."""


@dataclass
class Config:
    # --- run -----------------------------------------------------------------------------------
    name: str = "pretrain"  # the run lives in out_dir/name
    out_dir: str = "out"  # of all runs
    # scratch | resume | auto (resume if there is a checkpoint, else scratch) |
    # PATH of a checkpoint or run (its weights only) | hf:FOLDER_OR_NAME[@revision]
    init_from: str = "auto"
    seed: int = 42  # of the initial weights and of the data order
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # compute: bfloat16 | float32 | auto (float32 where bfloat16 is slow)
    kernels: str = "auto"  # triton | torch (the definitions) | auto (triton on GPUs that can)
    compile: bool = False  # each block by torch.compile; a minute or more at the start
    # Save and stop after so long; 0: never. Surer than a signal to torchrun, which kills its
    # processes 30 seconds later (or --shutdown-timeout); a checkpoint of the 7B takes longer.
    max_minutes: float = 0.0

    # --- many GPUs -------------------------------------------------------------------------------
    # fsdp (all ranks share one copy of everything) | hsdp (groups of ranks have a copy each) |
    # ddp (every rank has one). A single CPU process does without.
    parallel: str = "fsdp"
    replica_size: int = 0  # ranks to a copy in hsdp, at most all; 0: those of one machine
    # False: gradients are summed over ranks once a step instead of after every micro-batch; each
    # rank then keeps the whole gradient, 4 bytes a parameter (27 GB at 7B). fsdp and hsdp.
    reduce_each_micro_batch: bool = True
    # False: weights are gathered once a step instead of twice a micro-batch; each rank then keeps
    # all of them in the dtype of compute, 2 bytes a parameter (13 GB at 7B). fsdp and hsdp.
    gather_each_micro_batch: bool = True
    # none | selective (norms, rotation and gate are computed again in the backward) | full (the
    # matrix products too). Attention never is.
    activation_checkpointing: str = "none"

    # --- model (Hugging Face's names) ------------------------------------------------------------
    vocab_size: int = 65024  # special tokens included
    hidden_size: int = 4096  # width of the residual stream
    intermediate_size: int = 12288  # width of the feed-forward
    num_hidden_layers: int = 32  # blocks of attention and feed-forward
    num_attention_heads: int = 32  # query heads
    num_key_value_heads: int = 8  # each serves heads / kv_heads query heads
    rms_norm_eps: float = 1e-5  # added to the mean of squares
    rope_theta: float = 500_000.0  # base of the rotary angles; larger turns slower
    initializer_range: float = 0.009  # standard deviation of the initial weights

    # --- data ------------------------------------------------------------------------------------
    tokenizer: str = ""  # ranks file (data/tokenizer.py), checked against vocab_size; "": none
    mixture: str = "data/mixtures/pretraining.csv"  # CSV: name, path, weight or epochs
    partial: bool = False  # train on those sources of the mixture whose files are there
    validation: str = ""  # CSV of held-out streams; "": no validation loss
    seq_len: int = 4096  # tokens in a sample, and positions of the model

    # --- schedule, in samples (sequences) --------------------------------------------------------
    samples: int = 762_144_586  # the budget of the phase
    global_batch_size: int = 1024  # samples in an optimizer step
    batch_ramp_samples: int = 0  # the batch grows over so many samples; 0: no ramp
    batch_ramp_start: int = 256  # from this size
    batch_ramp_increment: int = 64  # by so much at a time
    learning_rate: float = 3e-4  # its peak
    min_learning_rate: float = 3e-5  # where cosine or linear decay end
    warmup_samples: int = 0  # linear from 0
    lr_decay: str = "cosine"  # cosine | linear | constant

    # --- optimizer (AdamW) -----------------------------------------------------------------------
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.95  # and of its square's
    eps: float = 1e-5  # added to the root of the latter
    weight_decay: float = 0.1  # of matrices; norms are not decayed
    clip_grad: float = 1.0  # largest gradient norm; 0: no clipping

    # --- one GPU's share -------------------------------------------------------------------------
    micro_batch_size: int = 1  # samples in one forward pass; the rest is accumulated

    # --- logs and checkpoints, in steps ----------------------------------------------------------
    log_every: int = 25  # steps between rows of log.csv
    eval_every: int = 1000  # steps between validation losses
    eval_samples: int = 64  # samples in one
    checkpoint_every: int = 25_000  # 0: only the last step
    checkpoint_early_every: int = 0  # denser at the start of a run ...
    checkpoint_early_steps: int = 0  # ... up to this step
    save_every: int = 0  # between those, to resume from; 0: only when the run is stopped
    keep_last: int = 2  # so many of the latter stay; the ones above always do
    checkpoint_prefix: str = ""  # Lucie's names: step0005000, extension_step0000250


OPTIONS = {field.name: field for field in dataclasses.fields(Config)}


def load(args: Sequence[str]) -> Config:
    """Read `["config/pretrain.py", "--key=value", ...]`: defaults, then files, then the options.

    Raises ConfigError for an unknown name (suggesting the nearest one), a value of another type,
    or a file that is missing or holds anything but `name = literal`.
    """
    config, options = Config(), []
    for arg in args:
        if arg in ("-h", "--help"):
            print(_help())
            sys.exit(0)
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if not equals:
                raise ConfigError(f"{arg}: write --{name}=VALUE")
            options.append((name.replace("-", "_"), _literal(text), arg))
        else:
            for name, value in read_file(arg).items():
                _set(config, name, value, f"{arg}: {name}")
    for name, value, where in options:
        _set(config, name, value, where)
    _check_ranges(config)
    return config


def _check_ranges(config: Config) -> None:
    for name in (
        "seq_len",
        "micro_batch_size",
        "log_every",
        "eval_every",
        "eval_samples",
        "keep_last",
    ):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name in ("weight_decay", "clip_grad", "max_minutes", "save_every", "replica_size"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must be 0 or more, not {getattr(config, name)}")
    if not (0 <= config.beta1 < 1 and 0 <= config.beta2 < 1 and config.eps > 0):
        raise ConfigError("beta1 and beta2 lie between 0 and 1, 1 excluded, and eps is over 0")
    if not config.name:
        raise ConfigError("name: a run needs one")


def _help() -> str:
    """The options with their comments, as they stand in this file."""
    source = Path(__file__).read_text(encoding="utf-8")
    start = source.index("    # --- run")
    return (
        f"options, each as --name=value:\n\n{source[start : source.index('OPTIONS = ')].rstrip()}"
    )


def read_file(path: str | Path) -> dict[str, object]:
    """The `name = literal` lines of a config file."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
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


def _literal(text: str) -> object:
    """A value of the command line: a Python literal, true or false, else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _set(config: Config, name: str, value: object, where: str) -> None:
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: no option is called {name!r}; did you mean {near[0]!r}?")
    kind = OPTIONS[name].type
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 2e6 samples
    if kind is str and type(value) in (int, float):
        value = str(value)  # a run may be called 7
    if type(value) is not kind:
        raise ConfigError(f"{where}: {name} is of type {kind.__name__}, not {value!r}")
    setattr(config, name, value)
