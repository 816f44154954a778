"""Which experts the tokens of a few steps chose, for who wants to see it: counted only when somebody asks.

Steps that are looked at run as written, not from a recording, which shows nothing; their numbers are the same. Knows
no requests.
"""

import torch
from torch import Tensor

from daedal.config import ModelConfig
from daedal.infer.stats import ExpertsSeen
from daedal.model.forward_pass import Attended, Indexed, Routed

STEPS = 8


class Look:
    """Watches forward passes (`Observer`). config: of the model that serves. steps: to be watched."""

    reads_all = False

    def __init__(self, config: ModelConfig, steps: int = STEPS):
        self._num_experts = config.n_routed_experts or 0
        self._left = steps if self._num_experts else 0
        self._counts: dict[int, Tensor] = {}
        self._num_tokens = 0

    @property
    def over(self) -> bool:
        """Whether all steps were seen; at once for a model without experts."""
        return self._left <= 0

    def ran(self, num_tokens: int) -> None:
        """A step with so many tokens was watched."""
        self._left -= 1
        self._num_tokens += num_tokens

    def seen(self) -> ExpertsSeen:
        """What there was to see."""
        layers = sorted(self._counts)
        counts = tuple(tuple(self._counts[layer].tolist()) for layer in layers)
        return ExpertsSeen(layers=tuple(layers), counts=counts, num_tokens=self._num_tokens)

    def routed(self, seen: Routed, *, again: bool) -> None:
        counts_E = torch.bincount(seen.ids_TA.flatten().long(), minlength=self._num_experts)
        before_E = self._counts.get(seen.layer)
        self._counts[seen.layer] = counts_E if before_E is None else before_E + counts_E

    def indexed(self, seen: Indexed, attended: Attended, *, again: bool) -> None:
        """What indexers do is not looked at."""
