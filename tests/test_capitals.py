import torch
from conftest import TINY

from data.tokenizer import Tokenizer
from eval.capitals import right
from generate import generate
from model import Lucie, LucieConfig

BYTES = {bytes([b]): b + 4 for b in range(256)}


def test_agrees_with_greedy_generation():
    """What a model answers greedily is right, anything else wrong, whatever its neighbours."""
    config = LucieConfig(**(TINY | {"vocab_size": 260}), max_position_embeddings=100)
    model, tokenizer = Lucie(config), Tokenizer(BYTES)
    with torch.no_grad():
        model.lm_head.weight[: 32 + 4] = 0  # printable ASCII only, and a space to begin with
        model.lm_head.weight[127 + 4 :] = 0
    questions, expected = [], []
    for prompt in ("A?", "Was ist das?", "a much longer question, is it?"):
        answer = tokenizer.decode(generate(model, tokenizer.encode(f"{prompt} "), 1, temperature=0))
        # what follows " " greedily; whether the space itself is likeliest decides
        space = list(generate(model, tokenizer.encode(prompt), 1, temperature=0))
        questions.append((prompt, answer))
        expected.append(tokenizer.decode(space) == " ")
    assert right(model, tokenizer, questions) == expected

    # teach the head to answer: a model that always continues with the same byte
    with torch.no_grad():
        model.norm.weight.zero_()
    assert right(model, tokenizer, [("x", "\u0000")]) == [False]


def test_counts_only_exact_answers():
    class Parrot(Lucie):
        """Always predicts the next byte of one fixed text."""

        text = [0, *(b + 4 for b in b"Q? Paris\n")]

        def forward(self, tokens, **_):
            logits = torch.zeros(*tokens.shape, 260)
            for t in range(tokens.shape[1]):
                logits[:, t, self.text[min(t + 1, len(self.text) - 1)]] = 1
            return logits

    model = Parrot(LucieConfig(**(TINY | {"vocab_size": 260})))
    tokenizer = Tokenizer(BYTES)
    questions = [("Q?", "Paris"), ("Q?", "Par"), ("Q?", "London"), ("Q?", "Parisian")]
    assert right(model, tokenizer, questions) == [True, True, False, False]
