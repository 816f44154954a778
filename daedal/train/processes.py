"""The processes that train one model together: sums over all of them, and what it looks like when one is gone.

How parameters are spread is `parallel`'s business; what must be exchanged beside them is a few numbers per step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from daedal.ops import silicon


@dataclass(frozen=True, kw_only=True, eq=False)
class Processes:
    """group: those that exchange; None for one process alone. device: where their sums are exchanged."""

    group: dist.ProcessGroup | None = None
    device: torch.device | str = "cpu"

    def total(self, counts: Sequence[int]) -> list[int]:
        """Each count summed over all processes."""
        if self.group is None:
            return list(counts)
        return [int(count) for count in self.sum(torch.tensor(counts, dtype=torch.int64))]

    def sum(self, values: Tensor) -> Tensor:
        """The same, of a tensor; the result lies on the CPU."""
        if self.group is None:
            return values.cpu()
        device = torch.device(self.device)
        # A few numbers: where the chip has no float64 they go through the host.
        narrow = values.dtype == torch.float64 and not silicon.of(device).doubles
        together = values.to("cpu" if narrow else device, copy=True)
        dist.all_reduce(together, group=self.group)
        return together.cpu()

    def merged(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, each summed over the processes that have one of that name, as float64 on the CPU.

        Names may differ from process to process, a stage of a pipeline has layers that others have not; shapes of one
        name may not.
        """
        if self.group is None:
            return {name: tensor.cpu().double() for name, tensor in named.items()}
        told: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(told, {name: tuple(tensor.shape) for name, tensor in named.items()}, group=self.group)
        shapes: dict[str, tuple[int, ...]] = {}
        for one in told:
            shapes |= one
        names = sorted(shapes)
        own = [named[name] if name in named else torch.zeros(shapes[name]) for name in names]
        if not own:
            return {}
        together = self.sum(torch.cat([tensor.detach().cpu().double().flatten() for tensor in own]))
        pieces = together.split([prod(shapes[name]) for name in names])
        return {name: piece.view(shapes[name]) for name, piece in zip(names, pieces, strict=True)}


ALONE = Processes()


def lost(error: BaseException) -> bool:
    """Whether `error` says that another process is gone, or does not answer within the group's time limit."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
