"""One engine and what is asked of it: obeys, steps, and reports, in the thread that calls `run`.

That thread alone adds, cancels and steps, and sleeps on a condition while there is nothing to do; commands come from
any other. Where reports go, to another thread or another process, it does not know.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from daedal.infer.request import Output, Request
from daedal.infer.stats import EngineStats, ExpertsSeen, StepError
from daedal.serve.workers.bundling import Bundle

if TYPE_CHECKING:
    from daedal.infer.engine import Engine

logger = logging.getLogger(__name__)


class Reports(Protocol):
    """Where an engine's reports go. See `worker.Desk`."""

    def accepted(self, number: int) -> None:
        """All requests of a submission were taken."""

    def refused(self, number: int, error: Exception) -> None:
        """None of them was."""

    def delivered(self, outputs: Sequence[Output], stats: EngineStats) -> None:
        """What the latest steps brought, if anything, and the numbers after them."""

    def cut(self, request_ids: Sequence[str], cause: Exception) -> None:
        """The engine failed with these and has dropped them."""

    def looked(self, seen: ExpertsSeen) -> None:
        """What the engine saw when it was to look."""


@dataclass(frozen=True)
class _Submit:
    number: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class _Cancel:
    request_ids: frozenset[str]


@dataclass(frozen=True)
class _Look:
    """Has nothing more to say."""


class EngineLoop:
    """Runs `engine` for whoever commands."""

    def __init__(self, engine: "Engine", reports: Reports):
        self._engine, self._reports = engine, reports
        self._wake = threading.Condition()
        self._commands: deque[_Submit | _Cancel | _Look] = deque()
        self._looks = False
        self._live: set[str] = set()
        self._open = True
        self._bundle = Bundle(time.monotonic)
        self._told: EngineStats | None = None
        engine.heed(lambda: bool(self._commands) or not self._open)

    @property
    def open(self) -> bool:
        """False once it was closed or its engine is beyond use."""
        return self._open

    def submit(self, number: int, requests: Sequence[Request]) -> bool:
        """All of these or none; the report bears `number`. False when it takes no commands any more."""
        return self._command(_Submit(number, tuple(requests)))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends these; ids that are not running are ignored."""
        self._command(_Cancel(frozenset(request_ids)))

    def look(self) -> None:
        """Watches the next steps; the report comes once they ran."""
        self._command(_Look())

    def close(self) -> None:
        """Ends `run` when the step under way is over."""
        with self._wake:
            self._open = False
            self._wake.notify()

    def run(self) -> bool:
        """Until closed; False when the engine is beyond use."""
        try:
            while self._turn():
                pass
            return True
        except Exception:
            logger.exception("the engine is beyond use: no request is taken any more")
            return False
        finally:
            self.close()

    def _command(self, command: _Submit | _Cancel | _Look) -> bool:
        with self._wake:
            if self._open:
                self._commands.append(command)
                self._wake.notify()
            return self._open

    def _turn(self) -> bool:
        """Obeys what was commanded, makes one step; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or not self._open or self._engine.has_work)
            if not self._open:
                return False
        while (command := self._next_command()) is not None:
            if isinstance(command, _Submit):
                self._submit(command)
            elif isinstance(command, _Cancel):
                self._cancel(command.request_ids)
            else:
                self._looks = True
                self._engine.look()
        outputs = self._step() if self._engine.has_work else []
        if self._bundle.add(outputs) or not self._engine.has_work:
            self._tell()
        if self._looks and (seen := self._engine.seen()) is not None:
            self._looks = False
            self._reports.looked(seen)
        return True

    def _tell(self) -> None:
        """All that was not told yet."""
        outputs, stats = self._bundle.take(), self._engine.stats()
        if outputs or stats != self._told:
            self._told = stats
            self._reports.delivered(outputs, stats)

    def _next_command(self) -> _Submit | _Cancel | _Look | None:
        with self._wake:
            return self._commands.popleft() if self._commands else None

    def _submit(self, command: _Submit) -> None:
        added: list[str] = []
        try:
            self._engine.check_room(len(command.requests))
            for request in command.requests:
                self._engine.add(request)
                added.append(request.id)
        except Exception as error:
            self._reports.refused(command.number, error)
            for request_id in added:
                self._engine.cancel(request_id)
            return
        self._live.update(added)
        self._reports.accepted(command.number)

    def _cancel(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id in self._live:
                self._live.discard(request_id)
                self._engine.cancel(request_id)

    def _step(self) -> list[Output]:
        try:
            outputs = self._engine.step()
        except StepError as error:  # the engine dropped these itself and goes on with the others
            logger.exception("a step of the engine failed: %d requests are cut", len(error.request_ids))
            self._live.difference_update(error.request_ids)
            self._cut(error.request_ids, error)
            return []
        except Exception as error:
            if not self._live:  # nothing left to blame: another try would fail for ever
                raise
            logger.exception("the engine failed: all %d requests are cut", len(self._live))
            dropped = tuple(self._live)
            self._cancel(dropped)
            self._cut(dropped, error)
            return []
        self._live.difference_update(output.request_id for output in outputs if output.finish_reason is not None)
        return outputs

    def _cut(self, request_ids: Sequence[str], error: Exception) -> None:
        self._tell()  # what came before the failure
        self._bundle.drop(request_ids)
        self._reports.cut(request_ids, error)
