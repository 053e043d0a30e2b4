"""Tokens per word and bytes per token, against the tokenizers themselves and against counting."""

import csv
import gzip
import json

import numpy as np
import pytest
from conftest import SHARED, needs_shared

from config.cli import ConfigError
from data import fertility, tokenizer
from data.dataset import DataError
from data.fertility import Fertility, compare, load_counter, read_text


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
    """What is printed."""
    fertility.main(list(map(str, args)))
    return capsys.readouterr().out


def test_a_vocabulary_of_bytes_has_one_byte_a_token(folder, capsys):
    out = run(
        capsys,
        *("--texts", f"fr={folder}/fr.jsonl.gz", f"code={folder}/*.py"),
        *("--tokenizers", f"bytes={folder}/bytes.tiktoken", "--csv", folder / "new/out.csv"),
    )
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
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_counter(str(tmp_path))


def test_tiktokens_own(monkeypatch):
    import tiktoken

    def download(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", download)
    with pytest.raises(DataError, match="tiktoken:gpt2: not cached"):
        load_counter("tiktoken:gpt2")
    with pytest.raises(DataError, match=r"tiktoken:gpt: there is .*gpt2"):
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


def test_the_chart(tmp_path, monkeypatch):
    """A group of bars for each text, and in it a bar and a colour for each tokenizer."""
    figures = pytest.importorskip("matplotlib.figure")
    from matplotlib.image import imread

    drawn, savefig = [], figures.Figure.savefig

    def saving(figure, *args, **options):
        drawn.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(figures.Figure, "savefig", saving)
    found = [
        Fertility("a", "en", 1, 100, 500, 100),
        Fertility("a", "fr", 1, 100, 500, 400),
        Fertility("b", "en", 1, 100, 500, 200),
        Fertility("b", "fr", 1, 100, 500, 200),
    ]
    fertility.draw(found, tmp_path / "f.png")
    expected = {
        "tokens per word (lower is better)": {"a": [1, 4], "b": [2, 2]},
        "bytes per token (higher is better)": {"a": [5, 1.25], "b": [2.5, 2.5]},
    }
    colors = []
    for axes, (title, heights) in zip(drawn[0].axes, expected.items()):
        assert axes.get_title(loc="left") == title
        assert [label.get_text() for label in axes.get_xticklabels()] == ["en", "fr"]
        groups = axes.containers
        assert {bars.get_label(): [bar.get_height() for bar in bars] for bars in groups} == heights
        numbers = [text.get_text() for text in axes.texts]
        assert numbers == [f"{value:.2f}" for values in heights.values() for value in values]
        for at, tick in enumerate(axes.get_xticks()):
            a, b = (bars[at] for bars in groups)
            assert a.get_x() + a.get_width() == pytest.approx(b.get_x()) == tick  # side by side
        colors.append([bars[0].get_facecolor()[:3] for bars in groups])
    assert colors[0] == colors[1] and colors[0][0] != colors[0][1]
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["a", "b"]
    image = imread(tmp_path / "f.png")[..., :3]
    for color in colors[0]:
        assert (abs(image - color).max(axis=-1) < 0.02).mean() > 0.05


def test_twenty_tokenizers_have_a_color_each(tmp_path):
    imread = pytest.importorskip("matplotlib.image").imread
    found = [Fertility(f"t{k}", "en", 1, 100, 500, 100) for k in range(20)]
    fertility.draw(found, tmp_path / "f.png")
    pixels = (imread(tmp_path / "f.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    kinds, counts = np.unique(pixels, axis=0, return_counts=True)
    colored = kinds.max(axis=1) - kinds.min(axis=1) > 20
    assert (colored & (counts > 1000)).sum() >= 18  # of tab20 two are grey


def test_texts_are_cleaned_and_of_the_field_asked_for(tmp_path):
    """Halves of UTF-16 pairs, which no tokenizers library takes, and NUL characters."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "a.jsonl").write_text(r'{"text": "", "body": "a\ud83d\ude42 \ud800\u0000"}')
    args = ["--texts", f"x={tmp_path}/a.jsonl", "--text_field=body"]
    args += ["--tokenizers", f"words={tmp_path}/words.json", "--csv", f"{tmp_path}/f.csv"]
    fertility.main(args)
    # a, an emoji of four bytes, a space, U+FFFD of three
    assert (tmp_path / "f.csv").read_text().splitlines()[1].startswith("words,x,1,2,9,1,")


@pytest.mark.parametrize(
    "texts, tokenizers, said",
    [
        ("fr=none.txt", "{0}/bytes.tiktoken", "none.txt: not a folder"),
        ("fr={0}/fr.jsonl.gz", "none.json", "none.json: No such file"),
        ("fr={0}/fr.jsonl.gz", "{0}/a.py", "a.py"),
        ("fr=", "{0}/bytes.tiktoken", "fr=: write --texts NAME=PATH"),
        ("fr={0}/empty.txt", "{0}/bytes.tiktoken", "empty.txt: no words"),
    ],
)
def test_what_cannot_be_compared_says_so_in_one_line(folder, texts, tokenizers, said):
    (folder / "empty.txt").write_text(" \n")
    with pytest.raises((ConfigError, DataError), match=said) as error:
        fertility.main(["--texts", texts.format(folder), "--tokenizers", tokenizers.format(folder)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("megabytes", ["inf", "nan", "0", "-1"])
def test_megabytes_that_are_no_size(folder, megabytes):
    args = ["--texts", f"{folder}/fr.jsonl.gz", "--tokenizers", f"{folder}/bytes.tiktoken"]
    with pytest.raises(ConfigError, match=r"^--megabytes:? must be (over 0$|a number)"):
        fertility.main([*args, f"--megabytes={megabytes}"])


def test_a_text_that_a_tokenizer_gives_up_on_is_named(folder):
    """tiktoken's regex has no stack for a million spaces in a row."""
    with open(folder / "long.jsonl", "w") as f:
        for text in ("short", "code" + " " * 1_100_000 + "x"):
            f.write(json.dumps({"text": text}) + "\n")
    args = ["--texts", f"code={folder}/long.jsonl", "--tokenizers", f"b={folder}/bytes.tiktoken"]
    with pytest.raises(DataError, match=r"^code, document 2: b cannot cut it: .*stack"):
        fertility.main(args)


def test_a_name_is_given_once(folder):
    twice = [f"x={folder}/bytes.tiktoken"] * 2
    with pytest.raises(ConfigError, match="each with a name of its own"):
        fertility.main(["--texts", f"{folder}/fr.jsonl.gz", "--tokenizers", *twice])
    with pytest.raises(ConfigError):
        fertility._named(["=x"], "texts")
