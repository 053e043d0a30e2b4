"""Complete prompts: the function, and the command.

    python generate.py out/demo_annealing --temperature 0 --max_new_tokens 30 --prompt \\
        "Quelle est la capitale de l'Espagne ? Madrid\\nQuelle est la capitale de la France ?"
    python generate.py hf:OpenLLM-France/Lucie-7B --quantize int4 --interactive
    python generate.py hf:FOLDER --prompt_file prompts.jsonl --json > completions.jsonl

The model is a run or checkpoint of ours, `hf:FOLDER_OR_NAME[@revision]`, or a folder that
--save_quantized has written. Without a prompt, standard input is one. A single completion is shown
as it is generated; several are computed together and shown in order.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import quantize
from checkpoint import CheckpointError, open_model
from config.cli import ConfigError, Parser, run_cli
from data.dataset import DataError
from data.tokenizer import Tokenizer
from data.tokenizer import load as load_tokenizer
from hf import available_memory
from model import KVCache, Lucie

PREFILL = 2048  # tokens of all prompts in one forward pass: bounds the memory of activations


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: apply temperature, keep the top_k most likely tokens, then the smallest
    set of them whose probability reaches top_p (Holtzman et al. 2020, arXiv:1904.09751).

    temperature 0 takes the likeliest token; top_k 0 and top_p 1 do not cut the distribution.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self, vocab_size: int) -> None:
        """Raises ValueError, in one line, for a value out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 <= self.top_k <= vocab_size:
            raise ValueError(f"top_k must be 0 to {vocab_size:,}, the vocabulary, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


@dataclass
class Completion:
    """What follows a prompt. The lists have one entry a new token, without the one that ends it."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    # of each id under the model, before temperature, top_k and top_p
    logprobs: list[float] = field(default_factory=list)
    # "stop" at one of model.eos_token_ids, "length" at max_new_tokens, "context" where it is full
    finish_reason: str = "length"
    text: str = ""

    def add(self, model: Lucie, token: int, logprob: float) -> None:
        """Append what `decode` yields."""
        if token in model.eos_token_ids:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if len(self.prompt_ids) + len(self.ids) == model.config.max_position_embeddings:
            self.finish_reason = "context"


def load(
    source: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
) -> tuple[Lucie, Tokenizer]:
    """(a model for use on one device, its tokenizer).

    source: a run or checkpoint of ours, `hf:FOLDER_OR_NAME[@revision]`, or a 4-bit folder. dtype:
    of the weights; None is bfloat16 on a CUDA GPU, else float32. tokenizer: its file or folder;
    None is the model's own. Raises CheckpointError, DataError, or ValueError for a device that is
    not available.
    """
    use_device(device)
    model, its_own = open_model(source, device, dtype)
    return model, load_tokenizer(tokenizer or its_own, model.config.vocab_size)


def begin(model: Lucie, tokenizer: Tokenizer, prompt: str) -> Completion:
    """A completion that is still empty. Raises ValueError for a prompt that leaves no room."""
    ids, room = tokenizer.encode(prompt), model.config.max_position_embeddings
    if len(ids) >= room:
        raise ValueError(
            f"a prompt of {len(ids):,} tokens leaves no room in the model's context of {room:,}"
        )
    return Completion(prompt, ids)


def complete(
    model: Lucie,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    batch_size: int = 16,
) -> list[Completion]:
    """The completions of prompts, in their order.

    Prompts of similar lengths share a batch. generator: of the model's device; the same seed,
    prompts and batch_size give the same texts. Raises ValueError as `decode` does, before anything
    is computed.
    """
    found, decoder = [begin(model, tokenizer, prompt) for prompt in prompts], Decoder(model)
    by_length = sorted(found, key=lambda completion: len(completion.prompt_ids))
    if found:  # the last batch has the longest prompts, and the others use its room
        longest = len(by_length[-1].prompt_ids) + max_new_tokens
        length = min(longest, model.config.max_position_embeddings)
        decoder.reserve(min(batch_size, len(found)), length)
    with tqdm(desc="prompts", total=len(found), delay=2, leave=False) as bar:
        for start in range(0, len(found), batch_size):
            batch = by_length[start : start + batch_size]
            ids = [completion.prompt_ids for completion in batch]
            for tokens in decode(model, ids, max_new_tokens, sampling, generator, decoder):
                for row, token, logprob in tokens:
                    batch[row].add(model, token, logprob)
            bar.update(len(batch))
    for x in found:
        x.text = "".join(tokenizer.stream(x.ids, after=x.prompt_ids))
    return found


def stream(
    model: Lucie,
    tokenizer: Tokenizer,
    completion: Completion,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    decoder: "Decoder | None" = None,
) -> Iterator[str]:
    """Fill a completion, yielding its text as it grows."""

    def new_ids() -> Iterator[int]:
        how = (max_new_tokens, sampling, generator, decoder)
        for ((_, token, logprob),) in decode(model, [completion.prompt_ids], *how):
            completion.add(model, token, logprob)
            if completion.finish_reason != "stop":
                yield token

    for piece in tokenizer.stream(new_ids(), after=completion.prompt_ids):
        completion.text += piece
        yield piece


def check_room(model: Lucie, batch: int, length: int) -> None:
    """Raises ValueError if the keys and values of so many rows of so many tokens do not fit."""
    c, embedding = model.config, model.embed_tokens.weight
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * embedding.itemsize
    need, have = batch * length * row, available_memory(embedding.device)
    if have and need > have:
        raise ValueError(
            f"the keys and values of {batch} x {length:,} tokens take {need / 1e9:.1f} GB and "
            f"{have / 1e9:.1f} GB are free; use a smaller batch, or fewer tokens"
        )


class Decoder:
    """The memory that decoding takes beside the model's: a KV cache, and on a GPU the CUDA graph of
    a step, which is captured at the first step and reads and writes this cache alone.

    Whoever decodes more than once keeps one and gives it to each `decode`, one at a time. Without
    it each of them allocates and captures anew, and a capture launches two steps kernel by kernel.
    Attention divides its work by the room of the cache, on which the last bits of the logits then
    depend.
    """

    def __init__(self, model: Lucie) -> None:
        self.model = model
        self.cache: KVCache | None = None
        self._step: Callable[[Tensor], Tensor] | None = None

    def reserve(self, batch_size: int, length: int) -> KVCache:
        """The cache, empty, with room for `length` tokens or more in each of `batch_size` rows.

        One that is too short or has another number of rows is freed, with its graph, before a new
        one is allocated. Raises ValueError if that does not fit in memory.
        """
        rows, room = self.cache.k.shape[1:3] if self.cache else (0, 0)
        if rows != batch_size or room < length:
            self.cache = self._step = None
            check_room(self.model, batch_size, length)
            embedding = self.model.embed_tokens.weight
            at = (embedding.device, embedding.dtype)
            self.cache = KVCache(self.model.config, batch_size, length, *at)
        self.cache.clear()
        return self.cache

    def step(self, ids: Tensor) -> Tensor:
        """Append the newest ids `[B]`; the fp32 logits `[B, vocab_size]` after them, which the next
        step may overwrite."""
        if self._step is None:
            self._step = plain_step(self.model, self.cache)
            if self.cache.k.is_cuda:
                self._step = _captured(self._step, self.cache)
        return self._step(ids)


@torch.no_grad()
def decode(
    model: Lucie,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    decoder: Decoder | None = None,
) -> Iterator[list[tuple[int, int, float]]]:
    """Continue all prompts at once; yield for each step (row, id, log-probability) of the rows that
    have not ended: at one of model.eos_token_ids, which is yielded, at max_new_tokens, or where the
    context is full.

    Prompts of different lengths are padded on the right, which causal attention never sees, and go
    through the model in chunks. From there each row of the cache goes on at its own end
    (KVCache.decode_from). On a GPU a step is one CUDA graph, replayed, and the host reads a token
    while the next step runs. The cache has the dtype of the embedding. decoder: one of this model
    to use instead of a new one.
    Floor of a step: the bytes of the weights and of the keys and values seen, over the bandwidth.

    Raises ValueError for a prompt that is empty or too long, a max_new_tokens below 1, a sampling
    out of range, a decoder of another model, or keys and values that do not fit in memory. A GPU
    must be the current device, since a graph is captured there.
    """
    room = model.config.max_position_embeddings
    sampling.check(model.config.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    for prompt in prompts:
        if not 0 < len(prompt) < room:
            raise ValueError(f"a prompt must have 1 to {room - 1:,} tokens, not {len(prompt):,}")
    left = [min(max_new_tokens, room - len(prompt)) for prompt in prompts]  # of each row
    length = max(len(prompt) + more for prompt, more in zip(prompts, left))
    decoder = decoder or Decoder(model)
    if decoder.model is not model:
        raise ValueError("this decoder is another model's")
    logits = prefill(model, prompts, decoder.reserve(len(prompts), length))
    for number in itertools.count(1):
        ids, logprobs = sample(logits, sampling, generator)
        arriving = _to_host(ids, logprobs)
        more = number < max(left)
        if more and ids.is_cuda:
            logits = decoder.step(ids)  # the device computes while the host reads
        tokens = [(row, int(token), p) for row, (token, p) in enumerate(arriving()) if left[row]]
        for row, token, _ in tokens:
            ended = token in model.eos_token_ids or left[row] <= number
            left[row] = 0 if ended else left[row]
        yield tokens
        if not any(left):
            return
        if more and not ids.is_cuda:
            logits = decoder.step(ids)


def prefill(model: Lucie, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Put prompts into an empty cache; fp32 logits after each of them, `[B, vocab_size]`."""
    device = cache.k.device
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.tensor([ids + [0] * (max(lengths) - len(ids)) for ids in prompts])
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
    if sampling.temperature < 1e-5:  # dividing by less would overflow, and changes nothing
        ids = logits.argmax(-1, keepdim=True)
    elif not sampling.top_k and sampling.top_p == 1:
        likely = (logits / sampling.temperature).softmax(-1)
        ids = torch.multinomial(likely, 1, generator=generator)
    else:
        likely, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
        if sampling.top_k:
            likely = likely[:, : sampling.top_k]
        before = likely.cumsum(-1) - likely  # of all likelier tokens
        likely = likely * (before < sampling.top_p * likely.sum(-1, keepdim=True))
        ids = order.gather(1, torch.multinomial(likely, 1, generator=generator))
    logprobs = logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
    return ids[:, 0], logprobs[:, 0]


def plain_step(model: Lucie, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """A function from the newest ids `[B]` to the fp32 logits `[B, vocab_size]` after them."""
    return lambda ids: model(ids[:, None], cache=cache)[:, -1].float()


def _captured(run: Callable[[Tensor], Tensor], cache: KVCache) -> Callable[[Tensor], Tensor]:
    """The same step as one CUDA graph: hundreds of launches take longer than their work.

    The graph reads and advances cache.positions, so that every replay is the next step.
    """
    ids = torch.zeros_like(cache.positions)
    before, length = cache.positions.clone(), cache.length
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(ids)  # compiles what is not compiled yet; what it wrote is overwritten
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
    """Begin to copy them to the host; the function returned waits for that and gives [id,
    log-probability] of each row."""
    both = torch.stack([ids.float(), logprobs], 1)  # an id is exact in fp32 up to 16 million
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


# --- the command ---------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="generate.py", description=__doc__)
    add = parser.add_argument
    add("model", help="run, checkpoint, hf:FOLDER_OR_NAME or 4-bit folder")
    add("--tokenizer", help="ranks file, tokenizer.json or folder; default: the model's own")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", help="\\n in it is a line break; repeatable")
    file = 'a file that is a prompt, or a .jsonl with a "prompt" in each line; repeatable'
    add("--prompt_file", action="append", help=file)
    add("--interactive", action="store_true", help="prompts from the terminal; Ctrl-D quits")
    add = parser.add_argument_group("how tokens are drawn").add_argument
    add("--max_new_tokens", type=int, default=200, help="tokens to generate; default: 200")
    add("--temperature", type=float, default=1.0, help="0: the likeliest token; default: 1")
    add("--top_k", type=int, default=0, help="draw from so many likeliest tokens; 0, default: all")
    add("--top_p", type=float, default=1.0, help="of those the fewest that reach it; default: 1")
    add("--seed", type=int, default=42, help="seed of the draws; default: 42")
    add = parser.add_argument_group("output").add_argument
    add("--no_echo", action="store_true", help="without the prompt before the text")
    add(
        "--json", action="store_true", help="a line of JSON for each prompt, with log-probabilities"
    )
    add = parser.add_argument_group("the model in memory").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add(
        "--device",
        default=device,
        help="cuda, cuda:1, mps, cpu; default: a CUDA GPU if there is one",
    )
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, help="of compute; default: bfloat16 on a GPU, else float32")
    add("--quantize", choices=("int4",), help="matrices in 4 bits")
    add("--save_quantized", metavar="DIR", help="matrices in 4 bits, written to a new folder")
    add("--batch_size", type=int, default=16, help="prompts per batch; default: 16")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.batch_size < 1:
        raise ConfigError("--max_new_tokens and --batch_size must be at least 1")
    if (new := args.save_quantized) and Path(new).exists():
        raise ConfigError(f"{new}: exists already; choose another name")
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise ConfigError("--interactive excludes --prompt, --prompt_file and --json")
    use_device(args.device)
    return args


def use_device(device: str) -> None:
    """Make a GPU that is named by its number the current one, which CUDA graphs are captured on.

    Raises ValueError for a device that is not available.
    """
    try:
        torch.zeros(1, device=device).item()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not available here") from None


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, in the order of the options. Raises ConfigError naming what cannot be read."""
    prompts = [prompt.replace("\\n", "\n") for prompt in args.prompt or ()]
    if not (prompts or args.prompt_file or args.save_quantized):
        if sys.stdin.isatty():
            raise ConfigError("no prompt: use --prompt, --prompt_file or --interactive")
        return [_text(sys.stdin.buffer.read(), "standard input")]
    for file in args.prompt_file or ():
        text = _text(Path(file).read_bytes(), file)
        if not file.endswith(".jsonl"):
            prompts.append(text)
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                prompts += [json.loads(line)["prompt"] + ""] if line.strip() else []
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f'{file}, line {number}: a line must be {{"prompt": "text"}}'
                ) from None
    return prompts


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start:,}") from None


def talk(model: Lucie, tokenizer: Tokenizer, *how: object) -> None:
    """Complete one prompt after the other until the input ends; Ctrl-C ends a completion."""
    decoder = Decoder(model)
    while True:
        try:
            prompt = input("> ").replace("\\n", "\n")
            if prompt.strip():
                completion = begin(model, tokenizer, prompt)
                for piece in stream(model, tokenizer, completion, *how, decoder):
                    print(piece, end="", flush=True)
                print()
        except ValueError as error:
            print(error, file=sys.stderr)
        except (KeyboardInterrupt, EOFError) as end:
            print()
            if isinstance(end, EOFError):
                return


def main(argv: list[str]) -> None:
    args = parse(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    sampling.check(2**63)  # before minutes of loading; top_k against the vocabulary after that
    prompts = [] if args.interactive else read_prompts(args)
    if not all(prompts):
        raise ConfigError("the prompt is empty")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    int4 = bool(args.quantize or args.save_quantized)
    model, source = open_model(args.model, args.device, dtype, int4)
    source = args.tokenizer or source
    if not source:
        raise ConfigError("the run has no tokenizer: use --tokenizer")
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    sampling.check(model.config.vocab_size)
    if args.save_quantized:
        quantize.save(model, args.save_quantized, source)
        print(f"wrote {args.save_quantized}", file=sys.stderr)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    how, started = (args.max_new_tokens, sampling, generator), time.perf_counter()
    if args.interactive:
        talk(model, tokenizer, *how)
    elif len(prompts) == 1 and not args.json:
        completion = begin(model, tokenizer, prompts[0])
        print("" if args.no_echo else completion.prompt, end="", flush=True)
        for piece in stream(model, tokenizer, completion, *how):
            print(piece, end="", flush=True)
        print()
        report([completion], time.perf_counter() - started, model)
    elif prompts:
        completions = complete(model, tokenizer, prompts, *how, args.batch_size)
        for number, x in enumerate(completions, start=1):
            text = f"--- {number} of {len(completions)}\n{'' if args.no_echo else x.prompt}{x.text}"
            print(json.dumps(asdict(x), ensure_ascii=False) if args.json else text)
        report(completions, time.perf_counter() - started, model)


def report(completions: list[Completion], seconds: float, model: Lucie) -> None:
    """Speed, memory, and how many texts end because the context is full, as a line on stderr."""
    read = sum(len(completion.prompt_ids) for completion in completions)
    new = sum(len(completion.ids) for completion in completions)
    held = sum(x.nbytes for x in model.state_dict().values())
    line = f"{read:,} prompt tokens, {new:,} generated in {seconds:.1f} s ({new / seconds:,.1f} "
    line += f"tokens/s); weights {held / 1e9:.2f} GB"
    if model.embed_tokens.weight.is_cuda:
        line += f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    if full := sum(completion.finish_reason == "context" for completion in completions):
        room = model.config.max_position_embeddings
        line += f"; {full} ended where the context of {room:,} tokens is full"
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError, ValueError, torch.OutOfMemoryError)
