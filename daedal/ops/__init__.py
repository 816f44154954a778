"""The ops: every heavy piece of arithmetic declared once, as a contract that each backend keeps.

A declaration gives the typed signature, shapes (letters as in docs/shapes.md), tie-breaks and the meaning of empty
input. `reference.py` is the arithmetic in plain PyTorch, and the truth; backends register faster versions. All ops are
differentiable in their floating-point inputs. Knows nothing of models or layers.
"""

from torch import Tensor

from daedal.ops.registry import REGISTRY, Choice
from daedal.ops.rows import FlatRows, PagedRows, Pages, Rows

explain = REGISTRY.explain
using = REGISTRY.using


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. Any leading axes; float32 inside; result in x's dtype."""
    result: Tensor = REGISTRY.call("rms_norm", x_TD, weight_D, eps)
    return result


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x weight^T + bias over the last axis, accumulated in float32 at least, result in x's dtype. T may be 0."""
    result: Tensor = REGISTRY.call("linear", x_TD, weight_FD, bias_F)
    return result


def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates each pair of the last axis by its position's angle (RoFormer, 3.2.2).

    x_THR: [T, H, R]; cos_TC, sin_TC: [T, R / 2] float32. interleaved: pairs are (2i, 2i + 1), as DeepSeek ships them;
    else (i, i + R / 2), as Llama does. Pairs stay where they were. float32 inside; result in x's dtype.
    """
    result: Tensor = REGISTRY.call("rotary", x_THR, cos_TC, sin_TC, interleaved=interleaved)
    return result


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    result: Tensor = REGISTRY.call("swiglu", gate_TF, up_TF)
    return result


def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    """Causal attention of a ragged batch, softmax in float32.

    q_THK: [T, H, K], the last tokens of each of B sequences, `starts` their B + 1 boundaries. keys: per sequence
    [S, G, K], or [S, K] for one head; query head h reads key head h // (H / G). values: per sequence [S, G, V], or an
    integer V: the first V numbers of each key row (latent attention, absorbed form). Query j of the t that a sequence
    brings sees its first S - t + j + 1 keys. Returns [T, H, V] in q's dtype. A sequence may bring no token.
    """
    result: Tensor = REGISTRY.call("attention", q_THK, starts, keys, values, scale=scale)
    return result


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scoring: str,
    method: str,
    num_active: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Chooses experts: (ids_TA int64, weights_TA float32). Ties go to the lowest index, of experts and of groups.

    logits_TE: float32. scoring: "softmax" or "sigmoid" gives s. method "greedy": the best s. "group_limited_greedy"
    (V2): groups ranked by their best s, others set to 0. "noaux_tc" (V3): chosen by s + bias, groups ranked by the sum
    of their best two, others set to -inf; weights are s without bias. normalise: weights sum to 1 before `scale`.
    Order of a token's experts: the best first. V2 section 2.2, V3 section 2.1.2.
    """
    result: tuple[Tensor, Tensor] = REGISTRY.call(
        "route",
        logits_TE,
        bias_E,
        scoring=scoring,
        method=method,
        num_active=num_active,
        n_group=n_group,
        topk_group=topk_group,
        normalise=normalise,
        scale=scale,
    )
    return result


def experts(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Sum over a token's experts of weight * down(silu(gate x) * up x). Returns [T, D] in x's dtype.

    gate_up_EFD: [E, 2F, D], gate rows first; down_EDF: [E, D, F]. ids_TA: distinct within a token. The sum over experts
    is taken in float32, in ascending order of the expert's index. T may be 0.
    """
    result: Tensor = REGISTRY.call("experts", x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF)
    return result


# The backends register themselves once the ops are declared.
from daedal.ops import reference  # noqa: E402, F401  isort: skip
from daedal.ops.backends import aten  # noqa: E402, F401  isort: skip

REGISTRY.check_environment()

__all__ = [
    "Choice",
    "FlatRows",
    "PagedRows",
    "Pages",
    "Rows",
    "attention",
    "experts",
    "explain",
    "linear",
    "rms_norm",
    "rotary",
    "route",
    "swiglu",
    "using",
]
