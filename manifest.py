"""Which checkpoints there are, and whether they are what was written.

The manifest.json of a checkpoint holds the size and SHA-256 of its other files, and a digest of
itself.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from parallel import gather, together
from tensor_files import CHUNK, CheckpointError

STEP = re.compile(r"step(\d+)$")


class Damaged(CheckpointError):
    """A checkpoint is not what was written."""


def latest(path: str | Path) -> Path | None:
    """The checkpoint of the highest step under a run directory, or `path` if it is one.

    Compares numbers, not names. None if there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    steps = found(path / "checkpoints")
    return steps[-1][1] if steps else None


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of those under their final names, the oldest first, by number."""
    named = [p for p in folder.glob("*step*") if p.is_dir() and not p.name.startswith(".")]
    return sorted((int(m[1]), p) for p in named if (m := STEP.search(p.name)))


def read_state(path: str | Path, name: str = "state.json") -> dict:
    """The state.json of a checkpoint."""
    try:
        state = json.loads((Path(path) / name).read_text(encoding="utf-8"))
        state["step"], state["config"]["seq_len"]
        return state
    except OSError:
        raise CheckpointError(f"{path}: not a complete checkpoint (no {name})") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}/{name}: damaged") from None


def _tidy(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def newest_sound(run: Path, rank: int, world: int) -> Path | None:
    """The newest checkpoint of a run that is byte for byte as it was written, or None.

    Every rank calls this and checks its share of the files. A damaged one is named on stderr and
    set aside as NAME.damaged, and the one before it is looked at. Raises CheckpointError when
    there are checkpoints and all are damaged, for a run is never begun anew by mistake; or when
    one cannot be read, which is no proof of damage.
    """

    def set_aside(path: Path) -> None:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)

    folder = run / "checkpoints"
    together(lambda: _tidy(folder) if rank == 0 else None, errors=(OSError,))
    for path in reversed(gather([path for _, path in found(folder)])[0]):
        try:
            together(verify, path, rank, world, errors=(CheckpointError,))
            return path
        except Damaged as damage:
            if rank == 0:
                line = f"checkpoint: {damage}; set aside, the one before it is used"
                print(line, file=sys.stderr)
            together(lambda path=path: set_aside(path) if rank == 0 else None, errors=(OSError,))
    if gather(any(folder.glob("*.damaged")))[0]:
        raise CheckpointError(f"{run}: every checkpoint is damaged; another --name begins anew")
    return None


def verify(path: str | Path, rank: int = 0, world: int = 1) -> None:
    """Compare a checkpoint with its manifest; of several ranks each reads its share of the files.

    Raises Damaged naming the file that is missing, cut short or changed, and CheckpointError for
    one that cannot be read.
    """
    path = Path(path)
    # Rank 0 looks for all the files. Another that misses one, on a machine of its own, has trouble.
    missing = Damaged if rank == 0 else CheckpointError
    try:
        files = _read_manifest(path)
        alien = {p.name for p in path.glob("*.safetensors")} - files.keys()
        if alien:
            raise Damaged(f"{path / alien.pop()}: not in the manifest")
        for name, facts in files.items():
            size = (path / name).stat().st_size
            if size != facts["bytes"]:
                raise Damaged(
                    f"{path / name}: damaged ({size:,} bytes, {facts['bytes']:,} were written)"
                )
        mine = list(files)[rank::world]
        bar = tqdm(
            desc=f"checking {path.name}",
            total=sum(files[name]["bytes"] for name in mine),
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
            disable=rank > 0,
        )
        with bar:
            for name in mine:
                digest = hashlib.sha256()
                with open(path / name, "rb", buffering=0) as file:
                    while content := file.read(CHUNK):
                        digest.update(content)
                        bar.update(len(content))
                if digest.hexdigest() != files[name]["sha256"]:
                    raise Damaged(f"{path / name}: damaged (its SHA-256 is not the one written)")
    except FileNotFoundError as error:
        raise missing(f"{error.filename}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror}") from None


def _read_manifest(path: Path) -> dict[str, dict]:
    """{name of a file: its bytes and sha256}."""
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text == manifest(files):
            return files
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(f"{path / 'manifest.json'}: damaged")


def manifest(files: dict) -> str:
    """The text of a manifest, which vouches for itself as well."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1)
