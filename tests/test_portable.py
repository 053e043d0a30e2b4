"""What macOS and Windows lack is hidden, and everything but the kernels works; what Apple's GPUs
lack, float64, is never asked for on them."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from test_train import options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import generate
import model
import parallel
import train
from data import tokenizer
from kernels.rope import rope_tables

MAIN_PATH = r"""
import os, signal, sys, warnings
for name in ("triton", "fcntl", "resource"):
    sys.modules[name] = None
for module, names in ((os, ("sched_getaffinity", "sysconf")), (signal, ("SIGUSR1", "SIGKILL"))):
    for name in names:
        delattr(module, name)
# Files in the encoding of the locale would differ from those of another machine.
ours = r"(checkpoint|config|data|eval|generate|hf|kernels|model|parallel|quantize|train)(\..*)?$"
warnings.filterwarnings("error", category=EncodingWarning, module=ours)

import checkpoint, generate, train
from data import prepare
from eval import curves, perplexity

ranks = ["--tokenizer", "ranks.tiktoken"]
prepare.main(["tokens", "texts", *ranks, "--out", "all", "--validation=0.2", "--processes=2"])
options = sys.argv[1:] + ["--mixture=all.csv", "--validation=all.valid.csv"]
train.main([*options, "--max_minutes=1e-6"])
train.main(options)
generate.main(["out/run", "--prompt", "é", "--max_new_tokens=2"])
checkpoint.main(["export", "out/run", "--out", "exported"])
generate.main(["hf:exported", "--prompt", "é", "--quantize=int4", "--max_new_tokens=2"])
perplexity.main(["out/run", "--texts", "a=texts/1.txt", "--out", "p.csv"])
curves.main(["out/run", "--html", "page.html"])
"""


def test_without_triton_and_posix_everything_but_the_kernels_works(tmp_path):
    pytest.importorskip("matplotlib")  # for the page
    tokenizer.save({bytes([b]): 4 + b for b in range(256)}, tmp_path / "ranks.tiktoken")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text("Été, Straße. " * 20, encoding="utf-8")
    (tmp_path / "main.py").write_text(
        f"if __name__ == '__main__':{MAIN_PATH}".replace("\n", "\n    ")
    )
    sampled = {"tokenizer": "ranks.tiktoken", "sample_every": 10, "sample_prompts": "É"}
    sizes = {"vocab_size": 260, "seq_len": 48, "samples": 24, "warmup_samples": 8}
    given = [f"--{k}={v}" for k, v in {**sampled, **sizes, "out_dir": "out"}.items()]
    small = [
        o for o in options(tmp_path) if not o.startswith(("--mixture", "--valid", "--out_dir"))
    ]
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "main.py", *small, *given],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file in ("p.csv", "page.html", "exported/model.safetensors", "out/run/completions.csv"):
        assert (tmp_path / file).stat().st_size, file
    assert "resumes after step 1" in done.stdout and "finished (3 steps)" in done.stdout


class NoDoubles(TorchDispatchMode):
    """Apple's GPUs: no operation gives float64."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            assert not isinstance(leaf, Tensor) or leaf.dtype != torch.float64, operation
        return out


def test_nothing_on_the_device_is_float64_where_there_is_none(tiny_data, monkeypatch):
    def on_the_host(*args):
        with _disable_current_modes():
            return rope_tables(*args)

    monkeypatch.setattr(model, "rope_tables", on_the_host)
    monkeypatch.setattr(parallel, "exact", lambda _: torch.float32)
    tokenizer.save({bytes([b]): 4 + b for b in range(256)}, tiny_data / "bytes.tiktoken")
    sampled = {"tokenizer": tiny_data / "bytes.tiktoken", "sample_prompts": "Ab"}
    sampled |= {"vocab_size": 260, "seq_len": 64, "sample_every": 8, "samples": 64}
    with NoDoubles():
        train.main(options(tiny_data, **sampled))
        tiny = model.Lucie(model.LucieConfig(**TINY, max_position_embeddings=64))
        list(generate.decode(tiny, [[1, 2]], 3, generate.Sampling(top_k=5)))


def test_an_apple_gpu_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    apple = torch.device("mps")
    assert parallel.pick_device("mps", "auto") == (apple, torch.float32)
    assert parallel.pick_device("auto", "auto")[0].type == "cpu"
    assert parallel.exact(apple) == torch.float32 and parallel.start_processes(apple) == (0, 1)
    assert not torch.distributed.is_initialized()  # the model runs unwrapped, as on a lone CPU
    monkeypatch.setenv("RANK", "0")  # torchrun: its ranks would share the one GPU
    with pytest.raises(ValueError, match="device 'mps' is not available"):
        parallel.pick_device("mps", "auto")
