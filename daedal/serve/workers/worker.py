"""What stands between an event loop and an engine, wherever that runs: submissions, their streams, and their ends.

Coroutines hand plain requests to a `Worker` and read plain outputs back. Its kinds are `thread_worker`, an engine in a
thread of this process, `process_worker`, one in a process of its own, and `replicas`, several of these; here is what
they share. Knows nothing of HTTP and models, and of the engine only what it reports.
"""

import asyncio
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from daedal.infer.request import Output, Request
from daedal.infer.stats import EngineStats, ExpertsSeen

T = TypeVar("T")

State = Literal["starting", "ready", "restarting", "stopped"]


class GenerationFailed(RuntimeError):
    """The engine failed while this request was in it: a defect of ours, not of the request."""


class WorkerStopped(RuntimeError):
    """The worker takes no requests: it has not started, is stopping, or its engine is beyond use."""


class Stream:
    """Outputs of one submission as they come, until each of its requests has finished.

    Iterating raises GenerationFailed or WorkerStopped when the requests were cut. `close` cancels what still runs.
    """

    def __init__(
        self,
        cancel: Callable[[Iterable[str]], object],
        loop: asyncio.AbstractEventLoop,
        request_ids: Iterable[str],
    ):
        self._cancel = cancel
        self._loop = loop
        self._unfinished = set(request_ids)
        self._arrived: asyncio.Queue[Output | Exception] = asyncio.Queue()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, Exception):
            self._unfinished.clear()
            raise item
        if item.finish_reason is not None:
            self._unfinished.discard(item.request_id)
        return item

    def close(self) -> None:
        """Cancels the requests that have not finished; harmless when all have."""
        unfinished = frozenset(self._unfinished)
        self._unfinished.clear()
        if unfinished:
            self._cancel(unfinished)

    def expire(self, error: Exception) -> None:
        """In the event loop: cancels what still runs; iterating ends with `error` behind what has come."""
        self._cancel(frozenset(self._unfinished))
        self._arrived.put_nowait(error)

    def deliver(self, item: Output | Exception) -> bool:
        """From any thread: False when nobody can receive any more."""
        return _call(self._loop, self._arrived.put_nowait, item)


