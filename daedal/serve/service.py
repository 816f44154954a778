"""What a running server has: an engine in its worker, a tokenizer, perhaps a chat format, and counters.

It is built from ready objects: who loads models and from where is not its business. Knows nothing of HTTP.
"""

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daedal.cost.spending import Tariff
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from daedal.serve.keys import Keys
from daedal.serve.metrics import Metrics
from daedal.serve.stored import StoredResponses
from daedal.serve.worker import Worker
from daedal.text.chat import ChatFormat
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STOP_SECONDS = 3.0


@dataclass(kw_only=True, eq=False)
class Service:
    """One model on offer.

    model_name: what clients call it; aliases: other names that they may use, such as its path. chat_format: None for a
    model that only completes text. total_params and active_params: of the model, for the page; None where unknown.
    keys: who may ask; None for anybody. tariff: the engine's; None where it counts no costs. shows_cost: in every
    answer, also where nobody asks. compared: of `ancestry`, for the page.
    """

    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    chat_format: ChatFormat | None = None
    aliases: frozenset[str] = frozenset()
    total_params: int | None = None
    active_params: int | None = None
    keys: Keys | None = None
    tariff: Tariff | None = None
    shows_cost: bool = False
    compared: Sequence[Mapping[str, Any]] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.worker = Worker(self.engine)
        self.metrics = Metrics(self.worker.stats, self.model_name)
        self.stored = StoredResponses()
        self.structures = Structures(self.tokenizer)
        self.warmed = asyncio.Event()
        self.failure: Exception | None = None
        identity = f"{self.model_name}/{self.total_params}/{self.max_context}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.max_context

    @property
    def ready(self) -> bool:
        """True from the end of the warm-up until the server begins to stop."""
        return self.warmed.is_set() and self.failure is None and self.worker.running

    async def warm_up(self) -> None:
        """One short generation, so that the first user does not pay for lazy set-up; sets `warmed` in any case."""
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else 0
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        request = Request(id=f"warmup-{uuid.uuid4().hex}", prompt=(first,), params=params)
        try:
            stream = await self.worker.submit([request])
            async for _ in stream:
                pass
        except Exception as error:
            logger.exception("the warm-up generation failed")
            self.failure = error
        finally:
            self.warmed.set()

    def stop(self) -> None:
        """Cuts what runs and ends the worker's thread; blocks for a few seconds at most."""
        if not self.worker.stop(STOP_SECONDS):
            logger.warning("the engine's last step was not over after %.0f s: it is left behind", STOP_SECONDS)

    def snapshot(self) -> dict[str, object]:
        """The numbers that the page shows."""
        stats = self.worker.stats()
        return {
            "model": self.model_name,
            "ready": self.ready,
            "chat": self.chat_format is not None,
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
            "num_drafted_total": stats.num_drafted_total,
            "num_accepted_total": stats.num_accepted_total,
        }
