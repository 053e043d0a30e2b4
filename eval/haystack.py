"""The prompts of the needle test: filler, one fact in it, and a question about it.

A prompt is `<s>`, filler, in it the fact on a line of its own, then the question. Its length counts
all of them and room for an answer, in tokens, and is exact: the filler's last sentence is cut.
"""

import json
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config.cli import ConfigError
from data.dataset import DataError
from data.tokenizer import BOS, Tokenizer

NEEDLES = Path(__file__).with_name("needles.json")
# A sentence ends where white space follows these, and where a line does; the white space is of the
# next one.
BORDER = re.compile(r"(?<=[.!?…])(?=\s)|(?<=\S)(?=\n)")


class Needle(NamedTuple):
    fact: str
    question: str  # up to where the answer begins
    answer: str  # as it stands in the fact


class Haystack(NamedTuple):
    """Filler as ids, and where in them sentences begin, ascending from 0."""

    ids: list[int]
    borders: list[int]


def read_needles(language: str, file: Path = NEEDLES) -> list[Needle]:
    """Those of one language. Raises DataError for a file of another form than NEEDLES."""
    try:
        form = json.loads(file.read_text(encoding="utf-8-sig"))[language]
        found = [
            Needle(
                form["fact"].format(place=place, answer=answer),
                form["question"].format(place=place),
                answer,
            )
            for place, answer in form["needles"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: not of the form of eval/needles.json ({what})") from None
    if not found:
        raise DataError(f"{file}: no needles in {language}")
    return found


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins with white space and follows another.

    Lucie's tokenizer puts a space before all it is given; so a full stop is given first.
    """
    return tokenizer.encode_ordinary(f".{text}")[len(tokenizer.encode_ordinary(".")) :]


def read_haystack(texts: Iterable[str], tokenizer: Tokenizer, size: int) -> Haystack:
    """At least `size` tokens of texts, no more of which are read than that takes.

    What is shorter is repeated, which is said. Raises DataError if there is no text at all.
    """
    ids: list[int] = []
    borders: list[int] = []
    for text in texts:
        text = text.strip()
        for sentence in BORDER.split(f"\n\n{text}" if ids else text) if text else ():
            borders.append(len(ids))
            ids += continuation(tokenizer, sentence) if ids else tokenizer.encode_ordinary(sentence)
        if len(ids) >= size:
            return Haystack(ids, borders)
    if not ids:
        raise DataError("the haystack holds no text")
    tqdm.write(f"the haystack has {len(ids):,} tokens of {size:,}: it is repeated", sys.stderr)
    ids += continuation(tokenizer, "\n\n")
    times = -(-size // len(ids))
    borders = [turn * len(ids) + border for turn in range(times) for border in borders]
    return Haystack(ids * times, borders)


def hide(
    haystack: Haystack,
    needle: Needle,
    length: int,
    depth: float,
    tokenizer: Tokenizer,
    room: int,
) -> tuple[list[int], int]:
    """(ids of a prompt of length - room tokens, where in them the fact begins).

    depth: per cent of the filler that stands before the fact. Raises ConfigError for a length
    that the fact, the question and the room alone exceed.
    """
    fact = continuation(tokenizer, f"\n{needle.fact}\n")
    question = continuation(tokenizer, f"\n\n{needle.question}")
    filler = length - room - 1 - len(fact) - len(question)
    if filler < 0:
        raise ConfigError(
            f"length {length:,} is too short: the fact, the question and room for an answer take "
            f"{length - filler:,} tokens"
        )
    wanted = round(filler * depth / 100)
    after = bisect_left(haystack.borders, wanted)
    near = haystack.borders[max(0, after - 1) : after + 1]
    at = min(*near, filler, key=lambda at: abs(at - wanted))
    ids = [BOS, *haystack.ids[:at], *fact, *haystack.ids[at:filler], *question]
    return ids, at + 1


def room_for_answer(tokenizer: Tokenizer, needles: list[Needle]) -> int:
    """Tokens for an answer: the longest fact, for a model may say all of it."""
    return max(len(continuation(tokenizer, f" {needle.fact}")) for needle in needles)
