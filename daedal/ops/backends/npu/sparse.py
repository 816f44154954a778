"""V3.2's sparse attention on the vendor's ops: which tokens each query reads, and attention on these alone.

Among tokens of equal score the vendor promises no order; scores of real models tie where all heads give 0. The op of
attention wants the two parts of latent rows in tensors of their own: of long contexts only the chosen rows are copied.
"""

import torch
from torch import Tensor

from daedal.ops import silicon
from daedal.ops.backends.npu import supports, vendor
from daedal.ops.backends.npu.attention import parts
from daedal.ops.backends.npu.places import on_device
from daedal.ops.backends.npu.supports import BACKEND
from daedal.ops.reference_sparse import chosen_width
from daedal.ops.registry import REGISTRY
from daedal.ops.rings import RingRows
from daedal.ops.rows import PagedRows, Rows, page_table

_NONE = 2**31 - 1


@REGISTRY.register("choose_entries", BACKEND, supports=supports.choose_entries)
@torch.no_grad()
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
    device = q_TIK.device
    width = chosen_width(keys, count)
    # Where there are eight-bit floats the op takes weights in the queries' type alone; elsewhere in float32.
    narrow = silicon.of(device).multiplies(torch.float8_e4m3fn)
    if isinstance(keys, PagedRows):
        table, places = page_table(keys.pages, device), on_device(tuple(keys.lengths), device)
        held = keys.pool.unsqueeze(2)
    else:
        table, places, held = None, on_device(keys.starts[1:], device), keys.rows.contiguous().unsqueeze(1)
    found_TA = vendor.lightning_indexer(
        q_TIK.contiguous(),
        held,
        (weights_TI.to(q_TIK.dtype) if narrow else weights_TI.float()).contiguous(),
        on_device(starts[1:], device),
        places,
        count=count,
        pages=table,
    ).squeeze(1)
    ascending_TA = torch.where(found_TA < 0, _NONE, found_TA).sort(-1).values[:, :width]
    return torch.where(ascending_TA == _NONE, -1, ascending_TA).long()


@REGISTRY.register("sparse_attention", BACKEND, supports=supports.sparse_attention)
def sparse_attention(
    q_THK: Tensor,
    starts: tuple[int, ...],
    pasts: tuple[int, ...],
    entries: Rows,
    chosen_TA: Tensor,
    window: Rows | RingRows | None,
    sinks_H: Tensor | None,
    *,
    value_dim: int,
    scale: float,
    rate: int,
    span: int,
) -> Tensor:
    device, (num_tokens, num_chosen) = q_THK.device, chosen_TA.shape
    query, query_rope = parts(q_THK)
    if num_tokens * num_chosen < sum(entries.lengths):
        rows = _taken(entries, starts, chosen_TA)
        chosen = torch.where(chosen_TA < 0, -1, torch.arange(num_chosen, device=device))
        query_ends = on_device(tuple(range(1, num_tokens + 1)), device)
        key_ends = on_device(tuple(range(num_chosen, num_tokens * num_chosen + 1, num_chosen)), device)
    else:
        flat = entries.flatten()
        rows, chosen = flat.rows, chosen_TA
        query_ends, key_ends = on_device(starts[1:], device), on_device(flat.starts[1:], device)
    key, key_rope = parts(rows.unsqueeze(1))
    return vendor.sparse_attention(
        query,
        key,
        chosen.to(torch.int32).unsqueeze(1),
        query_ends,
        key_ends,
        query_rope=query_rope,
        key_rope=key_rope,
        scale=scale,
    )


def _taken(entries: Rows, starts: tuple[int, ...], chosen_TA: Tensor) -> Tensor:
    """[T A, K]: the chosen rows of each token, a sequence's first where there is none."""
    first_TA = chosen_TA.clamp_min(0)
    spans = [(index, slice(*starts[index : index + 2])) for index in range(len(starts) - 1)]
    taken = [entries.take(index, first_TA[span]).flatten(0, 1) for index, span in spans if span.start < span.stop]
    return torch.cat(taken)
