"""Completions: the function against recomputing and transformers, then the command."""

import codecs
import contextlib
import io
import json
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import generate
import hf
import quantize
from data import tokenizer
from data.tokenizer import EOS, ByteLevelBPE, Tokenizer
from generate import Completion, Decoder, Sampling, complete, decode, sample
from model import KVCache, Lucie, LucieConfig

RANKS = {bytes([b]): b + 4 for b in range(256)}
BYTES = Tokenizer(ByteLevelBPE(RANKS))
PROMPT = "Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?"
GREEDY = Sampling(temperature=0)
SIZES = TINY | {"vocab_size": 260}


@pytest.fixture
def model():
    return Lucie(LucieConfig(**SIZES, max_position_embeddings=400))


def rows(model, prompts, *args):
    """The ids that decode yields for each prompt, and their log-probabilities."""
    ids, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    for tokens in decode(model, prompts, *args):
        for row, token, logprob in tokens:
            ids[row].append(token)
            logprobs[row].append(logprob)
    return ids, logprobs


def recomputed(model, prompt, count):
    """Greedy decoding without a cache: the whole sequence anew for each token."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        while len(logprobs) < count and len(ids) < model.config.max_position_embeddings:
            logits = model(torch.tensor([ids]))[0, -1].double()
            ids.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1).max()))
            if ids[-1] == EOS:
                break
    return ids[len(prompt) :], logprobs


# --- decoding


@pytest.mark.parametrize("chunk", [1, 16, 2048])
def test_a_batch_of_unequal_prompts_equals_recomputing_each_alone(model, monkeypatch, chunk):
    """Prompts in chunks, rows that end before others, one that fills the context."""
    lengths = [3, 1, 51, 120, 395, 120]
    monkeypatch.setattr(generate, "PREFILL", chunk * len(lengths))
    torch.manual_seed(0)
    prompts = [torch.randint(4, 260, (n,)).tolist() for n in lengths]
    ids, logprobs = rows(model, prompts, 40, GREEDY)
    for row, prompt in enumerate(prompts):
        expected, exact = recomputed(model, prompt, 40)
        assert ids[row] == expected
        assert logprobs[row] == pytest.approx(exact, abs=1e-5)
    assert len(ids[4]) == 5 and len(ids[0]) > 5


def test_greedy_equals_transformers_over_200_tokens(tmp_path, monkeypatch):
    """Cached, prompts in chunks of 64 columns, of different lengths in one batch."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(generate, "PREFILL", 256)
    torch.manual_seed(0)
    model = Lucie(LucieConfig(**SIZES, rope_theta=2e7, max_position_embeddings=500))
    hf.to_hf(model, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    prompts = [torch.randint(4, 260, (n,)).tolist() for n in (1, 40, 173, 280)]
    ids, _ = rows(model, prompts, 200, GREEDY)
    options = dict(max_new_tokens=200, do_sample=False, pad_token_id=3, eos_token_id=EOS)
    for prompt, ours in zip(prompts, ids):
        out = theirs.generate(torch.tensor([prompt]), **options)
        assert ours == out[0, len(prompt) :].tolist()
    assert sum(len(x) == 200 for x in ids) >= 2


@pytest.mark.parametrize(
    "eos, count, new, reason",
    [
        ((1,), 7, 7, "length"),
        ((1, 9), 7, 0, "stop"),
        ((1,), 400, 397, "context"),
    ],
)
def test_where_a_text_ends(model, eos, count, new, reason):
    head = model.lm_head.forward

    def always_9(*args):
        logits = head(*args)
        logits[..., 9] = 100.0
        return logits

    model.lm_head.forward, model.eos_token_ids = always_9, eos
    found = complete(model, BYTES, ["ab"], count, GREEDY)[0]
    assert (found.finish_reason, found.ids, found.text) == (reason, [9] * new, "\x05" * new)
    assert len(found.logprobs) == new


@pytest.mark.parametrize("prompt", [[], [0] * 400])
def test_empty_and_too_long_prompts_are_refused(model, prompt):
    with pytest.raises(ValueError, match=f"1 to 399 tokens, not {len(prompt)}"):
        next(decode(model, [[0], prompt], 5))


def test_too_little_memory_is_known_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(generate, "prefill", None)
    size = 2 * 202 * model.config.num_hidden_layers * 2 * 16 * 4  # rows of k and v, fp32
    monkeypatch.setattr(generate, "available_memory", lambda device: size)
    with pytest.raises(ValueError, match=r"of 2 x 210 tokens take 0\.0 GB"):
        complete(model, BYTES, ["a", "b" * 9], 200)
    generate.check_room(model, 1, 202)


def test_a_log_probability_is_the_models_own(model):
    """Whatever temperature, top_k and top_p make of the draw."""
    generator = torch.Generator().manual_seed(0)
    prompt = BYTES.encode("ab")
    ids, logprobs = rows(model, [prompt], 10, Sampling(0.3, 20, 0.7), generator)
    logits = model(torch.tensor([prompt + ids[0]]))[0, len(prompt) - 1 : -1].double()
    exact = logits.log_softmax(-1).gather(1, torch.tensor(ids[0])[:, None])[:, 0]
    assert logprobs[0] == pytest.approx(exact.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (5, 0.8)])
