"""How much of a prompt was cached is said by every API, counted in the metrics, and of no use to other keys."""

import hashlib
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai

from daedal.serve.state.keys import Key, Keys
from tests.serve.live import MODEL, real_service, serving

LONG = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want."
MESSAGES: Any = [{"role": "system", "content": LONG}, {"role": "user", "content": "Is it?"}]


def counted(address: str) -> tuple[float, float]:
    """Queries and hits."""
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if line[0] != "#")
    queries, hits = (lines[f"daedal:prefix_cache_{name}_total"] for name in ("queries", "hits"))
    return float(queries), float(hits)


def test_every_api_tells_what_was_cached(checkpoint: Path) -> None:
    with serving(real_service(checkpoint, max_batch=2)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        chat: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "temperature": 0}
        usages = [client.chat.completions.create(**chat).usage for _ in range(2)]
        first, again = (usage.prompt_tokens_details.cached_tokens for usage in usages if usage)
        length = usages[0].prompt_tokens
        assert first == 0
        assert 0 < length - again <= 16
        assert again % 16 == 0
        assert usages[1].prompt_tokens == length
        extra = usages[1].model_extra
        assert (extra["prompt_cache_hit_tokens"], extra["prompt_cache_miss_tokens"]) == (again, length - again)
        *_, last = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
        assert last.usage.prompt_tokens_details.cached_tokens == again
        queries, hits = counted(address)
        assert hits == 2 * again
        assert queries >= 3 * length

        response = client.responses.create(model=MODEL, input=MESSAGES, max_output_tokens=2, temperature=0)
        assert response.usage.input_tokens_details.cached_tokens == again

        spoken = anthropic.Anthropic(base_url=address, api_key="none").messages
        message: Any = {"model": MODEL, "system": LONG, "messages": MESSAGES[1:], "max_tokens": 2}
        read = spoken.create(**message).usage
        assert (read.input_tokens, read.cache_read_input_tokens) == (length - again, again)
        with spoken.stream(**message) as stream:
            read = stream.get_final_message().usage
        assert (read.input_tokens, read.cache_read_input_tokens) == (length - again, again)

        text: Any = {"model": MODEL, "prompt": [LONG * 2, "Other"], "max_tokens": 1, "n": 2}
        usages = [client.completions.create(**text).usage for _ in range(2)]
        assert usages[1].prompt_tokens_details.cached_tokens > 0.8 * usages[1].prompt_tokens - 32


def test_keys_do_not_see_one_anothers_prompts(checkpoint: Path) -> None:
    service = real_service(checkpoint, max_batch=2)
    names = ("ann", "bob")
    service.keys = Keys(tuple(Key(name=name, sha256=hashlib.sha256(name.encode()).hexdigest()) for name in names))
    with serving(service) as address:
        found = []
        for name in (*names, *names):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=name)
            text: Any = {"model": MODEL, "prompt": LONG, "max_tokens": 1}
            found.append(client.completions.create(**text).usage.prompt_tokens_details.cached_tokens)
    assert found[:2] == [0, 0]
    assert found[2] == found[3] > 0
