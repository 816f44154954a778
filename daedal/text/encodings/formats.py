"""The chat formats of DeepSeek's models by name: each renders conversations and parses the answers to them.

What a format cannot do (think, be told how hard to, be given tools) it refuses in one sentence. Which format a
checkpoint needs is decided in `daedal.text.chat`. Knows nothing of files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from daedal.errors import TemplateError
from daedal.text.encodings import tokens, v3, v4, v32
from daedal.text.encodings.answers import Answer, Ids, new_call_id
from daedal.text.encodings.dsml import V4_BLOCK, V32_BLOCK, DsmlReader
from daedal.text.encodings.dsml_stream import DsmlGrammar
from daedal.text.encodings.messages import Message, Rules, Wishes, read_messages, read_tools
from daedal.text.encodings.plain import check_plain, short
from daedal.text.encodings.spelling import V3_SPELLING, V4_SPELLING, V31_SPELLING, V32_SPELLING, CallSpelling
from daedal.text.encodings.stream import Grammar, StreamParser, starts_in_thought

_CHAT = ("system", "user", "assistant", "tool")
_TURN = (tokens.BOS, tokens.EOS, tokens.USER, tokens.ASSISTANT)
_THOUGHT = (tokens.THINK, tokens.THINK_END)
_ALIASES = ("enable_thinking", "reasoning_effort")


@dataclass(frozen=True, kw_only=True)
class DeepSeekFormat:
    """One chat format.

    thinks: the choices there are; thinks_by_default: what holds where nobody chooses. efforts: paragraphs by level,
    None where it is not known which apply. variables: what `render` knows beside the usual. tokens: what the tokenizer
    must have. trims: line breaks around a thought are layout. shows_special_tokens: answers must be decoded with
    special tokens visible; the checkpoint's tokenizer decides it.
    """

    name: str
    rules: Rules
    write: Callable[[Sequence[Message], Wishes], str]
    read: Callable[[str, bool], Answer]
    grammar: Callable[[], Grammar]
    spelling: CallSpelling
    tokens: tuple[str, ...]
    thinks: tuple[bool, ...] = (True, False)
    thinks_by_default: bool = False
    thinks_with_tools: bool = True
    takes_tools: bool = True
    efforts: Mapping[str, str] | None = field(default_factory=dict)
    variables: tuple[str, ...] = ()
    trims: bool = False
    shows_special_tokens: bool = True

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: object = None,
        thinking: bool | None = None,
        effort: str | None = None,
        **variables: object,
    ) -> str:
        """The conversation as one text, special tokens and all.

        messages: in OpenAI's shape, with `reasoning_content` on assistant messages. tools: OpenAI's definitions; they
        replace those of the first message. thinking: None is the format's default. effort: one of the format's levels,
        of effect where the answer thinks. variables: `enable_thinking` and `reasoning_effort`, as templates name these
        two; `response_format` (V3.2, V4), a JSON schema; `drop_thinking` (V4). TemplateError where the format has no
        place for something.
        """
        given = {name: value for name, value in variables.items() if value is not None}
        unknown = sorted(set(given) - {*_ALIASES, *self.variables})
        if unknown:
            raise TemplateError(f"{self.name} knows no variable {', '.join(unknown)}: leave it out")
        check_plain(given, "the variables")
        read = read_messages(messages, self.rules)
        read = self._define(read, read_tools(tools, "tools"), given.get("response_format"))
        thinking = self._thinking(thinking, given.get("enable_thinking"))
        if thinking and not self.thinks_with_tools and any(message.tools for message in read):
            raise TemplateError(f"{self.name} uses tools only without thinking: set thinking to false")
        wishes = Wishes(
            thinking=thinking,
            effort=self._effort(effort if effort is not None else given.get("reasoning_effort")),
            keeps_thoughts=_flag(given.get("drop_thinking"), "drop_thinking") is False,
            add_generation_prompt=add_generation_prompt,
        )
        return self.write(read, wishes)

    def parser(self, prompt: str, *, calls: bool = True, ids: Ids = new_call_id) -> StreamParser:
        """For one answer to this prompt. calls: whether tool calls are looked for; else they are content."""
        return StreamParser(
            self.grammar() if calls else None,
            in_thought=starts_in_thought(prompt),
            thoughts=True in self.thinks,
            trims=self.trims,
            ids=ids,
        )

    def parse(self, text: str, *, thinking: bool = False) -> Answer:
        """A whole answer, end token included, read strictly; thinking: it begins inside a thought. TemplateError."""
        answer = self.read(text, thinking)
        if not self.trims:
            return answer
        return replace(answer, reasoning=answer.reasoning.strip("\n"), content=answer.content.lstrip("\n"))

    def _define(
        self, messages: list[Message], tools: tuple[Mapping[str, object], ...], response_format: object
    ) -> list[Message]:
        """Puts the request's definitions where the reference has them: at the end of the system message."""
        if tools and not self.takes_tools:
            raise TemplateError(f"{self.name} has no text for tools: describe them in the system message")
        if not isinstance(response_format, Mapping | None):
            raise TemplateError(f"response_format is {short(response_format)}: give a JSON schema, which is an object")
        if not tools and not response_format:
            return messages
        first = messages[0]
        if first.role not in ("system", "developer"):
            first = Message(where="the request", role="system")
            messages = [first, *messages]
        defined = replace(first, tools=tools or first.tools, response_format=response_format or first.response_format)
        return [defined, *messages[1:]]

    def _thinking(self, thinking: object, alias: object) -> bool:
        chosen, second = _flag(thinking, "thinking"), _flag(alias, "enable_thinking")
        if chosen is not None and second is not None and chosen != second:
            raise TemplateError("thinking and enable_thinking contradict each other: give one of them")
        chosen = second if chosen is None else chosen
        if chosen is None:
            return self.thinks_by_default
        if chosen not in self.thinks:
            always = "always thinks" if True in self.thinks else "does not think"
            raise TemplateError(f"{self.name} {always}: leave thinking out")
        return chosen

    def _effort(self, level: object) -> str:
        if level is None:
            return ""
        if self.efforts is None:
            raise TemplateError(
                f"which levels of effort this checkpoint knows cannot be told without its encoding/encoding_dsv4.py: "
                f"put that file there, or name the chat format {V4.name} or {V4_0731.name}"
            )
        if not self.efforts:
            raise TemplateError(f"{self.name} has no levels of effort: leave it out")
        if not isinstance(level, str) or level not in self.efforts:
            raise TemplateError(
                f"effort is {short(level)}, {self.name} knows {', '.join(self.efforts)}: use one of these"
            )
        return self.efforts[level]


