import json

import pytest
from text_cases import lucie_json

from bench import prepare as bench
from bench.prepare import Figures
from config.cli import ConfigError
from data.dataset import DataError
from data.prepare import find_files, read_documents, zstd

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")
if zstd is None:
    pytest.skip("needs backports.zstd", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts and a tokenizer of Lucie's form."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tokenizer.json").write_text(json.dumps(lucie_json()))
    texts = [f"Ligne {n} (un)\n\nl'e\u0301te\u0301 🙂\x0c\n" * (n + 1) for n in range(30)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in [*texts, "a <s> b", "", " "])
    (folder / "texts.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def forms(folder, tmp_path_factory):
    forms = tmp_path_factory.mktemp("forms")
    return forms, *bench.write_forms(find_files([folder / "texts.jsonl"]), forms, 0.05)


def test_the_documents_are_the_same_in_every_form_and_none_is_there_twice(forms):
    folder, count, size = forms
    texts = list(read_documents([folder / "texts.jsonl"]))
    assert len(texts) == len(set(texts)) == count > 60
    assert size == sum(len(text.encode()) for text in texts)
    assert 50_000 <= size < 55_000
    assert not any("<s>" in text or "\x0c" in text or "e\u0301" in text for text in texts)
    for form in bench.FORMS[1:]:
        assert list(read_documents([folder / f"texts.{form}"])) == texts


def test_the_tokens_are_those_of_the_library(folder, forms, tmp_path):
    figures = bench.ours(forms[0] / "texts.parquet", folder, tmp_path, 1)
    encoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = read_documents([forms[0] / "texts.jsonl"])
    assert figures.tokens == sum(len(encoder.encode(text).ids) for text in texts)
    assert figures.seconds > 0 and figures.main > 10


def test_files_without_text_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="the files hold no text"):
        bench.write_forms([tmp_path / "x.jsonl"], tmp_path, 1)


FOUND = {
    "ours, jsonl": [Figures(2.0, 1000, 100, 50), Figures(4.0, 1000, 110, 40)],
    bench.THEIRS: [Figures(8.0, 1000, 300, 90), Figures(10.0, 1000, 300, 90)],
}


def test_the_best_counts_and_all_are_shown(capsys):
    bench.show(FOUND, 16_000_000)
    _, ours, theirs = capsys.readouterr().out.splitlines()
    assert ours.split() == "ours, jsonl 8.00 500 4.00x 1.00x 110 50 8.00, 4.00".split()
    assert theirs.split() == "datasets.map, jsonl 2.00 125 1.00x 0.25x 300 90 2.00, 1.60".split()


def run(folder, *more):
    return bench.main([str(folder), str(folder / "texts.jsonl"), "--megabytes=0.01", *more])


def test_other_numbers_of_tokens_are_an_error(folder, capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    differing = FOUND | {bench.THEIRS: [Figures(1.0, 1001, 1, 1)]}
    monkeypatch.setattr(bench, "run", lambda *args: differing)
    assert run(folder) == 1
    assert "the numbers of tokens differ" in capsys.readouterr().err
    monkeypatch.setattr(bench, "run", lambda *args: FOUND)
    assert run(folder) == 0


def test_what_is_missing_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "datasets" else name)
    with pytest.raises(ConfigError, match="missing: pip install datasets"):
        run(folder)
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    for args in (["none", "x.jsonl"], [str(folder), "none.jsonl"]):
        with pytest.raises(DataError, match="none"):
            bench.main(args)


@pytest.mark.slow
def test_the_whole_of_it(folder, capsys):
    pytest.importorskip("datasets")
    run(folder, "--processes=1", "--repeats=1")
    out = capsys.readouterr().out.splitlines()
    names = [f"ours, {form}" for form in bench.FORMS] + [bench.THEIRS]
    assert len(out) == 2 + len(names) and "1 processes" in out[0]
    assert all(line.startswith(name) for line, name in zip(out[2:], names))
