"""The data of `make demo`, made on this machine without a network.

    python -m data.demo --out out/demo_data

writes texts, a vocabulary, token streams and mixtures. The demo's final exam (eval/capitals.py)
asks for `capital_questions(language, held_out)`.

English prose and code come from the standard library of the running Python. Everything else is
written here from four tables of facts (`demo/countries.csv`, `words.csv`, `events.csv`,
`numbers.csv`) and the sentences of `demo/templates.json`, in five languages. A document:

    Les capitales du monde
    Quelle est la capitale de l'Espagne ? Madrid
    Quelle est la capitale de la France ? Paris
    Quelle est la capitale du Japon ? Tokyo

There are six ways to ask for a capital. For each country one of them (`held_out_form`) is never
written in any document, so that the exam can ask a question that was not learnt by heart: it joins
a wording seen with other countries to a country seen in other wordings.

In `templates.json`, `[is|are]` is the verb for a singular and for a plural country name. Entry i of
a list means the same in every language, which is how translated pairs are made.
"""

import ast
import csv
import json
import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from config.cli import Parser, run_cli
from data import tokenizer
from data.dataset import DataError
from data.streams import Options, tokenize, write_mixture

LANGUAGES = ("en", "fr", "de", "es", "it")
SOURCES = ("en", "fr", "code", "de", "es", "it", "parallel", "facts", "arithmetic")
TABLES = Path(__file__).parent / "demo"
TRAIN_KILOBYTES = dict(zip(SOURCES, (2400, 2400, 3000, 700, 700, 500, 400, 1000, 400), strict=True))
VALID_KILOBYTES, VOCAB_SIZE = 40, 4096
# Lucie's shares of the main phase by language; then, for the annealing phase, facts in place of the
# mathematics, science, encyclopedia and dialogue of the real one, and more of the rarest language.
PUBLISHED = {
    "en": 0.332, "fr": 0.324, "code": 0.147, "de": 0.069, "es": 0.066, "it": 0.038,
    "parallel": 0.025,
}  # fmt: skip
ANNEALING = {
    "facts": 0.82, "arithmetic": 0.03, "code": 0.03, "en": 0.02, "fr": 0.02, "de": 0.02,
    "es": 0.02, "it": 0.04,
}  # fmt: skip
MIXTURES = {"pretraining": PUBLISHED, "extension": PUBLISHED, "annealing": ANNEALING}

PAIRS = (("fr", "en"), ("de", "fr"), ("es", "en"), ("it", "en"))
OTHER_TOPICS = ("reverse", "language", "currency", "continent", "year")
ALL_TOPICS = ("capital", *OTHER_TOPICS)
FACTS_TOPICS = 16 * ("capital",) + OTHER_TOPICS
SUM_STYLES = ("digits", "sentence", "ask in digits", "ask in words", "story")
DAYS_IN_MONTH = {1: 31, 3: 31, 4: 30, 5: 31, 6: 30, 7: 31, 8: 31, 9: 30, 10: 31, 11: 30, 12: 31}
SKIPPED_FOLDERS = "test tests idlelib lib2to3 encodings turtledemo pydoc_data __pycache__".split()
SKIPPED_FOLDERS += ["site-packages", "dist-packages"]

Lines = Iterator[str]
Values = dict[str, Any]  # the words that fill a template
Pick = Callable[[Any, Sequence], Any]  # see `deck`


