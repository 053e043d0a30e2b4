import itertools
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from conftest import TINY

import checkpoint
import completion
import quantize
from completion import Sampling, complete, decode, sample
from data.tokenizer import EOS, Tokenizer
from model import KVCache, Lucie, LucieConfig

BYTES = Tokenizer({bytes([b]): b + 4 for b in range(256)})
PROMPT = "Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?"
GREEDY = Sampling(temperature=0)


@pytest.fixture
def model():
    config = LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=400)
    return Lucie(config)


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


LENGTHS = [3, 1, 51, 120, 395, 120]


@pytest.mark.parametrize("chunk", [1, 16, 2048])
def test_a_batch_of_unequal_prompts_equals_recomputing_each_alone(model, monkeypatch, chunk):
    """Prompts in chunks, rows that end before others, one that fills the context."""
    monkeypatch.setattr(completion, "PREFILL", chunk * len(LENGTHS))
    torch.manual_seed(0)
    prompts = [torch.randint(4, 260, (n,)).tolist() for n in LENGTHS]
    ids, logprobs = rows(model, prompts, 40, GREEDY)
    for row, prompt in enumerate(prompts):
        expected, exact = recomputed(model, prompt, 40)
        assert ids[row] == expected
        assert logprobs[row] == pytest.approx(exact, abs=1e-5)
    assert len(ids[4]) == 5 and len(ids[0]) > 5


