"""A service on a socket: bind, serve, say the address once it is warm, and end in good order when told to.

On SIGTERM or SIGINT no request is taken any more, those that run get a few seconds and are then cut with an error
object. Knows nothing of paths and bodies.
"""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from daedal.errors import DaedalError
from daedal.serve.app import build_app
from daedal.serve.service import Service

GRACE_SECONDS = 3.0  # for requests that run when the server is told to end; then the worker cuts them
CUT_SECONDS = 2  # from there until connections are cut too
BACKLOG = 2048


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A listening socket; port 0 picks a free one. DaedalError when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise DaedalError(f"port is {port}: it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise DaedalError(
            f"the host {host!r} cannot be resolved ({error.strerror}): give another with --host"
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        sentence = f"port {port} on {host} cannot be used ({error.strerror}): give another with --port"
        raise DaedalError(sentence) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL under which this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(address: str) -> None:
    print(address, flush=True)


def run(service: Service, sock: socket.socket, *, announce: Callable[[str], None] = _announce) -> None:
    """Serves until SIGTERM or SIGINT; `announce` gets the address once the warm-up is done.

    Raises what the warm-up generation raised: then the server ends at once.
    """
    address = address_of(sock)
    with sock, _signals_end_quietly():
        asyncio.run(_run(service, sock, lambda: announce(address)))


async def _run(service: Service, sock: socket.socket, announce: Callable[[], None]) -> None:
    server = _Server(service)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    warming = asyncio.create_task(service.warmed.wait())
    await asyncio.wait((serving, warming), return_when=asyncio.FIRST_COMPLETED)
    if warming.done() and service.failure is not None:
        server.should_exit = True
    elif service.ready:
        announce()
    warming.cancel()
    await serving
    if service.failure is not None:
        raise service.failure


class _Server(uvicorn.Server):
    """uvicorn, which tells the service when it is asked to end."""

    def __init__(self, service: Service):
        config = uvicorn.Config(
            build_app(service),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(GRACE_SECONDS) + CUT_SECONDS,
        )
        super().__init__(config)
        self._service = service
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._loop.call_later, GRACE_SECONDS, self._service.worker.close)


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises a signal again once it has served it; here that must not end the process a second time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Stands for `signal.SIG_IGN`, which a child process would inherit."""
