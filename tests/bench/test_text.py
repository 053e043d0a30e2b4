import json

import pytest
from text_cases import lucie_json

from bench import text as bench
from config.cli import ConfigError
from data.dataset import DataError
from data.tokenizer import Tokenizer

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts and a tokenizer of Lucie's form."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tokenizer.json").write_text(json.dumps(lucie_json()))
    texts = [f"Ligne {n} (un)\n\nl'e\u0301te\u0301 🙂\x0c\n" * (n + 1) for n in range(30)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in [*texts, "a <s> b", "", " "])
    (folder / "texts.jsonl").write_text(lines)
    return folder


def run(folder, command, *more):
    return bench.main([command, str(folder), str(folder / "texts.jsonl"), "--repeats=1", *more])


@pytest.mark.parametrize("command", ["tokenizer", pytest.param("prepare", marks=pytest.mark.slow)])
def test_the_table_has_a_rate_for_each_and_equal_tokens(folder, command, capsys):
    if command == "prepare":
        pytest.importorskip("datasets")
    assert run(folder, command, "--processes=1") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "30 documents" in head and len(rows) == {"tokenizer": 4, "prepare": 2}[command]
    for row in rows:
        rate, ratio = row[30:].split()[0], row[30:].split()[2]
        assert float(rate) >= 0 and ratio.endswith("x")


def test_other_tokens_are_exit_code_1(folder, capsys, monkeypatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *args: encode(*args)[1:])
    assert run(folder, "tokenizer") == 1
    assert "the numbers of tokens differ" in capsys.readouterr().out


def test_bad_input_is_one_line(folder):
    (folder / "empty.txt").write_text("")
    with pytest.raises(DataError, match="hold no text"):
        bench.main(["tokenizer", str(folder), str(folder / "empty.txt")])
    with pytest.raises(ConfigError, match="--repeats"):
        run(folder, "prepare", "--megabytes=0")