def test_sampling_follows_the_distribution(temperature, top_k, top_p):
    """Chi-square of 100,000 draws against the exact truncated distribution."""
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    p = (logits.double() / temperature).softmax(-1)
    keep = p.argsort(descending=True)[: top_k or 12]
    q = p[keep] / p[keep].sum()
    keep = keep[: int((q.cumsum(0) - q < top_p).sum())]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[keep] = 100_000 * p[keep] / p[keep].sum()
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(temperature, top_k, top_p)
    draws, _ = sample(logits.expand(100_000, 12), sampling, generator)
    counts = torch.bincount(draws, minlength=12).double()
    assert not counts[expected == 0].any()
    chi2 = ((counts - expected) ** 2 / expected)[keep].sum().item()
    freedom = max(1, len(keep) - 1)
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_edges_of_sampling():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]])  # each row its own
    for sampling in (Sampling(0), Sampling(1e-45), Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert sample(logits, sampling)[0].tolist() == [1, 0]


class Graph(TorchDispatchMode):
    """A CUDA graph on the CPU: what is captured leaves no trace in the tensors that were there, and
    a replay computes it anew between the same addresses."""

    def __init__(self):
        super().__init__()
        self.tape, self.written = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, is_mutable = kwargs or {}, func._schema.is_mutable
        if is_mutable:  # of the operations of a step all write to the first argument
            self.written.append((args[0], args[0].clone()))
        out = func(*args, **kwargs)
        if not func.is_view:
            self.tape.append((func, args, kwargs, None if is_mutable else out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.written):
            tensor.copy_(before)

    def replay(self):
        for func, args, kwargs, out in self.tape:
            new = func(*args, **kwargs)
            for old, value in zip(*map(torch.utils._pytree.tree_leaves, (out, new))):
                if isinstance(old, torch.Tensor):
                    old.copy_(value)


class WholeCache(KVCache):
    """As on a GPU, attention is given the whole cache at each step."""

    def append(self, layer, k, v):
        so_far = super().append(layer, k, v)
        return so_far if self.positions is None else (self.k[layer], self.v[layer])


@pytest.fixture
def captures(monkeypatch):
    """Capture on the CPU; the list of graphs captured."""
    graphs, captured, plain = [], generate._captured, generate.plain_step

    def new_graph():
        graphs.append(Graph())
        return graphs[-1]

    aside = SimpleNamespace(wait_stream=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: aside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: aside)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(generate, "KVCache", WholeCache)
    monkeypatch.setattr(generate, "plain_step", lambda *args: captured(plain(*args), args[1]))
    return graphs


LENGTHS = ([120, 3, 51], [2, 60, 9], [1, 1, 2], [390, 7, 380])  # of prompts that follow each other


def random_prompts(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(4, 260, (n,), generator=generator).tolist() for n in lengths]


def test_one_decoder_for_many_prompts_equals_a_new_one_for_each(model):
    """Shorter prompts and longer ones, another number of them, and a decoding that is given up."""
    decoder = Decoder(model)
    for lengths in (*LENGTHS, [30], [40, 5]):
        prompts = random_prompts(lengths)
        new = rows(model, prompts, 20, GREEDY)
        next(decode(model, prompts[::-1], 20, GREEDY, decoder=decoder))
        assert rows(model, prompts, 20, GREEDY, None, decoder) == new
    with pytest.raises(ValueError, match="another model's"):
        rows(Lucie(LucieConfig(**SIZES)), [[1]], 20, GREEDY, None, decoder)


def test_a_step_is_captured_once_for_a_batch_size(model, captures):
    """As long as there is room; the prompts and what they become are those of a plain step."""
    decoder = Decoder(model)
    decoder.reserve(3, 200)
    for number, lengths in enumerate(LENGTHS):
        prompts = random_prompts(lengths)
        ids, logprobs = rows(model, prompts, 20, GREEDY, None, decoder)
        for row, prompt in enumerate(prompts):
            expected, exact = recomputed(model, prompt, 20)
            assert ids[row] == expected
            assert logprobs[row] == pytest.approx(exact, abs=1e-5)
        assert len(captures) == 1 + (number == 3)  # the last ones fill the context
        steps = max(map(len, ids)) - 1
        ends = [min(n + steps, decoder.cache.k.shape[2] - 1) for n in lengths]
        assert decoder.cache.positions.tolist() == ends
        assert decoder.cache.length == max(lengths)  # a replay runs nothing on the host
    captures.clear()
    texts = ["a" * n for n in (5, 9, 70, 12, 33)]
    found = [x.ids for x in complete(model, BYTES, texts, 20, GREEDY, batch_size=2)]
    assert len(captures) == 2  # two batches of two, one of one
    assert found == [recomputed(model, BYTES.encode(text), 20)[0] for text in texts]


def test_a_decoder_is_freed_before_a_larger_one_is_made(model, monkeypatch):
    decoder, free = Decoder(model), []

    def available_memory(device):
        free.append(decoder.cache is None and decoder._step is None)
        return 10**6

    monkeypatch.setattr(generate, "available_memory", available_memory)
    row = 2 * 2 * 2 * 16 * 4  # bytes of a token in fp32
    for batch, length, allocated in ((2, 90, 1), (2, 90, 1), (2, 9, 1), (2, 91, 2), (1, 91, 3)):
        cache = decoder.reserve(batch, length)
        decoder._step = object()
        assert len(free) == allocated and all(free)
        assert cache.length == 0 and cache.k.shape[1] == batch and cache.k.shape[2] >= length
    with pytest.raises(ValueError, match="1 x 1,954 tokens take"):
        decoder.reserve(1, 10**6 // row + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 20])  # 20 rows of 4-bit products unpack
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 50, 0.9)])
def test_the_captured_step_is_the_plain_one(monkeypatch, int4, batch, sampling):
    """64 steps of a CUDA graph against the same steps launched one by one."""
    sizes = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=4)
    model = Lucie(LucieConfig(**SIZES | sizes, max_position_embeddings=400))
    model = model.to("cuda", torch.bfloat16)
    if int4:
        quantize.quantize_(model)
    prompts = [BYTES.encode("a" * n) for n in (70, 1, 200, *range(2, 19))[:batch]]

    def run(decoder=None):
        generator = torch.Generator("cuda").manual_seed(1)
        return rows(model, prompts, 64, sampling, generator, decoder)

    decoder = Decoder(model)
    captured = run(decoder)
    assert run(decoder) == captured
    monkeypatch.setattr(generate, "_captured", lambda run, cache: run)
    assert captured == run()


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step of a tiny model whose vocabulary is the bytes; a context of 200 tokens."""
    folder = tmp_path_factory.mktemp("run")
    model = Lucie(LucieConfig(**SIZES, max_position_embeddings=200))
    tokenizer.save(RANKS, folder / "r.tiktoken")
    options = SIZES | {"seq_len": 200, "tokenizer": str(folder / "r.tiktoken")}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    optimizer.step()
    state = {"step": 1, "samples": 4, "tokens": 800, "config": options}
    saver = checkpoint.Saver(folder / "checkpoints")
    saver.save("step0000001", model, optimizer, state)
    saver.wait()
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """generate.py with these arguments, in this process: (exit code, stdout, stderr)."""

    def call(*args, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(generate.__file__, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


FEW = ("--max_new_tokens=5", "--temperature=0")


def test_the_prompt_is_echoed_or_not(run, command):
    code, out, err = command(run, "--prompt", PROMPT.replace("\n", "\\n"), *FEW)
    assert code == 0 and out.startswith(PROMPT) and out.endswith("\n")
    assert f"{len(PROMPT.encode()) + 1} prompt tokens, 5 generated" in err
    assert PROMPT + command(run, "--prompt", PROMPT, "--no_echo", *FEW)[1] == out
    _, _, err = command(run, "--prompt", "x" * 195, "--max_new_tokens=50", "--temperature=0")
    assert "; 1 ended where the context of 200 tokens is full\n" in err


def test_several_completions_are_separated_and_depend_on_the_seed(run, command):
    args = (run, *2 * ("--prompt", PROMPT), "--max_new_tokens=5")
    code, first, _ = command(*args, "--seed=1")
    head, one, two = first.split(f"\n{PROMPT}")
    assert code == 0 and head == "--- 1 of 2" and one.endswith("\n--- 2 of 2")
    assert one.removesuffix("\n--- 2 of 2") != two.rstrip("\n")
    assert command(*args, "--seed=1")[1] == first != command(*args, "--seed=2")[1]


def test_prompts_from_everywhere_as_lines_of_json(run, command, tmp_path):
    """Files and the input may begin with a byte order mark."""
    bom = codecs.BOM_UTF8
    (tmp_path / "whole.txt").write_bytes(bom + "Zwei\nZeilen é".encode())
    raw = json.dumps({"prompt": "b\nc\u2028d", "other": 1}, ensure_ascii=False)
    lines = "\n".join([json.dumps({"prompt": "première"}), "", raw])
    (tmp_path / "many.jsonl").write_bytes(bom + lines.encode())
    files = [f"--prompt_file={tmp_path / name}" for name in ("whole.txt", "many.jsonl")]
    code, out, _ = command(run, "--prompt=ab", *files, "--json", *FEW, "--batch_size=2")
    found = [Completion(**json.loads(line)) for line in out.rstrip("\n").split("\n")]
    prompts = ["ab", "Zwei\nZeilen é", "première", "b\nc\u2028d"]
    assert code == 0 and [x.prompt for x in found] == prompts
    for x in found:
        assert x.prompt_ids == BYTES.encode(x.prompt)
        assert command(run, *FEW, stdin=bom + x.prompt.encode())[1] == x.prompt + x.text + "\n"


def test_interactive(run, command):
    """Prompts until the input ends, blank lines among them; an error does not end it."""
    typed = f"ab\n\n{'x' * 300}\ncd\n".encode()
    code, out, err = command(run, "--interactive", *FEW, stdin=typed)
    assert code == 0 and out.count("> ") == 5
    assert err == "a prompt of 301 tokens leaves no room in the model's context of 200\n"
    for prompt in ("ab", "cd"):
        assert f"> {command(run, '--prompt', prompt, '--no_echo', *FEW)[1]}" in out


def test_folders_in_4_bits_and_of_hugging_face_bring_their_tokenizer(run, command, tmp_path):
    common = ("--prompt=ab", "--temperature=0", "--json", "--max_new_tokens=20")
    model, options = checkpoint.from_run(run)
    hf.to_hf(model, tmp_path / "hf", tokenizer=options["tokenizer"])
    save = ("--quantize=int4", f"--save_quantized={tmp_path / 'int4'}")
    expected = {"hf": command(run, *common), "int4": command(run, *common, *save)}
    for name, (code, direct, err) in expected.items():
        assert code == 0, err
        for source in (tmp_path / name, f"hf:{tmp_path / name}"):
            assert command(source, *common)[1] == direct
    code, _, err = command(tmp_path / "int4", *common, "--dtype=bfloat16")
    assert code == 2 and "4-bit weights keep the dtype they were written in" in err


@pytest.mark.parametrize(
    "args, message",
    [
        ("gpt2 --prompt=x", "there; a model of the Hugging Face hub is hf:gpt2"),
        ("RUN --prompt=x --top_k=300", "top_k must be 0 to 260, the vocabulary, not 300"),
        ("RUN --prompt=x --batch_size=0", "--max_new_tokens and --batch_size must be at least 1"),
        ("RUN --prompt=" + "x" * 300, "a prompt of 301 tokens leaves no room in the model's"),
        ("RUN", "the prompt is empty"),
        ("RUN --prompt=x --tokenizer=TMP/261.tiktoken", "has 261 tokens, but the model's"),
        ("RUN --prompt_file=TMP/latin.txt", "latin.txt: not UTF-8 at byte 2"),
        ("RUN --prompt_file=TMP/lines.jsonl", "lines.jsonl, line 2: a line must be"),
        ("RUN --quantize=int4 --save_quantized=TMP", "exists already; choose another name"),
        ("RUN --prompt=x --interactive", "--interactive excludes --prompt"),
    ],
)
def test_bad_input_is_one_line(run, command, tmp_path, args, message):
    tokenizer.save(RANKS | {b"ab": 260}, tmp_path / "261.tiktoken")
    (tmp_path / "latin.txt").write_bytes("caé".encode("latin-1"))
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    args = args.replace("RUN", str(run)).replace("TMP", str(tmp_path))
    code, out, err = command(*args.split())
    assert code == 2 and not out
    assert err.startswith("generate.py: ") and message in err and len(err.splitlines()) == 1


def test_text_arrives_as_it_is_made_and_ctrl_c_ends_it(run):
    args = [sys.executable, generate.__file__, run, "--prompt=été", "--max_new_tokens=190"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(5).decode() == "été"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)  # it may have been done
        assert b"Traceback" not in process.stderr.read()
