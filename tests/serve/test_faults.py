"""What goes wrong out there: an engine that dies, clients that leave, stall or send bombs, more work than room.

Each test is a row of a table of faults that other servers fell to. Requests go through both processes.
"""

import itertools
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from daedal.serve.connection import TimedConnection
from daedal.serve.state.errors import MOST_WAIT
from daedal.serve.state.service import Service
from daedal.text.tokenizer import Tokenizer
from tests.serve.api.test_streams import wait_until
from tests.serve.hosted import ENDLESS, MANY
from tests.serve.live import hosted_service, scripted_service, serving
from tests.serve.scripted import ScriptedEngine

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "hi"}]
LONG = {"prompt": [ENDLESS], "stream": True, "max_tokens": MANY}
STREAMS: list[tuple[str, dict[str, object]]] = [
    ("completions", LONG),
    ("chat/completions", {"messages": HELLO, "stream": True, "max_tokens": MANY}),
    ("messages", {"messages": HELLO, "stream": True, "max_tokens": MANY}),
    ("responses", {"input": "hi", "stream": True, "max_output_tokens": MANY}),
]


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Service:
    return hosted_service(checkpoint, max_live=8)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with serving(service) as address:
        yield address


def failures(lines: Iterator[str]) -> list[dict]:
    """The error events of the rest of a stream, whatever its API."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    found = [json.loads(item) for item in data]
    return [item for item in found if "error" in item or item.get("type") == "response.failed"]


def at_end(sock: socket.socket) -> bool:
    """Whether the server has closed this connection; waits for it."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def answers_still(address: str) -> None:
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": [6], "max_tokens": 5}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_an_engine_killed_mid_stream(checkpoint: Path, tmp_path: Path) -> None:
    """Each client gets one clear error, the server says that it is not ready, what had not begun is answered."""
    hold = tmp_path / "hold"
    service = hosted_service(checkpoint, max_running=len(STREAMS), held_by=str(hold))
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/", timeout=30) as http, ExitStack() as stack:
        streams = []
        for path, body in STREAMS:
            lines = stack.enter_context(http.stream("POST", path, json=body)).iter_lines()
            streams.append((path, lines))
            assert any("delta" in line or '"text"' in line for line in lines)  # it has begun
        waiting = stack.enter_context(ThreadPoolExecutor(1))
        kept = waiting.submit(http.post, "completions", json={"prompt": [6], "max_tokens": 5})
        wait_until(address, lambda stats: stats["num_running"] == len(STREAMS) + 1)
        hold.touch()
        os.kill(service.worker.pid, signal.SIGKILL)
        for path, lines in streams:
            (failure,) = failures(lines)
            error = failure["response"]["error"] if path == "responses" else failure["error"]
            assert "the engine ended while this request was in it" in error["message"]
            assert (failure.get("type") == "error") == (path == "messages")
        assert httpx.get(f"{address}/ready").status_code == 503
        health = httpx.get(f"{address}/health")
        assert (health.status_code, health.json()) == (200, {"status": "restarting"})
        refused = http.post("completions", json={"prompt": [6]})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert wait_until(address, lambda stats: not stats["ready"])["num_running"] == 0
        hold.unlink()
        assert kept.result(timeout=30).status_code == 200
        assert httpx.get(f"{address}/ready").status_code == 200
        assert "daedal:engine_restarts_total 1.0" in httpx.get(f"{address}/metrics").text


def test_the_engine_listens_to_nobody_and_its_memory_is_told(service: Service, address: str) -> None:
    engine = psutil.Process(service.worker.pid)
    assert engine.net_connections(kind="inet") == []
    assert "daedal_engine_process_resident_memory_bytes" in httpx.get(f"{address}/metrics").text


