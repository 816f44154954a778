"""Causal attention of a ragged batch on the vendor's fused op, heads of their own or latent rows.

Grouped heads are read on their pages as they lie. Latent rows are not: the op wants their two parts in tensors of their
own, where a cache keeps both in one row, so rows are copied first (docs/silicon.md says what that costs).
"""

from torch import Tensor

from daedal.ops.backends.npu import supports, vendor
from daedal.ops.backends.npu.places import causal_mask
from daedal.ops.backends.npu.supports import BACKEND, LATENT
from daedal.ops.registry import REGISTRY
from daedal.ops.rows import PagedRows, Rows, page_table


@REGISTRY.register("attention", BACKEND, supports=supports.attention)
def attention(q_THK: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, *, scale: float) -> Tensor:
    mask, ends = causal_mask(q_THK.device), starts[1:]
    if isinstance(values, int):
        flat = keys.flatten()
        query, query_rope = parts(q_THK)
        key, key_rope = parts(flat.rows.unsqueeze(1))
        return vendor.attention(
            query, key, key, mask, ends, flat.starts[1:], scale=scale, key_heads=1, query_rope=query_rope,
            key_rope=key_rope,
        )  # fmt: skip
    heads = supports.memory(keys).shape[-2]
    query = q_THK.contiguous()
    if isinstance(keys, PagedRows):
        assert isinstance(values, PagedRows)
        key, value = (rows.pool.flatten(2) for rows in (keys, values))
        table, size = page_table(keys.pages, q_THK.device), keys.pages.page_size
        return vendor.attention(
            query, key, value, mask, ends, keys.lengths, scale=scale, key_heads=heads, pages=table, page_size=size
        )
    flat, values = keys.flatten(), values.flatten()
    key, value = flat.rows.contiguous(), values.rows.contiguous()
    return vendor.attention(query, key, value, mask, ends, flat.starts[1:], scale=scale, key_heads=heads)


def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of what is not rotated of latent rows, and of what is."""
    plain, rotated = rows.split((LATENT, rows.shape[-1] - LATENT), -1)
    return plain.contiguous(), rotated.contiguous()
