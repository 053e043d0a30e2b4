"""Checkpoints: written whole or not at all, in the background, read back on any number of ranks.

    out/NAME/checkpoints/step0005000/
        shard-00001.safetensors ...   of each rank: model.NAME, exp_avg.NAME, exp_avg_sq.NAME
        state.json                    step, samples and tokens consumed, seconds, config, versions
        manifest.json                 the size and SHA-256 of every file above

A directory with its final name was written whole, and whatever happens to it later is found by its
manifest. A checkpoint of 512 ranks loads on one: Torch's Distributed Checkpoint decides which rank
reads what. No format here can hold code, and none is unpickled: a foreign checkpoint cannot run
anything.

    python -m checkpoint export out/main --to DIR --dtype=bf16     what transformers and vLLM read
    python -m checkpoint import FOLDER_OR_NAME[@revision] --to out/lucie
    python -m checkpoint inspect out/main --verify

How checkpoints are written is in saver.py, how they are found and verified in manifest.py; the
Hugging Face layout is read in hf_layout.py and written in hf_export.py, which tells what an
exported folder holds. One that was exported with --optimizer is imported as a run that goes on bit
for bit; any other as a run of one checkpoint that holds weights only, in the dtype they had, for
--init_from=PATH.
"""

import argparse
import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from tqdm import tqdm

import hf_layout
import tensor_files
from data import tokenizer as tokenizers
from hf_export import KINDS, Read, to_hf, trained, write_folder
from hf_layout import from_hf
from manifest import Damaged, found, latest, manifest, newest_sound, read_state, verify
from model import Lucie, LucieConfig
from parallel import together
from saver import Saver, first_reason, save, tensors, write_text
from schedule import revision_name
from tensor_files import DTYPES, CheckpointError, Entries, Entry

__all__ = [  # some are those of the files that this one imports
    "CheckpointError", "Damaged", "Saver", "architecture", "from_hf", "from_run", "latest", "load",
    "newest_sound", "read", "read_state", "save", "to_hf", "trained", "verify",
]  # fmt: skip

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake

WEIGHTS_ONLY = "{0}: weights without optimizer states, not to be resumed; --init_from={0}"


# --- reading -------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    """Fill the model, and the optimizer if given, from a checkpoint; return its state.

    Each rank reads what is its own. Raises CheckpointError if it is incomplete, damaged or of
    another architecture; what has the right shape but other bytes, `verify` finds.
    """
    path = Path(path)
    state = together(read_state, path, errors=(CheckpointError,))
    hf_layout.same_model(path, model.config, state["config"])
    if optimizer is not None:
        if state.get("weights_only"):
            raise CheckpointError(WEIGHTS_ONLY.format(path))
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.tensor(float(state["step"]), device=p.device)
                moments = {n: torch.zeros_like(p.detach()) for n in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
    try:
        dcp.load(
            tensors(model, optimizer),
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            no_dist=not dist.is_initialized(),
        )
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{path}: damaged or incomplete ({first_reason(error)})") from None
    return state


def architecture(options: dict) -> LucieConfig:
    """The model that a training config describes; it has seq_len positions.

    Raises ValueError naming the field of an impossible combination.
    """
    names = vars(LucieConfig()).keys() & options.keys()
    values = {name: options[name] for name in names}
    return LucieConfig(**values, max_position_embeddings=options["seq_len"])


def from_run(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Lucie, dict]:
    """(model, config) of a run's newest checkpoint or of a checkpoint, on the CPU."""
    newest = _newest(path)
    options = read_state(newest)["config"]
    config = architecture(options)
    return hf_layout.build(config, read(newest, config), dtype, "cpu", str(newest)), options


def _newest(path: str | Path) -> Path:
    newest = latest(path)
    if newest is None:
        raise CheckpointError(f"{path}: no complete checkpoint there")
    return newest


def read(path: str | Path, config: LucieConfig) -> Iterator[tuple[str, int, Tensor]]:
    """The weights of a checkpoint as `hf_layout.read` gives them, for `hf_layout.fill`."""
    entries, rows = {}, {}
    for name, pieces in _pieces(Path(path), config, ["model"]).items():
        for first, entry in pieces:
            entries[f"{name} {first}"] = entry
            rows[f"{name} {first}"] = (name.removeprefix("model."), first, first + entry.shape[0])
    return hf_layout.stream(entries, rows, Path(path).name)


