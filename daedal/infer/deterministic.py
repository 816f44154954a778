"""What an engine needs to be deterministic: the same numbers for a request, bit for bit, whatever else runs beside it.

Knows no requests. Reasons are in decision 013.
"""

from typing import TYPE_CHECKING

from daedal import ops
from daedal.errors import ConfigError
from daedal.infer.cache import page_multiple
from daedal.infer.speculative import Speculation
from daedal.model.packing import is_packed

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer


def piece(model: "Transformer", speculate: Speculation | None, max_batch: int, max_step_tokens: int) -> int:
    """Tokens of the pieces in which a deterministic engine of these sizes reads prompts: the most that leave room for
    all answers, in whole pages of the least size unless that is more. ConfigError where it cannot be.
    """
    if speculate is not None:
        raise ConfigError("deterministic is on and drafts depend on what else runs: leave out one of them")
    if max_step_tokens <= max_batch:
        raise ConfigError(
            f"max_step_tokens is {max_step_tokens} and max_batch {max_batch}: a deterministic engine needs more tokens "
            "in a step than requests, give more"
        )
    if not is_packed(model):
        raise ConfigError(
            "the model's weights are not packed, and PyTorch's products depend on the batch: to be deterministic, load "
            'it with weights="bf16" or another packed format'
        )
    if reason := ops.unrecordable():
        raise ConfigError(f"a deterministic engine needs the native kernels ({reason}): leave deterministic out")
    most, unit = max_step_tokens - max_batch, page_multiple(model.config)
    return most // unit * unit or most
