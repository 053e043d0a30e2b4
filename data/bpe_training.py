"""Learning a byte-level vocabulary; the `tokenizers` library counts and merges.

python -m data.prepare tokenizer FILES... --vocab-size 65024 --out ranks.tiktoken
"""

import json
import sys
from collections.abc import Iterable

from data.tokenizer import PATTERN, byte_characters
from data.tokenizer_base import SPECIAL_TOKENS, TokenizerError


def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn a vocabulary of vocab_size tokens, special ones included: {bytes of a token: id}.

    The `tokenizers` library counts and merges. Raises TokenizerError if it is not installed, or if
    the text holds too few different pairs for so many tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise TokenizerError(f"a vocabulary has at least {smallest} tokens, not {vocab_size}")
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable
    except ImportError:
        raise TokenizerError("training a vocabulary needs: pip install tokenizers") from None
    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(texts, trainer)
    ranks = ranks_of(json.loads(bpe.to_str())["model"]["merges"])
    if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
        raise TokenizerError(
            f"the text gives {len(ranks) + len(SPECIAL_TOKENS):,} tokens, not {vocab_size:,}: "
            "more text or a smaller vocabulary is needed"
        )
    return ranks


def ranks_of(merges: list[list[str]]) -> dict[bytes, int]:
    """{bytes of a token: id} from the ordered merges of a byte-level BPE.

    tokenizers names a merge by its two parts, tiktoken by their concatenation; a token that a
    second pair of parts gives as well keeps the rank of its first.
    """
    byte_of = {char: byte for byte, char in byte_characters().items()}
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(byte_of[c] for c in a + b) for a, b in merges]
    return {t: i for i, t in enumerate(dict.fromkeys(tokens), start=len(SPECIAL_TOKENS))}
