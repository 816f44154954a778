"""What goes between the front end and an engine in a process of its own: typed messages, framed, over one socket.

A frame is a magic that names the version, a length under a cap, and JSON that is read into the dataclasses below, or
not at all: no code, no type by name, nothing pickled. Prompts that several requests share go once; a rule for answers
goes as its grammar, which the other side compiles again. Knows nothing of processes.
"""

import queue
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from daedal import errors
from daedal.errors import DaedalError, DeadlineError, RequestError
from daedal.infer.request import Output, Request, SamplingParams, Structure
from daedal.infer.stats import EngineStats, ExpertsSeen
from daedal.text.structure.masks import CompiledStructure

MAGIC = b"DDL\x01"
MAX_FRAME_BYTES = 64 * 2**20
_HEAD = struct.Struct("!4sI")
_ERRORS: Mapping[str, type[DaedalError]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DaedalError)
}

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class WireError(RuntimeError):
    """The other side sent what is no message: it is not to be trusted with more."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """Make an engine. options: as who wrote the other side's program reads them."""

    options: dict[str, JsonValue]
    kind: Literal["open"] = "open"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request. prompt: which of its submission's prompts. grammar: of a rule that its answer obeys. The rest is as
    in `Request`."""

    id: str
    prompt: int
    params: SamplingParams
    grammar: str | None = None
    cache_salt: str = ""
    priority: int = 0
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Requests that are taken together or not at all."""

    number: int
    prompts: tuple[tuple[int, ...], ...]
    asked: tuple[Asked, ...]
    kind: Literal["submit"] = "submit"

    @classmethod
    def of(cls, number: int, requests: Sequence[Request]) -> "Submit":
        places: dict[tuple[int, ...], int] = {}
        asked = tuple(
            Asked(
                id=request.id,
                prompt=places.setdefault(request.prompt, len(places)),
                params=request.params,
                grammar=_grammar(request.structure),
                cache_salt=request.cache_salt,
                priority=request.priority,
                seconds=request.seconds,
            )
            for request in requests
        )
        return cls(number=number, prompts=tuple(places), asked=asked)

    def requests(self, compiled: Callable[[str], Structure]) -> list[Request]:
        """As the engine takes them. compiled: makes a rule of a grammar."""
        return [
            Request(
                id=one.id,
                prompt=self.prompts[one.prompt],
                params=one.params,
                structure=None if one.grammar is None else compiled(one.grammar),
                cache_salt=one.cache_salt,
                priority=one.priority,
                seconds=one.seconds,
            )
            for one in self.asked
        ]


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Nobody waits for these any more."""

    request_ids: tuple[str, ...]
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, kw_only=True)
class Look:
    """Watch which experts the next steps choose."""

    kind: Literal["look"] = "look"


@dataclass(frozen=True, kw_only=True)
class Told:
    """An error. name: of a class of `daedal.errors`, empty for a defect, which is in the log of who met it. wait: of a
    deadline that cannot be met."""

    name: str
    message: str
    param: str | None = None
    wait: float = 1.0

    @classmethod
    def of(cls, error: Exception) -> "Told":
        if not isinstance(error, DaedalError):
            return cls(name="", message="")
        told = cls(name=type(error).__name__, message=str(error), param=getattr(error, "param", None))
        return replace(told, wait=error.wait) if isinstance(error, DeadlineError) else told

    def raised(self) -> DaedalError | None:
        """The same error on this side; None for a defect."""
        kind = _ERRORS.get(self.name)
        if kind is None:
            return None
        if issubclass(kind, DeadlineError):
            return kind(self.message, wait=self.wait)
        return kind(self.message, param=self.param) if issubclass(kind, RequestError) else kind(self.message)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The engine is there. facts: what else who asked for it wants to know."""

    max_context: int
    stats: EngineStats
    facts: dict[str, JsonValue]
    kind: Literal["opened"] = "opened"


