import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import eval.perplexity as perplexity
from config.cli import ConfigError
from data.dataset import DataError
from data.tokenizer import BOS, EOS, ByteLevelBPE, Tokenizer, save
from eval.perplexity import BUCKETS, Window, batches, evaluate, make_room, newest_of
from hf import to_hf
from model import Lucie, LucieConfig

BYTES = Tokenizer(ByteLevelBPE({bytes([b]): b + 4 for b in range(256)}))
GIVEN = "Les années passent; les œuvres restent. "


@pytest.fixture
def model():
    sizes = TINY | {"vocab_size": 260, "max_position_embeddings": 96}
    return Lucie(LucieConfig(**sizes))


def documents(*lengths):
    """ASCII texts of so many bytes, which are as many tokens, none like another."""
    generator = torch.Generator().manual_seed(0)
    letters = [torch.randint(97, 123, (n,), generator=generator).tolist() for n in lengths]
    return ["".join(map(chr, text)) for text in letters]


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 32), (48, 20), (96, 96)])
def test_bits_per_byte_and_positions_equal_transformers(
    model, tmp_path, monkeypatch, window, stride
):
    """Its own loop over overlapping windows of one document at a time, in fp64, on our weights."""
    monkeypatch.setattr(perplexity, "HEAD_ROWS", 7)
    transformers = pytest.importorskip("transformers")
    to_hf(model, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").double()
    texts = [*documents(1, 31, 32, 33, 64, 70, 150), GIVEN * 2, ""]
    nats, count = 0.0, 0
    of_bucket = np.zeros((len(BUCKETS), 2))
    for text in texts:
        ids = torch.tensor([BOS] + [byte + 4 for byte in text.encode()])
        reached = 1  # ids that have been predicted; the first never is
        for begin in range(0, len(ids), stride):
            if reached == len(ids):
                break
            stop = min(begin + window, len(ids) - 1)  # the last id is read by no window
            read = ids[begin:stop]
            with torch.no_grad():
                logits = theirs(read[None]).logits[0]
            for target in range(reached, stop + 1):
                loss = -float(logits[target - 1 - begin].log_softmax(-1)[ids[target]])
                nats, count = nats + loss, count + 1
                bucket = max(n for n, first in enumerate(BUCKETS) if first <= target)
                of_bucket[bucket] += 1, loss
            reached = stop + 1
    size = sum(len(text.encode()) for text in texts)
    whole, *by_position = evaluate(model, BYTES, texts, window, stride)
    _, tokens, loss, read, read_bytes, bits, perplexed = whole
    assert (tokens, read, read_bytes) == (count, len(texts) - 1, size)
    assert float(bits) == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert float(perplexed) == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert float(loss) == pytest.approx(nats / count, abs=1e-5)
    of_bucket = of_bucket[of_bucket[:, 0] > 0]
    assert [row[1] for row in by_position] == of_bucket[:, 0].tolist()
    means = [float(row[2]) for row in by_position]
    np.testing.assert_allclose(means, of_bucket[:, 1] / of_bucket[:, 0], rtol=1e-5)


def test_windows_share_a_batch_with_those_of_similar_length(monkeypatch):
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 100)
    made = batches(Window([0] * n, 0, 0) for n in [10, 90, 11, 300, 49, 9, 50, 12])
    sizes = [[len(part.ids) for part in batch] for batch in made]
    assert sizes == [[300], [90], [50, 49], [12, 11, 10, 9]]


def test_special_tokens_in_a_text_are_text(model):
    """One `<s>` per document, no `</s>`, whatever the text says."""
    read = []
    model.embed_tokens.register_forward_hook(lambda module, given, out: read.append(given[0]))
    evaluate(model, BYTES, ["a<s></s>b"], 64, 64)
    (tokens,) = read
    assert (tokens == BOS).sum() == 1 and tokens[0, 0] == BOS and EOS not in tokens


@pytest.fixture
def folder(model, tmp_path):
    """An exported model that has its tokenizer, and texts beside it."""
    save(BYTES.bpe.ranks, tmp_path / "ranks")
    to_hf(model, tmp_path / "hf")
    lines = [json.dumps({"text": text}) for text in (GIVEN * 3, GIVEN * 5)]
    (tmp_path / "fr.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "en.txt").write_text("The years go by. " * 9, encoding="utf-8")
    return tmp_path


def run(folder, *more):
    given = [str(folder / "hf"), "--tokenizer", str(folder / "ranks"), "--device", "cpu"]
    perplexity.main([*given, *map(str, more)])


def test_the_command_prints_and_writes_a_table(folder, model, capsys):
    """Its default window is the model's own length, its stride a half of that."""
    texts = [f"fr={folder}/fr.jsonl", f"en={folder}/en.txt"]
    run(folder, "--texts", *texts, "--out", folder / "new" / "a.csv")
    shown = capsys.readouterr()
    with open(folder / "new" / "a.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    expected = evaluate(model, BYTES, [GIVEN * 3, GIVEN * 5], 96, 48)
    assert [[*row.values()][1:] for row in rows[:4]] == [list(map(str, row)) for row in expected]
    positions = ["all", "1-63", "64-127", "128-255"]
    names = [(row["text"], row["positions"]) for row in rows]
    assert names == [(text, name) for text in ("fr", "en") for name in positions]
    assert int(rows[0]["bytes"]) == 8 * len(GIVEN.encode()) and rows[0]["documents"] == "2"
    fewer = evaluate(model, BYTES, documents(5, 20, 19, 30), 32, 16, min_tokens=20)[0]
    assert fewer[1] == fewer[4] == 50 and fewer[3] == 2
    assert all(row["loss"] in shown.out for row in rows)
    assert "fr: " in shown.err and "trained on" not in shown.err


def test_a_model_with_more_room_is_one_that_had_it_from_the_start(model, capsys):
    tokens = torch.randint(4, 260, (1, 150))
    with torch.no_grad():
        model(tokens[:, :10])  # its tables are those of 96 positions now
        make_room(model, 150)
        larger = TINY | {"vocab_size": 260, "max_position_embeddings": 150}
        assert torch.equal(model(tokens), Lucie(LucieConfig(**larger))(tokens))
        make_room(model, 120)
    assert model.config.max_position_embeddings == 150
    assert "150 tokens at once: the model was trained on 96" in capsys.readouterr().err


def test_where_results_go(tmp_path, monkeypatch):
    path = tmp_path / "mine" / "checkpoints" / "step0000010"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "manifest.json").write_text("{}")
    for source in (path, path.parents[1]):
        assert newest_of(str(source)) == (str(path), path.parents[1])
    assert newest_of(str(tmp_path / "copied")) == (str(tmp_path / "copied"), tmp_path / "copied")
    assert newest_of(f"hf:{tmp_path}") == (f"hf:{tmp_path}", tmp_path)
    assert newest_of("hf:OpenLLM/Lucie@main")[1] == Path("out/Lucie@main")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--texts", "fr.jsonl"], "fr.jsonl: a text is NAME=FILES"),
        (["--texts", "x={}/empty"], "no document with 1 tokens"),
        (["--texts", "fr={}/fr.jsonl", "--stride", "97"], "at most the window of 96, not 97"),
        (["--texts", "fr={}/fr.jsonl", "--device", "cuda:77"], "device 'cuda:77' is not available"),
    ],
)
def test_bad_input_is_an_error(folder, given, message):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("")
    with pytest.raises((ConfigError, DataError, ValueError), match=message):
        run(folder, *(part.format(folder) for part in given))
