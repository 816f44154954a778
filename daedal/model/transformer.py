"""The one model class, assembled layer by layer from the kinds that its configuration names.

Module names are the published ones without their `model.` prefix, so that a checkpoint's names need next to no
translation; routed experts are stacked. The list of parameters is `shapes.parameters`, held equal by a test.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from daedal import ops, shapes
from daedal.config import ModelConfig
from daedal.errors import RequestError
from daedal.mesh import Team
from daedal.model.batch import CacheView, RaggedBatch
from daedal.model.forward_pass import ForwardPass, Observer
from daedal.model.hyper_connections import HyperHead
from daedal.model.layers import HyperLayer, Layer
from daedal.model.mtp import Draft, HyperDraft
from daedal.model.norm import RMSNorm
from daedal.ops.packed import Packed
from daedal.shapes import Slot


class Transformer(nn.Module):
    """A language model: token ids to logits.

    Parameters are allocated on torch's default device and dtype and not initialised: `checkpoint.load` fills them from
    files, `initialise` with random numbers. drafting: with the model's own drafting modules, `mtp`.

    recompute: with gradients, layers keep only their inputs and compute the rest again in the backward pass.
    compute_dtype: of activations, to which weights are cast where they are used; None for the weights' own.
    team: the ranks that hold the model together (`shard`); None for a model that is whole. refuses_recording: why its
    steps cannot be recorded as native calls, if they cannot.
    """

    recompute = False
    compute_dtype: torch.dtype | None = None
    team: Team | None = None
    refuses_recording: str | None = None

    def __init__(self, config: ModelConfig, *, drafting: bool = False):
        super().__init__()
        self.config = config
        # Given its weight, the module draws no random numbers, for which the meta device would import a compiler.
        rows = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=rows)
        layer_kind, draft_kind = (HyperLayer, HyperDraft) if config.is_compressed else (Layer, Draft)
        num_layers = config.num_hidden_layers
        self.layers = nn.ModuleList(layer_kind(config, layer) for layer in range(num_layers))
        self.hc_head = HyperHead(config) if config.is_compressed else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        num_drafts = config.num_nextn_predict_layers if drafting else 0
        self.mtp = nn.ModuleList(draft_kind(config, num_layers + module) for module in range(num_drafts))
        self._widened: tuple[tuple[int, int, torch.device], Tensor] | None = None

    def forward(
        self,
        batch: RaggedBatch,
        cache: CacheView | None = None,
        *,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """logits_TV in float32, or with `hidden` the normed states hidden_TD in the model's dtype.

        rows: int64 indices into T, the positions wanted; all without it. cache: extended by this batch; its sequences
        are those of the batch, in order.
        """
        carried = self._carry(batch, cache)
        if rows is not None:
            carried = carried[rows]
        hidden_TD = self._normed(carried)
        return hidden_TD if hidden else self.head(hidden_TD)

    def states(self, batch: RaggedBatch, cache: CacheView | None = None, observer: Observer | None = None) -> Tensor:
        """What `finish` and the drafting modules start from: hidden_TD, normed; in V4 the residual streams_TMD."""
        carried = self._carry(batch, cache, observer)
        return carried if self.config.is_compressed else self._normed(carried)

    def finish(self, states: Tensor) -> Tensor:
        """States of any positions to hidden_TD, normed, which `head` reads."""
        return self._normed(states) if self.config.is_compressed else states

    def draft(
        self,
        module: int,
        batch: RaggedBatch,
        states: Tensor,
        cache: CacheView | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """States of drafting module `module`, for the token after the next.

        batch: the tokens that follow each state, at the positions of the states. states: the backbone's, or the
        module's own to draft further. cache: one with slots for drafting.
        """
        step = ForwardPass(self.config, batch, cache, observer)
        return self._drafter(module).propose(states, self._embed(batch), step)

    def finish_draft(self, module: int, states: Tensor) -> Tensor:
        """A drafting module's states of any positions to hidden_TD, which `head` reads."""
        return self._drafter(module).finish(states)

    def _drafter(self, module: int) -> Draft | HyperDraft:
        drafter = self.mtp[module]
        assert isinstance(drafter, Draft | HyperDraft)
        return drafter

    def _carry(self, batch: RaggedBatch, cache: CacheView | None, observer: Observer | None = None) -> Tensor:
        """Through all layers: x_TD, or V4's streams_TMD."""
        carried = self._embed(batch)
        if self.config.hc_mult is not None:
            carried = carried.unsqueeze(1).expand(-1, self.config.hc_mult, -1).contiguous()
        step = ForwardPass(self.config, batch, cache, observer)
        for layer in self.layers:
            carried = self._through(layer, carried, step)
        return carried

    def _embed(self, batch: RaggedBatch) -> Tensor:
        x_TD: Tensor = self.embed_tokens(batch.ids_T)
        return x_TD if self.compute_dtype is None else x_TD.to(self.compute_dtype)

    def _through(self, layer: nn.Module, carried: Tensor, step: ForwardPass) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            result: Tensor = layer(carried, step)
            return result
        result = checkpoint(
            layer, carried, step, use_reentrant=False, context_fn=lambda: (nullcontext(), step.repeated())
        )
        return result

    def _normed(self, carried: Tensor) -> Tensor:
        hidden_TD: Tensor = self.norm(carried if self.hc_head is None else self.hc_head(carried))
        return hidden_TD

    def head(self, hidden_TD: Tensor) -> Tensor:
        """Normed hidden states to logits_TV in float32, never rounded to fewer bits in between (float64 stays)."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        weight: Tensor | Packed = self.lm_head.weight
        return ops.linear(hidden_TD.to(wide), weight if isinstance(weight, Packed) else self._wide_head(wide))

    def _wide_head(self, dtype: torch.dtype) -> Tensor:
        """The head's weights in `dtype`. While gradients are off a widened copy is kept, until the weights change.

        bfloat16 has 8 bits: logits near 25 would fall on steps of 0.125, and the best two tokens would often tie.
        Changes through `.data` in place are the only ones that torch does not count, and so are not seen here.
        """
        weight = self.lm_head.weight
        if weight.dtype == dtype or torch.is_grad_enabled():
            return weight.to(dtype)
        # Weights made in inference mode count no versions; nothing but inference mode can change them.
        version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.device)
        if self._widened is None or self._widened[0] != version:
            self._widened = (version, weight.detach().to(dtype))
        return self._widened[1]

    def logits(self, ids_BT: Tensor) -> Tensor:
        """[B, T, V] float32 for a rectangular batch of int64 ids, no cache; differentiable when gradients are on."""
        if ids_BT.dim() != 2 or ids_BT.dtype not in (torch.int64, torch.int32):
            raise RequestError(
                f"ids have shape {tuple(ids_BT.shape)} and type {ids_BT.dtype}: give whole numbers of shape [B, T]"
            )
        if ids_BT.numel():
            low, high, last = int(ids_BT.min()), int(ids_BT.max()), self.config.vocab_size - 1
            if low < 0 or high > last:
                raise RequestError(f"ids range from {low} to {high}: the vocabulary has 0 to {last}")
        ids_BT = ids_BT.to(device=self.device, dtype=torch.int64)
        logits_TV: Tensor = self(RaggedBatch.rectangular(ids_BT))
        return logits_TV.view(*ids_BT.shape, self.config.vocab_size)

    @property
    def cached_config(self) -> ModelConfig:
        """Whose `shapes.cache` this process keeps."""
        return self.config

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype


@torch.no_grad()
def initialise(model: Transformer, *, seed: int) -> Transformer:
    """Fills `model` with random weights: normal with the configuration's deviation, norms and scales 1, biases and
    sinks 0, hash tables uniform. Same seed and device, same weights.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("tid2eid"):
            tensor.random_(0, model.config.n_routed_experts, generator=generator)
        elif name.endswith(("bias", "base", "sinks")):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, model.config.initializer_range, generator=generator)
    return model


def empty(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    drafting: bool = False,
) -> Transformer:
    """A Transformer with uninitialised parameters of `dtype` on `device`; those that `shapes` calls wide are float32
    whatever the dtype (float64 stays). drafting: with the model's own drafting modules.
    """
    with torch.device("meta"):
        model = Transformer(config, drafting=drafting)
    typed(model, dtype, shapes.parameters(config) + (shapes.drafting(config) if drafting else []))
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def typed(model: Transformer, dtype: torch.dtype, slots: Sequence[Slot]) -> None:
    """Gives every parameter `dtype`, and float32 to those that `slots` call wide (float64 stays)."""
    model.to(dtype)
    if dtype == torch.float64:
        return
    wide = {slot.name for slot in slots if slot.wide}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in wide:
            tensor.data = tensor.data.float()
