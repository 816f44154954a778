"""One choice of a chat while it grows: the engine's outputs in, pieces of the assistant's message out, and their JSON.

What is a thought and what a tool call, the format's parser says. Reasoning tokens are the ids up to the last one that
brought out text of the thought, so neither an empty thought nor its closing tag counts. Knows nothing of HTTP.
"""

import json
from collections.abc import Iterable, Sequence

from daedal.infer.request import Output
from daedal.text.encodings.answers import Delta, ToolCallDelta, gather
from daedal.text.encodings.stream import StreamParser


class Turn:
    """Follows one choice. parser: of this choice alone."""

    def __init__(self, parser: StreamParser):
        self._parser = parser
        self._num_ids = 0
        self._arguments: list[str] = []  # of each call
        self.reasoning_tokens = 0

    def take(self, output: Output) -> list[Delta]:
        """What the message has gained; with the last output, what was held back too."""
        text, deltas, start = output.text or "", list[Delta](), 0
        for length in output.lengths:
            self._num_ids += 1
            deltas += self._read(self._parser.push(text[start : start + length])) if length else ()
            start += length
        self._num_ids += len(output.ids) - len(output.lengths)
        last = self._parser.push(text[start:])
        if output.finish_reason is not None:
            last += self._parser.finish()
        deltas = joined([*deltas, *self._read(last)])
        for piece in (piece for delta in deltas for piece in delta.tool_calls):
            if piece.index == len(self._arguments):
                self._arguments.append("")
            self._arguments[piece.index] += piece.arguments
        return deltas

    def _read(self, deltas: list[Delta]) -> list[Delta]:
        """These, which came out with the latest id."""
        if any(delta.reasoning for delta in deltas):
            self.reasoning_tokens = self._num_ids
        return deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """The API's word for why the engine ended this choice, None while it goes on. Calls that a stop string or an
        end token cut open are not for execution, so then it remains `stop`.
        """
        calls = reason == "stop" and self._arguments and all(map(_is_json, self._arguments))
        return "tool_calls" if calls else reason


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same answer in as few pieces as there are changes between thought, text and calls."""
    pieces: list[Delta] = []
    for delta in deltas:
        last = pieces[-1] if pieces else None
        if last is None or _kind(last) != _kind(delta) or delta.tool_calls:
            pieces.append(delta)
        else:
            pieces[-1] = Delta(reasoning=last.reasoning + delta.reasoning, content=last.content + delta.content)
    return pieces


def _kind(delta: Delta) -> tuple[bool, bool, bool]:
    return bool(delta.reasoning), bool(delta.content), bool(delta.tool_calls)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def message_json(deltas: Iterable[Delta]) -> dict[str, object]:
    """The whole message; its content is null where tool calls are all there is."""
    answer = gather(deltas)
    content = None if answer.tool_calls and not answer.content else answer.content
    message: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
    message["reasoning_content"] = answer.reasoning or None
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    return message


def delta_json(delta: Delta) -> dict[str, object]:
    """A piece of it. `reasoning_content` is always there, as clients of DeepSeek's API read it unasked."""
    fields: dict[str, object] = {"reasoning_content": delta.reasoning or None}
    if delta.content:
        fields["content"] = delta.content
    if delta.tool_calls:
        fields["tool_calls"] = _calls_json(delta.tool_calls)
    return fields


def _calls_json(calls: Sequence[ToolCallDelta]) -> list[dict[str, object]]:
    pieces = []
    for call in calls:
        piece: dict[str, object] = {"index": call.index, "function": {"arguments": call.arguments}}
        if call.id is not None:
            named = {"name": call.name, "arguments": call.arguments}
            piece = {"index": call.index, "id": call.id, "type": "function", "function": named}
        pieces.append(piece)
    return pieces
