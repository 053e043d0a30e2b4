"""The schedule of a phase: batch size, learning rate, number of steps and checkpoint steps.

Everything is a pure function of the samples consumed so far, never of wall-clock time or of the
number of GPUs, so a run can stop, grow and shrink without its schedule changing. The rules are
Megatron's, which trained Lucie; with config/pretrain.py they give the published logs row by row
(753,851 steps and 3,121,742,086,144 tokens in the main phase).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Step(NamedTuple):
    step: int  # number of this optimizer step, from 1
    samples_before: int  # sequences consumed before it
    batch_size: int  # sequences it consumes


class Schedule:
    """Schedule of one phase.

    config has samples, global_batch_size, batch_ramp_start, batch_ramp_increment,
    batch_ramp_samples, learning_rate, min_learning_rate, warmup_samples, lr_decay,
    checkpoint_every, checkpoint_early_every and checkpoint_early_steps, as documented in
    `config.Config`. Raises ValueError naming an option that is out of range.
    """

    def __init__(self, config: Any) -> None:
        c = self.config = config
        for name in ("samples", "global_batch_size"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(c, name)}")
        if c.batch_ramp_increment < 1:
            raise ValueError("batch_ramp_increment must be at least 1")
        if c.batch_ramp_samples:
            span = c.global_batch_size - c.batch_ramp_start
            if c.batch_ramp_start < 1 or span < 0:
                raise ValueError(
                    f"batch_ramp_start must be 1 or more, and no more than global_batch_size "
                    f"{c.global_batch_size}"
                )
            if span % c.batch_ramp_increment:
                raise ValueError(
                    f"batch_ramp_increment {c.batch_ramp_increment} does not lead from "
                    f"{c.batch_ramp_start} to {c.global_batch_size}"
                )
        for name in ("learning_rate", "min_learning_rate", "batch_ramp_samples"):
            if not getattr(c, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(c, name)}")
        if c.lr_decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"lr_decay must be cosine, linear or constant, not {c.lr_decay!r}")
        if not 0 <= c.warmup_samples < c.samples:
            raise ValueError(
                f"warmup_samples must be from 0 to {c.samples - 1}, not {c.warmup_samples}"
            )

    def batch_size(self, samples: int) -> int:
        """Sequences of the step that begins after `samples` samples: a staircase, then constant."""
        c = self.config
        stairs = (c.global_batch_size - c.batch_ramp_start) // c.batch_ramp_increment
        if not c.batch_ramp_samples or not stairs or samples > c.batch_ramp_samples:
            return c.global_batch_size
        stair = int(samples / (c.batch_ramp_samples / stairs))
        return c.batch_ramp_start + c.batch_ramp_increment * stair

    def learning_rate(self, samples: int) -> float:
        """Learning rate after `samples` samples.

        A step applies the rate of the samples before it; the row of that step in Lucie's logs shows
        the rate of the samples after it. Linear warm-up from 0; then, by lr_decay, cosine or linear
        from learning_rate to min_learning_rate at the last sample, or constant.
        """
        c = self.config
        if samples < c.warmup_samples:
            return c.learning_rate * samples / c.warmup_samples
        done = min(1.0, (samples - c.warmup_samples) / (c.samples - c.warmup_samples))
        if c.lr_decay == "constant":
            return c.learning_rate
        left = 0.5 * (1 + math.cos(math.pi * done)) if c.lr_decay == "cosine" else 1 - done
        return c.min_learning_rate + left * (c.learning_rate - c.min_learning_rate)

    def __iter__(self) -> Iterator[Step]:
        return self.steps_from(0)

    def steps_from(self, step: int) -> Iterator[Step]:
        """The steps after the first `step` ones, to the end of the phase.

        The phase ends where one more batch would exceed its samples.
        """
        samples = self.samples_after(step)
        while samples + (size := self.batch_size(samples)) <= self.config.samples:
            step += 1
            yield Step(step, samples, size)
            samples += size

    def samples_after(self, step: int) -> int:
        """Samples consumed by the first `step` steps."""
        samples = 0
        while step > 0 and samples <= self.config.batch_ramp_samples:  # step by step on the ramp
            samples += self.batch_size(samples)
            step -= 1
        return samples + step * self.config.global_batch_size

    def num_steps(self) -> int:
        """Steps in the whole phase."""
        samples = steps = 0
        while samples <= self.config.batch_ramp_samples:
            size = self.batch_size(samples)
            if samples + size > self.config.samples:
                return steps
            samples += size
            steps += 1
        return steps + (self.config.samples - samples) // self.config.global_batch_size

    def checkpoint_steps(self) -> list[int]:
        """Steps after which a checkpoint is written, ascending: early ones, regular ones, the last.

        Lucie: every 5,000 steps to 25,000, then every 25,000, and step 753,851. A checkpoint_every
        of 0 leaves the last step alone.
        """
        c, last = self.config, self.num_steps()
        steps = {last} if last else set()
        if c.checkpoint_early_every:
            early = min(c.checkpoint_early_steps, last)
            steps.update(range(c.checkpoint_early_every, early + 1, c.checkpoint_early_every))
        if c.checkpoint_every:
            steps.update(range(c.checkpoint_every, last + 1, c.checkpoint_every))
        return sorted(steps)


def revision_name(step: int, prefix: str = "") -> str:
    """Lucie's name for a checkpoint: step0005000, or with its prefix extension_step0000250."""
    return f"{prefix}step{step:07d}"
