"""The processes that train one model together, as the loop sees them: sums over all of them. By default there is one.

How parameters are spread is `parallel`'s business; what must be exchanged beside them is a few numbers per step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Processes:
    """group: those that read different samples; None for one process alone. device: where its sums are exchanged."""

    group: dist.ProcessGroup | None = None
    device: str = "cpu"

    def total(self, counts: Sequence[int]) -> list[int]:
        """Each count summed over all processes."""
        if self.group is None:
            return list(counts)
        return [int(count) for count in self.sum(torch.tensor(counts, dtype=torch.int64))]

    def sum(self, values: Tensor) -> Tensor:
        """The same, of a tensor; the result lies on the CPU."""
        if self.group is None:
            return values
        together = values.to(self.device, copy=True)
        dist.all_reduce(together, group=self.group)
        return together.cpu()

    def summed(self, loads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Loads by layer, summed over all processes in one exchange. All must have the same layers."""
        layers = sorted(loads)
        if self.group is None or not layers:
            return dict(loads)
        together = self.sum(torch.cat([loads[layer] for layer in layers]))
        sizes = [loads[layer].numel() for layer in layers]
        return dict(zip(layers, together.split(sizes), strict=True))


ALONE = Processes()
