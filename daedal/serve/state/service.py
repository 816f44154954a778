"""What a running server has: a worker with an engine, a tokenizer, perhaps a chat format, and counters.

It is built from ready objects: who loads models and from where is not its business. Knows nothing of HTTP.
"""

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp

from daedal.cost.spending import Tariff
from daedal.infer.request import Request, SamplingParams
from daedal.serve.state.abilities import abilities
from daedal.serve.state.course import Course
from daedal.serve.state.errors import MOST_WAIT
from daedal.serve.state.keys import Keys
from daedal.serve.state.metrics import Metrics
from daedal.serve.state.stored import StoredResponses
from daedal.serve.workers.worker import Worker
from daedal.text.chat import ChatFormat
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STOP_SECONDS = 3.0
_LATEST = 0.1  # weight of the latest request among those by which that is judged


@dataclass(kw_only=True, eq=False)
class Service:
    """One model on offer.

    worker: runs its engine. model_name: what clients call it; aliases: other names that they may use, such as its path.
    chat_format: None for a model that only completes text. total_params and active_params: of the model, for the page;
    None where unknown. keys: who may ask; None for anybody. max_requests: that the engine takes at once, running and
    waiting, where that is known: more are then refused before they cost anything. max_seconds: of one request, None for
    any number. tariff: the engine's; None where it counts no costs. shows_cost: in every answer, also where nobody
    asks. compared: of `ancestry`, for the page. followers: are told of each request that
    reached the engine, once it is over. layers: what goes around the application.
    """

    worker: Worker
    tokenizer: Tokenizer
    model_name: str
    chat_format: ChatFormat | None = None
    aliases: frozenset[str] = frozenset()
    total_params: int | None = None
    active_params: int | None = None
    keys: Keys | None = None
    max_requests: int | None = None
    max_seconds: float | None = None
    tariff: Tariff | None = None
    shows_cost: bool = False
    compared: Sequence[Mapping[str, Any]] = ()
    followers: Sequence[Callable[[Course], object]] = ()
    layers: Sequence[Callable[[ASGIApp], ASGIApp]] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(
            self.worker.stats,
            self.model_name,
            restarts=lambda: self.worker.num_restarts,
            pid=None if self.worker.pid is None else lambda: self.worker.pid or 0,
            engines=lambda: [(engine.state == "ready", engine.num_requests) for engine in self.worker.engines],
        )
        self.abilities = abilities(self.chat_format)
        self.stored = StoredResponses()
        self.structures = Structures(self.tokenizer)
        self.warmed = asyncio.Event()
        self.failure: Exception | None = None
        self.draining = False
        self._num_under_way = 0
        self._seconds_each = 0.0
        self._quiet = asyncio.Event()
        self._quiet.set()
        identity = f"{self.model_name}/{self.total_params}/{self.max_context}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.worker.max_context

    @property
    def ready(self) -> bool:
        """True from the end of the warm-up until the server begins to stop, but for the time without an engine."""
        usable = self.failure is None and not self.draining
        return self.warmed.is_set() and usable and self.worker.state == "ready"

    def begun(self) -> None:
        """A request has been handed to the engine."""
        self._num_under_way += 1
        self._quiet.clear()

    def ended(self, seconds: float) -> None:
        """Its answer is over, so many seconds after it was handed over."""
        self._seconds_each += _LATEST * (seconds - self._seconds_each)
        self._num_under_way -= 1
        if not self._num_under_way:
            self._quiet.set()

    @property
    def seconds_to_wait(self) -> int:
        """After which a client may come back that finds no place: in so long about half of those who are here have
        gone, by how long the latest stayed."""
        return min(max(math.ceil(self._seconds_each / 2), 1), MOST_WAIT)

    async def quiet(self) -> None:
        """Returns once no answer is under way."""
        await self._quiet.wait()

    async def warm_up(self) -> None:
        """One short generation by each engine, so that nobody pays for lazy set-up; sets `warmed` in any case."""
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else 0
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        try:
            for engine in self.worker.engines:
                request = Request(id=f"warmup-{uuid.uuid4().hex}", prompt=(first,), params=params)
                stream = await engine.submit([request])
                async for _ in stream:
                    pass
        except Exception as error:
            logger.exception("the warm-up generation failed")
            self.failure = error
        finally:
            self.warmed.set()

    def stop(self) -> None:
        """Cuts what runs and ends the engine; blocks for a few seconds at most, and may be called again."""
        if not self.worker.stop(STOP_SECONDS):
            logger.warning("the engine had not ended after %.0f s: it is not waited for", STOP_SECONDS)

    def snapshot(self) -> dict[str, object]:
        """The numbers that the page shows."""
        stats = self.worker.stats()
        return {
            "model": self.model_name,
            "ready": self.ready,
            "chat": self.chat_format is not None,
            "abilities": self.abilities,
            "counts_cost": self.tariff is not None,
            "max_context": self.max_context,
            "total_params": self.total_params,
            "active_params": self.active_params,
            "compared": list(self.compared),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_bytes_used": stats.kv_bytes_used,
            "kv_bytes_total": stats.kv_bytes_total,
            "prompt_tokens_total": stats.prompt_tokens_total,
            "generation_tokens_total": stats.generation_tokens_total,
            "prefix_queries_total": stats.prefix_queries_total,
            "prefix_hits_total": stats.prefix_hits_total,
            "num_drafted_total": stats.num_drafted_total,
            "num_accepted_total": stats.num_accepted_total,
        }
