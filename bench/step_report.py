"""Results of bench.step as lines, as a table on the screen, and as pictures."""

import json
from pathlib import Path

from bench import step_profile
from bench.report import BenchError
from bench.step_peers import OURS

HEAD = (
    f"{'':22}{'tokens':>7}{'layers':>7}{'batches':>8}  {'recomputed':11}{'gathered':9}"
    f"{'tokens/s':>9}{'MFU':>7}{'full':>7}{'GB':>7}{'taken':>7}{'planned':>8}"
)
COLOURS = {
    OURS: "tab:red",
    "ours compiled": "tab:orange",
    "transformers": "tab:gray",
    "transformers compiled": "tab:blue",
    "liger": "tab:green",
}


def line(row: dict) -> str:
    """A row: MFU causal and full; GB allocated, taken from the driver, and planned."""
    batches = f"{row['micro_batches']} x {row['micro_batch_size']}"
    gathered = "each" if row["gather_each_micro_batch"] else "once"
    start = (
        f"{row['side']:22}{row['seq_len']:7,}{row['layers']:7}{batches:>8}  "
        f"{row['activation_checkpointing']:11}{gathered:9}"
    )
    if row["failure"]:
        return start + " " + row["failure"]
    mfu = (row["mfu_causal"], row["mfu_full"])
    gigabytes = (row["allocated"], row["reserved"], row["planned"])
    shown = ["" if part is None else f"{part:.1%}" for part in mfu]
    sizes = ["" if size is None else f"{size / 1e9:.1f}" for size in gigabytes]
    return (
        f"{start}{row['tokens_per_second']:9,.0f}{shown[0]:>7}{shown[1]:>7}"
        f"{sizes[0]:>7}{sizes[1]:>7}{sizes[2]:>8}"
    )


def best(results: dict) -> dict[tuple[int, int, int], dict[str, dict]]:
    """By (tokens of a sample, layers, samples of a step), the fastest row of each side."""
    found: dict[tuple[int, int, int], dict[str, dict]] = {}
    rows = [row for row in results["rows"] if row["failure"] is None]
    for row in sorted(rows, key=lambda row: (row["seq_len"], -row["layers"])):
        samples = row["micro_batches"] * row["micro_batch_size"]
        sides = found.setdefault((row["seq_len"], row["layers"], samples), {})
        fastest = sides.get(row["side"], row)
        if row["tokens_per_second"] >= fastest["tokens_per_second"]:
            sides[row["side"]] = row
    return found


def verdicts(results: dict) -> list[dict]:
    """Of each size of a step: ours, and its ratio to the fastest peer (over 1: ours is faster),
    None where no peer ran."""
    found = []
    for (length, layers, samples), sides in best(results).items():
        if OURS not in sides:
            continue
        peers = {n: r["tokens_per_second"] for n, r in sides.items() if n != OURS}
        fastest = max(peers, key=peers.get, default=None)
        mine = sides[OURS]
        speed = mine["tokens_per_second"]
        verdict = {"seq_len": length, "layers": layers, "samples": samples}
        verdict |= {"tokens_per_second": speed}
        verdict |= {"mfu_causal": mine["mfu_causal"], "mfu_full": mine["mfu_full"]}
        verdict |= {"peer": fastest, "ratio": speed / peers[fastest] if fastest else None}
        found.append(verdict)
    return found


def verdict_line(verdict: dict) -> str:
    text = f"{verdict['samples']} x {verdict['seq_len']:,} tokens, {verdict['layers']} layers: "
    text += f"{verdict['tokens_per_second']:,.0f} tokens/s"
    if verdict["mfu_causal"] is not None:
        text += f", MFU {verdict['mfu_causal']:.1%} causal, {verdict['mfu_full']:.1%} full"
    if verdict["peer"] is None:
        return f"{text}; no peer ran"
    return f"{text}; {verdict['ratio']:.2f} x {verdict['peer']}, the fastest peer"


def where(results: dict) -> str:
    return "a CPU" if results["gpu"] == "none" else results["gpu"]


