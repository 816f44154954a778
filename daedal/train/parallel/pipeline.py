"""Pipeline parallelism: layers cut into stages, micro-batches through them one forward, one backward (1F1B).

The first stage holds the embedding, the last one norm, head and drafting modules. These modules embed tokens too, and
so does a tied head: the last stage then has a copy of the embedding, whose gradients and those of the first are summed
on both, so that both take the same steps. Between stages travel states, and their gradients back, nothing else: every
stage reads the same batches from the same sampler, so boundaries, positions and ids are there already. Each stage
concludes its own part of the objective, whose sum is the objective of the whole.

The schedule is written out here. `torch.distributed.pipelining` wants shapes that are the same for every micro-batch
and one loss at the end; here samples may be shorter, and balance and indexers' losses arise on every stage.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from daedal.errors import ConfigError
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass, Observer
from daedal.model.transformer import Transformer
from daedal.train.batches import Batch
from daedal.train.clipping import Spread, gradient_norm
from daedal.train.learner import Objective, Sums, Tally, counted
from daedal.train.objective import Loss, Watch
from daedal.train.owners import local
from daedal.train.parallel.layout import Place
from daedal.train.parallel.sharding import keep_whole, keep_whole_after, release, shard


class StagedObjective(Protocol):
    """An objective that stages can conclude apart, as `Pretraining` does."""

    def watch(self, model: Transformer) -> Watch: ...

    def conclude(
        self, model: Transformer, batch: Batch, states: Tensor | None, watch: Watch, *, share: float
    ) -> Loss: ...


class Elsewhere(nn.Module):
    """Stands where another stage has a module."""


class Stage(Transformer):
    """What one stage holds of a model, under the names of the whole. layers_here: the layers' indices."""

    def __init__(self, model: Transformer, place: Place):
        with torch.device("meta"):
            super().__init__(model.config, drafting=len(model.mtp) > 0)
        self.recompute, self.compute_dtype = model.recompute, model.compute_dtype
        self.layers_here = cut(len(model.layers), place.layout.stages)[place.stage]
        self.is_first, self.is_last = place.is_first, place.is_last
        for index in range(len(model.layers)):
            self.layers[index] = model.layers[index] if index in self.layers_here else Elsewhere()
        # Of layers here, of all layers, of drafting modules.
        self._indexers = _indexers(self.layers), _indexers(model.layers), _indexers(model.mtp)
        tied = model.config.tie_word_embeddings
        self.copies_embedding = self.is_last and not self.is_first and (tied or len(model.mtp) > 0)
        held = dict.fromkeys(("hc_head", "norm", "lm_head"), self.is_last)
        held["embed_tokens"] = self.is_first or self.copies_embedding
        for name, here in held.items():
            setattr(self, name, getattr(model, name) if here else Elsewhere())
        self.mtp = model.mtp if self.is_last else nn.ModuleList()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def share_of_indexers(self) -> float:
        """Of all layers that have an indexer, drafting modules among them, those that lie here."""
        here = self._indexers[0] + (self._indexers[2] if self.is_last else 0)
        total = self._indexers[1] + self._indexers[2]
        return here / total if total else 1.0

    def carry(self, batch: RaggedBatch, received: Tensor | None, observer: Observer) -> Tensor:
        """From the embedding, or what the stage before sent, through the layers here: x_TD, or V4's streams_TMD."""
        carried = received
        if carried is None:
            carried = self._embed(batch)
            if self.config.hc_mult is not None:
                carried = carried.unsqueeze(1).expand(-1, self.config.hc_mult, -1).contiguous()
        step = ForwardPass(self.config, batch, None, observer)
        for index in self.layers_here:
            carried = self._through(self.layers[index], carried, step)
        return carried

    def settled(self, carried: Tensor) -> Tensor:
        """What `finish` and the drafting modules start from, as `Transformer.states` gives it."""
        return carried if self.config.is_compressed else self._normed(carried)


def cut(num_layers: int, stages: int) -> list[range]:
    """The layers of each stage, as even as may be; the last ones, which have head and drafting too, get fewer."""
    each, more = divmod(num_layers, stages)
    starts = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def turns(stage: int, stages: int, count: int) -> Iterator[bool]:
    """What a stage does with `count` micro-batches, in order: True for the next one's forward pass, False for the next
    one's backward pass. No stage has more than `stages - stage` of them in flight.
    """
    ahead = min(stages - 1 - stage, count)
    yield from [True] * ahead
    for _ in range(count - ahead):
        yield from (True, False)
    yield from [False] * ahead


