"""The Python that docs/python.md prints runs as printed."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TINY

import checkpoint
import hf
from data import tokenizer
from model import Lucie, LucieConfig

EXAMPLE = re.search(r"```python\n(.*?)```", Path("docs/python.md").read_text("utf-8"), re.DOTALL)[1]


@pytest.mark.parametrize("source", ["out/demo_annealing", "hf:layout"])
def test_a_model_in_ten_lines(tmp_path, monkeypatch, capsys, source):
    """The log-likelihood is that of transformers, and the step lowers the loss."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    tokenizer.save({bytes([b]): 4 + b for b in range(256)}, "bytes.tiktoken")
    config = LucieConfig(**TINY | {"vocab_size": 260}, max_position_embeddings=64)
    model = Lucie(config)
    hf.to_hf(model, "layout", tokenizer="bytes.tiktoken")
    options = TINY | {"vocab_size": 260, "seq_len": 64, "tokenizer": "bytes.tiktoken"}
    state = {"step": 1, "samples": 1, "tokens": 64, "config": options}
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    checkpoint.save("out/demo_annealing/checkpoints/step0000001", model, optimizer, state)
    found = {}
    exec(compile(EXAMPLE.replace("out/demo_annealing", source), "docs/python.md", "exec"), found)
    tokens, said = found["tokens"], capsys.readouterr().out
    assert tokens.tolist() == [[0, *(4 + b for b in b"The capital of Italy is Rome.")]]
    theirs = transformers.LlamaForCausalLM.from_pretrained("layout", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits.double().log_softmax(-1)
        expected = logits.gather(-1, tokens[:, 1:, None]).sum()
        after = found["model"](tokens[:, :-1], tokens[:, 1:])
    shown = float(re.search(r"log-likelihood: (\S+)", said)[1])
    assert shown == pytest.approx(expected.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx(-shown / (tokens.shape[1] - 1), rel=1e-5)
    assert after < found["loss"]
    lines = [line for line in EXAMPLE.splitlines() if line]
    assert len(lines) == 10
