"""What several test files share: where the published facts lie, tiny models and tiny data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from data.prepare import StreamWriter, write_mixture
from model import LucieConfig

SHARED = Path(__file__).parents[2] / "shared"  # published logs and real text, where at hand
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared reference data")

TINY = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.05,
)


@pytest.fixture
def tiny_config() -> LucieConfig:
    return LucieConfig(**TINY, max_position_embeddings=64)


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A folder with two streams of random ids under 97 and their mixture."""
    rng = np.random.default_rng(0)
    for name, documents in (("a", 30), ("b", 50)):
        with StreamWriter(tmp_path / name, 97) as stream:
            for _ in range(documents):
                stream.add(rng.integers(0, 97, rng.integers(5, 60)))
    write_mixture(tmp_path / "mixture.csv", {"a": 0.7, "b": 0.3})
    return tmp_path


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the fp64 oracle."""
    return float(
        (ours.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30)
    )


settings.register_profile("project", deadline=None, derandomize=True)  # timing is not a test here
settings.load_profile("project")