@pytest.mark.parametrize("moment", ["connected", "in headers", "in body", "sent", "first token", "tenth token"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_clients_that_vanish_at_any_moment(service: Service, address: str, moment: str, stream: bool) -> None:
    """With a reset, as a process that was killed leaves; requests and pages are gone before long."""
    host, port = urlsplit(address).netloc.split(":")
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    sent = {"connected": b"", "in headers": head[:40], "in body": head + body[:9]}.get(moment, head + body)
    for _ in range(8):
        with socket.create_connection((host, int(port)), timeout=20) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.sendall(sent)
            for _ in range({"first token": 1, "tenth token": 10}.get(moment, 0) if stream else 0):
                assert sock.recv(4096)
    # A request may still be on its way to the engine, which then counts neither it nor anything of it.
    idle = wait_until(address, lambda stats: stats["num_running"] == 0 and not service.worker._desk.waiting())
    assert idle["kv_bytes_used"] == 0
    answers_still(address)


def test_overload_is_429_with_a_time_to_come_back(address: str) -> None:
    """Ten times what there is room for: what is admitted is answered whole, the rest is told so at once."""

    def ask(_: int) -> tuple[int, str]:
        body = {"prompt": [7], "max_tokens": 5, "n": 2}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        if answer.status_code == 200:
            assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["stop", "stop"]
        return answer.status_code, answer.headers.get("retry-after", "")

    with ThreadPoolExecutor(40) as clients:
        results = list(clients.map(ask, range(40)))
    assert {status for status, _ in results} <= {200, 429}
    assert results.count((200, "")) >= 4
    assert all(status == 200 or int(again) >= 1 for status, again in results)
    assert wait_until(address, lambda stats: stats["num_running"] == 0)["kv_bytes_used"] == 0
    answers_still(address)


def test_a_full_server_refuses_before_the_body_comes(checkpoint: Path) -> None:
    """And the connection goes on: what comes of the body is passed over."""
    engine = ScriptedEngine(
        Tokenizer.load(checkpoint), lambda _: itertools.repeat(40), before_step=lambda: threading.Event().wait(0.002)
    )
    service = scripted_service(checkpoint, engine)
    service.max_requests = 1
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        with http.stream("POST", "completions", json={"prompt": "hi", "stream": True, "max_tokens": MANY}) as answer:
            lines = answer.iter_lines()  # kept, for the connection is closed with it
            assert next(lines).startswith("data: ")
            host, port = urlsplit(address).netloc.split(":")
            with socket.create_connection((host, int(port)), timeout=20) as sock, sock.makefile("rb") as reading:
                sock.sendall(f"POST /v1/messages HTTP/1.1\r\nHost: {host}\r\nContent-Length: 300000\r\n\r\n".encode())
                status, error = _answered(reading)
                assert (status, error["error"]["code"]) == (429, "queue_full")
                sock.sendall(300_000 * b"a" + f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert _answered(reading)[0] == 200
        wait_until(address, lambda stats: stats["num_running"] == 0)
        assert http.post("completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200


def _answered(reading: IO[bytes]) -> tuple[int, dict]:
    status, length = int(reading.readline().split()[1]), 0
    while (line := reading.readline().strip()) != b"":
        name, _, value = line.partition(b": ")
        length = int(value) if name.lower() == b"content-length" else length
    return status, json.loads(reading.read(length))


def test_who_finds_no_place_comes_back_when_half_have_gone(checkpoint: Path) -> None:
    service = scripted_service(checkpoint, ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40]))
    waits = [service.seconds_to_wait]
    for seconds in (8.0, 1e6):
        for _ in range(60):
            service.begun()
            service.ended(seconds)
        waits.append(service.seconds_to_wait)
    assert waits == [1, 4, MOST_WAIT]


def test_a_header_bomb_is_431(address: str) -> None:
    host, port = urlsplit(address).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 40_000)
        head, _, body = b"".join(iter(lambda: sock.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(b"\x16\x03\x01 this is TLS, or nothing\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
    answers_still(address)


def test_headers_that_come_too_slowly_are_not_waited_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "header_seconds", 0.05)
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40])
    with serving(scripted_service(checkpoint, engine)) as address:
        host, port = urlsplit(address).netloc.split(":")
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with socket.create_connection((host, int(port)), timeout=20) as sock:
                sock.sendall(begun)
                assert at_end(sock)
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_reader_that_stops_is_left_and_nobody_waits_for_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "take_seconds", 0.05)
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: itertools.repeat(40), ids_per_step=500)
    with serving(scripted_service(checkpoint, engine), send_buffer=4096) as address:
        host, port = urlsplit(address).netloc.split(":")
        # So long that it cannot be over before the reader is left, however busy the machine is.
        body = json.dumps({**LONG, "max_tokens": 2**29}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(head + body)
            assert engine.cancelled.wait(20)
            short = httpx.post(f"{address}/v1/completions", json={"prompt": [6], "max_tokens": 5}, timeout=30)
            assert short.status_code == 200
        assert wait_until(address, lambda stats: stats["num_running"] == 0)


EVIL: list[dict[str, object]] = [
    {"type": "string", "pattern": "(a|a)*" * 200},
    {"type": "string", "pattern": "((ab|cd){64}){65}"},
    {"type": "string", "pattern": r"(.)\1"},
    {"type": "string", "pattern": "(" * 300},
    {"$ref": "http://169.254.169.254/latest/meta-data"},
    {"$ref": "#/properties/nothing"},
    {"enum": ["x" * 140_000]},
]


@pytest.mark.parametrize("schema", EVIL, ids=[str(schema)[:40] for schema in EVIL])
def test_evil_schemas_are_refused_beside_a_stream_that_goes_on(
    service: Service, address: str, schema: dict[str, object]
) -> None:
    with httpx.stream("POST", f"{address}/v1/completions", json=LONG, timeout=30) as neighbour:
        lines = neighbour.iter_lines()
        assert next(lines).startswith("data: ")
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        asked = {"messages": HELLO, "response_format": form, "max_tokens": 3}
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=60)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "response_format"
        assert all(next(lines).startswith(("data: ", "")) for _ in range(10))
    assert service.worker.num_restarts == 0


