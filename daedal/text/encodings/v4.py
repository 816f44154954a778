"""Prompts of V4, by the rules of the encoder that ships with its checkpoints (`encoding/encoding_dsv4.py`).

There is no tool role: results become part of a user turn, in the order of the calls. Past thoughts are dropped at the
last user turn unless any message defines tools; then all are kept. A message's `task` asks for a quick instruction
instead of an answer. The first release and the one of 31 July differ in their levels of effort alone. Knows nothing of
answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from daedal.errors import TemplateError
from daedal.text.encodings.dsml import INVOKE, PARAMETER, V4_BLOCK, write_calls, write_definitions
from daedal.text.encodings.messages import Message, Wishes
from daedal.text.encodings.tokens import ASSISTANT, BOS, DSML, EOS, LATEST_REMINDER, TASKS, THINK, THINK_END, USER

ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
_BLOCK = f"{DSML}{V4_BLOCK}"
_TOOLS = (
    "## Tools\n"
    "\n"
    "You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "
    f'"<{_BLOCK}>" block like the following:\n'
    "\n"
    f"<{_BLOCK}>\n"
    f'<{INVOKE} name="$TOOL_NAME">\n'
    f'<{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{PARAMETER}>\n'
    "...\n"
    f"</{INVOKE}>\n"
    f'<{INVOKE} name="$TOOL_NAME2">\n'
    "...\n"
    f"</{INVOKE}>\n"
    f"</{_BLOCK}>\n"
    "\n"
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, '
    'arrays, objects), pass the value in JSON format and set `string="false"`.\n'
    "\n"
    f"If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside "
    f"{THINK}...{THINK_END} BEFORE any tool calls or final response.\n"
    "\n"
    f"Otherwise, output directly after {THINK_END} with tool calls or final response.\n"
    "\n"
    "### Available Tool Schemas\n"
    "\n"
)
_TOOLS_END = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


@dataclass(frozen=True, kw_only=True)
class _Result:
    text: str
    call_id: str
    where: str


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One message, or a user's messages and the results of tools next to them, as `parts`."""

    message: Message
    role: str
    parts: tuple[str | _Result, ...] = ()
    task: str | None = None

    @property
    def asks(self) -> bool:
        return self.role in ("user", "developer")


def write_v4(messages: Sequence[Message], wishes: Wishes) -> str:
    """V4's prompt. In a thinking conversation, effort's paragraph comes first, and old developer messages go."""
    thinking = wishes.thinking
    keeps_thoughts = wishes.keeps_thoughts or any(message.tools for message in messages)
    turns = _merged(messages)
    if thinking and not keeps_thoughts:
        asked = _last_question(turns)
        turns = [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= asked]
    asked = _last_question(turns)
    text = BOS + (wishes.effort if thinking else "")
    for index, turn in enumerate(turns):
        follows_task = index > 0 and turns[index - 1].task is not None
        shows_thought = thinking and not follows_task and (keeps_thoughts or index > asked)
        text += _body(turn, shows_thought=shows_thought)
        is_last = index + 1 == len(turns)
        if not is_last and turns[index + 1].role not in ("assistant", "latest_reminder"):
            continue
        opens_thought = thinking and (keeps_thoughts or index >= asked)
        if turn.task is not None:
            text += _instruction(turn.task, thinking=thinking)
        elif turn.asks and (wishes.add_generation_prompt or not is_last):
            text += ASSISTANT + (THINK if opens_thought else THINK_END)
    return text


def _last_question(turns: Sequence[_Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.asks), default=-1)


def _instruction(task: str, *, thinking: bool) -> str:
    if task != "action":
        return TASKS[task]
    return ASSISTANT + (THINK if thinking else THINK_END) + TASKS[task]


def _body(turn: _Turn, *, shows_thought: bool) -> str:
    message = turn.message
    if turn.role == "user":
        parts = (part if isinstance(part, str) else f"<tool_result>{part.text}</tool_result>" for part in turn.parts)
        return USER + "\n\n".join(parts)
    if turn.role == "assistant":
        thought = message.reasoning + THINK_END if shows_thought else ""
        calls = write_calls(message.calls, V4_BLOCK, message.where)
        return thought + message.content + calls + ("" if message.continues else EOS)
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + message.content
    if turn.role == "developer" and not message.content:
        raise TemplateError(f"{message.where} is of the role developer and empty: give it content")
    return (USER if turn.role == "developer" else "") + message.content + write_definitions(message, _TOOLS, _TOOLS_END)


def _merged(messages: Sequence[Message]) -> list[_Turn]:
    """Turns: neighbouring user and tool messages are one, and results stand in the order of the calls."""
    turns: list[_Turn] = []
    called = False
    for message in messages:
        before = turns[-1] if turns and turns[-1].role == "user" else None
        if message.role == "tool":
            if not called:
                raise TemplateError(
                    f"{message.where} answers no tool call: put it after the message that made the call"
                )
            part = _Result(text=message.content, call_id=message.call_id, where=message.where)
            turns.append(_joined(turns.pop(), part) if before else _Turn(message=message, role="user", parts=(part,)))
        elif message.role == "user" and before is not None and before.task is None:
            if message.task is not None:
                raise TemplateError(f"{message.where}.task is set after another user message: merge the two")
            turns.append(_joined(turns.pop(), message.content))
        else:
            parts = (message.content,) if message.role == "user" else ()
            turns.append(_Turn(message=message, role=message.role, parts=parts, task=message.task))
            called = called or bool(message.calls)
    return _sorted(turns)


def _joined(turn: _Turn, part: str | _Result) -> _Turn:
    return replace(turn, parts=(*turn.parts, part))


def _sorted(turns: Sequence[_Turn]) -> list[_Turn]:
    order: dict[str, int] = {}
    ordered = []
    for turn in turns:
        if turn.message.calls:
            order = {call.id: index for index, call in enumerate(turn.message.calls) if call.id}
        ordered.append(_in_order(turn, order))
    return ordered


def _in_order(turn: _Turn, order: dict[str, int]) -> _Turn:
    results = [part for part in turn.parts if isinstance(part, _Result)]
    if len(results) < 2 or not order:
        return turn
    for result in results:
        if result.call_id not in order:
            raise TemplateError(
                f"{result.where}.tool_call_id is {result.call_id!r}, no call before it has this id: give the call's id"
            )
    queue = iter(sorted(results, key=lambda result: order[result.call_id]))
    return replace(turn, parts=tuple(next(queue) if isinstance(part, _Result) else part for part in turn.parts))
