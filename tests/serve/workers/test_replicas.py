"""Several engines as one worker: who gets what, the sums, and what becomes of whom when one of them ends."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from daedal.cli import app
from daedal.cost.spending import Spent
from daedal.errors import CheckpointError
from daedal.infer.request import Output, Request, SamplingParams
from daedal.infer.stats import EngineStats
from daedal.serve.state.service import Service
from daedal.serve.workers.process_worker import Patience, ProcessWorker
from daedal.serve.workers.replicas import Replicas, together
from daedal.serve.workers.worker import GenerationFailed, Stream, WorkerStopped
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer
from tests.serve.hosted import COMMAND, ENDLESS
from tests.serve.live import serving

AT_ONCE = Patience(most=3, seconds=0.0)


@contextmanager
def replicas(
    checkpoint: Path, count: int = 2, *, patience: Patience = AT_ONCE, starts: bool = True, **options: object
) -> Iterator[tuple[Replicas, Sequence[ProcessWorker]]]:
    made = {"directory": str(checkpoint), **options}
    workers = [ProcessWorker(COMMAND, made, patience=patience) for _ in range(count)]
    together = Replicas(workers)
    together.open()
    if starts:
        together.start()
    try:
        yield together, workers
    finally:
        assert together.stop(timeout=30)


def request(name: str, *prompt: int, endless: bool = False) -> Request:
    return Request(id=name, prompt=prompt or (6,), params=SamplingParams(max_tokens=10**6 if endless else 8))


async def ids_of(stream: Stream) -> list[int]:
    return [token async for output in stream for token in output.ids]


def test_beginnings_stay_together_and_a_crowd_does_not(checkpoint: Path) -> None:
    async def scenario(worker: Replicas, workers: Sequence[ProcessWorker]) -> None:
        one, other = tuple(range(6, 46)), tuple(range(106, 146))
        for place in range(3):
            for prompt in (one, other):
                assert await ids_of(await worker.submit([request(f"{prompt[0]}-{place}", *prompt, 7, place)]))
        assert [each.stats().generation_tokens_total for each in workers] == [9, 9]
        assert worker.stats().generation_tokens_total == 18
        crowd = [await worker.submit([request(f"c{place}", ENDLESS, *one[1:], endless=True)]) for place in range(8)]
        loads = [each.num_requests for each in workers]
        assert sum(loads) == worker.num_requests == 8
        assert max(loads) <= 6
        for stream in crowd:
            stream.close()
        worker.cancel(["c1"])
        assert worker.num_requests == 0

    with replicas(checkpoint) as (worker, workers):
        asyncio.run(scenario(worker, workers))
        assert worker.state == "ready"
        assert worker.pid is None


def test_an_engine_that_ends_takes_its_own_answers_and_no_other(checkpoint: Path) -> None:
    async def scenario(worker: Replicas, workers: Sequence[ProcessWorker]) -> None:
        streams = [await worker.submit([request(name, ENDLESS, endless=True)]) for name in "ab"]
        begun: list[Output] = [await anext(stream) for stream in streams]
        assert all(output.ids for output in begun)
        assert [each.num_requests for each in workers] == [1, 1]
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(GenerationFailed):
            await ids_of(streams[0])
        assert worker.state == "ready"
        assert await ids_of(await worker.submit([request("c")])) == [16, 20, 1]
        assert (await anext(streams[1])).ids
        streams[1].close()

    with replicas(checkpoint) as (worker, workers):
        asyncio.run(scenario(worker, workers))
        assert worker.failure is None


def test_a_replica_that_is_given_up_leaves_the_others_serving(checkpoint: Path, tmp_path: Path) -> None:
    async def ended(worker: ProcessWorker) -> None:
        stream = await worker.submit([request("a", ENDLESS, endless=True)])
        await anext(stream)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises((GenerationFailed, WorkerStopped)):
            await ids_of(stream)
        while worker.state != "stopped":
            await asyncio.sleep(0.01)

    async def scenario(worker: Replicas, workers: Sequence[ProcessWorker]) -> None:
        await ended(workers[0])
        assert (worker.state, worker.failure) == ("ready", None)
        for name in "bcd":
            assert await ids_of(await worker.submit([request(name)])) == [16, 20, 1]
        await ended(workers[1])
        assert worker.state == "stopped"
        assert worker.failure is not None
        with pytest.raises(WorkerStopped):
            await worker.submit([request("e")])

    with replicas(checkpoint, patience=Patience(most=1, seconds=0.0)) as (worker, workers):
        asyncio.run(scenario(worker, workers))


def test_replicas_that_cannot_be_had_say_why_and_are_gone(checkpoint: Path) -> None:
    good = ProcessWorker(COMMAND, {"directory": str(checkpoint)})
    bad = ProcessWorker(COMMAND, {"directory": str(checkpoint), "fails": "it is broken: mend it"})
    with pytest.raises(CheckpointError, match="it is broken"):
        Replicas([good, bad]).open()
    assert good.state == bad.state == "stopped"


def test_the_service_is_the_same_over_several_engines(checkpoint: Path) -> None:
    """Real engines: an answer with log-probabilities, a stream, what is said of engines, and a cached beginning."""
    with replicas(checkpoint, starts=False, real=True) as (worker, _):  # the service starts it
        service = Service(
            worker=worker,
            tokenizer=Tokenizer.load(checkpoint),
            chat_format=load_format(checkpoint),
            model_name="tiny",
        )
        with serving(service) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
            asked = {"model": "tiny", "prompt": "It is a truth " * 12, "max_tokens": 6, "temperature": 0.0}
            whole = client.completions.create(**asked, logprobs=1)
            again = client.completions.create(**asked)
            streamed = "".join(event.choices[0].text for event in client.completions.create(**asked, stream=True))
            assert whole.choices[0].text == again.choices[0].text == streamed
            assert again.usage.prompt_tokens_details.cached_tokens > 0
            told = client.get("../metrics", cast_to=str)
            assert 'daedal:engine_up{engine="0"} 1.0' in told
            assert 'daedal:engine_up{engine="1"} 1.0' in told
            assert "daedal:generation_tokens_total 22.0" in told, "18 asked for, and 2 by each engine to be warm"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ray"], "pip install 'daedal[ray]'"),
        (["--replicas", "2", "--prefix-cache-dir", "somewhere"], "--prefix-cache-dir is one engine's"),
        (["--replicas", "0"], "--replicas is 0: it must be from 1 to 64"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "daedal.serve.workers.ray_hosts", raising=False)
    assert app.run(["serve", "no-such-model", "--port", "0", *given]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert said in sentence


def test_numbers_are_summed_and_what_one_does_not_know_is_not_known() -> None:
    def stats(spent: Spent | None, *accepted: int) -> EngineStats:
        return EngineStats(
            num_running=1,
            num_waiting=2,
            pages_used=3,
            pages_total=4,
            kv_bytes_used=5,
            kv_bytes_total=6,
            num_preemptions=7,
            prompt_tokens_total=8,
            generation_tokens_total=9,
            num_accepted_at=accepted,
            spent_total=spent,
        )

    cost = Spent(flops=1.0, kv_byte_seconds=2.0, device_seconds=3.0)
    both = together([stats(cost, 3, 1), stats(cost, 2)])
    assert (both.pages_total, both.num_accepted_at) == (8, (5, 1))
    assert both.spent_total == cost + cost
    assert together([stats(cost), stats(None)]).spent_total is None
