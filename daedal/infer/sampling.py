"""From logits to token ids: every row by its own parameters, penalties and random numbers.

The order: logit_bias; repetition, then frequency and presence penalty; temperature; top-k, top-p of what top-k left,
and min-p, as transformers orders them (vLLM applies min-p before the other two). Ties go to the lowest id throughout.
A row is drawn by inverting its cumulative distribution at one number of its own generator, so the draw depends neither
on its neighbours in the batch nor on the device. Knows no requests, no text, no cache.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from daedal.infer.request import SamplingParams

LEAST_TEMPERATURE = 1e-5  # below it a draw is greedy: float32 could not hold the quotients
_FIRST_CANDIDATES = 256  # sorted first in search of a nucleus; eight times as many whenever that is too few


class RowSampler:
    """What one request's choices depend on beside its logits: seen tokens, counted tokens, a random generator.

    It outlives preemption, so that a request draws the same numbers whether or not its cache was lost meanwhile.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], *, vocab_size: int, device: torch.device | str):
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen_V: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self._counts_V: Tensor | None = None
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self._counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
            addends = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
            self._bias = bias_ids, addends

    @property
    def adjusts(self) -> bool:
        """Whether `adjusted` changes anything."""
        return self._bias is not None or self._seen_V is not None or self._counts_V is not None

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """float32 logits with bias and penalties applied; the argument is left as it is."""
        if self._bias is not None:
            logits_V = logits_V.index_add(0, *self._bias)
        if self._seen_V is not None:
            penalty = self.params.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(self._seen_V, penalised_V, logits_V)
        if self._counts_V is not None:
            logits_V = logits_V - self.params.frequency_penalty * self._counts_V
            logits_V = logits_V - self.params.presence_penalty * (self._counts_V > 0)
        return logits_V

    def observe(self, token: int) -> None:
        """Takes note of a token of the answer."""
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._counts_V is not None:
            self._counts_V[token] += 1

    def uniform(self) -> float:
        """The next number of this request's own sequence, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def check_finite(logits_NV: Tensor) -> None:
    """Raises FloatingPointError if a row of logits has no finite maximum: NaN, +inf, or nothing but -inf."""
    if logits_NV.shape[0]:
        greedy(logits_NV)


def greedy(logits_NV: Tensor) -> list[int]:
    """The likeliest token of each row, ties to the lowest id. FloatingPointError as `check_finite`."""
    chosen = _argmax(logits_NV)
    if logits_NV.device.type == "cpu":
        peaks = [float(logits_NV[row, token]) for row, token in enumerate(chosen)]
    else:
        peaks = logits_NV.amax(dim=-1).tolist()
    if not all(map(math.isfinite, peaks)):
        raise FloatingPointError("the model's logits hold NaN or infinity: no token can be chosen from them")
    return chosen


def choose(logits_NV: Tensor, samplers: Sequence[RowSampler]) -> list[int]:
    """One token id per row of logits, noted in its sampler. FloatingPointError as `check_finite`."""
    if not samplers:
        return []
    logits_NV = logits_NV.float()
    chosen = greedy(logits_NV)
    if any(sampler.adjusts for sampler in samplers):
        pairs = zip(logits_NV, samplers, strict=True)
        logits_NV = torch.stack([sampler.adjusted(logits_V) for logits_V, sampler in pairs])
        chosen = _argmax(logits_NV)
    for row, sampler in enumerate(samplers):
        if sampler.params.temperature >= LEAST_TEMPERATURE:
            chosen[row] = draw(logits_NV[row], sampler.params, sampler.uniform())
        sampler.observe(chosen[row])
    return chosen


def verify(logits_NV: Tensor, samplers: Sequence[RowSampler], drafts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The tokens that each request goes on with: its own choices, one after the other, for as long as they are what was
    drafted.

    Rows of logits: for each request one for its next token, then one after each of its drafts. Each choice is made as
    without drafts, with the same random number and after the same penalties, so drafts decide only how many rows count
    (speculative sampling, Leviathan et al. 2023, with drafts of probability 1).
    """
    firsts = list(accumulate((len(draft) + 1 for draft in drafts), initial=0))
    chosen: list[list[int]] = [[] for _ in samplers]
    going = list(range(len(samplers)))
    place = 0
    while going:
        rows = [firsts[index] + place for index in going]
        row_logits = logits_NV if len(rows) == logits_NV.shape[0] else logits_NV[rows]
        tokens = choose(row_logits, [samplers[index] for index in going])
        still_going = []
        for index, token in zip(going, tokens, strict=True):
            chosen[index].append(token)
            if drafts[index][place : place + 1] == (token,):
                still_going.append(index)
        going = still_going
        place += 1
    return chosen


