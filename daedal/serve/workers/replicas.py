"""Several engines of one model as one worker: each request goes to one of them, which its prompt decides (`routing`).

Everything else is what each worker does anyway: queues, restarts, streams, cancelling. The service is ready while one
of them is, and its numbers are the sums over all. Requests that an engine had not begun when it ended wait for its
successor; new ones go to the others meanwhile. Knows nothing of how engines are run, nor where.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from itertools import zip_longest
from operator import add
from typing import Any

from pydantic import JsonValue

from daedal.infer.request import Request
from daedal.infer.stats import EngineStats, ExpertsSeen
from daedal.serve.workers.process_worker import ProcessWorker
from daedal.serve.workers.routing import Router
from daedal.serve.workers.worker import State, Stream, Worker, WorkerStopped, stopped


class Replicas(Worker):
    """`workers` as one. most: requests that each engine takes at once, None for any number."""

    def __init__(self, workers: Sequence[ProcessWorker], *, most: int | None = None):
        self._workers = tuple(workers)
        self._router = Router(len(self._workers), most=most)
        self._restarts = [0] * len(self._workers)

    def open(self) -> Mapping[str, JsonValue]:
        """Waits until every engine is there; the facts that the first tells. Raises as `ProcessWorker.open` does; then
        all of them have ended.
        """
        try:
            facts, *_ = [worker.open() for worker in self._workers]
            return facts
        except BaseException:
            self.stop(0.0)
            raise

    @property
    def max_context(self) -> int:
        return min(worker.max_context for worker in self._workers)

    @property
    def state(self) -> State:
        states = {worker.state for worker in self._workers}
        order: tuple[State, ...] = ("ready", "restarting", "starting", "stopped")
        return next(state for state in order if state in states)

    @property
    def failure(self) -> Exception | None:
        """Why there will be no engine any more: as long as one may come, nothing."""
        failures = [worker.failure for worker in self._workers]
        return None if None in failures else failures[0]

    @property
    def num_restarts(self) -> int:
        return sum(worker.num_restarts for worker in self._workers)

    @property
    def engines(self) -> Sequence[Worker]:
        return self._workers

    @property
    def num_requests(self) -> int:
        return sum(worker.num_requests for worker in self._workers)

    def stats(self) -> EngineStats:
        return together([worker.stats() for worker in self._workers])

    def look(self) -> tuple[int, ExpertsSeen]:
        """Of the engine that has most to do."""
        return max(self._workers, key=lambda worker: worker.num_requests).look()

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def stop(self, timeout: float) -> bool:
        self.close()
        end = time.monotonic() + timeout
        return all([worker.stop(max(end - time.monotonic(), 0.0)) for worker in self._workers])

    async def submit(self, requests: Sequence[Request]) -> Stream:
        left = set(range(len(self._workers)))
        while usable := self._usable(left):
            engine = self._choose(requests, usable)
            try:
                return await self._workers[engine].submit(requests)
            except WorkerStopped:  # it was given up; another one may do it
                left.discard(engine)
        raise stopped()

    def cancel(self, request_ids: Iterable[str]) -> None:
        ids = frozenset(request_ids)
        for worker in self._workers:
            worker.cancel(ids)

    def _usable(self, left: Collection[int]) -> list[int]:
        """Engines that are there, or at least are to come."""
        for states in (("ready",), ("restarting", "starting")):
            if found := [engine for engine in left if self._workers[engine].state in states]:
                return found
        return []

    def _choose(self, requests: Sequence[Request], usable: Sequence[int]) -> int:
        for engine, worker in enumerate(self._workers):
            if worker.num_restarts != self._restarts[engine]:
                self._restarts[engine] = worker.num_restarts
                self._router.forget(engine)
        first, loads = requests[0], [worker.num_requests for worker in self._workers]
        return self._router.choose(first.prompt, loads, salt=first.cache_salt, among=usable, count=len(requests))


def together(stats: Sequence[EngineStats]) -> EngineStats:
    """The numbers of several engines, each summed; what one does not know is not known of all."""
    summed = {item.name: _sum([getattr(one, item.name) for one in stats]) for item in fields(EngineStats)}
    return EngineStats(**summed)


def _sum(values: Sequence[Any]) -> Any:
    if None in values:
        return None
    if isinstance(values[0], tuple):
        return tuple(_sum(entries) for entries in zip_longest(*values, fillvalue=0))
    return reduce(add, values)
