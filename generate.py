"""Complete a prompt.

    python generate.py out/demo_annealing --temperature 0 --max-new-tokens 30 --prompt \\
        "Quelle est la capitale de l'Espagne ? Madrid\\nQuelle est la capitale de la France ?"

The model is a run or checkpoint of ours, or `hf:FOLDER_OR_NAME[@revision]`. Text appears as it is
generated, up to `</s>` or --max-new-tokens.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from data.tokenizer import EOS, Tokenizer, TokenizerError
from data.tokenizer import load as load_tokenizer
from model import KVCache, Lucie

PREFILL = 512  # tokens of the prompt in one forward pass: bounds the memory of their logits


@torch.no_grad()
def generate(
    model: Lucie,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids that continue a prompt, until `</s>`, max_new_tokens or the context is full.

    temperature 0 takes the likeliest token; top_k 0 and top_p 1 do not cut the distribution.
    The cache has the dtype of the weights. Raises ValueError for an empty or too long prompt.
    """
    room = model.config.max_position_embeddings
    if not 0 < len(prompt) < room:
        raise ValueError(f"a prompt has 1 to {room - 1:,} tokens, not {len(prompt):,}")
    device = model.lm_head.weight.device
    length = min(room, len(prompt) + max_new_tokens)
    cache = KVCache(model.config, 1, length, device, model.lm_head.weight.dtype)
    tokens = torch.tensor([prompt], device=device)
    for chunk in tokens.split(PREFILL, dim=1):
        logits = model(chunk, cache=cache)[0, -1]
    for _ in range(length - len(prompt)):
        token = sample(logits.float(), temperature, top_k, top_p, generator)
        if token == EOS:
            return
        yield token
        if cache.length < length:
            logits = model(torch.tensor([[token]], device=device), cache=cache)[0, -1]


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """Draw an id from fp32 logits `[vocab_size]`.

    Temperature first, then the top_k likeliest, then the fewest of them that together reach top_p
    of the probability (Holtzman et al. 2020, arXiv:1904.09751).
    """
    if temperature < 1e-5:  # dividing by less overflows, and the likeliest has it all anyway
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    if 0 < top_k < len(ids):
        probabilities = probabilities[:top_k] / probabilities[:top_k].sum()
    before = probabilities.cumsum(-1) - probabilities  # of all likelier ones
    probabilities = probabilities * (before < top_p)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def stream(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as ids arrive; the bytes of a character that is not complete yet are held back."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tokenizer", help="ranks file; default: the one the run was trained with")
    parser.add_argument("--prompt", required=True, help="\\n in it is a line break")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--num-return-sequences", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "num_return_sequences"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1")
    if not args.temperature >= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise ValueError("temperature and top_k are at least 0, top_p is over 0 and at most 1")

    ranks = args.tokenizer
    if args.model.startswith("hf:"):
        model = checkpoint.from_hf(*args.model.removeprefix("hf:").split("@", 1))
    else:
        model, options = checkpoint.from_run(args.model)
        ranks = ranks or options["tokenizer"]
    if not ranks:
        raise TokenizerError("which vocabulary? --tokenizer=RANKS_FILE")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {args.device} is not to be had here") from None
    default = "bfloat16" if args.device.startswith("cuda") else "float32"
    model.to(args.device, getattr(torch, args.dtype or default))
    tokenizer = load_tokenizer(ranks)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise TokenizerError(
            f"{ranks} has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}"
        )
    prompt = args.prompt.replace("\\n", "\n")
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for _ in range(args.num_return_sequences):
        print(prompt, end="", flush=True)
        ids = generate(
            model,
            tokenizer.encode(prompt),
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.top_p,
            generator,
        )
        for text in stream(ids, tokenizer):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (CheckpointError, TokenizerError, ValueError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