class Answer:
    """A future of an event loop, settled once, from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self.settled = False
        self.future: asyncio.Future[None] = loop.create_future()

    def settle(self, error: Exception | None = None) -> None:
        self.settled = True
        _call(self._loop, self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.future.done():  # the asking task was cancelled meanwhile
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


@dataclass(kw_only=True, eq=False)
class Submission:
    """Requests handed over together. live: ids of those that have not ended; begun: something of an answer was
    delivered; handed: to which of several engines, for who has them."""

    number: int
    requests: tuple[Request, ...]
    stream: Stream
    answer: Answer
    live: set[str] = field(default_factory=set)
    begun: bool = False
    handed: object = None


class Desk:
    """Who waits for what. It takes an engine's reports, which have its methods' names, from whatever thread brings
    them. cancel: for requests whose reader has gone. stats: the engine's numbers, before its first report.
    """

    def __init__(self, cancel: Callable[[Iterable[str]], object], stats: EngineStats | None = None):
        self._cancel = cancel
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._submissions: dict[int, Submission] = {}
        self._owners: dict[str, Submission] = {}
        self.stats = stats
        self.looks, self.experts = 0, ExpertsSeen()

    def enter(self, requests: Sequence[Request]) -> Submission:
        """In an event loop: a submission that waits."""
        loop = asyncio.get_running_loop()
        ids = [request.id for request in requests]
        submission = Submission(
            number=next(self._numbers),
            requests=tuple(requests),
            stream=Stream(self._cancel, loop, ids),
            answer=Answer(loop),
            live=set(ids),
        )
        with self._lock:
            self._submissions[submission.number] = submission
            for request_id in ids:
                self._owners.setdefault(request_id, submission)
        return submission

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Nobody waits for these any more; unknown ones may have ended meanwhile."""
        with self._lock:
            for request_id in request_ids:
                self._ended(request_id)

    def accepted(self, number: int) -> None:
        """The engine has taken all requests of a submission."""
        with self._lock:
            submission = self._submissions.get(number)
        if submission is not None and not submission.answer.settled:
            submission.answer.settle()

    def refused(self, number: int, error: Exception) -> None:
        """It has taken none of them."""
        with self._lock:
            submission = self._submissions.get(number)
            if submission is None:
                return
            self._forget(submission)
        _tell(submission, error)  # behind what came, where an engine that was lost had taken it

    def delivered(self, outputs: Sequence[Output], stats: EngineStats) -> None:
        """A step's outputs, and the engine's numbers after it."""
        self.stats = stats  # who reads an answer finds it counted
        found: list[tuple[Stream, Output]] = []
        with self._lock:
            for output in outputs:
                owner = self._owners.get(output.request_id)
                if owner is None:
                    continue
                owner.begun = True
                found.append((owner.stream, output))
                if output.finish_reason is not None:
                    self._ended(output.request_id)
        gone = [output.request_id for stream, output in found if not stream.deliver(output)]
        if gone:
            self._cancel(gone)

    def looked(self, seen: ExpertsSeen) -> None:
        """What the engine saw when it last was to look."""
        self.looks, self.experts = self.looks + 1, seen

    def cut(
        self, request_ids: Iterable[str], cause: Exception | None = None, *, refusal: Exception | None = None
    ) -> None:
        """The engine failed with these requests and has dropped them, or gives up on them by a `refusal`; the others of
        their submissions go too.
        """
        with self._lock:
            dropped = set(request_ids)
            owners = {self._owners[request_id] for request_id in dropped if request_id in self._owners}
            others = [request_id for owner in owners for request_id in owner.live - dropped]
            for owner in owners:
                self._forget(owner)
        for owner in owners:
            if refusal is not None:
                _tell(owner, refusal)
            else:
                _fail(owner, "the engine failed while generating: the request was cut, try it again", cause)
        if others:
            self._cancel(others)

    def lost(self, blamed: object = None) -> None:
        """The engine has ended with all that it had. Answers that had begun end here, and submissions that were handed
        to `blamed`; others wait on."""
        with self._lock:
            every = self._submissions.values()
            cut = [owner for owner in every if owner.begun or (blamed is not None and owner.handed is blamed)]
            for owner in cut:
                self._forget(owner)
        for owner in cut:
            _fail(owner, "the engine ended while this request was in it: the answer is cut, try it again")

    @property
    def num_requests(self) -> int:
        """Under way, running or waiting."""
        return len(self._owners)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all submissions under way."""
        return sum(len(request.prompt) for submission in self.waiting() for request in submission.requests)

    def waiting(self) -> list[Submission]:
        """All submissions under way, in the order in which they came."""
        with self._lock:
            return list(self._submissions.values())

    def end(self, error: Exception) -> None:
        """Nothing will come any more: everybody is told."""
        with self._lock:
            every = list(self._submissions.values())
            self._submissions.clear()
            self._owners.clear()
        for submission in every:
            _tell(submission, error)

    def _forget(self, submission: Submission) -> None:
        for request_id in tuple(submission.live):
            self._ended(request_id, submission)
        self._submissions.pop(submission.number, None)

    def _ended(self, request_id: str, of: Submission | None = None) -> None:
        owner = self._owners.get(request_id)
        if owner is None or (of is not None and owner is not of):
            return
        del self._owners[request_id]
        owner.live.discard(request_id)
        if not owner.live:
            self._submissions.pop(owner.number, None)


class Worker(ABC):
    """Takes requests for one engine or several; `submit` is for event loops, everything else may be called from any
    thread.
    """

    @property
    def failure(self) -> Exception | None:
        """Why there will be no engine any more; None while there may be."""
        return None

    @property
    def num_restarts(self) -> int:
        """Engines that ended and were started again."""
        return 0

    @property
    @abstractmethod
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    @abstractmethod
    def state(self) -> State:
        """stopped: no request is taken, now or later. restarting: an engine ended, another is on its way."""

    @property
    def pid(self) -> int | None:
        """Of the engine's process, where there is one of its own on this machine."""
        return None

    @property
    def engines(self) -> "Sequence[Worker]":
        """One for each engine."""
        return (self,)

    @property
    def running(self) -> bool:
        """True while requests are taken, if only to wait."""
        return self.state != "stopped"

    @abstractmethod
    def stats(self) -> EngineStats:
        """The engines' numbers after their latest steps."""

    @abstractmethod
    def look(self) -> tuple[int, ExpertsSeen]:
        """Which experts some steps chose when an engine last looked, and how often it has; it looks again now, unless
        it was asked a moment ago."""

    @property
    @abstractmethod
    def num_requests(self) -> int:
        """Under way, running or waiting."""

    @abstractmethod
    def start(self) -> None:
        """From now on requests are taken."""

    @abstractmethod
    def close(self) -> None:
        """Takes no more requests; cuts those that run as soon as the step under way is over."""

    @abstractmethod
    def stop(self, timeout: float) -> bool:
        """Closes and waits up to `timeout` seconds for the engine to end; False when it had to be left or killed."""

    @abstractmethod
    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Hands over requests, all or none. Raises what the engine's `add` raises, OverloadError where prompts under
        way are long already, or WorkerStopped."""

    @abstractmethod
    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends these requests; ids that are not running are ignored, as they may have finished meanwhile."""


def stopped() -> WorkerStopped:
    """What everybody is told who waits for an engine that is to end."""
    return WorkerStopped("the engine is stopping: the request was cut, try again later")


def _fail(submission: Submission, sentence: str, cause: Exception | None = None) -> None:
    failure = GenerationFailed(sentence)
    failure.__cause__ = cause
    _tell(submission, failure)


def _tell(submission: Submission, error: Exception) -> None:
    """Who waits for its answer, or reads it, is told."""
    if submission.answer.settled:
        submission.stream.deliver(error)
    else:
        submission.answer.settle(error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[T], None], item: T) -> bool:
    """Calls `function(item)` in the loop's thread; False when that loop has closed."""
    try:
        loop.call_soon_threadsafe(function, item)
    except RuntimeError:  # the only one that this call has: the loop is closed, nobody is waiting
        return False
    return True