def table(results: dict) -> str:
    ceilings = ", ".join(f"{speed:,.0f} {unit}" for unit, speed in results["ceilings"].items())
    lines = [
        f"{where(results)}, torch {results['torch']}, triton {results['triton']}, transformers "
        f"{results['transformers']}, Liger {results['liger-kernel'] or 'absent'}, "
        f"{results['date']}",
        f"a large copy and product: {ceilings}; room for {results['room'] / 1e9:.1f} GB",
        "",
        HEAD,
        *map(line, results["rows"]),
        "",
    ]
    for name, check in results["checks"].items():
        told = check["failure"] or (
            f"loss {check['loss']:.4f} for {check['expected_loss']:.4f}, gradient norm "
            f"{check['grad_norm']:.3f} for {check['expected_grad_norm']:.3f}"
        )
        lines.append(f"{name}, against our definitions in fp32: {told}")
    for profiled in results["profiles"]:
        if profiled["failure"]:
            lines += ["", f"no time table at {profiled['seq_len']:,}: {profiled['failure']}"]
        else:
            lines += ["", step_profile.table(profiled, profiled["title"])]
    lines += ["", *map(verdict_line, verdicts(results))]
    lines += [f"{task}: {error}" for task, error in results["errors"].items()]
    if results["stopped"]:
        lines.append(f"stopped {results['stopped']}; not begun: {', '.join(results['not_begun'])}")
    return "\n".join(lines)


def show(results: dict, out: Path) -> None:
    print(table(results))
    try:
        print(*plot(results, out), sep="\n")
    except ImportError:
        print(f"pictures need: pip install matplotlib; then --replot {out}/step.json")


def read(path: Path) -> dict:
    """The results in a step.json."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["rows"], results["profiles"], results["checks"]  # all of these
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise BenchError(f"{path}: not a step.json") from None
    return results


# --- pictures -------------------------------------------------------------------------------------


def plot(results: dict, out: Path) -> list[Path]:
    """step.png, the sides' speeds, and step_LENGTH.png, the time table of ours.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    pictures = [_speeds(results, out / "step.png")] if best(results) else []
    for profiled in results["profiles"]:
        if not profiled["failure"]:
            pictures.append(_times(profiled, results, out / f"step_{profiled['seq_len']}.png"))
    return pictures


def _speeds(results: dict, path: Path) -> Path:
    """A panel for each size of a step: tokens/s below, MFU above."""
    import matplotlib.pyplot as plt

    panels = best(results)
    if any(len(sides) > 1 for sides in panels.values()):
        panels = {step: sides for step, sides in panels.items() if len(sides) > 1}
    size = (4.6 * len(panels), 1.9 + 0.42 * max(map(len, panels.values())))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for panel, ((length, layers, samples), sides) in zip(axes[0], panels.items()):
        rows = sorted(sides.values(), key=lambda row: row["tokens_per_second"])
        speeds = [row["tokens_per_second"] for row in rows]
        bars = panel.barh(
            [row["side"] for row in rows], speeds, color=[COLOURS[row["side"]] for row in rows]
        )
        labels = [
            f" {row['tokens_per_second']:,.0f}  ({row['micro_batches']} x "
            f"{row['micro_batch_size']}, {row['activation_checkpointing']})"
            for row in rows
        ]
        panel.bar_label(bars, labels, fontsize="x-small")
        panel.set_xlim(0, 1.75 * max(speeds))
        panel.set_xlabel("tokens/s (micro-batches, recomputed)", fontsize="small")
        title = f"{samples} x {length:,} tokens, {layers} layers"
        if rows[-1]["mfu_causal"] is not None:
            share = rows[-1]["mfu_causal"] / speeds[-1]
            above = panel.secondary_xaxis(
                "top", functions=(lambda x, s=share: 100 * s * x, lambda y, s=share: y / s / 100)
            )
            above.set_xlabel("MFU, %, causal", fontsize="small")
        panel.set_title(title, fontsize="medium")
        panel.tick_params(labelsize="small")
    figure.suptitle(f"training step, {where(results)}, bf16", x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _times(profiled: dict, results: dict, path: Path) -> Path:
    """Each group's time and, over it, its floor; what takes under 0.2 % of the step is left out."""
    import matplotlib.pyplot as plt

    rows = [row for row in profiled["rows"] if row["of_step"] >= 0.002][::-1]
    names = [row["group"] for row in rows]
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.27 * len(rows)), layout="constrained")
    axes.barh(names, [row["ms"] for row in rows], color="tab:red", alpha=0.45, label="time")
    floors = [row["floor_ms"] for row in rows]
    axes.barh(names, floors, height=0.35, color="black", label="floor")
    for place, row in enumerate(rows):
        text = f" {row['ms']:,.1f} ms, {row['of_step']:.1%}"
        axes.text(max(row["ms"], row["floor_ms"]), place, text, va="center", fontsize="x-small")
    axes.set_xlim(0, 1.2 * max(max(row["ms"], row["floor_ms"]) for row in rows))
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("ms")
    axes.tick_params(labelsize="small")
    axes.legend(fontsize="small", loc="lower right")
    title = f"{where(results)}: {profiled['title']}"
    axes.set_title(title, fontsize="small", loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
