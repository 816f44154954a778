"""Angles of the rotary embedding as tables for a static context, in numpy.

The formulas are those of `daedal.model.rotary` (RoFormer; Llama 3's bands; YaRN, section 3.2, as in V2, section 3.1.4),
in float32 and in the same order, so that angles agree at long positions. Knows no MindSpore.
"""

import math

import numpy as np
from numpy.typing import NDArray

from daedal.rope import RopeParameters

Float32Array = NDArray[np.float32]


def tables(rope: RopeParameters, dim: int, slots: int) -> tuple[Float32Array, Float32Array]:
    """cos_SC and sin_SC of the positions 0 to slots - 1, C = dim / 2; YaRN's magnitude is in them."""
    angles_SC = np.arange(slots, dtype=np.float32)[:, None] * inverse_frequencies(rope, dim)
    scale = np.float32(rope.rotation_scale())
    return np.cos(angles_SC) * scale, np.sin(angles_SC) * scale


def inverse_frequencies(rope: RopeParameters, dim: int) -> Float32Array:
    """[dim / 2], radians per position."""
    exponents_C = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers_C = np.power(np.float64(rope.rope_theta), exponents_C.astype(np.float64)).astype(np.float32)
    plain_C = np.float32(1.0) / powers_C
    if rope.rope_type == "default":
        return plain_C
    assert rope.factor is not None
    stretched_C = plain_C / np.float32(rope.factor)
    if rope.rope_type == "linear":
        return stretched_C
    kept_C = _llama3(rope, plain_C) if rope.rope_type == "llama3" else np.float32(1.0) - _yarn(rope, plain_C, dim)
    blended_C: Float32Array = plain_C * kept_C + stretched_C * (np.float32(1.0) - kept_C)
    return blended_C


def _llama3(rope: RopeParameters, plain_C: Float32Array) -> Float32Array:
    """How much of each pair's own speed is kept: by how often it turns in the original context."""
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    assert rope.original_max_position_embeddings is not None
    turns_C = np.float32(rope.original_max_position_embeddings) * plain_C / np.float32(2 * math.pi)
    width = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    return np.clip((turns_C - np.float32(rope.low_freq_factor)) / width, 0, 1)


def _yarn(rope: RopeParameters, plain_C: Float32Array, dim: int) -> Float32Array:
    """How far each pair is slowed down: a ramp over its index, between the pairs that turn beta_fast and beta_slow
    times in the original context.
    """
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
    index_C = np.arange(plain_C.shape[0], dtype=np.float32)
    return np.clip((index_C - np.float32(low)) / np.float32(high - low), 0, 1)
