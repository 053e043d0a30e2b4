"""Checkpoints: written whole or not at all, in the background, read back on any number of ranks.

    out/NAME/checkpoints/step0005000/
        shard-00001.safetensors ...   of each rank: model.NAME, exp_avg.NAME, exp_avg_sq.NAME
        state.json                    step, samples and tokens consumed, seconds, config, versions
        manifest.json                 the size and SHA-256 of every file above

Torch's Distributed Checkpoint decides which rank writes and reads what, so that a checkpoint of 512
ranks loads on one; how the bytes get to the disk is `_Writer`. A copy of the tensors is taken to
main memory, and training goes on while a thread writes that: under a temporary name, synced, the
manifest last, then renamed. A directory with its final name is complete, and whatever happens to it
later is found by its manifest. No format here can hold code, and none is unpickled: a foreign
checkpoint cannot run anything.

The Hugging Face layout is in hf_layout.py.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from tqdm import tqdm

from hf_layout import CheckpointError, from_hf, reason, to_hf
from model import Lucie, LucieConfig
from parallel import gather, together

__all__ = [  # from_hf and to_hf are hf_layout's
    "CheckpointError", "Saver", "architecture", "from_hf", "from_run", "latest", "load",
    "newest_sound", "read_state", "save", "to_hf", "verify",
]  # fmt: skip

STEP = re.compile(r"step(\d+)$")
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
CHUNK = 1 << 20  # bytes hashed and written at a time, while they are in the processor's cache


# --- writing -------------------------------------------------------------------------------------


class Saver:
    """Saves the checkpoints of a run in the background, one at a time.

    Every rank makes one and calls its methods alike. Of the checkpoints that were not saved as
    milestones, only the newest keep_last stay.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self._keep_last = folder, keep_last
        # Its messages between ranks must not mix with those of the training that goes on.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )
        self._running = self._path = None

    def save(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict,
        milestone: bool = False,
    ) -> None:
        """Begin to write folder/name; returns as soon as the tensors may change again.

        state is plain JSON data, with its step. Waits for the save before, if that still goes on.
        """
        self.wait()
        self._path = self.folder / name
        text = json.dumps(state | {"milestone": milestone}, indent=1)
        writer = _Writer(self._path, text, self._keep_last)
        self._running = dcp.async_save(
            _tensors(model, optimizer),
            storage_writer=writer,
            process_group=self._group,
            async_stager=self._stager,
            no_dist=not dist.is_initialized(),
        )

    def failed(self) -> bool:
        """Whether the save that was begun last has ended badly, on this rank's knowledge."""
        ended = self._running is not None and self._running.done()
        return ended and self._running.exception() is not None

    def wait(self) -> None:
        """Wait for the end of the save. Raises CheckpointError on all ranks if the disk is full or
        not writable; nothing of the new checkpoint remains then."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.result()
        except (OSError, dcp.CheckpointException) as error:
            shutil.rmtree(_unfinished(self._path), ignore_errors=True)
            raise CheckpointError(f"{self._path}: not saved ({_first_reason(error)})") from None


def save(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write one checkpoint and wait for it. Every rank calls this. Raises CheckpointError."""
    path = Path(path)
    saver = Saver(path.parent, keep_last=sys.maxsize)
    saver.save(path.name, model, optimizer, state)
    saver.wait()


