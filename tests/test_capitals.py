import torch
from conftest import TINY

from completion import Sampling, complete
from data.tokenizer import Tokenizer
from eval.capitals import right
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
        # what follows " " greedily; whether the space itself is likeliest decides
        both = complete(model, tokenizer, [f"{prompt} ", prompt], 1, Sampling(temperature=0))
        answer, space = (completion.text for completion in both)
        questions.append((prompt, answer))
        expected.append(space == " ")
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
