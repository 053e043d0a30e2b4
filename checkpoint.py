"""Checkpoints: complete or absent, written in the background, loadable on any number of ranks.

    out/NAME/checkpoints/step0005000/
        shard-00001.safetensors ...   of each rank: model.NAME, exp_avg.NAME, exp_avg_sq.NAME
        state.json                    step, samples and tokens consumed, seconds, config, versions
        manifest.json                 the size and SHA-256 of every file above

A directory gets its final name when all of it is on the disk, and its manifest shows whether it has
changed since. Each rank writes the rows it holds and records which ones in the metadata of its
shard, so any other number of ranks can read the rows it needs. Nothing is ever unpickled, so a
foreign checkpoint cannot run code.

    python -m checkpoint inspect out/pretrain
    python -m checkpoint export out/pretrain --out DIR --dtype bfloat16      for transformers, vLLM
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import hf
import parallel
import quantize
from config import Config
from config.cli import ConfigError, Parser, in_one_line, run_cli, write_file
from data.dataset import DataError
from hf import DTYPES, CheckpointError, Piece
from model import Lucie, LucieConfig, initial_weight

STEP = re.compile(r"step(\d+)$")
MAY_CHANGE = {  # when a run is resumed; any other option would make it another run
    "init_from", "out_dir", "device", "kernels", "compile", "max_minutes", "parallel",
    "replica_size", "reduce_each_micro_batch", "gather_each_micro_batch",
    "activation_checkpointing", "micro_batch_size", "log_every", "eval_every", "eval_samples",
    "sample_every", "sample_prompts",
    "checkpoint_every", "checkpoint_early_every", "checkpoint_early_steps", "save_every",
    "keep_last", "wandb_project",
}  # fmt: skip


class Damaged(CheckpointError):
    """A checkpoint is not what was written."""


# --- saving --------------------------------------------------------------------------------------


class Saver:
    """Saves the checkpoints of a run in the background, one at a time.

    Every rank makes one and calls its methods in the same order. Only the newest keep_last rolling
    checkpoints, those that are no milestones, are kept.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self._keep_last = folder, keep_last
        # Its messages between ranks must not mix with those of the training that goes on.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1)
        self._copies: dict[str, Tensor] = {}  # in main memory, used again by the next save
        self._path, self._running = folder, None

    def save(
        self, name: str, model: nn.Module, optimizer: Optimizer, state: dict, milestone=False
    ) -> None:
        """Begin to write folder/name; returns as soon as the tensors may change again.

        state is plain JSON data, with its step. Waits for the previous save if it is still running.
        An existing checkpoint is never overwritten; that is an error, as in `wait`.
        """
        self.wait()
        first_rows = {}
        for index, (key, tensor) in enumerate(tensors(model, optimizer).items()):
            rows, first = parallel.local_rows(tensor)
            replica, replicas = parallel.replica_of(tensor)
            if index % replicas != replica or not len(rows):
                continue  # another replica of the model writes this one
            if key not in self._copies:
                copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
                self._copies[key] = copy
            self._copies[key].copy_(rows, non_blocking=rows.is_cuda)
            first_rows[key] = first
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._path = self.folder / name
        text = json.dumps(state | {"milestone": milestone}, indent=1)
        self._running: Future | None = self._thread.submit(self._write, first_rows, text)

    def failed(self) -> bool:
        """Whether this rank knows that the newest save has failed."""
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
        except (OSError, CheckpointError) as error:
            shutil.rmtree(_unfinished(self._path), ignore_errors=True)
            failure = CheckpointError(f"{self._path}: not saved ({in_one_line(error)})")
            failure.on_all_ranks = True
            raise failure from None

    def _write(self, first_rows: dict[str, int], state: str) -> None:
        """In the background, on every rank: write the shard of this rank; rank 0 completes it."""
        path, folder, rank = self._path, _unfinished(self._path), parallel.rank()

        def write_shard() -> dict[str, dict]:
            folder.mkdir(parents=True, exist_ok=True)
            if not first_rows:
                return {}
            file = folder / f"shard-{rank + 1:05d}.safetensors"
            copies = {key: self._copies[key] for key in first_rows}
            # torch.distributed.checkpoint's key and format for where the rows of a shard belong
            offsets = {key: [row, 0][: copies[key].ndim] for key, row in first_rows.items()}
            places = {key: {"saved_offsets": offset} for key, offset in offsets.items()}
            hf.save_tensors(copies, file, {"DCP_SHARDING_INFO": json.dumps(places)})
            hf.sync(file)
            return {file.name: _facts(file)}

        def complete(files: dict[str, dict]) -> None:
            if rank > 0:
                return
            if path.exists():
                raise CheckpointError("a checkpoint of this name exists already")
            write_file(folder / "state.json", state.encode())
            files["state.json"] = _facts(folder / "state.json")
            write_file(folder / "manifest.json", manifest(files).encode())
            hf.sync(folder)
            os.replace(folder, path)
            try:
                hf.sync(path.parent)
                self._remove_old_ones()
            except OSError as error:  # the new checkpoint is complete all the same
                print(f"checkpoint: {in_one_line(error)}", file=sys.stderr)

        common = {"errors": (OSError, CheckpointError), "group": self._group}
        mine = parallel.together(write_shard, **common)
        files = {n: f for part in parallel.gather(mine, self._group) for n, f in part.items()}
        parallel.together(complete, files, **common)

    def _remove_old_ones(self) -> None:
        """Remove the rolling checkpoints of this run but the newest.

        A milestone stays one, whatever the schedule of the resumed run. Checkpoints with another
        prefix, or that cannot be read, are left alone.
        """
        prefix, rolling = STEP.sub("", self._path.name), []
        for _, path in found(self.folder):
            with suppress(CheckpointError, KeyError):
                if STEP.sub("", path.name) == prefix and not read_state(path)["milestone"]:
                    rolling.append(path)
        for path in rolling[: -self._keep_last]:
            os.replace(path, _unfinished(path))  # a half-removed one never has its name
            shutil.rmtree(_unfinished(path), ignore_errors=True)


