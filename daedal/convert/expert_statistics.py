"""How much an error in a feed-forward part matters: by token, and by direction of the residual stream.

The next norm divides by the residual's length, so an error counts relative to it; and the first token of a text, which
attention uses as its resting place and whose residual is huge, counts for a tenth of all, few as such tokens are. By
direction: the Fisher information of the residual stream after a layer, from the gradients of a loss whose labels the
model draws itself. Knows no experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from daedal.convert.attention_statistics import drawn
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.model.transformer import Transformer

FIRST_SHARE = 0.1
# Of the mean energy, added to every direction, since some thousand tokens say little of most.
EVEN_SHARE = 0.1


def token_weights(residual_TD: Tensor, first_T: Tensor) -> Tensor:
    """weights_T, sum 1, inversely as the residual's mean square; first_T: bool, the first tokens of their texts."""
    weights_T = 1 / residual_TD.square().mean(-1).clamp_min(1e-12)
    first, others = weights_T[first_T].sum(), weights_T[~first_T].sum()
    weights_T = torch.where(first_T, weights_T * FIRST_SHARE / first, weights_T * (1 - FIRST_SHARE) / others)
    return weights_T.div(weights_T.sum())


def output_metrics(
    model: Transformer, windows: Sequence[Tensor], *, seed: int = 0, watch: Callable[[int], None] | None = None
) -> list[Tensor]:
    """metric_DD for each layer, mean diagonal 1: what an error in the residual stream after it costs.

    windows: int64 [T] each, read from an empty context; the first token of each is left out. watch: told of the tokens
    done after each window.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    hidden = model.config.hidden_size
    sums = [torch.zeros(hidden, hidden, dtype=torch.float64, device=model.device) for _ in model.layers]
    for ids_T in windows:
        batch = RaggedBatch.rectangular(ids_T.to(model.device).unsqueeze(0))
        with torch.enable_grad():
            residuals = _residuals(model, batch)
            logits_TV = model.head(model.norm(residuals[-1]))
            drawn_T = drawn(logits_TV.detach().softmax(-1), generator).squeeze(-1)
            loss = torch.nn.functional.cross_entropy(logits_TV, drawn_T, reduction="sum")
            slopes = torch.autograd.grad(loss, residuals)
        for total_DD, residual_TD, slope_TD in zip(sums, residuals, slopes, strict=True):
            scaled_TD = (slope_TD * residual_TD.detach().square().mean(-1, keepdim=True).sqrt())[1:]
            total_DD += (scaled_TD.T @ scaled_TD).double()
        if watch is not None:
            watch(len(ids_T))
    return [_evened(total_DD).float() for total_DD in sums]


def _residuals(model: Transformer, batch: RaggedBatch) -> list[Tensor]:
    """x_TD after each layer, with gradients among them."""
    x_TD = model.embed_tokens(batch.ids_T).detach().requires_grad_()
    step, found = ForwardPass(model.config, batch, None), []
    for layer in model.layers:
        x_TD = layer(x_TD, step)
        found.append(x_TD)
    return found


def _evened(moment_DD: Tensor) -> Tensor:
    scaled_DD = moment_DD / moment_DD.diagonal().mean().clamp_min(1e-300)
    return (1 - EVEN_SHARE) * scaled_DD + EVEN_SHARE * torch.eye(len(scaled_DD), dtype=scaled_DD.dtype).to(scaled_DD)
