"""Documents in which much can be told only by who finds it again further up.

    python -m data.passages [en=FILES fr=FILES ...] --out out/miniature_data

The data of `make miniature`. Sentences of real text, in their order, and between them facts, the
questions about facts above, and quotations of what was said above:

    The best thing to do in Lima is open a document that has tables.
    ... text ...
    Question: What is the best thing to do in Lima?
    Answer: open a document that has tables

An answer is a run of words from anywhere in the text and belongs to the place in this document
only: nothing but the fact tells it. The sentences are those of the needle test (eval/needles.json),
but neither its places nor its answers are ever seen here.

For each language a stream of documents about as long as the main phase's sequences, `short`, and
one of those of the extension's, `long`, from a fortieth of the text others to validate with; the
vocabulary; mixtures of equal parts. A language without files takes the sentences of `make demo`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from tqdm import tqdm

from data import bpe_training, demo_corpus, tokenizer
from data.dataset import DataError
from data.prepare import tokenize, write_mixture
from data.reading import find_files, read_documents
from data.tokenizer import TokenizerError
from data.workers import Options

LANGUAGES = demo_corpus.LANGUAGES
VOCAB_SIZE = 2048
SIZES = {"short": 900, "long": 4_000}  # characters of a document, on average
TRAIN = {"short": 3_000_000, "long": 3_000_000}  # characters of a language
VALID = 60_000
HELD_OUT = ("Lisbon", "Prague", "Buenos Aires")  # capitals that the needle test asks for
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


def places(language: str) -> list[str]:
    """Capitals, without those of the needle test."""
    rows = demo_corpus.countries()
    return [row[f"{language}_capital"] for row in rows if row["en_capital"] not in HELD_OUT]


def answer(text: list[Document], rng: Random) -> str:
    """Four to nine words that follow one another somewhere in the text."""
    while True:
        words = rng.choice(rng.choice(text)).split()
        count = rng.randint(4, 9)
        if len(words) >= count:
            start = rng.randrange(len(words) - count + 1)
            return " ".join(words[start : start + count]).rstrip(" .,;:!?…")


def passage(language: str, text: list[Document], size: int, rng: Random) -> str:
    """One document of at least `size` characters, or the longest that the places suffice for."""
    form, left = FORMS[language], rng.sample(places(language), len(places(language)))
    facts: list[tuple[int, dict[str, str]]] = []
    said: list[str] = []
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        draw = rng.random()
        if left and (draw < 0.25 or not facts):
            known = {"place": left.pop(), "answer": answer(text, rng)}
            facts.append((rng.randrange(2), known))
            parts.append(form["fact"][facts[-1][0]].format_map(known))
        elif draw < 0.7:
            kind, known = rng.choice(facts)
            parts.append("\n" + form["question"][kind].format_map(known))
        elif said and draw < 0.8:
            parts.append(f"« {rng.choice(said)} »")
        else:
            document, count = rng.choice(text), rng.randint(1, 3)
            start = rng.randrange(max(1, len(document) - count))
            said.append(" ".join(document[start : start + count]))
            parts.append(said[-1])
    return "\n".join(parts) + "\n"


def passages(
    language: str, text: list[Document], kind: str, characters: int, rng: Random
) -> Iterator[str]:
    """Documents of a kind, `characters` in all or a little more."""
    while characters > 0:
        made = passage(language, text, rng.randint(SIZES[kind] // 2, SIZES[kind] * 3 // 2), rng)
        characters -= len(made)
        yield made


def read(given: list[str]) -> dict[str, list[Document]]:
    """{language: documents} of LANGUAGE=FILES arguments, and of the demo for other languages.

    Raises DataError for a language that is not one of the five, or too little text.
    """
    named: dict[str, list[str]] = {}
    for text in given:
        language, _, files = text.partition("=")
        if language not in LANGUAGES or not files:
            raise DataError(f"{text}: write LANGUAGE=FILES, the language {', '.join(LANGUAGES)}")
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
    files = {split: out / "texts" / f"{split}.jsonl" for split in ("train", "valid")}
    for split, file in files.items():
        with (
            open(file, "w", encoding="utf-8") as f,
            tqdm(total=len(LANGUAGES) * len(SIZES), desc=split, unit=" streams") as bar,
        ):
            for language, documents in text.items():
                documents = Random(language).sample(documents, len(documents))
                held_out = len(documents) // 40
                part = documents[:held_out] if split == "valid" else documents[held_out:]
                for kind in SIZES:
                    size = VALID if split == "valid" else TRAIN[kind]
                    rng = Random(f"{split} {language} {kind}")
                    for made in passages(language, part, kind, size, rng):
                        line = {"source": f"{language}_{kind}", "text": made}
                        f.write(json.dumps(line, ensure_ascii=False) + "\n")
                    bar.update()
    made = list(read_documents([files["train"]]))
    ranks = bpe_training.train(Random(0).sample(made, len(made) // 10), VOCAB_SIZE)
    tokenizer.save(ranks, out / "ranks.tiktoken")
    encoder, tokens = tokenizer.load(out / "ranks.tiktoken"), {}
    for split, file in files.items():
        report = tokenize([file], encoder, out / split, Options(split_by=("source",)))
        if split == "train":
            tokens = {name: stream["tokens"] for name, stream in report["streams"].items()}
        for kind in SIZES:
            names = dict.fromkeys((f"{language}_{kind}" for language in text), 1.0)
            write_mixture(out / f"{split}_{kind}.csv", names, f"{split}.{{}}")
    return tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data.passages", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("texts", nargs="*", metavar="LANGUAGE=FILES", help="a file, folder or glob")
    parser.add_argument("--out", type=Path, default=Path("out/miniature_data"))
    args = parser.parse_args(argv)
    try:
        for name, count in write(read(args.texts), args.out).items():
            print(f"{name}: tokens {count:,}")
    except (DataError, TokenizerError) as error:
        print(f"data.passages: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"data.passages: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
