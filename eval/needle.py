"""A needle in a haystack: does a model find one fact in a long text?

    python -m eval.needle out/extension --haystack essays/
    python -m eval.needle hf:OpenLLM-France/Lucie-7B --haystack fr.jsonl.gz --language fr
    python -m eval.needle out/main --haystack essays/ --lengths 1000 8000 8 --scoring likelihood

The test is Greg Kamradt's, scored as by Fu et al. 2024 (arXiv:2402.10171); the cells are those of
Lucie's published maps: 20 lengths from 1,000 to 62,872 tokens and 10 depths from 0 to 100 %, evenly
spaced, ends among them. The fact stands where a sentence of the filler begins, the nearest to the
depth asked for, or at the filler's end; eval/haystack.py makes the prompts.

    generate     The share of the answer's words that are in the first line of a greedy completion.
    likelihood   1 if of all the answers that needles.json has in this language, the right one has
                 the largest log-probability per byte, else 0. All are answers to such a question,
                 so one in eight is right by chance. A model that is small, or was never taught to
                 answer, shows what it retrieves; and no answer has to be generated.

Writes a row for each cell to a CSV as it is done, goes on from there when it is started again, and
draws the map. Lengths past the one a model was trained on are run with the theta it has.

Floor of a cell of T tokens: 2 N T FLOPs, and 2 L D T^2 of attention in L layers of width D.
"""

import argparse
import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import CheckpointError, latest, write_text
from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError, size_of
from data.prepare import find_files, read_documents
from data.tokenizer import Tokenizer
from eval.haystack import (
    NEEDLES,
    Needle,
    continuation,
    hide,
    read_haystack,
    read_needles,
    room_for_answer,
)
from eval.needle_map import draw, print_map
from eval.opening import add_model_options, fingerprint, make_room, open_with_tokenizer
from generate import PREFILL, Sampling, check_room, decode
from model import KVCache, Lucie

COLUMNS = ("length", "depth", "score", "position", "expected", "answer")
Answer = Callable[[list[int]], str]  # ids of a prompt -> the model's answer


# --- answers and scores ---------------------------------------------------------------------------


def generator(model: Lucie, tokenizer: Tokenizer, needles: list[Needle]) -> Answer:
    """Answers by greedy completion: its first line that is not blank."""
    room = room_for_answer(tokenizer, needles)

    def answer(prompt: list[int]) -> str:
        steps = decode(model, [prompt], room, Sampling(temperature=0))
        ids = [token for step in steps for _, token, _ in step]
        text = tokenizer.decode(i for i in ids if i not in model.eos_token_ids)
        return (text.strip().splitlines() or [""])[0]

    return answer


def picker(model: Lucie, tokenizer: Tokenizer, needles: list[Needle]) -> Answer:
    """Answers with that of a needle, the one whose bytes are likeliest on average."""
    ids = {needle.answer: continuation(tokenizer, f" {needle.answer}") for needle in needles}

    def answer(prompt: list[int]) -> str:
        found = log_probabilities(model, prompt, list(ids.values()))
        per_byte = {text: p / len(text.encode()) for text, p in zip(ids, found)}
        return max(per_byte, key=per_byte.__getitem__)

    return answer


@torch.no_grad()
def log_probabilities(
    model: Lucie, prompt: list[int], continuations: list[list[int]]
) -> list[float]:
    """The log-probability, in nats, of each continuation after a prompt, which is read once."""
    embedding = model.embed_tokens.weight
    length = len(prompt) + max(map(len, continuations))
    check_room(model, 1, length)
    cache = KVCache(model.config, 1, length, embedding.device, embedding.dtype)
    for part in torch.tensor([prompt], device=embedding.device).split(PREFILL, dim=1):
        last = model.hidden(part, cache=cache)[:, -1:]
    found = []
    for ids in continuations:
        cache.length = len(prompt)  # what another continuation wrote behind it is written over
        tokens = torch.tensor([ids], device=embedding.device)
        hidden = last
        if len(ids) > 1:
            hidden = torch.cat([last, model.hidden(tokens[:, :-1], cache=cache)], dim=1)
        likely = model.lm_head(hidden).float().log_softmax(-1)
        found.append(float(likely.gather(2, tokens[..., None]).double().sum()))
    return found


def words_found(answer: str, expected: str) -> float:
    """The share of the words of `expected` that are in `answer`; case and order do not count."""
    words = set(re.findall(r"\w+", expected.lower()))
    return len(words & set(re.findall(r"\w+", answer.lower()))) / len(words)


def same(answer: str, expected: str) -> float:
    return float(answer == expected)


SCORINGS = {"generate": (generator, words_found), "likelihood": (picker, same)}


# --- the map --------------------------------------------------------------------------------------