def _pieces(
    path: Path, config: LucieConfig, kinds: list[str]
) -> dict[str, list[tuple[int, Entry]]]:
    """{KIND.NAME: [(first row, where the rows from there on lie), ...]}, all rows of every tensor.

    Raises CheckpointError if some are missing, or are not of this model.
    """
    pieces: dict[str, list[tuple[int, Entry]]] = {}
    for file in sorted(path.glob("shard-*.safetensors")):
        entries, metadata = tensor_files.read_header(file)
        try:
            places = json.loads(metadata["DCP_SHARDING_INFO"])
            for name, entry in entries.items():
                pieces.setdefault(name, []).append((places[name]["saved_offsets"][0], entry))
        except (ValueError, KeyError, TypeError, IndexError):
            raise CheckpointError(f"{file}: its header is damaged") from None
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Lucie(config).named_parameters()}
    complete = {}
    for name, shape in ((f"{kind}.{n}", s) for kind in kinds for n, s in shapes.items()):
        complete[name], covered = sorted(pieces.get(name, [])), 0
        for first, entry in complete[name]:
            if first != covered or entry.shape[1:] != shape[1:] or entry.dtype not in DTYPES:
                break
            covered += entry.shape[0]
        if covered != shape[0]:
            raise CheckpointError(f"{path}: damaged or incomplete ({name}, row {covered:,})")
    return complete


# --- to other layouts and back -------------------------------------------------------------------


def export(
    run: str | Path,
    to: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: bool = False,
    tokenizer: str = "",
) -> None:
    """Write a checkpoint in the Hugging Face layout, without ever building the model.

    run: a checkpoint, or a run, whose newest is taken. tokenizer: instead of the run's own.
    Raises CheckpointError and TokenizerError; a damaged checkpoint is not exported.
    """
    path = _newest(run)
    state = read_state(path)
    if optimizer and state.get("weights_only"):
        raise CheckpointError(f"{path}: has no optimizer states; without --optimizer")
    config = architecture(state["config"])
    pieces = _pieces(path, config, list(KINDS.values()) if optimizer else ["model"])
    verify(path)

    def read_rows(name: str, start: int, end: int) -> Tensor:
        tensor = None
        for first, entry in pieces[name]:
            a, b = max(start, first), min(end, first + entry.shape[0])
            if a < b:
                if tensor is None:
                    shape = (end - start, *entry.shape[1:])
                    tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
                tensor_files.read_tensor(entry, tensor[a - start : b - start], a - first)
        return tensor

    rows: Read = read_rows
    tokenizer = tokenizer or state["config"].get("tokenizer", "")
    write_folder(config, rows, to, dtype, state, tokenizer, optimizer)
    print(f"{path} is in {to}" + ("" if tokenizer else ", without a tokenizer: the run names none"))


def import_folder(source: str, to: str | Path, tokenizer: str = "") -> None:
    """Make a run directory of a Hugging Face folder or NAME[@revision], a tensor at a time.

    tokenizer: a path for data.tokenizer.load; else the folder's own is copied into the run.
    Raises CheckpointError and TokenizerError, before anything is written if the folder is not
    whole, there is no room, or something is at `to`.
    """
    run, folder = Path(to), hf_layout.folder_of(source, optimizer=True)
    config = hf_layout.config_of(folder)
    state, entries = _state_of(folder, config, f"hf:{source}")
    options, copied = state["config"], None
    options |= {"name": run.name, "out_dir": str(run.parent)}
    if tokenizer:
        _check_vocabulary(tokenizer, config)
        options["tokenizer"] = tokenizer
    elif state.get("weights_only") and (folder / "tokenizer.json").is_file():
        copied = _check_vocabulary(str(folder), config)
        options["tokenizer"] = str(run / "tokenizer")

    parts: dict[str, list[Entry]] = {}  # ours are theirs, one below the other
    for name, entry in entries.items():
        parts.setdefault(name.rpartition(" ")[0], []).append(entry)
    written: Entries = {}
    for name, of in parts.items():
        dtypes = {DTYPES[entry.dtype] for entry in of}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        written[name] = (dtype, (sum(entry.shape[0] for entry in of), *of[0].shape[1:]))
    name = revision_name(state["step"], options.get("checkpoint_prefix", ""))
    total = tensor_files.size_of(written)
    bar = tqdm(desc=f"writing {name}", total=total, unit="B", unit_scale=True, delay=2, leave=False)
    with bar, tensor_files.new_folder(run, total) as unfinished:
        path, files = unfinished / "checkpoints" / name, {}
        path.mkdir(parents=True)
        for number, part in enumerate(tensor_files.shards(written), start=1):
            file, digest = f"shard-{number:05d}.safetensors", hashlib.sha256()
            places = {n: {"saved_offsets": [0] * len(shape)} for n, (_, shape) in part.items()}
            metadata = {"DCP_SHARDING_INFO": json.dumps(places)}
            content = (tensor_files.read_tensor(entry) for n in part for entry in parts[n])
            size = tensor_files.write(path / file, part, content, metadata, digest, bar)
            files[file] = {"bytes": size, "sha256": digest.hexdigest()}
        files["state.json"] = write_text(path / "state.json", json.dumps(state, indent=1))
        write_text(path / "manifest.json", manifest(files))
        if copied:
            tokenizers.save_folder(copied, unfinished / "tokenizer")
    what = "weights only, for --init_from" if state.get("weights_only") else "resumes as it was"
    print(f"{source} is in {run / 'checkpoints' / name} ({what})")


