"""Sharded data parallelism (FSDP2): every process keeps a part of each parameter and reads samples of its own.

A layer's parameters are put together while it computes, forwards and backwards; its gradients are summed, never
averaged, and each process keeps its part. A drafting module is entered in several ways, so its attention and its
feed-forward are units of their own, and what is left of it lies with embedding, norm and head: these stay whole from
the first use to the end of the backward pass. An objective enters a model by many methods; it is called inside the
`forward` of one module, the root, so that all of them find whole parameters.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from daedal.model.transformer import Transformer
from daedal.train.batches import Batch
from daedal.train.clipping import Spread, clip
from daedal.train.learner import Objective, Sums, Tally, counted
from daedal.train.objective import Loss
from daedal.train.parallel.experts import deal_experts
from daedal.train.parallel.layout import Place


class Lesson(nn.Module):
    """The root: (objective, batch) to (total, loss). The total stands alone for FSDP to see that it is one tensor."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch) -> tuple[Tensor, Loss]:
        loss = objective(self.model, batch)
        return loss.total, loss


class Sharded:
    """A `Learner` whose model is sharded over all processes of its `place`, in place.

    The model is whole and the same on every process before. Optimisers are made of its parameters afterwards.
    """

    def __init__(self, model: Transformer, place: Place):
        place.layout.check(model.config)
        self.model, self._place = model, place
        self._lesson = Lesson(model)
        shard(self._lesson, model, place)

    def accumulate(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        counts, tally = counted(micro_batches, self._place.samples), Tally()
        if not counts.targets:
            return counts
        keep_whole(self._lesson, not self.model.embed_tokens.weight.requires_grad)
        for batch in micro_batches:
            total, loss = self._lesson(objective, batch.to(self._place.device))
            (total / counts.targets).backward()
            tally.add(loss)
        return tally.sums(counts, self._place.everyone)

    @torch.no_grad()
    def measure(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        tally = Tally()
        for batch in micro_batches:
            tally.add(self._lesson(objective, batch.to(self._place.device))[1])
        release(self._lesson)
        return tally.sums(counted(micro_batches, self._place.samples), self._place.everyone)

    def clip(self, most: float) -> float:
        return clip([Spread(parameters=list(self.model.parameters()))], most, self._place.device)


def shard(root: nn.Module, model: Transformer, place: Place) -> None:
    """Shards the parameters of `root` over the data processes of `place`; `model` is the part of it with layers."""
    for layer in model.layers:
        _shard_layer(layer, [layer], place)
    for draft in model.mtp:
        _shard_layer(draft, [part for name, part in draft.named_children() if name in ("self_attn", "mlp")], place)
    fully_shard(root, mesh=place.data)
    for unit in _units(root):
        unit.set_gradient_divide_factor(1.0)
        # Else the factor goes into a kind of sum that gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)


def _shard_layer(layer: nn.Module, units: Sequence[nn.Module], place: Place) -> None:
    if place.layout.experts > 1 and (experts := deal_experts(layer, place.expert)) is not None:
        # Along the rows: the experts themselves are dealt out already.
        fully_shard(experts, mesh=place.replica, shard_placement_fn=lambda parameter: Shard(1))
    for unit in units:
        if next(unit.parameters(), None) is not None:
            fully_shard(unit, mesh=place.data)


def keep_whole(root: nn.Module, whole: bool) -> None:
    """Whether layers stay whole between their forward and their backward pass.

    They must where the backbone is frozen and indexers learn: no gradient comes in through a layer's output then, which
    is what lets FSDP put its parameters together again.
    """
    for unit in _units(root):
        if cast(nn.Module, unit) is not root:
            unit.set_reshard_after_forward(not whole, recurse=False)


def keep_whole_after(root: nn.Module, whole: bool) -> None:
    """Whether layers stay whole after the next backward pass, for that of another micro-batch that has none to ask."""
    for unit in _units(root):
        unit.set_reshard_after_backward(not whole, recurse=False)


def release(root: nn.Module) -> None:
    """Parameters that a forward pass without a backward pass left whole are given back."""
    for unit in _units(root):
        unit.reshard()


def _units(root: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in root.modules() if isinstance(module, FSDPModule))
