"""Texts and conversations in tokens and back, and what is refused."""

import httpx
import pytest

from tests.serve.live import MODEL

ASK = [{"role": "user", "content": "It is a truth, 真 🙂"}]


def post(server: str, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server}/{path}", json=body, timeout=30)


def test_a_text_comes_back(server: str) -> None:
    text = "It is a truth, 真 🙂<|pad|>"
    answer = post(server, "tokenize", model=MODEL, prompt=text, return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][-1] == "<|pad|>"
    assert post(server, "detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_a_conversation_is_cut_as_it_is_for_an_answer(server: str) -> None:
    counted = post(server, "tokenize", messages=ASK).json()
    usage = post(server, "v1/chat/completions", messages=ASK, max_tokens=1).json()["usage"]
    assert counted["count"] == usage["prompt_tokens"]
    assert counted["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("tokenize", {}, 400),
        ("tokenize", {"prompt": 5}, 400),
        ("tokenize", {"prompt": "x", "model": "another"}, 404),
        ("tokenize", {"messages": []}, 400),
        ("tokenize", {"prompt": "x", "more": 1}, 400),
        ("tokenize", {"prompt": "x" * (2**22 + 1)}, 400),
        ("detokenize", {}, 400),
        ("detokenize", {"tokens": ["a"]}, 400),
        ("detokenize", {"tokens": [True]}, 400),
        ("detokenize", {"tokens": [-1]}, 400),
        ("detokenize", {"tokens": [320]}, 400),
        ("detokenize", {"tokens": [10**30]}, 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_malformed_is_refused(server: str, path: str, body: dict, status: int) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
