"""A worker whose engine runs in a thread of this process: for batches, tests, and whoever has an engine at hand.

Knows nothing of HTTP, tokens' text or models.
"""

import threading
from typing import TYPE_CHECKING

from daedal.serve.workers.desk_worker import DeskWorker
from daedal.serve.workers.engine_loop import EngineLoop
from daedal.serve.workers.worker import State, Submission, stopped

if TYPE_CHECKING:
    from daedal.infer.engine import Engine


class ThreadWorker(DeskWorker):
    """Owns `engine`, which nobody else may use any more."""

    def __init__(self, engine: "Engine"):
        super().__init__(engine.stats())
        self._max_context = engine.max_context
        self._loop = EngineLoop(engine, self._desk)
        self._thread = threading.Thread(target=self._run, name="daedal-engine", daemon=True)

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def state(self) -> State:
        if not self._loop.open:
            return "stopped"
        return "starting" if self._thread.ident is None else "ready"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._loop.close()

    def stop(self, timeout: float) -> bool:
        self.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run()
        self._desk.end(stopped())

    def _hand_over(self, submission: Submission) -> None:
        if not self._loop.submit(submission.number, submission.requests):
            raise stopped()

    def _take_back(self, request_ids: frozenset[str]) -> None:
        self._loop.cancel(request_ids)

    def _look(self) -> None:
        self._loop.look()
