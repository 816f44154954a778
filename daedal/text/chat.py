"""From a conversation to the text that a model continues, by the template that its checkpoint ships.

The template is a stranger's program: it runs in `sandbox.py`, and whatever goes wrong in it is a TemplateError. What
templates may call (`raise_exception`, `strftime_now`, `tojson` without HTML escapes) is what transformers offers them.
Knows nothing of ids; the caller encodes the text without adding special tokens.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError

from daedal.errors import TemplateError
from daedal.text.files import read_optional, read_text, token_text
from daedal.text.sandbox import LimitExceeded, Limits, compile_template, render_template

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_DEFAULT_LIMITS = Limits()
_MAX_DEPTH = 64  # of the data that is given to a template


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
        _check_messages(messages)
        for name, value in variables.items():
            _check_plain(value, name)
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


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TemplateError("messages are empty or not a list: give at least one message with role and content")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise TemplateError(f"{where} is a {type(message).__name__}: give an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise TemplateError(f"{where}.role is {_short(role)}: give a string such as 'user'")
        content = message.get("content")
        if content is None and len(message) < 2 + ("content" in message):
            raise TemplateError(f"{where} has no content: give a string")
        if not isinstance(content, str | list | None):
            raise TemplateError(f"{where}.content is {_short(content)}: give a string or a list of parts")
        _check_plain(message, where)


def _check_plain(value: object, where: str, depth: int = 0) -> None:
    """Objects with behaviour must not reach a template."""
    if depth > _MAX_DEPTH:
        raise TemplateError(f"{where} is nested deeper than {_MAX_DEPTH} levels: flatten it")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TemplateError(f"{where} has the key {_short(key)}: give strings as keys")
            _check_plain(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, where, depth + 1)
    elif not isinstance(value, str | int | float | None):
        raise TemplateError(f"{where} holds a {type(value).__name__}: give plain JSON data")


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "…"


class _Refusal(JinjaError):
    """Raised by the template itself, through `raise_exception`."""


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _now(pattern: str) -> str:
    # The C library pads to any width that a pattern names.
    if len(pattern) > 100 or any(character.isdigit() for character in pattern):
        raise SecurityError(f"it formats the time with {_short(pattern)}: give a short pattern without widths")
    return datetime.now().strftime(pattern)


def _new_dict(*args: Mapping[str, object], **kwargs: object) -> dict[str, object]:
    return dict(*args, **kwargs)


def _template_error(what: str, error: Exception) -> TemplateError:
    if isinstance(error, LimitExceeded | SecurityError):
        return TemplateError(f"{what}: {error.message}; use another template")
    detail = str(error) or type(error).__name__
    return TemplateError(f"{what} ({type(error).__name__}: {detail[:500]}): check the messages and the template")