def documents(source: str, split: str, seed: int = 42) -> Iterator[str]:
    """All documents of one source ("train" or "valid"), the same ones at every call."""
    size = 1000 * (TRAIN_KILOBYTES[source] if split == "train" else VALID_KILOBYTES)
    rng = Random(f"{source}-{split}-{seed}")
    if source == "en":
        prose = fitting(docstrings(split, seed), size // 3)
        mixed = [*prose, *fitting(pages("en", rng), size * 2 // 3)]
        rng.shuffle(mixed)
        return iter(mixed)
    if source == "code":
        return fitting(library_files(split, seed), size)
    return fitting((pages if source in LANGUAGES else rounds)(source, rng), size)


def capital_questions(language: str, held_out: bool) -> list[tuple[str, str]]:
    """The exam: for every country a prompt with one solved example, and the answer expected.

    It asks in the plain form, which is trained, or in the one that is held out for the country.
    """
    exam = []
    for index in range(len(countries())):
        form = held_out_form(index) if held_out else 0
        # Neighbours in the table have different held-out forms: the example was trained.
        example = " ".join(ask(language, "capital", form, (index + 1) % len(countries())))
        question, answer = ask(language, "capital", form, index)
        exam.append((f"{example}\n{question}", answer))
    return exam


def held_out_form(index: int) -> int:
    """The way of asking for a capital that is never written about country number `index`."""
    return 1 + index % (len(templates("en")["ask"]["capital"]) - 1)


@cache
def read_table(name: str) -> list[dict[str, str]]:
    """One CSV file of the demo folder, as a list of rows."""
    with open(TABLES / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def countries() -> list[dict[str, str]]:
    """The rows of countries.csv: name, "of" form and capital in each language, and keys."""
    return read_table("countries")


@cache
def templates(language: str) -> dict[str, Any]:
    """The sentences of one language in templates.json."""
    return json.loads((TABLES / "templates.json").read_text(encoding="utf-8"))[language]


@cache
def words(language: str, kind: str) -> dict[str, str]:
    """The words of one kind (weekday, month, continent, language, currency) by their key."""
    return {row["key"]: row[language] for row in read_table("words") if row["kind"] == kind}


@cache
def values_of(language: str, topic: str) -> list[Values]:
    """What a topic can be about, as template values: events for years, countries for the rest."""
    if topic == "year":
        return [{"event": row[language], "year": row["year"]} for row in read_table("events")]
    rows = []
    for row in countries():
        values: Values = {key: row[f"{language}_{key}"] for key in ("name", "of", "capital")}
        for kind in ("continent", "language", "currency"):
            values[kind] = words(language, kind)[row[kind]]
        rows.append(values | {"plural": language in row["plural_in"].split()})
    return rows


def fill(template: str, values: Values) -> str:
    """A template with its words in place, and a capital letter at the start."""
    if "[" in template:
        number = 2 if values.get("plural") else 1
        template = re.sub(r"\[(.*?)\|(.*?)\]", lambda match: match[number], template)
    return upper_first(template.format_map(values))


def upper_first(text: str) -> str:
    """`der Euro` -> `Der Euro`; str.capitalize would also lower the rest."""
    return text[:1].upper() + text[1:]


def ask(language: str, topic: str, form: int, index: int) -> tuple[str, str]:
    """A question about item `index` and its answer."""
    values = values_of(language, topic)[index]
    answer = values["name" if topic == "reverse" else topic]
    return fill(templates(language)["ask"][topic][form], values), upper_first(answer)


def tell(language: str, topic: str, form: int, index: int) -> str:
    """A sentence about item `index`. Forms 0 and 1 name it, the others need a context."""
    return fill(templates(language)["tell"][topic][form], values_of(language, topic)[index])


def deck(rng: Random) -> Pick:
    """A function pick(key, items) by which every item comes once before any comes twice.

    Independent draws would leave some countries rare; each use (`key`) has a deck of its own.
    """
    cards: dict[Any, list] = {}

    def pick(key: Any, items: Sequence) -> Any:
        if not cards.get(key):
            cards[key] = rng.sample(items, len(items))
        return cards[key].pop()

    return pick


def choose(pick: Pick, rng: Random, topic: str, wish: int | None = None) -> tuple[int, int]:
    """A form, `wish` where possible but never the held-out one, and an item to ask about."""
    index = pick(topic, range(len(values_of("en", topic))))
    forms = list(range(len(templates("en")["ask"][topic])))
    if topic == "capital":
        forms.remove(held_out_form(index))
    return (wish if wish in forms else rng.choice(forms)), index


def question_lines(language: str, pick: Pick, rng: Random, topics: tuple = OTHER_TOPICS) -> Lines:
    """Lines "question answer", half of the time in one form as far as possible."""
    wish = rng.randrange(6) if rng.random() < 0.5 else None
    while True:
        topic = pick(topics, topics)
        yield " ".join(ask(language, topic, *choose(pick, rng, topic, wish)))


def capital_lines(language: str, pick: Pick, rng: Random) -> Lines:
    """Lines "question answer" about capitals only."""
    return question_lines(language, pick, rng, ("capital",))


def portraits(language: str, pick: Pick, rng: Random) -> Lines:
    """Paragraphs about one country each."""
    text = templates(language)
    while True:
        index = pick("portrait", range(len(countries())))
        topics = rng.sample(("capital", "continent", "language", "currency"), 4)
        sentences = [tell(language, topic, rng.randrange(4), index) for topic in topics]
        frame = [rng.choice(text["open"]), *(text["close"] if rng.random() < 0.4 else [])]
        opening, *closing = [fill(part, values_of(language, "capital")[index]) for part in frame]
        yield " ".join([opening, *sentences, *closing]) + "\n"


def dialogue(language: str, pick: Pick, rng: Random) -> Lines:
    """Two people who question each other in turn."""
    text = templates(language)["dialogue"]
    a, b = rng.sample(templates(language)["people"], 2)
    yield fill(rng.choice(text["open"]), {"a": a, "b": b})
    while True:
        topic = pick("dialogue", ALL_TOPICS)
        question, answer = ask(language, topic, *choose(pick, rng, topic))
        values = {"a": a, "b": b, "question": question, "answer": answer}
        parts = ("ask", "reply", "close") if rng.random() < 0.2 else ("ask", "reply")
        yield "\n".join(fill(rng.choice(text[part]), values) for part in parts)
        a, b = b, a


def lists(language: str, pick: Pick, rng: Random) -> Lines:
    """Countries that share a continent, a language or a currency, with their capitals."""
    text, rows = templates(language), values_of(language, "capital")
    while True:
        row = pick("list", rows)
        shared = rng.choice(("continent", "language", "currency"))
        group = [other for other in rows if other[shared] == row[shared]]
        if len(group) == 1:  # no list; often so for languages and currencies
            continue
        chosen = rng.sample(group, min(len(group), rng.randint(3, 6)))
        entries = [fill(text["entry"], one | {"name": upper_first(one["name"])}) for one in chosen]
        yield "\n".join([fill(text["list"][shared], row), *entries]) + "\n"


def comparisons(language: str, pick: Pick, rng: Random) -> Lines:
    """Two countries side by side: their capitals, and one thing they share or do not."""
    text, rows = templates(language), values_of(language, "capital")
    while True:
        one = pick("compare", range(len(rows)))
        two = (one + pick("distance", range(1, len(rows)))) % len(rows)
        values = rows[one] | {f"{key}2": value for key, value in rows[two].items()}
        topic = rng.choice(("continent", "language", "currency"))
        if rows[one][topic] == rows[two][topic]:
            second = fill(text["same"][topic], values)
        elif topic == "continent":
            second = " ".join(tell(language, topic, 0, index) for index in (one, two))
        else:
            second = fill(text["differ"][topic], values)
        yield fill(text["differ"]["capital"], values) + " " + second


def calendar(language: str, pick: Pick, rng: Random) -> Lines:
    """Weekdays, months, numbers as words, and the years of historical events."""
    days, months = (list(words(language, kind).values()) for kind in ("weekday", "month"))
    numbers = [row[language] for row in read_table("numbers")]
    while True:
        day, number = pick("day", range(7)), pick("number", range(100))
        month = pick("month", list(DAYS_IN_MONTH))
        values: Values = {"day": days[day], "next_day": days[(day + 1) % 7]}
        values |= {"month": months[month - 1], "next_month": months[month % 12]}
        values |= {"month_number": month, "days": DAYS_IN_MONTH[month]}
        values |= {"number": number, "word": numbers[number], "next_word": numbers[number + 1]}
        for key in ("next_day", "next_month", "word"):
            values[f"{key}_answer"] = upper_first(values[key])
        yield fill(pick("calendar", templates(language)["calendar"]), values)
        if rng.random() < 0.5:
            event = pick("event", range(len(values_of(language, "year"))))
            yield tell(language, "year", rng.randrange(2), event)


def sums(language: str, pick: Pick, rng: Random, styles: tuple = SUM_STYLES) -> Lines:
    """Arithmetic between 0 and 100 in digits, in words, as questions and as little stories."""
    text = templates(language)["sums"]
    numbers = [row[language] for row in read_table("numbers")]
    while True:
        sign, word = pick("sign", ("+ plus", "- minus", "× times")).split()
        low, high = (2, 10) if word == "times" else (0, 50)  # "1 times" needs its own grammar
        x, y = rng.randint(low, high), rng.randint(low, high)
        if word == "minus":
            x = x + y
        result = {"plus": x + y, "minus": x - y, "times": x * y}[word]
        left, right = f"{numbers[x]} {text[word]} {numbers[y]}", numbers[result]
        style = pick(styles, styles)
        if style == "digits":
            yield f"{x} {sign} {y} = {result}"
        elif style == "story":
            a, b = rng.sample(templates(language)["people"], 2)
            x, y = rng.randint(2, 30), rng.randint(2, 30)
            yield fill(text["story"], {"a": a, "b": b, "x": x, "y": y, "z": x + y})
        elif style == "sentence":
            yield fill(text["tell"], {"left": left, "right": right})
        elif style == "ask in digits":
            yield fill(text["ask"], {"left": f"{x} {sign} {y}", "right_answer": result})
        else:
            yield fill(text["ask"], {"left": left, "right_answer": upper_first(right)})


def translations(pair: tuple[str, str], pick: Pick, rng: Random, topics: tuple) -> Lines:
    """The same line in two languages: questions in one document, sentences in the next."""
    layout = pick("layout", ("ask", "tell"))
    while True:
        topic = pick(layout, topics)
        form, index = choose(pick, rng, topic)
        if layout == "ask" or topic == "reverse":
            yield "\n".join(" ".join(ask(lang, topic, form, index)) for lang in pair) + "\n"
        else:
            yield "\n".join(tell(lang, topic, form % 2, index) for lang in pair) + "\n"


def page(blocks: Lines, rng: Random, title: str = "") -> str:
    """One document: a title, if any, then blocks up to a random length."""
    size, lines = rng.randint(350, 1200), [title] if title else []
    while sum(map(len, lines)) < size:
        lines.append(next(blocks))
    return "\n".join(lines).rstrip() + "\n"


def pages(language: str, rng: Random) -> Lines:
    """Endless documents of all kinds, most of them questions, most of those on capitals."""
    kinds = 10 * (capital_lines,) + 2 * (question_lines,)
    kinds += (portraits, dialogue, lists, comparisons, calendar, sums)
    pick, titles = deck(rng), templates(language)["titles"]
    while True:
        kind = pick("kind", kinds)
        title = rng.choice(titles.get(kind.__name__, [""])) if rng.random() < 0.4 else ""
        yield page(kind(language, pick, rng), rng, title)


def rounds(source: str, rng: Random) -> Lines:
    """Endless documents of a source that takes its languages in turn."""
    turns = {
        "facts": [(question_lines, language, FACTS_TOPICS) for language in LANGUAGES],
        "arithmetic": [(sums, language, SUM_STYLES) for language in LANGUAGES]
        + [(sums, "en", ("digits",))],  # bare sums, in no language
        "parallel": [(translations, pair, ALL_TOPICS) for pair in PAIRS],
    }
    for pick, (kind, language, parts) in cycle([(deck(rng), turn) for turn in turns[source]]):
        yield page(kind(language, pick, rng, parts), rng)


def fitting(stream: Lines, size: int) -> Lines:
    """The first documents, up to `size` bytes; none takes more than a fifth of that alone."""
    left = size
    for text in stream:
        length = len(text.encode())
        if length <= size / 5:
            left -= length
            if left < 0:
                return
            yield text


def library_files(split: str, seed: int) -> Lines:
    """The text of the library files of a split, in an order fixed by their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name.as_posix() for name in names if not {*name.parts} & {*SKIPPED_FOLDERS}]
    for name in sorted(names, key=lambda name: Random(f"{seed}-{name}").random()):
        if in_split(name, split):
            try:
                data = (root / name).read_bytes()
                if 0 < len(data) <= 60_000:
                    yield clean(data.decode("utf-8"))
            except (OSError, UnicodeDecodeError):
                continue


def docstrings(split: str, seed: int) -> Lines:
    """The pydoc topics, and the longer docstrings of each library module as one document."""
    from pydoc_data import topics  # half a megabyte, needed nowhere else

    for name in sorted(topics.topics):
        if in_split(name, split):
            yield clean(topics.topics[name]).strip() + "\n"
    for source in library_files(split, seed):
        try:
            found = list(long_docstrings(ast.parse(source)))
        except (SyntaxError, ValueError):
            continue
        if found:
            yield clean("\n\n".join(found)).strip() + "\n"


def long_docstrings(node: Any) -> Lines:
    """Docstrings over 200 characters of a module, its classes and functions, in order."""
    text = ast.get_docstring(node)
    if text and len(text) > 200:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from long_docstrings(child)


def in_split(name: str, split: str) -> bool:
    """One name in twenty is for validation. (Python's own hash() would differ in every run.)"""
    return (Random(name).random() < 0.05) == (split == "valid")


def clean(text: str) -> str:
    """Composed Unicode (NFC), plain line ends, no control characters but newline and tab."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


# --- the files of the demo -----------------------------------------------------------------------


def prepare(out: Path) -> None:
    """Texts, vocabulary, streams and mixtures of the demo, in `out`."""
    train = {source: list(documents(source, "train")) for source in SOURCES}
    # The vocabulary sees each source in its share of the mixture.
    sample = []
    for source, share in PUBLISHED.items():
        size, left = len(PUBLISHED) * share, 200_000
        for text in Random(source).sample(train[source], len(train[source])):
            if left <= 0:
                break
            sample.append(text)
            left -= len(text) / size
    tokenizer.save(tokenizer.train(sample, VOCAB_SIZE), out / "ranks.tiktoken")
    (out / "texts").mkdir(exist_ok=True)
    for split in ("train", "valid"):
        file = out / "texts" / f"{split}.jsonl"
        with open(file, "w", encoding="utf-8") as f:
            for source in SOURCES:
                for text in train[source] if split == "train" else documents(source, split):
                    f.write(json.dumps({"source": source, "text": text}) + "\n")
        options = Options(split_by=("source",))
        ranks = tokenizer.load(out / "ranks.tiktoken")
        tokenize([file], ranks, out / split, options, overwrite=True)
    for name, weights in (MIXTURES | {"validation": PUBLISHED}).items():
        split = "valid" if name == "validation" else "train"
        rows = [{"name": n, "path": f"{split}.{n}", "weight": w} for n, w in weights.items()]
        if name == "validation":  # a loss for each language
            rows = [row | {"language": row["name"]} for row in rows]
        write_mixture(out / f"{name}.csv", rows)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m data.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo_data"), help="folder to write")
    prepare(parser.parse_args(argv).out)


if __name__ == "__main__":
    run_cli(main, DataError)
