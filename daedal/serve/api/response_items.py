"""An answer as the Responses API has it: output items, and the typed events by which they grow.

A thought is a `reasoning` item, text a `message`, each tool call a `function_call`. One item is open at a time, and
what is next of another kind closes it. Knows nothing of HTTP, engines and the response around the items.
"""

import uuid
from collections.abc import Iterator
from typing import Literal

from daedal.text.encodings.answers import Delta, ToolCallDelta

Event = dict[str, object]
_Kind = Literal["reasoning", "message", "function_call"]
_PREFIX = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
# By kind: the type of the part that holds the text, and the stem of the events by which it grows.
_PARTS = {"reasoning": ("reasoning_text", "reasoning_text"), "message": ("output_text", "output_text")}


class ResponseItems:
    """The output of one answer. items: those that are closed, as they stand in the response."""

    def __init__(self) -> None:
        self.items: list[dict[str, object]] = []
        self._kind: _Kind | None = None
        self._item: dict[str, object] = {}
        self._text = ""

    def take(self, delta: Delta) -> Iterator[Event]:
        """The events for a piece of the answer."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("message", delta.content)
        for piece in delta.tool_calls:
            yield from self._call(piece)

    def finish(self, *, complete: bool = True) -> Iterator[Event]:
        """Closes the open item. complete: the model ended it itself."""
        if self._kind is not None:
            yield from self._close(complete=complete)

    def _grow(self, kind: Literal["reasoning", "message"], text: str) -> Iterator[Event]:
        part, stem = _PARTS[kind]
        if self._kind != kind:
            yield from self.finish()
            yield from self._open(kind, {"role": "assistant"} if kind == "message" else {"summary": []}, content=[])
            yield self._of_part("response.content_part.added", part=_part(part, ""))
        self._text += text
        more: Event = {"logprobs": []} if kind == "message" else {}
        yield self._of_part(f"response.{stem}.delta", delta=text, **more)

    def _call(self, piece: ToolCallDelta) -> Iterator[Event]:
        if piece.id is not None:
            yield from self.finish()
            yield from self._open("function_call", {"call_id": piece.id, "name": piece.name}, arguments="")
        if piece.arguments:
            self._text += piece.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=piece.arguments)

    def _open(self, kind: _Kind, fields: dict[str, object], **empty: object) -> Iterator[Event]:
        self._kind, self._text = kind, ""
        self._item = {"id": f"{_PREFIX[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items),
            "item": {**self._item, **empty},
        }

    def _close(self, *, complete: bool) -> Iterator[Event]:
        kind, text = self._kind, self._text
        assert kind is not None
        if kind == "function_call":
            self._item["arguments"] = text
            yield self._of_item("response.function_call_arguments.done", arguments=text, name=self._item["name"])
        else:
            part, stem = _PARTS[kind]
            more: Event = {"logprobs": []} if kind == "message" else {}
            yield self._of_part(f"response.{stem}.done", text=text, **more)
            whole = _part(part, text)
            yield self._of_part("response.content_part.done", part=whole)
            self._item["content"] = [whole]
        self._item["status"] = "completed" if complete else "incomplete"
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": self._item}
        self.items.append(self._item)
        self._kind = None

    def _of_item(self, kind: str, **fields: object) -> Event:
        return {"type": kind, "item_id": self._item["id"], "output_index": len(self.items), **fields}

    def _of_part(self, kind: str, **fields: object) -> Event:
        return {**self._of_item(kind), "content_index": 0, **fields}


def _part(kind: str, text: str) -> dict[str, object]:
    more: dict[str, object] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}
