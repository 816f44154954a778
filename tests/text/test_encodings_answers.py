"""Answers in DeepSeek's formats: read strictly as the published parsers do, and as they stream, cut anywhere."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daedal.errors import TemplateError
from daedal.text.encodings.answers import Answer, Delta, ToolCallDelta, gather, new_call_id
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.stream import StreamParser, starts_in_thought
from daedal.text.encodings.tokens import (
    ASSISTANT,
    BAR,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    EOS,
    TASKS,
    THINK,
    THINK_END,
    USER,
)

CASES = json.loads((Path(__file__).parent / "vectors/generated/answers.json").read_text(encoding="utf-8"))
V4 = FORMATS["deepseek-v4"]
OPEN, CLOSED = ASSISTANT + THINK, ASSISTANT + THINK_END
INVOKE = f'<{DSML}invoke name="f">\n'
TEXT = f'<{DSML}parameter name="a" string="true">x</{DSML}parameter>\n'
NUMBER = f'<{DSML}parameter name="b" string="false">1.5</{DSML}parameter>\n'
END = f"</{DSML}invoke>\n"
BLOCK, BLOCK_END = f"\n\n<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"


def streamed(parser: StreamParser, pieces: Sequence[str]) -> Answer:
    return gather([*itertools.chain.from_iterable(map(parser.push, pieces)), *parser.finish()])


def plain(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    return answer.reasoning, answer.content, [(call.name, call.arguments) for call in answer.tool_calls]


@pytest.mark.parametrize("case", CASES)
def test_strict_reading_is_that_of_the_published_parsers(case: dict[str, Any]) -> None:
    format = FORMATS[case["format"]]
    if case.get("refused"):
        with pytest.raises(TemplateError, match=": "):
            format.parse(case["text"], thinking=case["thinking"])
        return
    read = plain(format.parse(case["text"], thinking=case["thinking"]))
    assert read == (case["reasoning"], case["content"], [tuple(call) for call in case["tool_calls"]])
    prompt = OPEN if case["thinking"] else CLOSED
    assert plain(streamed(format.parser(prompt), case["text"])) == read  # character by character


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("deepseek-v4", f"a{THINK_END}b", "does not end with its end token"),
        ("deepseek-v4", f"a{EOS}", f"the thought has no {THINK_END}"),
        ("deepseek-v4", f"a{THINK_END}b{EOS}c", "the end token is followed by 'c'"),
        ("deepseek-v4", f"a{THINK_END}{THINK}{EOS}", f"holds the token {THINK}"),
        ("deepseek-v4", f"{THINK_END}{BLOCK}x", "is followed by '>"),
        ("deepseek-v4", f"{THINK_END}{BLOCK}{INVOKE}{TEXT}{TEXT}{END}{BLOCK_END}", "the parameter 'a' is given twice"),
        ("deepseek-v4", f"{THINK_END}{BLOCK}{INVOKE}{TEXT}{BLOCK_END}", "is followed by '>"),
        ("deepseek-v4", f"{THINK_END}{BLOCK}{INVOKE}{TEXT}{END}{BLOCK_END}c", "followed by 'c'"),
        ("deepseek-v3.1", f"{THINK_END}a", "does not end with its end token"),
        ("deepseek-v3.1", f"a{EOS}", f"the thought has no {THINK_END}"),
        ("deepseek-v3.1", f"{THINK_END}{CALLS_BEGIN}{EOS}", "the tool calls have no end"),
        ("deepseek-v3.1", f"{THINK_END}{CALLS_BEGIN}x{CALLS_END}{EOS}", "the tool calls hold 'x'"),
        (
            "deepseek-v3.1",
            f"{THINK_END}{CALLS_BEGIN}{CALL_BEGIN}f{CALL_SEPARATOR}[1]{CALL_END}{CALLS_END}{EOS}",
            "the arguments of 'f' holds a JSON list",
        ),
    ],
)
def test_strict_reading_names_what_is_wrong(name: str, text: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        FORMATS[name].parse(text, thinking=True)


def test_deltas_come_as_early_as_they_can_and_look_like_openais() -> None:
    ids = map("call_{}".format, itertools.count())
    parser = V4.parser(OPEN, ids=lambda: next(ids))
    assert parser.push("hm") == [Delta(reasoning="hm")]
    assert parser.push("m <b") == [Delta(reasoning="m <b")]
    assert parser.push("</th") == []
    assert parser.push("ink>yes") == [Delta(content="yes")]
    assert parser.push("\n") == []  # a blank line belongs to the call, if one follows
    assert parser.push(f"\n<{DSML}tool_calls>\n{INVOKE}") == []
    first = ToolCallDelta(index=0, id="call_0", name="f")
    assert parser.push(TEXT[:-20]) == [
        Delta(tool_calls=(first,)),
        Delta(tool_calls=(ToolCallDelta(index=0, arguments='{"a": "'),)),
    ]
    assert parser.push(TEXT[-20:] + NUMBER) == [
        Delta(tool_calls=(ToolCallDelta(index=0, arguments='x", "b": 1.5'),)),
    ]
    second, third = parser.push(END + INVOKE + TEXT)[-2:]
    assert second == Delta(tool_calls=(ToolCallDelta(index=1, id="call_1", name="f"),))
    assert third == Delta(tool_calls=(ToolCallDelta(index=1, arguments='{"a": "x"'),))
    assert parser.push(END + BLOCK_END + EOS) == [Delta(tool_calls=(ToolCallDelta(index=1, arguments="}"),))]
    assert parser.finish() == []


def test_calls_have_ids_of_their_own() -> None:
    first, second = new_call_id(), new_call_id()
    assert first != second
    assert len(first) == len("call_") + 24
    assert first.startswith("call_")


MISBEHAVED = {
    "a call ends an open thought": (OPEN, f"hm{BLOCK}{INVOKE}{TEXT}{END}{BLOCK_END}", "hm", "", [("f", '{"a": "x"}')]),
    "a call without its blank line": (CLOSED, f"I look.{BLOCK.strip()}{INVOKE}{END}", "", "I look.", [("f", "{}")]),
    "a call without a block": (CLOSED, f"hi\n\n{INVOKE}{TEXT}{END}", "", "hi", [("f", '{"a": "x"}')]),
    "the other block's name": (
        CLOSED,
        f"{BLOCK}{INVOKE}{TEXT}{END}{BLOCK_END}".replace("tool_calls", "function_calls"),
        "",
        "",
        [("f", '{"a": "x"}')],
    ),
    "a call that closes itself": (CLOSED, f'{BLOCK}<{DSML}invoke name="f"/>\n{BLOCK_END}', "", "", [("f", "{}")]),
    "arguments as one object": (CLOSED, f'{BLOCK}{INVOKE}{{"a": [1]}}\n{END}', "", "", [("f", '{"a": [1]}')]),
    "an open parameter": (
        CLOSED,
        f"{BLOCK}{INVOKE}{TEXT[: TEXT.index('</')]}{END}{BLOCK_END}",
        "",
        "",
        [("f", '{"a": "x"}')],
    ),
    "two blocks": (
        CLOSED,
        f"{BLOCK}{INVOKE}{END}{BLOCK_END}{BLOCK}{INVOKE}{END}{BLOCK_END}",
        "",
        "",
        [("f", "{}"), ("f", "{}")],
    ),
    "text after the calls": (CLOSED, f"hi{BLOCK}{INVOKE}{END}{BLOCK_END}\n\nbye", "", "hi\n\nbye", [("f", "{}")]),
    "cut inside a value": (CLOSED, f"hi{BLOCK}{INVOKE}{TEXT}{NUMBER[:-18]}", "", "hi", [("f", '{"a": "x", "b": 1.5')]),
    "cut inside a tag after a value": (CLOSED, f"{BLOCK}{INVOKE}{TEXT[:-5]}", "", "", [("f", '{"a": "x')]),
    "cut after a parameter": (CLOSED, f"{BLOCK}{INVOKE}{TEXT}", "", "", [("f", '{"a": "x"')]),
    "cut inside a name": (CLOSED, f"hi{BLOCK}{INVOKE[:-4]}", "", "hi", []),
    "cut after a name": (CLOSED, f"hi{BLOCK}{INVOKE}", "", "hi", []),
    "cut inside the block's tag": (CLOSED, f"hi\n\n<{DSML}tool_c", "", "hi", []),
    "cut after a mere sign": (CLOSED, "1 < 2 <", "", "1 < 2 <", []),
    "a block with prose alone": (CLOSED, f"a{BLOCK}b{BLOCK_END}", "", f"a{BLOCK}b{BLOCK_END}", []),
    "an unknown tag": (CLOSED, f"the tag <{DSML}foo> is", "", f"the tag <{DSML}foo> is", []),
    "talk of blocks in a thought": (OPEN, f"a {BLOCK}b{THINK_END}c", f"a {BLOCK}b", "c", []),
    "talk of calls in a thought": (OPEN, f"a {INVOKE}b{THINK_END}c", f"a {INVOKE}b", "c", []),
    "a parameter without its kind": (
        CLOSED,
        f"{BLOCK}{INVOKE}{TEXT}{TEXT}{END}{BLOCK_END}".replace(' string="true"', ""),
        "",
        f"{BLOCK}{INVOKE}{TEXT}{TEXT}{END}{BLOCK_END}".replace(' string="true"', ""),
        [],
    ),
    "a call that breaks off into prose": (
        CLOSED,
        f"{BLOCK}{INVOKE}{TEXT}oh well",
        "",
        "\noh well",
        [("f", '{"a": "x"')],
    ),
    "a thought that the prompt did not open": (ASSISTANT, f"{THINK}a{THINK_END}b", "a", "b", []),
    "a thought that is opened again": (OPEN, f"{THINK}a{THINK_END}b", "a", "b", []),
    "a thought that is closed again": (CLOSED, f"{THINK_END}b", "", "b", []),
    "tags in the middle of an answer": (CLOSED, f"a {THINK} b", "", f"a {THINK} b", []),
}


@pytest.mark.parametrize("name", MISBEHAVED)
def test_misbehaving_answers_lose_nothing_and_leak_no_markup(name: str) -> None:
    prompt, text, reasoning, content, calls = MISBEHAVED[name]
    assert plain(streamed(V4.parser(prompt), [text])) == (reasoning, content, calls)
    assert plain(streamed(V4.parser(prompt), text)) == (reasoning, content, calls)


V3_HEAD = f"{CALLS_BEGIN}{CALL_BEGIN}function{CALL_SEPARATOR}"
TOKEN_CALLS = {
    "one call": ("deepseek-v3", f"hi{V3_HEAD}f\n```json\n{{}}\n```{CALL_END}{CALLS_END}{EOS}", "hi", [("f", "{}")]),
    "no fence": ("deepseek-v3", f'{V3_HEAD}f\n{{"a": 1}}{CALL_END}{CALLS_END}', "", [("f", '{"a": 1}')]),
    "an empty fence": ("deepseek-v3", f"{V3_HEAD}f\n```json\n\n```{CALL_END}{CALLS_END}", "", [("f", "{}")]),
    "backticks in a value": (
        "deepseek-v3",
        f'{V3_HEAD}f\n```json\n{{"a": "\\n```"}}\n```{CALL_END}{CALLS_END}',
        "",
        [("f", '{"a": "\\n```"}')],
    ),
    "cut inside the arguments": ("deepseek-v3", f'{V3_HEAD}f\n```json\n{{"a": "x', "", [("f", '{"a": "x')]),
    "cut inside the name": ("deepseek-v3", f"{V3_HEAD}get_", "", []),
    "no end of the call": (
        "deepseek-v3.1",
        f"{CALLS_BEGIN}{CALL_BEGIN}f{CALL_SEPARATOR}{{}}{CALLS_END}",
        "",
        [("f", "{}")],
    ),
    "no arguments": ("deepseek-v3.1", f"{CALL_BEGIN}f{CALL_SEPARATOR}{CALL_END}", "", [("f", "{}")]),
    "no separator": (
        "deepseek-v3.1",
        f"a{CALLS_BEGIN}{CALL_BEGIN}f{CALL_END}b",
        f"a{CALLS_BEGIN}{CALL_BEGIN}f{CALL_END}b",
        [],
    ),
    "an endless name": (
        "deepseek-v3.1",
        f"{CALLS_BEGIN}{CALL_BEGIN}{'x' * 600}",
        f"{CALLS_BEGIN}{CALL_BEGIN}{'x' * 600}",
        [],
    ),
    "a broken call after a good one": (
        "deepseek-v3.1",
        f"{CALLS_BEGIN}{CALL_BEGIN}f{CALL_SEPARATOR}{{}}{CALL_END}{CALL_BEGIN}g{CALL_END}oops{CALLS_END}",
        f"{CALL_BEGIN}goops",
        [("f", "{}")],
    ),
}


@pytest.mark.parametrize("name", TOKEN_CALLS)
def test_calls_made_of_tokens(name: str) -> None:
    format, text, content, calls = TOKEN_CALLS[name]
    prompt = ASSISTANT if format == "deepseek-v3" else CLOSED
    assert plain(streamed(FORMATS[format].parser(prompt), [text])) == ("", content, calls)
    assert plain(streamed(FORMATS[format].parser(prompt), text)) == ("", content, calls)


def test_line_breaks_around_r1s_thoughts_are_layout() -> None:
    r1 = FORMATS["deepseek-r1"]
    text = f"\nhm\n\nhmm\n{THINK_END}\n\nyes\n{EOS}"
    for prompt, answer in ((f"{OPEN}\n", text), (ASSISTANT, THINK + text)):
        assert plain(streamed(r1.parser(prompt), answer)) == ("hm\n\nhmm", "yes\n", [])
    assert plain(r1.parse(text, thinking=True)) == ("hm\n\nhmm", "yes\n", [])


def test_without_calls_or_thoughts_all_is_content() -> None:
    text = f"a{BLOCK}{INVOKE}{END}{BLOCK_END}"
    assert plain(streamed(V4.parser(CLOSED, calls=False), text)) == ("", text, [])
    silent = f"{THINK}a{THINK_END}b"
    assert plain(streamed(FORMATS["deepseek-v3"].parser(ASSISTANT), silent)) == ("", silent, [])


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        (OPEN, True),
        (f"{OPEN}\n", True),
        (f"{OPEN}so far", True),
        (CLOSED, False),
        (ASSISTANT, False),
        (f"{OPEN}a{THINK_END}b{EOS}{USER}what is {THINK}{CLOSED}", False),
        (f"{OPEN}{TASKS['action']}", False),
        (f"{USER}what is {THINK}{TASKS['query']}", False),
        (f"{OPEN}a{THINK_END}b{EOS}{TASKS['title']}", False),
        (f"{OPEN}a{THINK_END}b", False),
        ("", False),
    ],
)
def test_where_an_answer_begins(prompt: str, inside: bool) -> None:
    assert starts_in_thought(prompt) is inside


WORDS = st.text(st.sampled_from("ab<>\"'\\/\n{}é🦊 "), max_size=8)
VALUES = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
NAMES = st.text(st.sampled_from("abc_é-."), min_size=1, max_size=6)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


def assistant(content: str, thought: str, calls: list[tuple[str, dict[str, object]]]) -> dict[str, object]:
    written = [
        {"id": f"c{index}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for index, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "reasoning_content": thought, "tool_calls": written}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["deepseek-v3", "deepseek-v3.1", "deepseek-v3.2", "deepseek-v4"]),
    content=WORDS,
    thought=WORDS.filter(bool),
    calls=CALLS,
    data=st.data(),
)
def test_the_way_there_and_back(
    name: str, content: str, thought: str, calls: list[tuple[str, dict[str, object]]], data: st.DataObject
) -> None:
    format = FORMATS[name]
    thinking = name in ("deepseek-v3.2", "deepseek-v4")
    question = {"role": "user", "content": "?"}
    prompt = format.render([question], thinking=thinking)
    whole = format.render(
        [question, assistant(content, thought, calls)], thinking=thinking, add_generation_prompt=False
    )
    assert whole.startswith(prompt)
    answer = whole.removeprefix(prompt)
    strict = format.parse(answer, thinking=thinking)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=4)))
    pieces = [answer[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(answer)])]
    for parts in ([answer], pieces, answer):
        assert plain(streamed(format.parser(prompt), parts)) == plain(strict)
    assert (strict.reasoning, strict.content) == (thought if thinking else "", content)
    read = [(call.name, json.loads(call.arguments)) for call in strict.tool_calls]
    assert read == calls


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(FORMATS)), data=st.data())
def test_any_stream_is_read_the_same_however_it_is_cut(name: str, data: st.DataObject) -> None:
    tags = [
        THINK,
        THINK_END,
        EOS,
        BLOCK,
        BLOCK_END,
        INVOKE,
        TEXT,
        TEXT[:-18],
        NUMBER,
        END,
        BAR,
        "<",
        "\n",
        "\n\n",
        "{}",
    ]
    tags += [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR, "function", "f\n", "```json\n", "\n```", "a"]
    text = "".join(data.draw(st.lists(st.sampled_from(tags), max_size=12)))
    prompt = data.draw(st.sampled_from([OPEN, CLOSED, ASSISTANT]))
    format = FORMATS[name]
    whole = plain(streamed(format.parser(prompt), [text]))
    assert plain(streamed(format.parser(prompt), text)) == whole
    middle = len(text) // 2
    assert plain(streamed(format.parser(prompt), [text[:middle], "", text[middle:]])) == whole
