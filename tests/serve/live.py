"""A service on a real socket, for as long as a `with` block lasts, and an engine that says what it is told."""

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from daedal.checkpoint.load import load
from daedal.errors import OverloadError, RequestError
from daedal.infer.engine import Engine
from daedal.infer.request import Output, Request
from daedal.infer.stopping import Ending
from daedal.serve.app import build_app
from daedal.serve.server import address_of, bind
from daedal.serve.service import Service
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer

MODEL = "tiny"


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of `service`, warm, on a free port."""
    sock = bind(port=0)
    config = uvicorn.Config(build_app(service), http="h11", ws="none", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
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
        engine=Engine(load(directory), tokenizer=tokenizer, **engine),
        tokenizer=tokenizer,
        chat_format=load_format(directory) if chat else None,
        model_name=MODEL,
        total_params=1000,
        active_params=250,
    )


@dataclass(frozen=True)
class Stats:
    num_running: int
    num_waiting: int = 0
    pages_used: int = 0
    pages_total: int = 64
    kv_bytes_used: int = 0
    kv_bytes_total: int = 96 * 2**20
    num_preemptions: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    num_drafts_total: int = 0
    num_drafted_total: int = 0
    num_accepted_total: int = 0
    num_accepted_at: tuple[int, ...] = ()
    spent_total: None = None


class ScriptedEngine:
    """Answers with the ids of a script, `ids_per_step` at once, after `before_step`; has the real engine's surface.

    cancelled: set when a request was cancelled.
    """

    max_context = 2**30

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[Request], Iterable[int]],
        *,
        before_step: Callable[[], object] = lambda: None,
        max_live: int | None = None,
        ids_per_step: int = 1,
    ):
        self._tokenizer = tokenizer
        self._script = script
        self._before_step = before_step
        self._max_live = max_live
        self.ids_per_step = ids_per_step
        self._live: dict[str, tuple[Iterator[int], Ending]] = {}
        self._num_generated = 0
        self.cancelled = threading.Event()

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def check_room(self, count: int) -> None:
        if self._max_live is not None and len(self._live) + count > self._max_live:
            raise OverloadError("all places are taken: try again later")

    def add(self, request: Request) -> None:
        if any(token >= self._tokenizer.vocab_size for token in request.prompt):
            raise RequestError("prompt holds an id beyond the vocabulary: give smaller ones", param="prompt")
        self.check_room(1)
        ids = itertools.chain(self._script(request), self._tokenizer.eos_ids)
        ending = Ending(
            request.params,
            end_ids=self._tokenizer.eos_ids,
            room=ScriptedEngine.max_context,
            detokenizer=self._tokenizer.detokenizer(skip_special_tokens=request.params.skip_special_tokens),
        )
        self._live[request.id] = (iter(ids), ending)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.set()
        return self._live.pop(request_id, None) is not None

    def step(self) -> list[Output]:
        self._before_step()
        outputs = []
        for request_id, (ids, ending) in list(self._live.items()):
            output = Output(request_id=request_id, text="")
            while output.finish_reason is None and len(output.ids) < self.ids_per_step:
                output.ids.append(next(ids))
                text, output.finish_reason = ending.push(output.ids[-1])
                output.text += text
            output.stop = ending.stop_string
            self._num_generated += len(output.ids)
            if output.finish_reason is not None:
                del self._live[request_id]
            outputs.append(output)
        return outputs

    def stats(self) -> Stats:
        live = len(self._live)
        return Stats(
            num_running=live, pages_used=live, kv_bytes_used=live * 2**20, generation_tokens_total=self._num_generated
        )


def scripted_service(
    directory: Path, engine: ScriptedEngine, *, chat: bool = True, chat_format: str | None = None
) -> Service:
    return Service(
        engine=engine,
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