class _Writer(dcp.StorageWriter):
    """Distributed Checkpoint's way to the disk: a safetensors file a rank, then the manifest.

    Its own writer builds a rank's file in memory first, twice its size; this one streams.
    """

    def __init__(self, path: Path, state: str, keep_last: int) -> None:
        self._path, self._state, self._keep_last = path, state, keep_last

    def reset(self, checkpoint_id: object = None) -> None: ...

    def set_up_storage_writer(
        self, is_coordinator: bool, *args: object, **kwargs: object
    ) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        """On rank 0, before any rank writes."""
        shutil.rmtree(_unfinished(self._path), ignore_errors=True)
        _unfinished(self._path).mkdir(parents=True)
        names = [f"shard-{number:05d}.safetensors" for number in range(1, len(plans) + 1)]
        return [replace(plan, storage_data=name) for plan, name in zip(plans, names)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future:
        written: Future = Future()
        written.set_result(self._write_shard(plan, planner) if plan.items else [])
        return written

    def _write_shard(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> list[WriteResult]:
        header, places, end = {}, {}, 0
        for item in plan.items:  # fp32 all of them
            chunk, name = item.tensor_data.chunk, item.index.fqn
            start, end = end, end + 4 * chunk.sizes.numel()
            header[name] = {"dtype": "F32", "shape": chunk.sizes, "data_offsets": [start, end]}
            places[name] = {"saved_offsets": chunk.offsets}
        # How Distributed Checkpoint's reader of safetensors finds a piece's place in its tensor.
        header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps(places)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)

        digest = hashlib.sha256()
        with open(_unfinished(self._path) / plan.storage_data, "wb") as file:
            for content in (len(text).to_bytes(8, "little"), text):
                digest.update(content)
                file.write(content)
            for item in plan.items:
                tensor = planner.resolve_data(item).contiguous()
                content = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                for first in range(0, len(content), CHUNK):
                    digest.update(content[first : first + CHUNK])
                    file.write(content[first : first + CHUNK])
            _sync(file)
            size = file.tell()
        facts = {plan.storage_data: {"bytes": size, "sha256": digest.hexdigest()}}
        return [WriteResult(item.index, 0, facts) for item in plan.items]

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written."""
        folder = _unfinished(self._path)
        files = {}
        for of_rank in results:
            files |= of_rank[0].storage_data if of_rank else {}
        files["state.json"] = _write_text(folder / "state.json", self._state)
        _write_text(folder / "manifest.json", _manifest(files))
        _sync_directory(folder)
        # Of the same step, if there is one already.
        before = self._path.with_name(f".{self._path.name}.old")
        shutil.rmtree(before, ignore_errors=True)
        if self._path.exists():
            os.replace(self._path, before)
        os.replace(folder, self._path)
        _sync_directory(self._path.parent)
        shutil.rmtree(before, ignore_errors=True)
        self._forget_old_ones()

    def _forget_old_ones(self) -> None:
        # What was a milestone stays one, whatever the schedule of the run that goes on.
        try:
            found = [path for _, path in _found(self._path.parent)]
            passing = [path for path in found if not read_state(path)["milestone"]]
            for path in passing[: -self._keep_last]:
                os.replace(path, _unfinished(path))  # never half of one under its name
                shutil.rmtree(_unfinished(path), ignore_errors=True)
        except (OSError, CheckpointError) as error:  # the new one is complete all the same
            print(f"checkpoint: an old one is not removed ({reason(error)})", file=sys.stderr)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    out = {}
    for name, p in model.named_parameters():
        out[f"model.{name}"] = p.detach()
        if optimizer is not None:
            out[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
            out[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
    return out


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write_text(path: Path, text: str) -> dict:
    """Write and sync a file; its entry of the manifest."""
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        _sync(file)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(files: dict) -> str:
    """The text of a manifest, which vouches for itself as well."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1)


def _sync(file: object) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make names in a directory survive a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_reason(error: BaseException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason(error)


# --- finding -------------------------------------------------------------------------------------


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of those under their final names, the oldest first, by number."""
    named = [p for p in folder.glob("*step*") if p.is_dir() and not p.name.startswith(".")]
    return sorted((int(m[1]), p) for p in named if (m := STEP.search(p.name)))


def latest(path: str | Path) -> Path | None:
    """The checkpoint of the highest step under a run directory, or `path` if it is one.

    Compares numbers, not names. None if there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = _found(path / "checkpoints")
    return found[-1][1] if found else None


def _tidy(folder: Path) -> None:
    """Remove what a killed save left behind, and undo a replacement that it left half done."""
    for before in folder.glob(".*.old"):
        path = before.with_name(before.name[1:].removesuffix(".old"))
        if not path.exists():
            os.replace(before, path)
        shutil.rmtree(before, ignore_errors=True)
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


class Damaged(CheckpointError):
    """A checkpoint is not what was written."""


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
    for path in reversed(gather([path for _, path in _found(folder)])[0]):
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
        if text == _manifest(files):
            return files
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(f"{path / 'manifest.json'}: damaged")


# --- reading -------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    """Fill the model, and the optimizer if given, from a checkpoint; return its state.

    Each rank reads what is its own. Raises CheckpointError if it is incomplete, damaged or of
    another architecture; what has the right shape but other bytes, `verify` finds.
    """
    path = Path(path)
    state = together(read_state, path, errors=(CheckpointError,))
    here, there = vars(model.config), state["config"]
    free = ("rope_theta", "initializer_range")  # neither changes what the weights are
    differ = [n for n in here if n in there and here[n] != there[n] and n not in free]
    if differ:
        fields = ", ".join(f"{n} {there[n]} (here {here[n]})" for n in differ)
        raise CheckpointError(f"{path}: holds another model: {fields}")
    if optimizer is not None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.tensor(float(state["step"]), device=p.device)
                moments = {n: torch.zeros_like(p.detach()) for n in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
    try:
        dcp.load(
            _tensors(model, optimizer),
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            no_dist=not dist.is_initialized(),
        )
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{path}: damaged or incomplete ({_first_reason(error)})") from None
    return state


def read_state(path: str | Path) -> dict:
    """The state.json of a checkpoint."""
    try:
        state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        state["step"], state["config"]["seq_len"]
        return state
    except OSError:
        raise CheckpointError(f"{path}: not a complete checkpoint (no state.json)") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}/state.json: damaged") from None


def architecture(options: dict) -> LucieConfig:
    """The model that a training config describes; it has seq_len positions.

    Raises ValueError naming the field of an impossible combination.
    """
    names = vars(LucieConfig()).keys() & options.keys()
    values = {name: options[name] for name in names}
    return LucieConfig(**values, max_position_embeddings=options["seq_len"])


def from_run(path: str | Path) -> tuple[Lucie, dict]:
    """(model, config) of a run's newest checkpoint or of a checkpoint, fp32 on the CPU."""
    found = latest(path)
    if found is None:
        raise CheckpointError(f"{path}: no complete checkpoint there")
    options = read_state(found)["config"]
    with torch.device("meta"):
        model = Lucie(architecture(options))
    model.to_empty(device="cpu")
    load(found, model, None)
    return model, options
