"""What goes over the wire while an answer grows: whole characters, and nothing for a client that has left."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from daedal.text.tokenizer import Tokenizer
from tests.serve.live import MODEL, ScriptedEngine, events, real_service, scripted_service, serving
from tests.tiny import tiny_checkpoint

HARD = "naïve – 真实的 🙂👩‍🔬 終 é"
ENDLESS = {"max_tokens": 60_000, "ignore_eos": True}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_characters_of_several_tokens_never_break(checkpoint: Path, path: str) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    ids = tokenizer.encode(HARD)
    assert len(ids) > len(HARD)
    engine = ScriptedEngine(tokenizer, lambda _: ids)
    prompt = {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    with serving(scripted_service(checkpoint, engine)) as address:
        asked = {**prompt, "stream": True, "max_tokens": 500, "stream_options": {"include_usage": True}}
        *chunks, last = events(httpx.post(f"{address}/v1/{path}", json=asked).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    pieces = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    assert "".join(pieces) == HARD
    assert not any("\ufffd" in piece for piece in pieces)
    assert last["usage"]["completion_tokens"] == len(ids) + 1


def test_bytes_that_are_no_text_stream_as_they_end(server: str) -> None:
    """A random model's bytes are mostly no UTF-8: pieces and whole must replace the same ones."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        for seed in range(5):
            asked = {"model": MODEL, "prompt": "It", "max_tokens": 60, "seed": seed, "stop": ["e"]}
            whole = client.completions.create(**asked).choices[0]
            pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
            assert "".join(piece.text for piece in pieces) == whole.text
            assert pieces[-1].finish_reason == whole.finish_reason


def test_choices_of_one_stream_are_told_apart(server: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "n": 3, "seed": 4, "max_tokens": 9}
    whole = httpx.post(f"{server}/v1/chat/completions", json=asked).json()
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = events(httpx.post(f"{server}/v1/chat/completions", json={**asked, **options}).text)
    texts = ["", "", ""]
    roles = []
    for choice in (chunk["choices"][0] for chunk in chunks):
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] if "role" in choice["delta"] else []
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert sorted(roles) == [0, 1, 2]
    assert last["usage"] == chunks[-1]["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"):
        assert last["usage"][name] == whole["usage"][name]  # but the second time more of the prompt was cached
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("endless"), "llama", max_position_embeddings=65_536)
    with serving(real_service(directory, max_batch=4, cache_bytes=2**25)) as address:
        yield address


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_gives_its_pages_back(endless: str, stream: bool) -> None:
    host, port = urlsplit(endless).netloc.split(":")
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "n": 2, "stream": stream, **ENDLESS}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(head + body)
        if stream:
            assert b"200 OK" in sock.recv(4096)
        wait_until(endless, lambda stats: stats["num_running"] == 2 and stats["kv_bytes_used"] > 0)
    idle = wait_until(endless, lambda stats: stats["num_running"] == 0)
    assert idle["kv_bytes_used"] == 0
    assert idle["generation_tokens_total"] < ENDLESS["max_tokens"]


def test_a_cancelled_task_of_the_client_leaves_too(endless: str) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{endless}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": MODEL, "prompt": "hi", "max_tokens": 60_000, "extra_body": {"ignore_eos": True}}
            task = asyncio.create_task(client.completions.create(**asked))
            await asyncio.to_thread(wait_until, endless, lambda stats: stats["num_running"] == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert wait_until(endless, lambda stats: stats["num_running"] == 0)["kv_bytes_used"] == 0


def wait_until(address: str, condition: object) -> dict:
    """Asks the server until `condition` holds for its numbers; fails when it does not come to hold."""
    with httpx.Client() as client:
        for _ in range(2000):
            stats = client.get(f"{address}/stats").json()
            if condition(stats):
                return stats
            time.sleep(0.005)
    raise AssertionError(f"never came to hold: {stats}")
