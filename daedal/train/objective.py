"""The objective of pre-training: the next token, the tokens after it, even experts, and indexers that learn.

An objective is any function of a model and a batch that gives a `Loss`; the loop knows no more of it. All parts are
sums over tokens, and the loop divides them once by the targets of the whole optimiser step, however many micro-batches
and processes it is cut into: so that cutting changes nothing. Follows V3, sections 2.1.2 and 2.2, and V3.2, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from daedal.errors import ConfigError
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import Attended, Indexed, Routed
from daedal.model.transformer import Transformer
from daedal.train.balance import load_of, sequence_loss
from daedal.train.batches import Batch
from daedal.train.bounds import number, whole
from daedal.train.cross_entropy import cross_entropy
from daedal.train.indexing import lesson

STAGES = ("dense", "warm-up", "sparse")


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """What one micro-batch gives.

    total: a sum over tokens, weights included, to be divided by the step's targets and differentiated. targets: how
    many tokens were predicted. parts: by name each part's own sum, not weighted, and detached. loads: by layer how
    many tokens chose each expert.
    """

    total: Tensor
    targets: int
    parts: Mapping[str, Tensor]
    loads: Mapping[int, Tensor] = field(default_factory=dict)


class Watch:
    """The observer of one forward pass: loads, balance losses and indexers' lessons."""

    def __init__(self, *, stage: str, index_topk: int | None, balances: bool):
        self.stage, self.index_topk, self.balances = stage, index_topk, balances
        self.loads: dict[int, Tensor] = {}
        self.sequence_losses: list[Tensor] = []
        self.indexer_losses: list[Tensor] = []
        self.recall, self.held, self.queries = torch.zeros(()), torch.zeros(()), 0

    @property
    def reads_all(self) -> bool:
        return self.stage != "sparse"

    def routed(self, seen: Routed, *, again: bool) -> None:
        if seen.hashed or self.stage == "warm-up":
            return
        loss = sequence_loss(seen) if self.balances else None
        if again:
            return
        self.loads[seen.layer] = self.loads.get(seen.layer, 0) + load_of(seen)
        if loss is not None:
            self.sequence_losses.append(loss)

    def indexed(self, seen: Indexed, attended: Attended, *, again: bool) -> None:
        if self.stage == "dense":
            return
        assert self.index_topk is not None
        learned = lesson(seen, attended, count=self.index_topk)
        if not again:
            self.indexer_losses.append(learned.loss)
            self.recall, self.held = self.recall + learned.recall, self.held + learned.held
            self.queries += learned.queries

    def shares(self) -> dict[str, float]:
        """Where attention read everything, how well indexers chose, as means over the queries that had to choose.

        recall: of the entries to which attention gave most, the share that was chosen. held: the share of attention
        that the chosen entries hold, of the most that so many could. 1 where there was nothing to choose.
        """
        if self.stage != "warm-up" or not self.indexer_losses:
            return {}
        sums = {"recall": float(self.recall), "held": float(self.held)}
        return {name: total / self.queries if self.queries else 1.0 for name, total in sums.items()}


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Next-token loss + mtp_weight / D x the losses of D drafting modules + balance_weight x the sequence-wise balance
    loss + indexer_weight x the indexers' divergence.

    stage: "dense", attention reads every entry and indexers rest; "warm-up", the same, and the indexers alone learn;
    "sparse", attention reads what they choose, and all learn. chunk: tokens whose logits are held at once.
    """

    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    indexer_weight: float = 1.0
    stage: str = "sparse"
    chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("mtp_weight", "balance_weight", "indexer_weight"):
            number(name, getattr(self, name), low=0.0, high=1e6)
        whole("chunk", self.chunk, low=1)
        if self.stage not in STAGES:
            raise ConfigError(f"stage is {self.stage!r}: give one of {', '.join(STAGES)}")

    def __call__(self, model: Transformer, batch: Batch) -> Loss:
        watch = self.watch(model)
        return self.conclude(model, batch, model.states(batch.inputs, observer=watch), watch)

    def watch(self, model: Transformer) -> Watch:
        """The observer that `model.states` is to have."""
        return Watch(stage=self.stage, index_topk=model.config.index_topk, balances=self.balance_weight > 0)

    def conclude(
        self, model: Transformer, batch: Batch, states: Tensor | None, watch: Watch, *, share: float = 1.0
    ) -> Loss:
        """The loss, once the layers have been passed.

        Where a pipeline cuts the model, each stage concludes what it has seen, and the sum over stages is the loss of
        the whole. states: None for a stage that hands them on. share: this stage's of all indexers that learn.
        """
        warming = self.stage == "warm-up"
        parts: dict[str, Tensor] = {}
        if states is not None:
            hidden_TD = model.finish(states)
            parts["next_token"] = cross_entropy(hidden_TD, model.lm_head.weight, batch.targets_T, chunk=self.chunk)
            if not warming or model.config.is_indexed:  # V3.2's drafting modules have indexers of their own
                for module in range(len(model.mtp)):
                    parts[f"mtp_{module}"], states = self._drafted(model, module, batch, states, watch)
        if watch.sequence_losses:
            parts["balance"] = torch.stack(watch.sequence_losses).sum()
        if watch.indexer_losses:
            parts["indexer"] = torch.stack(watch.indexer_losses).sum() * (share / len(watch.indexer_losses))
        total = self._weighed(parts, len(model.mtp), warming)
        shown = {name: part.detach() for name, part in parts.items()}
        for name, held in watch.shares().items():
            shown[name] = torch.tensor(held * share * batch.num_targets, device=batch.targets_T.device)
        return Loss(total=total, targets=batch.num_targets, parts=shown, loads=watch.loads)

    def _weighed(self, parts: Mapping[str, Tensor], modules: int, warming: bool) -> Tensor:
        weights = {"next_token": 1.0, "balance": self.balance_weight, "indexer": self.indexer_weight}
        weights |= {f"mtp_{module}": self.mtp_weight / modules for module in range(modules)}
        if warming:
            # The other parts keep no weight, but stay in the graph: every process must reach every parameter.
            weights = {name: self.indexer_weight if name == "indexer" else 0.0 for name in weights}
        if not parts:
            return torch.zeros(())
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def _drafted(
        self, model: Transformer, module: int, batch: Batch, states: Tensor, watch: Watch
    ) -> tuple[Tensor, Tensor]:
        """Module `module` predicts the token `module + 2` places ahead: (loss, its states at all places).

        A place takes part while the tokens up to its target lie in its own document. States of places that do not are
        the backbone's, so that places keep their numbers from module to module.
        """
        places_t, following, targets_t = shifted(batch, module + 1)
        # Also where no place takes part: all processes must reach the same parameters and count the same layers.
        drafted = model.draft(module, following, states[places_t], observer=watch)
        hidden_tD = model.finish_draft(module, drafted)
        loss = cross_entropy(hidden_tD, model.lm_head.weight, targets_t, chunk=self.chunk)
        return loss, states.index_copy(0, places_t, drafted.to(states.dtype))


def shifted(batch: Batch, ahead: int) -> tuple[Tensor, RaggedBatch, Tensor]:
    """(places_t, batch of the tokens `ahead` places on, their targets): each sequence less its last `ahead` places.

    The token after a sequence's last input is its last target, so nothing but the batch itself is needed.
    """
    places, sequences = [], []
    for begin, end in pairwise(batch.inputs.starts):
        kept = max(end - begin - ahead, 0)
        places.append(torch.arange(begin, begin + kept))
        sequences.append(kept)
    places_t = torch.cat(places).to(batch.targets_T.device) if places else batch.targets_T.new_empty(0)
    following = RaggedBatch(
        ids_T=batch.inputs.ids_T[places_t + ahead],
        positions_T=batch.inputs.positions_T[places_t],
        starts=tuple(accumulate(sequences, initial=0)),
        pasts=(0,) * len(sequences),
    )
    targets_t = batch.targets_T[places_t + ahead]
    return places_t, following, targets_t
