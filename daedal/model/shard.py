"""One rank's part of a model that several ranks hold: tensor parallel but for the experts, which are dealt out whole.

Which part of each parameter that is, `shapes.sharing` says. Every block of a layer is computed as ever, by the heads,
columns and experts that are here; its result is then partial, and is summed over the ranks before it joins the residual
stream (Megatron-LM, section 3). So all ranks carry the same numbers from layer to layer, route the same tokens to the
same experts, and choose the same entries; no token travels. The head knows the logits of some tokens of the vocabulary,
which are put side by side. Loads nothing, and knows no cache and no steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daedal import shapes
from daedal.config import ModelConfig
from daedal.mesh import Team
from daedal.model.attention_compressed import CompressedAttention
from daedal.model.attention_latent import LatentAttention
from daedal.model.moe import Experts, MoE, each
from daedal.model.packing import assign
from daedal.model.transformer import Transformer, typed
from daedal.shapes import sharing


class Shard(Transformer):
    """This rank's part, under the names of the whole and on the meta device, in `dtype`: `checkpoint.load` fills it.

    config: of the whole. ConfigError where the ranks of `team` cannot share such a model. A shard is for inference.
    """

    team: Team

    def __init__(self, config: ModelConfig, team: Team, dtype: torch.dtype):
        sharing.check(config, team.size)
        with torch.device("meta"):
            super().__init__(config)
        self.team, self.refuses_recording = team, "its steps wait for other processes"
        for layer in self.layers:
            _divide(layer, team)
        for slot in shapes.parameters(config):
            rows = sharing.shape(slot, team.rank, team.size)
            kind = torch.int64 if slot.role == "hash_table" else dtype
            assign(self, slot.name, torch.empty(rows, dtype=kind, device="meta"))
        typed(self, dtype, shapes.parameters(config))

    @property
    def cached_config(self) -> ModelConfig:
        return sharing.cached(self.config, self.team.size)

    def head(self, hidden_TD: Tensor) -> Tensor:
        vocabulary, size = self.config.vocab_size, self.team.size
        logits = super().head(hidden_TD)
        # Parts that are put side by side have one shape; what pads the last one is cut off again.
        padding = -(-vocabulary // size) - logits.shape[-1]
        return self.team.joined(F.pad(logits, (0, padding)))[..., :vocabulary]


class OwnExperts(nn.Module):
    """The experts of one layer that are here, in the place and under the names of `Experts`: they make a part of each
    token's weighed sum.
    """

    def __init__(self, whole: Experts, team: Team):
        super().__init__()
        self.limit = whole.limit
        self.count = whole.gate_up_proj.shape[0] // team.size
        self.first = team.rank * self.count
        self.gate_up_proj, self.down_proj = whole.gate_up_proj, whole.down_proj

    def forward(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        own_TA = ids_TA - self.first
        tokens_N, places_N = ((own_TA >= 0) & (own_TA < self.count)).nonzero(as_tuple=True)
        total_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        if len(tokens_N):
            ids_N, weights_N = own_TA[tokens_N, places_N], weights_TA[tokens_N, places_N]
            stacks = self.gate_up_proj, self.down_proj
            results_ND = each(x_TD[tokens_N], ids_N, *stacks, arithmetic=None, limit=self.limit)
            total_TD.index_add_(0, tokens_N, results_ND.to(total_TD.dtype) * weights_N.unsqueeze(-1))
        return total_TD.to(x_TD.dtype)


def _divide(layer: nn.Module, team: Team) -> None:
    """Makes a layer's blocks those of one rank. What counts heads counts those that are here."""
    attention, mlp = layer.self_attn, layer.mlp
    if isinstance(attention, LatentAttention):
        attention.num_heads //= team.size
        attention.kv_b_proj.heads //= team.size
    elif isinstance(attention, CompressedAttention):
        attention.heads //= team.size
        attention.o_a_proj.groups //= team.size
    if isinstance(mlp, MoE):
        mlp.experts = OwnExperts(mlp.experts, team)  # type: ignore[assignment]

    def summed(block: nn.Module, given: tuple[object, ...], part_TD: Tensor) -> Tensor:
        return team.sum(part_TD)

    for block in (attention, mlp):
        assert isinstance(block, nn.Module)
        block.register_forward_hook(summed)
