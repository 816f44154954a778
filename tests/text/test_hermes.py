"""Tool calls between `<tool_call>` tags: however they are split, however they are written, and what is none."""

import itertools
import json
from pathlib import Path

import pytest

from daedal.text.chat import load_format
from daedal.text.encodings.answers import Answer, gather
from daedal.text.encodings.hermes import HermesGrammar
from daedal.text.encodings.spelling import HERMES_SPELLING
from daedal.text.encodings.stream import StreamParser
from tests.tiny import tiny_checkpoint

ARGUMENTS = {"city": 'Zürich "HB" }] </tool_call> \\ 🦊', "days": [1, {"a": None}]}


def call(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


ANSWER = f"Let me see.\n{call('get_weather', ARGUMENTS)}\n{call('now', {})}"


def parsed(text: str, cuts: tuple[int, ...] = ()) -> Answer:
    parser = StreamParser(HermesGrammar(), ids=map(str, itertools.count()).__next__, eos="<|end|>")
    places = (0, *cuts, len(text))
    deltas = [delta for begin, end in itertools.pairwise(places) for delta in parser.push(text[begin:end])]
    return gather(deltas + parser.finish())


def test_calls_are_told_from_text_at_every_split() -> None:
    whole = parsed(ANSWER)
    assert whole.content == "Let me see."
    assert [(one.name, json.loads(one.arguments)) for one in whole.tool_calls] == [
        ("get_weather", ARGUMENTS),
        ("now", {}),
    ]
    for cut in range(1, len(ANSWER)):
        assert parsed(ANSWER, (cut,)) == whole, cut
    assert parsed(ANSWER, tuple(range(1, len(ANSWER)))) == whole


def test_arguments_come_before_their_end() -> None:
    parser = StreamParser(HermesGrammar())
    deltas = parser.push('<tool_call>\n{"name": "f", "arguments": {"city": "Par')
    assert gather(deltas).tool_calls[0].arguments == '{"city": "Par'


@pytest.mark.parametrize(
    "body",
    [
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"name":"f","parameters":{"a": 1}}',
        '  {"name" : "f" , "arguments" : {"a": 1} , "more": 2 } ',
    ],
)
def test_other_ways_to_write_a_call_are_read(body: str) -> None:
    for cut in range(1, len(body)):
        (one,) = parsed(f"<tool_call>{body}</tool_call>", (cut,)).tool_calls
        assert (one.name, json.loads(one.arguments)) == ("f", {"a": 1})


@pytest.mark.parametrize(
    "text", ["<tool_call>hello</tool_call> there", '<tool_call>\n{"name": 3}\n</tool_call>', "a<b"]
)
def test_what_is_no_call_is_text(text: str) -> None:
    for cut in range(1, len(text)):
        assert parsed(text, (cut,)) == Answer(content=text)


def test_a_cut_call_shows_what_there_is() -> None:
    for length in range(ANSWER.index("{") + 1, len(ANSWER)):
        cut = parsed(ANSWER[:length])
        assert cut.content == "Let me see."
        for one, full in zip(cut.tool_calls, parsed(ANSWER).tool_calls, strict=False):
            assert full.arguments.startswith(one.arguments)


def test_a_template_that_writes_such_calls_is_known_by_them(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
        "{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    format = load_format(directory)
    assert format.spelling is HERMES_SPELLING
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}]
    prompt = format.render([{"role": "assistant", "content": "", "tool_calls": calls}])
    assert prompt == 'assistant:<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>'
    deltas = format.parser("").push(call("f", {"a": 1}))
    assert [one.name for one in gather(deltas).tool_calls] == ["f"]
