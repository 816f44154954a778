"""Who turns the micro-batches of a step into gradients: one process here, several in `parallel`.

The loop knows no more of processes than this. Whatever a learner does, the gradients that it leaves are those of the
objective's sum over all micro-batches and processes, divided by all targets; so a step is the same however it is cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from daedal.model.transformer import Transformer
from daedal.train.batches import Batch
from daedal.train.clipping import Spread, clip
from daedal.train.objective import Loss
from daedal.train.processes import ALONE, Processes

Objective = Callable[[Transformer, Batch], Loss]

_LOAD = "load of layer "


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What the micro-batches of a step add up to, over all processes and the same on each of them.

    parts: of the objective, by name, not divided. loads: int64 [E] by layer.
    """

    targets: int
    tokens: int
    num_bytes: int
    parts: Mapping[str, float] = field(default_factory=dict)
    loads: Mapping[int, Tensor] = field(default_factory=dict)


class Learner(Protocol):
    """One model and the processes that hold it, of which this one holds `model`: all of it, shards, or a stage."""

    @property
    def model(self) -> Transformer: ...

    def accumulate(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        """Adds this step's gradients to the parameters'. Without any target nothing is computed. All processes call."""

    def measure(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        """The same sums without gradients, for evaluation."""

    def clip(self, most: float) -> float:
        """The norm of all gradients, which are scaled down to `most` if it is above; as `clipping.clip`."""


@dataclass
class Tally:
    """Adds losses up while micro-batches are worked on."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        for name, part in loss.parts.items():
            self.parts[name] = self.parts[name] + part if name in self.parts else part
        for layer, load_E in loss.loads.items():
            self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E

    def sums(self, counts: Sums, processes: Processes) -> Sums:
        """Over all of `processes`. counts: the targets, tokens and bytes that are known already."""
        named = dict(self.parts) | {f"{_LOAD}{layer}": load_E for layer, load_E in self.loads.items()}
        merged = processes.merged(named)
        return Sums(
            targets=counts.targets,
            tokens=counts.tokens,
            num_bytes=counts.num_bytes,
            parts={name: float(value) for name, value in merged.items() if not name.startswith(_LOAD)},
            loads={
                int(name.removeprefix(_LOAD)): value.long() for name, value in merged.items() if name.startswith(_LOAD)
            },
        )


def counted(micro_batches: Sequence[Batch], processes: Processes) -> Sums:
    """Targets, tokens and bytes of a step. processes: those that read different samples."""
    targets, tokens, num_bytes = processes.total(
        [
            sum(batch.num_targets for batch in micro_batches),
            sum(batch.inputs.ids_T.numel() for batch in micro_batches),
            sum(batch.num_bytes for batch in micro_batches),
        ]
    )
    return Sums(targets=targets, tokens=tokens, num_bytes=num_bytes)


class Alone:
    """One process with all of the model."""

    def __init__(self, model: Transformer):
        self.model = model

    def accumulate(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        counts, tally = counted(micro_batches, ALONE), Tally()
        if not counts.targets:
            return counts
        for batch in micro_batches:
            loss = objective(self.model, batch.to(self.model.device))
            (loss.total / counts.targets).backward()
            tally.add(loss)
        return tally.sums(counts, ALONE)

    @torch.no_grad()
    def measure(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        tally = Tally()
        for batch in micro_batches:
            tally.add(objective(self.model, batch.to(self.model.device)))
        return tally.sums(counted(micro_batches, ALONE), ALONE)

    def clip(self, most: float) -> float:
        return clip([Spread(parameters=list(self.model.parameters()))], most, self.model.device)
