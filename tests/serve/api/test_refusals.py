"""Bad input, case by case: the status, an error object that names the field, and a server that lives on."""

import asyncio
import itertools
import threading
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from daedal.serve.api.body import MAX_BODY_BYTES, read_object
from daedal.serve.app import build_app
from daedal.serve.state.errors import ApiError
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import MODEL, ScriptedEngine, events, real_service, scripted_service, serving
from tests.tiny import tiny_checkpoint

CHAT, COMPLETE = "chat/completions", "completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http(server: str) -> httpx.Client:
    with httpx.Client(base_url=f"{server}/v1/", timeout=30) as client:
        yield client


def refused(answer: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "Traceback" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error["message"]


BAD_CHAT: list[tuple[str, dict[str, object], str]] = [
    ("no messages", {"messages": []}, "messages"),
    ("messages missing", {"messages": None}, "messages"),
    ("messages of another type", {"messages": "hi"}, "messages"),
    ("a message of another type", {"messages": ["hi"]}, "messages.0"),
    ("unknown role", {"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ("no role", {"messages": [{"content": "hi"}]}, "messages.0.role"),
    ("no content", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ("content of another type", {"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
    ("an image", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ("both bounds, different", {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ("no tokens at all", {"max_tokens": 0}, "max_tokens"),
    ("more tokens than the context", {"max_tokens": 513}, "max_tokens"),
    ("top_logprobs without logprobs", {"top_logprobs": 3}, "top_logprobs"),
    ("too many top_logprobs", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("logprobs as a number", {"logprobs": 5}, "logprobs"),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ("another format", {"response_format": {"type": "grammar"}}, "response_format.type"),
    ("sound", {"modalities": ["text", "audio"]}, "modalities"),
    ("a prediction", {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ("template variables of the server", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]
BAD_COMPLETION: list[tuple[str, dict[str, object], str]] = [
    ("an empty text", {"prompt": ""}, "prompt"),
    ("no prompts", {"prompt": []}, "prompt"),
    ("an empty prompt among others", {"prompt": ["a", ""]}, "prompt"),
    ("an empty list of ids", {"prompt": [[]]}, "prompt"),
    ("no prompt", {"prompt": None}, "prompt"),
    ("texts and ids mixed up", {"prompt": ["a", 3]}, "prompt"),
    ("ids that are truth values", {"prompt": [True, False]}, "prompt"),
    ("negative ids", {"prompt": [4, -1]}, "prompt"),
    ("ids beyond the vocabulary", {"prompt": [4, 320]}, "prompt"),
    ("ids beyond 64 bits", {"prompt": [10**30]}, "prompt"),
    ("a prompt as long as the context", {"prompt": [5] * 512}, "prompt"),
    ("a suffix", {"suffix": "end"}, "suffix"),
    ("best_of above n", {"best_of": 3}, "best_of"),
    ("too many logprobs", {"logprobs": 21}, "logprobs"),
    ("logprobs as a truth value", {"logprobs": True}, "logprobs"),
    ("n times prompts", {"prompt": ["a"] * 10, "n": 128}, "n"),
    ("too many prompts", {"prompt": ["a"] * 513}, "prompt"),
    ("negative max_tokens", {"max_tokens": -1}, "max_tokens"),
]
BAD_ANYWHERE: list[tuple[str, dict[str, object], str]] = [
    ("n of 0", {"n": 0}, "n"),
    ("n beyond the cap", {"n": 129}, "n"),
    ("n as text", {"n": "2"}, "n"),
    ("n as a truth value", {"n": True}, "n"),
    ("n as a fraction", {"n": 1.5}, "n"),
    ("max_tokens as text", {"max_tokens": "5"}, "max_tokens"),
    ("max_tokens beyond 64 bits", {"max_tokens": 10**40}, "max_tokens"),
    ("temperature below 0", {"temperature": -0.1}, "temperature"),
    ("temperature above 2", {"temperature": 2.1}, "temperature"),
    ("temperature as text", {"temperature": "hot"}, "temperature"),
    ("temperature beyond any float", {"temperature": 10**400}, "temperature"),
    ("top_p of 0", {"top_p": 0}, "top_p"),
    ("top_p above 1", {"top_p": 1.01}, "top_p"),
    ("top_k below -1", {"top_k": -2}, "top_k"),
    ("min_p above 1", {"min_p": 1.5}, "min_p"),
    ("presence_penalty", {"presence_penalty": 2.5}, "presence_penalty"),
    ("frequency_penalty", {"frequency_penalty": -3}, "frequency_penalty"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty"),
    ("seed beyond 64 bits", {"seed": 2**63}, "seed"),
    ("seed as a fraction", {"seed": 1.5}, "seed"),
    ("five stops", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ("an empty stop", {"stop": ""}, "stop"),
    ("stop of another type", {"stop": [1]}, "stop"),
    ("stop ids beyond the vocabulary", {"stop_token_ids": [320]}, None),
    ("a bias beyond 100", {"logit_bias": {"5": 101}}, None),
    ("a bias for no token", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("a bias beyond the vocabulary", {"logit_bias": {"320": 1}}, "logit_bias"),
    ("biases as a list", {"logit_bias": [1]}, "logit_bias"),
    ("stream as text", {"stream": "yes"}, "stream"),
    ("stream options without a stream", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("stream options of another type", {"stream": True, "stream_options": True}, "stream_options"),
    ("model as a number", {"model": 3}, "model"),
    ("no time", {"timeout": 0}, "timeout"),
    ("time beyond the cap", {"timeout": 10**7}, "timeout"),
    ("time as text", {"timeout": "5"}, "timeout"),
]
CASES = [
    *((CHAT, {"messages": HELLO}, *case) for case in [*BAD_CHAT, *BAD_ANYWHERE]),
    *((COMPLETE, {"prompt": "hi"}, *case) for case in [*BAD_COMPLETION, *BAD_ANYWHERE]),
]


@pytest.mark.parametrize(
    ("path", "good", "bad", "param"),
    [(path, good, bad, param) for path, good, _, bad, param in CASES],
    ids=[f"{path}: {name}" for path, _, name, _, _ in CASES],
)
def test_a_bad_field_is_named(
    http: httpx.Client, path: str, good: dict[str, object], bad: dict[str, object], param: str | None
) -> None:
    refused(http.post(path, json={"model": MODEL, **good, **bad}), 400, param=param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"7",
        b"\xff\xfe{}",
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e400}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_what_is_not_one_json_object_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    refused(http.post(path, content=body), 400)


def test_the_context_is_named_when_a_prompt_exceeds_it(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "ab" * 600}]
    for path, good in ((COMPLETE, {"prompt": [5] * 513}), (CHAT, {"messages": long})):
        message = refused(http.post(path, json=good), 400, code="context_length_exceeded")
        assert "this model's maximum context length is 512 tokens" in message  # the words that clients look for


@pytest.mark.parametrize("declared", [True, False], ids=["with its length", "in chunks"])
def test_a_body_too_large_is_refused_with_413(http: httpx.Client, declared: bool) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    pieces = (body[start : start + 2**16] for start in range(0, len(body), 2**16))
    refused(http.post(CHAT, content=body if declared else pieces), 413, code="body_too_large")
    assert http.get("models").status_code == 200


def test_unknown_models_paths_and_methods(http: httpx.Client) -> None:
    for path, good in ((CHAT, {"messages": HELLO}), (COMPLETE, {"prompt": "hi"})):
        refused(http.post(path, json={"model": "another", **good}), 404, param="model", code="model_not_found")
        assert http.post(path, json={**good, "max_tokens": 1}).status_code == 200, "without a model, the one served"
        answer = http.get(path)
        refused(answer, 405)
        assert "POST" in answer.headers["allow"]
    refused(http.get("models/an/other"), 404, code="model_not_found")
    for path in ("", "embeddings", "chat", "models/", "chat/completions/"):
        refused(http.post(path, json={}), 405 if path == "models/" else 404)
    refused(http.delete("models"), 405)


def test_fields_that_change_nothing_are_ignored(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    asked = {"messages": HELLO, "max_tokens": 4, "seed": 1}
    plain = http.post(CHAT, json=asked).json()["choices"]
    more = {"user": "u", "metadata": {"a": "b"}, "store": False, "tools": None, "response_format": {"type": "text"}}
    unused = dict.fromkeys(("stop", "logit_bias", "n", "stream", "temperature", "top_logprobs", "stream_options"))
    assert http.post(CHAT, json={**asked, **more, **unused, "model": None}).json()["choices"] == plain
    assert not caplog.records
    assert http.post(CHAT, json={**asked, "not_a_field": 1}).json()["choices"] == plain
    assert "not_a_field" in caplog.text


@pytest.mark.parametrize("known", [True, False], ids=["the front end knows", "the engine knows"])
def test_a_full_queue_is_429_until_a_place_is_free(checkpoint: Path, known: bool) -> None:
    pause = threading.Event()
    engine = ScriptedEngine(
        Tokenizer.load(checkpoint), lambda _: itertools.repeat(40), max_live=1, before_step=lambda: pause.wait(0.002)
    )
    service = scripted_service(checkpoint, engine)
    service.max_requests = 1 if known else None
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        endless = {"prompt": "hi", "stream": True, "max_tokens": engine.max_context}
        with http.stream("POST", COMPLETE, json=endless) as answer:
            lines = answer.iter_lines()  # kept, for the connection is closed with it
            assert next(lines).startswith("data: ")
            full = http.post(COMPLETE, json={"prompt": "hi"})
            refused(full, 429, code="queue_full")
            assert int(full.headers["retry-after"]) >= 1
        assert engine.cancelled.wait(20)
        assert 'request_success_total{finished_reason="abort"} 1.0' in http.get(f"{address}/metrics").text
        assert http.post(COMPLETE, json={"prompt": "hi"}).status_code == 200


@pytest.mark.parametrize("num_steps", [1, 3], ids=["at once", "under way"])
def test_a_failing_engine_is_500_and_the_next_request_is_served(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, num_steps: int
) -> None:
    steps_left = [0]

    def before_step() -> None:
        steps_left[0] -= 1
        if steps_left[0] == 0:
            raise ZeroDivisionError("a secret of the engine")

    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40] * 9, before_step=before_step)
    with serving(scripted_service(checkpoint, engine)) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        steps_left[0] = num_steps
        message = refused(http.post(COMPLETE, json={"prompt": "hi"}), 500)
        assert "secret" not in message
        for path, good in ((COMPLETE, {"prompt": "hi"}), (CHAT, {"messages": HELLO})):
            steps_left[0] = num_steps
            *chunks, last = events(http.post(path, json={**good, "stream": True}).text)
            assert last["error"]["code"] == "generation_failed"
            assert bool(chunks) == (num_steps > 1)
        assert http.post(COMPLETE, json={"prompt": "hi"}).status_code == 200
        assert 'request_success_total{finished_reason="error"} 3.0' in http.get(f"{address}/metrics").text
    assert "a secret of the engine" in caplog.text


def test_before_it_is_warm_the_server_refuses_with_503(checkpoint: Path) -> None:
    held = threading.Event()
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40], before_step=lambda: held.wait(20))
    service = scripted_service(checkpoint, engine)
    with TestClient(build_app(service)) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        refused(client.post("/v1/completions", json={"prompt": "hi"}), 503, code="unavailable")
        held.set()


def test_a_model_without_a_chat_template_completes_but_does_not_chat(tmp_path: Path) -> None:
    service = real_service(tiny_checkpoint(tmp_path, "deepseek_v3"))
    service.chat_format = None
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        refused(http.post(CHAT, json={"messages": HELLO}), 400, code="no_chat_template")
        assert http.post(COMPLETE, json={"prompt": "hi"}).status_code == 200


def test_odd_but_lawful_requests_are_answered(http: httpx.Client) -> None:
    """Next to no temperature; a template variable named as ours; a prompt as long as the context, to be scored."""
    cold = {"prompt": [5, 6], "max_tokens": 3, "seed": 1}
    greedy = http.post(COMPLETE, json={**cold, "temperature": 0}).json()["choices"]
    assert http.post(COMPLETE, json={**cold, "temperature": 1e-300}).json()["choices"] == greedy
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "chat_template_kwargs": {"self": 1}}
    assert http.post(CHAT, json=chat).status_code == 200
    whole = {"prompt": [5] * 512, "max_tokens": 0, "echo": True, "logprobs": 1}
    scored = http.post(COMPLETE, json=whole)
    assert scored.status_code == 200, scored.text
    assert len(scored.json()["choices"][0]["logprobs"]["tokens"]) == 512


def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    arriving = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, object]:
        return next(arriving)

    with pytest.raises(ApiError, match="the client left"):
        asyncio.run(read_object(Request({"type": "http", "headers": []}, receive)))
    assert not caplog.records
