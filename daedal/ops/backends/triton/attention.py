"""Attention of a ragged batch, split over long contexts where sequences alone would leave cores idle.

Where gradients are wanted nothing is split: then each query's logarithm is kept, from which shares are found again.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from daedal.ops import silicon
from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.kernels import attention as kernels
from daedal.ops.backends.triton.kernels import attention_gradients as backwards
from daedal.ops.backends.triton.launch import block_of, on_device, sent, tuned
from daedal.ops.backends.triton.located import Located, dense_last
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import FlatRows, Rows
from daedal.ops.trained import wants_gradients

LEAST_CHUNK = 256  # keys that are worth a program of their own
MOST_SPLITS = 64
WIDEST_BLOCK = 128  # of keys: stretches are whole blocks
FLOAT_BYTES = 4
MOST_ROWS = 64  # of queries and heads in a block

_ATTEND = tuned(kernels.attend, spaces.ATTENTION, ["PART_A", "PART_B", "VALUE", "BM", "KIND", "SHARED", "LOGGED"])
_WIDTHS = ["HEADS", "PART_A", "PART_B", "VALUE", "BLOCK"]
_QUERY_GRADIENT = tuned(backwards.query_gradient, spaces.ATTENTION_GRADIENTS, _WIDTHS)
_KEY_GRADIENTS = tuned(backwards.key_gradients, spaces.ATTENTION_GRADIENTS, _WIDTHS)


@REGISTRY.register("attention", BACKEND, supports=supports.attention)
def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    q_THK = dense_last(q_THK)
    if isinstance(keys, FlatRows) and isinstance(values, FlatRows):
        given = q_THK, dense_last(keys.rows), dense_last(values.rows)
        if wants_gradients(*given):
            out_THV: Tensor = _Attention.apply(*given, tuple(starts), keys.starts, scale)  # type: ignore[no-untyped-call]
            return out_THV
    return _attended(q_THK, tuple(starts), keys, values, scale, None)


def _attended(
    q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, scale: float, logs: Tensor | None
) -> Tensor:
    """logs: float32 [T, H], written where given: of each query the logarithm of its softmax's sum, to the base 2."""
    device, (num_tokens, num_heads, size) = q_THK.device, q_THK.shape
    located = Located.of(keys, device)
    held = located if isinstance(values, int) else Located.of(values, device)
    value_dim = values if isinstance(values, int) else held.memory.shape[-1]
    out_THV = q_THK.new_empty((num_tokens, num_heads, value_dim))
    if not out_THV.numel():
        return out_THV
    per_key = num_heads // located.heads
    part = key_part(size, value_dim if isinstance(values, int) else None)
    block = row_block(max(end - start for start, end in pairwise(starts)) * per_key, q_THK, value_dim)
    blocks = _blocks(starts, per_key, block, device)
    most = 1 if logs is not None else MOST_SPLITS
    num_splits, chunk = splits(blocks.shape[0] * located.heads, max(keys.lengths), device, most)
    parts, weights = (out_THV, logs) if num_splits == 1 else partial_results(out_THV, num_splits)
    _ATTEND[(blocks.shape[0], located.heads, num_splits)](
        q_THK, located.memory, held.memory, parts, out_THV if weights is None else weights, blocks,
        on_device(starts, device), on_device(tuple(keys.lengths), device), located.places, float(scale), chunk,
        num_tokens, num_heads, q_THK.stride(0), q_THK.stride(1), located.page, located.row, located.head, held.page,
        held.row, held.head, located.page_size, located.table, KIND=located.kind, SHARED=isinstance(values, int),
        LOGGED=weights is not None, HEADS=per_key, PART_A=part, PART_B=size - part, VALUE=value_dim,
        BLOCK_A=block_of(part), BLOCK_B=block_of(size - part), BLOCK_V=block_of(value_dim), BM=block,
    )  # fmt: skip
    return merged(parts, weights, None, out_THV) if num_splits > 1 and weights is not None else out_THV


