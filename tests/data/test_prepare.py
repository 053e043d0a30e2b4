"""The commands of data.prepare."""

import csv
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_streams import OURS, RANKS, documents_of, json_lines, write

from config.cli import run_cli
from data import files, prepare, tokenizer
from data.dataset import DataError, Mixture, read_rows
from data.files import find_files, read_documents
from data.streams import clean

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m data.prepare ARGS`, and returns (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            run_cli(prepare.main, DataError)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """600 documents in French, 300 in English, 40 files of code, and a ranks file."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices("aeiourstlnmd", k=rng.randint(1, 6))) for _ in range(200)]
    for name, count in (("fr", 600), ("en", 300)):
        sizes = [n * n % 67 for n in range(count)]
        texts = [f"{name} {n}\0 {' '.join(rng.choices(words, k=k))}" for n, k in enumerate(sizes)]
        write(folder / f"{name}.jsonl.gz", gzip.compress(json_lines(texts, language=name)))
    for n in range(40):
        write(folder / f"src/{'deep/' * (n % 2)}{n}.py", f"code {n}\n" * (n % 50 + 1))
    tokenizer.save(RANKS, folder / "r.tiktoken")
    write(folder / "blank.md", b" \0\n")
    write(folder / "empty.md", b"")
    return folder


def test_tokens_are_made_and_the_same_command_again_does_nothing(folder, tmp_path, command):
    bad = write(tmp_path / "bad.jsonl", b'{"text": "\xff"}\n')
    args = ["tokens", f"{folder}/*.gz", bad, "--tokenizer", folder / "r.tiktoken", "--processes=2"]
    args += ["--out", tmp_path / "d", "--split-by=language", "--validation=0.1", "--on_error=skip"]
    call = dict(capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-m", "data.prepare", *args], **call)
    for code, out, err in ((0, done.stdout, done.stderr), command(*args)):
        assert code == 0 and "documents 900 of 901; left out: error 1, empty 0;" in out
        assert re.search(r"^d\.fr\.valid: documents \d+, tokens [\d,]+$", out, re.MULTILINE)
        assert re.search(r"^left out: .*bad\.jsonl, line 1: not UTF-8", err, re.MULTILINE)
    assert "whole documents are held out" in done.stderr and "already up to date" in err


TOKENS = ("tokens", "{0}/fr.jsonl.gz", "--tokenizer={0}/r.tiktoken", "--out={0}/y", "--processes=1")
SHARES = ("vocabulary", "{0}/fr.jsonl.gz", "{0}/en.jsonl.gz", "--out={0}/y", "--shares", "0.5")


@pytest.mark.parametrize(
    "args, said",
    [
        ((*TOKENS, "--validation=1"), "a share from 0 to under 1, not 1.0"),
        ((*TOKENS, "--text_field=b"), "fr.jsonl.gz, line 1: no field 'b' (--on_error skip"),
        ((*TOKENS, "--out=/"), "--out /: must end in a name"),
        ((*TOKENS, "--split_length=0"), "--processes and --split_length must be 1 or more"),
        (("tokens", "{0}/blank.md", *TOKENS[2:]), "y: no document was kept; left out: error 0,"),
        ((*SHARES, "0.5", "--out={0}/src"), "src: is a folder"),
        (SHARES, "--shares has a number over 0 for each of the inputs"),
        (("vocabulary", "{0}/empty.md", *SHARES[2:], "0.5"), "empty.md: no text"),
    ],
)
def test_a_wrong_command_is_one_line(folder, command, args, said):
    pytest.importorskip("tokenizers")
    code, _, err = command(*(arg.format(folder) for arg in args))
    lines = [line for line in err.splitlines() if line.startswith("prepare: ")]
    assert code == 2 and len(lines) == 1 and said.format(folder) in lines[0], err
    assert "Traceback" not in err and not list(folder.glob("y*.*n"))


def test_a_vocabulary_is_learnt_from_texts_in_their_shares(folder, tmp_path, command, monkeypatch):
    pytest.importorskip("tokenizers")
    paths = {f"{folder}/fr.jsonl.gz": 5, f"{folder}/en.jsonl.gz": 3, f"{folder}/src/**/*.py": 2}
    texts = {path: list(map(clean, read_documents(find_files([path])))) for path in paths}
    sizes = {path: sum(len(text) for text in texts[path]) for path in paths}
    most = min(sizes[path] / share for path, share in paths.items())
    sample, train = [], tokenizer.train

    def listening(texts, vocab_size):
        sample[:] = texts
        return train(sample, vocab_size)

    monkeypatch.setattr(tokenizer, "train", listening)
    args = ["vocabulary", "--vocab_size=280", f"--out={tmp_path}/new/r"]
    shares = ["--shares", *paths.values()]
    code, out, err = command(*args, *paths, *shares)
    assert code == 0 and f"{tmp_path}/new/r: 280 tokens" in out, err
    assert len(set(sample)) == len(sample)
    for path, share in paths.items():
        keep = share * most / sizes[path]
        variance = sum(len(text) ** 2 for text in texts[path]) * max(0, keep * (1 - keep))
        drawn = sum(len(text) for text in sample if text in texts[path])
        assert abs(drawn - share * most) <= 5 * variance**0.5 + 1e-6, path
    ranks = tokenizer.load(tmp_path / "new/r").bpe.ranks
    assert ranks == train(sample, 280)
    # Without shares all is read.
    bad = write(tmp_path / "bad.jsonl", b"{")
    code, _, err = command(*args, f"{folder}/fr*.gz", bad, "--on_error=skip")
    assert code == 0 and re.search(r"^left out: .*bad.jsonl, line 1: not JSON", err, re.MULTILINE)
    assert sample == texts[f"{folder}/fr.jsonl.gz"]


# --- the data of a run


PUBLISHED = {"en": 33.19, "fr": 32.35 - 0.37, "code": 14.67, "de": 6.90, "es": 6.62, "it": 3.77}
SMALL = Path("data/mixtures/small.csv").resolve()

# Fewer tokens, shorter samples, and a folder in place of the hub: STAND_IN.py FOLDER ARGS...
STAND_IN = """
import sys
import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from config.cli import run_cli
from data import prepare, streams
from data.dataset import DataError

FOLDER = sys.argv.pop(1)

class Hub(DirFileSystem):
    protocol, cachable = "hf", False

    def __init__(self, **options):
        super().__init__(FOLDER, LocalFileSystem(), **options)

fsspec.register_implementation("hf", Hub, clobber=True)
prepare.FEWEST, streams.SAVE_EVERY, streams.BATCH_BYTES = 600, 0, 1 << 14
prepare.SAMPLES.update(pretraining=128, extension=300, annealing=300)
if __name__ == "__main__":
    run_cli(prepare.main, DataError)
"""


def stand_in(folder, tokens, files=3):
    """folder/list.csv, the list with lines of JSON in place of one table, and folder/hub, where its
    files are, with the data set's layout and columns and half more text than is needed: words, in
    documents of 20 to 1,100 bytes."""
    text = SMALL.read_text().replace("open-web-math/data/*.parquet", "open-web-math/data/*.jsonl")
    (folder / "list.csv").write_text(text)
    rows = list(csv.DictReader(text.splitlines()))
    chance, words = random.Random(0), [f"w{n}" for n in range(900)]
    for row in rows:
        lacking = max(600, tokens * (float(row["pretraining"]) + 0.05 * float(row["annealing"])))
        place = row["files"].removeprefix("hf://").replace("/v*/", "/v1.1/")
        for number in range(files):
            texts, size = [], 0
            while size < 1.5 * lacking / files + 1500:
                texts.append(" ".join(chance.choices(words, k=chance.randint(5, 220))))
                size += len(texts[-1])
            facts = {"source": row["name"], "language": row["language"], "url": "", "extra": "{}"}
            documents = [{**facts, "id": str(n), "text": text} for n, text in enumerate(texts)]
            part = f"{number:03}" if "-*" in place else f"a--{number:03}"
            file = folder / "hub" / place.replace("*", part)
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".jsonl":
                file.write_text("".join(json.dumps(document) + "\n" for document in documents))
            else:
                pq.write_table(pa.Table.from_pylist(documents), file)
    return rows


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(the stand-in, the script that has it for the hub, the rows of its list)."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "stand_in.py").write_text(STAND_IN)
    rows = stand_in(folder, 1e6)
    lucies = folder / "hub/OpenLLM-France/Lucie-7B"
    tokenizer.save_folder(OURS, lucies)  # where the command looks for the released one
    return folder, rows


def made(hub, out, *more, processes=1, listed=None):
    folder, _ = hub
    args = [sys.executable, folder / "stand_in.py", folder / "hub"]
    args += ["mixture", listed or folder / "list.csv"]
    args += ["--out", out, "--tokens", "1e6", "5e4"]
    args += ["--processes", processes, "--validation", "0.05", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(list(map(str, args)), env=environment, **pipes)


def test_the_list_has_the_published_shares():
    listed = prepare.read_list(SMALL)
    by_language = Counter()
    for row in listed:
        by_language[row.language] += 100 * row.pretraining
    assert sum(by_language.values()) == pytest.approx(100)
    for language, share in PUBLISHED.items():
        assert by_language[language] == pytest.approx(share, abs=0.2), language
    names = {row.name: row for row in listed}
    main = {row["name"]: row for row in read_rows("data/mixtures/pretraining.csv")}
    for name in ("PeS2o", "RedPajama--fr--2019", "TheStack--c#", "Pile--FreeLaw"):
        # without Persee and Stac, which are not public or too small, others are a bit larger
        assert names[name].pretraining == pytest.approx(main[name]["weight"] / 0.99631, rel=1e-4)
    annealing = {row["name"]: row["weight"] for row in read_rows("data/mixtures/annealing.csv")}
    for name in ("PeS2o", "MathPile", "Wikipedia--fr"):
        assert names[name].annealing == pytest.approx(annealing[name] / 0.65, rel=1e-4)


def test_a_run_gets_its_data_in_the_shares_of_the_list(hub, tmp_path):
    """From a stand-in for the hub: every pattern of the list finds its files, the tokens written
    are those needed, and mixtures draw from sources and from long documents as they should."""
    out = tmp_path / "out"
    process = made(hub, out)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = hub[1]
    wanted = {r["name"]: 1e6 * float(r["pretraining"]) + 5e4 * float(r["annealing"]) for r in rows}
    wanted = {name: max(600, tokens) for name, tokens in wanted.items()}
    report = json.loads((out / "tokens.json").read_text())
    taken = Counter()
    for name, stream in report["streams"].items():
        source = re.fullmatch(r"tokens\.(.*?)\.(short|long)(\.valid)?", name)
        if not stream["held_out"]:
            taken[unquote(source[1])] += stream["tokens"]
    assert taken.keys() == wanted.keys()
    for name, tokens in wanted.items():
        assert abs(taken[name] - tokens) <= 1102 / 2, name  # its last document is whole
        share = taken[name] / sum(taken.values())
        assert share == pytest.approx(tokens / sum(wanted.values()), abs=1e-3)
    wanted, found = (
        {n: 100 * v / sum(of.values()) for n, v in of.items()} for of in (wanted, taken)
    )
    furthest = max(wanted, key=lambda name: abs(wanted[name] - found[name]))
    name, apart = re.search(r"furthest from its share: (\S+), by ([\d.]+)% of all", said).groups()
    # The command rounds each need up to a token.
    assert name == furthest
    assert float(apart) == pytest.approx(abs(wanted[name] - found[name]), abs=0.02)
    english = [row["name"] for row in rows if row["language"] == "en"]
    printed = re.search(r"\nen +([\d.]+)% +([\d.]+)%\n", said).groups()
    expected = [sum(of[name] for name in english) for of in (wanted, found)]
    assert list(map(float, printed)) == pytest.approx(expected, abs=0.02)
    assert f"\n{sum(taken.values()):,} tokens of " in said and "hours of 1 processes" in said
    phases = {"pretraining": "pretraining", "extension": "pretraining", "annealing": "annealing"}
    mixtures = {phase: read_rows(out / f"{phase}.csv") for phase in phases}
    for phase, column in phases.items():
        found = Counter()
        for row in mixtures[phase]:
            found[row["name"].rpartition("--")[0]] += row["weight"]
        shares = {row["name"]: float(row[column]) for row in rows if float(row[column])}
        assert found.keys() <= shares.keys() and len(found) > 0.9 * len(shares)
        for name in found:
            assert found[name] == pytest.approx(shares[name], abs=1e-6), (phase, name)
        Mixture(out / f"{phase}.csv", prepare.SAMPLES[phase] // 128, 1, 260)
    ratio = {}
    for phase in ("pretraining", "extension"):
        weights = {row["name"]: row["weight"] for row in mixtures[phase]}
        ratio[phase] = weights["PeS2o--long"] / weights["PeS2o--short"]
    assert ratio["extension"] == pytest.approx(10 * ratio["pretraining"])
    languages = {row["name"]: row["weight"] for row in read_rows(out / "validation.csv")}
    assert languages.keys() == {*PUBLISHED, "parallel"}
    assert languages["fr"] == pytest.approx(0.3210, abs=1e-3)
    held = Mixture(out / "validation.csv", 64, 1, 260)
    assert sorted(held.languages) == sorted(languages)
    held_out = sum(s["tokens"] for s in report["streams"].values() if s["held_out"])
    assert sum(stream.tokens for stream in held.streams) == held_out > 5000
    documents = documents_of(out / "valid.fr")
    ends = {(document[0], document[-1], min(document[1:-1]) > 3) for document in documents}
    assert len(documents) > 10 and ends == {(0, 1, True)}
    assert tokenizer.load(out / "tokenizer.json").vocab_size == 260


def test_the_data_of_a_run_is_the_same_for_any_processes_and_interruptions(hub, tmp_path):
    """The run is killed as soon as it has noted down a few files, again and again."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert made(hub, whole, processes=2).communicate() and (whole / "validation.csv").exists()
    kills = 0
    for wait in (5, 60, 150):
        process = made(hub, out)
        progress = out / "tokens.unfinished/progress.json"
        while process.poll() is None:
            with suppress(OSError, ValueError):
                if json.loads(progress.read_text())["files_done"] >= wait:
                    process.kill()
                    kills += 1
                    break
            time.sleep(0.005)
        process.communicate()
    done = made(hub, out)
    _, errors = done.communicate()
    assert done.returncode == 0 and kills == 3 and "input files are done; going on" in errors
    files = {
        file.name: file.read_bytes() for file in whole.iterdir() if not file.name.startswith(".")
    }
    assert {f.name: f.read_bytes() for f in out.iterdir() if not f.name.startswith(".")} == files
    assert "tokens: already up to date" in made(hub, out).communicate()[1]
    process = made(hub, out, "--tokens", "2e6", "5e4")
    assert "was made from other inputs or options" in process.communicate()[1]
    assert process.returncode == 2


def test_what_the_data_of_a_run_lacks_is_one_line(hub, tmp_path):
    listed = tmp_path / "list.csv"
    text = (hub[0] / "list.csv").read_text()
    for change, told in (
        (text.replace("natural/fr/HAL", "natural/fr/HAl"), "no files of HAL: mend"),
        (text.replace(",annealing,", ",rest,"), "a list of sources has the columns name, language"),
        (text.replace("0.0", "-0.0", 1), "shares of 0 or more"),
        (text + "HAL,fr,web,0.1,0", "a list of sources has the columns name, language"),
    ):
        listed.write_text(change)
        process = made(hub, tmp_path / "out", listed=listed)
        _, errors = process.communicate()
        assert process.returncode == 2 and told in errors and errors.count("\n") == 1
    process = made(hub, tmp_path / "out", "--tokens", "1e15", "1e15")
    assert "free some, or lower --tokens" in process.communicate()[1]


def test_a_source_is_spread_over_its_files(tmp_path):
    """Over eight at equal distances first; the others, in order, make up what these lack."""
    for number in range(20):
        write(tmp_path / f"{number:02}.txt", "text")
    listed = prepare.Listed("x", "fr", "web", 1.0, 0.0, f"{tmp_path}/*.txt")
    found, dues = prepare.files_of([listed], [1001])
    order = [int(file.stem) for file in found]
    assert order[:8] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert order[8:] == [n for n in range(20) if n not in order[:8]]
    assert [due.tokens for due in dues] == [126, 251, 376, 501, 626, 751, 876, *13 * [1001]]
    assert {due.source for due in dues} == {"x"}


def test_of_a_large_table_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """pandas writes one group of rows, which pyarrow would fetch as a whole."""
    chance = random.Random(0)
    texts = [chance.randbytes(2000).hex() for _ in range(4000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=10**6)
    whole = (tmp_path / "x.parquet").stat().st_size
    read, plain = [], io.FileIO.readinto

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read.append(plain(self, buffer))
            return read[-1]

    monkeypatch.setattr(files, "open", lambda file, *_: Counted(file), raising=False)
    some = files.records(tmp_path / "x.parquet", ["text"])
    assert [next(some).content["text"] for _ in range(10)] == texts[:10]
    assert whole > 8e6 and sum(read) < 0.4 * whole
