"""Angles of the rotary embedding.

Frequencies follow RoFormer, stretched as `RopeParameters` says: linearly, by Llama 3's bands, or by YaRN's ramp
(YaRN, section 3.2; V2, section 3.1.4). Computed in float32 in the order that published implementations use, so that
angles agree to the last bit at long positions.
"""

import math

import torch
from torch import Tensor

from daedal import ops
from daedal.rope import RopeParameters


def angles(rope: RopeParameters, dim: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos_TC and sin_TC for positions_T, float32, C = dim / 2; YaRN's magnitude is in them."""
    frequencies_C = inverse_frequencies(rope, dim, device=positions_T.device)
    return ops.angles(positions_T, frequencies_C, rope.rotation_scale())


def inverse_frequencies(rope: RopeParameters, dim: int, *, device: torch.device | str = "cpu") -> Tensor:
    """[dim / 2] float32, radians per position."""
    exponents_C = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    plain_C = 1.0 / (rope.rope_theta**exponents_C)
    if rope.rope_type == "default":
        return plain_C
    assert rope.factor is not None
    if rope.rope_type == "linear":
        return plain_C / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, plain_C)
    return _yarn(rope, plain_C, dim)


def _llama3(rope: RopeParameters, plain_C: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended by their wavelength."""
    assert rope.factor is not None
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    assert rope.original_max_position_embeddings is not None
    original = rope.original_max_position_embeddings
    turns_C = original * plain_C / (2 * math.pi)
    blend_C = (turns_C - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend_C = blend_C.clamp(0, 1)
    return plain_C * blend_C + plain_C / rope.factor * (1 - blend_C)


def _yarn(rope: RopeParameters, plain_C: Tensor, dim: int) -> Tensor:
    """Pairs that turn more than beta_fast times in the original context keep their speed, below beta_slow divide by
    the factor, between them a ramp over the pair's index.
    """
    assert rope.factor is not None
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    index_C = torch.arange(plain_C.shape[0], dtype=torch.float32, device=plain_C.device)
    slow_C = ((index_C - low) / (high - low)).clamp(0, 1)
    return plain_C / rope.factor * slow_C + plain_C * (1 - slow_C)
