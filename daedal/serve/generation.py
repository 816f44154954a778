"""One API request on its way through the engine: its choices handed over together, followed, and counted.

Both endpoints share it. It deals in ids and texts; how a choice looks in JSON is theirs, and nothing here is of HTTP.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from daedal.infer.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from daedal.serve.service import Service
from daedal.serve.worker import GenerationFailed, Stream, WorkerStopped


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer to be generated. `text`: the prompt's text, where it is needed again."""

    prompt: tuple[int, ...]
    params: SamplingParams
    text: str = ""


@dataclass(kw_only=True)
class Answer:
    """Everything that one choice produced."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def extend(self, output: Output) -> None:
        self.ids.extend(output.ids)
        self.text += output.text or ""
        self.logprobs.extend(output.logprobs or ())
        self.prompt_logprobs.extend(output.prompt_logprobs or ())
        self.finish_reason = output.finish_reason


class Generation:
    """The choices of one API request while they are generated; iterate for (choice's index, what is new)."""

    def __init__(self, service: Service, stream: Stream, request_id: str, choices: Sequence[Choice], arrived: float):
        self._metrics = service.metrics
        self._stream = stream
        self._arrived = arrived
        self._indices = {_engine_id(request_id, index): index for index in range(len(choices))}
        self._latest: dict[int, float] = {}
        self._unfinished = set(self._indices.values())
        self._ending = "abort"
        self.num_generated = 0

    @classmethod
    async def begin(cls, service: Service, request_id: str, choices: Sequence[Choice]) -> "Generation":
        """Hands all choices to the engine or none; raises its refusals."""
        arrived = time.monotonic()
        requests = [
            Request(id=_engine_id(request_id, index), prompt=choice.prompt, params=choice.params)
            for index, choice in enumerate(choices)
        ]
        stream = await service.worker.submit(requests)
        return cls(service, stream, request_id, choices, arrived)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        try:
            async for output in self._stream:
                index = self._indices[output.request_id]
                self._count(index, output)
                if output.finish_reason == "cancelled":
                    raise WorkerStopped("the engine dropped the request: try again")
                yield index, output
        except (GenerationFailed, WorkerStopped):
            self._ending = "error"
            raise

    def close(self) -> None:
        """Cancels what has not finished; the metrics name it as vLLM does, `abort`, or `error` if it was cut."""
        self._stream.close()
        for _ in self._unfinished:
            self._metrics.finished(self._ending, time.monotonic() - self._arrived)
        self._unfinished.clear()

    def _count(self, index: int, output: Output) -> None:
        now = time.monotonic()
        self.num_generated += len(output.ids)
        if output.ids:
            if index in self._latest:
                self._metrics.next_tokens(now - self._latest[index], len(output.ids))
            else:
                self._metrics.first_token(now - self._arrived)
            self._latest[index] = now
        if output.finish_reason in ("stop", "length"):
            self._unfinished.discard(index)
            self._metrics.finished(output.finish_reason, now - self._arrived)


async def collect(
    service: Service, request_id: str, choices: Sequence[Choice], follow: Callable[[int, Output], object] | None = None
) -> list[Answer]:
    """All answers, in the order of the choices. follow: sees (choice's index, what is new) as it comes."""
    generation = await Generation.begin(service, request_id, choices)
    answers = [Answer() for _ in choices]
    try:
        async for index, output in generation:
            answers[index].extend(output)
            if follow is not None:
                follow(index, output)
    finally:
        generation.close()
    return answers


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _engine_id(request_id: str, index: int) -> str:
    return f"{request_id}-{index}"


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int = 0) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }
