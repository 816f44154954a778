"""Requests under way: what the engine keeps of each beside its tokens, which logits it needs, and what it gives out.

Knows no model, no cache and no other requests' affairs.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from daedal.infer.logprobs import token_logprobs
from daedal.infer.request import Output, Request, TokenLogprobs
from daedal.infer.sampling import RowSampler
from daedal.infer.step import Chunk, Step
from daedal.infer.stopping import Ending


@dataclass(kw_only=True, eq=False)
class Live:
    """One request from `add` until its last output; prompt_logprobs as far as computed, None if not wanted or given.
    came: when, in seconds; waited: until it first started.
    """

    request: Request
    sampler: RowSampler
    ending: Ending
    prompt_logprobs: list[TokenLogprobs | None] | None
    came: float = 0.0
    waited: float | None = None
    prompt_is_read: bool = False

    @property
    def needs_no_look(self) -> bool:
        """Whether nothing but its next token is wanted from logits, and that may be any."""
        params = self.request.params
        return params.logprobs is None and params.prompt_logprobs is None and not self.sampler.has_mask

    def unscored(self, chunk: Chunk) -> range:
        """Positions of the prompt in `chunk` whose next token's log-probability is wanted and not known.

        A prompt that is read again after a preemption keeps the entries that it has.
        """
        if self.prompt_logprobs is None:
            return range(0)
        return range(max(chunk.past, len(self.prompt_logprobs) - 1), min(chunk.end, len(self.request.prompt) - 1))

    def take(self, chunk: Chunk, chosen: Sequence[int], entries: Sequence[TokenLogprobs]) -> Output | None:
        """What a step brought: of the tokens `chosen` those up to the end of the answer. None while the prompt is being
        read.
        """
        params = self.request.params
        if chunk.end < len(self.request.prompt) or not (chunk.samples or params.max_tokens == 0):
            return None
        output = Output(request_id=self.request.id)
        output.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        if not chunk.samples:
            output.text, output.finish_reason = self.ending.finish(), "length"
        for token in chosen:
            output.ids.append(token)
            text, output.finish_reason = self.ending.push(token)
            output.lengths.append(len(text or ""))
            if text is not None:
                output.text = (output.text or "") + text
            if output.finish_reason is not None:
                output.stop = self.ending.stop_string
                if self.sampler.lost_its_mask:
                    output.finish_reason = "length"
                break
        if params.logprobs is not None:
            output.logprobs = list(entries[: len(output.ids)])
        return output


@dataclass(kw_only=True)
class Rows:
    """Which positions of a step's flat batch need logits: for whose prompt entries, and for whose next tokens.

    prompts: (request, its target ids), in the order of `prompt_rows`; samples: (request, its drafts), in the order of
    `sample_rows`, where each has one row and one more for each draft.
    """

    prompts: list[tuple[Live, tuple[int, ...]]] = field(default_factory=list)
    prompt_rows: list[int] = field(default_factory=list)
    samples: list[tuple[Live, tuple[int, ...]]] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, step: Step, lives: Mapping[str, Live]) -> "Rows":
        rows = cls()
        start = 0
        for chunk in step.chunks:
            live = lives[chunk.request_id]
            unscored = live.unscored(chunk)
            if unscored:
                rows.prompts.append((live, live.request.prompt[unscored.start + 1 : unscored.stop + 1]))
                rows.prompt_rows.extend(position - chunk.past + start for position in unscored)
            end = start + len(chunk.fed)
            if chunk.samples:
                rows.samples.append((live, chunk.drafts))
                rows.sample_rows.extend(range(start + len(chunk.ids) - 1, end))
            start = end
        return rows

    def counts(self) -> dict[str, int]:
        """Rows of logits of each request that has any."""
        found = {live.request.id: len(drafts) + 1 for live, drafts in self.samples}
        for live, targets in self.prompts:
            found[live.request.id] = found.get(live.request.id, 0) + len(targets)
        return found

    def score_prompts(self, logits_NV: Tensor) -> None:
        """Gives each request its prompt entries; logits of `prompt_rows`."""
        targets = list(itertools.chain.from_iterable(ids for _, ids in self.prompts))
        tops = [live.request.params.prompt_logprobs or 0 for live, ids in self.prompts for _ in ids]
        entries = iter(token_logprobs(logits_NV, targets, tops))
        for live, ids in self.prompts:
            assert live.prompt_logprobs is not None
            live.prompt_logprobs.extend(itertools.islice(entries, len(ids)))

    def score_chosen(self, logits_NV: Tensor, chosen: Sequence[Sequence[int]]) -> dict[str, list[TokenLogprobs]]:
        """Entries of the tokens chosen, by request id, for those who asked; logits of `sample_rows`."""
        places: list[int] = []
        tokens: list[int] = []
        tops: list[int] = []
        first = 0
        for (live, drafts), ids in zip(self.samples, chosen, strict=True):
            if live.request.params.logprobs is not None:
                places.extend(range(first, first + len(ids)))
                tokens.extend(ids)
                tops.extend([live.request.params.logprobs] * len(ids))
            first += len(drafts) + 1
        if not places:
            return {}
        entries = iter(token_logprobs(logits_NV[places], tokens, tops))
        return {
            live.request.id: list(itertools.islice(entries, len(ids)))
            for (live, _), ids in zip(self.samples, chosen, strict=True)
            if live.request.params.logprobs is not None
        }
