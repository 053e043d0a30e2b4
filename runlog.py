"""The log of a run: log.csv, in Lucie's columns and then ours, and the same for TensorBoard.

A log survives its run: it is continued on resuming, never rewritten in place, and rows that a crash
left behind (past the checkpoint, or cut short) are dropped.
"""

import csv
import platform
import subprocess
import threading
from importlib import metadata
from pathlib import Path
from typing import IO, Any

# Lucie's, with times in hours, then ours. data_seconds: how long the steps since the row before
# stood still for their samples, of each step the rank that waited longest.
LOG_COLUMNS = (
    "training_steps", "training_tokens", "training_loss", "walltime", "gputime", "learning_rate",
    "grad_norm", "tokens_per_second", "mfu", "validation_loss", "data_seconds",
)  # fmt: skip


def open_log(run: Path, step: int) -> IO[str]:
    """log.csv, open to append, without the rows past `step` that a crash may have left behind.

    A log that was begun with other columns gets those of today; what it does not know stays empty.
    """
    path, lines = run / "log.csv", [",".join(LOG_COLUMNS)]
    if step and path.is_file():
        rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
        header, *rows = [line.split(",") for line in rows] or [[]]
        for values in rows:
            row = dict(zip(header, values))
            number = row.get("training_steps", "")
            if len(values) == len(header) and number.isdecimal() and int(number) <= step:
                lines.append(",".join(row.get(column, "") for column in LOG_COLUMNS))
    write_whole(path, "\n".join(lines) + "\n")
    return open(path, "a", newline="", encoding="utf-8", buffering=1)


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, then rename it: there is never half of one."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def open_board(run: Path, step: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    threading.excepthook = _spare_the_board
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def _spare_the_board(failure: threading.ExceptHookArgs) -> None:
    """A full disk stops TensorBoard's thread, too; log.csv and the checkpoints tell of it."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def write(log: IO[str], board: Any, row: dict) -> None:
    """Add a row. Raises OSError naming the file."""
    try:
        csv.DictWriter(log, LOG_COLUMNS, lineterminator="\n").writerow(row)
        for name, value in row.items():
            if board is not None and value is not None and name != "training_steps":
                board.add_scalar(name, value, row["training_steps"])
    except OSError as error:
        raise OSError(error.errno, error.strerror, log.name) from None


def versions() -> dict[str, str]:
    """What a run was computed with: the commit of this code, and the libraries that matter."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        code = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        code = ""
    found = {"code": code or "not a git checkout", "python": platform.python_version()}
    for library in ("torch", "triton", "numpy"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found
