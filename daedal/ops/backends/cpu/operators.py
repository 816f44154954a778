"""The native kernels as operators of PyTorch, `torch.ops.daedal.*`: schemas, and fake forms that give shapes alone.

For `torch.export`, `torch.compile` and whoever calls them from elsewhere. Daedal itself goes through the registry,
which costs a call less. A packed matrix is passed as its bytes, its format and its shape; pages as pool, table and
lengths.
"""

import torch
from torch import Tensor

from daedal.ops.backends.cpu import attention, experts, linear, rows
from daedal.ops.packed import Packed
from daedal.ops.rows import MovingPages, PagedRows

operator = torch.library.custom_op


@operator("daedal::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As `ops.rms_norm`."""
    return rows.rms_norm(x, weight, eps)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operator("daedal::rotary", mutates_args=(), device_types="cpu")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `ops.rotary`."""
    return rows.rotary(x, cos, sin, interleaved=interleaved)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


@operator("daedal::swiglu", mutates_args=(), device_types="cpu")
def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """As `ops.swiglu`."""
    return rows.swiglu(gate, up, limit=limit)


@swiglu.register_fake
def _(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    return gate.new_empty(gate.shape)


@operator("daedal::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(x: Tensor, data: Tensor, format: str, features: int, bias: Tensor | None) -> Tensor:
    """`ops.linear` by a packed matrix [features, columns of x]."""
    return linear.linear(x, Packed(data, format, (features, x.shape[-1])), bias)


@packed_linear.register_fake
def _(x: Tensor, data: Tensor, format: str, features: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


@operator("daedal::packed_grouped_linear", mutates_args=(), device_types="cpu")
def packed_grouped_linear(x: Tensor, data: Tensor, format: str, features: int) -> Tensor:
    """`ops.grouped_linear` by a packed stack [groups of x, features, columns of x]."""
    return linear.grouped_linear(x, Packed(data, format, (x.shape[1], features, x.shape[2])))


@packed_grouped_linear.register_fake
def _(x: Tensor, data: Tensor, format: str, features: int) -> Tensor:
    return x.new_empty((*x.shape[:2], features))


@operator("daedal::packed_experts", mutates_args=(), device_types="cpu")
def packed_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    format: str,
    num_experts: int,
    width: int,
    limit: float | None,
) -> Tensor:
    """`ops.experts` by packed stacks [E, 2 width, columns of x] and [E, columns of x, width]."""
    dim = x.shape[-1]
    stacks = Packed(gate_up, format, (num_experts, 2 * width, dim)), Packed(down, format, (num_experts, dim, width))
    return experts.experts(x, ids, weights, *stacks, limit=limit)


@packed_experts.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    format: str,
    num_experts: int,
    width: int,
    limit: float | None,
) -> Tensor:
    return x.new_empty(x.shape)


@operator("daedal::paged_attention", mutates_args=(), device_types="cpu")
def paged_attention(
    q: Tensor,
    starts: list[int],
    keys: Tensor,
    values: Tensor | None,
    table: Tensor,
    lengths: Tensor,
    value_dim: int,
    scale: float,
) -> Tensor:
    """`ops.attention` on pages: pools [P, N, ...], an int32 table [B, pages] and int32 lengths [B]. values None: the
    first `value_dim` numbers of each key row.
    """
    pages = MovingPages(table, lengths, keys.shape[1])
    held = value_dim if values is None else PagedRows(values, pages)
    return attention.attention(q, tuple(starts), PagedRows(keys, pages), held, scale=scale)


@paged_attention.register_fake
def _(
    q: Tensor,
    starts: list[int],
    keys: Tensor,
    values: Tensor | None,
    table: Tensor,
    lengths: Tensor,
    value_dim: int,
    scale: float,
) -> Tensor:
    return q.new_empty((*q.shape[:2], value_dim))
