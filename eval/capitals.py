"""What the demo model knows: the capital of every country of the table, in five languages.

    python -m eval.capitals out/demo_pretrain out/demo_extension out/demo_annealing

Shows what each run completes for one question in each language, then examines the last run. Each
country is asked twice, with one solved example before it: in a form its training text contains
("recalled") and in one kept out of it for this very country, though other countries were asked that
way ("transferred"). An answer counts if greedy decoding gives it token for token.
"""

from pathlib import Path

import torch

import checkpoint
from checkpoint import CheckpointError
from config.cli import Parser, run_cli
from data import demo
from data import tokenizer as tokenizers
from data.dataset import DataError
from data.tokenizer import Tokenizer
from generate import Sampling, complete
from model import Lucie

COUNTRY = "China"  # its capital has another name in each of the five languages


@torch.no_grad()
def right(model: Lucie, tokenizer: Tokenizer, questions: list[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding of each prompt begins with a space and its answer.

    It does exactly if each token of the answer is the likeliest after those before it, so one
    forward pass over all prompts with their answers tells.
    """
    prompts = [tokenizer.encode(prompt) for prompt, _ in questions]
    answers = [tokenizer.encode_ordinary(f" {answer}") for _, answer in questions]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers))
    tokens = torch.zeros(len(questions), length, dtype=torch.int64)  # padding at the end: unseen
    for row, p, a in zip(tokens, prompts, answers):
        row[: len(p) + len(a)] = torch.tensor(p + a)
    likeliest = model(tokens).argmax(-1).tolist()
    return [
        line[len(p) - 1 : len(p) + len(a) - 1] == a
        for line, p, a in zip(likeliest, prompts, answers)
    ]


def examine(model: Lucie, tokenizer: Tokenizer) -> dict[str, tuple[float, float]]:
    """The shares of capitals that a model (recalls, transfers), by language."""

    def share(language: str, held_out: bool) -> float:
        answers = right(model, tokenizer, demo.capital_questions(language, held_out))
        return sum(answers) / len(answers)

    return {name: (share(name, False), share(name, True)) for name in demo.LANGUAGES}


def first_lines(model: Lucie, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """How the model goes on after each prompt, to the end of the line."""
    completions = complete(model, tokenizer, prompts, 12, Sampling(temperature=0))
    return [completion.text.split("\n")[0].strip() for completion in completions]


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m eval.capitals", description=__doc__)
    parser.add_argument("runs", nargs="+", help="runs or checkpoints; the last one is examined")
    bar = "exit with 1 if a smaller share is recalled in one of the languages"
    parser.add_argument("--at_least", type=float, metavar="SHARE", help=bar)
    args = parser.parse_args(argv)

    index = [row["en_name"] for row in demo.countries()].index(COUNTRY)
    prompts = [demo.ask(lang, "capital", 0, index)[0] for lang in demo.LANGUAGES]
    columns = []
    for run in args.runs:
        model, config = checkpoint.from_run(run)
        tokenizer = tokenizers.load(config["tokenizer"], model.config.vocab_size)
        columns.append((Path(run).name, first_lines(model, tokenizer, prompts)))
    prompt_width = max(map(len, prompts))
    table = [["greedy completion after", *(name for name, _ in columns)]]
    table += [[prompt, *(lines[row] for _, lines in columns)] for row, prompt in enumerate(prompts)]
    for prompt, *cells in table:
        shown = (f"{cell[:24]:24}" for cell in cells)
        print("  ".join([f"{prompt:{prompt_width}}", *shown]).rstrip())

    print(f"\n{'capitals answered right':{prompt_width}}  recalled  transferred")
    shares, asked = examine(model, tokenizer), len(demo.countries())
    for language, (recalled, transferred) in shares.items():
        print(f"{language:{prompt_width}}  {recalled:8.1%}  {transferred:11.1%}  of {asked}")
    worst, transferred = (min(column) for column in zip(*shares.values()))
    run = f"seed {config['seed']}, {config['dtype']}"
    print(f"worst language: recalled {worst:.1%}, transferred {transferred:.1%} ({run})")
    return int(args.at_least is not None and worst < args.at_least)


if __name__ == "__main__":
    run_cli(main, CheckpointError, DataError)
