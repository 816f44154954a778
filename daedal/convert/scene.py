"""What the stages of one conversion share: the dense model, its texts, the examination, and who is told how far it is.

Everything heavy is made when it is first asked for, and once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from daedal.checkpoint.load import load
from daedal.config import ModelConfig
from daedal.convert.attention_statistics import StatisticsFile
from daedal.convert.quality import Examiner, Quality
from daedal.convert.settings import Settings, stock_config
from daedal.convert.texts import Texts, count
from daedal.convert.work import Work
from daedal.model.attention_dense import DenseAttention
from daedal.model.transformer import Transformer

Watch = Callable[[str, int, int], None]
STATISTICS = "statistics"
_SUMS = "sums.bin"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """source: the dense checkpoint. student: a latent form of it, which gets experts; None of a conversion that makes
    one. watch: told (what, done, in all).
    """

    source: Path
    student: Path | None
    settings: Settings
    texts: Texts
    work: Work
    watch: Watch

    @cached_property
    def model(self) -> Transformer:
        """The dense model in float32, on the CPU."""
        return load(self.source, device="cpu", dtype=torch.float32)

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.read(self.source)

    @cached_property
    def stock(self) -> ModelConfig:
        """Of the converted model, its feed-forward parts dense."""
        return stock_config(self.config, self.settings)

    @cached_property
    def examiner(self) -> Examiner:
        self.watch("reading the held-out text with the original", 0, 0)
        return Examiner(self.model, self.texts.held_out)

    def examine(self, model: Transformer) -> Quality:
        return self.examiner.examine(model, self.counting("examining", count(self.texts.held_out)))

    def counting(self, what: str, total: int) -> Callable[[int], None]:
        """A function to tell of each part that is done."""
        done = 0

        def tell(more: int) -> None:
            nonlocal done
            done += more
            self.watch(what, done, total)

        self.watch(what, 0, total)
        return tell

    def dense(self, layer: int) -> DenseAttention:
        attention = self.model.layers[layer].self_attn
        assert isinstance(attention, DenseAttention)
        return attention

    def statistics(self, directory: Path, *, new: bool = False) -> StatisticsFile:
        longest = max(len(ids_T) for ids_T in self.texts.calibration)
        return StatisticsFile(directory / _SUMS, self.config, longest=longest, new=new)

    @cached_property
    def collected(self) -> StatisticsFile:
        return self.statistics(self.work / STATISTICS)

    @contextmanager
    def attending(self, attention: Callable[[int], nn.Module]) -> Iterator[Transformer]:
        """The dense model with other attention in its layers, until the block ends."""
        _ = self.examiner  # which reads with the model as it is
        before = [self.dense(layer) for layer in range(len(self.model.layers))]
        try:
            for index, layer in enumerate(self.model.layers):
                layer.self_attn = attention(index)
            yield self.model
        finally:
            for layer, dense in zip(self.model.layers, before, strict=True):
                layer.self_attn = dense