def save(path: str | Path, model: nn.Module, optimizer: Optimizer, state: dict) -> None:
    """Write one checkpoint and wait for it. Every rank calls this. Raises CheckpointError."""
    saver = Saver(Path(path).parent, sys.maxsize)
    saver.save(Path(path).name, model, optimizer, state)
    saver.wait()


def tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
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


def _facts(file: Path) -> dict:
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return {"bytes": f.tell(), "sha256": digest}


def manifest(files: dict) -> str:
    """The text of a manifest, which vouches for itself as well."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1)


def versions() -> dict[str, str]:
    """What a run was computed with: the commit of this code, and the libraries that matter."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    out = {"code": "not a git checkout", "python": platform.python_version()}
    with suppress(OSError, subprocess.SubprocessError):
        out["code"] = subprocess.check_output(git, stderr=subprocess.DEVNULL).decode().strip()
    for library in ("torch", "triton", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            out[library] = metadata.version(library)
    return out


# --- finding and verifying -----------------------------------------------------------------------


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


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint of a run that is byte for byte as it was written, or None.

    Every rank calls this and checks its share of the files. A damaged one is named on stderr and
    renamed to NAME.damaged, and the one before it is tried. Raises CheckpointError when all
    checkpoints are damaged, so that a run never restarts by mistake; or when one cannot be read,
    which does not prove damage.
    """
    folder, rank, world = run / "checkpoints", parallel.rank(), parallel.world_size()
    for unfinished in folder.glob(".*.tmp") if rank == 0 else ():
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in reversed(parallel.gather([path for _, path in found(folder)])[0]):
        try:
            parallel.together(verify, path, rank, world, errors=(CheckpointError,))
            return path
        except Damaged as damage:
            if rank == 0:
                aside = path.with_name(f"{path.name}.damaged")
                print(f"checkpoint: {damage}; renamed to {aside.name}", file=sys.stderr)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    if parallel.gather(any(folder.glob("*.damaged")))[0]:
        raise CheckpointError(f"{run}: every checkpoint is damaged; choose another --name")
    return None


def verify(path: str | Path, rank: int = 0, world: int = 1) -> None:
    """Compare a checkpoint with its manifest; of several ranks each reads its share of the files.

    Raises Damaged naming the file that is missing, cut short or changed, and CheckpointError for
    one that cannot be read.
    """
    path = Path(path)
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8", errors="replace")
        try:
            files = json.loads(text)["files"]
        except (ValueError, KeyError, TypeError):
            files = None
        if text != manifest(files):
            raise Damaged(f"{path / 'manifest.json'}: damaged")
        unlisted = {p.name for p in path.glob("[!.]*.safetensors")} - files.keys()
        if unlisted:
            raise Damaged(f"{path / unlisted.pop()}: not in the manifest")
        for name, facts in files.items():
            if (size := (path / name).stat().st_size) != facts["bytes"]:
                sizes = f"{size:,} bytes, {facts['bytes']:,} were written"
                raise Damaged(f"{path / name}: damaged ({sizes})")
        mine = list(files)[rank::world]
        with hf.bytes_bar("checking", sum(files[name]["bytes"] for name in mine)) as bar:
            for name in mine:
                if _facts(path / name) != files[name]:
                    raise Damaged(f"{path / name}: damaged (its SHA-256 is not the one written)")
                bar.update(files[name]["bytes"])
    except FileNotFoundError as error:
        # Rank 0 looks for all files. If another rank does not find one, its disk may be at fault.
        missing = Damaged if rank == 0 else CheckpointError
        raise missing(f"{error.filename}: missing") from None
    except OSError as error:
        raise CheckpointError(in_one_line(error)) from None


# --- loading -------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module, optimizer: Optimizer | None) -> dict:
    """Fill the model, and the optimizer if given, from a checkpoint; return its state.

    Each rank reads the rows that it holds. Raises CheckpointError for a checkpoint that is
    incomplete or of another architecture; `verify` finds changed bytes.
    """
    path = Path(path)
    state = parallel.together(read_state, path, errors=(CheckpointError,))
    hf.check_same_model(path, model.config, state["config"])
    if optimizer is not None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            step = torch.tensor(float(state["step"]), device=p.device)
            moments = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": step, **moments}
    wanted = (path, model.config, optimizer is not None)
    pieces = parallel.together(pieces_of, *wanted, errors=(CheckpointError,))
    _fill(tensors(model, optimizer), pieces)
    return state


def _fill(parts: dict[str, Tensor], pieces: list[Piece]) -> None:
    """Copy the rows that this rank holds into (sharded) tensors."""
    local = {name: parallel.local_rows(tensor) for name, tensor in parts.items()}
    held = {name: (first, first + len(rows)) for name, (rows, first) in local.items()}
    for name, start, values in hf.read(pieces, held):
        rows, first = local[name]
        rows[start - first : start - first + len(values)].copy_(values)


def pieces_of(path: Path, config: LucieConfig, optimizer: bool) -> list[Piece]:
    """Where the rows of all weights are, and of the moments if optimizer, under `tensors`' names.

    Raises CheckpointError if any are missing, or are not of this model.
    """
    pieces: dict[str, list[Piece]] = {}
    for file in sorted(path.glob("[!.]*.safetensors")):
        header, about = hf.header_of(file)
        try:
            places = json.loads(about["DCP_SHARDING_INFO"])
            for key, (dtype, shape) in header.items():
                piece = Piece(file, key, key, places[key]["saved_offsets"][0], shape, DTYPES[dtype])
                pieces.setdefault(key, []).append(piece)
        except (ValueError, KeyError, TypeError, IndexError):
            raise CheckpointError(f"{file}: its header is damaged") from None
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Lucie(config).named_parameters()}
    complete = []
    for kind in ("model", "exp_avg", "exp_avg_sq") if optimizer else ("model",):
        for name, shape in shapes.items():
            covered, key = 0, f"{kind}.{name}"
            for piece in sorted(pieces.get(key, ()), key=lambda piece: piece.first):
                if piece.first == covered and piece.shape[1:] == shape[1:]:
                    complete.append(piece)
                    covered += piece.shape[0]
            if covered != shape[0]:
                raise CheckpointError(f"{path}: damaged or incomplete ({key}, row {covered:,})")
    return complete


def architecture(options: dict) -> LucieConfig:
    """The model that a training config describes; it has seq_len positions.

    Raises ValueError naming the field of an impossible combination.
    """
    names = vars(LucieConfig()).keys() & options.keys()
    values = {name: options[name] for name in names}
    return LucieConfig(**values, max_position_embeddings=options["seq_len"])


def from_run(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Lucie, dict]:
    """(model, config) of a run's newest checkpoint or of a checkpoint, on the CPU."""
    newest, config, pieces, options = _weights_of(path)
    return hf.build(config, pieces, dtype, "cpu", newest), options


def _weights_of(path: str | Path) -> tuple[Path, LucieConfig, list[Piece], dict]:
    newest = latest(path)
    if newest is None:
        hint = "" if Path(path).exists() else f"; a model of the Hugging Face hub is hf:{path}"
        raise CheckpointError(f"{path}: no complete checkpoint there{hint}")
    options = read_state(newest)["config"]
    config = architecture(options)
    pieces = pieces_of(newest, config, optimizer=False)
    pieces = [piece._replace(name=piece.name.removeprefix("model.")) for piece in pieces]
    return newest, config, pieces, options


def open_model(
    source: str, device: str, dtype: torch.dtype | None = None, int4: bool = False
) -> tuple[Lucie, str]:
    """(model for use on one device, the path of its tokenizer for data.tokenizer.load, or "").

    source: a run or checkpoint directory, `hf:FOLDER_OR_NAME[@revision]`, or a folder in the
    Hugging Face layout, ours in 4 bits among them. dtype: None is bfloat16 on a GPU, else float32,
    and what a 4-bit folder was written in. int4: pack the matrices as they arrive. Raises
    CheckpointError, before the first weight is read if there is not enough memory.
    """
    theirs = source.startswith("hf:")
    folder = hf.folder_of(source.removeprefix("hf:")) if theirs else Path(source)
    build = quantize.build if int4 else hf.build
    default = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if not theirs and not hf.is_hf_folder(folder):
        newest, config, pieces, options = _weights_of(folder)
        return build(config, pieces, dtype or default, device, newest), options["tokenizer"]
    if quantize.is_int4(folder):
        model = quantize.load(folder, device)
        if dtype not in (None, model.embed_tokens.weight.dtype):
            raise CheckpointError(f"{source}: 4-bit weights keep the dtype they were written in")
    else:
        config = hf.config_of(folder)
        model = build(config, hf.pieces_of(folder, config), dtype or default, device, folder)
    model.eos_token_ids = hf.eos_token_ids(folder)
    return model, str(folder)


# --- what a run starts from ----------------------------------------------------------------------


def start(config: Config, run: Path, mixture: str, model: Lucie, optimizer: Optimizer) -> dict:
    """Give model and optimizer their first values, as init_from says; returns the state.

    mixture: its fingerprint. Every rank calls this with the same arguments. The same command given
    again resumes a run from its newest undamaged checkpoint, whatever its first weights were.
    """
    expected = (ConfigError, CheckpointError, OSError)
    existing, wanted = newest_sound(run), config.init_from
    if existing:
        parallel.together(_check_resumable, existing, config, run, mixture, errors=expected)
        return load(existing, model, optimizer)
    state = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "gpu_seconds": 0.0}
    parts = {name: p.detach() for name, p in model.named_parameters()}
    if wanted in ("auto", "scratch"):
        bar = {"delay": 3, "leave": False, "disable": parallel.rank() > 0}
        for name, p in tqdm(parts.items(), "initial weights", **bar):
            parallel.fill_rows(p, 0, initial_weight(model.config, name, p.shape, config.seed))
        return state
    if wanted.startswith("hf:"):
        folder = parallel.together(hf.folder_of, wanted.removeprefix("hf:"), errors=expected)
        there = parallel.together(hf.config_of, folder, errors=expected)
        hf.check_same_model(folder, model.config, vars(there))
        _fill(parts, parallel.together(hf.pieces_of, folder, model.config, errors=expected))
        return state | {"trained_before": hf.training_of(folder)}
    source = parallel.gather(latest(wanted))[0] if wanted != "resume" else None
    if source is None:
        where = run if wanted == "resume" else wanted
        hint = f"; use hf:{where}" if hf.is_hf_folder(Path(where)) else ""
        raise ConfigError(f"init_from={wanted}: no complete checkpoint in {where}{hint}")
    ranks = (parallel.rank(), parallel.world_size())
    parallel.together(verify, source, *ranks, errors=(CheckpointError,))
    return state | {"trained_before": hf.trained(load(source, model, None))}


