"""The ops: every heavy piece of arithmetic declared once, as a contract that each backend keeps.

A declaration gives the typed signature, shapes (letters as in docs/shapes.md), tie-breaks and the meaning of empty
input. `reference.py` is the arithmetic in plain PyTorch, and the truth; backends register faster versions. All ops are
differentiable in their floating-point inputs. Where weights may be `Packed`, they stand for the numbers of `dense()`,
and a backend may round activations as its units need: to bfloat16, or to eight bits per group of columns; the reference
does not round. Knows nothing of models or layers.
"""

from torch import Tensor

from daedal.ops.arithmetic import Arithmetic
from daedal.ops.backends.cpu.program import Program, missing
from daedal.ops.backends.cpu.tracing import trace
from daedal.ops.exactness import exactly
from daedal.ops.packed import Packed
from daedal.ops.packed_rows import PackedRows
from daedal.ops.registry import REGISTRY, Choice
from daedal.ops.rings import Lasting, RingRows
from daedal.ops.rows import FlatRows, PagedRows, Pages, Rows

explain = REGISTRY.explain
plan = REGISTRY.plan
using = REGISTRY.using


def unrecordable() -> str | None:
    """Why no forward pass can be recorded with `trace` here and now; None where one may be tried."""
    if REGISTRY.forced not in (None, "cpu"):
        return f"backend {REGISTRY.forced} is forced"
    return missing()


def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight None is 1. Any leading axes; float32 inside; result
    in x's dtype.
    """
    result: Tensor = REGISTRY.call("rms_norm", x_TD, weight_D, eps)
    return result


def linear(x_TD: Tensor, weight_FD: Tensor | Packed, bias_F: Tensor | None = None) -> Tensor:
    """x weight^T + bias over the last axis, accumulated in float32 at least, result in x's dtype. T may be 0."""
    result: Tensor = REGISTRY.call("linear", x_TD, weight_FD, bias_F)
    return result


def grouped_linear(x_TGC: Tensor, weight_GFC: Tensor | Packed) -> Tensor:
    """A block-diagonal projection: group g of x times its own matrix. Returns [T, G, F] in x's dtype (V4, 2.3)."""
    result: Tensor = REGISTRY.call("grouped_linear", x_TGC, weight_GFC)
    return result