@pytest.mark.parametrize("text", ["a", " ", "🙂"], ids=["a", "space", "emoji"])
def test_one_character_without_end(address: str, text: str) -> None:
    """Beyond a body's bound it is 413 before anything reads it; within, 400 in words."""
    http = httpx.Client(base_url=f"{address}/v1/", timeout=60)
    with http:
        body = json.dumps({"prompt": text * (50 * 2**20 // len(text.encode()))}, ensure_ascii=False).encode()
        assert http.post("completions", content=body).status_code == 413
        most = json.dumps({"prompt": text * (2**22 + 1)}, ensure_ascii=False).encode()
        if len(most) < 8 * 2**20:
            refused = http.post("completions", content=most)
            assert refused.status_code == 400
            assert "at most" in refused.json()["error"]["message"]
    answers_still(address)


def test_a_deadline_ends_a_request_wherever_it_waits(checkpoint: Path) -> None:
    held = threading.Event()
    held.set()
    engine = ScriptedEngine(
        Tokenizer.load(checkpoint), lambda _: itertools.repeat(40), before_step=lambda: held.wait(20)
    )
    with serving(scripted_service(checkpoint, engine)) as address:
        for path, body in STREAMS:
            answer = httpx.post(f"{address}/v1/{path}", json={**body, "timeout": 0.3}, timeout=30)
            if answer.status_code == 200:
                (failure,) = failures(iter(answer.text.splitlines()))
                error = failure["response"]["error"] if path == "responses" else failure["error"]
            else:  # on a machine so busy that it was over before the engine's door
                error = answer.json()["error"]
            assert "the request's time is over" in error["message"]
        held.clear()  # no step ends: requests wait in the engine, or before its door
        stuck = {"prompt": [5], "max_tokens": 5, "timeout": 0.05}
        with ThreadPoolExecutor(3) as clients:
            answers = list(
                clients.map(lambda _: httpx.post(f"{address}/v1/completions", json=stuck, timeout=30), range(3))
            )
        held.set()
        assert {answer.status_code for answer in answers} == {504}
        error = answers[0].json()["error"]
        assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
        wait_until(address, lambda stats: stats["num_running"] == 0)


def test_the_servers_own_limit_of_time_holds_for_all(checkpoint: Path) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: itertools.repeat(40))
    service = scripted_service(checkpoint, engine)
    service.max_seconds = 0.05
    with serving(service) as address:
        for more in ({}, {"timeout": 1000}):
            answer = httpx.post(f"{address}/v1/completions", json={**LONG, "stream": False, **more}, timeout=30)
            assert answer.status_code == 504


def test_every_fault_that_is_written_down_has_its_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert len(named) > 25
    missing = [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert missing == []
