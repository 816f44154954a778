"""The engine's side of two processes: makes the engine that is asked for, and runs it while somebody is there to ask.

It listens to nothing but its socket: signals that a terminal sends to the whole group are the front end's business, and
when the front end has gone, however it went, so has this process. Knows nothing of HTTP and of how models are loaded.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from pydantic import JsonValue

from daedal.errors import DaedalError, RequestError
from daedal.infer.request import Output, Structure
from daedal.infer.stats import EngineStats, ExpertsSeen
from daedal.serve.workers import wire
from daedal.serve.workers.engine_loop import EngineLoop
from daedal.serve.workers.spawning import outlive_signals

if TYPE_CHECKING:
    from daedal.infer.engine import Engine

logger = logging.getLogger(__name__)

LAST_STEP_SECONDS = 2.0  # for the step under way, or the loading, once the front end has gone


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """compiled: makes a rule for answers of its grammar. facts: what the front end wants to know besides."""

    engine: "Engine"
    compiled: Callable[[str], Structure]
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


Make = Callable[[Mapping[str, JsonValue]], Hosted]


def host(descriptor: int, make: Make) -> NoReturn:
    """Serves the front end at the other end of the socket `descriptor`, and then ends the process, at once: seconds in
    which an interpreter full of tensors takes itself apart are the front end's to wait for.

    make: an engine by the options that the front end sends; a DaedalError of it is told there.
    """
    outlive_signals()
    with socket.socket(fileno=descriptor) as sock:
        status = _Host(wire.engine_side(sock)).run(make)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


class _Host:
    """Takes commands in a thread, and sends what the engine's loop reports."""

    def __init__(self, connection: wire.Connection[wire.Report, wire.Command]):
        self._connection = connection
        self._loop: EngineLoop | None = None
        self._compiled: Callable[[str], Structure] | None = None
        self._ended = threading.Event()

    def run(self, make: Make) -> int:
        asked = self._connection.receive()
        if not isinstance(asked, wire.Open):
            return 1
        threading.Thread(target=self._obey, name="daedal-commands", daemon=True).start()
        try:
            hosted = make(asked.options)
            engine = hosted.engine
            self._compiled, self._loop = hosted.compiled, EngineLoop(engine, self)
            facts = dict(hosted.facts)
            self._report(wire.Opened(max_context=engine.max_context, stats=engine.stats(), facts=facts))
            sound = self._loop.run()
            engine.close()
            return 0 if sound else 1
        except DaedalError as error:
            logger.debug("the engine cannot be had", exc_info=error)
            self._report(wire.NotOpened(error=wire.Told.of(error)))
            return 2
        except Exception as error:
            logger.exception("the engine could not be made")
            self._report(wire.NotOpened(error=wire.Told.of(error)))
            return 1
        finally:
            self._ended.set()

    def accepted(self, number: int) -> None:
        self._report(wire.Accepted(number=number))

    def refused(self, number: int, error: Exception) -> None:
        if not isinstance(error, DaedalError):
            logger.error("a request could not be taken", exc_info=error)
        self._report(wire.Refused(number=number, error=wire.Told.of(error)))

    def delivered(self, outputs: Sequence[Output], stats: EngineStats) -> None:
        try:
            self._report(wire.Delivered(outputs=tuple(outputs), stats=stats))
        except RequestError:  # together they are more than a frame holds
            for output in outputs:
                self._deliver(output, stats)

    def _deliver(self, output: Output, stats: EngineStats) -> None:
        """One output by itself. Where it alone is more than a frame holds, as log-probabilities of a long prompt may
        be, its request is cut.
        """
        try:
            self._report(wire.Delivered(outputs=(output,), stats=stats))
        except RequestError:
            assert self._loop is not None, "an engine delivers from its loop"
            self._loop.cancel([output.request_id])
            sentence = f"the answer takes more than {wire.MAX_FRAME_BYTES} bytes to hand over: ask for fewer logprobs"
            refusal = wire.Told.of(RequestError(sentence, param="logprobs"))
            self._report(wire.Cut(request_ids=(output.request_id,), refusal=refusal))

    def cut(self, request_ids: Sequence[str], cause: Exception) -> None:
        self._report(wire.Cut(request_ids=tuple(request_ids)))

    def looked(self, seen: ExpertsSeen) -> None:
        self._report(wire.Looked(seen=seen))

    def _report(self, report: wire.Report) -> None:
        try:
            self._connection.send(report)
        except OSError:  # nobody is there to be told
            if self._loop is not None:
                self._loop.close()

    def _obey(self) -> None:
        try:
            while (command := self._connection.receive()) is not None:
                self._do(command)
        except wire.WireError:
            logger.exception("the front end is not understood")
        if self._loop is not None:
            self._loop.close()
        if not self._ended.wait(LAST_STEP_SECONDS):
            os._exit(1)

    def _do(self, command: wire.Command) -> None:
        assert self._loop is not None, "commanded before there was an engine"
        assert self._compiled is not None
        if isinstance(command, wire.Cancel):
            self._loop.cancel(command.request_ids)
        elif isinstance(command, wire.Look):
            self._loop.look()
        elif isinstance(command, wire.Submit):
            try:
                requests = command.requests(self._compiled)
            except Exception as error:
                self.refused(command.number, error)
                return
            self._loop.submit(command.number, requests)
