"""An engine in a process of its own: the same answers, and what becomes of whom when it ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from daedal.checkpoint.load import load
from daedal.errors import CheckpointError, OverloadError, RequestError
from daedal.infer.engine import Engine
from daedal.infer.request import Output, Request, SamplingParams
from daedal.serve.workers.child import EngineLost
from daedal.serve.workers.process_worker import Patience, ProcessWorker
from daedal.serve.workers.thread_worker import ThreadWorker
from daedal.serve.workers.worker import GenerationFailed, Stream, Worker, WorkerStopped
from daedal.text.structure.shape import Shape
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer
from tests.serve.hosted import COMMAND, ENDLESS, KILLS, RAISES, started

ROOT = Path(__file__).parents[3]
AT_ONCE = Patience(most=5, seconds=0.0)


def request(name: str, first: int = 6) -> Request:
    return Request(id=name, prompt=(first,), params=SamplingParams(max_tokens=10**6 if first == ENDLESS else 8))


async def all_of(stream: Stream) -> list[Output]:
    return [output async for output in stream]


@contextmanager
def working(worker: Worker) -> Iterator[Worker]:
    worker.start()
    try:
        yield worker
    finally:
        assert worker.stop(timeout=30)


def ids_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.ids]


def test_answers_are_those_of_an_engine_in_this_process(checkpoint: Path) -> None:
    """Of the real engine: drawn with a seed, with log-probabilities, held to a schema, ended by a stop string."""
    tokenizer = Tokenizer.load(checkpoint)
    rule = Structures(tokenizer).make(Shape(json={"type": "array", "items": {"enum": ["ab", "cd"]}, "maxItems": 3}))
    drawn = SamplingParams(max_tokens=12, seed=3, logprobs=2, prompt_logprobs=1, stop=("e",), logit_bias={9: -5.0})
    asked = [
        Request(id="drawn", prompt=(5, 6, 7), params=drawn),
        Request(id="held", prompt=(5, 6), params=SamplingParams(max_tokens=40, seed=1), structure=rule),
    ]

    async def answers(worker: Worker) -> dict[str, Output]:
        whole = {one.id: Output(request_id=one.id) for one in asked}
        async for output in await worker.submit(asked):
            whole[output.request_id].extend(output)
        for output in whole.values():
            assert output.waited is not None
            output.waited = None  # by the clock
        return whole

    with working(ThreadWorker(Engine(load(checkpoint), tokenizer=tokenizer, max_batch=4))) as here:
        expected = asyncio.run(answers(here))
    with working(started(checkpoint, real=True)) as there:
        assert there.max_context == here.max_context
        assert asyncio.run(answers(there)) == expected
        assert there.stats() == here.stats()
    assert expected["held"].text.startswith("[")
    assert len(expected["drawn"].prompt_logprobs) == 3


def test_refusals_come_back_as_they_are(checkpoint: Path) -> None:
    async def scenario(worker: Worker) -> None:
        with pytest.raises(RequestError, match="beyond the vocabulary") as caught:
            await worker.submit([request("a"), request("b", 10**6)])
        assert caught.value.param == "prompt"
        with pytest.raises(OverloadError):
            await worker.submit([request("c"), request("d"), request("e")])
        assert ids_of(await all_of(await worker.submit([request("f")]))) == [16, 20, 1]

    with working(started(checkpoint, max_live=2)) as worker:
        asyncio.run(scenario(worker))
        assert worker.stats().generation_tokens_total == 3


def test_a_step_that_raises_cuts_its_requests_and_no_engine_ends(checkpoint: Path) -> None:
    async def scenario(worker: Worker) -> None:
        with pytest.raises(GenerationFailed) as caught:
            await all_of(await worker.submit([request("a", RAISES)]))
        assert "secret" not in str(caught.value)
        assert ids_of(await all_of(await worker.submit([request("b")]))) == [16, 20, 1]

    with working(started(checkpoint)) as worker:
        asyncio.run(scenario(worker))
        assert worker.num_restarts == 0


def test_an_engine_that_is_killed_cuts_what_had_begun_and_nothing_else(checkpoint: Path) -> None:
    async def scenario(worker: ProcessWorker) -> None:
        begun = await worker.submit([request("a", ENDLESS)])
        waiting = await worker.submit([request("b")])
        gone = await worker.submit([request("c")])
        await anext(begun)
        gone.close()
        first = worker.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(GenerationFailed, match="the engine ended while this request was in it"):
            await all_of(begun)
        assert ids_of(await all_of(waiting)) == [16, 20, 1]
        assert worker.state == "ready"
        assert worker.pid != first
        assert worker.num_restarts == 1

    with working(started(checkpoint, max_running=1)) as worker:
        asyncio.run(scenario(worker))


def test_the_request_that_ends_engines_is_found_and_the_others_are_answered(checkpoint: Path) -> None:
    async def scenario(worker: Worker) -> None:
        names = "abcdef"
        streams = [await worker.submit([request(name, KILLS if name == "c" else 6)]) for name in names]
        results = await asyncio.gather(*map(all_of, streams), return_exceptions=True)
        failed = [name for name, result in zip(names, results, strict=True) if isinstance(result, GenerationFailed)]
        assert failed == ["c"]
        assert all(ids_of(result) == [16, 20, 1] for result in results if isinstance(result, list))

    # Nothing begins beside the request that kills, as the first of a step's requests goes first.
    with working(started(checkpoint, patience=AT_ONCE, max_running=1)) as worker:
        asyncio.run(scenario(worker))
        assert worker.num_restarts <= 3


def test_engines_that_go_on_ending_are_given_up(checkpoint: Path, tmp_path: Path) -> None:
    async def scenario(worker: ProcessWorker) -> None:
        waiting = await worker.submit([request("a", ENDLESS)])
        await anext(waiting)
        (tmp_path / "tokenizer.json").unlink()  # no other engine can be made
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(GenerationFailed):
            await all_of(waiting)
        kept = asyncio.create_task(worker.submit([request("b")]))
        with pytest.raises(WorkerStopped):
            await kept

    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with working(started(tmp_path, patience=Patience(most=2, seconds=0.0))) as worker:
        asyncio.run(scenario(worker))
        assert worker.state == "stopped"
        assert isinstance(worker.failure, EngineLost)
        assert "2 times" in str(worker.failure)


def test_an_engine_that_cannot_be_had_says_why(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^it is broken: mend it$"):
        started(checkpoint, fails="it is broken: mend it")
    with pytest.raises(EngineLost, match="ended with status 1 before it was ready"):
        ProcessWorker((sys.executable, "-c", "raise SystemExit(1)"), {}).open()


def test_an_engine_ends_with_its_front_end(checkpoint: Path) -> None:
    program = (
        "import sys, os\n"
        "from tests.serve.hosted import started\n"
        "print(started(sys.argv[1]).pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as front:
        engine = psutil.Process(int(front.stdout.readline()))
        assert COMMAND[-1] in engine.cmdline()
        for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's, for the whole group: not for the engine
            engine.send_signal(number)
        front.kill()
        engine.wait(timeout=10)
