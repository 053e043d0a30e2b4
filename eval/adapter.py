"""Lucie as a model of lm-evaluation-harness: log-likelihoods and continuations of texts.

Texts become ids as in its `hf` backend: context and continuation are encoded as one text, of which
the continuation is what exceeds the ids of the context alone; blanks at the end of the context
count to the continuation. Exactly one `<s>` begins each. What is too long loses its beginning.

Under torchrun every rank holds the whole model and is asked for everything; it answers every
world-th request, and the answers are gathered.

Used by eval/harness.py.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.tokenizer import BOS, SPECIAL_TOKENS, Tokenizer
from generate import Sampling, decode
from model import Lucie
from parallel import gather, rank, together, world_size

HEAD_ROWS = 1024  # positions whose logits exist at a time: 266 MB of fp32 at 65,024 tokens
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

Item, Answer = TypeVar("Item"), TypeVar("Answer")


class LucieLM(LM):
    """batch_tokens: ids in one forward pass, padding and tokens to be generated included."""

    def __init__(
        self,
        model: Lucie,
        tokenizer: Tokenizer,
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.progress, self.label = progress, ""
        self.room = model.config.max_position_embeddings
        self._device = model.embed_tokens.weight.device

    # --- what lm-evaluation-harness asks ---------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding gives it), for each
        (context, continuation). Requests of one context go to one rank, which reads it once if
        continuations differ in their last token only.

        Raises ValueError for a continuation longer than the context of the model.
        """
        alike: dict[object, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(request.args[0] or number, []).append(number)
        groups = [[requests[n].args for n in numbers] for numbers in alike.values()]
        answers = self._on_all_ranks(groups, lambda group: len(group[0][0]), self._of_groups)
        return _in_order(len(requests), alike.values(), answers)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability of each text (nats): of all its ids but `<s>`, each once, in windows as
        long as the context. The last window reaches back for what it lacks; the others begin with
        the last id of the one before."""
        texts = [request.args[0] for request in requests]
        return self._on_all_ranks(texts, len, self._of_texts)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What follows each (context, generation_kwargs), up to `</s>`, a text of "until", or
        max_gen_toks (256 if not given). Greedy texts do not depend on batches or ranks; those drawn
        (do_sample) do.

        Raises ValueError for a kind of decoding that is not known here, or max_gen_toks that leave
        no room for a context.
        """
        asked = [request.args for request in requests]
        return self._on_all_ranks(asked, lambda pair: len(pair[0]), self._continuations)

    # --- ids and ranks ---------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text, of which the first and no other at the beginning is `<s>`."""
        while text.startswith("<s>"):
            text = text.removeprefix("<s>")
        return self.tokenizer.encode(text)

    def split(self, context: str, continuations: list[str]) -> list[tuple[np.ndarray, int]]:
        """(ids of context and continuation, how many of the last are the continuation) of each.

        As `hf` has it, a token that spans both goes to neither: the context is as it is alone.
        """
        ids = self.encode(context.rstrip())
        after = [self.encode(context + text)[len(ids) :] for text in continuations]
        return [(np.array(ids + rest, dtype=np.int32), len(rest)) for rest in after]

    def _on_all_ranks(
        self,
        items: Sequence[Item],
        size: Callable[[Item], int],
        work: Callable[[list[Item]], list[Answer]],
    ) -> list[Answer]:
        """work(items), of which each rank does every world-th, the largest first."""
        order = sorted(range(len(items)), key=lambda number: -size(items[number]))
        mine = order[rank() :: world_size()]
        errors = (ValueError, torch.OutOfMemoryError)
        done = together(work, [items[number] for number in mine], errors=errors)
        found = {}
        for part in gather(dict(zip(mine, done))):
            found |= part
        return [found[number] for number in range(len(items))]

    def _bar(self, total: int, unit: str) -> tqdm:
        return tqdm(
            desc=self.label, total=total, unit=unit, unit_scale=True, disable=not self.progress
        )

    # --- log-likelihoods -------------------------------------------------------------------------

    def _of_groups(self, groups: list[list[tuple[str, str]]]) -> list[list[tuple[float, bool]]]:
        pieces, sizes = [], [len(group) for group in groups]
        for group in groups:
            pieces += self.split(group[0][0], [continuation for _, continuation in group])
        answers = iter(self.score(pieces))
        return [[next(answers) for _ in range(size)] for size in sizes]

    def _of_texts(self, texts: list[str]) -> list[float]:
        pieces, owners = [], []
        for owner, text in enumerate(texts):
            windows = get_rolling_token_windows(self.encode(text)[1:], BOS, self.room, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pieces.append((np.array(context + continuation, np.int32), len(continuation)))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (logprob, _) in zip(owners, self.score(pieces)):
            totals[owner] += logprob
        return totals

    @torch.no_grad()
    def score(self, pieces: Sequence[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """For each (ids, n): (log-probability of the last n ids given those before, whether each of
        them was the likeliest).

        Floor: 2 N FLOPs for each id read, N without embedding and head; 2 D V for each scored.
        Pieces that differ in their last id only are read once.
        """
        readers: dict[bytes, list[int]] = {}  # what the model reads: the pieces it is read for
        for number, (ids, scored) in enumerate(pieces):
            if scored > self.room:
                raise ValueError(
                    f"a continuation has {scored:,} tokens, the model's context {self.room:,}"
                )
            if scored:
                read = ids[-(self.room + 1) : -1].tobytes()
                readers.setdefault(read, []).append(number)
        answers = [(0.0, True)] * len(pieces)
        order = sorted(readers, key=len, reverse=True)
        bar = self._bar(sum(map(len, order)) // 4, "tok")
        with bar:
            for batch in batches(order, lambda read: len(read) // 4, self.batch_tokens):
                numbers = [(row, n) for row, read in enumerate(batch) for n in readers[read]]
                scores = self._score_batch(batch, [(row, *pieces[n]) for row, n in numbers])
                for (_, number), score in zip(numbers, scores):
                    answers[number] = score
                bar.update(sum(map(len, batch)) // 4)
        return answers

    def _score_batch(
        self, batch: list[bytes], pieces: list[tuple[int, np.ndarray, int]]
    ) -> Iterator[tuple[float, bool]]:
        """pieces: (row of the batch, ids, how many of the last are scored)."""
        tokens = np.zeros((len(batch), len(batch[0]) // 4), dtype=np.int64)  # the first is longest
        for row, read in zip(tokens, batch):
            row[: len(read) // 4] = np.frombuffer(read, dtype=np.int32)
        hidden = self.model.hidden(torch.from_numpy(tokens).to(self._device))
        rows = [np.full(n, row) for row, _, n in pieces]
        ends = [len(batch[row]) // 4 for row, _, _ in pieces]
        places = [np.arange(end - n, end) for end, (_, _, n) in zip(ends, pieces)]
        at = [torch.from_numpy(np.concatenate(x)).to(self._device) for x in (rows, places)]
        targets = torch.from_numpy(np.concatenate([ids[-n:] for _, ids, n in pieces]))
        targets = targets.to(self._device, torch.int64)
        logprobs, greedy = [], []
        for h, target in zip(hidden[*at].split(HEAD_ROWS), targets.split(HEAD_ROWS)):
            logits = self.model.lm_head(h).float()
            chosen = logits.gather(1, target[:, None])[:, 0]
            logprobs.append((chosen - logits.logsumexp(-1)).double())
            greedy.append(logits.argmax(-1) == target)
        sizes = [n for _, _, n in pieces]
        parts = zip(torch.cat(logprobs).cpu().split(sizes), torch.cat(greedy).cpu().split(sizes))
        return ((float(p.sum()), bool(g.all())) for p, g in parts)

    # --- continuations ---------------------------------------------------------------------------

    def _continuations(self, asked: list[tuple[str, dict]]) -> list[str]:
        alike: dict[str, list[int]] = {}
        for number, (_, how) in enumerate(asked):
            alike.setdefault(json.dumps(how, sort_keys=True), []).append(number)
        texts = [""] * len(asked)
        with self._bar(len(asked), "text") as bar:
            for numbers in alike.values():
                contexts = [asked[number][0] for number in numbers]
                for place, text in self._continued(contexts, asked[numbers[0]][1]):
                    texts[numbers[place]] = text
                    bar.update()
        return texts

    def _continued(self, contexts: list[str], how: dict) -> Iterator[tuple[int, str]]:
        """(index of the context, its continuation), the longest first; all in the same manner."""
        new, sampling, stops = self._checked(normalize_gen_kwargs(how))
        prompts = [self.encode(context)[new - self.room :] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        generator = torch.Generator(self._device).manual_seed(42)
        for batch in batches(order, lambda n: len(prompts[n]) + new, self.batch_tokens):
            ids = [prompts[number] for number in batch]
            yield from zip(batch, self._until(ids, new, sampling, stops, generator))

    def _checked(self, how: dict) -> tuple[int, Sampling, list[str]]:
        """(max_gen_toks, Sampling, stop texts) of generation_kwargs."""
        if unknown := how.keys() - GENERATION:
            raise ValueError(f"generation_kwargs {', '.join(sorted(unknown))}: not known here")
        new = how["max_gen_toks"]
        if not 0 < new < self.room:
            raise ValueError(
                f"max_gen_toks is 1 to {self.room - 1:,} with this model's context, not {new:,}: "
                "set it in the task's generation_kwargs"
            )
        sampling = Sampling(temperature=0)
        if how["do_sample"]:
            temperature = how.get("temperature", 1.0)
            sampling = Sampling(temperature, how.get("top_k", 0), how.get("top_p", 1.0))
        return new, sampling, [stop for stop in handle_stop_sequences(how["until"], "</s>") if stop]

    def _until(
        self,
        prompts: list[list[int]],
        new: int,
        sampling: Sampling,
        stops: list[str],
        generator: torch.Generator,
    ) -> list[str]:
        """A batch of texts; it ends with the last that goes on."""
        decoders, ends = [self.tokenizer.bpe.decoder() for _ in prompts], self.model.eos_token_ids
        texts, going = [""] * len(prompts), set(range(len(prompts)))
        for step in decode(self.model, prompts, new, sampling, generator):
            for row, token, _ in step:
                if row in going and token not in ends and token >= len(SPECIAL_TOKENS):
                    texts[row] += decoders[row].feed(token)
                if token in ends or any(stop in texts[row] for stop in stops):
                    going.discard(row)
            if not going:
                break
        texts = [text + decoder.finish() for text, decoder in zip(texts, decoders)]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def batches(
    items: Sequence[Item], size: Callable[[Item], int], limit: int
) -> Iterator[Sequence[Item]]:
    """Items in batches whose rows, padded to the first of them, are at most `limit` in all; one at
    least. Items come by falling size, so that too little memory shows at once."""
    start = 0
    while start < len(items):
        rows = max(1, limit // size(items[start]))
        yield items[start : start + rows]
        start += rows


def _in_order(
    count: int, places: Sequence[list[int]], answers: Sequence[list[Answer]]
) -> list[Answer]:
    """Answers of groups, each put where its request stood."""
    ordered: list = [None] * count
    for numbers, group in zip(places, answers):
        for number, answer in zip(numbers, group):
            ordered[number] = answer
    return ordered
