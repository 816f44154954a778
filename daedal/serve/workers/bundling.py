"""Several steps' outputs in one report: how often who waits for answers is woken while they grow.

Every report wakes another thread or process, which takes a core that the kernels' threads have. So what comes within a
moment of the last report waits for the next step, and goes with it. What somebody may be waiting for never does: the
first of an answer and its end. Knows nothing of where reports go.
"""

from collections.abc import Callable, Iterable, Sequence

from daedal.infer.request import Output

REPORT_SECONDS = 0.04  # 25 times a second, as films do: to a reader's eye at once


class Bundle:
    """What an engine brought and nobody was told yet. seconds: that are to lie between two reports. clock: gives
    seconds."""

    def __init__(self, clock: Callable[[], float], seconds: float = REPORT_SECONDS):
        self._clock, self._seconds = clock, seconds
        self._outputs: dict[str, Output] = {}
        self._begun: set[str] = set()
        self._told = float("-inf")

    def add(self, outputs: Sequence[Output]) -> bool:
        """What a step brought; True when it is time to `take` all that waits."""
        urgent = False
        for output in outputs:
            name = output.request_id
            urgent |= output.finish_reason is not None or name not in self._begun
            self._begun.add(name)
            if output.finish_reason is not None:
                self._begun.discard(name)
            if name in self._outputs:
                self._outputs[name].extend(output)
            else:
                self._outputs[name] = output
        return urgent or self._clock() - self._told >= self._seconds

    def take(self) -> list[Output]:
        """All that waits, one output for each request."""
        outputs, self._outputs = list(self._outputs.values()), {}
        self._told = self._clock()
        return outputs

    def drop(self, request_ids: Iterable[str]) -> None:
        """These have ended without a last output."""
        self._begun.difference_update(request_ids)
