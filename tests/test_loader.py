import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import DataError
from data.loader import IGNORE, document_starts, read_share
from data.tokenizer_base import BOS


class Numbers:
    """Sample i holds the number i throughout; `bad` cannot be read."""

    seq_len = 16

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __getitem__(self, i: int) -> np.ndarray:
        if i == self.bad:
            raise DataError(f"sample {i}")
        return np.full(self.seq_len + 1, i)


@given(
    world=st.integers(1, 9),
    size=st.integers(1, 40),
    micro=st.integers(1, 5),
    first=st.integers(0, 10**12),
)
def test_ranks_read_everything_once_in_as_many_passes(world, size, micro, first):
    read, passes, counted = [], set(), 0
    for rank in range(world):
        share = read_share(Numbers(), range(first, first + size), micro, rank, world)
        ours = []
        passes.add(len(share.batches))
        counted += share.targets
        for x, y in share.batches:
            assert x.shape == y.shape and 1 <= x.shape[0] <= micro and x.dtype == torch.int64
            assert x.is_contiguous() and y.is_contiguous()
            ours += [int(t[0]) for t, target in zip(x, y) if (target != IGNORE).all()]
        assert ours == list(share.samples)
        read += ours
    assert sorted(read) == list(range(first, first + size))
    assert len(passes) == 1
    assert counted == size * 16


def test_targets_are_the_tokens_that_follow():
    class Counting(Numbers):
        def __getitem__(self, i):
            return np.arange(i, i + self.seq_len + 1)

    ((x, y),) = read_share(Counting(), range(5, 6), 4).batches
    assert torch.equal(y[:, :-1], x[:, 1:]) and y[0, -1] == 21


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_a_sample_that_cannot_be_read_raises(bad):
    with pytest.raises(DataError, match=f"^sample {bad}$"):
        read_share(Numbers(bad), range(7), 2)
    assert read_share(Numbers(bad), range(7), 2, rank=(bad + 1) % 2, world=2).targets


rows = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([BOS, 1, 7]), min_size=length, max_size=length), min_size=1
    )
)


@given(rows)
def test_documents_start_with_each_row_and_each_bos(rows):
    expected, at = [], 0
    for row in rows:
        for column, token in enumerate(row):
            if column == 0 or token == BOS:
                expected.append(at)
            at += 1
    starts = document_starts(torch.tensor(rows))
    assert starts.dtype == torch.int32 and starts.tolist() == [*expected, at]
