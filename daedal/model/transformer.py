"""The one model class, assembled layer by layer from the kinds that its configuration names.

Module names are the published ones without their `model.` prefix, so that a checkpoint's names need next to no
translation; routed experts are stacked. The list of parameters is `shapes.parameters`, held equal by a test.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.errors import RequestError
from daedal.model.attention_dense import DenseAttention
from daedal.model.attention_latent import LatentAttention
from daedal.model.batch import CacheView, RaggedBatch
from daedal.model.moe import GatedMLP, MoE
from daedal.model.norm import RMSNorm
from daedal.model.rotary import angles


class Layer(nn.Module):
    """Attention, then feed-forward, each on the normed input and added to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        latent = config.layer_types[layer] == "latent_attention"
        sparse = config.mlp_layer_types[layer] == "sparse"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer) if latent else DenseAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MoE(config) if sparse else GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        )

    def forward(self, x_TD: Tensor, batch: RaggedBatch, turn: tuple[Tensor, Tensor], cache: CacheView | None) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), batch, turn, cache)
        y_TD: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return y_TD


class Transformer(nn.Module):
    """A language model: token ids to logits.

    Parameters are allocated on torch's default device and dtype and not initialised: `checkpoint.load` fills them from
    files, `initialise` with random numbers.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Given its weight, the module draws no random numbers, for which the meta device would import a compiler.
        rows = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=rows)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
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
        x_TD = self.embed_tokens(batch.ids_T)
        turn = angles(self.config, batch.positions_T)
        for layer in self.layers:
            x_TD = layer(x_TD, batch, turn, cache)
        if rows is not None:
            x_TD = x_TD[rows]
        x_TD = self.norm(x_TD)
        return x_TD if hidden else self.head(x_TD)

    def head(self, hidden_TD: Tensor) -> Tensor:
        """Normed hidden states to logits_TV in float32, never rounded to fewer bits in between (float64 stays)."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return ops.linear(hidden_TD.to(wide), self._wide_head(wide))

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
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype


@torch.no_grad()
def initialise(model: Transformer, *, seed: int) -> Transformer:
    """Fills `model` with random weights: normal with the configuration's deviation, norms 1, biases 0. Same seed and
    device, same weights.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, model.config.initializer_range, generator=generator)
    return model


def empty(
    config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A Transformer with uninitialised parameters of `dtype` on `device`. The router's correction bias stays float32:
    in fewer bits it flips experts.
    """
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()
