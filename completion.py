"""Complete prompts: many at once, of different lengths, token by token.

Prompts of a batch are padded at their ends, where causal attention does not see it, and go through
the model in chunks; only the last token of each needs logits. From there each row of the cache goes
on at its own end (KVCache.decode_from). On a GPU a step is one CUDA graph, replayed, and the host
learns of a token while the next step is under way.

Floor of a step: the bytes of the weights and of the keys and values seen, over the bandwidth.

Used by generate.py and bench/decode.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import EOS, LucieTokenizer, Tokenizer
from model import KVCache, Lucie
from tensor_files import available_memory

PREFILL = 2048  # tokens of all prompts in one forward pass: bounds the memory of activations


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then the top_k likeliest, then the fewest of them
    that together reach top_p of the probability (Holtzman et al. 2020, arXiv:1904.09751).

    temperature 0 takes the likeliest; top_k 0 and top_p 1 do not cut the distribution.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self, vocab_size: int) -> None:
        """Raises ValueError, in one line, for what no distribution has."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is 0 or more, not {self.temperature}")
        if not 0 <= self.top_k <= vocab_size:
            raise ValueError(f"top_k is 0 to the vocabulary's {vocab_size:,}, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is over 0 and at most 1, not {self.top_p}")


@dataclass
class Completion:
    """What follows a prompt. Lists have one entry a new token, `</s>` not among them."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    # of each id under the model, whatever temperature, top_k and top_p made of it
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # or "stop", at `</s>`
    text: str = ""


def complete(
    model: Lucie,
    tokenizer: Tokenizer | LucieTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Completion]:
    """The completions of prompts, in their order.

    Prompts of like lengths share a batch. generator: of the model's device; the same seed, prompts
    and batch_size give the same texts. Raises ValueError as `decode` does, before anything is
    computed.
    """
    found = [Completion(prompt, tokenizer.encode(prompt)) for prompt in prompts]
    for completion in found:
        check_prompt(model, completion.prompt, completion.prompt_ids)
    by_length = sorted(found, key=lambda completion: len(completion.prompt_ids))
    if found:  # the last batch is the largest
        longest = len(by_length[-1].prompt_ids) + max_new_tokens
        room = model.config.max_position_embeddings
        check_room(model, min(batch_size, len(found)), min(longest, room))
    bar = tqdm(total=len(found), unit=" prompts", disable=not progress)
    with bar:
        for start in range(0, len(found), batch_size):
            batch = by_length[start : start + batch_size]
            ids = [completion.prompt_ids for completion in batch]
            for tokens in decode(model, ids, max_new_tokens, sampling, generator):
                for row, token, logprob in tokens:
                    add(batch[row], token, logprob)
            bar.update(len(batch))
    for completion in found:
        pieces = tokenizer.stream(completion.ids, after=completion.prompt_ids)
        completion.text = "".join(pieces)
    return found


def add(completion: Completion, token: int, logprob: float) -> None:
    """Append what `decode` yields."""
    if token == EOS:
        completion.finish_reason = "stop"
    else:
        completion.ids.append(token)
        completion.logprobs.append(logprob)


def check_prompt(model: Lucie, prompt: str, ids: list[int]) -> None:
    """Raises ValueError for a prompt that is empty or leaves no room for a token."""
    room = model.config.max_position_embeddings
    if not prompt:
        raise ValueError("the prompt is empty")
    if len(ids) >= room:
        raise ValueError(f"a prompt has 1 to {room - 1:,} tokens here, not {len(ids):,}")


def check_room(model: Lucie, batch: int, length: int) -> None:
    """Raises ValueError if the keys and values of so many rows of so many tokens do not fit."""
    c, embedding = model.config, model.embed_tokens.weight
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * embedding.itemsize
    need, have = batch * length * row, available_memory(embedding.device)
    if have and need > have:
        raise ValueError(
            f"{batch} x {length:,} tokens: their keys and values take {need / 1e9:.1f} GB and "
            f"{have / 1e9:.1f} are free; fewer at a time, or shorter ones"
        )


@torch.no_grad()
def decode(
    model: Lucie,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[list[tuple[int, int, float]]]:
    """Continue all prompts at once; yield for each step (row, id, log-probability) of the rows that
    go on: up to `</s>`, which is yielded, max_new_tokens, or the end of the context.

    The cache has the dtype of the embedding. Raises ValueError for a prompt that is empty or too
    long, a number below 1, a sampling that is none, or keys and values that memory has no room for.
    A GPU must be the current one, for it is where a graph is captured.
    """
    room = model.config.max_position_embeddings
    sampling.check(model.config.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is 1 or more, not {max_new_tokens}")
    for prompt in prompts:
        if not 0 < len(prompt) < room:
            raise ValueError(f"a prompt has 1 to {room - 1:,} tokens here, not {len(prompt):,}")
    left = [min(max_new_tokens, room - len(prompt)) for prompt in prompts]  # of each row
    length = max(len(prompt) + more for prompt, more in zip(prompts, left))
    embedding = model.embed_tokens.weight
    check_room(model, len(prompts), length)
    cache = KVCache(model.config, len(prompts), length, embedding.device, embedding.dtype)
    logits = prefill(model, prompts, cache)
    step = _captured(model, cache) if embedding.is_cuda else _plain(model, cache)
    for number in itertools.count(1):
        ids, logprobs = sample(logits, sampling, generator)
        arriving = _to_host(ids, logprobs)
        more = number < max(left)
        if more and embedding.is_cuda:
            logits = step(ids)  # the device goes on while the host reads
        tokens = [(row, int(token), p) for row, (token, p) in enumerate(arriving()) if left[row]]
        for row, token, _ in tokens:
            left[row] = 0 if token == EOS or left[row] <= number else left[row]
        yield tokens
        if not any(left):
            return
        if more and not embedding.is_cuda:
            logits = step(ids)


def prefill(model: Lucie, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Put prompts into an empty cache; fp32 logits after each of them, `[B, vocab_size]`."""
    device = cache.k.device
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    last: list[Tensor] = [torch.empty(0)] * len(prompts)
    chunk = max(16, PREFILL // len(prompts))
    for part in padded.to(device).split(chunk, dim=1):
        start = cache.length
        hidden = model.hidden(part, cache=cache)
        for row, n in enumerate(lengths):
            if start < n <= start + part.shape[1]:
                last[row] = hidden[row, n - 1 - start].clone()
    cache.decode_from(lengths)
    return model.lm_head(torch.stack(last)).float()


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(ids, their log-probabilities before any cut), each `[B]`, from fp32 logits
    `[B, vocab_size]`. Nothing here waits for the device."""
    if sampling.temperature < 1e-5:  # dividing by less overflows; the likeliest has it all anyway
        ids = logits.argmax(-1, keepdim=True)
    elif not sampling.top_k and sampling.top_p == 1:
        likely = (logits / sampling.temperature).softmax(-1)
        ids = torch.multinomial(likely, 1, generator=generator)
    else:
        likely, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
        if sampling.top_k:
            likely = likely[:, : sampling.top_k]
        before = likely.cumsum(-1) - likely  # of all likelier ones
        likely = likely * (before < sampling.top_p * likely.sum(-1, keepdim=True))
        ids = order.gather(1, torch.multinomial(likely, 1, generator=generator))
    logprobs = logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
    return ids[:, 0], logprobs[:, 0]


def _plain(model: Lucie, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """A function from the newest ids `[B]` to the fp32 logits `[B, vocab_size]` after them."""

    def step(ids: Tensor) -> Tensor:
        return model(ids[:, None], cache=cache)[:, -1].float()

    return step


def _captured(model: Lucie, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """The same as one CUDA graph: hundreds of launches a step would take longer than their work.

    The graph reads and advances cache.positions, so that every replay is the next step.
    """
    run, ids = _plain(model, cache), torch.zeros_like(cache.positions)
    before, length = cache.positions.clone(), cache.length
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(ids)  # compiles what is not compiled yet; what it wrote is written over
    torch.cuda.current_stream().wait_stream(aside)
    cache.positions.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):  # one stream, one workspace of the library
        logits = run(ids)
    cache.length = length

    def step(newest: Tensor) -> Tensor:
        ids.copy_(newest)
        graph.replay()
        return logits

    return step


def _to_host(ids: Tensor, logprobs: Tensor) -> Callable[[], list[list[float]]]:
    """Begin to copy them; the function returned waits until they are here: [id, log-probability]
    of each row."""
    both = torch.stack([ids.double(), logprobs.double()], 1)
    if not both.is_cuda:
        return both.tolist
    here = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
    here.copy_(both, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def arrived() -> list[list[float]]:
        done.synchronize()
        return here.tolist()

    return arrived
