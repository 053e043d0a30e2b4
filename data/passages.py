"""Documents in which much can be told only by who finds it again further up.

    python -m data.passages [en=FILES fr=FILES ...] --out out/miniature_data

The data of `make miniature`. Sentences of real text, lines of words drawn from it, and between them
facts, questions about facts above, and quotations of what was said above:

    The code of Cairo is k7Qx+b2Rt.
    ... text ...
    Question: What is the code of Cairo?
    Answer: k7Qx+b2Rt

A code is drawn anew for each document: nothing but the fact tells it. Documents called `echo` are
a code over and over, or several in any order: the shortest way to learn to look back. Without them
a model this small needs many times as many tokens before it begins to.

For each language there are passages about as long as the main phase's sequences, `short`, and as
the extension's, `long`, and from a fortieth of the text others to validate with; the vocabulary;
mixtures, three fifths of them echoes, the languages in equal parts; and for `eval.needle`
needles.json, of places and codes that no document has, and haystack/LANGUAGE.txt, text that was
held out. A language without files takes the sentences of `make demo`.
"""

import argparse
import json
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from tqdm import tqdm

from config.cli import ConfigError, Parser, run_cli
from data import bpe_training, demo_corpus, tokenizer
from data.dataset import DataError
from data.prepare import tokenize, write_mixture
from data.reading import find_files, read_documents
from data.workers import Options

LANGUAGES = demo_corpus.LANGUAGES
VOCAB_SIZE = 1024
SIZES = {"short": 900, "long": 3_600}  # characters of a document, on average
CHARACTERS = 2_000_000  # of a language and kind
VALID = 60_000
HELD_OUT = 8  # countries at the end of the table, whose capitals the needle test asks for
ECHO = 0.6  # their share of the tokens to train on
CHARACTERS_OF_CODES = string.ascii_letters + string.digits + "+-/="
BORDER = re.compile(r"(?<=[.!?…])\s+|\n+")  # between sentences
FORMS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
Document = list[str]  # its sentences


def sentences(texts: Iterable[str]) -> Iterator[Document]:
    """The sentences of each text that has at least three of common length."""
    for text in texts:
        found = [s.strip() for s in BORDER.split(text)]
        found = [s for s in found if 20 <= len(s) <= 300]
        if len(found) >= 3:
            yield found


def places(language: str) -> tuple[list[str], list[str]]:
    """Capitals: (those of the passages, those of the needle test)."""
    found = [row[f"{language}_capital"] for row in demo_corpus.countries()]
    return found[:-HELD_OUT], found[-HELD_OUT:]


def needles() -> dict[str, dict]:
    """For `eval.needle --needles`: the same sentences, about places and codes never trained on."""
    rng, found = Random("needles"), {}
    for language, form in FORMS.items():
        codes = {place: code(rng, 8, 8) for place in places(language)[1]}
        found[language] = {"fact": form["fact"][0], "question": form["question"][0]}
        found[language]["needles"] = codes
    return found


def words_of(text: list[Document]) -> list[str]:
    """Every word of three letters or more, once, in the order of the alphabet."""
    found = {word for document in text for sentence in document for word in sentence.split()}
    stripped = (word.strip(".,;:!?()«»\"'") for word in found)
    return sorted({word for word in stripped if len(word) > 2 and word.isalpha()})


def code(rng: Random, fewest: int, most: int) -> str:
    return "".join(rng.choices(CHARACTERS_OF_CODES, k=rng.randint(fewest, most)))


def line(words: list[str], rng: Random, fewest: int, most: int) -> str:
    return " ".join(rng.choices(words, k=rng.randint(fewest, most)))


def passage(language: str, text: list[Document], words: list[str], size: int, rng: Random) -> str:
    """A document of `size` characters, or up to a question or a few sentences more."""
    form, (left, _) = FORMS[language], places(language)
    rng.shuffle(left)
    facts: list[tuple[int, dict[str, str]]] = []
    said: list[str] = []
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        draw = rng.random()
        if left and (draw < 0.25 or not facts):
            known = {"place": left.pop(), "answer": code(rng, 6, 10)}
            facts.append((rng.randrange(2), known))
            parts.append(form["fact"][facts[-1][0]].format_map(known))
        elif draw < 0.7:
            kind, known = rng.choice(facts)
            question = form["question"][kind].format_map(known)
            parts.append(f"\n{question} {known['answer']}")
        elif said and draw < 0.88:
            parts.append(f"« {rng.choice(said)} »")
        else:
            if rng.random() < 0.3:
                document, count = rng.choice(text), rng.randint(1, 3)
                start = rng.randrange(max(1, len(document) - count))
                said.append(" ".join(document[start : start + count]))
            else:
                said.append(line(words, rng, 6, 16))
            parts.append(said[-1])
    return "\n".join(parts) + "\n"


