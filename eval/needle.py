"""A needle in a haystack: does a model find one fact in a long text?

    python -m eval.needle out/extension --haystack essays/
    python -m eval.needle hf:OpenLLM-France/Lucie-7B --haystack fr.jsonl.gz --language fr
    python -m eval.needle out/main --haystack essays/ --lengths 1000 8000 8 --scoring likelihood

The test is Greg Kamradt's, scored as by Fu et al. 2024 (arXiv:2402.10171). A prompt is `<s>`,
filler, in it the fact on a line of its own, then a question; its length counts all of them and room
for an answer. The fact stands where a sentence of the filler begins, the nearest to the depth asked
for, or at the filler's end. There are 20 lengths up to the one the model was trained on; of 32,000
positions or more, they are those of Lucie's published maps, 1,000 to 62,872 tokens.

    generate     The share of the answer's words that are in the first line of a greedy completion.
    likelihood   1 if the right answer has the largest log-probability per byte of all the answers
                 that needles.json has in this language, else 0. There are eight, so chance is 1/8.
                 This shows what a small model retrieves that was never taught to answer.

RUN/needle/CHECKPOINT/LANGUAGE_SCORING.csv gets a row for each cell as it is done, and the same
command continues there; a .png beside it is the map. Lengths past the trained one keep its theta.
Floor of a cell of T tokens: 2 N T FLOPs, and 2 L D T^2 of attention in L layers of width D.
"""

import csv
import hashlib
import json
import random
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import CheckpointError
from config.cli import ConfigError, run_cli, write_file
from data.dataset import DataError
from data.files import find_files, read_documents
from data.tokenizer import BOS, Tokenizer
from eval.perplexity import (
    make_room,
    model_parser,
    newest_of,
    open_model,
    token_scores,
    write_table,
)
from generate import PREFILL, Decoder, Sampling, decode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDLES = Path(__file__).with_name("needles.json")
COLUMNS = ("length", "depth", "score", "position", "expected", "answer")
LANGUAGES = {"en": "English", "fr": "French", "de": "German", "es": "Spanish", "it": "Italian"}
# A sentence ends where white space follows one of these, and where a line does; the white space
# belongs to the next one.
BORDER = re.compile(r"(?<=[.!?…])(?=\s)|(?<=\S)(?=\n)")
Scores = dict[tuple[int, int], float]  # {(length in tokens, depth in per cent): 0 to 1}


# --- prompts --------------------------------------------------------------------------------------


class Needle(NamedTuple):
    fact: str
    question: str  # up to where the answer begins
    answer: str  # as it stands in the fact


class Haystack(NamedTuple):
    """Filler as ids, and where in them sentences begin, ascending from 0."""

    ids: list[int]
    borders: list[int]


