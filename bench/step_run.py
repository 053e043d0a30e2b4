"""What bench.step measures: rows of sides and settings as they become known, and the step."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from bench import kernels as bench_kernels
from bench import plan, step_peers, step_profile, step_report
from bench.kernels import describe, machine, version
from bench.peers import Suite
from bench.step_groups import Shapes
from bench.step_peers import OURS, Side, make_step, memory, seconds, step_timer
from checkpoint import write_text
from config import Config
from model import Lucie

SIZES = (1, 2, 4)  # micro-batches tried
TOY_SUITE = Suite((), copied=2**22, product=256)
ENOUGH = 6.0  # seconds after which no other step is timed


class GPULost(Exception):
    """After an illegal access nothing can run any more."""


class Bench:
    """What all rows share, and the rows as they become known, in OUT/step.json."""

    def __init__(
        self,
        phases: list[Config],
        sides: dict[str, Side],
        device: torch.device,
        out: Path,
        room: float,
        minutes: float,
        most: int = 5,
    ) -> None:
        """room: bytes of memory; most: steps timed in a row."""
        self.phases, self.sides, self.device, self.out, self.room = phases, sides, device, out, room
        self.deadline = time.monotonic() + 60 * minutes
        self.minutes, self.most = minutes, most
        self.broken: set[str] = set()  # sides that cannot run
        self.results = machine(device.type) | {
            "transformers": version("transformers"),
            "peak_flops": parallel.peak_flops(device),
            "room": room,
            "ceilings": {},
            "checks": {},
            "rows": [],
            "profiles": [],
            "errors": {},
            "stopped": None,
            "not_begun": [],
        }

    def run(self) -> dict:
        """Measure everything, what matters most first. Ctrl-C stops it; what is known is kept."""
        tasks = self.tasks()
        left = list(tasks)
        try:
            step_peers.start(self.device)
            timer, suite = step_timer(self.device), Suite(())
            suite = suite if self.device.type == "cuda" else TOY_SUITE
            self.results["ceilings"] = bench_kernels.ceilings(suite, self.device.type, timer)
            self.clear()
            for name in (bar := tqdm(tasks)):
                if self.late():
                    break
                bar.set_description(name)
                try:
                    tasks[name]()
                except GPULost:
                    raise
                except Exception as error:  # in the measuring itself: the others go on
                    self.results["errors"][name] = describe(error)
                    self.clear()
                left.remove(name)
        except KeyboardInterrupt:
            self.results["stopped"] = "by hand"
        except GPULost as error:  # what followed would be no verdict on anybody
            self.results["stopped"] = f"with the GPU: {error}"
        except Exception as error:  # no processes, no ceilings
            self.results["stopped"] = f"at the start: {describe(error)}"
        self.results["not_begun"] = left
        self.write()
        return self.results

    def tasks(self) -> dict[str, Callable[[], object]]:
        """Everything by name, in the order of what it is worth."""
        tasks: dict[str, Callable[[], object]] = {}
        for config in self.phases:
            tasks[f"{OURS} at {config.seq_len:,}"] = partial(self.ours, config, profiled=True)
        for config in self.phases:
            for size in SIZES[1:]:
                if size <= config.global_batch_size:
                    name = f"{OURS} at {config.seq_len:,}, micro-batches of {size}"
                    tasks[name] = partial(self.ours, replace(config, micro_batch_size=size))
        peers = [name for name in self.sides if name != OURS]
        compiled = [name for name in peers if "compiled" in name]  # those take their time
        eager = [name for name in peers if name not in compiled]
        for name in eager:
            for config in self.phases:
                tasks[f"{name} at {config.seq_len:,}"] = partial(self.best, name, config)
        for config in self.phases:
            task = partial(self.fewer_layers, config, [OURS, *eager])
            tasks[f"fewer layers at {config.seq_len:,}"] = task
        for name in compiled:
            for config in self.phases:
                tasks[f"{name} at {config.seq_len:,}"] = partial(self.best, name, config)
        for config in self.phases:
            where = f"{OURS} at {config.seq_len:,}"
            if config.global_batch_size > 1:
                tasks[f"{where}, gathering each time"] = partial(self.gathering_each, config)
            else:  # accumulating takes its memory, too
                more = replace(config, global_batch_size=2)
                tasks[f"{where}, accumulating"] = partial(self.ours, more)
        for config in self.phases if compiled else ():
            task = partial(self.fewer_layers, config, list(self.sides))
            tasks[f"fewer layers at {config.seq_len:,}, compiled too"] = task
        return tasks

    def late(self) -> bool:
        """Whether nothing more is to be begun, which the results then say."""
        if time.monotonic() < self.deadline:
            return False
        self.results["stopped"] = f"after {self.minutes:g} minutes"
        return True

    def write(self) -> None:
        write_text(self.out / "step.json", json.dumps(self.results, indent=1) + "\n")

    # --- rows ------------------------------------------------------------------------------------

    def ours(self, config: Config, profiled: bool = False) -> None:
        """A row in the fastest setting that fits, with fewer layers if none does."""
        needed = min(self.planned(choice) for choice in settings(config))
        if needed > self.room:
            self.add(OURS, config, {"failure": too_large(needed, self.room), "memory": True})
            config = replace(config, num_hidden_layers=self.layers_planned(config))
        for choice in settings(config) if config.num_hidden_layers else ():
            if self.planned(choice) <= self.room:
                if not self.measure(OURS, choice, profiled)["memory"]:
                    break

    def gathering_each(self, config: Config) -> None:
        """What it is worth to gather weights once a step: a row of ours that does not."""
        once = [row for row in self.rows_of(OURS, config) if not row["failure"]]
        if once and not once[0]["gather_each_micro_batch"]:
            mode = once[0]["activation_checkpointing"]
            self.measure(OURS, replace(config, activation_checkpointing=mode))

    def best(self, name: str, config: Config) -> None:
        """Rows of a peer in every setting that may be its best."""
        if name in self.broken:
            return
        before = len(self.results["rows"])
        sizes = [size for size in SIZES if size <= config.global_batch_size]
        for size in sizes:
            if not self.fits(name, replace(config, micro_batch_size=size), "none"):
                break
        for size in reversed(sizes):
            if self.fits(name, replace(config, micro_batch_size=size), "full"):
                break
        if len(self.results["rows"]) == before and not self.late():
            needed = min(self.planned(choice) for choice in settings(config))
            failure = too_large(needed, self.room, "at least ")
            self.add(name, config, {"failure": failure, "memory": True})

    def fits(self, name: str, config: Config, mode: str) -> bool:
        """Whether a peer has a row in this mode, with weights gathered once a step, or else each
        time. What cannot fit is not tried: nobody keeps less than we do."""
        less = "selective" if mode == "none" else mode  # some make norms and gates again
        for gather_each in (False, True):
            choice = replace(config, gather_each_micro_batch=gather_each)
            choice = replace(choice, activation_checkpointing=less)
            if self.planned(choice) > self.room or name in self.broken or self.late():
                continue
            row = self.measure(name, replace(choice, activation_checkpointing=mode))
            if row["failure"] is None:
                return True
            if not row["memory"]:
                self.broken.add(name)
        return False

    def fewer_layers(self, config: Config, names: list[str]) -> None:
        """These once more, with as many layers as fit those of them that did not fit with all."""
        failing = [name for name in names if name in self.sides]
        failing = [name for name in failing if self.too_large_for(name, config)]
        layers = [self.layers_of(name, config) for name in failing]
        if not layers or not min(layers):
            return
        fewer = replace(config, num_hidden_layers=min(layers))
        for name in names:
            if any(row["failure"] is None for row in self.rows_of(name, fewer)):
                continue
            if name == OURS:
                self.ours(fewer)
            else:
                self.best(name, fewer)

    def too_large_for(self, name: str, config: Config) -> bool:
        rows = self.rows_of(name, config)
        return any(row["memory"] for row in rows) and all(row["failure"] for row in rows)

    def layers_of(self, name: str, config: Config) -> int:
        """The largest number of layers of a side that fits: ours as planned, a peer's from the
        peaks of two small models, each a row."""
        if name == OURS:
            return self.layers_planned(config)
        few = max(1, config.num_hidden_layers // 16)
        peaks = {}
        for layers in (few, 2 * few):
            if self.late():
                break
            choice = replace(
                config,
                num_hidden_layers=layers,
                micro_batch_size=1,
                activation_checkpointing="full",
            )
            row = self.measure(name, choice)
            if not row["failure"] and row["allocated"]:
                peaks[layers] = row["allocated"]
        return layers_that_fit(peaks, self.room, config.num_hidden_layers - 1)

    def rows_of(self, name: str, config: Config) -> list[dict]:
        """Those of a side at the same length and number of layers."""
        wanted = (name, config.seq_len, config.num_hidden_layers)
        rows = self.results["rows"]
        return [row for row in rows if (row["side"], row["seq_len"], row["layers"]) == wanted]

    def measure(self, name: str, config: Config, profiled: bool = False) -> dict:
        """A row: the step timed, or why it cannot be."""
        if name not in self.results["checks"]:
            self.results["checks"][name] = self.check(name)
        if wrong := self.results["checks"][name]["failure"]:
            return self.add(name, config, {"failure": wrong})
        try:
            row = self.timed(name, config, profiled)
        except Exception as error:  # a peer that cannot is a result too; ours shows in the exit
            row = {"failure": describe(error), "memory": of_memory(error)}
        if row["failure"]:
            row = self.add(name, config, row)
        self.clear()
        return row

    def check(self, name: str) -> dict:
        try:
            found = step_peers.compare(self.sides[name], self.device)
        except Exception as error:
            found = {"failure": describe(error)}
        self.clear()
        return found

    def timed(self, name: str, config: Config, profiled: bool) -> dict:
        with self.sides[name](config, self.device) as (model, loss):
            step_peers.fill(model, self.device, config.initializer_range)
            step = make_step(model, loss, config, self.device)
            seconds(step, self.device)  # compiles, and makes the moments
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = []
            while len(times) < self.most and sum(times) < ENOUGH:
                times.append(seconds(step, self.device))
            row = self.add(name, config, {"seconds": times, **memory(self.device)})
            if profiled:
                try:
                    self.profile(config, step, statistics.median(times))
                except Exception as error:  # the row stands
                    failed = {"seq_len": config.seq_len, "failure": describe(error)}
                    self.results["profiles"].append(failed)
        return row

    def profile(self, config: Config, step: Callable[[], None], usual: float) -> None:
        """The time table of one more step. usual: seconds of a step that is not recorded."""
        shapes = Shapes.of(config, step_peers.architecture(config))
        events = self.out / f"step_{config.seq_len}.trace.json.gz"
        wall = step_profile.record(step, self.device, events)
        parameters = plan.Job(config, 1).parameters
        recorded = step_profile.read(events)
        if self.device.type == "cuda" and not any(e.get("cat") == "kernel" for e in recorded):
            raise RuntimeError("no kernel was recorded: is CUPTI available here?")
        found = step_profile.analyse(recorded, shapes, self.results["ceilings"], parameters, wall)
        title = (
            f"a step of {shapes.micro_batches} x {config.micro_batch_size} x {config.seq_len:,} "
            f"tokens, {config.num_hidden_layers} layers, recomputed "
            f"{config.activation_checkpointing}; {wall / usual - 1:+.1%} by being recorded"
        )
        self.results["profiles"].append(
            {"title": title, "seq_len": config.seq_len, "failure": None, "events": events.name}
            | {"shapes": asdict(shapes), "parameters": parameters, "usual_ms": 1e3 * usual}
            | found
        )
        self.write()

    def add(self, name: str, config: Config, row: dict) -> dict:
        """Complete a row with its setting and its speed, and write it."""
        row = {
            "side": name,
            "seq_len": config.seq_len,
            "layers": config.num_hidden_layers,
            "micro_batch_size": config.micro_batch_size,
            "micro_batches": -(-config.global_batch_size // config.micro_batch_size),
            "activation_checkpointing": config.activation_checkpointing,
            "gather_each_micro_batch": config.gather_each_micro_batch,
            "planned": self.planned(config) if name == OURS else None,
            **dict.fromkeys(("seconds", "allocated", "reserved", "tokens_per_second")),
            **dict.fromkeys(("mfu_causal", "mfu_full", "failure")),
            "memory": False,  # whether it was memory that failed
            **row,
        }
        if row["failure"] is None:
            tokens = config.global_batch_size * config.seq_len
            row["tokens_per_second"] = tokens / statistics.median(row["seconds"])
            if peak := self.results["peak_flops"]:
                causal, full = flops_per_token(config)
                row["mfu_causal"] = row["tokens_per_second"] * causal / peak
                row["mfu_full"] = row["tokens_per_second"] * full / peak
        self.results["rows"].append(row)
        self.write()
        tqdm.write(step_report.line(row))
        return row

    # --- memory ----------------------------------------------------------------------------------

    def planned(self, config: Config) -> float:
        """Bytes at the peak of our step."""
        return sum(plan.peak(plan.Job(config, 1))[1].values())

    def layers_planned(self, config: Config) -> int:
        """The largest number of layers that the plan finds room for, recomputing as asked."""
        fewer = range(config.num_hidden_layers - 1, 0, -1)
        fits = (n for n in fewer if self.planned(replace(config, num_hidden_layers=n)) <= self.room)
        return next(fits, 0)

    def clear(self) -> None:
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda" and (lost := bench_kernels.gpu_lost()):
            raise GPULost(lost)


def settings(config: Config) -> Iterator[Config]:
    """Settings of our step that compute the same, the fastest first, the smallest last."""
    for mode in parallel.ACTIVATION_CHECKPOINTING:
        for gather_each in (False, True):
            yield replace(
                config, activation_checkpointing=mode, gather_each_micro_batch=gather_each
            )


def layers_that_fit(peaks: dict[int, float], room: float, most: int) -> int:
    """The largest number of layers for which the line through two peaks (bytes, by number of
    layers) stays within room; 0 where there are no two peaks, or not one layer fits."""
    if len(peaks) < 2:
        return 0
    (a, low), (b, high) = min(peaks.items()), max(peaks.items())
    each = (high - low) / (b - a)
    return max(0, min(most, int(a + (room - low) / each))) if each > 0 else most


def of_memory(error: Exception) -> bool:
    """Whether it was memory that failed; libraries have their own ways to say so."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        "out of memory" in text or "alloc_failed" in text
    )


def too_large(needed: float, room: float, least: str = "") -> str:
    return f"does not fit: needs {least}{needed / 1e9:.1f} GB, there are {room / 1e9:.1f} GB"


def flops_per_token(config: Config) -> tuple[int, int]:
    """(causal, full): attention's products by halves, or whole."""
    with torch.device("meta"):
        model = Lucie(step_peers.architecture(config))
    causal = model.flops_per_token(config.seq_len)
    attention = 6 * config.num_hidden_layers * config.hidden_size * config.seq_len
    return causal, causal + attention
