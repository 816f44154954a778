"""An answer as Anthropic's Messages API has it: content blocks, and the events by which they grow.

Thoughts, text and tool calls are blocks of their own, one open at a time. Signatures of thoughts are empty: nobody here
checks them. Knows nothing of HTTP, engines and the message around the blocks.
"""

import json
from collections.abc import Iterator

from daedal.text.encodings.answers import Delta, ToolCallDelta

Event = dict[str, object]


class MessageBlocks:
    """The content of one answer. blocks: those that are closed, as they stand in the message."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, object]] = []
        self._open: dict[str, object] | None = None
        self._text = ""

    def take(self, delta: Delta) -> Iterator[Event]:
        """The events for a piece of the answer."""
        if delta.reasoning:
            yield from self._grow({"type": "thinking", "thinking": "", "signature": ""}, "thinking", delta.reasoning)
        if delta.content:
            yield from self._grow({"type": "text", "text": ""}, "text", delta.content)
        for piece in delta.tool_calls:
            yield from self._call(piece)

    def finish(self) -> Iterator[Event]:
        """Closes the open block."""
        if self._open is None:
            return
        block, self._open = self._open, None
        if block["type"] == "tool_use":
            block["input"] = _object(self._text)
        else:
            block[str(block["type"])] = self._text
        if block["type"] == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        yield {"type": "content_block_stop", "index": len(self.blocks)}
        self.blocks.append(block)

    def _grow(self, empty: dict[str, object], name: str, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != empty["type"]:
            yield from self._begin(empty)
        self._text += text
        yield self._delta({"type": f"{name}_delta", name: text})

    def _call(self, piece: ToolCallDelta) -> Iterator[Event]:
        if piece.id is not None:
            yield from self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
        if piece.arguments:
            self._text += piece.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def _begin(self, block: dict[str, object]) -> Iterator[Event]:
        yield from self.finish()
        self._open, self._text = dict(block), ""
        yield {"type": "content_block_start", "index": len(self.blocks), "content_block": block}

    def _delta(self, delta: dict[str, object]) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks), "delta": delta}


def _object(text: str) -> dict[str, object]:
    """A call's arguments; {} where they were cut or are no object, which the reason for stopping then tells."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