def rotary(x_THR: Tensor, cos_TC: Tensor, sin_TC: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates each pair of the last axis by its position's angle (RoFormer, 3.2.2).

    x_THR: [T, H, R]; cos_TC, sin_TC: [T, R / 2] float32. interleaved: pairs are (2i, 2i + 1), as DeepSeek ships them;
    else (i, i + R / 2), as Llama does. Pairs stay where they were. float32 inside; result in x's dtype.
    """
    result: Tensor = REGISTRY.call("rotary", x_THR, cos_TC, sin_TC, interleaved=interleaved)
    return result


def angles(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos_TC and sin_TC of position times frequency, times `scale`, in the frequencies' dtype. positions_T: int64."""
    result: tuple[Tensor, Tensor] = REGISTRY.call("angles", positions_T, frequencies_C, scale)
    return result


def swiglu(gate_TF: Tensor, up_TF: Tensor, *, limit: float | None = None) -> Tensor:
    """silu(gate) * up, elementwise. limit: gate is first cut off above it, up on both sides (V4)."""
    result: Tensor = REGISTRY.call("swiglu", gate_TF, up_TF, limit=limit)
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


def choose_entries(
    q_TIK: Tensor,
    weights_TI: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    keys: Rows,
    *,
    count: int,
    rate: int,
) -> Tensor:
    """Which entries each query reads: chosen_TA int64, ascending, then -1 where there are fewer (V3.2; V4, 2.3).

    The score of entry s for query t is sum over i of weights[t, i] * relu(q[t, i] . k[s]), in float32. q_TIK: I index
    heads. keys: per sequence [S, K], one for each group of `rate` tokens that is complete. The query at position p (a
    sequence's first is its `past`) sees the entries below (p + 1) // rate, and chooses the `count` best of them, ties
    to the lowest index. A is the smaller of count and the most that any sequence has, or in a recorded step may come to
    have: then all of a query's columns may be -1. No gradient passes.
    """
    result: Tensor = REGISTRY.call("choose_entries", q_TIK, weights_TI, starts, pasts, keys, count=count, rate=rate)
    return result


def sparse_attention(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows | None,
    chosen_TA: Tensor | None,
    window: Rows | RingRows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> Tensor:
    """Attention of all heads on one shared row per key, whose first `value_dim` numbers are its value (V3.2; V4, 2.3).

    entries: per sequence [S, K], one for each complete group of `rate` tokens. The query at position p sees those below
    (p + 1) // rate; with chosen_TA (int64, -1 for none; A may exceed S) only those that it names. window: per sequence
    its last rows up to the batch's last token, one per token; the query at p sees those of positions p - span + 1 to p.
    sinks_H: per head a logit, not scaled, that takes its share of the softmax and adds nothing. Softmax in float32.
    Returns [T, H, value_dim] in q's dtype. A query that sees nothing gives 0.
    """
    result: Tensor = REGISTRY.call(
        "sparse_attention",
        q_THK,
        starts,
        pasts,
        entries,
        chosen_TA,
        window,
        sinks_H,
        value_dim=value_dim,
        scale=scale,
        rate=rate,
        span=span,
    )
    return result


def keep_on_pages(rows: Tensor, places_T: Tensor, kept: PagedRows) -> None:
    """Stores a row for each token on the pages of a cache: in the pool's own dtype, or packed where its rows are.

    rows: [T, ...]. places_T: int64, where each goes among the rows of the pool, flattened; none twice. kept's pages do
    not matter. Has no gradients.
    """
    REGISTRY.call("keep_on_pages", rows, places_T, kept)


def keep_in_ring(
    rows: Tensor, starts: tuple[int, ...], pasts: tuple[int, ...], ring: Tensor, states: tuple[int, ...]
) -> None:
    """Stores rows where the last few of each sequence are kept: the row of position p at p modulo N.

    rows: [T, ...], of B sequences after their `pasts`. ring: [states, N, ...], written in its own dtype; states: each
    sequence's ring. Of a sequence that brings more than N only the last N are stored. Has no gradients.
    """
    REGISTRY.call("keep_in_ring", rows, starts, pasts, ring, states)


def pool_groups(
    kv_TW: Tensor,
    gate_TW: Tensor,
    bias_rW: Tensor,
    weight_K: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    ring: Tensor,
    states: tuple[int, ...],
    entries: PagedRows,
    *,
    eps: float,
    overlaps: bool,
) -> None:
    """Writes an entry for each group of r tokens that the batch completes, and keeps the batch's rows (V4, 2.3).

    kv_TW: projections; gate_TW: their gates, to which row p % r of bias_rW is added. The entry of a group is, column by
    column, the sum of its tokens' kv weighted by the softmax of their gates over the group, normed by weight_K and eps,
    its last 2 C numbers rotated in adjacent pairs. overlaps: W is 2 K; a group takes the second half of its own rows,
    and beside them the first half of the r rows before it, where there are any; else W is K. cos_TC, sin_TC: angles of
    the first position of each token's own group. ring: [states, N, 2, W], of each token kv and its gate with the bias,
    kept as by `keep_in_ring`; it holds the r - 1 rows before the batch, 2 r - 1 where groups overlap. entries: row g
    of a sequence is that of its group g; [S, K] rows that include the new ones. Has no gradients.
    """
    REGISTRY.call(
        "pool_groups",
        kv_TW,
        gate_TW,
        bias_rW,
        weight_K,
        cos_TC,
        sin_TC,
        starts,
        pasts,
        ring,
        states,
        entries,
        eps=eps,
        overlaps=overlaps,
    )


def hyper_collapse(
    streams_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block's input and mixing weights from the residual streams (mHC; V4, section 2.2), all in float32 inside.

    fn: [(2 + M) M, M D]; base: [(2 + M) M]; scale: [3]. The normed streams times fn give logits for input, output and
    mixing. x = sum of (sigmoid + eps) * stream. post = 2 sigmoid. comb: softmax over the last axis plus eps, then made
    doubly stochastic by `iterations` divisions by column sums with row sums between, eps added to each sum.
    Returns x_TD in the streams' dtype, post_TM and comb_TMM in float32.
    """
    result: tuple[Tensor, Tensor, Tensor] = REGISTRY.call(
        "hyper_collapse", streams_TMD, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations
    )
    return result


def hyper_expand(y_TD: Tensor, streams_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    """Streams after a block: stream k is post_k * y + sum over j of comb[j, k] * stream_j; float32 inside."""
    result: Tensor = REGISTRY.call("hyper_expand", y_TD, streams_TMD, post_TM, comb_TMM)
    return result


def hyper_head(streams_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    """The streams as one, behind the last block: x of `hyper_collapse`, whose input rows are all that is given here.

    fn: [M, M D]; base: [M]; scale: [1]. Returns x_TD in the streams' dtype.
    """
    result: Tensor = REGISTRY.call("hyper_head", streams_TMD, fn, base, scale, norm_eps=norm_eps, eps=eps)
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
    given_TA: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses experts: (ids_TA int64, weights_TA float32). Ties go to the lowest index, of experts and of groups.

    logits_TE: float32. given_TA: ids that are chosen already (V4's hash layers); only their weights are left to find.
    scoring: "softmax", "sigmoid" or "sqrtsoftplus" (V4) gives s. method "greedy": the best s. "group_limited_greedy"
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
        given_TA=given_TA,
    )
    return result


def experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    *,
    limit: float | None = None,
) -> Tensor:
    """Sum over a token's experts of weight * down(swiglu(gate x, up x)). Returns [T, D] in x's dtype.

    gate_up_EFD: [E, 2F, D], gate rows first; down_EDF: [E, D, F]. ids_TA: an expert named twice counts twice. limit: as
    in `swiglu`. The sum over experts is taken in float32, in ascending order of the expert's index. T may be 0.
    """
    result: Tensor = REGISTRY.call("experts", x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF, limit=limit)
    return result


def scaled_linear(x_TD: Tensor, weight_FD: Tensor, arithmetic: Arithmetic) -> Tensor:
    """x weight^T over the last axis, its factors and those of its gradients rounded as `arithmetic` says (V3, 3.3).

    y = Q(x) Q(w)^T; gradients: of x, Q(g) Q(w), and of the weight, Q(g)^T Q(x), groups along the tokens. They pass
    straight through the roundings. Products and sums in float32 at least; y and the gradient of x have x's dtype, that
    of the weight has the weight's own. Any leading axes; T may be 0.
    """
    result: Tensor = REGISTRY.call("scaled_linear", x_TD, weight_FD, arithmetic)
    return result


def scaled_experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    arithmetic: Arithmetic,
    *,
    limit: float | None = None,
) -> Tensor:
    """`experts` with both projections of each expert as `scaled_linear`; groups along tokens are of one expert's."""
    result: Tensor = REGISTRY.call(
        "scaled_experts", x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF, arithmetic, limit=limit
    )
    return result


# The backends register themselves once the ops are declared.
from daedal.ops import reference  # noqa: E402, F401  isort: skip
from daedal.ops import reference_sparse  # noqa: E402, F401  isort: skip
from daedal.ops import reference_compress  # noqa: E402, F401  isort: skip
from daedal.ops import reference_scaled  # noqa: E402, F401  isort: skip
from daedal.ops.backends import aten  # noqa: E402, F401  isort: skip
from daedal.ops.backends import aten_sparse  # noqa: E402, F401  isort: skip
from daedal.ops.backends import aten_compress  # noqa: E402, F401  isort: skip
from daedal.ops.backends import aten_scaled  # noqa: E402, F401  isort: skip
from daedal.ops.backends import triton as _triton  # noqa: E402, F401  isort: skip
from daedal.ops.backends import cublas  # noqa: E402, F401  isort: skip
from daedal.ops.backends import npu as _npu  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import attention as _attention  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import compress as _compress  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import experts as _experts  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import hyper as _hyper  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import linear as _linear  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import packed_rows as _packed_rows  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import rows as _rows  # noqa: E402, F401  isort: skip
from daedal.ops.backends.cpu import sparse as _sparse  # noqa: E402, F401  isort: skip

REGISTRY.check_environment()

__all__ = [
    "Arithmetic",
    "Choice",
    "FlatRows",
    "Lasting",
    "Packed",
    "PackedRows",
    "PagedRows",
    "Pages",
    "Program",
    "RingRows",
    "Rows",
    "angles",
    "attention",
    "choose_entries",
    "exactly",
    "experts",
    "explain",
    "grouped_linear",
    "hyper_collapse",
    "hyper_expand",
    "hyper_head",
    "keep_in_ring",
    "keep_on_pages",
    "linear",
    "plan",
    "pool_groups",
    "rms_norm",
    "rotary",
    "route",
    "scaled_experts",
    "scaled_linear",
    "sparse_attention",
    "swiglu",
    "trace",
    "unrecordable",
    "using",
]
