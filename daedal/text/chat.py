"""From a conversation to the text that a model continues, and from its answer back, as its checkpoint wants it.

`load_format` chooses: the template that the checkpoint ships, else the DeepSeek format that its config names and its
tokenizer bears out, else an error; nothing is guessed. A template is a stranger's program: it runs in `sandbox.py`, and
whatever goes wrong in it is a TemplateError. What templates may call (`raise_exception`, `strftime_now`, `tojson`
without HTML escapes) is what transformers offers them. Knows nothing of ids; the caller encodes the text without adding
special tokens.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError

from daedal.errors import TemplateError
from daedal.text.encodings import tokens, v4
from daedal.text.encodings.answers import Ids, new_call_id
from daedal.text.encodings.dsml import V32_BLOCK
from daedal.text.encodings.dsml_stream import DsmlGrammar
from daedal.text.encodings.formats import FORMATS, R1, V3, V4, V4_0731, V31, V32, DeepSeekFormat
from daedal.text.encodings.hermes import HERMES_BEGIN, HermesGrammar
from daedal.text.encodings.plain import check_messages, check_plain, read_object, short
from daedal.text.encodings.spelling import (
    HERMES_SPELLING,
    V3_SPELLING,
    V4_SPELLING,
    V31_SPELLING,
    V32_SPELLING,
    CallSpelling,
)
from daedal.text.encodings.stream import Grammar, StreamParser, starts_in_thought
from daedal.text.encodings.v3 import V3_CALLS, V31_CALLS
from daedal.text.files import read_optional, read_text, token_text
from daedal.text.sandbox import LimitExceeded, Limits, compile_template, render_template

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_DEFAULT_LIMITS = Limits()
# Whether a template writes a call's arguments as JSON itself, and whether it knows that they may be JSON already.
_WRITES_ARGUMENTS = re.compile(r"\barguments\s*\|\s*tojson\b")
_TAKES_TEXT = re.compile(r"\barguments\s+is\s+(?:not\s+)?(?:string|mapping)\b")


class ChatFormat(Protocol):
    """How one checkpoint's conversations are written and its answers read. What it cannot do is a TemplateError."""

    @property
    def name(self) -> str: ...

    @property
    def shows_special_tokens(self) -> bool:
        """Whether answers must be decoded with special tokens visible, for the parser to see them."""

    @property
    def spelling(self) -> CallSpelling | None:
        """How tool calls are written; None where that is not known."""

    @property
    def trims(self) -> bool:
        """Whether line breaks around a thought are layout."""

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
        """The conversation as one text. thinking: None is the format's default. effort: how hard to think."""

    def parser(self, prompt: str, *, calls: bool = True, ids: Ids = new_call_id) -> StreamParser:
        """For one answer to this rendered prompt. calls: whether tool calls are looked for."""


