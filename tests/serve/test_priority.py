"""Priorities over HTTP: every API takes them, keys bound them, and the more urgent is answered first."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from daedal.checkpoint.load import load
from daedal.errors import ConfigError
from daedal.infer.engine import Engine
from daedal.infer.request import Output, Request
from daedal.serve.state.course import Course
from daedal.serve.state.errors import MOST_WAIT
from daedal.serve.state.keys import Keys
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.serve.state.test_keys import bearer, key

TURN = [{"role": "user", "content": "hi"}]
ASKED = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": TURN},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": TURN, "max_tokens": 4},
}


def test_every_api_takes_it_and_keys_bound_it(checkpoint: Path) -> None:
    seen: list[tuple[str, int]] = []

    def script(request: Request) -> list[int]:
        seen.append((request.cache_salt, request.priority))
        return [40]

    service = scripted_service(checkpoint, ScriptedEngine(Tokenizer.load(checkpoint), script))
    service.keys = Keys((key("plain"), key("calm", priority=3), key("urgent", priority=-10)))
    with serving(service) as address:
        seen.clear()  # of the warm-up
        for path, body in ASKED.items():

            def ask(name: str, path: str = path, body: dict = body, **more: object) -> httpx.Response:
                return httpx.post(address + path, json={**body, **more}, headers=bearer(name))

            for name, more in (
                ("plain", {}),
                ("plain", {"priority": 7}),
                ("calm", {}),
                ("urgent", {}),
                ("urgent", {"priority": -10}),
            ):
                assert ask(name, **more).status_code == 200
            for name, priority in (("plain", -1), ("calm", 2), ("urgent", -11)):
                refused = ask(name, priority=priority)
                error = refused.json()["error"]
                assert (refused.status_code, error["type"]) == (403, "permission_error")
                assert (error["param"], error["code"]) == ("priority", "priority_not_allowed")
            for wrong in (101, -101, 0.5, "0", True):
                refused = ask("urgent", priority=wrong)
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority"), wrong
    assert seen == [("plain", 0), ("plain", 7), ("calm", 3), ("urgent", 0), ("urgent", -10)] * len(ASKED)


def test_a_key_may_not_have_every_priority() -> None:
    for priority in (101, 1.0, True):
        with pytest.raises(ConfigError, match="priority of the key"):
            key("ann", priority=priority)


class Unhurried(Engine):
    """Takes its time for a step until all have asked: none is answered before the last has come."""

    asked: threading.Event

    def step(self) -> list[Output]:
        self.asked.wait(0.05)
        return super().step()


def test_the_more_urgent_is_answered_first(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    engine = Unhurried(load(checkpoint), tokenizer=tokenizer, max_batch=1)
    engine.asked = threading.Event()
    service = scripted_service(checkpoint, engine)  # type: ignore[arg-type]
    ended: list[Course] = []
    service.followers = (ended.append,)

    def ask(http: httpx.Client, priority: int) -> int:
        body = {"prompt": "hi", "max_tokens": 3, "priority": priority}
        return http.post("/v1/completions", json=body).status_code

    long = {"prompt": "hi", "max_tokens": 400, "ignore_eos": True, "stream": True, "priority": -100}
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http, ThreadPoolExecutor() as pool:
        with http.stream("POST", "/v1/completions", json=long) as first:
            lines = first.iter_lines()
            next(lines)
            asking = []
            for place, priority in enumerate((5, 0, -5, 0), 1):
                asking.append(pool.submit(ask, http, priority))
                while service.worker.stats().num_waiting < place:
                    assert not asking[-1].done()
                    threading.Event().wait(0.002)
            engine.asked.set()
        assert [one.result() for one in asking] == [200] * 4
        text = http.get("/metrics").text
    assert [course.priority for course in ended] == [-100, -5, 0, 0, 5]
    assert ended[1].waited is not None
    assert 0 < ended[1].waited < (ended[4].waited or 0)
    for phase in ("queue", "prefill", "decode"):
        assert f"daedal:request_{phase}_time_seconds_count 5.0" in text


def test_a_deadline_out_of_reach_is_refused_at_once(checkpoint: Path) -> None:
    """Whatever the engine's pace is: here every request would take at least fifty minutes."""
    engine = Engine(load(checkpoint), tokenizer=Tokenizer.load(checkpoint), max_batch=2)
    engine._forecast.seconds = lambda *_, **__: 3000.0  # type: ignore[method-assign]
    service = scripted_service(checkpoint, engine)  # type: ignore[arg-type]
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
        for path, body in ASKED.items():
            refused = http.post(path, json={**body, "timeout": 2000})
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["param"]) == (429, "rate_limit_error", "timeout")
            assert error["code"] == "deadline_unreachable"
            assert "needs at least 3e+03 s" in error["message"]
            assert refused.headers["retry-after"] == str(MOST_WAIT)
            almost = http.post(path, json={**body, "timeout": 2990.5})
            assert (almost.status_code, almost.headers["retry-after"]) == (429, "10"), "what it lacks, rounded up"
            assert http.post(path, json={**body, "timeout": 4000}).status_code == 200
