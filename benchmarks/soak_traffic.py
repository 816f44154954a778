"""What the clients of a soak do: every API, streamed and whole, tools, forms, long prompts, and leaving in the middle.

Each kind of request looks at its own answer, and raises `Lost` where it did not end as it must. Knows nothing of
memory and time.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import httpx

_TEXT = "it is a truth universally acknowledged that single man in possession of good fortune must be want wife"
WORDS = _TEXT.split()
TOOL = {
    "name": "look_up",
    "description": "Looks a word up.",
    "parameters": {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 12}, "times": {"type": "integer"}},
        "required": ["word", "times"],
        "additionalProperties": False,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
ENDS = ("stop", "length", "tool_calls")


class Lost(Exception):
    """A request that was neither answered as it must be nor refused for a reason."""


class Caller:
    """One client. context: tokens that prompt and answer may have. It comes back when it is told that all is full."""

    def __init__(self, http: httpx.AsyncClient, context: int, seed: int):
        self.http, self.context = http, context
        self.random = random.Random(seed)
        self.full = 0

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        while True:
            answer = await self.http.post(path, json=body)
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
            await self._refused(answer, await answer.aread())

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Events; that of `[DONE]` is empty."""
        while True:
            async with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
                if answer.status_code == 200:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: "):
                            data = line.removeprefix("data: ")
                            yield {} if data == "[DONE]" else json.loads(data)
                    return
                text = await answer.aread()
            await self._refused(answer, text)

    async def _refused(self, answer: httpx.Response, text: bytes) -> None:
        if answer.status_code != 429:
            raise Lost(f"status {answer.status_code}: {text[:300]!r}")
        self.full += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))

    def text(self, least: int, most: int) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(least, most)))

    def talk(self) -> dict[str, Any]:
        """A body of /v1/chat/completions."""
        turns = [{"role": "user", "content": self.text(1, 20)}]
        if self.random.random() < 0.3:
            turns = [*turns, {"role": "assistant", "content": self.text(1, 8)}, {"role": "user", "content": "?"}]
        return {"messages": turns, "max_tokens": self.random.randint(4, 48), "seed": self.random.randint(0, 2**31)}


