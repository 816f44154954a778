"""What an answer is made of: a thought, text, and tool calls, whole or as they stream.

The shapes follow OpenAI's chat completions: the first delta of a call carries its index, id and name, later ones only
fragments of its arguments, which are one JSON text cut anywhere. Knows nothing of how a format spells any of it.
"""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

Ids = Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A piece of one tool call. id and name: of the first piece alone. arguments: a fragment of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What is new in an answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call. arguments: JSON text; of an answer that was cut short it may end anywhere."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def new_call_id() -> str:
    """`call_` and 24 random hexadecimal digits."""
    return f"call_{uuid.uuid4().hex[:24]}"


def gather(deltas: Iterable[Delta]) -> Answer:
    """The answer that the deltas add up to."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[tuple[ToolCallDelta, list[str]]] = []
    for delta in deltas:
        reasoning.append(delta.reasoning)
        content.append(delta.content)
        for piece in delta.tool_calls:
            if piece.index == len(calls):
                calls.append((piece, []))
            calls[piece.index][1].append(piece.arguments)
    return Answer(
        reasoning="".join(reasoning),
        content="".join(content),
        tool_calls=tuple(
            ToolCall(name=first.name or "", arguments="".join(pieces), id=first.id) for first, pieces in calls
        ),
    )


class Sink:
    """Collects the deltas of one answer in order; neighbours of one kind become one, but for the first of a call."""

    def __init__(self, ids: Ids):
        self._ids = ids
        self._num_calls = 0
        self._deltas: list[Delta] = []

    def reasoning(self, text: str) -> None:
        if text:
            last = self._last(lambda delta: bool(delta.reasoning))
            self._deltas.append(replace(last, reasoning=last.reasoning + text))

    def content(self, text: str) -> None:
        if text:
            last = self._last(lambda delta: bool(delta.content))
            self._deltas.append(replace(last, content=last.content + text))

    def begin_call(self, name: str) -> None:
        piece = ToolCallDelta(index=self._num_calls, id=self._ids(), name=name)
        self._num_calls += 1
        self._deltas.append(Delta(tool_calls=(piece,)))

    def arguments(self, fragment: str) -> None:
        """Goes to the call that began last."""
        if fragment:
            last = self._last(lambda delta: bool(delta.tool_calls) and delta.tool_calls[0].id is None)
            before = last.tool_calls[0].arguments if last.tool_calls else ""
            piece = ToolCallDelta(index=self._num_calls - 1, arguments=before + fragment)
            self._deltas.append(Delta(tool_calls=(piece,)))

    def take(self) -> list[Delta]:
        """Everything since the last `take`."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _last(self, fits: Callable[[Delta], bool]) -> Delta:
        """The last delta, taken out to be extended, or an empty one."""
        return self._deltas.pop() if self._deltas and fits(self._deltas[-1]) else Delta()
