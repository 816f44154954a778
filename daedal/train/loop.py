"""The training loop: micro-batches to gradients, gradients to one step, and a report of it.

An objective's sums are divided by the targets of the whole step, over all micro-batches and processes; gradients are
sums over processes. So a step is the same however it is cut. A loss or a gradient that is not finite ends the run
before anything is updated. Knows no data formats, no files, no teacher: objectives and batches are handed in, and
whoever iterates decides what to write and when.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from daedal.errors import DaedalError
from daedal.model.transformer import Transformer
from daedal.train.balance import Balance, balance, update_biases
from daedal.train.batches import Batch, bits_per_byte
from daedal.train.bounds import number
from daedal.train.clipping import Spread, clip
from daedal.train.objective import Loss
from daedal.train.optimizer import Optimizers
from daedal.train.processes import ALONE, Processes

Objective = Callable[[Transformer, Batch], Loss]


class TrainingError(DaedalError):
    """A run cannot go on; the message names the step."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """clip: the largest norm of all gradients together; larger ones are scaled down to it. bias_speed: how far a step
    moves the correction bias of an expert, 0 for not at all.
    """

    clip: float = 1.0
    bias_speed: float = 1e-3

    def __post_init__(self) -> None:
        number("clip", self.clip, low=0.0, high=1e9, above=True)
        number("bias_speed", self.bias_speed, low=0.0, high=1.0)


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


@dataclass
class _Sums:
    """What the micro-batches of a step add up to."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        for name, part in loss.parts.items():
            self.parts[name] = self.parts[name] + part if name in self.parts else part
        for layer, load_E in loss.loads.items():
            self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E


def train(
    model: Transformer,
    batches: Iterable[Sequence[Batch]],
    objective: Objective,
    optimizers: Optimizers,
    *,
    config: LoopConfig,
    start_step: int = 0,
    processes: Processes = ALONE,
) -> Iterator[StepReport]:
    """Trains `model` in place, one report for each step of `batches`, whose first is step `start_step`.

    When a report is given, its step is complete: the model may be saved or changed before the next is asked for.
    Raises TrainingError where the loss or a gradient is not finite; weights are then those of the step before.
    """
    model.train()
    started = time.perf_counter()
    for step, micro_batches in enumerate(batches, start_step):
        targets, tokens, num_bytes = processes.total(
            [
                sum(batch.num_targets for batch in micro_batches),
                sum(batch.inputs.ids_T.numel() for batch in micro_batches),
                sum(batch.num_bytes for batch in micro_batches),
            ]
        )
        if not targets:
            raise TrainingError(f"step {step} has nothing to predict: give it data with targets")
        sums = _Sums()
        for batch in micro_batches:
            loss = objective(model, batch.to(model.device))
            (loss.total / targets).backward()
            sums.add(loss)
        parts = _means(sums.parts, targets, processes)
        norm = clip([Spread(parameters=list(model.parameters()))], config.clip, processes.device)
        _check_finite(step, parts, norm)
        optimizers.step(step)
        optimizers.zero_grad()
        loads = processes.summed(sums.loads)
        if config.bias_speed:
            update_biases(model, loads, speed=config.bias_speed)
        nats = parts["next_token"]
        finished = time.perf_counter()
        yield StepReport(
            step=step,
            targets=targets,
            tokens=tokens,
            loss=nats,
            bits_per_byte=bits_per_byte(nats * targets, num_bytes),
            parts=parts,
            norm=norm,
            rates=optimizers.rates(step),
            balance=balance(loads),
            seconds=finished - started,
        )
        started = finished


def _means(sums: Mapping[str, Tensor], targets: int, processes: Processes) -> dict[str, float]:
    names = sorted(sums)
    together = processes.sum(torch.stack([sums[name].double().cpu() for name in names]))
    return {name: float(value) / targets for name, value in zip(names, together, strict=True)}


def _check_finite(step: int, parts: Mapping[str, float], norm: float) -> None:
    for name, value in (*parts.items(), ("norm of the gradients", norm)):
        if not -float("inf") < value < float("inf"):
            raise TrainingError(
                f"the {name} of step {step} is {value}: nothing was updated; go on from the last checkpoint with a "
                "lower rate, or look at that step's data"
            )
