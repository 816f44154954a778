"""Engines on the machines of a Ray cluster: Ray says where there is room for one, and what has become of it.

The front end is where it always is. Over Ray goes a start order, an address with a token of one use, and at the end an
exit status; the engine's process connects to that address, and from there on both speak as on one machine (`wire`). So
no prompt and no answer passes through Ray, which pickles what it carries. Frames are not encrypted between machines: a
cluster's network is trusted, as Ray itself trusts it.
"""

import logging
import secrets
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from pydantic import JsonValue
from ray.exceptions import RayError

from daedal.errors import BackendError
from daedal.serve.workers import wire
from daedal.serve.workers.child import END_SECONDS, Child, EngineLost, in_words
from daedal.serve.workers.spawning import started

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
TOKEN_SECONDS = 5.0  # for whoever connects to show one
CONNECT_SECONDS = 20.0  # from another machine
PLACE_SECONDS = 120.0  # for Ray to find room and start a process


class EngineHost:
    """What Ray runs beside each engine: starts its process, and waits for it."""

    def run(self, arguments: Sequence[str], address: tuple[str, int], token: bytes) -> int:
        """The status of `python ARGUMENTS DESCRIPTOR`; the descriptor is a connection to `address`, past the token."""
        with socket.create_connection(address, CONNECT_SECONDS) as sock:
            sock.settimeout(None)
            _prepare(sock)
            sock.sendall(token)
            process = started([sys.executable, *arguments], sock)
        return process.wait()


class Cluster:
    """The Ray cluster of RAY_ADDRESS, else the one that runs here, else a new one on this machine.

    engines: how many are to find room; processes: of each, every one with a GPU of its own where the cluster has any
    and `on_gpus` is not False, else each engine has its share of the CPUs. BackendError where no cluster answers.
    """

    def __init__(self, *, engines: int, processes: int = 1, on_gpus: bool = True):
        join()
        self._room = room(engines, processes, on_gpus=on_gpus)
        self._lock = threading.Lock()
        self._expected: dict[bytes, Future[socket.socket]] = {}
        self._listening = socket.create_server((ray.util.get_node_ip_address(), 0))
        threading.Thread(target=self._accept, name="daedal-ray-engines", daemon=True).start()

    def launch(self, command: Sequence[str], options: Mapping[str, JsonValue]) -> Child:
        """An engine's process by `command`, whose interpreter is the one of its machine. EngineLost where there is no
        room for it.
        """
        return RayChild(self, command, options)

    def place(self, command: Sequence[str]) -> tuple[Any, Any, socket.socket]:
        """A host, what its engine's status will be, and the engine's connection."""
        token, arriving = secrets.token_bytes(TOKEN_BYTES), Future[socket.socket]()
        with self._lock:
            self._expected[token] = arriving
        host = ray.remote(EngineHost).options(**self._room).remote()
        status = host.run.remote(list(command[1:]), self._listening.getsockname()[:2], token)
        try:
            return host, status, arriving.result(PLACE_SECONDS)
        except TimeoutError:
            ended, _ = ray.wait([status], timeout=0)
            ray.kill(host)
            if ended:
                raise EngineLost(
                    f"an engine that Ray started did not connect to {self._listening.getsockname()[0]} within "
                    f"{PLACE_SECONDS:.0f} s and has ended: open this machine's ports to the cluster, or see Ray's log"
                ) from None
            room = ", ".join(f"{name} {count:g}" for name, count in self._room.items())
            raise EngineLost(
                f"Ray found no room for an engine ({room}) within {PLACE_SECONDS:.0f} s: add machines, or ask for fewer"
            ) from None
        finally:
            with self._lock:
                self._expected.pop(token, None)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listening.accept()
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        """Whoever shows a token that is expected; it is good for once."""
        sock.settimeout(TOKEN_SECONDS)
        try:
            token = _read(sock, TOKEN_BYTES)
        except OSError:
            token = b""
        with self._lock:
            arriving = self._expected.pop(token, None)
        if arriving is None:
            logger.warning("somebody connected who is no engine")
            sock.close()
            return
        sock.settimeout(None)
        _prepare(sock)
        arriving.set_result(sock)


class RayChild(Child):
    """An engine's process on some machine of the cluster."""

    def __init__(self, cluster: Cluster, command: Sequence[str], options: Mapping[str, JsonValue]):
        self._host, self._status, sock = cluster.place(command)
        super().__init__(wire.front_end(sock), options)
        threading.Thread(target=self._watch, name="daedal-ray-engine", daemon=True).start()

    def ending(self) -> str:
        if not self.end(END_SECONDS):
            return "did not end, and was killed"
        try:
            return in_words(ray.get(self._status))
        except RayError as error:
            return f"was lost with its host ({type(error).__name__})"

    def end(self, timeout: float) -> bool:
        self.connection.hang_up()
        ended, _ = ray.wait([self._status], timeout=timeout)
        ray.kill(self._host)  # gives its room back
        return bool(ended)

    def _watch(self) -> None:
        """A host that is lost takes its room with it: an engine that it left behind must not go on."""
        ray.wait([self._status])
        self.connection.hang_up()


def join() -> None:
    """From now on this process belongs to a cluster. BackendError where none answers or starts."""
    try:
        ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
    except Exception as error:  # Ray has no kind of its own for a cluster that does not start
        raise BackendError(f"no Ray cluster can be had ({error}): check RAY_ADDRESS, or leave --ray out") from error


def room(engines: int, processes: int, *, on_gpus: bool) -> dict[str, float]:
    """What Ray is to keep for each engine. Of CPUs an even share, at most what one machine has."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if on_gpus and any(machine.get("GPU", 0) for machine in machines):
        return {"num_gpus": processes, "num_cpus": 1}
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    return {"num_gpus": 0, "num_cpus": max(min(sum(cpus) // engines, max(cpus)), 1)}


def _prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine may go without a word


def _read(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := sock.recv(size - len(found))):
        found += more
    return found
