"""A service on a real socket, for as long as a `with` block lasts."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from daedal.checkpoint.load import load
from daedal.infer.engine import Engine
from daedal.serve.listening import address_of, bind
from daedal.serve.server import configuration
from daedal.serve.state.service import Service
from daedal.serve.workers.process_worker import Patience
from daedal.serve.workers.thread_worker import ThreadWorker
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer
from tests.serve.hosted import started
from tests.serve.scripted import ScriptedEngine

MODEL = "tiny"


@contextmanager
def serving(service: Service, *, send_buffer: int | None = None) -> Iterator[str]:
    """The address of `service`, warm, on a free port. send_buffer: bytes, of each connection."""
    sock = bind(port=0)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(configuration(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield _once_ready(service, address_of(sock))
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not end"


def _once_ready(service: Service, address: str) -> str:
    with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=20) as client:
        for _ in range(6000):
            if client.get(f"{address}/ready").status_code == 200:
                return address
            if service.failure is not None:
                raise service.failure
            threading.Event().wait(0.005)
    raise AssertionError("the server did not become ready")


def real_service(directory: Path, *, chat: bool = True, **engine: int) -> Service:
    tokenizer = Tokenizer.load(directory)
    return Service(
        worker=ThreadWorker(Engine(load(directory), tokenizer=tokenizer, **engine)),
        tokenizer=tokenizer,
        chat_format=load_format(directory) if chat else None,
        model_name=MODEL,
        total_params=1000,
        active_params=250,
    )


def hosted_service(directory: Path, **options: object) -> Service:
    """Two processes: this one serves, the other has the engine."""
    return Service(
        worker=started(directory, patience=Patience(seconds=0.0), **options),
        tokenizer=Tokenizer.load(directory),
        chat_format=load_format(directory),
        model_name="tiny",
    )


def scripted_service(
    directory: Path, engine: ScriptedEngine, *, chat: bool = True, chat_format: str | None = None
) -> Service:
    return Service(
        worker=ThreadWorker(engine),
        tokenizer=Tokenizer.load(directory),
        chat_format=load_format(directory, chat_format=chat_format) if chat else None,
        model_name=MODEL,
        total_params=671_000_000_000,
        active_params=37_000_000_000,
    )


def events(body: str) -> list[dict]:
    """The JSON objects of a stream of server-sent events, which must end with `[DONE]`."""
    data = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]
