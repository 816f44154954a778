"""Sequences fed to a model step by step, over a cache as unfriendly as serving may make it.

Every pool is NaN before the first token; pages lie scattered, rings are given out in another order than sequences.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from daedal import shapes
from daedal.infer.cache import KvDtype, PagedCache, PagedView, page_multiple
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer

Pieces = Mapping[int, Sequence[int]]


class Feeder:
    """Sequences of at most `lengths` tokens. `pasts` says how many each has; set it lower to withdraw the rest."""

    def __init__(
        self, model: Transformer, lengths: Sequence[int], *, drafting: bool = False, kv_dtype: KvDtype = "auto"
    ):
        self.model = model
        self.pasts = [0] * len(lengths)
        multiple = page_multiple(model.config)
        page = multiple if multiple > 4 else 4 * multiple
        counts = [-(-length // page) for length in lengths]
        generator = torch.Generator().manual_seed(len(lengths))
        self._free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        self._tables = [tuple(self._free.pop() for _ in range(count)) for count in counts]
        self._states = torch.randperm(len(lengths) + 1, generator=generator).tolist()
        self.cache = PagedCache(
            model.config,
            num_pages=sum(counts) + 3,
            page_size=page,
            dtype=model.dtype,
            num_states=len(lengths) + 1,
            drafting=drafting,
            kv_dtype=kv_dtype,
        )
        for pools in self.cache.pools.values():
            for pool in pools.values():
                pool.fill_(255 if pool.dtype == torch.uint8 else torch.nan)

    def feed(self, pieces: Pieces) -> dict[int, Tensor]:
        """Logits of each sequence's new tokens; all in one step."""
        return self.step(pieces, self.model)

    @torch.no_grad()
    def step(self, pieces: Pieces, run: Callable[[RaggedBatch, PagedView], Tensor]) -> dict[int, Tensor]:
        """What `run` gives for each sequence's new tokens, which then count as fed."""
        names = list(pieces)
        pasts, counts = [self.pasts[name] for name in names], [len(pieces[name]) for name in names]
        tables, states = [self._tables[name] for name in names], [self._states[name] for name in names]
        batch = RaggedBatch.of([pieces[name] for name in names], pasts)
        result = run(batch, self.cache.view(tables, pasts, counts, states))
        for name, count in zip(names, counts, strict=True):
            self.pasts[name] += count
        return dict(zip(names, result.split(counts), strict=True))

    def assert_nothing_else_was_touched(self) -> None:
        """Pages and rings that belong to no sequence are still poisoned."""
        for slot in shapes.cache(self.model.config):
            assert slot.layer is not None
            spare = self._states[len(self.pasts) :] if slot.ring else self._free
            assert bool(self.cache.pools[slot.layer][slot.name][spare].isnan().all()), slot


def in_chunks(feeder: Feeder, sequences: Sequence[Sequence[int]], chunks: Sequence[Iterable[int]]) -> list[Tensor]:
    """Logits of whole sequences, each fed in chunks of its own sizes; those not done yet share each step."""
    parts: list[list[Tensor]] = [[] for _ in sequences]
    sizes = [iter(chunk) for chunk in chunks]
    while pieces := _next(feeder, sequences, sizes):
        for name, logits_TV in feeder.feed(pieces).items():
            parts[name].append(logits_TV)
    return [torch.cat(part) for part in parts]


def _next(feeder: Feeder, sequences: Sequence[Sequence[int]], sizes: list) -> dict[int, Sequence[int]]:
    starts = dict(enumerate(feeder.pasts))
    live = {name: past for name, past in starts.items() if past < len(sequences[name])}
    # The later ones first, so that their places change as others end.
    return {name: sequences[name][past : past + next(sizes[name])] for name, past in reversed(live.items())}
