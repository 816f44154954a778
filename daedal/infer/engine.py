"""The engine: requests in, tokens out. It joins the scheduler, the paged cache, the model, sampling and stopping.

One step runs one flat batch of prompt chunks and single tokens. An engine belongs to one thread. It knows nothing of
HTTP, chat templates or clocks, and text only through the tokenizer it is given.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daedal.errors import OverloadError, RequestError
from daedal.infer.admission import Limits
from daedal.infer.cache import PagedCache
from daedal.infer.logprobs import token_logprobs
from daedal.infer.memory import keep_freed_memory, plan_pages
from daedal.infer.pages import PageAllocator
from daedal.infer.request import Output, Request, SamplingParams, TokenLogprobs
from daedal.infer.sampling import RowSampler, check_finite, choose
from daedal.infer.scheduler import Chunk, Scheduler, Step
from daedal.infer.stopping import Ending
from daedal.model.batch import RaggedBatch

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer
    from daedal.text.tokenizer import Tokenizer


class StepError(RuntimeError):
    """A step failed for a reason of ours, not the user's. `request_ids`: the requests in it, which are dropped."""

    def __init__(self, message: str, *, request_ids: tuple[str, ...]):
        super().__init__(message)
        self.request_ids = request_ids


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Gauges of now, and counters (`_total`, `num_preemptions`) since the engine was made. Bytes are of the cache.

    prompt_tokens_total counts a prompt when it has been read wholly, and once even if it had to be read again.
    """

    num_running: int
    num_waiting: int
    pages_used: int
    pages_total: int
    kv_bytes_used: int
    kv_bytes_total: int
    num_preemptions: int
    prompt_tokens_total: int
    generation_tokens_total: int


@dataclass(kw_only=True, eq=False)
class _Live:
    """One request from `add` until its last output; prompt_logprobs as far as computed, None if not wanted or given."""

    request: Request
    sampler: RowSampler
    ending: Ending
    prompt_logprobs: list[TokenLogprobs | None] | None
    prompt_is_read: bool = False


@dataclass(kw_only=True)
class _Rows:
    """Which positions of a step's flat batch need logits: for whose prompt entries, and for whose next token.

    prompts: (request, its target ids), in the order of `prompt_rows`; samplers: in the order of `sample_rows`.
    """

    prompts: list[tuple[_Live, tuple[int, ...]]] = field(default_factory=list)
    prompt_rows: list[int] = field(default_factory=list)
    samples: list[_Live] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)


class Engine:
    """Generates for many requests at once.

    tokenizer: gives text, stop strings, and end-of-sequence ids beside the model's own. cache_bytes: size of the cache;
    by default what `max_batch` requests of the whole context need, at most half of the device's free memory.
    max_batch: requests that run together. max_step_tokens: tokens of one step, and so the largest prompt chunk.
    page_size: tokens of a page, by default 16, fewer in a small cache. max_waiting: requests that may queue beyond
    `max_batch`, None for any number. max_context: tokens of prompt and answer together, by default the model's.
    Raises ConfigError for sizes that cannot be.
    """

    def __init__(
        self,
        model: "Transformer",
        *,
        tokenizer: "Tokenizer | None" = None,
        cache_bytes: int | None = None,
        max_batch: int = 16,
        max_step_tokens: int = 512,
        page_size: int | None = None,
        max_waiting: int | None = None,
        max_context: int | None = None,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        plan = plan_pages(
            model.config,
            dtype=model.dtype,
            device=model.device,
            cache_bytes=cache_bytes,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            page_size=page_size,
            max_waiting=max_waiting,
            max_context=max_context,
        )
        if model.device.type == "cpu":
            keep_freed_memory()
        self._pages = PageAllocator(plan.num_pages)
        self._cache = PagedCache(
            model.config, num_pages=plan.num_pages, page_size=plan.page_size, dtype=model.dtype, device=model.device
        )
        self._limits = Limits(
            vocab_size=model.config.vocab_size,
            context=plan.context,
            capacity=plan.num_pages * plan.page_size,
            has_text=tokenizer is not None,
        )
        self._end_ids = model.config.eos_token_ids | (tokenizer.eos_ids if tokenizer is not None else frozenset())
        self._scheduler = Scheduler(
            self._pages, page_size=plan.page_size, max_batch=max_batch, max_step_tokens=max_step_tokens
        )
        self._live: dict[str, _Live] = {}
        self._undelivered: list[Output] = []
        self._prompt_tokens_total = 0
        self._generation_tokens_total = 0

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that one request can reach: the context, or what the cache holds."""
        return self._limits.longest

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to run or to deliver."""
        return bool(self._live or self._undelivered)

    def stats(self) -> EngineStats:
        page_bytes = self._cache.nbytes // self._pages.num_pages
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            pages_used=self._pages.num_used,
            pages_total=self._pages.num_pages,
            kv_bytes_used=self._pages.num_used * page_bytes,
            kv_bytes_total=self._cache.nbytes,
            num_preemptions=self._scheduler.num_preemptions,
            prompt_tokens_total=self._prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
        )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises RequestError if it breaks a rule, CapacityError if the cache could never hold it, OverloadError if
        `max_batch` requests and `max_waiting` more are under way.
        """
        self._limits.check(request)
        if request.id in self._live or any(output.request_id == request.id for output in self._undelivered):
            raise RequestError(f"id {request.id!r} belongs to a request under way: give a new one", param="id")
        self.check_room(1)
        params, length = request.params, len(request.prompt)
        self._live[request.id] = _Live(
            request=request,
            sampler=RowSampler(params, request.prompt, vocab_size=self._limits.vocab_size, device=self._model.device),
            ending=Ending(
                params,
                end_ids=self._end_ids,
                room=self._limits.context - length,
                detokenizer=self._tokenizer.detokenizer() if self._tokenizer is not None else None,
            ),
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
        )
        self._scheduler.add(request.id, request.prompt, generates=params.max_tokens > 0)

    def check_room(self, count: int) -> None:
        """Raises OverloadError if `count` more requests do not fit now, RequestError if they never could together."""
        if self._max_waiting is None:
            return
        most = self._max_batch + self._max_waiting
        if count > most:
            raise RequestError(
                f"{count} answers are asked for at once, at most {most} are taken: ask for fewer", param="n"
            )
        if len(self._live) + count > most:
            raise OverloadError(
                f"{len(self._live)} requests are under way, the limit is {self._max_batch} running and "
                f"{self._max_waiting} waiting: try again later"
            )

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages at once; the next `step` delivers its last output.

        False if there is no such request, which is no error: it may just have finished.
        """
        live = self._live.get(request_id)
        if live is None:
            return False
        self._forget(request_id)
        self._undelivered.append(Output(request_id=request_id, text=live.ending.finish(), finish_reason="cancelled"))
        return True

    def step(self) -> list[Output]:
        """Runs one step; what is new of every request that gained a token or ended.

        Raises StepError if the model or the tokenizer fails, or the logits are not finite. The requests of that step
        are then dropped and their pages freed; all others go on with the next step.
        """
        delivered, self._undelivered = self._undelivered, []
        step = self._scheduler.schedule()
        if not step.chunks:
            return delivered
        try:
            with torch.inference_mode():
                return delivered + self._run(step)
        except Exception as error:
            self._undelivered = delivered
            request_ids = tuple(chunk.request_id for chunk in step.chunks)
            for request_id in request_ids:
                if request_id in self._live:
                    self._forget(request_id)
            message = f"a step with {len(request_ids)} requests failed and they were dropped: {error}"
            raise StepError(message, request_ids=request_ids) from error

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Whole outputs, in the order of the prompts; `params` for all of them, or one per prompt.

        All prompts are checked before the first one runs. They may be more than `max_waiting`. Raises RequestError, and
        StepError as `step` does; then, or when interrupted, none of them stays in the engine.
        """
        requests = _requests(prompts, params)
        for request in requests:
            self._limits.check(request)
        if self.has_work:
            raise RequestError("the engine has requests under way: step until they end, then call generate")
        outputs = {request.id: Output(request_id=request.id) for request in requests}
        queue = iter(requests)
        try:
            for request in queue:
                # A second batch in waiting keeps the first one full; more would only hold their sampling state.
                while len(self._live) >= 2 * self._max_batch or not self._has_room:
                    self._collect(outputs)
                self.add(request)
            while self.has_work:
                self._collect(outputs)
        finally:
            for request_id in tuple(self._live):
                self._forget(request_id)
            self._undelivered = []
        return list(outputs.values())

    @property
    def _has_room(self) -> bool:
        return self._max_waiting is None or len(self._live) < self._max_batch + self._max_waiting

    def _collect(self, outputs: dict[str, Output]) -> None:
        for output in self.step():
            outputs[output.request_id].extend(output)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self._scheduler.remove(request_id)

    def _run(self, step: Step) -> list[Output]:
        chunks = step.chunks
        batch = RaggedBatch.of(
            [chunk.ids for chunk in chunks], [chunk.past for chunk in chunks], device=self._model.device
        )
        view = self._cache.view([chunk.table for chunk in chunks], batch.pasts, batch.counts)
        rows = self._rows(step)
        rows_N = torch.tensor(rows.prompt_rows + rows.sample_rows, dtype=torch.int64, device=self._model.device)
        logits_NV: Tensor = self._model(batch, view, rows=rows_N)
        check_finite(logits_NV)
        num_prompt_rows = len(rows.prompt_rows)
        self._score_prompts(rows, logits_NV[:num_prompt_rows])
        next_NV = logits_NV[num_prompt_rows:]
        tokens = choose(next_NV, [live.sampler for live in rows.samples])
        entries = _chosen_logprobs(next_NV, rows.samples, tokens)
        sampled = {live.request.id: token for live, token in zip(rows.samples, tokens, strict=True)}
        self._scheduler.commit(step, sampled)
        self._generation_tokens_total += len(sampled)
        outputs = [self._output(self._live[chunk.request_id], chunk, sampled, entries) for chunk in chunks]
        return [output for output in outputs if output is not None]

    def _rows(self, step: Step) -> _Rows:
        rows = _Rows()
        start = 0
        for chunk in step.chunks:
            live = self._live[chunk.request_id]
            if live.prompt_logprobs is not None:
                prompt = live.request.prompt
                # A prompt that is read again after a preemption keeps the entries that it has.
                first = max(chunk.past, len(live.prompt_logprobs) - 1)
                end = min(chunk.past + len(chunk.ids), len(prompt) - 1)
                if first < end:
                    rows.prompts.append((live, prompt[first + 1 : end + 1]))
                    rows.prompt_rows.extend(range(start + first - chunk.past, start + end - chunk.past))
            start += len(chunk.ids)
            if chunk.samples:
                rows.samples.append(live)
                rows.sample_rows.append(start - 1)
        return rows

    def _score_prompts(self, rows: _Rows, logits_NV: Tensor) -> None:
        targets = list(itertools.chain.from_iterable(ids for _, ids in rows.prompts))
        tops = [live.request.params.prompt_logprobs or 0 for live, ids in rows.prompts for _ in ids]
        entries = iter(token_logprobs(logits_NV, targets, tops))
        for live, ids in rows.prompts:
            assert live.prompt_logprobs is not None
            live.prompt_logprobs.extend(itertools.islice(entries, len(ids)))

    def _output(
        self, live: _Live, chunk: Chunk, sampled: dict[str, int], entries: dict[str, TokenLogprobs]
    ) -> Output | None:
        """What this step brought `live`; None while its prompt is being read."""
        request = live.request
        if chunk.past + len(chunk.ids) < len(request.prompt) or not (chunk.samples or request.params.max_tokens == 0):
            return None
        if not live.prompt_is_read:
            live.prompt_is_read = True
            self._prompt_tokens_total += len(request.prompt)
        output = Output(request_id=request.id)
        output.prompt_logprobs, live.prompt_logprobs = live.prompt_logprobs, None
        if chunk.samples:
            token = sampled[request.id]
            output.ids = [token]
            output.text, output.finish_reason = live.ending.push(token)
        else:
            output.text, output.finish_reason = live.ending.finish(), "length"
        if request.params.logprobs is not None:
            output.logprobs = [entries[request.id]] if chunk.samples else []
        if output.finish_reason is not None:
            self._forget(request.id)
        return output


def _requests(
    prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[Request]:
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(
            f"params has {len(params)} entries for {len(prompts)} prompts: give one for each, or one for all",
            param="params",
        )
    requests = []
    for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        # What is no sequence at all goes on as it is, for Request to refuse.
        ids = tuple(prompt) if isinstance(prompt, Sequence) else prompt
        requests.append(Request(id=str(index), prompt=ids, params=chosen))
    return requests


def _chosen_logprobs(logits_NV: Tensor, lives: Sequence[_Live], tokens: Sequence[int]) -> dict[str, TokenLogprobs]:
    """By request id, for the requests that asked for them."""
    rows = [row for row, live in enumerate(lives) if live.request.params.logprobs is not None]
    if not rows:
        return {}
    tops = [lives[row].request.params.logprobs or 0 for row in rows]
    entries = token_logprobs(logits_NV[rows], [tokens[row] for row in rows], tops)
    return {lives[row].request.id: entry for row, entry in zip(rows, entries, strict=True)}
