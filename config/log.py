"""What a run writes for people to look at, beside its checkpoints: log.csv and completions.csv,
TensorBoard, Weights & Biases; and the energy that it takes."""

import csv
import io
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from config.cli import write_file

# Lucie's columns, with times in hours, then ours. data_seconds: how long the slowest rank waited
# for its samples since the row before. After them come validation_fr and so on, where the held-out
# mixture names several languages.
LOG_COLUMNS = (
    "training_steps", "training_tokens", "training_loss", "walltime", "gputime", "learning_rate",
    "grad_norm", "tokens_per_second", "mfu", "validation_loss", "data_seconds",
)  # fmt: skip


def open_log(
    config: Config, run: Path, languages: Sequence[str], step: int
) -> Callable[[tuple, dict[str, float], dict[str, str]], None]:
    """A function that takes what there is to tell of a step: the values of LOG_COLUMNS without the
    validation loss; validation losses, that of everything, called "loss", and those of `languages`,
    if there are several; and completions, {prompt: text}.

    The numbers go to log.csv, TensorBoard and, if asked for, Weights & Biases; completions to
    completions.csv and TensorBoard; what is rare to stderr, too. A resumed run continues its files.
    """
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / "config.json", json.dumps(asdict(config), indent=1).encode())
    parts = [f"validation_{name}" for name in languages if len(languages) > 1]
    add_row = continue_csv(run / "log.csv", [*LOG_COLUMNS, *parts], step)
    if config.sample_every:
        columns = ("training_steps", "prompt", "text")
        add_text = continue_csv(run / "completions.csv", columns, step)
    boards: dict[str, Callable[[dict, dict, int], object]] = {}

    @contextmanager
    def optional(name: str) -> Iterator[None]:
        """A board that fails is dropped, and the run continues."""
        try:
            yield
        except Exception as error:
            boards.pop(name, None)
            tqdm.write(f"train.py: continuing without {name} ({error!r})", file=sys.stderr)

    if find_spec("tensorboard"):
        with optional("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

            def to_tensorboard(numbers: dict, texts: dict, step: int) -> None:
                for name, value in numbers.items():
                    board.add_scalar(name, value, step)
                for number, (prompt, text) in enumerate(texts.items(), start=1):
                    board.add_text(f"completion/{number}", f"{prompt} | {text}", step)

            boards["TensorBoard"] = to_tensorboard
    if config.wandb_project:
        with optional("Weights & Biases"):
            import wandb

            if step == 0 or not (run / "wandb_id").is_file():
                write_file(run / "wandb_id", secrets.token_hex(8).encode())
            options = {
                "id": (run / "wandb_id").read_text("utf-8"),
                "resume": "allow",
                "dir": str(run),
            }
            options |= {"project": config.wandb_project, "name": config.name}
            wandb_run = wandb.init(config=asdict(config), **options)
            boards["Weights & Biases"] = lambda row, _, step: wandb_run.log(row, step=step)

    def write(values: tuple, validation: dict[str, float], texts: dict[str, str]) -> None:
        names = [name for name in LOG_COLUMNS if name != "validation_loss"]
        row = dict(zip(names, values, strict=True))
        row |= {f"validation_{name}": loss for name, loss in validation.items()}
        add_row([row.get(column) for column in (*LOG_COLUMNS, *parts)])
        numbers = {name: value for name, value in row.items() if value is not None}
        step = numbers.pop("training_steps")
        if validation:
            overall, *others = (f"{name} {loss:.4f}" for name, loss in validation.items())
            each = f" ({', '.join(others)})" if others else ""
            tqdm.write(f"step {step:,}: validation {overall}{each}", file=sys.stderr)
        for prompt, text in texts.items():
            add_text([step, prompt, text])
            line = f"step {step:,}: {prompt} |{text}".replace("\n", "\\n")
            tqdm.write(line, file=sys.stderr)
        for name, add in list(boards.items()):
            with optional(name):
                add(numbers, texts, step)

    return write


def continue_csv(path: Path, columns: Sequence[str], step: int) -> Callable[[list], None]:
    """A function that appends a row to a CSV whose first column is the step.

    Rows up to `step` are kept, without what lies past this checkpoint or was cut short by a crash.
    """
    rows = []
    if step and path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file, restval="cut short"):
                number = row.get("training_steps") or ""
                if number.isdecimal() and int(number) <= step and "cut short" not in row.values():
                    rows.append([row.get(column, "") for column in columns])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_file(path, text.getvalue().encode())
    file = open(path, "a", newline="", encoding="utf-8", buffering=1)

    def append(row: list) -> None:
        try:
            csv.writer(file, lineterminator="\n").writerow(row)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    return append


def energy_meter(device: torch.device) -> Callable[[], float]:
    """A function that tells the joules which this GPU has used since now, as NVML counts them; 0
    where it does not, or without `pip install nvidia-ml-py`."""
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        started = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # an extra, of any version, must not stop a run
        return lambda: 0.0

    def used() -> float:
        with suppress(Exception):
            return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - started) / 1000
        return 0.0

    return used
