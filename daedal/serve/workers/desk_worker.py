"""What the workers with one engine share: the desk to which it reports, and how much may wait there. Where the engine
runs is for each of them to say.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from daedal.errors import OverloadError
from daedal.infer.request import Request
from daedal.infer.stats import EngineStats, ExpertsSeen
from daedal.serve.workers.worker import Desk, Stream, Submission, Worker

# Prompts are kept until their answers end. So many tokens of them may be under way, 40 bytes each, whatever the queue
# holds: those of so many contexts, which a queue of short contexts never reaches.
CONTEXTS, LEAST_TOKENS = 32, 2**22
LOOK_SECONDS = 0.5


class DeskWorker(Worker):
    """One engine, and the desk to which it reports."""

    _looked_at = float("-inf")

    def __init__(self, stats: EngineStats | None = None):
        self._desk = Desk(self.cancel, stats)

    def stats(self) -> EngineStats:
        assert self._desk.stats is not None, "asked before there was an engine"
        return self._desk.stats

    def look(self) -> tuple[int, ExpertsSeen]:
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._look()
        return self._desk.looks, self._desk.experts

    @property
    def num_requests(self) -> int:
        return self._desk.num_requests

    async def submit(self, requests: Sequence[Request]) -> Stream:
        most = max(LEAST_TOKENS, CONTEXTS * self.max_context)
        if (held := self._desk.num_prompt_tokens) and held + sum(len(one.prompt) for one in requests) > most:
            raise OverloadError(f"prompts of {held} tokens are under way, the most is {most}: try again later")
        submission = self._desk.enter(requests)
        try:
            self._hand_over(submission)
            await submission.answer.future
        except BaseException:
            submission.stream.close()
            raise
        return submission.stream

    def cancel(self, request_ids: Iterable[str]) -> None:
        ids = frozenset(request_ids)
        self._desk.withdraw(ids)
        self._take_back(ids)

    def _look(self) -> None:
        """Tells the engine to look, where it can be told."""
        return

    @abstractmethod
    def _hand_over(self, submission: Submission) -> None:
        """Gives a submission to the engine; WorkerStopped where there is none and will be none."""

    @abstractmethod
    def _take_back(self, request_ids: frozenset[str]) -> None:
        """Tells the engine that nobody waits for these any more."""