class ChatTemplate:
    """One checkpoint's chat template. tokens: its special tokens by name, as the template sees them.

    TemplateError where the template cannot be compiled.
    """

    def __init__(self, source: str, *, tokens: Mapping[str, str] | None = None, limits: Limits = _DEFAULT_LIMITS):
        self.source = source
        self._tokens = dict(tokens or {})
        self._limits = limits
        try:
            self._code = compile_template(source, limits)
        except Exception as error:  # a parser bomb may raise whatever Python's compiler raises
            raise _template_error("the chat template cannot be compiled", error) from error

    @classmethod
    def load(cls, directory: Path | str, *, limits: Limits = _DEFAULT_LIMITS) -> "ChatTemplate":
        """Reads chat_template.jinja, else tokenizer_config.json's `chat_template`; TemplateError if there is none."""
        directory = Path(directory)
        config = read_optional(directory / "tokenizer_config.json")
        own_file = directory / "chat_template.jinja"
        source = read_text(own_file) if own_file.is_file() else _default(config.get("chat_template"))
        if source is None:
            raise TemplateError(
                f"{directory} has no chat template: put chat_template.jinja there, or send plain text to complete"
            )
        tokens = {name: text for name in _TOKENS if (text := token_text(config.get(name))) is not None}
        return cls(source, tokens=tokens, limits=limits)

    def render(
        self, messages: Sequence[Mapping[str, object]], /, *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation as one text.

        messages: each with `role` (a string) and `content` (a string, a list of parts, or None beside other keys).
        variables: what else the template may read (`tools`, `enable_thinking`, …), plain JSON data. TemplateError where
        the messages have another shape, or the template refuses them, fails, or exceeds its limits.
        """
        check_messages(messages)
        for name, value in variables.items():
            check_plain(value, name)
        given: dict[str, object] = {"tools": None, "documents": None, **self._tokens, **variables}
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return render_template(
                self._code,
                given,
                functions={"raise_exception": _refuse, "strftime_now": _now, "dict": _new_dict},
                limits=self._limits,
            )
        except _Refusal as error:
            raise TemplateError(f"the chat template refuses these messages: {error.message}") from error
        except Exception as error:  # whatever a stranger's code raises is its failure
            raise _template_error("the chat template failed on these messages", error) from error


@dataclass(frozen=True, kw_only=True)
class TemplateFormat:
    """A checkpoint's own template. grammar, spelling: of the tool calls that the template writes; None where it writes
    none that are known here. thoughts: whether template or tokenizer know think tags. eos: the token that ends an
    answer."""

    template: ChatTemplate
    grammar: Callable[[], Grammar] | None = None
    spelling: CallSpelling | None = None
    thoughts: bool = False
    eos: str = ""
    shows_special_tokens: bool = False
    name: str = "template"

    @property
    def trims(self) -> bool:
        return self.thoughts

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
        """The conversation as one text. The template sees `tools`, `thinking`, `enable_thinking`, `reasoning_effort`
        where they are given; TemplateError where it reads none of these names."""
        given = dict(variables)
        if tools:
            self._must_read("tools", names=("tools",), remedy="describe them in the system message")
            given["tools"] = tools
        if thinking is not None and (thinking or tokens.THINK in self.template.source):
            self._must_read("thinking", names=("thinking", "enable_thinking"), remedy="leave thinking out")
        if thinking is not None:
            given |= {"thinking": thinking, "enable_thinking": thinking}
        if effort is not None:
            self._must_read("effort", names=("reasoning_effort",), remedy="leave effort out")
            given["reasoning_effort"] = effort
        if _WRITES_ARGUMENTS.search(self.template.source) and not _TAKES_TEXT.search(self.template.source):
            messages = [_with_objects(message, f"messages[{index}]") for index, message in enumerate(messages)]
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, **given)

    def parser(self, prompt: str, *, calls: bool = True, ids: Ids = new_call_id) -> StreamParser:
        """For one answer to this rendered prompt. calls: whether tool calls are looked for."""
        return StreamParser(
            self.grammar() if self.grammar is not None and calls else None,
            in_thought=self.thoughts and starts_in_thought(prompt),
            thoughts=self.thoughts,
            trims=self.trims,
            eos=self.eos,
            ids=ids,
        )

    def _must_read(self, what: str, *, names: Sequence[str], remedy: str) -> None:
        if not any(re.search(rf"\b{name}\b", self.template.source) for name in names):
            raise TemplateError(f"the checkpoint's chat template does not read {what}: {remedy}, or name a chat format")


def load_format(
    directory: Path | str, *, chat_format: str | None = None, limits: Limits = _DEFAULT_LIMITS
) -> ChatFormat:
    """The chat format of the checkpoint in `directory`; chat_format: the name of one of FORMATS, to be used instead.

    TemplateError where there is none, where it cannot be told which, or where the tokenizer lacks one of its tokens.
    """
    directory = Path(directory)
    added = _added_tokens(directory)
    if chat_format is not None:
        if chat_format not in FORMATS:
            raise TemplateError(f"the chat format {short(chat_format)} is unknown: name one of {', '.join(FORMATS)}")
        return _checked(FORMATS[chat_format], added, directory)
    if _has_template(directory):
        return _template_format(ChatTemplate.load(directory, limits=limits), added, directory)
    model_type = read_optional(directory / "config.json").get("model_type")
    if model_type == "deepseek_v4":
        return _checked(_v4(directory), added, directory)
    if model_type == "deepseek_v32":
        return _checked(V32, added, directory)
    if model_type == "deepseek_v3":
        return _checked(_v3(added, directory), added, directory)
    raise TemplateError(
        f"{directory} has no chat template, and its model_type {short(model_type)} names no chat format: put "
        f"chat_template.jinja there, name a chat format, or send plain text to complete"
    )


def _has_template(directory: Path) -> bool:
    own_file = (directory / "chat_template.jinja").is_file()
    return own_file or read_optional(directory / "tokenizer_config.json").get("chat_template") is not None


def _added_tokens(directory: Path) -> dict[str, bool]:
    """Each added token of the tokenizer, and whether it is a special one, invisible in decoded text."""
    entries = read_optional(directory / "tokenizer.json").get("added_tokens")
    found: dict[str, bool] = {}
    for entry in entries if isinstance(entries, list) else []:
        text = token_text(entry)
        if text is not None and isinstance(entry, dict):
            found[text] = bool(entry.get("special"))
    return found


def _checked(format: DeepSeekFormat, added: Mapping[str, bool], directory: Path) -> DeepSeekFormat:
    missing = [token for token in format.tokens if token not in added]
    if missing:
        raise TemplateError(
            f"the tokenizer in {directory} has no token {missing[0]}, {format.name} needs it: put chat_template.jinja "
            f"there, or name another chat format"
        )
    if tokens.SYSTEM in added:
        raise TemplateError(
            f"the tokenizer in {directory} has the token {tokens.SYSTEM}, which came with V4.1 and {format.name} does "
            f"not write: put chat_template.jinja there"
        )
    return replace(format, shows_special_tokens=_hidden(added, format.grammar()))


def _hidden(added: Mapping[str, bool], grammar: Grammar | None) -> bool:
    """Whether decoding hides any tag that a parser looks for."""
    tags: Collection[str] = grammar.lexicon.fixed if grammar is not None else ()
    return any(added.get(tag, False) for tag in (tokens.THINK, tokens.THINK_END, tokens.DSML, *tags))


def _v4(directory: Path) -> DeepSeekFormat:
    """Which levels of effort apply, the encoder beside the weights tells by its text alone; it is never run."""
    encoder = directory / "encoding" / "encoding_dsv4.py"
    source = read_text(encoder) if encoder.is_file() else ""
    if v4.BEYOND.partition("—")[0] in source:
        return V4_0731
    return V4 if v4.ABSOLUTE.partition("\n")[0] in source else replace(V4, efforts=None)


def _v3(added: Mapping[str, bool], directory: Path) -> DeepSeekFormat:
    """V3 has no think tags, V3.1 has them and those for searching; with the former alone it may be R1 or another."""
    if tokens.THINK not in added:
        return V3
    if tokens.SEARCH_BEGIN in added:
        return V31
    raise TemplateError(
        f"{directory} has no chat template, and its tokenizer fits {V3.name} and {R1.name}: put chat_template.jinja "
        f"there, or name a chat format"
    )


def _template_format(template: ChatTemplate, added: Mapping[str, bool], directory: Path) -> TemplateFormat:
    grammar, spelling = _calls(template.source)
    thoughts = tokens.THINK_END in template.source or {tokens.THINK, tokens.THINK_END} <= set(added)
    return TemplateFormat(
        template=template,
        grammar=grammar,
        spelling=spelling,
        thoughts=thoughts,
        eos=token_text(read_optional(directory / "tokenizer_config.json").get("eos_token")) or "",
        shows_special_tokens=(thoughts or grammar is not None) and _hidden(added, grammar() if grammar else None),
    )


def _calls(source: str) -> tuple[Callable[[], Grammar] | None, CallSpelling | None]:
    """Parser and spelling of the tool calls that a template writes, by the tokens that stand in it."""
    if tokens.DSML in source:
        return DsmlGrammar, V32_SPELLING if V32_BLOCK in source else V4_SPELLING
    if tokens.CALLS_BEGIN in source:
        fenced = "```json" in source
        return (V3_CALLS if fenced else V31_CALLS).grammar, V3_SPELLING if fenced else V31_SPELLING
    if HERMES_BEGIN in source and "<function=" not in source:  # the latter is another syntax in the same tags
        return HermesGrammar, HERMES_SPELLING
    return None, None


def _with_objects(message: Mapping[str, object], where: str) -> Mapping[str, object]:
    """The message with the arguments of its calls as objects, which OpenAI's API has as JSON text."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    return {**message, "tool_calls": [_with_object(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]}


def _with_object(call: object, where: str) -> object:
    function = call.get("function") if isinstance(call, Mapping) else None
    given = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(given, str):
        return call
    arguments = read_object(given or "{}", f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _default(entry: object) -> str | None:
    """`chat_template` is one template, or a list of named ones."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        found = named.get("default")
        if isinstance(found, str):
            return found
        names = ", ".join(sorted(str(name) for name in named)) or "none"
        raise TemplateError(f"the checkpoint's chat templates are named {names}: name one of them 'default'")
    if entry is not None:
        raise TemplateError(
            f"chat_template is a {type(entry).__name__}: it must be a string or a list of named templates"
        )
    return None


class _Refusal(JinjaError):
    """Raised by the template itself, through `raise_exception`."""


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _now(pattern: str) -> str:
    # The C library pads to any width that a pattern names.
    if len(pattern) > 100 or any(character.isdigit() for character in pattern):
        raise SecurityError(f"it formats the time with {short(pattern)}: give a short pattern without widths")
    return datetime.now().strftime(pattern)


def _new_dict(*args: Mapping[str, object], **kwargs: object) -> dict[str, object]:
    return dict(*args, **kwargs)


def _template_error(what: str, error: Exception) -> TemplateError:
    if isinstance(error, LimitExceeded | SecurityError):
        return TemplateError(f"{what}: {error.message}; use another template")
    detail = str(error) or type(error).__name__
    return TemplateError(f"{what} ({type(error).__name__}: {detail[:500]}): check the messages and the template")
