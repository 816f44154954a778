"""An engine that says what it is told, without torch."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

from daedal.errors import OverloadError, RequestError
from daedal.infer.request import Output, Request
from daedal.infer.stats import EngineStats, ExpertsSeen
from daedal.infer.stopping import Ending
from daedal.text.tokenizer import Tokenizer


class ScriptedEngine:
    """Answers with the ids of a script, `ids_per_step` at once, after `before_step`; has the real engine's surface.

    max_running: requests that a step advances, the first of them. cancelled: set when a request was cancelled. experts:
    what it sees whenever it looks.
    """

    max_context = 2**30

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[Request], Iterable[int]],
        *,
        before_step: Callable[[], object] = lambda: None,
        max_live: int | None = None,
        ids_per_step: int = 1,
        max_running: int | None = None,
    ):
        self._tokenizer = tokenizer
        self._script = script
        self._before_step = before_step
        self._max_live = max_live
        self._max_running = max_running
        self.ids_per_step = ids_per_step
        self._live: dict[str, tuple[Iterator[int], Ending]] = {}
        self._num_generated = 0
        self.cancelled = threading.Event()
        self.experts, self._looked_at = ExpertsSeen(), False

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def heed(self, beckons: Callable[[], bool]) -> None:
        """Its steps are short."""

    def check_room(self, count: int) -> None:
        if self._max_live is not None and len(self._live) + count > self._max_live:
            raise OverloadError("all places are taken: try again later")

    def add(self, request: Request) -> None:
        if any(token >= self._tokenizer.vocab_size for token in request.prompt):
            raise RequestError("prompt holds an id beyond the vocabulary: give smaller ones", param="prompt")
        self.check_room(1)
        ids = itertools.chain(self._script(request), self._tokenizer.eos_ids)
        ending = Ending(
            request.params,
            end_ids=self._tokenizer.eos_ids,
            room=ScriptedEngine.max_context,
            detokenizer=self._tokenizer.detokenizer(skip_special_tokens=request.params.skip_special_tokens),
        )
        self._live[request.id] = (iter(ids), ending)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.set()
        return self._live.pop(request_id, None) is not None

    def step(self) -> list[Output]:
        self._before_step()
        outputs = []
        for request_id, (ids, ending) in list(self._live.items())[: self._max_running]:
            output = Output(request_id=request_id, text="")
            while output.finish_reason is None and len(output.ids) < self.ids_per_step:
                output.ids.append(next(ids))
                text, output.finish_reason = ending.push(output.ids[-1])
                output.text += text
                output.lengths.append(len(text))
            output.stop = ending.stop_string
            self._num_generated += len(output.ids)
            if output.finish_reason is not None:
                del self._live[request_id]
            outputs.append(output)
        return outputs

    def close(self) -> None:
        """There is nothing to end."""

    def look(self) -> None:
        self._looked_at = True

    def seen(self) -> ExpertsSeen | None:
        looked, self._looked_at = self._looked_at, False
        return self.experts if looked else None

    def stats(self) -> EngineStats:
        live = len(self._live)
        return EngineStats(
            num_running=live,
            num_waiting=0,
            pages_used=live,
            pages_total=64,
            kv_bytes_used=live * 2**20,
            kv_bytes_total=96 * 2**20,
            num_preemptions=0,
            prompt_tokens_total=0,
            generation_tokens_total=self._num_generated,
        )
