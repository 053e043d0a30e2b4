"""What a run starts from: its own newest checkpoint, another's weights, or the seed.

Used by train.py. Every rank calls these alike.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import hf_layout
import parallel
from checkpoint import CheckpointError
from config import Config, ConfigError
from data.dataset import DataError, Mixture
from data.tokenizer import TokenizerError
from model import Lucie, initial_weight

MAY_CHANGE = {  # on resuming a run; every other option would make it another run
    "init_from", "out_dir", "device", "kernels", "compile", "max_minutes", "parallel",
    "replica_size", "reduce_each_micro_batch", "gather_each_micro_batch",
    "activation_checkpointing", "micro_batch_size",
    "log_every", "eval_every", "eval_samples", "checkpoint_every", "checkpoint_early_every",
    "checkpoint_early_steps", "save_every", "keep_last",
}  # fmt: skip
EXPECTED = (ConfigError, DataError, TokenizerError, CheckpointError, OSError)  # one line each


def find_start(
    config: Config, run: Path, mixture: Mixture, rank: int, world: int
) -> tuple[Path | str | None, bool]:
    """(where weights come from, whether the run resumes): what init_from stands for.

    A Path is a checkpoint of ours, a string a Hugging Face folder or name, None is from scratch.
    Giving the same command again resumes a run, whatever its first weights were, from the newest
    checkpoint that is not damaged. Damaged weights of another run are an error.
    """
    wanted = config.init_from
    existing = checkpoint.newest_sound(run, rank, world)
    if existing:
        state = parallel.together(checkpoint.read_state, existing, errors=EXPECTED)
        if state.get("weights_only"):
            raise ConfigError(checkpoint.WEIGHTS_ONLY.format(run) + ", under another --name")
        old, new = state["config"], asdict(config)
        if wanted not in ("resume", "auto", old.get("init_from")) or wanted == "scratch":
            raise ConfigError(f"{run} holds a run already: --init_from=resume, or another --name")
        differ = [n for n in new if n not in MAY_CHANGE and old.get(n) != new[n]]
        if differ:
            fields = ", ".join(f"{n} was {old.get(n)!r} and is {new[n]!r}" for n in differ)
            raise ConfigError(f"{run} holds another run: {fields}; choose another --name")
        if state.get("mixture") != mixture.fingerprint():
            raise ConfigError(
                f"{run}: the sources, weights or tokens of {config.mixture} changed since it was "
                "begun, so its samples would be others; choose another --name"
            )
        config.init_from = old["init_from"]
        return existing, True
    if wanted in ("auto", "scratch"):
        return None, False
    if wanted.startswith("hf:"):
        return wanted.removeprefix("hf:"), False
    if wanted == "resume" or not (source := parallel.gather(checkpoint.latest(wanted))[0]):
        where = run if wanted == "resume" else wanted
        raise ConfigError(f"init_from={wanted}: no complete checkpoint in {where}")
    parallel.together(checkpoint.verify, source, rank, world, errors=(CheckpointError,))
    return source, False


def fill(
    model: Lucie,
    optimizer: torch.optim.AdamW,
    source: Path | str | None,
    resume: bool,
    config: Config,
    rank: int,
) -> dict:
    """Give the parameters their first values, as `find_start` says; where the run stands then."""
    state = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "gpu_seconds": 0.0}
    if resume:
        return state | checkpoint.load(source, model, optimizer)
    if isinstance(source, Path):
        state["trained_before"] = checkpoint.trained(checkpoint.load(source, model, None))
    elif source:
        folder = parallel.together(hf_layout.folder_of, source, errors=EXPECTED)
        told = parallel.together(hf_layout.load_folder, folder, model, errors=EXPECTED)
        state["trained_before"] = told
    else:
        parameters = list(model.named_parameters())
        for name, p in tqdm(parameters, "initial weights", delay=3, leave=False, disable=rank > 0):
            value = initial_weight(model.config, name, p.shape, config.seed)
            parallel.fill_rows(p, 0, value)
    return state
