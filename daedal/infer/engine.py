"""The engine: requests in, tokens out. It joins the scheduler, the runner of the model, sampling and stopping.

One step runs one flat batch of prompt chunks, single tokens and drafts. An engine belongs to one thread. It knows
nothing of HTTP and chat templates, and text only through the tokenizer it is given.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from daedal.cost.spending import Tariff
from daedal.errors import RequestError
from daedal.infer.admission import Admission, Limits
from daedal.infer.beginnings import prefixes_for, store_for
from daedal.infer.cache import KvDtype
from daedal.infer.deterministic import piece
from daedal.infer.forecast import Answers, Forecast
from daedal.infer.live import Live, Rows
from daedal.infer.looking import Look
from daedal.infer.memory import keep_freed_memory, plan_pages
from daedal.infer.metering import Meter
from daedal.infer.pace import Pace
from daedal.infer.pages import PageAllocator
from daedal.infer.prefix_files import PrefixDirectory
from daedal.infer.request import Mask, Output, Request, SamplingParams, requests_of
from daedal.infer.runner import Runner, kept
from daedal.infer.sampling import Logits, RowSampler, check_finite, verify
from daedal.infer.scheduler import Scheduler
from daedal.infer.speculative import Acceptance, Speculation
from daedal.infer.stats import EngineStats, ExpertsSeen, StepError
from daedal.infer.step import Chunk, Step
from daedal.infer.stopping import Ending
from daedal.infer.stride import USUAL_MS, Stride

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer
    from daedal.text.decoding import Detokenizer
    from daedal.text.tokenizer import Tokenizer


class Engine:
    """Generates for many requests at once.

    tokenizer: gives text, stop strings, and end-of-sequence ids beside the model's own. cache_bytes: size of the cache;
    by default what `max_batch` requests of the whole context need, at most half of the device's free memory.
    max_batch: requests that run together. max_step_tokens: tokens of one step, and so the largest prompt chunk.
    page_size: tokens of a page, by default 16, fewer in a small cache, 128 in V4. max_waiting: requests that may queue
    beyond `max_batch`, None for any number. max_context: tokens of prompt and answer together, by default the model's.
    speculate: who drafts tokens for the model to check several at once; answers stay the same. deterministic: the
    numbers of a request are the same, bit for bit, for any number of threads and whatever runs beside it; prompts are
    then read slower, in chunks of `max_step_tokens - max_batch` tokens, and a request waits until the cache has room
    for all of it. prefill_ms: how long a step may take that reads prompts beside answers under way: the engine learns
    from its steps how many tokens that is; None for no bound, and no effect on a deterministic engine. clock: gives
    seconds. stride_ms: a step of nothing but answers, beside which no request waits, may bring several tokens of each
    as long as it takes no longer; the tokens are the same. None for one token a step.
    kv_cache_dtype: "auto" keeps rows of the past in the model's dtype, "fp8" packs what latent attention
    keeps in 8 bits, its rotated part in bfloat16: 56 % of the bytes, and answers that differ a little. prefix_caching:
    a request starts behind the longest beginning, in whole pages, that an earlier one had too and the cache still
    holds; answers stay the same, and room for other requests too. prefix_directory: where such beginnings outlive the
    engine; `close` waits for those that are not written yet. tariff: by which every request's cost is counted,
    which its last output then has.
    Raises ConfigError for sizes that cannot be, for a drafter that cannot draft for this model, and for "fp8" without
    latent attention.
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
        speculate: Speculation | None = None,
        deterministic: bool = False,
        prefill_ms: float | None = None,
        stride_ms: float | None = USUAL_MS,
        clock: Callable[[], float] = time.perf_counter,
        kv_cache_dtype: KvDtype = "auto",
        prefix_caching: bool = True,
        prefix_directory: PrefixDirectory | None = None,
        tariff: Tariff | None = None,
    ):
        self._model, self._tokenizer, self._max_batch = model, tokenizer, max_batch
        plan = plan_pages(
            kept(model, speculate),
            device=model.device,
            cache_bytes=cache_bytes,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            page_size=page_size,
            max_waiting=max_waiting,
            max_context=max_context,
            kv_dtype=kv_cache_dtype,
            keeps_prefixes=prefix_caching,
        )
        if speculate is not None:
            speculate.check(model, plan.context)
        chunk = piece(model, speculate, max_batch, max_step_tokens) if deterministic else None
        if model.device.type == "cpu":
            keep_freed_memory()
        self._plan, self._pages = plan, PageAllocator(plan.num_pages)
        self._runner = Runner(model, plan, speculate, exact=deterministic)
        self._limits = self._make_limits()
        self._end_ids = model.config.eos_token_ids | (tokenizer.eos_ids if tokenizer is not None else frozenset())
        max_drafts = 0 if speculate is None else speculate.draft_tokens
        self._answers, self._acceptance = Answers(), Acceptance(accepted_at=[0] * max_drafts)
        self._prefixes = prefixes_for(
            plan, self._pages, max_batch=max_batch, chunk=chunk, max_drafts=max_drafts, keeps=prefix_caching
        )
        self._store = store_for(prefix_directory, self._prefixes, plan, self._pages, self._runner)
        self._scheduler = self._make_scheduler(max_step_tokens, max_drafts, chunk)
        self._clock, self._pace = clock, Pace.within(prefill_ms, most=max_step_tokens)
        self._stride = Stride.within(stride_ms)
        self._forecast = Forecast(self._answers)
        self._admission = Admission(max_batch, max_waiting, self._scheduler, self._prefixes, self._forecast, clock)
        self._meter = None if tariff is None else Meter(model.config, tariff, speculate, clock=clock)
        self._look: Look | None = None
        self._live: dict[str, Live] = {}
        self._undelivered: list[Output] = []
        self._prompt_tokens_total = self._generation_tokens_total = 0

    def _make_limits(self) -> Limits:
        return Limits(
            vocab_size=self._model.config.vocab_size,
            context=self._plan.context,
            capacity=self._plan.num_pages * self._plan.page_size,
            has_text=self._tokenizer is not None,
            held_bytes=self._plan.request_bytes,
        )

    def _make_scheduler(self, max_step_tokens: int, max_drafts: int, chunk: int | None) -> Scheduler:
        return Scheduler(
            self._pages,
            page_size=self._plan.page_size,
            max_batch=self._max_batch,
            max_step_tokens=max_step_tokens,
            max_drafts=max_drafts,
            chunk=chunk,
            prefixes=self._prefixes,
            answers=self._answers,
        )

    def close(self) -> None:
        """Ends what the engine does beside its steps; what is to outlive it is on disk then."""
        if self._store is not None:
            self._store.close()

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that one request can reach: the context, or what the cache holds."""
        return self._limits.longest

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to run or to deliver."""
        return bool(self._live or self._undelivered)

    def stats(self) -> EngineStats:
        num_running, pages_used = self._scheduler.num_running, self._pages.num_used
        return EngineStats(
            num_running=num_running,
            num_waiting=self._scheduler.num_waiting,
            pages_used=pages_used,
            pages_total=self._pages.num_pages,
            kv_bytes_used=self._plan.held_bytes(pages_used, sequences=num_running),
            kv_bytes_total=self._plan.nbytes,
            num_preemptions=self._scheduler.num_preemptions,
            prompt_tokens_total=self._prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
            num_drafts_total=self._acceptance.num_drafts,
            num_drafted_total=self._acceptance.num_drafted,
            num_accepted_total=sum(self._acceptance.accepted_at),
            num_accepted_at=tuple(self._acceptance.accepted_at),
            spent_total=None if self._meter is None else self._meter.total,
            prefix_queries_total=self._prefixes.num_queried,
            prefix_hits_total=self._prefixes.num_hit,
        )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises RequestError if it breaks a rule, CapacityError if the cache could never hold it, OverloadError if
        `max_batch` requests and `max_waiting` more are under way, DeadlineError if it cannot be answered in its time.
        """
        self._limits.check(request)
        if request.id in self._live or any(output.request_id == request.id for output in self._undelivered):
            raise RequestError(f"id {request.id!r} belongs to a request under way: give a new one", param="id")
        self.check_room(1)
        self._admission.check_time(request)
        params, length = request.params, len(request.prompt)
        self._live[request.id] = Live(
            request=request,
            sampler=RowSampler(
                params,
                request.prompt,
                vocab_size=self._limits.vocab_size,
                device=self._model.device,
                mask=self._mask(request),
            ),
            ending=Ending(
                params,
                end_ids=self._end_ids,
                room=self._limits.context - length,
                detokenizer=self._detokenizer(params),
            ),
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
            came=self._clock(),
        )
        self._scheduler.add(
            request.id,
            request.prompt,
            max_answer=min(params.max_tokens, self._limits.context - length),
            salt=request.cache_salt,
            reuses=params.prompt_logprobs is None,  # which need every position computed
            priority=request.priority,
        )

    def heed(self, beckons: Callable[[], bool]) -> None:
        """A step of several passes ends after the one under way once `beckons`, asked in this thread, says so."""
        self._stride.beckons = beckons

    def look(self) -> None:
        """Watches which experts the next steps choose; `seen` has it once they ran."""
        if self._look is None:
            self._look = Look(self._model.config)

    def seen(self) -> ExpertsSeen | None:
        """What was to be watched, given once; None before."""
        if self._look is None or not self._look.over:
            return None
        look, self._look = self._look, None
        return look.seen()

    def forget_prefixes(self) -> None:
        """No request starts behind what was read until now, and nothing more is kept on disk; for who changes the
        model's weights under the engine.
        """
        self._prefixes.forget()
        self.close()

    def _detokenizer(self, params: SamplingParams) -> "Detokenizer | None":
        if self._tokenizer is None:
            return None
        return self._tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)

    def _mask(self, request: Request) -> Mask | None:
        if request.structure is None:
            return None
        if not self._end_ids:
            raise RequestError("the answer has a form that ends, and the model has no end-of-sequence id: leave it out")
        return request.structure.begin(vocab_size=self._limits.vocab_size, end_ids=frozenset(self._end_ids))

    def check_room(self, count: int) -> None:
        """Raises OverloadError if `count` more requests do not fit now, RequestError if they never could together."""
        self._admission.check_room(count, len(self._live))

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages at once; the next `step` delivers its last output.

        False if there is no such request, which is no error: it may just have finished.
        """
        live = self._live.get(request_id)
        if live is None:
            return False
        spent = None if self._meter is None else self._meter.spent(request_id)
        self._forget(request_id)
        text = live.ending.finish()
        self._undelivered.append(Output(request_id=request_id, text=text, finish_reason="cancelled", spent=spent))
        return True

    def step(self) -> list[Output]:
        """Runs one step; what is new of every request that gained a token or ended.

        Raises StepError if the model or the tokenizer fails, or the logits are not finite. The requests of that step
        are then dropped and their pages freed; all others go on with the next step.
        """
        delivered, self._undelivered = self._undelivered, []
        step = self._scheduler.schedule(None if self._pace is None else self._pace.budget, self._stride.more)
        start = self._clock()
        for request_id in step.started:
            live = self._live[request_id]
            live.waited = start - live.came if live.waited is None else live.waited
        if not step.chunks:
            return delivered
        try:
            outputs, passes = self._run(step)
        except BaseException as error:
            self._prefixes.forget()  # nobody knows how far the step came
            if not isinstance(error, Exception):
                raise
            self._undelivered = delivered
            request_ids = tuple(chunk.request_id for chunk in step.chunks)
            for request_id in request_ids:
                if request_id in self._live:
                    self._forget(request_id)
            message = f"a step with {len(request_ids)} requests failed and they were dropped: {error}"
            raise StepError(message, request_ids=request_ids) from error
        self._timed(step, passes, start, self._clock())
        return delivered + outputs

    def _timed(self, step: Step, passes: int, start: float, now: float) -> None:
        num_tokens = step.num_prompt_tokens
        self._forecast.took(num_tokens, (now - start) / passes, now)
        if not num_tokens:
            self._stride.took(passes, now - start)
        elif self._pace is not None:
            self._pace.took(num_tokens, now - start)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Whole outputs, in the order of the prompts; `params` for all of them, or one per prompt.

        All prompts are checked before the first one runs. They may be more than `max_waiting`. Raises RequestError, and
        StepError as `step` does; then, or when interrupted, none of them stays in the engine.
        """
        requests = requests_of(prompts, params)
        for request in requests:
            self._limits.check(request)
        if self.has_work:
            raise RequestError("the engine has requests under way: step until they end, then call generate")
        outputs = {request.id: Output(request_id=request.id) for request in requests}
        queue = iter(requests)
        try:
            for request in queue:
                # A second batch in waiting keeps the first one full; more would only hold their sampling state.
                while len(self._live) >= 2 * self._max_batch or not self._admission.has_room(len(self._live)):
                    self._collect(outputs)
                self.add(request)
            while self.has_work:
                self._collect(outputs)
        finally:
            for request_id in tuple(self._live):
                self._forget(request_id)
            self._undelivered = []
        return list(outputs.values())

    def _collect(self, outputs: dict[str, Output]) -> None:
        for output in self.step():
            outputs[output.request_id].extend(output)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self._scheduler.remove(request_id)
        self._runner.forget(request_id)
        if self._meter is not None:
            self._meter.forget(request_id)

    def _run(self, step: Step) -> tuple[list[Output], int]:
        """What is new, and how many passes of the model brought it."""
        if self._meter is not None:
            self._meter.begin()
        self._runner.copy(step.copies)
        step = self._runner.propose(step)
        rows = Rows.of(step, self._live)
        logits, states = self._runner.run(step, rows.prompt_rows + rows.sample_rows, self._look)
        if rows.prompt_rows:
            prompts, logits = map(Logits, logits.tensor.tensor_split([len(rows.prompt_rows)]))
            check_finite(prompts)
            rows.score_prompts(prompts.tensor)
        chosen = verify(logits, [live.sampler for live, _ in rows.samples], [ids for _, ids in rows.samples])
        passes = 1 + self._stride.go_on(self._runner, step.more, [live for live, _ in rows.samples], chosen)
        entries = rows.score_chosen(logits.tensor, chosen)
        by_id = {live.request.id: ids for (live, _), ids in zip(rows.samples, chosen, strict=True)}
        outputs = []
        for chunk in step.chunks:
            name = chunk.request_id
            output = self._live[name].take(chunk, by_id.get(name, ()), entries.get(name, ()))
            if output is not None:
                outputs.append(output)
                self._count(chunk, output)
        self._scheduler.commit(step, {output.request_id: output.ids for output in outputs})
        going_on = {output.request_id: output.ids for output in outputs if output.finish_reason is None}
        self._runner.follow(step, states, going_on)
        if self._meter is not None:
            held = {name: self._plan.held_bytes(pages) for name, pages in self._scheduler.held().items()}
            self._meter.ran(step, rows.counts(), held, more=passes - 1)
        for output in outputs:
            if output.finish_reason is not None:
                output.spent = None if self._meter is None else self._meter.spent(output.request_id)
                self._answers.ended(self._scheduler.num_answered(output.request_id))
                if self._store is not None:
                    self._store.keep(*self._scheduler.beginning(output.request_id))
                self._forget(output.request_id)
        return outputs, passes

    def _count(self, chunk: Chunk, output: Output) -> None:
        live = self._live[output.request_id]
        if not live.prompt_is_read:
            live.prompt_is_read = True
            output.num_cached, output.waited = self._scheduler.num_reused(output.request_id), live.waited
            self._prompt_tokens_total += len(live.request.prompt)
        self._generation_tokens_total += len(output.ids)
        accepted = sum(draft == token for draft, token in zip(chunk.drafts, output.ids, strict=False))
        self._acceptance.count(len(chunk.drafts), accepted)
