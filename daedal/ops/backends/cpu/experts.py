"""Routed experts on native kernels: one call from tokens to weighted sums, each chosen expert's weights read once.

Takes packed stacks only. The ids are read when the call runs, so that a recorded step may be replayed with others. How
activations are rounded is said in `linear`; the hidden rows are rounded the same way. Knows nothing of routing.
"""

import math

import torch
from torch import Tensor

from daedal.ops.backends.cpu.linear import FORMAT_NUMBERS, row_bytes, widened_bytes
from daedal.ops.backends.cpu.program import TYPES, call
from daedal.ops.backends.cpu.rows import BACKEND, FLOATS, declines
from daedal.ops.exactness import is_exact
from daedal.ops.packed import Packed
from daedal.ops.registry import REGISTRY
from daedal.packed import PANEL


def _supports(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    *,
    limit: float | None,
) -> str | None:
    if not isinstance(gate_up_EFD, Packed) or not isinstance(down_EDF, Packed):
        return "not packed"
    if gate_up_EFD.format != down_EDF.format:
        return f"takes one format, not {gate_up_EFD.format} and {down_EDF.format}"
    if down_EDF.columns % PANEL:
        return f"an expert's width of {down_EDF.columns} is no multiple of {PANEL}, so gates and ups share a panel"
    if x_TD.dtype not in FLOATS or weights_TA.dtype != torch.float32 or ids_TA.dtype != torch.int64:
        return f"takes bfloat16 and float32 with float32 weights and int64 ids, not {x_TD.dtype}"
    if x_TD.stride(-1) != 1 or not (ids_TA.is_contiguous() and weights_TA.is_contiguous()):
        return "the numbers of a row do not lie side by side"
    return declines(x_TD, weights_TA, gate_up_EFD.data, down_EDF.data)


@REGISTRY.register("experts", BACKEND, supports=_supports)
def experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up_EFD: Packed,
    down_EDF: Packed,
    *,
    limit: float | None,
) -> Tensor:
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    if y_TD.numel() == 0:
        return y_TD
    tokens, active = ids_TA.shape
    threads = torch.get_num_threads()
    call(
        "packed_experts",
        x_TD,
        TYPES[x_TD.dtype],
        x_TD.stride(0),
        *x_TD.shape,
        ids_TA,
        active,
        weights_TA,
        gate_up_EFD.data,
        down_EDF.data,
        FORMAT_NUMBERS[gate_up_EFD.format],
        gate_up_EFD.count,
        down_EDF.columns,
        math.inf if limit is None else float(limit),
        y_TD,
        torch.empty(_scratch_bytes(tokens, active, gate_up_EFD, down_EDF, threads), dtype=torch.uint8),
        threads,
        is_exact(),
    )
    return y_TD


def _scratch_bytes(tokens: int, active: int, gate_up: Packed, down: Packed, threads: int) -> int:
    """For the order of pairs, rows made ready in any level's way, the sums, and each thread's widened panels."""
    pairs = tokens * active
    order = 4 * (2 * gate_up.count + pairs) + 512
    few = tokens * row_bytes(gate_up.format, gate_up.columns)
    many = pairs * 2 * gate_up.padded_columns
    hidden = pairs * row_bytes(down.format, down.columns)
    sums = 4 * tokens * down.panels * PANEL
    widened = threads * (widened_bytes(gate_up) + widened_bytes(down)) if pairs >= gate_up.count else 0
    return order + max(few, many) + hidden + sums + widened + 512
