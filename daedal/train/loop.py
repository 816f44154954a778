"""The training loop: micro-batches to gradients, gradients to one step, and a report of it.

A learner makes the gradients and knows of processes; the loop clips, steps, moves the experts' biases and reports. A
loss or a gradient that is not finite ends the run before anything is updated. Knows no data formats, no files, no
teacher: objectives and batches are handed in, and whoever iterates decides what to write and when.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from daedal.errors import DaedalError
from daedal.model.transformer import Transformer
from daedal.train.balance import Balance, balance, update_biases
from daedal.train.batches import Batch, bits_per_byte
from daedal.train.bounds import number
from daedal.train.learner import Alone, Learner, Objective, Sums
from daedal.train.optimizer import Optimizers
from daedal.train.processes import lost
from daedal.train.schedule import Schedule


class TrainingError(DaedalError):
    """A run cannot go on; the message names the step."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """clip: the largest norm of all gradients together; larger ones are scaled down to it. bias_speed: how far a step
    moves the correction bias of an expert, 0 for not at all. bias_schedule: factors on it, None for 1 in every step.
    """

    clip: float = 1.0
    bias_speed: float = 1e-3
    bias_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        number("clip", self.clip, low=0.0, high=1e9, above=True)
        number("bias_speed", self.bias_speed, low=0.0, high=1.0)

    def bias_speed_at(self, step: int) -> float:
        """How far step `step`, counted from 0, moves a correction bias."""
        return self.bias_speed if self.bias_schedule is None else self.bias_speed * self.bias_schedule.at(step)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimiser step, the same on every process.

    step: counted from 0. targets, tokens: of all processes. loss: nats per target. parts: of the objective, per target.
    bits_per_byte: NaN where the data does not count bytes. norm: of the gradients before clipping. seconds: of the
    whole step, waiting for data included.
    """

    step: int
    targets: int
    tokens: int
    loss: float
    bits_per_byte: float
    parts: Mapping[str, float]
    norm: float
    rates: Mapping[str, float]
    balance: Balance | None
    seconds: float


def train(
    model: Transformer,
    batches: Iterable[Sequence[Batch]],
    objective: Objective,
    optimizers: Optimizers,
    *,
    config: LoopConfig,
    start_step: int = 0,
    learner: Learner | None = None,
) -> Iterator[StepReport]:
    """Trains `model` in place, one report for each step of `batches`, whose first is step `start_step`.

    learner: of several processes (`parallel`), whose part of the model is `model`; None for one process alone. When a
    report is given, its step is complete: the model may be saved or changed before the next is asked for. Raises
    TrainingError where the loss or a gradient is not finite, weights are then those of the step before, and where
    another process is gone.
    """
    model.train()
    learner = Alone(model) if learner is None else learner
    started = time.perf_counter()
    for step, micro_batches in enumerate(batches, start_step):
        with together(f"step {step}"):
            sums, norm = _step(step, micro_batches, objective, optimizers, learner, config)
        finished = time.perf_counter()
        yield _report(step, sums, norm, optimizers, finished - started)
        started = finished


@contextmanager
def together(what: str) -> Iterator[None]:
    """Around what all processes do at the same time: TrainingError, naming it, where another one is gone."""
    try:
        yield
    except RuntimeError as error:
        if not lost(error):
            raise
        raise TrainingError(
            f"another process is gone or does not answer in {what}: find out which from its own last words, then go "
            "on from the last checkpoint"
        ) from error


def _step(
    step: int,
    micro_batches: Sequence[Batch],
    objective: Objective,
    optimizers: Optimizers,
    learner: Learner,
    config: LoopConfig,
) -> tuple[Sums, float]:
    """One update of everything; what it was made of, and the norm of its gradients."""
    sums = learner.accumulate(objective, micro_batches)
    if not sums.targets:
        raise TrainingError(f"step {step} has nothing to predict: give it data with targets")
    norm = learner.clip(config.clip)
    _check_finite(step, sums.parts, norm)
    optimizers.step(step)
    optimizers.zero_grad()
    if speed := config.bias_speed_at(step):
        update_biases(learner.model, sums.loads, speed=speed)
    return sums, norm


def _report(step: int, sums: Sums, norm: float, optimizers: Optimizers, seconds: float) -> StepReport:
    parts = {name: value / sums.targets for name, value in sums.parts.items()}
    return StepReport(
        step=step,
        targets=sums.targets,
        tokens=sums.tokens,
        loss=parts["next_token"],
        bits_per_byte=bits_per_byte(sums.parts["next_token"], sums.num_bytes),
        parts=parts,
        norm=norm,
        rates=optimizers.rates(step),
        balance=balance(sums.loads),
        seconds=seconds,
    )


def _check_finite(step: int, parts: Mapping[str, float], norm: float) -> None:
    for name, value in (*parts.items(), ("norm of the gradients", norm)):
        if not -float("inf") < value < float("inf"):
            raise TrainingError(
                f"the {name} of step {step} is {value}: nothing was updated; go on from the last checkpoint with a "
                "lower rate, or look at that step's data"
            )
