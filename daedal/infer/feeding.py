"""From chunks of a step to what one forward pass is given. Knows no model and no sampling."""

from collections.abc import Sequence

import torch

from daedal.infer.cache import PagedCache, PagedView
from daedal.infer.step import Chunk
from daedal.model.batch import RaggedBatch


def feed(
    cache: PagedCache,
    chunks: Sequence[Chunk],
    tokens: Sequence[Sequence[int]],
    pasts: Sequence[int],
    device: torch.device,
) -> tuple[RaggedBatch, PagedView]:
    """For each chunk's sequence `tokens[i]` after its first `pasts[i]`, and the cache where their rows lie."""
    batch = RaggedBatch.of(tokens, pasts, device=device)
    view = cache.view([chunk.table for chunk in chunks], batch.pasts, batch.counts, [chunk.state for chunk in chunks])
    return batch, view
