"""What several cells of the MindSpore model are made of: parameters, matrices, norms, rotation, the static cache.

Every shape is known when a graph is compiled. What is sensitive is computed in float32 whatever the weights have:
norms, rotation, softmax, routing, logits (decisions 006 and 010). Only operations that MindSpore has on a CPU too.
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer


def parameter(shape: tuple[int, ...], dtype: Any) -> Any:
    """A parameter to be filled from a file."""
    return Parameter(initializer("zeros", shape, dtype), requires_grad=False)


def linear(columns: int, rows: int, dtype: Any, *, bias: bool = False) -> Any:
    """x_TC to y_TR; weight [R, C], as published."""
    return nn.Dense(columns, rows, weight_init="zeros", bias_init="zeros", has_bias=bias, dtype=dtype)


class RMSNorm(nn.Cell):
    """x scaled to a root mean square of 1, times a weight; in float32, rounded once at the end."""

    def __init__(self, width: int, eps: float, dtype: Any):
        super().__init__()
        self.eps = eps
        self.weight = parameter((width,), dtype)

    def construct(self, x: Any) -> Any:
        wide = x.astype(ms.float32)
        scaled = wide * ops.rsqrt(ops.mean(ops.square(wide), -1, True) + self.eps)
        return (scaled * self.weight.astype(ms.float32)).astype(x.dtype)


class Rotation(nn.Cell):
    """x_THR turned by the angles of each token: pairs of neighbours where interleaved, else of the two halves."""

    def __init__(self, *, interleaved: bool):
        super().__init__()
        self.interleaved = interleaved

    def construct(self, x_THR: Any, cos_TC: Any, sin_TC: Any) -> Any:
        tokens, heads, dim = x_THR.shape
        wide = x_THR.astype(ms.float32)
        cos, sin = cos_TC.expand_dims(1), sin_TC.expand_dims(1)
        if self.interleaved:
            pairs = wide.reshape(tokens, heads, dim // 2, 2)
            first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
        else:
            first, second = wide[:, :, : dim // 2], wide[:, :, dim // 2 :]
        one, two = first * cos - second * sin, second * cos + first * sin
        if self.interleaved:
            return ops.stack((one, two), -1).reshape(tokens, heads, dim).astype(x_THR.dtype)
        return ops.cat((one, two), -1).astype(x_THR.dtype)


class Rows(nn.Cell):
    """The static cache of one layer: a row of C numbers for each of G heads and S positions.

    Writes the rows new_TGC of positions_T and gives all back as [G, S, C]. Rows of later positions are of an older
    text, or zero: finite, and masked by whoever reads.
    """

    def __init__(self, groups: int, slots: int, width: int, dtype: Any):
        super().__init__()
        self.groups, self.slots, self.width = groups, slots, width
        self.rows = parameter((groups * slots, width), dtype)
        self.first_G1 = Tensor(np.arange(groups, dtype=np.int32)[:, None] * slots)

    def construct(self, new_TGC: Any, positions_T: Any) -> Any:
        places = (self.first_G1 + positions_T.expand_dims(0)).reshape(-1)
        new = new_TGC.swapaxes(0, 1).reshape(-1, self.width)
        return ops.scatter_update(self.rows, places, new).reshape(self.groups, self.slots, self.width)


class Attention(nn.Cell):
    """softmax(scale q k + bias) v. q_THK: H heads share the G of keys_GSK and values_GSV; bias_TS: 0, or so low that
    a position weighs nothing. Gives o_THV.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.score = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, q_THK: Any, keys_GSK: Any, values_GSV: Any, bias_TS: Any) -> Any:
        tokens, heads, width = q_THK.shape
        groups, slots, value = values_GSV.shape
        shared = heads // groups
        q = q_THK.reshape(tokens, groups, shared, width).transpose(1, 0, 2, 3).reshape(groups, tokens * shared, width)
        scores = self.score(q, keys_GSK).astype(ms.float32) * self.scale
        scores = scores.reshape(groups, tokens, shared, slots) + bias_TS.reshape(1, tokens, 1, slots)
        weights = ops.softmax(scores, -1).astype(values_GSV.dtype).reshape(groups, tokens * shared, slots)
        o = self.mix(weights, values_GSV).reshape(groups, tokens, shared, value)
        return o.transpose(1, 0, 2, 3).reshape(tokens, heads, value)
