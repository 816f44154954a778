"""A worker whose engine runs in a process of its own, which is started again when it ends.

What a request does to the engine, down to killing its process, is so no end of the server: answers that had begun are
cut with one clear error, requests that had not are kept for the next engine. Where two engines end in a row, the third
gets what waits one by one, so that the request that ends engines is found and cut, and no other. Engines that go on
ending are given up. Knows the other process only by its command and by what it says (`wire`, `engine_host`).
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from daedal.errors import DaedalError, RequestError
from daedal.serve.workers import wire
from daedal.serve.workers.child import Child, EngineLost, Launch, LocalChild
from daedal.serve.workers.desk_worker import DeskWorker
from daedal.serve.workers.worker import GenerationFailed, State, Submission, stopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """most: engines that may end in a row; one that finished an answer breaks the row. seconds: to wait before the
    second start again, doubled with each further one up to most_seconds; the first is at once."""

    most: int = 5
    seconds: float = 0.5
    most_seconds: float = 30.0

    def before(self, num_ended: int) -> float:
        """Seconds before the start that follows the `num_ended`th end in a row."""
        return 0.0 if num_ended <= 1 else min(self.seconds * 2.0 ** (num_ended - 2), self.most_seconds)


class ProcessWorker(DeskWorker):
    """Starts the process at once, and does not wait for it: that is `open`, to be called before `start`.

    command: of a program that calls `engine_host.host` with its last argument. options: what it is asked to make.
    launch: where and how; on this machine if not given.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Mapping[str, JsonValue],
        *,
        patience: Patience | None = None,
        launch: Launch = LocalChild,
    ):
        super().__init__()
        self._command, self._options, self._patience = tuple(command), dict(options), patience or Patience()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._state: State = "starting"
        self._num_ended = self._num_restarts = 0
        self._failure: Exception | None = None
        self._max_context = 0
        self._cautious = False
        self._outbox: wire.Outbox | None = None
        self._launch, self._child = launch, launch(self._command, self._options)
        self._thread = threading.Thread(target=self._run, name="daedal-engine-process", daemon=True)

    def open(self) -> Mapping[str, JsonValue]:
        """Waits until the engine is there; the facts that it tells. Raises the DaedalError by which it cannot be had,
        or EngineLost; then, or when interrupted, the process has ended."""
        try:
            opened = self._child.opened()
        except BaseException:
            self._child.end(0.0)
            self._child.connection.close()
            raise
        self._desk.stats, self._max_context = opened.stats, opened.max_context
        return opened.facts

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def state(self) -> State:
        return self._state

    @property
    def failure(self) -> Exception | None:
        return self._failure

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def pid(self) -> int | None:
        """Of the engine's process, or of the latest one."""
        return self._child.pid

    def start(self) -> None:
        self._attach(self._child)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closing.set()
            self._state = "stopped"
            child = self._child
        child.connection.hang_up()
        self._desk.end(stopped())

    def stop(self, timeout: float) -> bool:
        self.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        ended = self._child.end(timeout)
        if not self._thread.is_alive():
            self._child.connection.close()
        return ended

    def _hand_over(self, submission: Submission) -> None:
        with self._lock:
            if self._state == "stopped":
                raise stopped()
            self._post_waiting()

    def _take_back(self, request_ids: frozenset[str]) -> None:
        with self._lock:
            if self._outbox is not None:
                self._outbox.post(wire.Cancel(request_ids=tuple(request_ids)))
                self._post_waiting()

    def _look(self) -> None:
        with self._lock:
            if self._outbox is not None:
                self._outbox.post(wire.Look())

    def _post_waiting(self) -> None:
        """All that the engine has not got yet, or with caution the first of it; without an engine it waits."""
        if self._outbox is None:
            return
        waiting = [submission for submission in self._desk.waiting() if not submission.begun]
        self._cautious = self._cautious and bool(waiting)
        for submission in waiting[:1] if self._cautious else waiting:
            if submission.handed is not self._outbox:
                submission.handed = self._outbox
                try:
                    self._outbox.post(wire.Submit.of(submission.number, submission.requests))
                except RequestError as error:
                    self._desk.refused(submission.number, error)

    def _attach(self, child: Child) -> None:
        """There is an engine: it gets all that waits."""
        with self._lock:
            if self._closing.is_set():
                return
            self._outbox = wire.Outbox(child.connection)
            self._state = "ready"
            self._cautious = self._num_ended > 1
            self._post_waiting()

    def _run(self) -> None:
        try:
            while self._outlived():
                pass
        except Exception as error:
            logger.exception("the engine's process is no longer looked after")
            self._failure = error
        finally:
            with self._lock:
                self._state = "stopped"
            self._desk.end(stopped())

    def _outlived(self) -> bool:
        """Takes what an engine reports until it ends; whether there is another one then."""
        outbox = self._read(self._child)
        if self._closing.is_set():
            return False
        self._num_ended += 1
        logger.error("the engine's process %s", self._child.ending())
        self._desk.stats = replace(self.stats(), num_running=0, num_waiting=0, pages_used=0, kv_bytes_used=0)
        self._desk.lost(outbox if self._cautious else None)
        return self._started_again()

    def _read(self, child: Child) -> wire.Outbox | None:
        """Takes an engine's reports until it has gone; what led to it."""
        try:
            while (report := child.connection.receive()) is not None:
                self._take(report)
        except wire.WireError as error:
            logger.error("the engine's process is not understood: %s", error)
        with self._lock:
            outbox, self._outbox = self._outbox, None
            if not self._closing.is_set():
                self._state = "restarting"
        child.connection.hang_up()
        if outbox is not None:
            outbox.close()
        return outbox

    def _take(self, report: wire.Report) -> None:
        if isinstance(report, wire.Delivered):
            if any(output.finish_reason in ("stop", "length") for output in report.outputs):
                self._num_ended = 0
            self._desk.delivered(report.outputs, report.stats)
        elif isinstance(report, wire.Accepted):
            self._desk.accepted(report.number)
        elif isinstance(report, wire.Refused):
            defect = GenerationFailed("the engine failed on this request: the cause is in the server's log")
            self._desk.refused(report.number, report.error.raised() or defect)
        elif isinstance(report, wire.Cut):
            self._desk.cut(report.request_ids, refusal=None if report.refusal is None else report.refusal.raised())
        elif isinstance(report, wire.Looked):
            self._desk.looked(report.seen)
        else:
            raise wire.WireError(f"a {report.kind} comes from an engine that is open already")
        if self._cautious:
            with self._lock:
                self._post_waiting()

    def _started_again(self) -> bool:
        """Whether there is another engine; `failure` says why there will be none."""
        while self._num_ended < self._patience.most:
            wait = self._patience.before(self._num_ended)
            logger.warning("the engine is started again in %.1f s", wait)
            if self._closing.wait(wait):
                return False
            try:
                child = self._launch(self._command, self._options)
                with self._lock:
                    self._child.connection.close()
                    self._child = child
                    if self._closing.is_set():
                        return False
                opened = child.opened()
            except (DaedalError, EngineLost, OSError, wire.WireError) as error:
                self._num_ended += 1
                logger.error("%s", error)
                continue
            self._desk.stats, self._max_context = opened.stats, opened.max_context
            self._num_restarts += 1
            self._attach(child)
            return True
        self._failure = EngineLost(
            f"the engine ended {self._num_ended} times without finishing an answer between: the server stops, its log "
            f"says how each of them ended"
        )
        return False
