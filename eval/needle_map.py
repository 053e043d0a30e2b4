"""The map of a needle test: the score of every cell, by length and depth."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from config.cli import ConfigError

RETRIEVED = 0.9  # a mean score over this, over all depths, is retrieval at a length
Scores = dict[tuple[int, int], float]  # (length in tokens, depth in per cent) -> 0 to 1


def as_array(scores: Scores) -> tuple[list[int], list[int], np.ndarray]:
    """(lengths, depths, scores `[depths, lengths]`), ascending; NaN where there is none."""
    lengths, depths = (sorted(set(axis)) for axis in zip(*scores))
    values = [[scores.get((length, depth), np.nan) for length in lengths] for depth in depths]
    return lengths, depths, np.array(values)


def longest_retrieved(scores: Scores) -> int:
    """The longest length up to which retrieval is over RETRIEVED at every length; 0 if none."""
    lengths, _, values = as_array(scores)
    reached = 0
    for length, mean in zip(lengths, values.mean(0)):
        if not mean > RETRIEVED:
            break
        reached = length
    return reached


def print_map(scores: Scores) -> None:
    """A line a length: its scores from depth 0 on, in tenths (# is 10 of them), and their mean."""
    lengths, depths, values = as_array(scores)
    print(f"{'length':>8}  {f'depth 0 to {depths[-1]} %':{max(len(depths), 16)}}  mean")
    for length, column in zip(lengths, values.T):
        marks = "".join("#" if x == 1 else f"{int(10 * x)}" for x in column)
        print(f"{length:8,}  {marks:{max(len(depths), 16)}} {column.mean():5.2f}")
    reached, mean = longest_retrieved(scores), values.mean()
    found = f"retrieval over {RETRIEVED} at every length up to {reached:,} tokens"
    print(f"{found if reached else f'no retrieval over {RETRIEVED}'}; mean of the map {mean:.3f}")


def draw(scores: Scores, trained: int, title: str, path: Path | BinaryIO) -> None:
    """The heat map: length across, depth down, red for 0 to green for 1. A dashed line marks the
    length that the model was trained on. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the map needs matplotlib: pip install matplotlib") from None
    lengths, depths, values = as_array(scores)
    colours = LinearSegmentedColormap.from_list("found", ["#d64550", "#f2c14e", "#2fa36b"])
    figure = Figure(figsize=(max(5, 2.5 + 0.45 * len(lengths)), 5), layout="constrained")
    axes = figure.subplots()
    cells = axes.pcolormesh(
        _edges(lengths), _edges(depths), values, cmap=colours, vmin=0, vmax=1, edgecolors="white"
    )
    axes.axvline(trained, color="black", ls="--", lw=2, label=f"trained on {trained:,} tokens")
    axes.set_xlim(_edges(lengths)[[0, -1]])  # the line may be beyond; its label tells of it
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=60)
    axes.set_yticks(depths)
    axes.invert_yaxis()  # the beginning of the text is at the top
    axes.set_xlabel("length of the context (tokens)")
    axes.set_ylabel("depth of the fact (%)")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside upper right", frameon=False, fontsize="small")
    figure.colorbar(cells, label="score")
    figure.savefig(path, dpi=150)


def _edges(centres: list[int]) -> np.ndarray:
    """The borders of cells around their centres: half-way between neighbours."""
    at = np.array(centres, dtype=float)
    if len(at) == 1:
        at = np.array([at[0] - 1, at[0], at[0] + 1])
        return (at[:-1] + at[1:]) / 2
    between = (at[:-1] + at[1:]) / 2
    return np.array([2 * at[0] - between[0], *between, 2 * at[-1] - between[-1]])
