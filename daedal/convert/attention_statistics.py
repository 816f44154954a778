"""What calibration texts say about a dense model's attention: what errors in keys and in values cost.

An error E x in a key moves a query's scores, one in a value moves what a head gives; either way the loss changes, in
first order, by a vector times E times a mean of inputs. Of keys: the query, and the inputs summed by the loss's slopes
at the scores, which add up to nothing, since softmax does not see what all keys share. Of values: the slope at the
head's output, and the inputs averaged by attention. The loss is that of labels that the model draws itself (Fisher
information), and each of these two products of moments stands for what any error costs. So the first token, on which
attention rests, counts for what it is, and no constant is chosen.

Gradients go back layer by layer from the residuals between them, one layer's graph at a time, and every sum is in a
mapped file, so that in memory is one layer's. Knows nothing of latents. The factored Fisher information is K-FAC's
(1503.05671), with a token's many readers and heads kept apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.config import ModelConfig
from daedal.model.attention_dense import DenseAttention
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.model.transformer import Transformer
from daedal.ops.narrow_factors import narrow_factors

QUERY_EVERY = 4  # tokens of which one is asked what its attention reads
DISTANCE_EVERY = 4  # texts of which one is asked how far back attention looks
FIRST_TOKENS = 512  # read alone, for what the first token of a text is like

_HEAD_CHUNK = 256  # tokens whose logits are held at once


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """Of one layer, float64; X = D + 1, the inputs with a constant 1 behind them.

    attended_XX: E[x x^T], each token counted by the attention that it gets; others_XX: the same without first tokens.
    keys_XX with queries_HKK: what errors in keys cost, over queries before rotation. values_XX with outputs_HVV: what
    errors in values cost. distances_HT: how sensitive the attention of each head is to keys so many tokens back, first
    tokens left out.
    """

    attended_XX: Tensor
    others_XX: Tensor
    keys_XX: Tensor
    queries_HKK: Tensor
    values_XX: Tensor
    outputs_HVV: Tensor
    distances_HT: Tensor


class StatisticsFile:
    """The sums of every layer in one mapped file. longest: the most tokens of a text."""

    def __init__(self, path: Path, config: ModelConfig, *, longest: int, new: bool = False):
        wide, heads, head_dim = config.hidden_size + 1, config.num_attention_heads, config.head_dim
        self._shapes: Mapping[str, tuple[int, ...]] = {
            **dict.fromkeys(("attended", "firsts", "keys", "values"), (wide, wide)),
            **dict.fromkeys(("queries", "outputs"), (heads, head_dim, head_dim)),
            "distances": (heads, longest),
            "counts": (6,),
        }
        self._starts = list(accumulate((prod(shape) for shape in self._shapes.values()), initial=0))
        size = self._starts[-1] * config.num_hidden_layers
        self._numbers = torch.from_file(str(path), shared=new, size=size, dtype=torch.float64)
        if new:
            self._numbers.zero_()

    def sums(self, layer: int) -> dict[str, Tensor]:
        """Views, by name. counts: single tokens; attention to first tokens and to all others; queries that were asked;
        the total weights of keys and of values.
        """
        base = layer * self._starts[-1]
        return {
            name: self._numbers[base + start : base + start + prod(shape)].view(shape)
            for (name, shape), start in zip(self._shapes.items(), self._starts, strict=False)
        }

    def layer(self, index: int) -> LayerStatistics:
        """A layer's sums as means."""
        found = self.sums(index)
        singles, to_first, to_others, asked, key_weight, value_weight = found["counts"].tolist()
        return LayerStatistics(
            attended_XX=(found["attended"] + to_first * found["firsts"] / singles) / (to_first + to_others),
            others_XX=found["attended"] / to_others,
            keys_XX=found["keys"] / key_weight,
            queries_HKK=found["queries"] / asked,
            values_XX=found["values"] / value_weight,
            outputs_HVV=found["outputs"] / asked,
            distances_HT=found["distances"].clone(),
        )


