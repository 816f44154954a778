"""One API request on its way through the engine: its choices handed over together, followed, and counted.

Both endpoints share it. It deals in ids and texts; how a choice looks in JSON is theirs, and nothing here is of HTTP.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from daedal.cost.spending import Spent
from daedal.infer.request import FinishReason, Output, Request, SamplingParams, Structure, TokenLogprobs
from daedal.serve.state.course import Course
from daedal.serve.state.errors import ApiError
from daedal.serve.state.keys import Charge, free
from daedal.serve.state.service import Service
from daedal.serve.workers.worker import GenerationFailed, Stream, WorkerStopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer to be generated. text: the prompt's, where it is needed again. structure: what the answer obeys. salt,
    priority: as in `Request`.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    text: str = ""
    structure: Structure | None = None
    salt: str = ""
    priority: int = 0


@dataclass(kw_only=True)
class Answer:
    """Everything that one choice produced."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | None = None
    spent: Spent | None = None
    num_cached: int = 0

    def extend(self, output: Output) -> None:
        self.ids.extend(output.ids)
        self.text += output.text or ""
        self.logprobs.extend(output.logprobs or ())
        self.prompt_logprobs.extend(output.prompt_logprobs or ())
        self.finish_reason = output.finish_reason
        self.stop, self.spent = output.stop, output.spent
        self.num_cached += output.num_cached


class Generation:
    """The choices of one API request while they are generated; iterate for (choice's index, what is new).

    deadline: on the event loop's clock, None for none. num_generated: tokens so far. spent: by the choices that have
    ended, where costs are counted.
    """

    def __init__(
        self,
        service: Service,
        stream: Stream,
        request_id: str,
        choices: Sequence[Choice],
        arrived: float,
        charge: Charge = free,
        deadline: float | None = None,
    ):
        self._charge = charge
        charge(sum(len(choice.prompt) for choice in choices))
        service.begun()
        self._service, self._metrics = service, service.metrics
        self._closed = False
        self._stream = stream
        self._timer = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, stream.expire, _overdue())
        self._arrived = arrived
        self._indices = {_engine_id(request_id, index): index for index in range(len(choices))}
        self._latest: dict[int, float] = {}
        self._unfinished = set(self._indices.values())
        self._ending = "abort"
        self.num_generated = 0
        self.spent: list[Spent] = []
        self._choices = choices
        self._cached = [0] * len(choices)
        self._course = Course(
            id=request_id,
            model=service.model_name,
            params=[choice.params for choice in choices],
            num_prompt=num_prompt_tokens(choices),
            priority=choices[0].priority,
            arrived=arrived,
        )

    @classmethod
    async def begin(
        cls,
        service: Service,
        request_id: str,
        choices: Sequence[Choice],
        charge: Charge = free,
        seconds: float | None = None,
    ) -> "Generation":
        """Hands all choices to the engine or none; raises its refusals. seconds: that it all may take."""
        arrived = time.monotonic()
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        requests = [
            Request(
                id=_engine_id(request_id, index),
                prompt=choice.prompt,
                params=choice.params,
                structure=choice.structure,
                cache_salt=choice.salt,
                priority=choice.priority,
                seconds=seconds,
            )
            for index, choice in enumerate(choices)
        ]
        async with _until(deadline):
            stream = await service.worker.submit(requests)
        return cls(service, stream, request_id, choices, arrived, charge, deadline)

    @property
    def num_cached(self) -> int:
        """Tokens of the prompts that were not computed, as far as is known."""
        return num_cached(self._choices, self._cached)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        try:
            async for output in self._stream:
                index = self._indices[output.request_id]
                self._count(index, output)
                if output.finish_reason == "cancelled":
                    raise WorkerStopped("the engine dropped the request: try again")
                yield index, output
        except ApiError as error:
            self._course.failed = error.code
            raise
        except (GenerationFailed, WorkerStopped) as error:
            self._ending, self._course.failed = "error", type(error).__name__
            raise

    def close(self) -> None:
        """Cancels what has not finished; the metrics name it as vLLM does, `abort`, or `error` if it was cut."""
        if self._closed:
            return
        self._closed = True
        self._stream.close()
        if self._timer is not None:
            self._timer.cancel()
        now = time.monotonic()
        self._service.ended(now - self._arrived)
        for _ in self._unfinished:
            self._metrics.finished(self._ending, now - self._arrived)
        self._tell(now)

    def _tell(self, now: float) -> None:
        """Those who follow requests, and the metrics, how it went. A failing follower keeps nobody from an answer."""
        course = self._course
        course.ended, course.num_generated, course.num_cached = now, self.num_generated, self.num_cached
        course.reasons += [self._ending] * len(self._unfinished)
        self._metrics.went(course)
        for follow in self._service.followers:
            try:
                follow(course)
            except Exception:
                logger.exception("who follows requests was told of one, and failed")

    def _count(self, index: int, output: Output) -> None:
        now = time.monotonic()
        if output.waited is not None and self._course.waited is None:
            self._course.waited = output.waited
        if output.ids and self._course.first is None:
            self._course.first = now
        self.num_generated += len(output.ids)
        self._cached[index] += output.num_cached
        self._charge(len(output.ids))
        if output.spent is not None:
            self.spent.append(output.spent)
        if output.ids:
            if index in self._latest:
                self._metrics.next_tokens(now - self._latest[index], len(output.ids))
            else:
                self._metrics.first_token(now - self._arrived)
            self._latest[index] = now
        if output.finish_reason in ("stop", "length"):
            self._unfinished.discard(index)
            self._course.reasons.append(output.finish_reason)
            self._metrics.finished(output.finish_reason, now - self._arrived)


