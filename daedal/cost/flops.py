"""The FLOPs of decoding one token, by part: matrices, attention over each kind of row, the indexer; and of any tokens
that a sequence is fed.

A multiply-add counts 2; what a token reads is the business of `reading`. Decoding is counted with the key and value
projections of latent attention absorbed, and longer pieces in the form that costs less, as the model computes them.
Knows no device and no time.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from daedal import shapes
from daedal.config import ModelConfig
from daedal.cost import cached
from daedal.cost.reading import ATTENTION_KINDS, INDEXER, Reading, readings
from daedal.cost.weights import active_params

_BITS: Mapping[str, int] = {"bf16": 16, "fp8": 8, "fp4": 4}


@dataclass(frozen=True, kw_only=True)
class DecodeFlops:
    """FLOPs of one decoded token.

    attention: by the kind of row, as `Reading` has them. weighted: the total with FP8 at 1/2 and FP4 at 1/4 of bf16;
    matrices are multiplied in FP8 where the checkpoint is quantised, FP4 experts too; index keys are FP8 in V3.2, FP4
    in V4.
    """

    linear: int
    attention: Mapping[str, int]
    indexer: int
    weighted: int

    @property
    def total(self) -> int:
        return self.linear + sum(self.attention.values()) + self.indexer


def decode(config: ModelConfig, *, active: int, context: int) -> DecodeFlops:
    """Counts the token that meets `active` parameters and a cache of `context` tokens."""
    linear = 2 * active
    found = dict.fromkeys((*ATTENTION_KINDS, INDEXER), 0)
    weighted = _weighted(linear, "bf16" if config.quantization_config is None else "fp8")
    for reading, layers in readings(config).items():
        flops = 2 * layers * reading.absorbed * reading.rows(context)
        found[reading.kind] += flops
        weighted += _weighted(flops, reading.arithmetic)
    indexer = found.pop(INDEXER)
    return DecodeFlops(linear=linear, attention=found, indexer=indexer, weighted=weighted)


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """What feeding tokens to a model, or to its first drafting module, costs. matrices: FLOPs of a token without the
    head; head: of a row of logits; readings: with the layers that have them.
    """

    matrices: int
    head: int
    readings: tuple[tuple[Reading, int], ...]

    @classmethod
    def of(cls, config: ModelConfig) -> "Feeding":
        """The backbone."""
        active, head = active_params(config, shapes.parameters(config)), config.vocab_size * config.hidden_size
        return cls(matrices=2 * (active - head), head=2 * head, readings=tuple(readings(config).items()))

    @classmethod
    def of_drafting(cls, config: ModelConfig) -> "Feeding":
        """One drafting module; its head is the backbone's."""
        modules, head = config.num_nextn_predict_layers, config.vocab_size * config.hidden_size
        active = active_params(config, shapes.drafting(config)) // modules
        added = Counter(readings(config, drafting=True)) - Counter(readings(config))
        each = tuple((reading, layers // modules) for reading, layers in added.items())
        return cls(matrices=2 * active, head=2 * head, readings=each)

    def flops(self, past: int, tokens: int, rows: int) -> float:
        """Of `tokens` tokens of one sequence that has `past` tokens in its cache, and `rows` rows of logits."""
        read = 0.0
        for reading, layers in self.readings:
            if tokens == 1:
                read += layers * reading.absorbed * reading.rows(past + 1)
                continue
            every = reading.rows_up_to(past + tokens) - reading.rows_up_to(past)
            read += layers * reading.cheapest(every, cached.rows(reading.slot, past))
        return self.matrices * tokens + self.head * rows + 2.0 * read

    def written(self, past: int, tokens: int) -> float:
        """Of `tokens` tokens that are fed one after the other, each with its row of logits."""
        read = sum(
            layers * reading.absorbed * (reading.rows_up_to(past + tokens) - reading.rows_up_to(past))
            for reading, layers in self.readings
        )
        return (self.matrices + self.head) * tokens + 2.0 * read


def _weighted(flops: int, arithmetic: str) -> int:
    return flops * _BITS[arithmetic] // _BITS["bf16"]