def test_greedy_equals_transformers_over_200_tokens(tmp_path, monkeypatch):
    """Cached, prompts in chunks of 64 columns, of different lengths in one batch."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(completion, "PREFILL", 256)
    torch.manual_seed(0)
    sizes = TINY | {"vocab_size": 260, "rope_theta": 2e7, "max_position_embeddings": 500}
    model = Lucie(LucieConfig(**sizes))
    checkpoint.to_hf(model, tmp_path / "hf", torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    prompts = [torch.randint(4, 260, (n,)).tolist() for n in (1, 40, 173, 280)]
    ids, _ = rows(model, prompts, 200, GREEDY)
    for prompt, ours in zip(prompts, ids):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=EOS,
            pad_token_id=3,
        )  # fmt: skip
        assert ours == out[0, len(prompt) :].tolist()
    assert sum(len(x) == 200 for x in ids) >= 2


class Always(Lucie):
    """Predicts one id, whatever it has read."""

    answer = 9

    def __init__(self, config):
        super().__init__(config)
        head = self.lm_head.forward
        self.lm_head.forward = lambda *args: self.bent(head(*args))

    def bent(self, logits):
        logits[..., self.answer] = 100.0
        return logits


def test_stops_at_eos_at_the_limit_and_at_the_end_of_the_context(model):
    endless = Always(model.config)
    assert rows(endless, [[0, 5]], 7, GREEDY)[0] == [[9] * 7]
    assert rows(endless, [[0] * 390, [0]], 30, GREEDY)[0] == [[9] * 10, [9] * 30]
    found = complete(endless, BYTES, ["ab"], 7, GREEDY)[0]
    assert (found.finish_reason, found.ids, found.text) == ("length", [9] * 7, "\x05" * 7)
    endless.answer = EOS
    assert rows(endless, [[0, 5], [0]], 7, GREEDY)[0] == [[EOS], [EOS]]
    found = complete(endless, BYTES, ["ab"], 7, GREEDY)[0]
    assert (found.finish_reason, found.ids, found.logprobs, found.text) == ("stop", [], [], "")


def test_completions_come_in_the_order_of_their_prompts(model):
    prompts = ["b" * 30, "a", PROMPT, "ccc", "a"]
    found = complete(model, BYTES, prompts, 12, GREEDY, batch_size=2)
    assert [x.prompt for x in found] == prompts
    for x in found:
        assert x.prompt_ids == BYTES.encode(x.prompt)
        expected, _ = recomputed(model, x.prompt_ids, 12)
        assert x.ids == [i for i in expected if i != EOS] and len(x.logprobs) == len(x.ids)
        assert x.prompt + x.text == BYTES.decode(x.prompt_ids + x.ids)
    assert complete(model, BYTES, []) == []


def test_too_little_memory_is_known_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(completion, "available_memory", lambda device: 100_000)
    monkeypatch.setattr(completion, "prefill", None)
    with pytest.raises(ValueError, match=r"2 x 210 tokens: their keys and values take 0.0 GB"):
        complete(model, BYTES, ["a", "b" * 9], 200)
    with pytest.raises(ValueError, match="1 x 202 tokens"):
        next(decode(model, [[0, 5]], 200))
    size = 2 * 202 * model.config.num_hidden_layers * 2 * 16 * 4  # rows of k and v, fp32
    monkeypatch.setattr(completion, "available_memory", lambda device: size)
    completion.check_room(model, 1, 202)
    with pytest.raises(ValueError):
        completion.check_room(model, 1, 203)


def test_the_same_seed_gives_the_same_text(model):
    def texts(seed):
        generator = torch.Generator().manual_seed(seed)
        found = complete(model, BYTES, [PROMPT] * 3, 20, generator=generator)
        return [x.text for x in found]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 3


def test_a_log_probability_is_the_models_own(model):
    """Whatever temperature, top_k and top_p make of the draw."""
    generator = torch.Generator().manual_seed(0)
    prompt = BYTES.encode("ab")
    ids, logprobs = rows(model, [prompt], 10, Sampling(0.3, 20, 0.7), generator)
    logits = model(torch.tensor([prompt + ids[0]]))[0, len(prompt) - 1 : -1].double()
    exact = logits.log_softmax(-1).gather(1, torch.tensor(ids[0])[:, None])[:, 0]
    assert logprobs[0] == pytest.approx(exact.tolist(), abs=1e-5)


@pytest.mark.parametrize("prompt", [[], [0] * 400, [0] * 5000])
def test_empty_and_too_long_prompts(model, prompt):
    with pytest.raises(ValueError, match="1 to 399 tokens"):
        next(decode(model, [[0], prompt], 5))
    text = "x" * len(prompt)
    with pytest.raises(ValueError, match="1 to 399 tokens" if text else "the prompt is empty"):
        complete(model, BYTES, ["a", text])


@pytest.mark.parametrize(
    "sampling,message",
    [
        (Sampling(-0.1), "temperature is 0 or more, not -0.1"),
        (Sampling(float("nan")), "temperature"),
        (Sampling(float("inf")), "temperature"),
        (Sampling(top_k=261), "top_k is 0 to the vocabulary's 260, not 261"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(top_p=0.0), "top_p is over 0"),
        (Sampling(top_p=1.1), "top_p"),
    ],
)
def test_impossible_samplings_are_named(model, sampling, message):
    with pytest.raises(ValueError, match=message):
        complete(model, BYTES, ["a"], 5, sampling)
    with pytest.raises(ValueError, match="max_new_tokens"):
        complete(model, BYTES, ["a"], 0)


def test_sampling_follows_the_distribution():
    """Chi-square of 100,000 draws against the exact truncated distribution."""
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    generator = torch.Generator().manual_seed(1)
    for temperature, top_k, top_p in itertools.product((0.7, 1.0, 1.4), (0, 1, 5), (0.5, 0.8, 1.0)):
        p = (logits.double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        keep = order[: top_k or 12]
        q = p[keep] / p[keep].sum()
        keep = keep[: int((q.cumsum(0) - q < top_p).sum())]
        expected = torch.zeros(12, dtype=torch.float64)
        expected[keep] = p[keep] / p[keep].sum()
        sampling = Sampling(temperature, top_k, top_p)
        draws, _ = sample(logits.expand(100_000, 12), sampling, generator)
        counts = torch.bincount(draws, minlength=12).double()
        assert not counts[expected == 0].any()
        e = 100_000 * expected[keep]
        chi2 = ((counts[keep] - e) ** 2 / e).sum().item()
        freedom = max(1, len(keep) - 1)
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_edges_of_sampling():
    logits = torch.tensor([1.0, 3.0, 2.0]).expand(20, 3)
    for sampling in (Sampling(0), Sampling(1e-45), Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert sample(logits, sampling)[0].tolist() == [1] * 20
    rows = torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    assert sample(rows, Sampling(0))[0].tolist() == [1, 0]  # each row its own


def test_a_cache_grows_by_rows(model):
    """After a padded prefill, one token a row, against each row alone without a cache."""
    prompts = [[5, 6, 7], list(range(10, 40))]
    cache = KVCache(model.config, 2, 60)
    completion.prefill(model, prompts, cache)
    for step in range(5):
        ids = [100 + step, 200 + step]
        with torch.no_grad():
            logits = model(torch.tensor(ids)[:, None], cache=cache)[:, 0]
        prompts = [prompt + [i] for prompt, i in zip(prompts, ids)]
        for row, prompt in enumerate(prompts):
            assert (logits[row] - model(torch.tensor([prompt]))[0, -1]).abs().max() < 1e-5
    assert cache.positions.tolist() == [8, 35]


def model_on_a_gpu(int4):
    sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, vocab_size=260)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)
    model = Lucie(LucieConfig(**sizes, max_position_embeddings=400)).to("cuda", torch.bfloat16)
    return quantize.quantize_(model) if int4 else model


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 20])  # 20 rows of 4-bit products unpack
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 50, 0.9)])
def test_the_captured_step_is_the_plain_one(monkeypatch, int4, batch, sampling):
    """64 steps of a CUDA graph against the same steps launched one by one."""
    model = model_on_a_gpu(int4)
    prompts = [BYTES.encode("a" * n) for n in (70, 1, 200, *range(2, 19))[:batch]]

    def run():
        return rows(model, prompts, 64, sampling, torch.Generator("cuda").manual_seed(1))

    captured = run()
    monkeypatch.setattr(completion, "_captured", completion._plain)
    assert captured == run()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("int4", [False, True])
def test_batch_after_batch_takes_no_more_memory(int4):
    model, held = model_on_a_gpu(int4), []
    for _ in range(40):
        complete(model, BYTES, ["a", "b" * 40], 8, GREEDY)
        held.append(torch.cuda.memory_allocated())
    assert held[2] == held[-1]


def test_the_host_side_of_a_captured_step(model, monkeypatch):
    """Without a GPU: a stand-in for the graph, whose capture leaves no trace on the device and
    whose replay does what was captured, on the tensors that were captured."""
    plain, recorded, capturing = completion._plain, [], []

    def recording(model, cache):
        run = plain(model, cache)

        def recorded_run(ids):
            before = [x.clone() for x in (cache.k, cache.v, cache.positions)]
            logits = run(ids)
            if capturing:
                for x, value in zip((cache.k, cache.v, cache.positions), before):
                    x.copy_(value)
                recorded.append((run, ids, logits))
            return logits

        return recorded_run

    class Graph:
        def replay(self):
            run, ids, logits = recorded[-1]
            logits.copy_(run(ids))

    @contextmanager
    def capture(graph, stream):
        capturing.append(True)
        yield
        capturing.clear()

    stream = MagicMock()
    for name, value in (("CUDAGraph", Graph), ("graph", capture), ("Stream", lambda: stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda aside: nullcontext())
    prompts = [BYTES.encode("a" * n) for n in (1, 30, 70)]
    steps = []
    for make in (completion._captured, plain):
        monkeypatch.setattr(completion, "_plain", recording if make != plain else plain)
        cache = KVCache(model.config, 3, 90)
        with torch.no_grad():
            logits = completion.prefill(model, prompts, cache)
            step, out = make(model, cache), []
            for _ in range(12):
                out.append(logits.argmax(-1))
                logits = step(out[-1]).clone()
        steps.append((torch.stack(out).tolist(), cache.positions.tolist()))
    assert steps[0] == steps[1] and len(recorded) == 1
