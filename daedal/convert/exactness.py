"""Whether two forms of a model are one function, told in float64: float32's own noise is as large as the rule allows.

Activations are in float64 from the embeddings on, and each matrix is widened where it is used, so that in memory is
no second copy of a model. Knows neither form.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.model.transformer import Transformer

EXACT = 1e-4
"""What an exact form may move a logit by."""

_ROWS = 8192  # of the head, that are widened at once


@torch.no_grad()
def furthest_logit(
    first: Transformer,
    second: Transformer,
    windows: Sequence[Tensor],
    watch: Callable[[int], None] = lambda tokens: None,
) -> float:
    """The largest difference of a logit between two forms that share their head. windows: int64 [T] each. watch: told
    of the tokens done after each.
    """
    furthest = 0.0
    for ids_T in windows:
        batch = RaggedBatch.rectangular(ids_T.unsqueeze(0))
        moved_TD = _hidden(second, batch) - _hidden(first, batch)
        for rows_vD in first.lm_head.weight.split(_ROWS):
            furthest = max(furthest, float((moved_TD @ rows_vD.double().T).abs().max()))
        watch(len(ids_T))
    return furthest


def _hidden(model: Transformer, batch: RaggedBatch) -> Tensor:
    x_TD = model.embed_tokens(batch.ids_T).double()
    step = ForwardPass(model.config, batch, None)
    for layer in model.layers:
        x_TD = layer(x_TD, step)
    hidden_TD: Tensor = model.norm(x_TD)
    return hidden_TD