class _Attention(torch.autograd.Function):
    """Rows side by side; places: where each sequence's begin, and where the last one's end."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_SGK: Tensor,
        v_SGV: Tensor,
        starts: tuple[int, ...],
        places: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        logs_TH = q_THK.new_empty(q_THK.shape[:2], dtype=torch.float32)
        out_THV = _attended(q_THK, starts, FlatRows(k_SGK, places), FlatRows(v_SGV, places), scale, logs_TH)
        ctx.save_for_backward(q_THK, k_SGK, v_SGV, out_THV, logs_TH)
        ctx.starts, ctx.places, ctx.scale = starts, places, scale
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THV: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_SGK, v_SGV, out_THV, logs_TH = ctx.saved_tensors
        if not out_THV.numel():
            return torch.zeros_like(q_THK), torch.zeros_like(k_SGK), torch.zeros_like(v_SGV), None, None, None
        keys, values = (Located.of(FlatRows(rows, ctx.places), q_THK.device) for rows in (k_SGK, v_SGV))
        device, (num_heads, size), value_dim = q_THK.device, q_THK.shape[1:], v_SGV.shape[-1]
        per_key, part = num_heads // keys.heads, key_part(size, None)
        lengths = FlatRows(k_SGK, ctx.places).lengths
        most_new = max(end - start for start, end in pairwise(ctx.starts)) * per_key
        block, key_block = (gradient_block(rows, q_THK, value_dim) for rows in (most_new, max(lengths)))
        numbers = (
            on_device(ctx.starts, device), on_device(lengths, device), keys.places, float(ctx.scale), num_heads,
            q_THK.stride(0), q_THK.stride(1), keys.row, keys.head, values.row, values.head,
        )  # fmt: skip
        sizes = {
            "HEADS": per_key, "PART_A": part, "PART_B": size - part, "VALUE": value_dim, "BLOCK_A": block_of(part),
            "BLOCK_B": block_of(size - part), "BLOCK_V": block_of(value_dim),
        }  # fmt: skip
        grad_THV, deltas_TH = grad_THV.contiguous(), torch.empty_like(logs_TH)
        grad_q = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
        grad_k, grad_v = (_gradient_of(rows, ctx.places) for rows in (k_SGK, v_SGV))
        blocks, key_blocks = _blocks(ctx.starts, per_key, block, device), _blocks(ctx.places, 1, key_block, device)
        _QUERY_GRADIENT[(blocks.shape[0], keys.heads)](
            q_THK, k_SGK, v_SGV, out_THV, grad_THV, logs_TH, deltas_TH, grad_q, blocks, *numbers, **sizes, BLOCK=block
        )
        _KEY_GRADIENTS[(key_blocks.shape[0], keys.heads)](
            q_THK, k_SGK, v_SGV, grad_THV, logs_TH, deltas_TH, grad_k, grad_v, key_blocks, *numbers, **sizes,
            BLOCK=key_block,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None


def key_part(size: int, value_dim: int | None) -> int:
    """Columns of a key's first part: its value, or the largest power of two, so that little is padded."""
    return value_dim if value_dim is not None else 1 << (size.bit_length() - 1)


def row_block(rows: int, q_THK: Tensor, value_dim: int) -> int:
    """Queries and heads of a block: as many as there are, and as half of the memory beside a core holds."""
    # Where sums lie beside the core: those of a row, its new share of them, and the share of the block's keys.
    beside = 2 * FLOAT_BYTES * value_dim if silicon.of(q_THK.device).sums_on_chip else 0
    return _fitting(rows, q_THK.shape[-1] * q_THK.element_size() + beside, q_THK.device)


def gradient_block(rows: int, q_THK: Tensor, value_dim: int) -> int:
    """As `row_block`, of queries beside the gradients of their results, or of keys beside their values."""
    return _fitting(rows, (q_THK.shape[-1] + value_dim) * q_THK.element_size(), q_THK.device)


def _fitting(rows: int, row_bytes: int, device: torch.device) -> int:
    room = (silicon.of(device).on_chip_bytes or 2**16) // (2 * row_bytes)
    return max(16, min(block_of(rows), MOST_ROWS, 1 << (max(room, 1).bit_length() - 1)))


def splits(programs: int, most_keys: int, device: torch.device, most: int = MOST_SPLITS) -> tuple[int, int]:
    """(how many programs share a sequence's keys, how many keys each takes): two programs for each core."""
    wanted = triton.cdiv(2 * (silicon.of(device).cores or 1), programs)
    number = max(1, min(wanted, triton.cdiv(most_keys, LEAST_CHUNK), most))
    unit = min(LEAST_CHUNK, WIDEST_BLOCK)
    chunk = triton.cdiv(triton.cdiv(most_keys, number), unit) * unit
    return max(1, triton.cdiv(most_keys, max(chunk, 1))), max(chunk, unit)


def partial_results(out_THV: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
    """Memory for what each program finds: float32 [splits, T, H, V] and its weight [splits, T, H]."""
    shape = (num_splits, *out_THV.shape)
    return out_THV.new_empty(shape, dtype=torch.float32), out_THV.new_empty(shape[:-1], dtype=torch.float32)


def merged(parts: Tensor, logs: Tensor, sinks_H: Tensor | None, out_THV: Tensor) -> Tensor:
    """Writes and returns out_THV."""
    num_splits, num_tokens, num_heads, value_dim = parts.shape
    kernels.merge[(num_tokens * num_heads,)](
        parts, logs, logs if sinks_H is None else sinks_H, out_THV, num_tokens * num_heads, num_heads, num_splits,
        SINKS=sinks_H is not None, VALUE=value_dim, BLOCK_S=block_of(num_splits), BLOCK_V=block_of(value_dim),
    )  # fmt: skip
    return out_THV


def _gradient_of(rows: Tensor, places: tuple[int, ...]) -> Tensor:
    """Memory for it; nought where rows are of no sequence."""
    covered = places[0] == 0 and places[-1] == rows.shape[0]
    return rows.new_empty(rows.shape) if covered else rows.new_zeros(rows.shape)


@lru_cache(maxsize=64)
def _blocks(starts: tuple[int, ...], per_key: int, block: int, device: torch.device) -> Tensor:
    """[n, 2] int32: of each block of rows its sequence, and its number in it."""
    pairs = [
        (sequence, number)
        for sequence, (start, end) in enumerate(pairwise(starts))
        for number in range(triton.cdiv((end - start) * per_key, block))
    ]
    return sent(torch.tensor(pairs, dtype=torch.int32).view(-1, 2), device)
