"""Everything there is to learn on a GPU, in one command and under nine minutes.

    python -m bench.gpu [--out DIR] [--minutes 8.75]    what `make gpu` runs
    python -m bench.gpu --toy                           the same script at toy size, on a CPU

Are the kernels right on the chip, how fast is each, how fast is a training step and where does its
time go, how fast is decoding: four commands, one after the other, each with its share of the time
that is left. One that fails or is cut short stops none after it. What they print goes to the screen
and to DIR/NAME.log, their results to DIR/*.json and *.png, the sum of it to DIR/summary.json.

Exit code 1 where anything of ours was wrong, failed, or was not proven right in time.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import step_report
from bench.report import OURS, BenchError
from checkpoint import write_text
from config.cli import ConfigError, Parser, run_cli

ROOT = Path(__file__).parents[1]
GRACE = 15.0  # seconds in which a command that is interrupted can still write what it knows


@dataclass(frozen=True)
class Part:
    """One of the four. command(out, minutes): its arguments for Python; minutes: begin nothing
    more after these. weight: its share of the time, beside those of the parts after it.
    headline(out): its results in a line or more. in_toy: what of it a CPU cannot show.
    """

    name: str
    weight: float
    command: Callable[[Path, float], list[str]]
    toy: Callable[[Path, float], list[str]]
    headline: Callable[[Path], list[str]]
    in_toy: str


# --- what each tells ------------------------------------------------------------------------------


def in_processes() -> list[str]:
    """Four at a time where pytest-xdist is: compiling takes most of the time of these tests."""
    return ["-n", "4"] if importlib.util.find_spec("xdist") else []


def tests_headline(out: Path) -> list[str]:
    text = (out / "tests.log").read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^(?:=+ )?((?:\d+ \w+,? ?)+(?:in .*?s)?\b.*?)(?: =+)?$", text, re.M)
    told = [line for line in found if re.search(r"passed|failed|error|skipped|deselected", line)]
    return told[-1:]


def kernels_headline(out: Path) -> list[str]:
    results = _read(out / "kernels.json")
    rows = results["rows"]
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["failure"] is None:
            case = cases.setdefault((row["op"], row["tokens"], row["mode"]), {})
            case[row["provider"]] = row["ms"]
    both = [case for case in cases.values() if OURS in case and len(case) > 1]
    first = sum(min(case, key=case.get) == OURS for case in both)
    wrong = sorted({r["op"] for r in rows if r["provider"] == OURS and r["failure"]})
    lines = [f"{len(rows)} rows; ours the fastest in {first} of {len(both)} cases"]
    if wrong:
        lines.append(f"ours FAILED in {', '.join(wrong)}")
    if results["stopped"]:
        lines.append(f"stopped {results['stopped']}, {results['not_begun']} rows not begun")
    return lines


def step_headline(out: Path) -> list[str]:
    results = step_report.read(out / "step.json")
    lines = [step_report.verdict_line(verdict) for verdict in step_report.verdicts(results)]
    for profiled in results["profiles"]:
        if not profiled["failure"]:
            worst = profiled["lossiest"]
            lines.append(
                f"{profiled['title']}: most is lost in {worst['group']}, "
                f"{worst['lost_ms']:,.1f} ms, {worst['of_step']:.1%} of the step"
            )
    lines += [f"{name}: {error}" for name, error in results["errors"].items()]
    failures = {
        f"{row['side']}: {row['failure']}"
        for row in results["rows"]
        if row["failure"] and not row["memory"]
    }
    lines += sorted(failures)
    if results["stopped"]:
        lines.append(f"stopped {results['stopped']}; not begun: {', '.join(results['not_begun'])}")
    return lines


def decode_headline(out: Path) -> list[str]:
    lines = []
    for row in _read(out / "decode.json")["rows"]:
        speed = row["failure"] or f"{row['tokens_per_second']:,.1f} tokens/s"
        lines.append(f"{row['side']}, batch {row['batch']}: {speed}")
    return lines


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def toy_kernels(out: Path) -> None:
    """bench.kernels on a CPU: the definitions and eager torch."""
    from dataclasses import replace

    from bench import kernels, report
    from bench.peers import OPS, Suite
    from bench.step_peers import step_timer

    suite = Suite(
        (32,), hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=64, vocab=97,
        copied=2**16, product=64,
    )  # fmt: skip
    ops = {
        name: replace(op, providers={p: op.providers[p] for p in (OURS, "eager")})
        for name, op in OPS.items()
    }
    timer = step_timer(torch.device("cpu"))
    results = kernels.run(ops, suite, out, timer, device="cpu", kernels="auto")
    print(report.table(results))
    report.plot(results, out)
    sys.exit(any(row["provider"] == OURS and row["failure"] for row in results["rows"]))


PARTS = [
    Part(
        "tests",
        0.2,
        lambda out, minutes: ["-m", "pytest", "-q", "-m", "gpu and not slow", *in_processes()],
        lambda out, minutes: ["-m", "pytest", "-q", "-m", "not slow", "tests/kernels/test_swiglu.py"],
        tests_headline,
        "one file of them, in Triton's interpreter; those marked gpu cannot run here",
    ),
    Part(
        "kernels",
        0.17,
        lambda out, minutes: ["-m", "bench.kernels", f"--out={out}", f"--minutes={minutes:.2f}"],
        lambda out, minutes: [
            "-c", f"from pathlib import Path; from bench.gpu import toy_kernels; "
            f"toy_kernels(Path({str(out)!r}))",
        ],
        kernels_headline,
        "the definitions beside eager torch; no Triton kernel can be timed, no memory counted",
    ),
    Part(
        "step",
        0.5,
        lambda out, minutes: ["-m", "bench.step", f"--out={out}", f"--minutes={minutes:.2f}"],
        lambda out, minutes: [
            "-m", "bench.step", "--toy", "--sides", "ours", "transformers", f"--out={out}",
            f"--minutes={minutes:.2f}",
        ],
        step_headline,
        "two sides, the definitions; operations in the place of device kernels, no memory counted",
    ),
    Part(
        "decode",
        0.13,
        lambda out, minutes: [
            "-m", "bench.decode", "--rounds=1", "--new=64", f"--out={out / 'decode.json'}"
        ],
        lambda out, minutes: [
            "-m", "bench.decode", "--layers=2", "--hidden=128", "--vocab=300", "--prompt=7",
            "--new=3", "--rounds=1", "--batch", "1", "--device=cpu", f"--out={out / 'decode.json'}",
        ],
        decode_headline,
        "a tiny model in fp32; no CUDA graph, and transformers not compiled",
    ),
]  # fmt: skip


# --- running --------------------------------------------------------------------------------------


def call(arguments: list[str], log: Path, limit: float, toy: bool) -> tuple[int, bool]:
    """(exit code, whether it was cut short) of Python with these arguments.

    What it prints goes on to the screen and into `log`. After `limit` seconds it is interrupted, as
    if by Ctrl-C, and killed if it does not end.
    """
    environment = {"PYTHONUNBUFFERED": "1"}
    if toy:
        environment["OMP_NUM_THREADS"] = "1"  # tiny tensors gain nothing from a second thread
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,  # so that what it started can be ended with it
    )
    copier = threading.Thread(target=_copy, args=(process, log), daemon=True)
    copier.start()
    cut = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        cut = True
    finally:  # also where Ctrl-C ends this script
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    copier.join(timeout=5)
    return process.returncode, cut


def _copy(process: subprocess.Popen, log: Path) -> None:
    with open(log, "wb") as file:
        while chunk := os.read(process.stdout.fileno(), 2**16):
            file.write(chunk)
            file.flush()
            sys.stdout.write(chunk.decode("utf-8", errors="replace"))
            sys.stdout.flush()


def run(parts: list[Part], out: Path, minutes: float, toy: bool) -> dict:
    """Call every part, and return the summary, which `out` holds after each."""
    begin = time.monotonic()
    summary = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "toy": toy, "parts": {}}
    for name in ("kernels.json", "step.json", "decode.json", "summary.json"):
        (out / name).unlink(missing_ok=True)  # nothing of an earlier run is to be told of
    for number, part in enumerate(parts):
        left = 60 * minutes - (time.monotonic() - begin)
        share = left * part.weight / sum(p.weight for p in parts[number:])
        # What is begun shortly before its time has this much to end in.
        begin_until, limit = max(1.0, 0.75 * share), max(1.0, min(1.1 * share, left) - GRACE)
        print(f"\n=== {part.name}, up to {limit:.0f} s", flush=True)
        started = time.monotonic()
        command = (part.toy if toy else part.command)(out, begin_until / 60)
        code, cut = call(command, out / f"{part.name}.log", limit, toy)
        found = {"exit_code": code, "cut_short": cut, "seconds": time.monotonic() - started}
        try:
            found["headline"] = part.headline(out)
        except (OSError, ValueError, KeyError, BenchError) as error:
            found["headline"] = [f"no results: {error}"]
        if toy:
            found["toy"] = part.in_toy
        summary["parts"][part.name] = found
        summary["seconds"] = time.monotonic() - begin
        write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def table(summary: dict) -> str:
    lines = [f"\n=== summary, {summary['seconds']:.0f} s"]
    for name, part in summary["parts"].items():
        state = "right" if part["exit_code"] == 0 else f"NOT RIGHT, exit code {part['exit_code']}"
        state += ", cut short" if part["cut_short"] else ""
        lines.append(f"{name:8} {part['seconds']:5.0f} s  {state}")
        lines += [f"{'':18}{line}" for line in part["headline"]]
        if "toy" in part:
            lines.append(f"{'':18}toy: {part['toy']}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.75, help="for everything")
    parser.add_argument("--toy", action="store_true", help="at toy size, on a CPU")
    args = parser.parse_args(argv)
    if not (args.toy or torch.cuda.is_available()):
        raise ConfigError("no CUDA GPU here; --toy rehearses on a CPU")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = run(PARTS, out, args.minutes, args.toy)
    print(table(summary))
    return int(any(p["exit_code"] != 0 or p["cut_short"] for p in summary["parts"].values()))


if __name__ == "__main__":
    run_cli(main)
