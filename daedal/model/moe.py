"""The two feed-forward kinds: one gated MLP, and DeepSeekMoE with fine-grained routed and always-on shared experts.

Routing runs in float32 at least, whatever the model's dtype: in bfloat16 near-ties flip experts (DeepSeekMoE, section
3; V2, section 2.2; V3, section 2.1.2). In V4's first layers a table gives each token id its experts, and the router
only their weights (V4, section 2.1). The correction bias steers the choice only, never the weights, and is no gradient
parameter. Dropless: every token reaches all of its experts.
"""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.forward_pass import ForwardPass, Routed
from daedal.model.linear import Linear, like
from daedal.ops.arithmetic import Arithmetic


class GatedMLP(nn.Module):
    """down(swiglu(gate x, up x)); limit as in `ops.swiglu`."""

    def __init__(self, hidden: int, width: int, *, bias: bool, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD), limit=self.limit))
        return y_TD


class Router(nn.Module):
    """x_TD to (ids_TA, weights_TA, float32 or float64). hashed: experts by the table `tid2eid` [V, A], not by choice.

    layer: the layer's index, by which it names itself to observers.
    """

    def __init__(self, config: ModelConfig, layer: int, *, hashed: bool):
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        biased = config.topk_method == "noaux_tc" and not hashed
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts) if biased else None)
        table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64) if hashed else None
        self.tid2eid: Tensor | None
        self.register_buffer("tid2eid", table)

    def forward(self, x_TD: Tensor, step: ForwardPass) -> tuple[Tensor, Tensor]:
        config = self.config
        wide = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
        logits_TE = ops.linear(wide, self.weight.to(wide.dtype))
        ids_TA, weights_TA = ops.route(
            logits_TE,
            self.e_score_correction_bias,
            scoring=config.scoring_func,
            method=config.topk_method,
            num_active=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            given_TA=None if self.tid2eid is None else self.tid2eid[step.batch.ids_T],
        )
        if step.observer is not None:
            seen = Routed(
                layer=self.layer,
                batch=step.batch,
                logits_TE=logits_TE,
                ids_TA=ids_TA,
                scoring=config.scoring_func,
                hashed=self.tid2eid is not None,
            )
            step.observer.routed(seen, again=step.again)
        return ids_TA, weights_TA


class Experts(nn.Module):
    """The routed experts of one layer, stacked: gate_up_proj [E, 2F, D] with gate rows first, down_proj [E, D, F].

    arithmetic: as of `Linear`.
    """

    arithmetic: Arithmetic | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe_intermediate_size is not None
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        weights = self.gate_up_proj, self.down_proj
        if self.arithmetic is None:
            cast = (like(weight, x_TD) for weight in weights)
            return ops.experts(x_TD, ids_TA, weights_TA, *cast, limit=self.limit)
        return ops.scaled_experts(x_TD, ids_TA, weights_TA, *weights, self.arithmetic, limit=self.limit)


def each(
    rows_ND: Tensor,
    ids_N: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    arithmetic: Arithmetic | None,
    limit: float | None,
) -> Tensor:
    """Each row through the one expert of its id, not weighed: [N, D]. For who weighs and sums where the tokens are."""
    ids_N1, ones_N1 = ids_N.unsqueeze(1), torch.ones((len(ids_N), 1), dtype=torch.float32, device=rows_ND.device)
    if arithmetic is not None:
        return ops.scaled_experts(rows_ND, ids_N1, ones_N1, gate_up, down, arithmetic, limit=limit)
    return ops.experts(rows_ND, ids_N1, ones_N1, like(gate_up, rows_ND), like(down, rows_ND), limit=limit)


class MoE(nn.Module):
    """x_TD to the sum of its chosen experts and the shared ones."""

    def __init__(self, config: ModelConfig, layer: int, *, hashed: bool = False):
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.gate = Router(config, layer, hashed=hashed)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        shared = GatedMLP(config.hidden_size, width, bias=False, limit=config.swiglu_limit) if width else None
        self.shared_experts = shared

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        y_TD: Tensor = self.experts(x_TD, *self.gate(x_TD, step))
        return y_TD if self.shared_experts is None else y_TD + self.shared_experts(x_TD)
