"""A checkpoint's model through which texts go layer by layer, in float32, with one layer in memory at a time.

Windows of a text are sequences of their own, each read from an empty context. What layers read and give belongs to
whoever asks. Knows neither number formats nor gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from daedal.checkpoint.contents import Contents
from daedal.checkpoint.load import read_slots
from daedal.config import ModelConfig
from daedal.errors import CheckpointError
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.model.packing import assign
from daedal.model.transformer import empty
from daedal.packed import HEAD
from daedal.shapes import Slot, parameters


class LayerStream:
    """windows: int64 [T] each, token ids. CheckpointError for ids that the model does not have."""

    def __init__(self, contents: Contents, config: ModelConfig, windows: Sequence[Tensor]):
        last = config.vocab_size - 1
        for ids_T in windows:
            if int(ids_T.max()) > last:
                raise CheckpointError(
                    f"the calibration text has token {int(ids_T.max())}, the model has 0 to {last}: "
                    "check that the tokenizer belongs to the model"
                )
        self.config = config
        self.steps = [ForwardPass(config, RaggedBatch.rectangular(ids_T.unsqueeze(0)), None) for ids_T in windows]
        self._contents, self._slots = contents, parameters(config)
        self._model = empty(config, device="meta", dtype=torch.float32)

    def slots(self, index: int) -> list[Slot]:
        """The parameters of a layer."""
        return [slot for slot in self._slots if slot.layer == index]

    def embedded(self) -> list[Tensor]:
        """What the first layer reads, window by window: x_TD, or V4's streams_TMD."""
        table_VD = self._contents.read(self._slots[0], torch.float32)
        states = [table_VD[step.batch.ids_T] for step in self.steps]
        if self.config.hc_mult is not None:
            states = [x_TD.unsqueeze(1).expand(-1, self.config.hc_mult, -1).contiguous() for x_TD in states]
        return states

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A layer with its numbers, a copy, which is gone after the `with` block."""
        for slot, tensor in read_slots(self._contents, self.slots(index), torch.float32):
            assign(self._model, slot.name, tensor.clone())
        yield self._model.layers[index]
        self._model.layers[index].to("meta")

    def run(self, layer: nn.Module, states: Sequence[Tensor]) -> list[Tensor]:
        """What a layer gives for what it reads, window by window; no gradients."""
        with torch.no_grad():
            return [layer(state, step) for state, step in zip(states, self.steps, strict=True)]

    def logits(self, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """[T, V] for what the last layer gives, window by window; differentiable in it."""
        model, tied = self._model, self.config.tie_word_embeddings
        after = [slot for slot in self._slots[1:] if slot.layer is None]
        for slot, tensor in read_slots(self._contents, after + self._slots[:1] * tied, torch.float32):
            assign(model, HEAD if slot.role == "embedding" else slot.name, tensor)
        for state in states:
            yield model.head(model.finish(state) if self.config.is_compressed else model.norm(state))
        for module in (model.norm, model.lm_head, *([model.hc_head] if model.hc_head is not None else [])):
            module.to("meta")