def echo(size: int, rng: Random) -> str:
    """Lines of one code, or of two to four in any order, up to `size` characters."""
    codes, made = [code(rng, 6, 20) for _ in range(rng.choice((1, 1, 1, 2, 3, 4)))], ""
    while len(made) < size:
        made += rng.choice(codes) + "\n"
    return made


def documents(
    language: str, text: list[Document], kind: str, characters: int, rng: Random
) -> Iterator[str]:
    """Those of a kind (short, long, echo), `characters` in all or a little more."""
    words = words_of(text)
    while characters > 0:
        if kind == "echo":
            made = echo(rng.randint(300, 900), rng)
        else:
            size = rng.randint(SIZES[kind] // 2, SIZES[kind] * 3 // 2)
            made = passage(language, text, words, size, rng)
        characters -= len(made)
        yield made


def read(given: list[str]) -> dict[str, list[Document]]:
    """{language: documents} of LANGUAGE=FILES arguments, and of the demo for other languages.

    Raises ConfigError for a language that is not one of the five, DataError for too little text.
    """
    named: dict[str, list[str]] = {}
    for text in given:
        language, _, files = text.partition("=")
        if language not in LANGUAGES or not files:
            raise ConfigError(f"{text}: write LANGUAGE=FILES, the language {', '.join(LANGUAGES)}")
        named.setdefault(language, []).append(files)
    found = {}
    for language in LANGUAGES:
        files = named.get(language)
        texts = (
            read_documents(find_files(files)) if files else demo_corpus.documents(language, "train")
        )
        found[language] = list(sentences(texts))
        if len(found[language]) < 80:
            raise DataError(
                f"{language}: {len(found[language])} documents of three sentences or more; at "
                "least 80 are needed"
            )
    return found


def write(text: dict[str, list[Document]], out: Path) -> dict[str, int]:
    """Vocabulary, streams and mixtures in `out`; the tokens of each stream to train on."""
    (out / "texts").mkdir(parents=True, exist_ok=True)
    held_out, kept = {}, {}
    for language, known in text.items():
        known = Random(language).sample(known, len(known))
        cut = len(known) // 40
        held_out[language], kept[language] = known[:cut], known[cut:]
    train = _write_texts(kept, out / "texts/train.jsonl", (*SIZES, "echo"), CHARACTERS)
    valid = _write_texts(held_out, out / "texts/valid.jsonl", tuple(SIZES), VALID)

    made = list(read_documents([train]))
    ranks = bpe_training.train(Random(0).sample(made, len(made) // 10), VOCAB_SIZE)
    tokenizer.save(ranks, out / "ranks.tiktoken")
    encoder, by_source = tokenizer.load(out / "ranks.tiktoken"), Options(split_by=("source",))
    report = tokenize([train], encoder, out / "train", by_source)
    tokenize([valid], encoder, out / "valid", by_source)
    for kind in SIZES:
        parts = dict.fromkeys((f"{language}_{kind}" for language in text), 1.0)
        write_mixture(out / f"valid_{kind}.csv", parts, "valid.{}")
        weight = round(ECHO / (1 - ECHO), 6)
        parts |= dict.fromkeys((f"{language}_echo" for language in text), weight)
        write_mixture(out / f"train_{kind}.csv", parts, "train.{}")
    (out / "haystack").mkdir(exist_ok=True)
    for language, known in held_out.items():
        hay = "\n\n".join(" ".join(document) for document in known)
        (out / "haystack" / f"{language}.txt").write_text(hay + "\n", encoding="utf-8")
    asked = json.dumps(needles(), ensure_ascii=False, indent=1)
    (out / "needles.json").write_text(asked + "\n", encoding="utf-8")
    return {name: stream["tokens"] for name, stream in report["streams"].items()}


def _write_texts(
    text: dict[str, list[Document]], file: Path, kinds: tuple[str, ...], characters: int
) -> Path:
    """A JSON line for each document; returns the file."""
    with (
        open(file, "w", encoding="utf-8") as f,
        tqdm(total=len(text) * len(kinds), desc=file.stem, unit=" streams") as bar,
    ):
        for language, known in text.items():
            for kind in kinds:
                rng = Random(f"{file.stem} {language} {kind}")
                for made in documents(language, known, kind, characters, rng):
                    record = {"source": f"{language}_{kind}", "text": made}
                    f.write(json.dumps(record, ensure_ascii=False) + "\n")
                bar.update()
    return file


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="data.passages", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("texts", nargs="*", metavar="LANGUAGE=FILES", help="a file, folder or glob")
    parser.add_argument("--out", type=Path, default=Path("out/miniature_data"))
    args = parser.parse_args(argv)
    for name, count in write(read(args.texts), args.out).items():
        print(f"{name}: tokens {count:,}")


if __name__ == "__main__":
    run_cli(main, DataError)
