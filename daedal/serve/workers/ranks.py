"""The other processes of an engine whose model several of them hold: started by rank 0, and ended with it.

They live and die together. Rank 0 tells each over a socket what to load; from then on the socket only says that the
other side is there. When rank 0 has gone, so has every rank; when a rank has gone, rank 0's process ends at once, and
who looks after engines starts all of them anew (`process_worker`). What the ranks compute together goes over
`torch.distributed` and is not this module's business. Knows no models.
"""

import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn

from pydantic import Field, JsonValue, TypeAdapter

from daedal.errors import DaedalError
from daedal.serve.workers import wire
from daedal.serve.workers.spawning import outlive_signals, spawned

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holds:
    """A rank has its part of the model."""

    kind: Literal["holds"] = "holds"


Word = Holds | wire.NotOpened
_OPENS: TypeAdapter[wire.Open] = TypeAdapter(wire.Open)
_WORDS: TypeAdapter[Word] = TypeAdapter(Annotated[Word, Field(discriminator="kind")])


class Ranks:
    """Ranks 1 and up, of which each gets one of `options`; from now on this process ends when one of them does."""

    def __init__(self, command: Sequence[str], options: Sequence[Mapping[str, JsonValue]]):
        self._words: queue.SimpleQueue[Word] = queue.SimpleQueue()
        self._count = len(options)
        self.pids: list[int] = []
        for rank, told in enumerate(options, 1):
            process, sock = spawned(command)
            self.pids.append(process.pid)
            connection = wire.Connection(sock, _OPENS, _WORDS)
            connection.send(wire.Open(options=dict(told)))
            watch = threading.Thread(
                target=self._watch, args=(rank, connection), name=f"daedal-rank-{rank}", daemon=True
            )
            watch.start()

    def loaded(self) -> None:
        """Waits until each has its part. A DaedalError says why one cannot."""
        for _ in range(self._count):
            word = self._words.get()
            if isinstance(word, wire.NotOpened):
                raise word.error.raised() or RuntimeError("a rank could not load its part: see what it said above")

    def _watch(self, rank: int, connection: wire.Connection[wire.Open, Word]) -> None:
        while (word := connection.receive()) is not None:
            self._words.put(word)
            if isinstance(word, wire.NotOpened):  # who waits for it tells the front end, and ends this process
                return
        logger.error("rank %d of the engine has ended, so the engine ends", rank)
        _end(1)


def host_rank(descriptor: int, load: Callable[[Mapping[str, JsonValue]], Callable[[], None]]) -> NoReturn:
    """One of them: loads what it is told over the socket `descriptor`, then runs what `load` gave until rank 0 has
    gone. A DaedalError of `load` is told there.
    """
    outlive_signals()
    connection = wire.Connection(socket.socket(fileno=descriptor), _WORDS, _OPENS)
    asked = connection.receive()
    if asked is None:
        _end(1)
    threading.Thread(target=_outlive, args=(connection,), name="daedal-rank-0", daemon=True).start()
    try:
        work = load(asked.options)
        connection.send(Holds())
        work()
    except DaedalError as error:
        connection.send(wire.NotOpened(error=wire.Told.of(error)))
        _end(2)
    except SystemExit as lost:  # by which work says that the ranks are no longer together
        logger.error("%s", lost)
        _end(1)
    except Exception:
        logger.exception("a rank of the engine failed")
        _end(1)
    _end(0)


def _outlive(connection: wire.Connection[Word, wire.Open]) -> None:
    connection.receive()
    _end(0)


def _end(status: int) -> NoReturn:
    """At once: other threads may wait in a sum for a rank that has gone."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