async def collect(
    service: Service,
    request_id: str,
    choices: Sequence[Choice],
    follow: Callable[[int, Output], object] | None = None,
    charge: Charge = free,
    seconds: float | None = None,
) -> list[Answer]:
    """All answers, in the order of the choices. follow: sees (choice's index, what is new) as it comes."""
    generation = await Generation.begin(service, request_id, choices, charge, seconds)
    answers = [Answer() for _ in choices]
    try:
        async for index, output in generation:
            answers[index].extend(output)
            if follow is not None:
                follow(index, output)
    finally:
        generation.close()
    return answers


@asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    """ApiError 504 when the deadline passes first."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise _overdue() from error


def _overdue() -> ApiError:
    sentence = "the request's time is over, its answer is cut: give it a longer timeout, or ask for less"
    return ApiError(504, sentence, param="timeout", code="deadline_exceeded", kind="timeout_error")


def spent(answers: Iterable[Answer]) -> list[Spent]:
    """What each answer cost, where costs are counted."""
    return [answer.spent for answer in answers if answer.spent is not None]


def num_cached(choices: Sequence[Choice], counts: Iterable[int]) -> int:
    """Tokens of prompts that were not computed, of `counts` for each choice: of choices that share a prompt, which
    follow one another, the first one's.
    """
    befores = (None, *(choice.prompt for choice in choices))
    return sum(
        count for before, choice, count in zip(befores, choices, counts, strict=False) if choice.prompt is not before
    )


def num_prompt_tokens(choices: Sequence[Choice]) -> int:
    """Of all prompts; choices that share one follow one another."""
    befores = (None, *(choice.prompt for choice in choices))
    return sum(
        len(choice.prompt) for before, choice in zip(befores, choices, strict=False) if choice.prompt is not before
    )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _engine_id(request_id: str, index: int) -> str:
    return f"{request_id}-{index}"


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    reasoning_tokens: int = 0,
    *,
    cached: int = 0,
    cost: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What was read and written. cached: of the prompt's tokens, those that were not computed; DeepSeek's API has names
    of its own for them. cost: the fields that say what it cost, where they are to be said.
    """
    told: dict[str, object] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt_tokens - cached,
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }
    return {**told, **(cost or {})}