def read_needles(language: str, file: Path = NEEDLES) -> list[Needle]:
    """Those of one language. Raises DataError for a file that is not of the form of NEEDLES."""
    try:
        form = json.loads(file.read_text(encoding="utf-8-sig"))[language]
        fact, question = form["fact"], form["question"]
        return [
            Needle(fact.format(place=place, answer=answer), question.format(place=place), answer)
            for place, answer in form["needles"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{file}: not of the form of eval/needles.json ({what})") from None


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins with white space and follows another.

    Lucie's tokenizer puts a space before all it is given, so a full stop is given first.
    """
    return tokenizer.encode_ordinary(f".{text}")[len(tokenizer.encode_ordinary(".")) :]


def read_haystack(texts: Iterable[str], tokenizer: Tokenizer, size: int) -> Haystack:
    """At least `size` tokens of texts, of which no more are read than that takes.

    A text that is too short is repeated, with a line on stderr. Raises DataError if there is none.
    """
    ids: list[int] = []
    borders: list[int] = []
    with tqdm(desc="haystack", total=size, unit=" tokens", unit_scale=True) as bar:
        for text in filter(None, map(str.strip, texts)):
            for sentence in BORDER.split(f"\n\n{text}" if ids else text):
                borders.append(len(ids))
                encode = continuation if ids else Tokenizer.encode_ordinary
                ids += encode(tokenizer, sentence)
            bar.update(min(size, len(ids)) - bar.n)
            if len(ids) >= size:
                return Haystack(ids, borders)
    if not ids:
        raise DataError("the haystack holds no text")
    print(f"the haystack has {len(ids):,} tokens of {size:,}: it is repeated", file=sys.stderr)
    ids += continuation(tokenizer, "\n\n")
    times = -(-size // len(ids))
    borders = [turn * len(ids) + border for turn in range(times) for border in borders]
    return Haystack(ids * times, borders)


def encode(needle: Needle, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of the fact and of the question, with the line breaks around them."""
    fact = continuation(tokenizer, f"\n{needle.fact}\n")
    return fact, continuation(tokenizer, f"\n\n{needle.question}")


def hide(
    haystack: Haystack, needle: Needle, length: int, depth: float, tokenizer: Tokenizer, room: int
) -> tuple[list[int], int]:
    """(ids of a prompt of length - room tokens, where in them the fact begins).

    depth: per cent of the filler that stands before the fact.
    """
    fact, question = encode(needle, tokenizer)
    filler = length - room - 1 - len(fact) - len(question)
    wanted = round(filler * depth / 100)
    after = bisect_left(haystack.borders, wanted)
    near = haystack.borders[max(0, after - 1) : after + 1]
    at = min(*near, filler, key=lambda at: abs(at - wanted))
    return [BOS, *haystack.ids[:at], *fact, *haystack.ids[at:filler], *question], at + 1


# --- answers and scores ---------------------------------------------------------------------------


def room_for_answer(tokenizer: Tokenizer, needles: list[Needle]) -> int:
    """Tokens for an answer: the longest fact, because a model may repeat all of it."""
    return max(len(continuation(tokenizer, f" {needle.fact}")) for needle in needles)


def generated(decoder: Decoder, tokenizer: Tokenizer, room: int, prompt: list[int]) -> str:
    """The first line of a greedy completion, of at most `room` tokens, that is not blank."""
    steps = decode(decoder.model, [prompt], room, Sampling(temperature=0), decoder=decoder)
    text = tokenizer.decode(token for step in steps for _, token, _ in step)
    return (text.strip().splitlines() or [""])[0]


def picked(decoder: Decoder, tokenizer: Tokenizer, needles: list[Needle], prompt: list[int]) -> str:
    """The answer of all needles whose bytes are likeliest on average."""
    answers = [needle.answer for needle in needles]
    ids = [continuation(tokenizer, f" {answer}") for answer in answers]
    found = zip(log_probabilities(decoder, prompt, ids), answers)
    return max(found, key=lambda pair: pair[0] / len(pair[1].encode()))[1]


@torch.no_grad()
def log_probabilities(decoder: Decoder, prompt: list[int], texts: list[list[int]]) -> list[float]:
    """The log-probability, in nats, of each text after a prompt, which is read once."""
    model, cache = decoder.model, decoder.reserve(1, len(prompt) + max(map(len, texts)))
    for part in torch.tensor([prompt], device=cache.k.device).split(PREFILL, dim=1):
        last = model.hidden(part, cache=cache)[:, -1:]
    found = []
    for ids in texts:
        cache.length = len(prompt)  # what the text before this one wrote is overwritten
        tokens = torch.tensor([ids], device=cache.k.device)
        hidden = last
        if len(ids) > 1:
            hidden = torch.cat([last, model.hidden(tokens[:, :-1], cache=cache)], dim=1)
        found.append(float(token_scores(model, hidden[0], tokens[0])[0].cpu().double().sum()))
    return found


def words_found(answer: str, expected: str) -> float:
    """The share of the words of `expected` that are in `answer`; case and order do not count."""
    words = set(re.findall(r"\w+", expected.lower()))
    return len(words & set(re.findall(r"\w+", answer.lower()))) / len(words)


# --- the map --------------------------------------------------------------------------------------


def read_scores(file: Path) -> tuple[list[list[str]], Scores]:
    """(the rows of a map's CSV, their scores), both empty if there is no file. Raises DataError."""
    if not file.is_file():
        return [], {}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            _, *rows = csv.reader(stream)
        return rows, {(int(row[0]), int(row[1])): float(row[2]) for row in rows}
    except (ValueError, IndexError, csv.Error):
        raise DataError(f"{file}: not the scores of a needle test") from None


def draw(scores: Scores, trained: int, title: str) -> "Figure":
    """The heat map: length across, depth down. A dashed line marks the trained length.

    Two colours if all scores are 0 or 1, else a scale; the colour-blind and a grey printer tell
    them apart. Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the map needs matplotlib: pip install matplotlib") from None
    lengths, depths = (sorted(set(axis)) for axis in zip(*scores))
    cells = [[scores.get((length, depth), np.nan) for length in lengths] for depth in depths]
    figure = Figure(figsize=(7, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    binary = set(scores.values()) <= {0.0, 1.0}
    colours = colormaps["cividis"].resampled(2 if binary else 256)
    style = {"cmap": colours, "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 0.5}
    mesh = axes.pcolormesh(lengths, depths, cells, shading="nearest", **style)
    bar = figure.colorbar(mesh, ticks=(0.25, 0.75) if binary else None)
    if binary:
        bar.set_ticklabels(("not found", "found"))
    axes.set_xlim(axes.get_xlim())  # the line may lie beyond; its label says where
    axes.axvline(trained, color="#d62728", ls="--", lw=2, label=f"trained on {trained:,} tokens")
    shown = lengths[:: 1 + len(lengths) // 8]
    axes.set_xticks(shown, [f"{length:,}" for length in shown])
    axes.invert_yaxis()  # the beginning of the text is at the top
    axes.set_xlabel("length of the context (tokens)")
    axes.set_ylabel("depth of the fact (%)")
    axes.set_title(title, loc="left", size="medium")
    figure.legend(loc="outside lower right", frameon=False, fontsize="small")
    return figure


def read_map(file: Path) -> tuple[Scores, int, str]:
    """What `draw` takes, of a CSV and of the settings beside it; a title in words."""
    settings = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    language, _, scoring = file.stem.partition("_")
    how = "words of the answer found" if scoring == "generate" else "right answer picked from all"
    title = f"{settings['model']}: a needle in a haystack\n{LANGUAGES[language]}, {how}"
    return read_scores(file)[1], settings["trained"], title


# --- the command ----------------------------------------------------------------------------------


def claim(file: Path, settings: dict) -> None:
    """Keep the settings of a CSV beside it, as JSON.

    Raises ConfigError if the CSV is there with others: its scores are not comparable.
    """
    beside = file.with_suffix(".json")
    if file.exists():
        known = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        if other := [name for name in settings if known.get(name) != settings[name]]:
            raise ConfigError(f"{file} has another {', '.join(other)}: choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(beside, json.dumps(settings, indent=1, ensure_ascii=False).encode() + b"\n")


def main(argv: list[str]) -> None:
    parser = model_parser("python -m eval.needle", __doc__)
    parser.add_argument(
        "--haystack", nargs="+", required=True, metavar="FILES", help="files, folders or globs"
    )
    names = ("MIN", "MAX", "STEPS")
    parser.add_argument(
        "--lengths",
        nargs=3,
        type=int,
        metavar=names,
        help="of the prompts, in tokens; default: see above",
    )
    parser.add_argument("--depths", type=int, default=10, help="number of depths; default: 10")
    parser.add_argument(
        "--language", choices=LANGUAGES, default="en", help="of fact and question; default: en"
    )
    own = "facts of your own, a file like eval/needles.json"
    parser.add_argument("--needles", type=Path, default=NEEDLES, metavar="FILE", help=own)
    scorings = ("generate", "likelihood")
    parser.add_argument(
        "--scoring", choices=scorings, default="generate", help="see above; default: generate"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for CSV and map; default: RUN/needle/CHECKPOINT"
    )
    args = parser.parse_args(argv)
    low, high, steps = args.lengths or (1, 1, 1)
    if not (1 <= low <= high and steps >= 1 and args.depths >= 1):
        raise ConfigError("--lengths must be MIN <= MAX, in STEPS >= 1, and --depths >= 1")
    files, needles = find_files(args.haystack), read_needles(args.language, args.needles)
    source, run = newest_of(args.model)
    model, tokenizer = open_model(args, source)
    trained, room = model.config.max_position_embeddings, room_for_answer(tokenizer, needles)
    least = 1 + room + max(sum(map(len, encode(needle, tokenizer))) for needle in needles)
    lucies = (1000, 62_872, 20)
    default = lucies if trained >= 32_000 else (max(least, trained // 20), trained, 20)
    low, high, steps = args.lengths or default
    if min(low, high) < least:
        needed = f"the fact, the question and room for an answer take {least:,} tokens"
        raise ConfigError(f"length {min(low, high):,} is too short: {needed}; use --lengths")
    lengths = list(dict.fromkeys(np.linspace(low, high, steps).round().astype(int).tolist()))
    depths = list(dict.fromkeys(np.linspace(0, 100, args.depths).round().astype(int).tolist()))
    make_room(model, high)
    decoder = Decoder(model)
    decoder.reserve(1, high)  # for all cells; a lack of memory shows now
    haystack = read_haystack(read_documents(files), tokenizer, high)

    name = Path(source.removeprefix("hf:")).name
    settings = {"model": f"{run.name}, {name}" if name != run.name else name, "trained": trained}
    settings["dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    settings["haystack"] = [Path(str(file)).name for file in files]
    settings["needles"] = hashlib.sha256(args.needles.read_bytes()).hexdigest()[:16]
    folder = args.out or run / "needle" / (name if name != run.name else "")
    file = folder / f"{args.language}_{args.scoring}.csv"
    claim(file, settings)

    cells = [(length, depth) for length in lengths for depth in depths]
    rows, scores = read_scores(file)
    left = [cell for cell in cells if cell not in scores]
    total = sum(length for length, _ in left)
    with tqdm(desc=file.stem, total=total, unit=" tokens", unit_scale=True) as bar:
        for length, depth in left:
            needle = random.Random(f"42 {length} {depth}").choice(needles)
            ids, position = hide(haystack, needle, length, depth, tokenizer, room)
            if args.scoring == "generate":
                answer = generated(decoder, tokenizer, room, ids)
                score = words_found(answer, needle.answer)
            else:
                answer = picked(decoder, tokenizer, needles, ids)
                score = float(answer == needle.answer)
            rows.append([length, depth, f"{score:.4f}", position, needle.answer, answer])
            write_table(file, COLUMNS, rows)
            scores[length, depth] = score
            bar.update(length)
    scores = {cell: scores[cell] for cell in cells}
    draw(scores, *read_map(file)[1:]).savefig(file.with_suffix(".png"))
    print(f"mean of the map: {sum(scores.values()) / len(scores):.3f}")
    print(f"{file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
