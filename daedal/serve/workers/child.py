"""One engine's process as the front end has it, from its start to its end: a connection, and how it ended.

It may be a child of this process, as here, or run elsewhere (`ray_hosts`). Knows nothing of what is asked over the
connection beyond the first word, which makes the engine.
"""

import logging
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from pydantic import JsonValue

from daedal.serve.workers import wire
from daedal.serve.workers.spawning import spawned

logger = logging.getLogger(__name__)

END_SECONDS = 5.0  # for a process whose socket is closed already


class EngineLost(RuntimeError):
    """The engine's process ended, and there will be no other."""


class Child(ABC):
    """connection: to the engine's process, which makes an engine by `options` as soon as it runs."""

    def __init__(self, connection: wire.Connection[wire.Command, wire.Report], options: Mapping[str, JsonValue]):
        self.connection = connection
        try:
            connection.send(wire.Open(options=dict(options)))
        except OSError:  # it has ended already, which who waits for it will see
            logger.debug("the engine's process was gone before it was asked")

    @property
    def pid(self) -> int | None:
        """On this machine; None for a process elsewhere."""
        return None

    def opened(self) -> wire.Opened:
        """Waits until the engine is there. A DaedalError says why it cannot be had, EngineLost that it ended."""
        report = self.connection.receive()
        if isinstance(report, wire.Opened):
            return report
        if isinstance(report, wire.NotOpened) and (error := report.error.raised()) is not None:
            raise error
        raise EngineLost(f"the engine's process {self.ending()} before it was ready: see what it said above")

    @abstractmethod
    def ending(self) -> str:
        """How it ended, in words."""

    @abstractmethod
    def end(self, timeout: float) -> bool:
        """Tells it to end by hanging up; False where it had to be killed after `timeout` seconds."""


Launch = Callable[[Sequence[str], Mapping[str, JsonValue]], Child]


class LocalChild(Child):
    """On this machine. command: gets the socket's file descriptor as its last argument."""

    def __init__(self, command: Sequence[str], options: Mapping[str, JsonValue]):
        self._process, ours = spawned(command)
        super().__init__(wire.front_end(ours), options)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ending(self) -> str:
        self.end(END_SECONDS)
        return in_words(self._process.returncode)

    def end(self, timeout: float) -> bool:
        self.connection.hang_up()
        try:
            self._process.wait(timeout)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False


def in_words(status: int) -> str:
    """A process's exit status, as `subprocess` has it."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