def measure(
    cells: list[tuple[int, int]],
    prompt_of: Callable[[int, int], tuple[Needle, list[int], int]],
    answer: Answer,
    score: Callable[[str, str], float],
    file: Path,
) -> dict[tuple[int, int], float]:
    """The score of each cell (length, depth), those that the CSV has left out of the work.

    prompt_of: (length, depth) -> needle, ids of the prompt, where the fact begins. A row is written
    as soon as it is known.
    """
    done = read_rows(file)
    scores = {(int(row["length"]), int(row["depth"])): float(row["score"]) for row in done}
    rows = io.StringIO()  # without the row that a kill may have cut short
    writer = csv.DictWriter(rows, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(done)
    write_text(file, rows.getvalue())
    left = [cell for cell in cells if cell not in scores]
    with (
        open(file, "a", encoding="utf-8", newline="", buffering=1) as f,
        tqdm(total=sum(length for length, _ in left), unit=" tokens", unit_scale=True) as bar,
    ):
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        for length, depth in left:
            needle, ids, position = prompt_of(length, depth)
            text = answer(ids)
            scores[length, depth] = found = score(text, needle.answer)
            row = (length, depth, f"{found:.4f}", position, needle.answer, text)
            writer.writerow(dict(zip(COLUMNS, row)))
            bar.update(length)
    return {cell: scores[cell] for cell in cells}


def read_rows(file: Path) -> list[dict]:
    """The rows of a CSV that are whole."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def claim(folder: Path, stem: str, settings: dict) -> Path:
    """The CSV of these settings, which are kept beside it.

    Raises ConfigError if there is one of others: its scores are not comparable.
    """
    file, beside = folder / f"{stem}.csv", folder / f"{stem}.json"
    if file.exists():
        known = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        if other := [name for name in settings if known.get(name) != settings[name]]:
            raise ConfigError(f"{file} is of other {', '.join(other)}: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(beside, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    return file


def label_of(source: str) -> str:
    """A short name: of a run's newest checkpoint, or of a folder."""
    newest = latest(source)
    if newest is None:
        return Path(source.removeprefix("hf:")).name
    return f"{newest.absolute().parents[1].name}_{newest.name}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="eval.needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--haystack", nargs="+", required=True, metavar="FILES", help="files, folders or globs"
    )
    parser.add_argument(
        "--lengths", nargs=3, type=int, default=(1000, 62872, 20), metavar=("MIN", "MAX", "STEPS")
    )
    parser.add_argument("--depths", type=int, default=10, help="number of depths, from 0 to 100 %%")
    parser.add_argument("--language", choices=("en", "fr", "de", "es", "it"), default="en")
    parser.add_argument(
        "--needles", type=Path, default=NEEDLES, help="a file like eval/needles.json"
    )
    parser.add_argument("--scoring", choices=tuple(SCORINGS), default="generate")
    parser.add_argument("--seed", type=int, default=42, help="decides which needle a cell gets")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/needle/CHECKPOINT")
    args = parser.parse_args(argv)
    low, high, steps = args.lengths
    if not (1 <= low <= high and steps >= 1 and args.depths >= 1):
        raise ConfigError("--lengths must be MIN <= MAX, in STEPS >= 1, and --depths >= 1")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    lengths = np.linspace(*args.lengths).round().astype(int).tolist()
    depths = np.linspace(0, 100, args.depths).round().astype(int).tolist()
    files, needles = find_files(args.haystack), read_needles(args.language, args.needles)
    model, tokenizer = open_with_tokenizer(args)
    trained, room = model.config.max_position_embeddings, room_for_answer(tokenizer, needles)
    make_room(model, lengths[-1])
    check_room(model, 1, lengths[-1])
    haystack = read_haystack(read_documents(files), tokenizer, lengths[-1])
    for needle in needles:  # an error now, not after hours
        hide(haystack, needle, lengths[0], 0, tokenizer, room)

    label = label_of(args.model)
    settings = {
        "weights": fingerprint(model),
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "haystack": [[Path(str(file)).name, size_of(file)] for file in files],
        "needles": hashlib.sha256(args.needles.read_bytes()).hexdigest()[:16],
        "seed": args.seed,
    }
    stem = f"{args.language}_{args.scoring}"
    file = claim(args.out or Path("out/needle") / label, stem, settings)

    def prompt_of(length: int, depth: int) -> tuple[Needle, list[int], int]:
        needle = random.Random(f"{args.seed} {length} {depth}").choice(needles)
        return needle, *hide(haystack, needle, length, depth, tokenizer, room)

    make_answer, score = SCORINGS[args.scoring]
    cells = [
        (length, depth) for length in dict.fromkeys(lengths) for depth in dict.fromkeys(depths)
    ]
    scores = measure(cells, prompt_of, make_answer(model, tokenizer, needles), score, file)
    print_map(scores)
    draw(scores, trained, f"{label}: {args.language}, {args.scoring}", file.with_suffix(".png"))
    print(f"{file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
