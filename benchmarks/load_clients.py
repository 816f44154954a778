"""What one client of the load test does, for locust: it asks for a streamed completion, reads it, and asks again.

    locust -f benchmarks/load_clients.py --headless -u 16 -r 16 -t 25s --stop-timeout 120 --host URL --out seen.json

Each answer becomes an entry of `--out`: when it was asked for, when each event with text came, how it ended. Started by
`load.py`. Knows nothing of the server's kind but the extra fields that it is told to send.
"""

import itertools
import json
import random
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import HttpUser, constant, events, task
from locust.env import Environment

_TEXT = "it is a truth universally acknowledged that single man in possession of good fortune must be want wife"
WORDS = _TEXT.split()


@events.init_command_line_parser.add_listener
def arguments(parser: ArgumentParser, **_: Any) -> None:
    parser.add_argument("--out", type=str, required=True)
    parser.add_argument("--shared", type=int, default=0, help="words that all prompts begin with")
    parser.add_argument("--own", type=int, default=100, help="words of each prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--more", type=str, default="{}", help="fields of every body, as JSON")


@events.init.add_listener
def begin(environment: Environment, **_: Any) -> None:
    environment.seen = []
    environment.numbers = itertools.count()


@events.quitting.add_listener
def end(environment: Environment, **_: Any) -> None:
    Path(environment.parsed_options.out).write_text(json.dumps(environment.seen))


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


class Reader(HttpUser):
    wait_time = constant(0)

    @task
    def complete(self) -> None:
        options, number = self.environment.parsed_options, next(self.environment.numbers)
        prompt = f"{words(options.shared, -1)} {words(options.own, number)}"
        body = {"prompt": prompt, "max_tokens": options.answer, "temperature": 0, "stream": True}
        seen: dict[str, Any] = {"asked": time.time(), "events": [], "reason": None, "tokens": None}
        request = self.client.post(
            "/v1/completions", json={**body, **json.loads(options.more)}, stream=True, catch_response=True, timeout=600
        )
        with request as answer:
            seen["status"] = answer.status_code
            for line in answer.iter_lines(chunk_size=None):
                if line.startswith(b"data: {"):
                    self._event(seen, json.loads(line[6:]))
            if seen["reason"] is None:
                answer.failure(f"status {answer.status_code}, no end")
        seen["ended"] = time.time()
        self.environment.seen.append(seen)

    def _event(self, seen: dict[str, Any], event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            if choice["text"]:
                seen["events"].append(time.time())
            seen["reason"] = choice["finish_reason"] or seen["reason"]
        if event.get("usage"):
            seen["tokens"] = event["usage"]["completion_tokens"]
