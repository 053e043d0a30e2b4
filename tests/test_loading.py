from dataclasses import replace

import pytest

from data import tokenizer
from data.tokenizer import TokenizerError
from loading import tokenizer_for, use_device
from model import Lucie

BYTES = {bytes([b]): b + 4 for b in range(256)}


def test_a_tokenizer_must_be_told_and_fit(tmp_path, tiny_config):
    model = Lucie(tiny_config)
    with pytest.raises(TokenizerError, match=r"^which vocabulary\?"):
        tokenizer_for(model, "")
    tokenizer.save(BYTES, tmp_path / "r.tiktoken")
    with pytest.raises(TokenizerError, match=r"r\.tiktoken has 260 tokens, the model 97$"):
        tokenizer_for(model, str(tmp_path / "r.tiktoken"))
    model = Lucie(replace(tiny_config, vocab_size=260))
    assert tokenizer_for(model, str(tmp_path / "r.tiktoken")).ranks == BYTES


@pytest.mark.parametrize("device", ["cuda:77", "nowhere"])
def test_a_device_that_is_not_there(device):
    use_device("cpu")
    with pytest.raises(ValueError, match=f"^device {device} is not to be had here$"):
        use_device(device)
