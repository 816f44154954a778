"""The engine in a thread of its own, and the way to it from an event loop.

One thread owns the engine: it alone adds, cancels and steps, and sleeps on a condition while there is nothing to do.
An event loop hands it plain requests and reads plain outputs back, so the thread can one day become a process. Knows
nothing of HTTP, tokens' text or models.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from daedal.infer.engine import Engine, EngineStats, StepError
from daedal.infer.request import Output, Request

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GenerationFailed(RuntimeError):
    """The engine failed while this request was in it: a defect of ours, not of the request."""


class WorkerStopped(RuntimeError):
    """The worker takes no requests: it has not started, is stopping, or its engine is beyond use."""


class Stream:
    """Outputs of one submission as they come, until each of its requests has finished.

    Iterating raises GenerationFailed or WorkerStopped when the requests were cut. `close` cancels what still runs.
    """

    def __init__(self, worker: "Worker", loop: asyncio.AbstractEventLoop, request_ids: Iterable[str]):
        self._worker = worker
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
            self._worker.cancel(unfinished)

    def deliver(self, item: Output | Exception) -> bool:
        """For the worker's thread: False when nobody can receive any more."""
        return _call(self._loop, self._arrived.put_nowait, item)


@dataclass(frozen=True)
class _Add:
    requests: tuple[Request, ...]
    stream: Stream
    answer: "_Answer"


@dataclass(frozen=True)
class _Cancel:
    request_ids: frozenset[str]


class _Answer:
    """A future of an event loop, settled from the worker's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self.future: asyncio.Future[None] = loop.create_future()

    def settle(self, error: Exception | None = None) -> None:
        _call(self._loop, self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.future.done():  # the asking task was cancelled meanwhile
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class Worker:
    """Runs one engine; every public method may be called from any thread, `submit` from an event loop."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._stats = engine.stats()
        self._wake = threading.Condition()
        self._commands: deque[_Add | _Cancel] = deque()
        self._live: dict[str, Stream] = {}
        self._open = False
        self._thread = threading.Thread(target=self._run, name="daedal-engine", daemon=True)

    @property
    def running(self) -> bool:
        """True while requests are taken."""
        return self._open

    def stats(self) -> EngineStats:
        """The engine's numbers after its latest step."""
        return self._stats

    def start(self) -> None:
        self._open = True
        self._thread.start()

    def close(self) -> None:
        """Takes no more requests; cuts those that run as soon as the step under way is over."""
        with self._wake:
            self._open = False
            self._wake.notify()

    def stop(self, timeout: float) -> bool:
        """Closes and waits up to `timeout` seconds for the thread; False when its step was still not over."""
        self.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Hands over requests, all or none. Raises what the engine's `add` raises, or WorkerStopped."""
        loop = asyncio.get_running_loop()
        stream = Stream(self, loop, (request.id for request in requests))
        answer = _Answer(loop)
        self._command(_Add(tuple(requests), stream, answer))
        try:
            await answer.future
        except BaseException:
            stream.close()
            raise
        return stream

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends these requests; ids that are not running are ignored, as they may have finished meanwhile."""
        with self._wake:
            if self._open:
                self._commands.append(_Cancel(frozenset(request_ids)))
                self._wake.notify()

    def _command(self, command: _Add) -> None:
        with self._wake:
            if not self._open:
                raise WorkerStopped("the engine takes no requests now: try again later")
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            logger.exception("the engine is beyond use: no request is taken any more")
        finally:
            self._end()

    def _turn(self) -> bool:
        """Obeys what was commanded, makes one step; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or not self._open or self._engine.has_work)
            if not self._open:
                return False
        while (command := self._next_command()) is not None:
            if isinstance(command, _Add):
                self._add(command)
            else:
                self._cancel(command.request_ids)
        if self._engine.has_work:
            self._step()
        self._stats = self._engine.stats()
        return True

    def _next_command(self) -> _Add | _Cancel | None:
        with self._wake:
            return self._commands.popleft() if self._commands else None

    def _add(self, command: _Add) -> None:
        added: list[str] = []
        try:
            self._engine.check_room(len(command.requests))
            for request in command.requests:
                self._engine.add(request)
                added.append(request.id)
        except Exception as error:
            command.answer.settle(error)
            for request_id in added:
                self._engine.cancel(request_id)
            return
        for request_id in added:
            self._live[request_id] = command.stream
        command.answer.settle()

    def _cancel(self, request_ids: frozenset[str]) -> None:
        for request_id in request_ids:
            if self._live.pop(request_id, None) is not None:
                self._engine.cancel(request_id)

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except StepError as error:  # the engine dropped these itself and goes on with the others
            logger.exception("a step of the engine failed: %d requests are cut", len(error.request_ids))
            for request_id in self._fail(error.request_ids, error):
                self._engine.cancel(request_id)
            return
        except Exception as error:
            if not self._live:  # nothing left to blame: another try would fail for ever
                raise
            logger.exception("the engine failed: all %d requests are cut", len(self._live))
            for request_id in self._fail(tuple(self._live), error):
                self._engine.cancel(request_id)
            return
        self._stats = self._engine.stats()  # who reads an answer finds it counted
        for output in outputs:
            stream = self._live.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._live[output.request_id]
            if not stream.deliver(output):
                self._cancel(frozenset((output.request_id,)))

    def _fail(self, request_ids: Sequence[str], cause: Exception) -> Sequence[str]:
        """Tells the streams of these requests, whose other requests have no reader then: returns all that ended."""
        streams = {self._live[request_id] for request_id in request_ids if request_id in self._live}
        ended = [request_id for request_id, stream in self._live.items() if stream in streams]
        for request_id in ended:
            del self._live[request_id]
        for stream in streams:
            failure = GenerationFailed("the engine failed while generating: the request was cut, try it again")
            failure.__cause__ = cause
            stream.deliver(failure)
        return ended

    def _end(self) -> None:
        with self._wake:
            self._open = False
            commands, self._commands = self._commands, deque()
        sentence = "the engine is stopping: the request was cut, try again later"
        for command in commands:
            if isinstance(command, _Add):
                command.answer.settle(WorkerStopped(sentence))
        for stream in set(self._live.values()):
            stream.deliver(WorkerStopped(sentence))
        self._live.clear()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[T], None], item: T) -> bool:
    """Calls `function(item)` in the loop's thread; False when that loop has closed."""
    try:
        loop.call_soon_threadsafe(function, item)
    except RuntimeError:  # the only one that this call has: the loop is closed, nobody is waiting
        return False
    return True
