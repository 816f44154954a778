"""The model's own log-probabilities: of chosen tokens, and of the likeliest beside them.

Taken from the raw logits, before bias, penalties and temperature, as the OpenAI API and vLLM report them. Knows rows of
logits only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from daedal.infer.request import TokenLogprobs
from daedal.ops.drawing import likeliest

_ROWS_AT_ONCE = 64  # bounds the temporaries, each as large as these rows of the vocabulary


def token_logprobs(logits_NV: Tensor, tokens: Sequence[int], nums_top: Sequence[int]) -> list[TokenLogprobs]:
    """For each row the log-probability of its token, and of the `nums_top[row]` likeliest, ties by lowest id."""
    entries: list[TokenLogprobs] = []
    for first in range(0, len(tokens), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        entries += _some(logits_NV[rows].float(), tokens[rows], nums_top[rows])
    return entries


def _some(logits_NV: Tensor, tokens: Sequence[int], nums_top: Sequence[int]) -> list[TokenLogprobs]:
    peak_N1 = logits_NV.amax(dim=-1, keepdim=True)
    log_mass_N1 = (logits_NV - peak_N1).exp_().sum(dim=-1, keepdim=True).log_()
    tokens_N1 = torch.tensor(tokens, dtype=torch.int64, device=logits_NV.device).unsqueeze(1)
    # float32 subtracted as Python floats: a token has the same number whether chosen or among the likeliest.
    columns = torch.cat((logits_NV.gather(1, tokens_N1), peak_N1, log_mass_N1), 1).tolist()
    ranked = _ranked(logits_NV, nums_top)
    entries = []
    for token, (logit, peak, log_mass), pairs in zip(tokens, columns, ranked, strict=True):
        top = tuple((likely, value - peak - log_mass) for value, likely in pairs)
        entries.append(TokenLogprobs(id=token, logprob=logit - peak - log_mass, top=top))
    return entries


def _ranked(logits_NV: Tensor, nums_top: Sequence[int]) -> list[list[tuple[float, int]]]:
    """Per row its `nums_top[row]` highest logits with their ids, highest first, ties by lowest id."""
    most = max(nums_top)
    if most == 0:
        return [[] for _ in nums_top]
    # One more than wanted shows whether the last place is tied; topk promises nothing about equals.
    values_NC, ids_NC = logits_NV.topk(min(most + 1, logits_NV.shape[1]))
    ranked = []
    for row, (values, ids, wanted) in enumerate(zip(values_NC.tolist(), ids_NC.tolist(), nums_top, strict=True)):
        if 0 < wanted < len(values) and values[wanted - 1] == values[wanted]:
            ids = likeliest(logits_NV[row].cpu().numpy(), wanted).tolist()
            values = logits_NV[row, ids].tolist()
        pairs = sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        ranked.append(pairs[:wanted])
    return ranked
