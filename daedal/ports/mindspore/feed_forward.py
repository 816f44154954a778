"""The feed-forward kinds as MindSpore cells: one gated MLP, and routed experts beside shared ones (DeepSeekMoE; V2,
section 2.2; V3, section 2.1.2).

Names of parameters are those of `daedal.shapes`. Graphs have no shapes that depend on the routing: few tokens read the
matrices of their own experts, many go through all experts and are weighted by 0 where they were not sent.
"""

from typing import Any

import mindspore as ms
from mindspore import nn, ops

from daedal.config import ModelConfig
from daedal.ports.mindspore.pieces import linear, parameter

_BEYOND = 1e30  # taken from the score of what may not be chosen


def gated(gate: Any, up: Any) -> Any:
    """silu(gate) * up, in float32, rounded once."""
    wide = gate.astype(ms.float32)
    return (wide * ops.sigmoid(wide) * up.astype(ms.float32)).astype(gate.dtype)


class GatedMLP(nn.Cell):
    """x_TD to y_TD."""

    def __init__(self, hidden: int, width: int, dtype: Any, *, bias: bool):
        super().__init__()
        self.gate_proj = linear(hidden, width, dtype, bias=bias)
        self.up_proj = linear(hidden, width, dtype, bias=bias)
        self.down_proj = linear(width, hidden, dtype, bias=bias)

    def construct(self, x_TD: Any) -> Any:
        return self.down_proj(gated(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Router(nn.Cell):
    """x_TD to (ids_TA, weights_TA in float32). The correction bias steers the choice, never the weights."""

    def __init__(self, config: ModelConfig, dtype: Any):
        super().__init__()
        self.experts, self.active = config.n_routed_experts, config.num_experts_per_tok
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.sigmoid = config.scoring_func == "sigmoid"
        self.corrected = config.topk_method == "noaux_tc"
        self.limited = config.topk_method != "greedy" and config.topk_group < config.n_group
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = parameter((self.experts, config.hidden_size), dtype)
        if self.corrected:
            self.e_score_correction_bias = parameter((self.experts,), ms.float32)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x_TD: Any) -> Any:
        logits_TE = self.product(x_TD.astype(ms.float32), self.weight.astype(ms.float32))
        scores_TE = ops.sigmoid(logits_TE) if self.sigmoid else ops.softmax(logits_TE, -1)
        choice_TE = scores_TE + self.e_score_correction_bias if self.corrected else scores_TE
        if self.limited:
            choice_TE = self.limit(choice_TE)
        _, ids_TA = ops.topk(choice_TE, self.active, -1)
        weights_TA = ops.gather_elements(scores_TE, 1, ids_TA)
        if self.normalise:
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdims=True) + 1e-20)
        return ids_TA, weights_TA * self.scale

    def limit(self, choice_TE: Any) -> Any:
        """The same with the experts of all but the best groups out of reach."""
        tokens = choice_TE.shape[0]
        grouped = choice_TE.reshape(tokens, self.groups, self.experts // self.groups)
        best, _ = ops.topk(grouped, 2 if self.corrected else 1, -1)
        _, kept = ops.topk(best.sum(-1), self.kept_groups, -1)
        open_TG1 = ops.one_hot(kept, self.groups).astype(ms.float32).sum(1).expand_dims(-1)
        limited = grouped + (open_TG1 - 1.0) * _BEYOND if self.corrected else grouped * open_TG1
        return limited.reshape(tokens, self.experts)


class Experts(nn.Cell):
    """The routed experts of one layer, stacked: gate_up_proj [E, 2F, D] with gate rows first, down_proj [E, D, F]."""

    def __init__(self, config: ModelConfig, dtype: Any):
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.experts, self.width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = parameter((self.experts, 2 * self.width, config.hidden_size), dtype)
        self.down_proj = parameter((self.experts, config.hidden_size, self.width), dtype)
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(self, x_TD: Any, ids_TA: Any, weights_TA: Any) -> Any:
        tokens, active = ids_TA.shape
        if tokens * active <= self.experts:
            return self.chosen(x_TD, ids_TA, weights_TA)
        return self.every(x_TD, ids_TA, weights_TA)

    def chosen(self, x_TD: Any, ids_TA: Any, weights_TA: Any) -> Any:
        """Each token with its own copy of its experts' matrices."""
        tokens, active = ids_TA.shape
        hidden = x_TD.shape[1]
        flat = ids_TA.reshape(-1)
        x = ops.broadcast_to(x_TD.expand_dims(1), (tokens, active, hidden)).reshape(tokens * active, 1, hidden)
        y = self.through(x, ops.gather(self.gate_up_proj, flat, 0), ops.gather(self.down_proj, flat, 0))
        weighted = y.reshape(tokens, active, hidden).astype(ms.float32) * weights_TA.expand_dims(-1)
        return weighted.sum(1).astype(x_TD.dtype)

    def every(self, x_TD: Any, ids_TA: Any, weights_TA: Any) -> Any:
        """All tokens through all experts, whatever they weigh."""
        tokens, hidden = x_TD.shape
        x_ETD = ops.broadcast_to(x_TD.expand_dims(0), (self.experts, tokens, hidden))
        y_ETD = self.through(x_ETD, self.gate_up_proj, self.down_proj).astype(ms.float32)
        sent_TAE = ops.one_hot(ids_TA, self.experts).astype(ms.float32)
        share_TE = (sent_TAE * weights_TA.expand_dims(-1)).sum(1)
        return (y_ETD * share_TE.swapaxes(0, 1).expand_dims(-1)).sum(0).astype(x_TD.dtype)

    def through(self, x_ETD: Any, gate_up_EFD: Any, down_EDF: Any) -> Any:
        both = self.product(x_ETD, gate_up_EFD)
        return self.product(gated(both[:, :, : self.width], both[:, :, self.width :]), down_EDF)


class MoE(nn.Cell):
    """x_TD to the sum of its chosen experts and the shared ones."""

    def __init__(self, config: ModelConfig, dtype: Any):
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.gate = Router(config, dtype)
        self.experts = Experts(config, dtype)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shares = width > 0
        if self.shares:
            self.shared_experts = GatedMLP(config.hidden_size, width, dtype, bias=False)

    def construct(self, x_TD: Any) -> Any:
        ids_TA, weights_TA = self.gate(x_TD)
        y_TD = self.experts(x_TD, ids_TA, weights_TA)
        return y_TD + self.shared_experts(x_TD) if self.shares else y_TD
