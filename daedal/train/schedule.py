"""How the learning rate moves over a run: warm-up, a constant stretch, a decay.

A schedule is a pure function from the optimiser step to a factor on the peak rate, so resuming needs nothing but the
step's number. With `decay_steps` shorter than the run it is warm-up, stable, decay (WSD; MiniCPM, arXiv 2404.06395,
section 4); the 1 - sqrt form of its decay is from arXiv 2405.18392. V4 warms up over 2000 steps and ends at a tenth of
its peak rate; the shape in between is not known to us. Knows nothing of optimisers.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from daedal.errors import ConfigError
from daedal.train.bounds import number, whole

Decay = Literal["constant", "cosine", "linear", "sqrt"]

V4_WARMUP = 2000  # steps
V4_FLOOR = 0.1  # 2.7e-4 to 2.7e-5 in V4-Flash, 2.0e-4 to 2.0e-5 in V4-Pro
V4_FLASH_RATE = 2.7e-4
V4_PRO_RATE = 2.0e-4


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factors on the peak learning rate for `steps` optimiser steps, counted from 0.

    warmup: steps in which the factor grows by equal amounts; the first is not 0, the last of them is 1. decay: its
    form; "constant" stays at 1. decay_steps: the last steps, over which it falls; None for all after the warm-up.
    floor: the factor of the last step, and of any step after it. ConfigError for numbers that do not fit.
    """

    steps: int
    warmup: int = 0
    decay: Decay = "cosine"
    decay_steps: int | None = None
    floor: float = V4_FLOOR

    def __post_init__(self) -> None:
        whole("steps", self.steps, low=1)
        whole("warmup", self.warmup, low=0)
        number("floor", self.floor, low=0.0, high=1.0)
        if self.decay not in get_args(Decay):
            raise ConfigError(f"`decay` is {self.decay!r}: it must be one of {', '.join(get_args(Decay))}")
        if self.warmup > self.steps:
            raise ConfigError(f"`warmup` is {self.warmup}, `steps` is {self.steps}: give a shorter warm-up")
        if self.decay_steps is not None:
            whole("decay_steps", self.decay_steps, low=0)
            if self.decay == "constant":
                raise ConfigError(
                    f"`decay_steps` is {self.decay_steps}, but a constant rate has no decay: leave it out"
                )
            if self.warmup + self.decay_steps > self.steps:
                raise ConfigError(
                    f"`warmup` and `decay_steps` are {self.warmup} and {self.decay_steps}, `steps` is {self.steps}: "
                    "they must fit into the run, so shorten one or lengthen the run"
                )

    def at(self, step: int) -> float:
        """The factor of step `step`, in (0, 1], or 0 where the floor is. Steps are counted from 0."""
        if step < 0:
            raise ConfigError(f"step is {step}: steps are counted from 0")
        if step < self.warmup:
            return (step + 1) / self.warmup
        length = self.steps - self.warmup if self.decay_steps is None else self.decay_steps
        done = step + 1 - (self.steps - length)  # steps into the decay, this one included
        if self.decay == "constant" or done <= 0:
            return 1.0
        return self.floor + (1.0 - self.floor) * self._left(min(done / length, 1.0) if length else 1.0)

    def _left(self, done: float) -> float:
        """What is left of the fall from 1 to the floor when the fraction `done` of the decay is over."""
        if self.decay == "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2
        return 1.0 - (math.sqrt(done) if self.decay == "sqrt" else done)
