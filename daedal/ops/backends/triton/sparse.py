"""The sparse side: scores of entries and the best of them, and attention over entries and a window with sinks."""

from functools import lru_cache
from itertools import pairwise

import torch
import triton
from torch import Tensor

from daedal.ops.backends.triton import spaces, supports
from daedal.ops.backends.triton.attention import merged, partial_results, row_block, splits
from daedal.ops.backends.triton.kernels import sparse as kernels
from daedal.ops.backends.triton.launch import block_of, on_device, sent, stretches, tuned
from daedal.ops.backends.triton.located import FLAT, Located
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.reference_sparse import chosen_width
from daedal.ops.registry import REGISTRY
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, Rows

SCORES = 2**26  # numbers held at once, about: 256 MiB
ENTRIES = 64  # scored by one program
COLUMNS = 1024  # judged at once

_ATTEND = tuned(
    kernels.attend_sparse, spaces.ATTENTION, ["PART_A", "PART_B", "BM", "ENTRY_KIND", "WINDOW_KIND", "CHOSEN"]
)


@REGISTRY.register("choose_entries", BACKEND, supports=supports.choose_entries)
def choose_entries(
    q_TIK: Tensor,
    weights_TI: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    keys: Rows,
    *,
    count: int,
    rate: int,
) -> Tensor:
    device, (num_tokens, num_heads, size) = q_TIK.device, q_TIK.shape
    width, most = chosen_width(keys, count), max(keys.lengths, default=0)
    chosen_TA = torch.full((num_tokens, width), -1, dtype=torch.int64, device=device)
    if not chosen_TA.numel():
        return chosen_TA
    located = Located.of(keys, device)
    sequences_T, positions_T = _tokens(tuple(starts), tuple(pasts), device)
    seen_T = (positions_T + 1) // rate
    q_TIK = q_TIK.detach() if q_TIK.stride(-1) == 1 else q_TIK.detach().contiguous()
    weights_TI = weights_TI.detach().contiguous()
    block = max(1, min(num_tokens, SCORES // most))
    scores_tS = torch.empty((block, most), dtype=torch.float32, device=device)
    runs = triton.cdiv(most, ENTRIES)
    for part in stretches(num_tokens, runs, device, most=block):
        tokens = part.stop - part.start
        kernels.score_entries[(tokens, runs)](
            q_TIK[part], weights_TI[part], scores_tS, sequences_T[part], seen_T[part], located.memory, located.places,
            q_TIK.stride(0), q_TIK.stride(1), num_heads, most, num_heads, size, located.table, located.page_size,
            located.page, located.row, KIND=located.kind, BLOCK_I=block_of(num_heads), BLOCK_K=block_of(size),
            BN=ENTRIES,
        )  # fmt: skip
        kernels.take_best[(tokens,)](scores_tS, seen_T[part], chosen_TA[part], most, count, width, BLOCK=COLUMNS)
    return chosen_TA


@REGISTRY.register("sparse_attention", BACKEND, supports=supports.sparse_attention)
def sparse_attention(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows | None,
    chosen_TA: Tensor | None,
    window: Rows | RingRows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> Tensor:
    device, (num_tokens, num_heads, size) = q_THK.device, q_THK.shape
    out_THV = q_THK.new_empty((num_tokens, num_heads, value_dim))
    if not out_THV.numel():
        return out_THV
    q_THK = q_THK if q_THK.stride(-1) == 1 else q_THK.contiguous()
    nowhere = Located(q_THK, FLAT, on_device((0,), device), 1, 0, 0, 0, 0)
    held = nowhere if entries is None else Located.of(entries, device)
    near, firsts = _window(window, tuple(starts), tuple(pasts), device) or (nowhere, nowhere.places)
    sequences_T, positions_T = _tokens(tuple(starts), tuple(pasts), device)
    chosen, num_chosen = (None, 0) if chosen_TA is None else (chosen_TA.contiguous(), chosen_TA.shape[1])
    most = 0 if entries is None else num_chosen if chosen_TA is not None else max(entries.lengths)
    block = row_block(num_heads, q_THK, value_dim)
    blocks = triton.cdiv(num_heads, block)
    num_splits, chunk = splits(num_tokens * blocks, most, device)
    for some in stretches(num_tokens, max(num_heads, blocks * num_splits), device):
        out_tHV = out_THV[some]
        parts, logs = partial_results(out_tHV, num_splits)
        _ATTEND[(out_tHV.shape[0], blocks, num_splits)](
            q_THK[some], parts, logs, sequences_T[some], positions_T[some], held.memory, held.places,
            nowhere.places if chosen is None else chosen[some], near.memory, near.places, firsts,
            float(scale), chunk, num_chosen, out_tHV.shape[0], num_heads, rate, span, q_THK.stride(0), q_THK.stride(1),
            held.table, held.page_size, held.page, held.row, near.table, near.page_size, near.page, near.row,
            ENTRIES=entries is not None, ENTRY_KIND=held.kind, CHOSEN=chosen is not None,
            WINDOW=window is not None, WINDOW_KIND=near.kind, PART_A=value_dim, PART_B=size - value_dim,
            BLOCK_A=block_of(value_dim), BLOCK_B=block_of(size - value_dim), BM=block,
        )  # fmt: skip
        merged(parts, logs, sinks_H, out_tHV)
    return out_THV


def _window(
    window: Rows | RingRows | None, starts: tuple[int, ...], pasts: tuple[int, ...], device: torch.device
) -> tuple[Located, Tensor] | None:
    """A window's rows by their positions, and the first position of each sequence that is there."""
    if window is None:
        return None
    totals = tuple(past + end - start for past, (start, end) in zip(pasts, pairwise(starts), strict=True))
    firsts = tuple(total - length for total, length in zip(totals, window.lengths, strict=True))
    located = Located.of(window, device)
    if isinstance(window, FlatRows):
        # Kernels ask for the row of a position: here it lies so many rows behind the sequence's first one.
        places = tuple(start - first for start, first in zip(window.starts, firsts, strict=False))
        located = Located(located.memory, FLAT, on_device(places, device), 1, 0, located.row, 0, 0)
    return located, on_device(firsts, device)


@lru_cache(maxsize=64)
def _tokens(starts: tuple[int, ...], pasts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int32: of each token its sequence and its position."""
    pairs = [
        (sequence, past + number)
        for sequence, ((start, end), past) in enumerate(zip(pairwise(starts), pasts, strict=True))
        for number in range(end - start)
    ]
    both = torch.tensor(pairs, dtype=torch.int32).view(-1, 2).T.contiguous()
    sequences_T, positions_T = sent(both, device)
    return sequences_T, positions_T
