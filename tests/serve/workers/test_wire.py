"""Messages between the two processes: they arrive as they were, and what is none of them is refused, not believed."""

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daedal.cost.spending import Spent
from daedal.errors import CapacityError, CheckpointError, DeadlineError, OverloadError, RequestError
from daedal.infer.request import Output, Request, SamplingParams, TokenLogprobs
from daedal.infer.stats import ExpertsSeen
from daedal.serve.workers import wire
from daedal.serve.workers.engine_host import _Host
from daedal.serve.workers.engine_loop import EngineLoop
from daedal.serve.workers.worker import Desk
from daedal.text.structure.shape import Shape
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedEngine


@contextmanager
def pair() -> Iterator[tuple[wire.Connection, wire.Connection, socket.socket]]:
    """The front end's side, the engine's, and the socket that leads to the latter."""
    ours, theirs = socket.socketpair()
    front, engine = wire.front_end(ours), wire.engine_side(theirs)
    try:
        yield front, engine, ours
    finally:
        front.close()
        engine.close()


def test_requests_arrive_as_they_were(checkpoint: Path) -> None:
    structures = Structures(Tokenizer.load(checkpoint))
    rule = structures.make(Shape(json={"type": "object"}))
    full = SamplingParams(
        max_tokens=7,
        temperature=0.1 + 0.2,
        top_k=3,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        seed=-(2**63),
        stop=("end", "🙂\n"),
        stop_ids=(4, 5),
        skip_special_tokens=False,
        logprobs=5,
        prompt_logprobs=0,
        logit_bias={3: -100.0, 7: 0.5},
    )
    prompt = tuple(range(300))
    asked = [
        Request(id="a-0", prompt=prompt, params=full, structure=rule, cache_salt="ann"),
        Request(id="a-1", prompt=prompt, params=SamplingParams(ignore_eos=True)),
        Request(id="a-2", prompt=(5,), params=full, priority=-7, seconds=0.25),
    ]
    with pair() as (front, engine, _):
        front.send(wire.Submit.of(7, asked))
        arrived = engine.receive()
    assert arrived.number == 7
    assert len(arrived.prompts) == 2
    grammars: list[str] = []
    assert arrived.requests(lambda grammar: grammars.append(grammar) or rule) == asked
    assert grammars == [rule.grammar]


def test_reports_arrive_as_they_were(checkpoint: Path) -> None:
    output = Output(
        request_id="a",
        ids=[1, 2],
        text="naïve 🙂 \ufffd \x00",
        logprobs=[TokenLogprobs(id=1, logprob=-1 / 3, top=((1, -1 / 3), (2, -math.inf)))],
        prompt_logprobs=[None, TokenLogprobs(id=2, logprob=-1e-300)],
        finish_reason="stop",
        stop="end",
        spent=Spent(flops=1e18, kv_byte_seconds=0.1, device_seconds=2.0, joules=None, dollars=1e-9),
        num_cached=16,
    )
    stats = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: []).stats()
    sent = [
        wire.Delivered(outputs=(output, Output(request_id="b")), stats=stats),
        wire.Opened(max_context=9, stats=stats, facts={"a": [1, None, "x"]}),
        wire.Accepted(number=1),
        wire.Cut(request_ids=("a", "b")),
        wire.Looked(seen=ExpertsSeen(layers=(1, 3), counts=((0, 5), (5, 0)), num_tokens=5)),
        wire.Refused(number=2, error=wire.Told.of(CapacityError("too long: shorten it", param="prompt"))),
        wire.NotOpened(error=wire.Told.of(CheckpointError("no such thing: name another"))),
    ]
    with pair() as (front, engine, _):
        for report in sent:
            engine.send(report)
            assert front.receive() == report
        engine.hang_up()
        assert front.receive() is None


