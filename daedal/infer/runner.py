"""Runs the steps of an engine: the model on its cache, and whatever drafts for it beside.

Chunks in, logits out. Knows no requests, no sampling, no text.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daedal import ops
from daedal.infer.cache import PagedCache
from daedal.infer.draft_lookup import LookupDrafter
from daedal.infer.draft_model import ModelDrafter
from daedal.infer.draft_mtp import MtpDrafter
from daedal.infer.feeding import feed
from daedal.infer.following import Leader
from daedal.infer.looking import Look
from daedal.infer.memory import Kept, PagePlan
from daedal.infer.prefixes import Copy
from daedal.infer.recorded import RecordedStep, RecordedSteps
from daedal.infer.sampling import Logits
from daedal.infer.speculative import Drafter, Speculation
from daedal.infer.step import Step

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer


def kept(model: "Transformer", speculate: Speculation | None) -> list[Kept]:
    """Whose rows the cache keeps: the model's, and those of what drafts for it."""
    drafting = speculate is not None and speculate.method == "mtp"
    models = [Kept(config=model.cached_config, dtype=model.dtype, drafting=drafting)]
    if speculate is not None and speculate.draft_model is not None:
        models.append(Kept(config=speculate.draft_model.config, dtype=speculate.draft_model.dtype))
    return models


class Runner:
    """`model` and what drafts for it, each on a cache of the size planned. exact: no row of a step's result depends on
    the other rows.
    """

    def __init__(self, model: "Transformer", plan: PagePlan, speculate: Speculation | None, *, exact: bool = False):
        self._model = model
        self._exact = exact
        self._caches = [
            PagedCache(
                one.config,
                num_pages=plan.num_pages,
                page_size=plan.page_size,
                dtype=one.dtype,
                device=model.device,
                num_states=plan.num_states,
                drafting=one.drafting,
                kv_dtype=plan.kv_dtype,
            )
            for one in kept(model, speculate)
        ]
        self._drafter = None if speculate is None else self._make_drafter(speculate)
        self._leader = None if model.team is None else Leader(model.team, plan)
        self._recorded = RecordedSteps(model, self._caches[0], max_pages=-(-plan.context // plan.page_size))
        self._latest: RecordedStep | None = None  # what was just replayed, if it was

    def _make_drafter(self, speculate: Speculation) -> Drafter:
        if speculate.method == "mtp":
            return MtpDrafter(self._model, self._caches[0])
        if speculate.draft_model is not None:
            return ModelDrafter(speculate.draft_model, self._caches[1])
        return LookupDrafter()

    @property
    def caches(self) -> Sequence[PagedCache]:
        """The model's, and those of what drafts for it."""
        return self._caches

    @property
    def is_shared(self) -> bool:
        """Whether other processes have parts of these caches."""
        return self._leader is not None

    def copy(self, copies: Sequence[Copy]) -> None:
        """In every cache, one after the other; before anything of the step that has them."""
        if not copies:
            return
        with torch.inference_mode():
            for copy in copies:
                for cache in self._caches:
                    cache.copy(copy)

    def propose(self, step: Step) -> Step:
        """The same step with drafts, if anything drafts. Raises ValueError for drafts outside the vocabulary."""
        if self._drafter is None:
            return step
        with torch.inference_mode():
            drafts = self._drafter.propose(step)
        vocab_size = self._model.config.vocab_size
        for token in {token for tokens in drafts.values() for token in tokens}:
            if not 0 <= token < vocab_size:
                raise ValueError(f"the drafter proposed the id {token}: the vocabulary has {vocab_size}")
        return step.with_drafts(drafts)

    def run(self, step: Step, rows: Sequence[int], look: Look | None = None) -> tuple[Logits, Tensor | None]:
        """Logits at some rows of the step's flat batch, and the states for `follow` if that wants them. Raises TeamLost
        where several processes hold the model and the step fails in any of them. look: watches the model.
        """
        with self._led(step, rows):
            return self._run_here(step, rows, look)

    def _led(self, step: Step, rows: Sequence[int]) -> AbstractContextManager[None]:
        return nullcontext() if self._leader is None else self._leader.runs(step, rows)

    def _run_here(self, step: Step, rows: Sequence[int], look: Look | None) -> tuple[Logits, Tensor | None]:
        records = (
            look is None and not isinstance(self._drafter, MtpDrafter) and list(rows) == list(range(len(step.chunks)))
        )
        # Between two replayed steps nothing touches PyTorch, which is slow to call when the caches are cold.
        self._latest = self._recorded.find(step.chunks) if records else None
        if self._latest is not None:
            return self._latest.replay(step.chunks), None
        with torch.inference_mode(), ops.exactly(self._exact):
            if records and (logits := self._recorded.record(step.chunks)) is not None:
                return logits, None
            logits_NV, states = self._run(step, rows, look)
            return Logits(logits_NV), states

    def _run(self, step: Step, rows: Sequence[int], look: Look | None) -> tuple[Tensor, Tensor | None]:
        fed, pasts = [chunk.fed for chunk in step.chunks], [chunk.past for chunk in step.chunks]
        batch, view = feed(self._caches[0], step.chunks, fed, pasts, self._model.device)
        rows_N = torch.tensor(rows, dtype=torch.int64, device=self._model.device)
        if look is None and not isinstance(self._drafter, MtpDrafter):
            return self._model(batch, view, rows=rows_N), None
        states = self._model.states(batch, view, look)
        if look is not None:
            look.ran(step.num_tokens)
        return self._model.head(self._model.finish(states[rows_N])), states

    def again(self, tokens: Sequence[int]) -> Logits | None:
        """Logits after one more token of each sequence of a step of answers that was just run; there is room for it on
        their pages. None where that step cannot be repeated so.
        """
        return None if self._latest is None else self._latest.again(tokens)

    def follow(self, step: Step, states: Tensor | None, chosen: Mapping[str, Sequence[int]]) -> None:
        """After a step and its `states`: what each request that goes on has chosen in it."""
        if isinstance(self._drafter, MtpDrafter):
            assert states is not None
            with torch.inference_mode():
                self._drafter.follow(step, states, chosen)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        if self._drafter is not None:
            self._drafter.forget(request_id)