async def last_of(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    every = [event async for event in events]
    return every[-1] if every else {}


def must(holds: bool, why: str, found: object) -> None:
    if not holds:
        raise Lost(f"{why}: {str(found)[:300]}")


async def whole_chat(caller: Caller) -> str:
    number = caller.random.choice((1, 1, 2, 3))
    found = await caller.post("/v1/chat/completions", {**caller.talk(), "n": number, "logprobs": number == 1})
    must([choice["finish_reason"] in ENDS for choice in found["choices"]] == [True] * number, "choices", found)
    return "whole"


async def streamed_chat(caller: Caller) -> str:
    body = {**caller.talk(), "n": caller.random.choice((1, 2)), "stream_options": {"include_usage": True}}
    ended: set[int] = set()
    last: dict[str, Any] = {"never": "came"}
    usage = None
    async for last in caller.stream("/v1/chat/completions", body):
        must("error" not in last, "an error", last)
        ended |= {choice["index"] for choice in last.get("choices", ()) if choice["finish_reason"] in ENDS}
        usage = last.get("usage") or usage
    must(last == {} and len(ended) == body["n"] and usage is not None, "the end of a stream", (last, ended, usage))
    return "whole"


async def tools(caller: Caller) -> str:
    body = {**caller.talk(), "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    found = (await caller.post("/v1/chat/completions", body))["choices"][0]
    if found["finish_reason"] == "tool_calls":
        for call in found["message"]["tool_calls"]:
            must(set(json.loads(call["function"]["arguments"])) == {"word", "times"}, "arguments", call)
    return "whole"


async def formed(caller: Caller) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = (await caller.post("/v1/chat/completions", {**caller.talk(), "response_format": form}))["choices"][0]
    if found["finish_reason"] == "stop":
        must(set(json.loads(found["message"]["content"])) == {"name", "old"}, "a form", found)
    return "whole"


async def completions(caller: Caller) -> str:
    prompts: list[object] = [caller.text(1, 12), [caller.random.randint(5, 250) for _ in range(9)]]
    body = {"prompt": prompts[0] if caller.random.random() < 0.5 else [prompts[1], [7, 8]], "max_tokens": 12}
    if caller.random.random() < 0.3:
        body |= {"echo": True, "logprobs": 3}
    found = await caller.post("/v1/completions", body)
    wanted = 1 if isinstance(body["prompt"], str) else 2
    must(len(found["choices"]) == wanted and found["usage"]["completion_tokens"] > 0, "a completion", found)
    return "whole"


async def long_prompt(caller: Caller) -> str:
    """Half of them begin like others; it fills up to three quarters of the context."""
    room = caller.context * 3 // 4
    size = caller.random.randint(room // 4, room)
    common = [5 + place % 200 for place in range(room)] if caller.random.random() < 0.5 else []
    ids = (common[: size * 2 // 3] + [caller.random.randint(5, 250) for _ in range(room)])[:size]
    found = await caller.post("/v1/completions", {"prompt": ids, "max_tokens": 8, "ignore_eos": True})
    must(found["usage"]["prompt_tokens"] == size and found["usage"]["completion_tokens"] == 8, "a long prompt", found)
    return "whole"


async def responses(caller: Caller) -> str:
    """Stored, gone on from, and deleted."""
    asked = {"input": caller.text(1, 20), "max_output_tokens": caller.random.randint(4, 32)}
    last = await last_of(caller.stream("/v1/responses", asked))
    must(last.get("type") in ("response.completed", "response.incomplete"), "the end of a response", last)
    name = last["response"]["id"]
    more = await caller.post("/v1/responses", {**asked, "previous_response_id": name, "store": False})
    must(more["status"] in ("completed", "incomplete"), "a response", more)
    gone = (await caller.http.delete(f"/v1/responses/{name}")).json()
    must(gone.get("deleted") is True, "a response that is to be deleted", gone)
    return "whole"


async def messages(caller: Caller) -> str:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": caller.text(1, 20)}], "max_tokens": 16}
    if caller.random.random() < 0.5:
        found = await caller.post("/v1/messages", body)
        must(found["stop_reason"] is not None, "a message", found)
        return "whole"
    last = await last_of(caller.stream("/v1/messages", body))
    must(last.get("type") == "message_stop", "the end of a message", last)
    return "whole"


async def left_in_a_stream(caller: Caller) -> str:
    """After some events, or before the first."""
    events = caller.random.randint(0, 12)
    body = {**caller.talk(), "max_tokens": 400}
    async with aclosing(caller.stream("/v1/chat/completions", body)) as stream:
        async for _ in stream:
            if events == 0:
                break
            events -= 1
    return "left"


async def left_before_the_answer(caller: Caller) -> str:
    body = {**caller.talk(), "max_tokens": 400, "n": caller.random.choice((1, 4))}
    try:
        async with asyncio.timeout(caller.random.uniform(0.001, 0.5)):
            await caller.post("/v1/chat/completions", body)
    except TimeoutError:
        return "left"
    return "whole"


async def refused(caller: Caller) -> str:
    bad = caller.random.choice(
        ({"n": 10**9}, {"temperature": -1}, {"messages": []}, {"max_tokens": 2**40}, {"logit_bias": {"999999999": 1}})
    )
    answer = await caller.http.post("/v1/chat/completions", json={**caller.talk(), **bad})
    must(answer.status_code == 400 and "message" in answer.json()["error"], "a refusal", answer.text)
    return "refused"


async def watched(caller: Caller) -> str:
    for path in ("/metrics", "/stats", "/v1/models"):
        answer = await caller.http.get(path)
        must(answer.status_code == 200, path, answer.text)
    return "watched"


KINDS: dict[Callable[[Caller], Awaitable[str]], int] = {
    whole_chat: 4,
    streamed_chat: 6,
    tools: 2,
    formed: 2,
    completions: 3,
    long_prompt: 2,
    responses: 2,
    messages: 3,
    left_in_a_stream: 4,
    left_before_the_answer: 2,
    refused: 2,
    watched: 1,
}
"""How often each is asked, beside the others."""
