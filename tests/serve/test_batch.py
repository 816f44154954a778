"""Files of requests: every line answered once, whatever became of the run before; and the command around it."""

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from daedal.cli.app import run
from daedal.errors import DataError
from daedal.serve.batch import answered, read_lines, run_batch
from tests.serve.live import MODEL, real_service

CHAT, COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def line(name: str, url: str = COMPLETE, **body: object) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


LINES = [
    line("chat", CHAT, model=MODEL, messages=[{"role": "user", "content": "It is"}], max_tokens=4, seed=1),
    line("text", prompt="It is", max_tokens=4, seed=1),
    line("response", RESPOND, input="It is", max_output_tokens=4),
    line("wrong", prompt="It is", temperature=9),
    line("another", prompt="It is", model="gpt"),
]


def answer_all(checkpoint: Path, source: Path, out: io.StringIO, stopped: Callable[[], bool] = lambda: False) -> int:
    service = real_service(checkpoint, max_batch=2)
    statuses: list[int] = []
    running = run_batch(service, read_lines(source), out, at_once=3, told=statuses.append, stopped=stopped)
    failed = asyncio.run(running)
    assert failed == sum(status >= 400 for status in statuses)
    return failed


def test_every_line_has_its_answer(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    out = io.StringIO()
    assert answer_all(checkpoint, source, out) == 2
    rows = {row["custom_id"]: row["response"] for row in map(json.loads, out.getvalue().splitlines())}
    assert {name: row["status_code"] for name, row in rows.items()} == {
        "chat": 200,
        "text": 200,
        "response": 200,
        "wrong": 400,
        "another": 404,
    }
    assert rows["text"]["body"]["usage"]["completion_tokens"] == 4
    assert rows["text"]["request_id"] == rows["text"]["body"]["id"]
    assert rows["wrong"]["body"]["error"]["param"] == "temperature"
    again = io.StringIO()
    answer_all(checkpoint, source, again)
    texts = [
        row["response"]["body"]["choices"]
        for row in map(json.loads, again.getvalue().splitlines())
        if row["custom_id"] == "text"
    ]
    assert texts == [rows["text"]["body"]["choices"]]
    nothing = io.StringIO()
    answer_all(checkpoint, source, nothing, stopped=lambda: True)
    assert nothing.getvalue() == ""


def test_the_command_goes_on_where_it_was(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(LINES[:2]), encoding="utf-8")
    asked = [
        "batch",
        str(source),
        str(out),
        "--model",
        str(checkpoint),
        "--device",
        "cpu",
        "--max-batch",
        "2",
        "--json",
    ]
    source.write_text("\n".join(LINES[1:3]), encoding="utf-8")
    assert run(asked) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 2
    assert answered(out) == {"text", "response"}
    first = out.read_text(encoding="utf-8")
    cut = first + '{"custom_id": "wro'
    out.write_text(cut, encoding="utf-8")
    source.write_text("\n".join(LINES[1:4]), encoding="utf-8")
    assert run(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"requests": 3, "answered_before": 2, "answered": 1, "failed": 1, "left": 0}
    assert out.read_text(encoding="utf-8").startswith(first)
    assert answered(out) == {"text", "response", "wrong"}
    assert run(asked) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 0


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"method": "POST"}', "no custom_id"),
        (line("a", "/v1/embeddings"), "asks for POST /v1/embeddings"),
        (line("a").replace("POST", "GET"), "asks for GET"),
        (line("a").replace("{}", "3"), "no body"),
        (line("a", stream=True), "asks for a stream"),
        (line("a") + "\n" + line("a"), "of another"),
        ('{"custom_id": "' + "a" * 2**23 + '"}', "more than"),
    ],
    ids=lambda value: value[:30],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str, rule: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rule):
        list(read_lines(source))


def test_files_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["batch", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    other = tmp_path / "other"
    other.write_text("hello\n", encoding="utf-8")
    with pytest.raises(DataError, match="no answer of a batch"):
        answered(other)
