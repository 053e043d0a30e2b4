"""How a checkpoint gets to the disk: whole or not at all, in the background.

Torch's Distributed Checkpoint decides which rank writes what. A copy of the tensors is taken to
main memory, and training goes on while a thread writes that: under a temporary name, synced, the
manifest last, then renamed. What the files are, and how they are read, is in checkpoint.py.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import tensor_files
from manifest import STEP, found, manifest, read_state
from tensor_files import CheckpointError, reason, sync, sync_directory


class Saver:
    """Saves the checkpoints of a run in the background, one at a time.

    Every rank makes one and calls its methods alike. Of the checkpoints that were not saved as
    milestones, only the newest keep_last stay. cuda: the tensors lie on a GPU.
    """

    def __init__(self, folder: Path, keep_last: int = 2, cuda: bool = False) -> None:
        self.folder, self._keep_last = folder, keep_last
        # Its messages between ranks must not mix with those of the training that goes on.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
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
        What has that name already is never written over: an error, as in `wait`.
        """
        self.wait()
        self._path = self.folder / name
        text = json.dumps(state | {"milestone": milestone}, indent=1)
        writer = _Writer(self._path, text, self._keep_last)
        self._running = dcp.async_save(
            tensors(model, optimizer),
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
            raise CheckpointError(f"{self._path}: not saved ({first_reason(error)})") from None


def save(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write one checkpoint and wait for it. Every rank calls this. Raises CheckpointError."""
    path = Path(path)
    saver = Saver(path.parent, sys.maxsize, next(model.parameters()).is_cuda)
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
        if self._path.exists():
            raise FileExistsError(errno.EEXIST, "there is one of this name", str(self._path))
        shutil.rmtree(_unfinished(self._path), ignore_errors=True)
        _unfinished(self._path).mkdir(parents=True)
        names = [f"shard-{number:05d}.safetensors" for number in range(1, len(plans) + 1)]
        return [replace(plan, storage_data=name) for plan, name in zip(plans, names)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future:
        written: Future = Future()
        written.set_result(self._write_shard(plan, planner) if plan.items else [])
        return written

    def _write_shard(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> list[WriteResult]:
        entries, places = {}, {}
        for item in plan.items:  # fp32 all of them
            chunk, name = item.tensor_data.chunk, item.index.fqn
            entries[name] = (torch.float32, chunk.sizes)
            places[name] = {"saved_offsets": chunk.offsets}
        digest = hashlib.sha256()
        size = tensor_files.write(
            _unfinished(self._path) / plan.storage_data,
            entries,
            (planner.resolve_data(item) for item in plan.items),
            # How Distributed Checkpoint's reader of safetensors finds a piece's place.
            {"DCP_SHARDING_INFO": json.dumps(places)},
            digest,
        )
        facts = {plan.storage_data: {"bytes": size, "sha256": digest.hexdigest()}}
        return [WriteResult(item.index, 0, facts) for item in plan.items]

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written."""
        folder = _unfinished(self._path)
        files = {}
        for of_rank in results:
            files |= of_rank[0].storage_data if of_rank else {}
        files["state.json"] = write_text(folder / "state.json", self._state)
        write_text(folder / "manifest.json", manifest(files))
        sync_directory(folder)
        os.replace(folder, self._path)
        with _complaining():  # the new one is complete all the same
            sync_directory(self._path.parent)
        self._forget_old_ones()

    def _forget_old_ones(self) -> None:
        """Remove the passing checkpoints of this run but the newest.

        What was a milestone stays one, whatever the schedule of the run that goes on. What has
        another name, or cannot be read, is not ours to remove.
        """
        prefix, passing = STEP.sub("", self._path.name), []
        for _, path in found(self._path.parent):
            try:
                if STEP.sub("", path.name) == prefix and not read_state(path)["milestone"]:
                    passing.append(path)
            except (CheckpointError, KeyError):
                continue
        for path in passing[: -self._keep_last]:
            with _complaining():
                os.replace(path, _unfinished(path))  # never half of one under its name
                shutil.rmtree(_unfinished(path), ignore_errors=True)


@contextmanager
def _complaining() -> Iterator[None]:
    """What fails after a checkpoint is complete is said, and does not undo it."""
    try:
        yield
    except OSError as error:
        print(f"checkpoint: {error.filename}: {error.strerror}", file=sys.stderr)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What a checkpoint holds, by the names it has there."""
    out = {}
    for name, p in model.named_parameters():
        out[f"model.{name}"] = p.detach()
        if optimizer is not None:
            out[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
            out[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
    return out


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def write_text(path: Path, text: str) -> dict:
    """Write and sync a file; its entry of the manifest."""
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        sync(file)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def first_reason(error: BaseException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason(error)
