"""Targets for `tests.hostile`: events as the server sends them, read back by the official clients' own decoders."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anthropic._streaming
import openai._streaming
from hypothesis import strategies as st

from daedal.serve.api.delivery import Dialect, EventStream
from tests.hostile import Target
from tests.text.hostile_answers import TEXTS

EVENTS = st.tuples(
    st.lists(st.dictionaries(st.sampled_from(("content", "arguments", "a\nb", "data")), TEXTS, max_size=3), max_size=4),
    st.booleans(),
    st.lists(st.integers(0, 400), max_size=6),
)


class _Generation:
    """As much of a generation as a stream of events needs."""

    def close(self) -> None:
        pass


def read_events(example: tuple[list[dict[str, str]], bool, list[int]], directory: Path) -> None:
    """Whatever an event holds and wherever the network cuts it, both clients read what was sent."""
    values, named, cuts = example
    sent = [{"type": "delta", **value} for value in values]
    stream = EventStream(_Generation(), _each(sent), dialect=Dialect(named=named))  # type: ignore[arg-type]
    whole = b"".join(asyncio.run(_all(stream)))
    places = sorted({min(cut, len(whole)) for cut in cuts})
    pieces = [whole[begin:end] for begin, end in itertools.pairwise([0, *places, len(whole)])]
    for decoder in (openai._streaming.SSEDecoder(), anthropic._streaming.SSEDecoder()):
        *events, last = decoder.iter_bytes(iter(pieces))
        assert [json.loads(event.data) for event in events] == sent
        assert all(event.event == ("delta" if named else None) for event in events)
        assert last.data == "[DONE]"
    # Who splits lines by Unicode's rules, as httpx does, reads the same.
    lines = [line.removeprefix("data: ") for line in whole.decode().splitlines() if line.startswith("data: {")]
    assert [json.loads(line) for line in lines] == sent


async def _each(values: list[dict[str, str]]) -> AsyncIterator[Mapping[str, object]]:
    for value in values:
        yield value


async def _all(stream: EventStream) -> list[Any]:
    return [piece async for piece in stream.body_iterator]


TARGETS = (Target(name="events", examples=EVENTS, check=read_events),)