def collect(
    model: Transformer,
    windows: Sequence[Tensor],
    statistics: StatisticsFile,
    *,
    seed: int = 0,
    watch: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Adds what `windows`, int64 [T] each, say of `model`, in float32. watch: told of the tokens done after each."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for number, ids_T in enumerate(windows):
        step = ForwardPass(model.config, RaggedBatch.rectangular(ids_T.to(model.device).unsqueeze(0)), None)
        states = list(_boundaries(model, step))
        slope_TD = _sampled_slope(model, states.pop(), generator)
        asked_t = torch.arange(number % QUERY_EVERY, len(ids_T), QUERY_EVERY, device=model.device)
        for index in reversed(range(len(states))):
            seen, slope_TD = through(model.layers[index], states.pop(), slope_TD, step)
            _add(statistics.sums(index), seen, asked_t, distances=number % DISTANCE_EVERY == 0)
        watch(len(ids_T))
    _add_firsts(model, windows, statistics)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What some queries of one head read. shares_tT: their attention. The loss moves by query (E moved) for an error E
    in the head's keys, by slope (E mean) for one in its values.
    """

    shares_tT: Tensor
    query_tK: Tensor
    moved_tX: Tensor
    slope_tV: Tensor
    mean_tX: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What one layer's attention read, x_TX, and made of it: q_THK before rotation, turned_THK and k_TGK after; v_TGV;
    slope_THV, of the loss at what each head gives.
    """

    x_TX: Tensor
    q_THK: Tensor
    turned_THK: Tensor
    k_TGK: Tensor
    v_TGV: Tensor
    slope_THV: Tensor
    scale: float

    def reading(self, asked_t: Tensor, head: int) -> Reading:
        """asked_t: int64, the places of the queries."""
        group = head * self.k_TGK.shape[1] // self.q_THK.shape[1]
        scores_tT = self.turned_THK[asked_t, head] @ self.k_TGK[:, group].T * self.scale
        later_tT = torch.arange(len(self.k_TGK), device=asked_t.device) > asked_t.unsqueeze(-1)
        shares_tT = scores_tT.masked_fill_(later_tT, float("-inf")).softmax(-1)
        slope_tV = self.slope_THV[asked_t, head]
        with narrow_factors(self.x_TX.device):
            at_shares_tT = slope_tV @ self.v_TGV[:, group].T
            at_scores_tT = shares_tT * (at_shares_tT - (shares_tT * at_shares_tT).sum(-1, keepdim=True))
            moved_tX, mean_tX = at_scores_tT @ self.x_TX * self.scale, shares_tT @ self.x_TX
        return Reading(
            shares_tT=shares_tT,
            query_tK=self.q_THK[asked_t, head],
            moved_tX=moved_tX,
            slope_tV=slope_tV,
            mean_tX=mean_tX,
        )


@torch.no_grad()
def _boundaries(model: Transformer, step: ForwardPass) -> Iterator[Tensor]:
    """The residuals before each layer and after the last."""
    state_TD = model.embed_tokens(step.batch.ids_T)
    for layer in model.layers:
        yield state_TD
        with narrow_factors(state_TD.device):
            state_TD = layer(state_TD, step)
    yield state_TD


def _sampled_slope(model: Transformer, state_TD: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, by the last residuals, of the summed loss of labels drawn from the model."""
    with torch.enable_grad():
        last_TD = state_TD.detach().requires_grad_()
        hidden_TD = model.norm(last_TD)
    head_VD = model.lm_head.weight.detach().to(hidden_TD.dtype)
    slopes = []
    for hidden_tD in hidden_TD.detach().split(_HEAD_CHUNK):
        with narrow_factors(hidden_tD.device):
            shares_tV = (hidden_tD @ head_VD.T).softmax(-1)
            drawn_t1 = drawn(shares_tV, generator)
            surplus_tV = shares_tV.scatter_add_(1, drawn_t1, torch.full_like(drawn_t1, -1, dtype=shares_tV.dtype))
            slopes.append(surplus_tV @ head_VD)
    return torch.autograd.grad(hidden_TD, last_TD, torch.cat(slopes))[0]


def drawn(shares_tV: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [t, 1]: a label for each token, through sums of shares, in a tenth of the time that multinomial takes."""
    sums_tV = shares_tV.cumsum(-1)
    wanted_t1 = torch.rand(len(sums_tV), 1, generator=generator, device=sums_tV.device, dtype=sums_tV.dtype)
    return torch.searchsorted(sums_tV, wanted_t1 * sums_tV[:, -1:]).clamp_max(sums_tV.shape[1] - 1)


def through(layer: nn.Module, state_TD: Tensor, slope_TD: Tensor, step: ForwardPass) -> tuple[Seen, Tensor]:
    """What the attention of a layer met, and the gradient by what the layer reads."""
    dense = layer.self_attn
    assert isinstance(dense, DenseAttention)
    met: list[tuple[Tensor, Tensor]] = []
    hook = dense.register_forward_hook(lambda _, given, written: met.append((given[0], written)))
    try:
        with torch.enable_grad(), narrow_factors(state_TD.device):
            entering_TD = state_TD.detach().requires_grad_()
            leaving_TD = layer(entering_TD, step)
            x_TD, written_TD = met[0]
            before_TD, written_slope_TD = torch.autograd.grad(leaving_TD, (entering_TD, written_TD), slope_TD)
    finally:
        hook.remove()
    with torch.no_grad():
        x_TD = x_TD.detach()
        projections = (dense.q_proj, dense.k_proj, dense.v_proj)
        q_THK, k_TGK, v_TGV = (project(x_TD).unflatten(-1, (-1, dense.head_dim)) for project in projections)
        slope_THV = (written_slope_TD @ dense.o_proj.weight).unflatten(-1, (-1, dense.head_dim))
        seen = Seen(
            x_TX=_with_one(x_TD),
            q_THK=q_THK,
            turned_THK=ops.rotary(q_THK, *step.turn(), interleaved=False),
            k_TGK=ops.rotary(k_TGK, *step.turn(), interleaved=False),
            v_TGV=v_TGV,
            slope_THV=slope_THV,
            scale=dense.scale,
        )
    return seen, before_TD


@torch.no_grad()
def _add(sums: Mapping[str, Tensor], seen: Seen, asked_t: Tensor, *, distances: bool) -> None:
    x_TX, counts = seen.x_TX, sums["counts"]
    readings = [seen.reading(asked_t, head) for head in range(seen.q_THK.shape[1])]
    got_T = torch.stack([reading.shares_tT.sum(0) for reading in readings]).sum(0)
    scaled_TX = x_TX[1:] * got_T[1:].sqrt().unsqueeze(-1)
    sums["attended"] += (scaled_TX.T @ scaled_TX).double()
    counts[1] += got_T[0]
    counts[2] += got_T[1:].sum()
    counts[3] += len(asked_t)
    moved_HtX, mean_HtX = (torch.stack([getattr(one, name) for one in readings]) for name in ("moved_tX", "mean_tX"))
    query_HtK, slope_HtV = (torch.stack([getattr(one, name) for one in readings]) for name in ("query_tK", "slope_tV"))
    counts[4] += _add_pair(sums["keys"], sums["queries"], moved_HtX, query_HtK)
    counts[5] += _add_pair(sums["values"], sums["outputs"], mean_HtX, slope_HtV)
    for head, reading in enumerate(readings if distances else ()):
        _add_distances(sums["distances"][head], reading.shares_tT, asked_t)


def _add_pair(right_XX: Tensor, left_HKK: Tensor, inputs_HtX: Tensor, vectors_HtK: Tensor) -> float:
    """Adds the sums of |v|^2 x x^T, over all heads, and of |x|^2 v v^T; returns that of |v|^2 |x|^2, by which their
    product is divided to stand for the sum of (v x^T) (v x^T)^T, with the same trace.
    """
    vector_sizes = vectors_HtK.square().sum(-1, keepdim=True)
    input_sizes = inputs_HtX.square().sum(-1, keepdim=True)
    scaled_TX = (inputs_HtX * vector_sizes.sqrt()).flatten(0, 1)
    scaled_HtK = vectors_HtK * input_sizes.sqrt()
    right_XX += (scaled_TX.T @ scaled_TX).double()
    left_HKK += (scaled_HtK.mT @ scaled_HtK).double()
    return float((vector_sizes * input_sizes).sum(dtype=torch.float64))


def _add_distances(sums_T: Tensor, shares_tT: Tensor, asked_t: Tensor) -> None:
    """Adds p (1 - p), the slope of the softmax, by the distance from query to key."""
    slopes_tT = shares_tT * (1 - shares_tT)
    slopes_tT[:, 0] = 0
    back_tT = (asked_t.unsqueeze(-1) - torch.arange(shares_tT.shape[1], device=asked_t.device)).clamp_min(0)
    sums_T.index_add_(0, back_tT.flatten(), slopes_tT.flatten().double())


@torch.no_grad()
def _add_firsts(model: Transformer, windows: Sequence[Tensor], statistics: StatisticsFile) -> None:
    """Moments of the inputs where a text begins, over single tokens drawn evenly from the texts."""
    every_T = torch.cat(list(windows))
    stride = max(1, len(every_T) // FIRST_TOKENS)
    ids = every_T[::stride][:FIRST_TOKENS].tolist()
    if model.config.bos_token_id is not None:
        ids.append(model.config.bos_token_id)
    step = ForwardPass(model.config, RaggedBatch.of([[token] for token in ids], device=model.device), None)
    for index, state_TD in zip(range(len(model.layers)), _boundaries(model, step), strict=False):
        x_TX = _with_one(model.layers[index].get_submodule("input_layernorm")(state_TD))
        sums = statistics.sums(index)
        sums["firsts"] += (x_TX.T @ x_TX).double()
        sums["counts"][0] += len(ids)


def _with_one(x_TD: Tensor) -> Tensor:
    return torch.nn.functional.pad(x_TD, (0, 1), value=1.0)