def _check_resumable(existing: Path, config: Config, run: Path, mixture: str) -> None:
    """Raises ConfigError if `config` describes another run than the checkpoint's."""
    state = read_state(existing)
    old, new = asdict(Config()) | state["config"], asdict(config)
    if config.init_from not in {"resume", "auto", old["init_from"]} - {"scratch"}:
        raise ConfigError(f"{run} already holds a run: use --init_from=resume, or another --name")
    differ = [n for n in new if n not in MAY_CHANGE and old[n] != new[n]]
    longer = old["lr_decay"] == "constant" and new["samples"] >= state["samples"]
    if differ == ["samples"] and longer:
        differ = []  # neither its learning rate nor its batches depend on its length
    if differ:
        fields = ", ".join(f"{n} was {old[n]!r} and is now {new[n]!r}" for n in differ)
        raise ConfigError(
            f"{run} was started with other options: {fields}; choose another --name, to train on "
            f"from its weights with --init_from={run}"
        )
    if state.get("mixture") != mixture:
        raise ConfigError(
            f"{run}: the sources, weights or tokens of {config.mixture} have changed since it "
            "began, so its samples would differ; choose another --name"
        )
    config.init_from = old["init_from"]


# --- the command ---------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a run or checkpoint in Hugging Face's layout")
    out.add_argument("run", help="a run, whose newest checkpoint is taken, or a checkpoint")
    out.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    dtypes = ("bfloat16", "float32")
    out.add_argument(
        "--dtype", choices=dtypes, default="bfloat16", help="of the weights; default: bfloat16"
    )
    out.add_argument("--tokenizer", default="", help="its file or folder; default: the run's own")
    look = commands.add_parser("inspect", help="print what a run or checkpoint holds, verify it")
    look.add_argument("run", help="a run, whose newest checkpoint is taken, or a checkpoint")
    args = parser.parse_args(argv)
    newest, config, pieces, options = _weights_of(args.run)
    state = read_state(newest)
    if args.command == "export":
        verify(newest)
        model = hf.build(config, pieces, getattr(torch, args.dtype), "cpu", newest)
        tokenizer = args.tokenizer or options["tokenizer"]
        hf.to_hf(model, args.out, tokenizer=tokenizer, state=state)
        without = "" if tokenizer else ", without a tokenizer: it has none"
        print(f"exported {newest} to {args.out}{without}")
        return
    facts = {name: state[name] for name in ("step", "samples", "tokens")}
    facts |= {f"{name}, all phases": value for name, value in hf.trained(state).items()}
    facts["parameters"] = sum(torch.Size(piece.shape).numel() for piece in pieces)
    facts |= vars(config) | {"tokenizer": options["tokenizer"] or "none"}
    print(newest)
    for name, value in facts.items():
        print(f"    {name:28} {f'{value:,}' if type(value) is int else value}")
    verify(newest)
    print("    verified: no byte has changed")


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError)
