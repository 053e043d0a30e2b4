import json

import pytest
from text_cases import lucie_json

from bench import tokenizer as bench
from data.dataset import DataError
from data.tokenizer import Tokenizer

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tokenizer.json").write_text(json.dumps(lucie_json()))
    texts = [f"Ligne {n} (un)\n\nl'été 🙂\n" * 20 for n in range(50)] + ["a <s> b", ""]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    return folder


def test_the_table_has_a_rate_for_each(files, capsys, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # restored after
    bench.main([str(files), str(files / "texts.jsonl")])
    out = capsys.readouterr().out.splitlines()
    assert "50 documents, 2,000 lines" in out[0] and "every id the same" in out[0]
    rows = [
        "ours, encode ",
        "ours, encode_document ",
        "tokenizers, encode ",
        "tokenizers, encode_batch ",
    ]
    rows += ["tokenizers, encode_batch_fast "]
    rows += ["tokenizers, encode_batch, ", "tokenizers, encode_batch_fast, "]
    assert len(out) == 2 + len(rows)
    for row, line in zip(rows, out[2:]):
        assert line.startswith(row)
        rates = [float(word) for word in line.split() if word.replace(".", "").isdigit()]
        assert min(rates[-2:]) > 0


def test_a_difference_is_an_error(files, capsys, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *args: [i + (i > 300) for i in encode(*args)])
    assert bench.main([str(files), str(files / "texts.jsonl")]) == 1
    assert "ids differ from ours at" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["none", "texts.jsonl"], [".", "none.txt"], [".", "empty.txt"]])
def test_bad_input_is_an_error(files, args):
    (files / "empty.txt").write_text("")
    with pytest.raises(DataError):
        bench.main([str(files / name) for name in args])
