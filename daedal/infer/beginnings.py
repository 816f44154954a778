"""What an engine keeps of beginnings, by the sizes of its cache: in memory, and on disk where that is wanted.

Knows no requests.
"""

import math

from daedal.errors import ConfigError
from daedal.infer.memory import PagePlan
from daedal.infer.pages import PageAllocator
from daedal.infer.prefix_files import PrefixDirectory
from daedal.infer.prefix_store import PrefixStore
from daedal.infer.prefixes import Prefixes
from daedal.infer.runner import Runner


def prefixes_for(
    plan: PagePlan, pages: PageAllocator, *, max_batch: int, chunk: int | None, max_drafts: int, keeps: bool
) -> Prefixes:
    """For an engine of these sizes; where its cache has no room for what a beginning needs, nothing is kept."""
    return Prefixes(
        pages,
        page_size=plan.page_size,
        unit=math.lcm(plan.page_size, chunk or 1),
        rings=range(max_batch, plan.num_states) if plan.state_bytes else None,
        max_drafts=max_drafts,
        keeps=keeps and bool(plan.num_kept_states or not plan.state_bytes),
    )


def store_for(
    directory: PrefixDirectory | None, prefixes: Prefixes, plan: PagePlan, pages: PageAllocator, runner: Runner
) -> PrefixStore | None:
    """With what is on disk already loaded; None without a directory. ConfigError where nothing can be kept there."""
    if directory is None:
        return None
    if runner.is_shared:
        raise ConfigError("beginnings cannot be kept on disk where several processes hold the model: leave that out")
    if not prefixes.keeps:
        raise ConfigError("beginnings are to be kept on disk, and this engine keeps none: give it a larger cache")
    store = PrefixStore(directory, prefixes=prefixes, pages=pages, caches=runner.caches, page_size=plan.page_size)
    store.load()
    return store
