"""From logits to token ids: every row by its own parameters, penalties, mask and random numbers.

The order: logit_bias; repetition, then frequency and presence penalty; a structure's mask; then what `drawing` does.
Ties go to the lowest id throughout. A row is drawn by inverting its cumulative distribution at one number of its own
generator, so the draw depends neither on its neighbours in the batch nor on the device. Knows no requests, no text, no
cache.
"""

import math
import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from daedal.infer.request import Mask, SamplingParams
from daedal.ops.drawing import Array, Draws

LEAST_TEMPERATURE = 1e-5  # below it a draw is greedy: float32 could not hold the quotients


class Logits:
    """Rows of logits in float32, and on a CPU the same memory as NumPy sees it.

    Recorded steps make it once and fill its memory again and again: between two steps, which sweep the processor's
    caches, a first call into PyTorch takes longer than the search for a maximum. peaks: memory of the rows' maxima and
    of their places, as `Tensor.max` gives them, filled together with the logits.
    """

    def __init__(self, logits_NV: Tensor, *, peaks: tuple[Tensor, Tensor] | None = None):
        self.tensor = logits_NV.float()
        self._seen_NV: Array | None = self.tensor.numpy() if self.tensor.device.type == "cpu" else None
        self._num_rows = len(self.tensor)
        self._peaks: tuple[Array, Array] | None = None if peaks is None else (peaks[0].numpy(), peaks[1].numpy())
        self._draws: Draws | None = None

    def __len__(self) -> int:
        return self._num_rows

    def rows(self, rows: Sequence[int]) -> "Logits":
        """Some of the rows, ascending."""
        return self if len(rows) == self._num_rows else Logits(self.tensor[rows])

    def draw(self, row: int, params: SamplingParams, uniform: float) -> int:
        """The token at the fraction `uniform` of a row's filtered distribution."""
        if self._draws is None:
            self._draws = Draws(self.tensor.cpu().numpy() if self._seen_NV is None else self._seen_NV)
        return self._draws.draw(row, params, uniform)

    def peaks(self) -> tuple[list[int], list[float]]:
        """The place of each row's maximum, of equals the first, and the maximum; NaN where there is one."""
        if self._peaks is not None:
            peaks_N, at_N = self._peaks
            return at_N.tolist(), peaks_N.tolist()
        if self._seen_NV is None:
            values_N, places_N = self.tensor.max(dim=-1)
            return places_N.tolist(), values_N.tolist()
        # PyTorch's own search on a CPU takes 20 times as long, 70 for 16 rows.
        places: list[int] = self._seen_NV.argmax(-1).tolist()
        return places, [self._seen_NV.item(row, place) for row, place in enumerate(places)]


class RowSampler:
    """What one request's choices depend on beside its logits: seen tokens, counted tokens, a random generator, a mask.

    adjusts: whether `adjusted` changes anything. draws: whether it takes a random number for each token.
    It outlives preemption, so that a request draws the same numbers whether or not its cache was lost meanwhile.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        vocab_size: int,
        device: torch.device | str,
        mask: Mask | None = None,
    ):
        self.params = params
        self._mask = mask
        # Random takes a seed and its negative for the same.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
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
        self.adjusts = any(kept is not None for kept in (self._bias, self._seen_V, self._counts_V, mask))
        self.draws = params.temperature >= LEAST_TEMPERATURE

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """float32 logits with bias, penalties and mask applied; the argument is left as it is."""
        if self._bias is not None:
            logits_V = logits_V.index_add(0, *self._bias)
        if self._seen_V is not None:
            penalty = self.params.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(self._seen_V, penalised_V, logits_V)
        if self._counts_V is not None:
            logits_V = logits_V - self.params.frequency_penalty * self._counts_V
            logits_V = logits_V - self.params.presence_penalty * (self._counts_V > 0)
        allowed = None if self._mask is None else self._mask.allowed()
        if allowed is not None:
            allowed_V = torch.from_numpy(allowed).to(logits_V.device)
            logits_V = logits_V.masked_fill(~allowed_V, -math.inf)
        return logits_V

    @property
    def has_mask(self) -> bool:
        """Whether a structure says what may be chosen."""
        return self._mask is not None

    @property
    def lost_its_mask(self) -> bool:
        """Whether the mask could not be worked out to the end."""
        return self._mask is not None and self._mask.failed

    def observe(self, token: int) -> None:
        """Takes note of a token of the answer."""
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self._mask is not None:
            self._mask.accept(token)

    def uniform(self) -> float:
        """The next number of this request's own sequence, in [0, 1)."""
        return self._random.random()


def check_finite(logits: Logits) -> None:
    """Raises FloatingPointError if a row of logits has no finite maximum: NaN, +inf, or nothing but -inf."""
    greedy(logits)


def greedy(logits: Logits) -> list[int]:
    """The likeliest token of each row, ties to the lowest id. FloatingPointError as `check_finite`."""
    chosen, peaks = logits.peaks()
    if not all(map(math.isfinite, peaks)):
        raise FloatingPointError("the model's logits hold NaN or infinity: no token can be chosen from them")
    return chosen


def choose(logits: Logits, samplers: Sequence[RowSampler]) -> list[int]:
    """One token id per row of logits, noted in its sampler. FloatingPointError as `check_finite`."""
    chosen = greedy(logits)
    if any(sampler.adjusts for sampler in samplers):
        pairs = zip(logits.tensor, samplers, strict=True)
        logits = Logits(torch.stack([sampler.adjusted(logits_V) for logits_V, sampler in pairs]))
        chosen, _ = logits.peaks()
    for row, sampler in enumerate(samplers):
        if sampler.draws:
            chosen[row] = logits.draw(row, sampler.params, sampler.uniform())
        if sampler.adjusts:
            sampler.observe(chosen[row])
    return chosen


def verify(logits: Logits, samplers: Sequence[RowSampler], drafts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The tokens that each request goes on with: its own choices, one after the other, for as long as they are what was
    drafted.

    Rows of logits: for each request one for its next token, then one after each of its drafts. Each choice is made as
    without drafts, with the same random number and after the same penalties, so drafts decide only how many rows count
    (speculative sampling, Leviathan et al. 2023, with drafts of probability 1).
    """
    if not any(drafts):
        return [[token] for token in choose(logits, samplers)]
    firsts = list(accumulate((len(draft) + 1 for draft in drafts), initial=0))
    chosen: list[list[int]] = [[] for _ in samplers]
    going = list(range(len(samplers)))
    place = 0
    while going:
        rows = [firsts[index] + place for index in going]
        tokens = choose(logits.rows(rows), [samplers[index] for index in going])
        still_going = []
        for index, token in zip(going, tokens, strict=True):
            chosen[index].append(token)
            if drafts[index][place : place + 1] == (token,):
                still_going.append(index)
        going = still_going
        place += 1
    return chosen
