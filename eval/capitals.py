"""What the demo model knows: the capital of every country of the table, in five languages.

    python -m eval.capitals out/demo_annealing

Each country is asked twice, with one solved example before it: in a form its training text contains
("recalled") and in one kept out of it for this very country, though other countries were asked that
way ("transferred"). An answer counts if greedy decoding gives it token for token.
"""

import argparse
import sys

import torch

import checkpoint
from checkpoint import CheckpointError
from data import demo_corpus
from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer, TokenizerError
from model import Lucie


@torch.no_grad()
def right(model: Lucie, tokenizer: Tokenizer, questions: list[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding of each prompt begins with a space and its answer.

    It does exactly if each token of the answer is the likeliest after those before it, so one
    forward pass over all prompts with their answers tells.
    """
    prompts = [tokenizer.encode(prompt) for prompt, _ in questions]
    answers = [tokenizer.encode_ordinary(f" {answer}") for _, answer in questions]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers))
    tokens = torch.zeros(len(questions), length, dtype=torch.int64)  # what pads comes after, unseen
    for row, p, a in zip(tokens, prompts, answers):
        row[: len(p) + len(a)] = torch.tensor(p + a)
    likeliest = model(tokens).argmax(-1).tolist()
    return [
        line[len(p) - 1 : len(p) + len(a) - 1] == a
        for line, p, a in zip(likeliest, prompts, answers)
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.capitals", description=__doc__)
    parser.add_argument("run", help="run or checkpoint directory")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit 1 if fewer are recalled")
    args = parser.parse_args(argv)
    model, config = checkpoint.from_run(args.run)
    tokenizer = tokenizers.load(config["tokenizer"])

    print(f"{'capitals answered right':24} recalled  transferred")
    worst = 1.0
    for language in demo_corpus.LANGUAGES:
        shares = []
        for held_out in (False, True):
            results = right(model, tokenizer, demo_corpus.capital_questions(language, held_out))
            shares.append(sum(results) / len(results))
        worst = min(worst, shares[0])
        print(f"{language:24} {shares[0]:8.1%}  {shares[1]:11.1%}  of {len(results)}")
    if worst < args.at_least:
        print(f"fewer than {args.at_least:.0%} recalled in one language", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (CheckpointError, TokenizerError) as error:
        print(f"eval.capitals: {error}", file=sys.stderr)
        sys.exit(2)
