"""Bulk generation over Ray Data: batch lines in, answers out, by as many engines as a Ray cluster has room for.

Each engine is an actor of Ray Data's with the server's own application before it, as `batch` has it. An actor that is
lost is started again by Ray, and the lines that it had are answered anew. Lines and answers pass through Ray's object
store: what a cluster's machines may read, they may read. Knows nothing of how a service is made.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import ray
import ray.data

from daedal.serve.batch import Answered, BatchLine, answering
from daedal.serve.state.service import Service
from daedal.serve.workers.ray_hosts import join, room

Result = TypeVar("Result")

NAME, PATH, BODY = "custom_id", "path", "body"
STATUS, LINE = "status", "line"


class Answers:
    """For `ray.data.Dataset.map_batches`: rows of requests to rows of answers. make: the service, on the machine where
    it is to be. at_once: requests that are under way together.
    """

    def __init__(self, make: Callable[[], Service], at_once: int):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="daedal-answers", daemon=True).start()
        self._places = asyncio.Semaphore(at_once)
        self._held = AsyncExitStack()  # until the actor's process ends
        self._answer = self._wait(self._held.enter_async_context(answering(make())))

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """In any thread, also in several."""
        given = zip(rows[NAME], rows[PATH], rows[BODY], strict=True)
        asked = [BatchLine(custom_id=name, path=path, body=json.loads(body)) for name, path, body in given]
        answers = self._wait(self._answers(asked))
        return {STATUS: [answer.status for answer in answers], LINE: [answer.line for answer in answers]}

    async def _answers(self, asked: Sequence[BatchLine]) -> list[Answered]:
        return await asyncio.gather(*map(self._placed, asked))

    async def _placed(self, line: BatchLine) -> Answered:
        async with self._places:
            return await self._answer(line)

    def _wait(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def answered(
    lines: Iterator[BatchLine], make: Callable[[], Service], *, engines: int, at_once: int, on_gpus: bool
) -> Iterator[Answered]:
    """The answers as they come, in any order, `at_once` on each of `engines`. make: as Ray can pickle it. BackendError
    where no cluster can be had.
    """
    join()
    rows = [{NAME: line.custom_id, PATH: line.path, BODY: json.dumps(line.body)} for line in lines]
    # A block's answers come when all of it is answered: two of them under way, each half of what runs at once.
    size = max(at_once // 2, 1)
    dataset = ray.data.from_items(rows, override_num_blocks=max(-(-len(rows) // size), 1)).map_batches(
        Answers,
        fn_constructor_args=(make, at_once),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=engines),
        max_concurrency=2,
        **room(engines, 1, on_gpus=on_gpus),
    )
    for row in dataset.iter_rows():
        yield Answered(status=row[STATUS], line=row[LINE])