def _argmax(logits_NV: Tensor) -> list[int]:
    """The place of each row's maximum, of equals the first."""
    if logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32:
        # torch's own search on a CPU takes 20 times as long, 70 for 16 rows.
        chosen: list[int] = logits_NV.numpy().argmax(-1).tolist()
        return chosen
    chosen = logits_NV.argmax(dim=-1).tolist()
    return chosen


def draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> int:
    """The token at the fraction `uniform` of the filtered distribution, tokens in the order of their ids."""
    ids_C, weights_C = filtered(logits_V, params)
    cumulative_C = weights_C.cumsum(0, dtype=torch.float64)
    total = float(cumulative_C[-1])
    # Rounding must not reach the total: what lies beyond the last weight above zero may not be chosen.
    target = cumulative_C.new_tensor(min(uniform * total, math.nextafter(total, 0.0)))
    index = int(torch.searchsorted(cumulative_C, target, right=True))
    return index if ids_C is None else int(ids_C[index])


def filtered(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """What temperature, top-k, top-p and min-p leave of float32 logits: ids, ascending, and weights, not normalised.

    ids are None where nothing is filtered. Top-p keeps the fewest tokens that reach the mass; min-p those of at least
    that fraction of the likeliest. Each filter only says how many of the likeliest stay, so nothing is sorted beyond
    what they need.
    """
    peak = logits_V.max()

    def weights(logits: Tensor) -> Tensor:
        # The peak goes first, so that no temperature overflows.
        return ((logits - peak) / params.temperature).exp_()

    has_top_k = 0 < params.top_k < logits_V.shape[0]
    if not has_top_k and params.top_p == 1.0 and params.min_p == 0.0:
        return None, weights(logits_V)
    if has_top_k:
        ranked_C = logits_V.topk(params.top_k).values
        mass = _sum(weights(ranked_C))
    elif params.top_p < 1.0:
        mass = _sum(weights(logits_V))
        ranked_C = _reaching(logits_V, weights, params.top_p * mass)
    else:
        ids_C = (weights(logits_V) >= params.min_p).nonzero().squeeze(1)
        return ids_C, weights(logits_V[ids_C])
    weights_C = weights(ranked_C)
    num_kept = int((weights_C >= params.min_p).sum())
    if params.top_p < 1.0:
        before_C = weights_C.cumsum(0, dtype=torch.float64) - weights_C
        num_kept = min(num_kept, int((before_C < params.top_p * mass).sum()))
    ids_C = _down_to(logits_V, ranked_C[num_kept - 1], num_kept)
    return ids_C, weights(logits_V[ids_C])


def likeliest(scores_V: Tensor, count: int) -> Tensor:
    """int64 ids, ascending, of the `count` highest scores; of equal scores at the border the lowest ids."""
    count = min(count, scores_V.shape[0])
    return _down_to(scores_V, scores_V.topk(count).values[-1], count)


def _down_to(scores_V: Tensor, border: Tensor, count: int) -> Tensor:
    """`likeliest`, given its lowest score: topk promises nothing about which of equals it takes."""
    ids_C = (scores_V >= border).nonzero().squeeze(1)
    surplus = ids_C.shape[0] - count
    if surplus == 0:
        return ids_C
    tied = (scores_V[ids_C] == border).nonzero().squeeze(1)
    kept_C = torch.ones_like(ids_C, dtype=torch.bool)
    kept_C[tied[-surplus:]] = False
    return ids_C[kept_C]


def _reaching(logits_V: Tensor, weights: Callable[[Tensor], Tensor], mass: float) -> Tensor:
    """The highest logits, highest first, enough of them to hold the mass."""
    count = _FIRST_CANDIDATES
    while True:
        ranked_C = logits_V.topk(min(count, logits_V.shape[0])).values
        if count >= logits_V.shape[0] or _sum(weights(ranked_C)) >= mass:
            return ranked_C
        count *= 8


def _sum(weights: Tensor) -> float:
    return float(weights.sum(dtype=torch.float64))