@dataclass(frozen=True, kw_only=True)
class NotOpened:
    """It cannot be had."""

    error: Told
    kind: Literal["not_opened"] = "not_opened"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    number: int
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, kw_only=True)
class Refused:
    number: int
    error: Told
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True, kw_only=True)
class Delivered:
    outputs: tuple[Output, ...]
    stats: EngineStats
    kind: Literal["delivered"] = "delivered"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Nothing more comes of these. refusal: why, where it is the request's doing; None for the engine's."""

    request_ids: tuple[str, ...]
    refusal: Told | None = None
    kind: Literal["cut"] = "cut"


@dataclass(frozen=True, kw_only=True)
class Looked:
    seen: ExpertsSeen
    kind: Literal["looked"] = "looked"


Command = Open | Submit | Cancel | Look
Report = Opened | NotOpened | Accepted | Refused | Delivered | Cut | Looked

_CONFIG = ConfigDict(ser_json_inf_nan="constants")
_COMMANDS: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="kind")], config=_CONFIG)
_REPORTS: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")], config=_CONFIG)


class Connection(Generic[Sent, Received]):
    """Messages over a connected socket. Any thread may send, one may receive."""

    def __init__(self, sock: socket.socket, sends: TypeAdapter[Sent], receives: TypeAdapter[Received]):
        self._sock, self._sends, self._receives = sock, sends, receives
        self._sending = threading.Lock()
        self._arriving = sock.makefile("rb")

    def frame(self, message: Sent) -> bytes:
        """A message as it goes over the wire. RequestError for one beyond the cap."""
        body = self._sends.dump_json(message)
        if len(body) > MAX_FRAME_BYTES:
            raise RequestError(
                f"the request takes {len(body)} bytes to hand over, {MAX_FRAME_BYTES} are allowed: send less",
                param="prompt",
            )
        return _HEAD.pack(MAGIC, len(body)) + body

    def write(self, frame: bytes) -> None:
        """Blocks until it is on its way; OSError when the other side has gone."""
        with self._sending:
            self._sock.sendall(frame)

    def send(self, message: Sent) -> None:
        """Both: what `frame` and `write` do."""
        self.write(self.frame(message))

    def receive(self) -> Received | None:
        """The next message, None when the other side has gone. WireError for anything else."""
        try:
            head = self._arriving.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return None
            magic, size = _HEAD.unpack(head)
            if magic != MAGIC or size > MAX_FRAME_BYTES:
                raise WireError(f"a frame begins with {head!r}: that is none of ours")
            body = self._arriving.read(size)
        except OSError:
            return None
        if len(body) < size:
            return None
        try:
            return self._receives.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise WireError(f"a frame holds no message ({first['loc']}: {first['msg']})") from error

    def hang_up(self) -> None:
        """Both sides receive nothing more; may be called from any thread, and again."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was quicker
            return

    def close(self) -> None:
        """Gives the socket back; for who no longer receives."""
        self._arriving.close()
        self._sock.close()


def front_end(sock: socket.socket) -> Connection[Command, Report]:
    """The side that commands."""
    return Connection(sock, _COMMANDS, _REPORTS)


def engine_side(sock: socket.socket) -> Connection[Report, Command]:
    """The side that reports."""
    return Connection(sock, _REPORTS, _COMMANDS)


class Outbox:
    """Commands on their way: `post` never waits for the other side. Ends with `close`."""

    def __init__(self, connection: Connection[Command, Report]):
        self._connection = connection
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="daedal-outbox", daemon=True)
        self._thread.start()

    def post(self, command: Command) -> None:
        """RequestError for one beyond the cap."""
        self._frames.put(self._connection.frame(command))

    def close(self) -> None:
        """Waits for what is being sent, which a connection that was hung up ends."""
        self._frames.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                self._connection.write(frame)
            except OSError:  # the engine has gone; who receives will notice
                return


def _grammar(structure: Structure | None) -> str | None:
    if structure is None:
        return None
    assert isinstance(structure, CompiledStructure), "only rules with a grammar can go to another process"
    return structure.grammar
