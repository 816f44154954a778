"""The steps of a model that several ranks hold: rank 0 has the engine and says what it runs, the others run the same.

A step is told as a list of numbers: which pages to copy first, and of each chunk its tokens, its past, its pages and
its ring. Requests, sampling, text and drafts that a model makes stay with rank 0. All ranks keep a cache of the same
pages; each keeps there what its part of the model stores (`Shard`). Knows no requests and nothing of how processes are
started.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch

from daedal.errors import ConfigError
from daedal.infer.cache import KvDtype, PagedCache
from daedal.infer.feeding import feed
from daedal.infer.memory import PagePlan
from daedal.infer.prefixes import Copy
from daedal.infer.step import Chunk, Step
from daedal.mesh import Team, TeamLost
from daedal.model.shard import Shard

_OPEN, _STEP, _END = range(3)  # how a message begins
_KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)


class Leader:
    """Rank 0's side, for one engine. plan: of the cache that every rank is to have."""

    def __init__(self, team: Team, plan: PagePlan):
        if team.rank:
            raise ConfigError(
                f"this is rank {team.rank} of a model's processes, an engine belongs to rank 0: follow it"
            )
        self._team = team
        team.tell([_OPEN, plan.num_pages, plan.page_size, plan.num_states, _KV_DTYPES.index(plan.kv_dtype)])

    @contextmanager
    def runs(self, step: Step, rows: Sequence[int]) -> Iterator[None]:
        """Around rank 0's own run of a step. Raises TeamLost for whatever happens inside: where one rank ends before
        the others, none knows what the next number belongs to.
        """
        try:
            self._team.tell([_STEP, *_numbers(step, rows)])
            yield
        except Exception as error:
            raise TeamLost(f"a step failed on rank 0 of the model's {self._team.size} processes: {error}") from error


def follow(model: Shard) -> None:
    """What every other rank does: runs what rank 0 runs, until it is dismissed. TeamLost where rank 0 has gone."""
    team, cache = model.team, None
    try:
        while (heard := team.told())[0] != _END:
            if heard[0] == _OPEN:
                cache = _cache(model, *heard[1:])
                continue
            assert cache is not None, "a step was told before its cache"
            step, rows = _heard(heard[1:])
            with torch.inference_mode():
                _run(model, cache, step, rows)
    except RuntimeError as error:
        raise TeamLost(f"rank {team.rank} of {team.size} cannot go on: {error}") from error


def dismiss(team: Team) -> None:
    """Rank 0's last word: the others need not follow any more."""
    team.tell([_END])


def _run(model: Shard, cache: PagedCache, step: Step, rows: Sequence[int]) -> None:
    for copy in step.copies:
        cache.copy(copy)
    fed, pasts = [chunk.fed for chunk in step.chunks], [chunk.past for chunk in step.chunks]
    batch, view = feed(cache, step.chunks, fed, pasts, model.device)
    model(batch, view, rows=torch.tensor(rows, dtype=torch.int64, device=model.device))


def _cache(model: Shard, num_pages: int, page_size: int, num_states: int, kv_dtype: int) -> PagedCache:
    return PagedCache(
        model.cached_config,
        num_pages=num_pages,
        page_size=page_size,
        dtype=model.dtype,
        device=model.device,
        num_states=num_states,
        kv_dtype=_KV_DTYPES[kv_dtype],
    )


def _numbers(step: Step, rows: Sequence[int]) -> list[int]:
    """What the other ranks need of a step. Lists go with their lengths first."""
    numbers = [len(step.copies), len(step.chunks)]
    for copy in step.copies:
        numbers += _listed(copy.sources) + _listed(copy.targets) + _listed(copy.ring or ())
    for chunk in step.chunks:
        numbers += [chunk.past, chunk.state, *_listed(chunk.fed), *_listed(chunk.table)]
    return numbers + _listed(rows)


def _heard(numbers: Sequence[int]) -> tuple[Step, list[int]]:
    """The same step, of requests without a name."""
    rest = iter(numbers)

    def some() -> tuple[int, ...]:
        return tuple(next(rest) for _ in range(next(rest)))

    num_copies, num_chunks = next(rest), next(rest)
    copies = [Copy(sources=some(), targets=some(), ring=_ring(some())) for _ in range(num_copies)]
    chunks = []
    for _ in range(num_chunks):
        past, state = next(rest), next(rest)
        fed, table = some(), some()
        chunks.append(Chunk(request_id="", ids=fed, past=past, table=table, state=state, samples=False))
    return Step(chunks=tuple(chunks), copies=tuple(copies)), list(some())


def _ring(pair: tuple[int, ...]) -> tuple[int, int] | None:
    return (pair[0], pair[1]) if pair else None


def _listed(numbers: Sequence[int]) -> list[int]:
    return [len(numbers), *numbers]
