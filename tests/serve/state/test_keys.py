"""Keys: every path but health and the page needs one, each has its limits, and what is stored is its owner's alone."""

import hashlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from daedal.errors import ConfigError
from daedal.serve import app
from daedal.serve.app import build_app
from daedal.serve.state.errors import ApiError
from daedal.serve.state.keys import OPEN, Account, Key, Keys
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import MODEL, ScriptedEngine, scripted_service, serving


def key(name: str, **limits: int) -> Key:
    return Key(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **limits)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40] * 5)
    service = scripted_service(checkpoint, engine)
    service.keys = Keys((key("ann"), key("bob"), key("once", requests_per_minute=1), key("few", tokens_per_minute=4)))
    with serving(service) as address:
        yield address


def test_every_path_but_health_and_the_page_needs_a_key(checkpoint: Path, address: str) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40])
    paths = {route.path for route in build_app(scripted_service(checkpoint, engine)).routes}
    assert {"/", "/metrics", "/stats", "/tokenize", "/v1/chat/completions", "/v1/messages", *OPEN} <= paths
    files = (Path(app.__file__).parent / "page").iterdir()
    page = {"/" if file.name == "index.html" else f"/{file.name}" for file in files}
    for path in {*paths, "/nothing"}:
        status = httpx.get(address + path.replace("{name:path}", "x").replace("{name}", "x")).status_code
        assert status == (200 if path in (*OPEN, *page) else 401), path
    for headers in (
        {},
        bearer("wrong"),
        {"Authorization": "Bearer"},
        {"Authorization": "Basic ann"},
        {b"x-api-key": b"\xff\xfe"},
    ):
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "content-security-policy" in answer.headers
    for headers in (bearer("ann"), {"x-api-key": "bob"}):
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
    unknown = httpx.post(f"{address}/v1/messages", json={})
    assert unknown.json()["error"]["type"] == "authentication_error"
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_limits_are_each_keys_own(address: str) -> None:
    def ask(name: str) -> httpx.Response:
        return httpx.post(f"{address}/v1/completions", json={"prompt": "hi", "model": MODEL}, headers=bearer(name))

    for name in ("once", "few"):
        assert ask(name).status_code == 200
        full = ask(name)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(full.headers["retry-after"]) >= 1
        assert httpx.get(f"{address}/v1/models", headers=bearer(name)).status_code == 200, "looking costs nothing"
        assert ask("ann").status_code == 200


def test_requests_at_once_are_counted_until_their_end(checkpoint: Path) -> None:
    pause = threading.Event()
    engine = ScriptedEngine(
        Tokenizer.load(checkpoint), lambda _: itertools.repeat(40), before_step=lambda: pause.wait(0.002)
    )
    service = scripted_service(checkpoint, engine)
    service.keys = Keys((key("one", concurrent=1),))
    endless = {"prompt": "hi", "stream": True, "max_tokens": engine.max_context}
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/", headers=bearer("one")) as http:
        with http.stream("POST", "completions", json=endless) as answer:
            lines = answer.iter_lines()  # kept, for the connection is closed with it
            assert next(lines).startswith("data: ")
            assert http.post("completions", json={"prompt": "hi", "max_tokens": 1}).status_code == 429
        assert engine.cancelled.wait(20)
        assert http.post("completions", json={"prompt": "hi", "max_tokens": 1}).status_code == 200


def test_a_stored_response_is_its_owners(checkpoint: Path) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40])
    service = scripted_service(checkpoint, engine)
    service.keys = Keys((key("ann"), key("bob")))
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        name = http.post("responses", json={"input": "x"}, headers=bearer("ann")).json()["id"]
        for method in ("GET", "DELETE"):
            assert http.request(method, f"responses/{name}", headers=bearer("bob")).status_code == 404
        assert http.get(f"responses/{name}", headers=bearer("ann")).status_code == 200


def test_limits_fill_up_with_time() -> None:
    now = [0.0]
    account = Account(key("a", requests_per_minute=2, tokens_per_minute=60), lambda: now[0])

    def entered() -> bool:
        try:
            account.enter()
        except ApiError as error:
            return error.status != 429
        return True

    assert [entered(), entered(), entered()] == [True, True, False]
    now[0] = 31.0
    assert entered()
    account.charge(90)
    now[0] = 100.0
    assert entered()
    account.charge(90)
    now[0] = 110.0
    assert not entered(), "it has overdrawn by 30 tokens"
    now[0] = 500.0
    assert [entered(), entered(), entered()] == [True, True, False], "what is not used is not saved up"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "no keys"),
        ("[ann", "not TOML"),
        ("ann = 3", "no sha256"),
        ("[ann]\nsha256 = 'x'", "64 hexadecimal"),
        (f"[ann]\nsha256 = '{'a' * 64}'\nrequests = 5", "the entry 'requests'"),
        (f"[ann]\nsha256 = '{'a' * 64}'\nconcurrent = 0", "whole number"),
        (f"[ann]\nsha256 = '{'a' * 64}'\nconcurrent = true", "whole number"),
    ],
    ids=lambda text: text[:20],
)
def test_a_file_of_keys_says_what_it_lacks(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rule):
        Keys.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(tmp_path / "none")
    path.write_text(f"[ann]\nsha256 = '{'a' * 64}'\nconcurrent = 2\n", encoding="utf-8")
    Keys.read(path)