class StageLesson(nn.Module):
    """The root: (objective, batch, received) to (total, what to send or None, loss)."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def forward(
        self, objective: StagedObjective, batch: Batch, received: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Loss]:
        stage = self.stage
        watch = objective.watch(stage)
        carried = stage.carry(batch.inputs, received, watch)
        share = stage.share_of_indexers()
        states = stage.settled(carried) if stage.is_last else None
        loss = objective.conclude(stage, batch, states, watch, share=share)
        return loss.total, None if stage.is_last else carried, loss


@dataclass
class _Flight:
    """One micro-batch between its forward and its backward pass."""

    received: Tensor | None
    sent: Tensor | None
    total: Tensor


class Pipelined:
    """A `Learner` whose process holds one stage of the model, sharded over the processes of that stage.

    The whole model is given, the same on every process; what lies on other stages is not kept. `model` is the `Stage`.
    """

    def __init__(self, whole: Transformer, place: Place):
        place.layout.check(whole.config)
        self._place = place
        self._shares_embedding = whole.config.tie_word_embeddings or len(whole.mtp) > 0
        self.model: Stage = Stage(whole, place)
        self._lesson = StageLesson(self.model)
        self._on_the_way: list[tuple[dist.Work, Tensor]] = []
        shard(self._lesson, self.model, place)

    def accumulate(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        staged, place = _staged(objective), self._place
        counts, tally = counted(micro_batches, place.samples), Tally()
        if not counts.targets:
            return counts
        whole = place.is_first and not self.model.embed_tokens.weight.requires_grad
        keep_whole(self._lesson, whole)
        waiting, flying = deque(micro_batches), deque[_Flight]()
        for forward in turns(place.stage, place.layout.stages, len(micro_batches)):
            if forward:
                flight, loss = self._forward(staged, waiting.popleft())
                flying.append(flight)
                tally.add(loss)
            else:
                last = not waiting and len(flying) == 1
                keep_whole_after(self._lesson, whole and not last)
                self._backward(flying.popleft(), counts.targets, last=last)
        self._arrived()
        self._sum_embedding()
        return tally.sums(counts, place.everyone)

    @torch.no_grad()
    def measure(self, objective: Objective, micro_batches: Sequence[Batch]) -> Sums:
        staged, tally = _staged(objective), Tally()
        for batch in micro_batches:
            tally.add(self._forward(staged, batch)[1])
        self._arrived()
        release(self._lesson)
        return tally.sums(counted(micro_batches, self._place.samples), self._place.everyone)

    def clip(self, most: float) -> float:
        parameters = list(self.model.parameters())
        # The copy of the embedding has the gradient of the first stage's, which counts it.
        copied = self.model.embed_tokens.weight if self.model.copies_embedding else None
        own = [parameter for parameter in parameters if parameter is not copied]
        norm = gradient_norm([Spread(parameters=own, groups=(self._place.ahead,))], self._place.device)
        if math.isfinite(norm) and norm > most:
            for parameter in parameters:
                if parameter.grad is not None:
                    local(parameter.grad).mul_(most / norm)
        return norm

    def _forward(self, objective: StagedObjective, batch: Batch) -> tuple[_Flight, Loss]:
        place, batch = self._place, batch.to(self._place.device)
        received = None
        if not place.is_first:
            received = self._receive(batch, place.stage - 1, place.ahead).requires_grad_(torch.is_grad_enabled())
        total, sent, loss = self._lesson(objective, batch, received)
        if sent is not None:
            self._send(sent.detach(), place.stage + 1, place.ahead)
        return _Flight(received, sent, total), loss

    def _backward(self, flight: _Flight, targets: int, *, last: bool) -> None:
        place = self._place
        roots, gradients = [], []
        if flight.total.requires_grad:
            roots.append(flight.total)
            gradients.append(torch.full_like(flight.total, 1 / targets))
        if flight.sent is not None:
            gradient = self._receive_like(flight.sent, place.stage + 1, place.back)
            if flight.sent.requires_grad:
                roots.append(flight.sent)
                gradients.append(gradient)
        cast(FSDPModule, self._lesson).set_is_last_backward(last)
        if roots:
            torch.autograd.backward(roots, gradients)
        if flight.received is not None:
            gradient = torch.zeros_like(flight.received) if flight.received.grad is None else flight.received.grad
            self._send(gradient, place.stage - 1, place.back)

    def _receive(self, batch: Batch, stage: int, group: dist.ProcessGroup) -> Tensor:
        config = self.model.config
        streams = () if config.hc_mult is None else (config.hc_mult,)
        shape = (batch.inputs.ids_T.shape[0], *streams, config.hidden_size)
        dtype = self.model.compute_dtype or self.model.dtype
        return self._receive_like(torch.empty(shape, dtype=dtype, device="meta"), stage, group)

    def _receive_like(self, shaped: Tensor, stage: int, group: dist.ProcessGroup) -> Tensor:
        arriving = torch.empty(shaped.shape, dtype=shaped.dtype, device=self._place.device)
        dist.recv(arriving, self._place.rank_of(stage), group=group)
        return arriving

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup) -> None:
        """Does not wait: states and gradients have groups of their own, so neither direction holds up the other."""
        self._on_the_way = [sending for sending in self._on_the_way if not sending[0].is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._place.rank_of(stage), group=group)
        assert work is not None
        self._on_the_way.append((work, tensor))

    def _arrived(self) -> None:
        for work, _ in self._on_the_way:
            work.wait()
        self._on_the_way.clear()

    def _sum_embedding(self) -> None:
        place = self._place
        if not self._shares_embedding or not (place.is_first or place.is_last):
            return
        weight = self.model.embed_tokens.weight
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(local(weight.grad), group=place.ends)


def _staged(objective: Objective) -> StagedObjective:
    if not hasattr(objective, "watch") or not hasattr(objective, "conclude"):
        raise ConfigError(
            f"the objective {type(objective).__name__} cannot be cut into stages: it needs `watch` and `conclude`, as "
            "`Pretraining` has; else train with stages=1"
        )
    return cast(StagedObjective, objective)


def _indexers(modules: nn.Module) -> int:
    return sum(name.endswith(".indexer") for name, _ in modules.named_modules())
