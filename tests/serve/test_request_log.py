"""One line for each request, with its numbers, and nothing of what was said."""

import json
import logging
from pathlib import Path

import httpx
import pytest

from daedal.cli.log_format import REQUESTS, JsonLines
from daedal.serve import request_log
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, scripted_service, serving


def test_each_request_leaves_one_line(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert request_log.__name__ == REQUESTS
    caplog.set_level(logging.INFO, REQUESTS)
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40, 41])
    with serving(scripted_service(checkpoint, engine)) as address:
        post = f"{address}/v1/completions"
        ids = [
            httpx.post(post, json={"prompt": "hi", "max_tokens": 9, "user": "a secret"}).headers["x-request-id"],
            httpx.post(post, json={"prompt": "hi", "max_tokens": 9, "n": 2, "stream": True}).headers["x-request-id"],
            httpx.post(post, json={"prompt": "a secret", "n": 0}).headers["x-request-id"],
            httpx.get(f"{address}/a secret").headers["x-request-id"],
        ]
        httpx.get(f"{address}/metrics")
    records = [record for record in caplog.records if record.name == REQUESTS]
    lines = [json.loads(JsonLines().format(record)) for record in records]
    assert [line["id"] for line in lines] == ids
    assert [line["status"] for line in lines] == [200, 200, 400, 404]
    assert [line["route"] for line in lines] == ["/v1/completions"] * 3 + ["unknown"]
    assert [line.get("completion_tokens") for line in lines] == [3, 6, None, None]
    assert all(0 < line["seconds_to_first_token"] <= line["seconds"] for line in lines[:2])
    assert lines[0]["model"] == "tiny"
    assert lines[0]["prompt_tokens"] * 2 == lines[1]["prompt_tokens"]
    assert "secret" not in caplog.text


def test_every_line_is_json(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("naïve\nlines")
    except ValueError:
        logging.getLogger("daedal.test").exception("it %s", "failed")
    (record,) = caplog.records
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["logger"], line["message"]) == ("error", "daedal.test", "it failed")
    assert "naïve\nlines" in line["traceback"]
