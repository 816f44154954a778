"""`daedal serve --tensor-parallel-size 2`, but for HTTP: the engine's process, its other rank, and how they end."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from daedal.checkpoint.load import load
from daedal.cli.drafting import Drafting
from daedal.cli.engine import COMMAND, Wish
from daedal.cli.opening import Limits
from daedal.cli.placement import Placement
from daedal.cli.rank import COMMAND as RANK
from daedal.cli.tariff import Rates
from daedal.errors import ConfigError, RequestError
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from daedal.serve.workers.process_worker import Patience, ProcessWorker
from daedal.serve.workers.worker import GenerationFailed, Stream
from tests.tiny import tiny_checkpoint

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ranks") / "tiny", "deepseek_v3", max_position_embeddings=2048)


def started(checkpoint: Path, ranks: int) -> ProcessWorker:
    wish = Wish(
        model=str(checkpoint),
        device="cpu",
        dtype="float32",
        weights="auto",
        chat_format=None,
        limits=Limits(cache_gb=0.01, max_batch=4),
        drafting=Drafting(speculate=None, draft_tokens=None),
        rates=Rates(hardware=None, prices=None, price=None),
        placement=Placement(ranks=ranks),
    )
    worker = ProcessWorker(COMMAND, wish.options(), patience=Patience(seconds=0.0))
    worker.open()
    return worker


@pytest.fixture
def shared(checkpoint: Path) -> Iterator[ProcessWorker]:
    worker = started(checkpoint, 2)
    worker.start()
    yield worker
    (rank,) = ranks_of(worker)
    assert worker.stop(timeout=30)
    rank.wait(timeout=10)


def ranks_of(worker: ProcessWorker) -> list[psutil.Process]:
    return [child for child in psutil.Process(worker.pid).children() if RANK[-1] in child.cmdline()]


async def ids_of(stream: Stream) -> list[int]:
    return [token async for output in stream for token in output.ids]


def request(name: str, max_tokens: int = 12) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(id=name, prompt=PROMPT, params=params)


def test_the_same_answer_and_a_rank_that_is_killed_is_an_engine_that_ended(
    checkpoint: Path, shared: ProcessWorker
) -> None:
    """What had begun gets one error; what comes after it is answered by a new engine with a new rank."""
    (output,) = Engine(load(checkpoint), cache_bytes=10**7).generate([PROMPT], PARAMS)

    async def scenario() -> None:
        assert await ids_of(await shared.submit([request("a")])) == output.ids
        first, (rank,) = psutil.Process(shared.pid), ranks_of(shared)
        begun = await shared.submit([request("b", 1900)])
        await anext(begun)
        rank.send_signal(signal.SIGINT)  # a terminal's, for the whole group: not for a rank
        rank.kill()
        with pytest.raises(GenerationFailed, match="the engine ended while this request was in it"):
            await ids_of(begun)
        first.wait(timeout=10)
        assert await ids_of(await shared.submit([request("c")])) == output.ids
        assert (shared.num_restarts, shared.state) == (1, "ready")
        assert ranks_of(shared) != [rank]

    asyncio.run(scenario())


def test_a_model_that_cannot_be_shared_says_why(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads is 6, which 4 processes cannot share evenly"):
        started(checkpoint, 4)


@pytest.mark.parametrize(
    ("given", "named"), [({"ranks": 0}, "--tensor-parallel-size"), ({"replicas": 65}, "--replicas")]
)
def test_numbers_that_no_server_has(given: dict[str, int], named: str) -> None:
    with pytest.raises(RequestError, match=f"{named} is"):
        Placement(**given)
