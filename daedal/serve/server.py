"""A service on a socket: serve, say the address once it is warm, and end in good order when told to.

On SIGTERM or SIGINT the server is no longer ready and refuses what comes; what runs gets its seconds to finish, and is
then cut with an error object. A second signal cuts it at once. Knows nothing of paths and bodies.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from daedal.serve.app import build_app
from daedal.serve.connection import TimedConnection
from daedal.serve.listening import address_of
from daedal.serve.state.service import Service
from daedal.serve.workers.spawning import ignore

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 8.0  # for requests that run when the server is told to end; then the worker cuts them
CUT_SECONDS = 2  # from there until connections are cut too


def _announce(address: str) -> None:
    print(address, flush=True)


def configuration(service: Service) -> uvicorn.Config:
    """How uvicorn serves a service."""
    return uvicorn.Config(
        build_app(service),
        http=TimedConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CUT_SECONDS,
    )


def run(
    service: Service,
    sock: socket.socket,
    *,
    drain_seconds: float = DRAIN_SECONDS,
    announce: Callable[[str], None] = _announce,
) -> None:
    """Serves until SIGTERM or SIGINT; `announce` gets the address once the warm-up is done.

    drain_seconds: that requests then get to finish. Raises what the warm-up generation raised, or by what the last
    engine was lost: then the server ends at once.
    """
    address = address_of(sock)
    with sock, _signals_end_quietly():
        asyncio.run(_run(service, sock, drain_seconds, lambda: announce(address)))


async def _run(service: Service, sock: socket.socket, drain_seconds: float, announce: Callable[[], None]) -> None:
    server = _Server(service, drain_seconds)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    warming = asyncio.create_task(service.warmed.wait())
    await asyncio.wait((serving, warming), return_when=asyncio.FIRST_COMPLETED)
    if warming.done() and service.failure is not None:
        server.should_exit = True
    elif service.ready:
        announce()
    warming.cancel()
    try:
        await serving
    finally:
        await asyncio.to_thread(service.stop)
    if failure := service.failure or service.worker.failure:
        raise failure


class _Server(uvicorn.Server):
    """uvicorn, which goes on serving while what runs has time to finish, and ends when no engine is left."""

    def __init__(self, service: Service, drain_seconds: float):
        super().__init__(configuration(service))
        self._service, self._drain_seconds = service, drain_seconds
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._end)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.worker.failure is not None

    def _end(self) -> None:
        if self._draining is None:
            self._service.draining = True
            self._draining = asyncio.create_task(self._drain())
        else:
            self._service.worker.close()
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self._service.quiet(), self._drain_seconds)
        except TimeoutError:
            logger.warning("requests under way after %.0f s of draining are cut", self._drain_seconds)
        self._service.worker.close()
        self.should_exit = True


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Before uvicorn listens to signals and after, while an engine is being ended, they cut nothing short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