def _flag(value: object, name: str) -> bool | None:
    if not isinstance(value, bool | None):
        raise TemplateError(f"{name} is {short(value)}: give true or false")
    return value


V3 = DeepSeekFormat(
    name="deepseek-v3",
    rules=Rules(format="deepseek-v3", roles=_CHAT),
    write=v3.write_v3,
    read=v3.V3_CALLS.read_answer,
    grammar=v3.V3_CALLS.grammar,
    spelling=V3_SPELLING,
    tokens=_TURN,
    thinks=(False,),
    takes_tools=False,
)
R1 = DeepSeekFormat(
    name="deepseek-r1",
    rules=Rules(format="deepseek-r1", roles=_CHAT),
    write=v3.write_r1,
    read=v3.V3_CALLS.read_answer,
    grammar=v3.V3_CALLS.grammar,
    spelling=V3_SPELLING,
    tokens=(*_TURN, *_THOUGHT),
    thinks=(True,),
    thinks_by_default=True,
    takes_tools=False,
    trims=True,
)
V31 = DeepSeekFormat(
    name="deepseek-v3.1",
    rules=Rules(format="deepseek-v3.1", roles=_CHAT, extras=("tools", "prefix")),
    write=v3.write_v31,
    read=v3.V31_CALLS.read_answer,
    grammar=v3.V31_CALLS.grammar,
    spelling=V31_SPELLING,
    tokens=(*_TURN, *_THOUGHT),
    thinks_with_tools=False,
)
V32 = DeepSeekFormat(
    name="deepseek-v3.2",
    rules=Rules(format="deepseek-v3.2", roles=(*_CHAT, "developer"), extras=("tools", "response_format")),
    write=v32.write_v32,
    read=DsmlReader(block=V32_BLOCK).read_answer,
    grammar=DsmlGrammar,
    spelling=V32_SPELLING,
    tokens=(*_TURN, *_THOUGHT),
    variables=("response_format",),
)
V4 = DeepSeekFormat(
    name="deepseek-v4",
    rules=Rules(
        format="deepseek-v4",
        roles=(*_CHAT, "developer", "latest_reminder"),
        extras=("tools", "response_format", "task", "prefix", "wo_eos"),
        tasks=tuple(tokens.TASKS),
    ),
    write=v4.write_v4,
    read=DsmlReader(block=V4_BLOCK).read_answer,
    grammar=DsmlGrammar,
    spelling=V4_SPELLING,
    tokens=(*_TURN, *_THOUGHT, tokens.DSML, tokens.LATEST_REMINDER, *tokens.TASKS.values()),
    thinks_by_default=True,
    efforts={"high": "", "max": v4.ABSOLUTE},
    variables=("response_format", "drop_thinking"),
)
V4_0731 = replace(V4, name="deepseek-v4-0731", efforts={"low": "", "high": v4.ABSOLUTE, "max": v4.BEYOND})

FORMATS = {format.name: format for format in (V3, R1, V31, V32, V4, V4_0731)}
"""Every format that can be named."""