def _state_of(folder: Path, config: LucieConfig, source: str) -> tuple[dict, dict[str, Entry]]:
    """(state.json of the checkpoint to be, {"KIND.NAME FIRST_ROW": where those rows lie})."""
    if (folder / "optimizer").is_dir():
        state = read_state(folder / "optimizer", "training_state.json")
        hf_layout.same_model(folder, config, state["config"])
        kinds = {f"{there}.": here for there, here in KINDS.items()}
        shapes = hf_layout.shapes_of(config)
        wanted = {prefix + name: shape for prefix in kinds for name, shape in shapes.items()}
        entries = hf_layout.check(folder / "optimizer", wanted)
    else:
        kinds, entries = {"": "model"}, hf_layout.entries_of(folder, config)
        told, options = hf_layout.training_of(folder), dict(vars(config))
        options["seq_len"] = options.pop("max_position_embeddings")
        state = {
            "step": told.get("training_steps", 0),
            "tokens": told.get("training_tokens", 0),
            "config": options | {"init_from": source, "tokenizer": ""},
            "weights_only": True,
        }
    rows = hf_layout.rows_of(config).items()
    ours = {
        f"{kind}.{name} {first}": entries[prefix + theirs]
        for prefix, kind in kinds.items()
        for theirs, (name, first, _) in rows
    }
    return state | {"milestone": True}, ours


def _check_vocabulary(path: str, config: LucieConfig) -> tokenizers.Tokenizer:
    known = tokenizers.load(path)
    if known.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path} has {known.vocab_size:,} tokens, the model {config.vocab_size:,}: "
            "--tokenizer=PATH of its own"
        )
    return known


def inspect(path: str | Path, check_bytes: bool = False) -> None:
    """Print what a run, a checkpoint or a Hugging Face folder holds. Reads headers only, and with
    check_bytes every byte of a checkpoint of ours, to compare it with the manifest."""
    path, milestones = Path(path), []
    if newest := latest(path):
        state = read_state(newest)
        config, told, files = architecture(state["config"]), trained(state), newest.glob("*.saf*")
        lines = {"checkpoint": newest, "phase": state["config"].get("name", "")}
        lines |= {n: f"{state[n]:,}" for n in ("step", "samples", "tokens") if n in state}
        tokenizer = state["config"].get("tokenizer", "")
        for _, other in [] if path == newest else found(path / "checkpoints"):
            milestones += [other.name] if read_state(other).get("milestone") else []
    else:
        config, told, files = hf_layout.config_of(path), hf_layout.training_of(path), None
        lines, tokenizer = {"Hugging Face folder": path}, ""
        files = hf_layout.files_of(path) + sorted(path.glob("optimizer/*.safetensors"))
        if (path / "tokenizer.json").is_file():
            tokenizer = str(path)
    with torch.device("meta"):
        lines["parameters"] = f"{Lucie(config).num_params():,}"
    lines |= {f"{n.replace('_', ' ')}, all phases": f"{v:,}" for n, v in told.items()}
    kinds, shards, nbytes = Counter(), 0, 0
    for file in sorted(files):
        entries, _ = tensor_files.read_header(file)
        kinds.update(entry.dtype for entry in entries.values())
        shards, nbytes = shards + 1, nbytes + file.stat().st_size
    lines["tensors"] = ", ".join(f"{count} {dtype}" for dtype, count in kinds.items())
    lines |= {"shards": shards, "bytes": f"{nbytes:,}"}
    lines |= vars(config) | {"tokenizer": tokenizer or "none"}
    if milestones:
        lines["milestones"] = ", ".join(milestones)
    if check_bytes:
        if newest is None:
            raise CheckpointError(f"{path}: has no manifest; sizes and headers are those expected")
        verify(newest)
        lines["manifest"] = "every byte is as it was written"
    for name, value in lines.items():
        print(f"{name:28} {value}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a run or checkpoint, to Hugging Face's layout")
    out.add_argument("run")
    out.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="bf16")
    out.add_argument("--optimizer", action="store_true", help="the training state as well")
    into = commands.add_parser("import", help="a Hugging Face folder or NAME[@revision], to a run")
    into.add_argument("source")
    for command in (out, into):
        command.add_argument("--to", required=True, metavar="DIR")
        command.add_argument("--tokenizer", default="", help="its file or folder, if not the own")
    look = commands.add_parser("inspect", help="what a run, checkpoint or folder holds")
    look.add_argument("path")
    look.add_argument("--verify", action="store_true", help="compare every byte with the manifest")
    args = parser.parse_args(argv)
    if args.command == "export":
        dtype = {"bf16": "BF16", "fp32": "F32", "fp16": "F16"}[args.dtype]
        export(args.run, args.to, DTYPES[dtype], args.optimizer, args.tokenizer)
    elif args.command == "import":
        import_folder(args.source, args.to, args.tokenizer)
    else:
        inspect(args.path, args.verify)


def command_line(argv: list[str]) -> None:
    """main, with bad input as one line and exit code 2."""
    try:
        main(argv)
    except (CheckpointError, tokenizers.TokenizerError, ValueError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    command_line(sys.argv[1:])