@pytest.mark.parametrize(
    "error",
    [
        RequestError("a", param="n"),
        CapacityError("b", param=None),
        OverloadError("c"),
        DeadlineError("e", wait=7.5),
        CheckpointError("d"),
    ],
)
def test_an_error_is_the_same_on_the_other_side(error: Exception) -> None:
    again = wire.Told.of(error).raised()
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_defect_tells_nothing_and_names_that_are_no_errors_of_ours_are_none() -> None:
    assert wire.Told.of(ZeroDivisionError("a secret")) == wire.Told(name="", message="")
    for name in ("", "ZeroDivisionError", "SystemExit", "__builtins__"):
        assert wire.Told(name=name, message="x").raised() is None


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_what_is_no_message_is_refused(garbage: bytes, framed: bool) -> None:
    data = wire.MAGIC + len(garbage).to_bytes(4, "big") + garbage if framed else garbage
    with pair() as (front, engine, ours):
        ours.sendall(data)
        front.hang_up()
        try:
            assert engine.receive() is None
        except wire.WireError:
            assert len(data) >= 8


@pytest.mark.parametrize(
    "head", [b"DDL\x02" + bytes(4), wire.MAGIC + (wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big")], ids=["version", "size"]
)
def test_another_version_and_a_frame_beyond_the_cap_are_refused_by_their_head(head: bytes) -> None:
    with pair() as (_, engine, ours):
        ours.sendall(head)
        with pytest.raises(wire.WireError, match="none of ours"):
            engine.receive()


@pytest.mark.parametrize(
    "body",
    [
        b'{"kind": "open", "options": {',
        b'{"kind": "shutdown"}',
        b'{"kind": "submit", "number": "x", "prompts": [], "asked": []}',
        b'{"kind": "submit", "number": 1, "prompts": [[1e400]], "asked": []}',
        b'{"kind": "submit", "number": 1, "prompts": [], "asked": [{"id": "a", "prompt": 0, "params": {"top_p": 7}}]}',
    ],
    ids=["cut JSON", "unknown kind", "wrong type", "not an integer", "beyond its range"],
)
def test_messages_are_validated(body: bytes) -> None:
    with pair() as (_, engine, ours):
        ours.sendall(wire.MAGIC + len(body).to_bytes(4, "big") + body)
        with pytest.raises(wire.WireError, match="holds no message"):
            engine.receive()


def test_a_request_beyond_the_cap_is_the_clients_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 500)
    with pair() as (front, _, _), pytest.raises(RequestError, match="500 are allowed") as caught:
        front.frame(wire.Submit.of(1, [Request(id="a", prompt=(5,) * 900, params=SamplingParams())]))
    assert caught.value.param == "prompt"


def test_an_answer_beyond_the_cap_is_cut_and_the_others_are_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: []).stats()
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 3000)
    entries = [TokenLogprobs(id=1, logprob=-1.0, top=((1, -1.0),) * 20)] * 20
    long, short = Output(request_id="long", prompt_logprobs=entries), Output(request_id="short", ids=[7])
    with pair() as (front, engine, _):
        host = _Host(engine)
        host._loop = loop = EngineLoop(ScriptedEngine(Tokenizer.load(checkpoint), lambda _: []), host)
        host.delivered([long, short], stats)
        cut, told = front.receive(), front.receive()
    assert isinstance(told, wire.Delivered)
    assert told.outputs == (short,)
    assert isinstance(cut, wire.Cut)
    assert cut.request_ids == ("long",)
    assert cut.refusal is not None
    assert (str(cut.refusal.raised()), cut.refusal.param) == (
        "the answer takes more than 3000 bytes to hand over: ask for fewer logprobs",
        "logprobs",
    )
    assert [command.request_ids for command in loop._commands] == [{"long"}], "the engine goes on without it"


def test_who_waits_for_an_answer_that_is_refused_late_is_told_why() -> None:
    async def scenario() -> None:
        desk, refusal = Desk(lambda ids: None), RequestError("too much: ask for less", param="logprobs")
        submission = desk.enter([Request(id="a", prompt=(5,), params=SamplingParams())])
        desk.accepted(submission.number)
        await submission.answer.future
        desk.cut(["a"], refusal=refusal)
        with pytest.raises(RequestError, match="ask for less"):
            await anext(submission.stream)
        assert not desk.num_requests

    asyncio.run(scenario())
