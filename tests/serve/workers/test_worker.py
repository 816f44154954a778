"""The worker alone: streams end, refusals are all or none, failures stay with the requests at fault."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daedal.errors import OverloadError
from daedal.infer.request import Output, Request, SamplingParams
from daedal.infer.stats import StepError
from daedal.serve.workers import desk_worker
from daedal.serve.workers.thread_worker import ThreadWorker
from daedal.serve.workers.worker import GenerationFailed, Stream, Worker, WorkerStopped
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine


def request(name: str, prompt: tuple[int, ...] = (5,)) -> Request:
    return Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=8))


async def all_of(stream: Stream) -> list[Output]:
    return [output async for output in stream]


@contextmanager
def working(engine: ScriptedEngine) -> Iterator[Worker]:
    worker = ThreadWorker(engine)
    worker.start()
    try:
        yield worker
    finally:
        assert worker.stop(timeout=10)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


def test_requests_submitted_together_share_a_stream_that_ends(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda asked: [10 + asked.prompt[0], 20])

    async def scenario(worker: Worker) -> list[Output]:
        return await all_of(await worker.submit([request("a", (1,)), request("b", (2,))]))

    with working(engine) as worker:
        outputs = asyncio.run(scenario(worker))
    ids = {name: [token for output in outputs if output.request_id == name for token in output.ids] for name in "ab"}
    assert ids == {"a": [11, 20, 1], "b": [12, 20, 1]}
    assert [output.finish_reason for output in outputs].count("stop") == 2


def test_a_refused_request_takes_back_those_submitted_with_it(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda _: [7], max_live=2)

    async def scenario(worker: Worker) -> list[Output]:
        with pytest.raises(OverloadError):
            await worker.submit([request("a"), request("b"), request("c")])
        return await all_of(await worker.submit([request("d"), request("e")]))

    with working(engine) as worker:
        assert {output.request_id for output in asyncio.run(scenario(worker))} == {"d", "e"}


@pytest.mark.parametrize("blamed", [("a",), None], ids=["one step's requests", "the whole engine"])
def test_a_failing_step_fails_its_requests_and_the_worker_lives_on(
    tokenizer: Tokenizer, blamed: tuple[str, ...] | None
) -> None:
    failures = [StepError("broken", request_ids=blamed) if blamed else ZeroDivisionError("broken")]
    both_are_in = threading.Event()

    def before_step() -> None:
        assert both_are_in.wait(10)
        if failures:
            raise failures.pop()

    engine = ScriptedEngine(tokenizer, lambda _: [7, 8], before_step=before_step)

    async def scenario(worker: Worker) -> tuple[object, object, list[Output]]:
        first, second = await asyncio.gather(worker.submit([request("a")]), worker.submit([request("b")]))
        both_are_in.set()
        results = await asyncio.gather(all_of(first), all_of(second), return_exceptions=True)
        return results[0], results[1], await all_of(await worker.submit([request("c")]))

    with working(engine) as worker:
        first, second, third = asyncio.run(scenario(worker))
        assert worker.running
    assert isinstance(first, GenerationFailed)
    assert isinstance(second, list if blamed else GenerationFailed)
    assert third[-1].finish_reason == "stop"


def test_prompts_under_way_are_bounded_by_their_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_worker, "CONTEXTS", 0)
    monkeypatch.setattr(desk_worker, "LEAST_TOKENS", 100)
    engine = ScriptedEngine(tokenizer, lambda _: itertools.repeat(7))

    def endless(name: str, num_tokens: int) -> Request:
        return Request(id=name, prompt=(5,) * num_tokens, params=SamplingParams(max_tokens=10**6))

    async def scenario(worker: Worker) -> None:
        alone = await worker.submit([endless("a", 101)])
        with pytest.raises(OverloadError, match="prompts of 101 tokens are under way, the most is 100"):
            await worker.submit([request("b")])
        alone.close()
        first, second = await worker.submit([endless("c", 60)]), await worker.submit([endless("d", 40)])
        with pytest.raises(OverloadError):
            await worker.submit([request("e")])
        first.close()
        assert await all_of(await worker.submit([request("f", (5,) * 60)]))
        second.close()

    with working(engine) as worker:
        asyncio.run(scenario(worker))


def test_closing_a_stream_cancels_what_runs(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda _: itertools.repeat(7))

    async def scenario(worker: Worker) -> None:
        stream = await worker.submit([Request(id="a", prompt=(5,), params=SamplingParams(max_tokens=10**6))])
        await anext(stream)
        stream.close()
        assert await all_of(stream) == []

    with working(engine) as worker:
        asyncio.run(scenario(worker))
        assert engine.cancelled.wait(10)


def test_stopping_cuts_what_runs_and_refuses_what_comes(tokenizer: Tokenizer) -> None:
    step_is_under_way, worker_is_closed = threading.Event(), threading.Event()

    def before_step() -> None:
        step_is_under_way.set()
        assert worker_is_closed.wait(10)

    engine = ScriptedEngine(tokenizer, lambda _: itertools.repeat(7), before_step=before_step)

    async def scenario(worker: Worker) -> None:
        stream = await worker.submit([request("a")])
        await asyncio.to_thread(step_is_under_way.wait, 10)
        worker.close()
        worker_is_closed.set()
        with pytest.raises(WorkerStopped):
            await all_of(stream)
        with pytest.raises(WorkerStopped):
            await worker.submit([request("b")])

    with working(engine) as worker:
        asyncio.run(scenario(worker))
