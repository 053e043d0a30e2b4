"""Tokens per word and bytes per token, against the tokenizers themselves and against counting."""

import csv
import gzip
import json

import pytest
from conftest import SHARED, needs_shared

from data import fertility, tokenizer
from data.dataset import DataError
from data.fertility import Fertility, compare, load_counter, read_text
from data.tokenizer import TokenizerError


@pytest.fixture
def folder(tmp_path):
    """A vocabulary of bytes; two documents in French, one of code."""
    tokenizer.save({bytes([k]): k + 4 for k in range(256)}, tmp_path / "bytes.tiktoken")
    with gzip.open(tmp_path / "fr.jsonl.gz", "wt", encoding="utf-8") as f:
        for text in ("Un été à Noël.", "deux mots"):
            f.write(json.dumps({"text": text}) + "\n")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("y = x + 2\n")
    return tmp_path


def run(capsys, *args):
    code = 0
    try:
        fertility.main(list(map(str, args)))
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, "\n".join(x for x in err.replace("\r", "\n").split("\n") if "B/s]" not in x)


def test_a_vocabulary_of_bytes_has_one_byte_a_token(folder, capsys):
    code, out, _ = run(
        capsys,
        *("--texts", f"fr={folder}/fr.jsonl.gz", f"code={folder}/*.py"),
        *("--tokenizers", f"bytes={folder}/bytes.tiktoken", "--csv", folder / "new/out.csv"),
    )
    assert code == 0
    with open(folder / "new/out.csv", newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0][:6] == ["tokenizer", "text", "documents", "words", "bytes", "tokens"]
    # 18 + 9 bytes in 4 + 2 words; 6 + 10 in 3 + 5
    assert rows[1] == ["bytes", "fr", "2", "6", "27", "27", "4.50000", "1.00000"]
    assert rows[2] == ["bytes", "code", "2", "8", "16", "16", "2.00000", "1.00000"]
    lines = [line.split() for line in out.splitlines() if line.startswith("bytes ")]
    assert ["bytes", "4.500", "2.000"] in lines and ["bytes", "1.000", "1.000"] in lines


@needs_shared
def test_lucies_tokens_are_counted_as_its_own_package_does():
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(SHARED / "lucie/tokenizer.json"))
    texts = {k: read_text(str(SHARED / f"corpus/{k}.jsonl.gz"), 50_000) for k in ("fr", "de")}
    found = compare({"lucie": load_counter(str(SHARED / "lucie"))}, texts)
    for row in found:
        documents = texts[row.text]
        tokens = [theirs.encode(text, add_special_tokens=False).ids for text in documents]
        assert row.tokens == sum(map(len, tokens)) and row.documents == len(documents)
        assert row.bytes_per_token == len("".join(documents).encode()) / row.tokens
        assert row.tokens_per_word == row.tokens / sum(len(text.split()) for text in documents)


def test_a_tokenizer_json_that_is_not_ours(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    foreign = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.post_processor = processors.TemplateProcessing("a $A b", None, [("a", 0), ("b", 1)])
    foreign.enable_truncation(2)
    foreign.save(str(tmp_path / "tokenizer.json"))
    assert load_counter(str(tmp_path / "tokenizer.json"))("a b c d e") == 5
    assert load_counter(str(tmp_path))("") == 0
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_counter(str(tmp_path))


def test_tiktokens_own(monkeypatch):
    import tiktoken

    def download(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", download)
    with pytest.raises(TokenizerError, match="tiktoken:gpt2: not cached"):
        load_counter("tiktoken:gpt2")
    with pytest.raises(TokenizerError, match=r"tiktoken:gpt: there is .*gpt2"):
        load_counter("tiktoken:gpt")
    letters = {bytes([k]): k for k in range(256)} | {b"<|end|>": 256}
    pieces = tiktoken.Encoding(
        "letters", pat_str=".", mergeable_ranks=letters, special_tokens={"<|x|>": 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": pieces}.__getitem__)
    assert load_counter("tiktoken:gpt2")("é<|x|>") == 7  # text, and no special token


def test_reading_stops_at_the_limit(folder):
    assert read_text(str(folder / "fr.jsonl.gz"), 18) == ["Un été à Noël."]
    assert len(read_text(str(folder / "fr.jsonl.gz"), 19)) == 2
    assert read_text(str(folder / "*.py"), 10**9) == ["x = 1\n", "y = x + 2\n"]


def test_the_chart(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    # a has 1 and 4 tokens a word, b 2 and 2
    found = [
        Fertility("a", "en", 1, 100, 500, 100),
        Fertility("a", "fr", 1, 100, 500, 400),
        Fertility("b", "en", 1, 100, 500, 200),
        Fertility("b", "fr", 1, 100, 500, 200),
    ]
    fertility.draw(found, tmp_path / "f.png")
    pixels = image.imread(tmp_path / "f.png")[:, :650, :3]
    blue, orange = (
        (abs(pixels - colour).max(axis=-1) < 0.02).sum()
        for colour in ((0.122, 0.467, 0.706), (1.0, 0.498, 0.055))
    )
    assert blue / orange == pytest.approx(5 / 4, rel=0.03)  # 1 + 4 to 2 + 2


@pytest.mark.parametrize(
    "texts, tokenizers, said",
    [
        ("fr=none.txt", "{0}/bytes.tiktoken", "none.txt: no such file"),
        ("fr={0}/fr.jsonl.gz", "none.json", "none.json: No such file"),
        ("fr={0}/fr.jsonl.gz", "{0}/a.py", "a.py"),
        ("fr=", "{0}/bytes.tiktoken", "fr=: write --texts NAME=PATH"),
        ("fr={0}/empty.txt", "{0}/bytes.tiktoken", "empty.txt: no words"),
    ],
)
def test_what_cannot_be_compared_says_so_in_one_line(folder, capsys, texts, tokenizers, said):
    (folder / "empty.txt").write_text(" \n")
    code, _, err = run(
        capsys, "--texts", texts.format(folder), "--tokenizers", tokenizers.format(folder)
    )
    assert code == 2 and said in err and err.strip().count("\n") == 0


def test_a_name_is_given_once(folder, capsys):
    twice = [f"x={folder}/bytes.tiktoken"] * 2
    code, _, err = run(capsys, "--texts", f"{folder}/fr.jsonl.gz", "--tokenizers", *twice)
    assert code == 2 and "each with a name of its own" in err
    with pytest.raises(DataError):
        fertility._named(["=x"], "texts")
