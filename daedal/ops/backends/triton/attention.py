"""Attention of a ragged batch, split over long contexts where sequences alone would leave cores idle."""

from functools import lru_cache
from itertools import pairwise

import torch
import triton
from torch import Tensor

from daedal.ops import silicon
from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.kernels import attention as kernels
from daedal.ops.backends.triton.launch import block_of, on_device, sent, tuned
from daedal.ops.backends.triton.located import Located
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import Rows

LEAST_CHUNK = 256  # keys that are worth a program of their own
MOST_SPLITS = 64
WIDEST_BLOCK = 128  # of keys: stretches are whole blocks
FLOAT_BYTES = 4
MOST_ROWS = 64  # of queries and heads in a block

_ATTEND = tuned(kernels.attend, spaces.ATTENTION, ["PART_A", "PART_B", "VALUE", "BM", "KIND", "SHARED", "SPLIT"])


@REGISTRY.register("attention", BACKEND, supports=supports.attention)
def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    device, (num_tokens, num_heads, size) = q_THK.device, q_THK.shape
    located = Located.of(keys, device)
    held = located if isinstance(values, int) else Located.of(values, device)
    value_dim = values if isinstance(values, int) else held.memory.shape[-1]
    out_THV = q_THK.new_empty((num_tokens, num_heads, value_dim))
    if not out_THV.numel():
        return out_THV
    q_THK = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    per_key = num_heads // located.heads
    part = key_part(size, value_dim if isinstance(values, int) else None)
    block = row_block(max(end - start for start, end in pairwise(starts)) * per_key, q_THK, value_dim)
    blocks = _blocks(tuple(starts), per_key, block, device)
    num_splits, chunk = splits(blocks.shape[0] * located.heads, max(keys.lengths), device)
    parts, logs = partial_results(out_THV, num_splits) if num_splits > 1 else (out_THV, out_THV)
    _ATTEND[(blocks.shape[0], located.heads, num_splits)](
        q_THK, located.memory, held.memory, parts, logs, blocks, on_device(tuple(starts), device),
        on_device(tuple(keys.lengths), device), located.places, float(scale), chunk, num_tokens, num_heads,
        q_THK.stride(0), q_THK.stride(1), located.page, located.row, located.head, held.page, held.row, held.head,
        located.page_size, located.table, KIND=located.kind, SHARED=isinstance(values, int), SPLIT=num_splits > 1,
        HEADS=per_key, PART_A=part, PART_B=size - part, VALUE=value_dim, BLOCK_A=block_of(part),
        BLOCK_B=block_of(size - part), BLOCK_V=block_of(value_dim), BM=block,
    )  # fmt: skip
    return merged(parts, logs, None, out_THV) if num_splits > 1 else out_THV


def key_part(size: int, value_dim: int | None) -> int:
    """Columns of a key's first part: its value, or the largest power of two, so that little is padded."""
    return value_dim if value_dim is not None else 1 << (size.bit_length() - 1)


def row_block(rows: int, q_THK: Tensor, value_dim: int) -> int:
    """Queries and heads of a block: as many as there are, and as half of the memory beside a core holds."""
    profile, element = silicon.of(q_THK.device), q_THK.element_size()
    # Where sums lie beside the core: those of a row, its new share of them, and the share of the block's keys.
    beside = 2 * FLOAT_BYTES * value_dim if profile.sums_on_chip else 0
    room = (profile.on_chip_bytes or 2**16) // (2 * (q_THK.shape[-1] * element + beside))
    return max(16, min(block_of(rows), MOST_ROWS, 1 << (max(room, 1).bit_length() - 1)))


def splits(programs: int, most_keys: int, device: torch.device) -> tuple[int, int]:
    """(how many programs share a sequence's keys, how many keys each takes): two programs for each core."""
    wanted = triton.cdiv(2 * (silicon.of(device).cores or 1), programs)
    number = max(1, min(wanted, triton.cdiv(most_keys, LEAST_CHUNK), MOST_SPLITS))
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


@lru_cache(maxsize=64)
def _blocks(starts: tuple[int, ...], per_key: int, block: int, device: torch.device) -> Tensor:
    """[n, 2] int32: of each block of rows its sequence, and its number in it."""
    pairs = [
        (sequence, number)
        for sequence, (start, end) in enumerate(pairwise(starts))
        for number in range(triton.cdiv((end - start) * per_key, block))
    ]
    return sent(torch.tensor(pairs, dtype=torch.int32).view(-1, 2), device)
