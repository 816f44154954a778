"""Targets for `tests.hostile` among the answers of models: tool calls of every format, and events as they are sent."""

import itertools
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from daedal.text.encodings.answers import Answer, gather
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.hermes import HERMES_BEGIN, HERMES_END, HermesGrammar
from daedal.text.encodings.stream import StreamParser
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
    THINK,
    THINK_END,
)
from tests.hostile import Target

_TAGS = (
    *(THINK, THINK_END, EOS, BAR, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR),
    *(f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", f"<{DSML}function_calls>", f"</{DSML}invoke>"),
    *(f'<{DSML}invoke name="f">', f'<{DSML}invoke name="', f'<{DSML}parameter name="a" string="true">'),
    *(f'<{DSML}parameter name="b" string="false">', f"</{DSML}parameter>", f"<{DSML}", f"</{DSML}"),
    *(HERMES_BEGIN, HERMES_END, '{"name": "f", "arguments": {', "}}", "{", "}", '"', "\\", "[1e999]"),
    *("```json\n", "\n```", "\n", "\n\n", " ", "<", "</", ">", "f", "function", "1.5", "nul", "\0", "\u2028", "🦊"),
)
TEXTS = st.lists(st.sampled_from(_TAGS) | st.text(max_size=4), max_size=16).map("".join)
ANSWERS = st.tuples(
    st.sampled_from((*FORMATS, "hermes")),
    st.sampled_from((ASSISTANT, ASSISTANT + THINK, ASSISTANT + THINK_END, "")),
    TEXTS,
    st.lists(st.integers(0, 200), max_size=5),
)


def read_answer(example: tuple[str, str, str, list[int]], directory: Path) -> None:
    """Reads the text cut as told, at once, and character by character: three times the same."""
    name, prompt, text, cuts = example
    places = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[begin:end] for begin, end in itertools.pairwise([0, *places, len(text)])]
    whole = _plain(_streamed(_parser(name, prompt), [text]))
    assert _plain(_streamed(_parser(name, prompt), pieces)) == whole
    assert _plain(_streamed(_parser(name, prompt), list(text))) == whole


def parse_answer(example: tuple[str, str, str, list[int]], directory: Path) -> None:
    """Reads the text strictly; what comes back is JSON where it says so."""
    name, prompt, text, _ = example
    if name == "hermes":
        return
    for call in FORMATS[name].parse(text, thinking=prompt.endswith(THINK)).tool_calls:
        json.loads(call.arguments)


def _parser(name: str, prompt: str) -> StreamParser:
    return StreamParser(HermesGrammar()) if name == "hermes" else FORMATS[name].parser(prompt)


def _streamed(parser: StreamParser, pieces: list[str]) -> Answer:
    return gather([*itertools.chain.from_iterable(map(parser.push, pieces)), *parser.finish()])


def _plain(answer: Answer) -> Any:
    return answer.reasoning, answer.content, [(call.name, call.arguments) for call in answer.tool_calls]


TARGETS = (
    Target(name="answers, streamed", examples=ANSWERS, check=read_answer),
    Target(name="answers, strictly", examples=ANSWERS, check=parse_answer),
)
