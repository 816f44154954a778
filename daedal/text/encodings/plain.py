"""Plain JSON data: the only thing that conversations, tools and variables may be made of.

Templates must not meet objects with behaviour, and neither they nor encoders nesting without end. Knows nothing of
what the data means.
"""

import json
from collections.abc import Mapping, Sequence

from daedal.errors import TemplateError

_MAX_DEPTH = 64


def check_messages(messages: object) -> None:
    """TemplateError unless `messages` is a list of objects, each with a role, and content or something in its place."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TemplateError("messages are empty or not a list: give at least one message with role and content")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise TemplateError(f"{where} is a {type(message).__name__}: give an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise TemplateError(f"{where}.role is {short(role)}: give a string such as 'user'")
        content = message.get("content")
        if content is None and len(message) < 2 + ("content" in message):
            raise TemplateError(f"{where} has no content: give a string")
        if not isinstance(content, str | list | None):
            raise TemplateError(f"{where}.content is {short(content)}: give a string or a list of parts")
        check_plain(message, where)


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """TemplateError where `value` holds anything but JSON data, or nests too deep; `where` names it."""
    if depth > _MAX_DEPTH:
        raise TemplateError(f"{where} is nested deeper than {_MAX_DEPTH} levels: flatten it")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TemplateError(f"{where} has the key {short(key)}: give strings as keys")
            check_plain(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item, where, depth + 1)
    elif not isinstance(value, str | int | float | None):
        raise TemplateError(f"{where} holds a {type(value).__name__}: give plain JSON data")


def to_json(value: object, where: str) -> str:
    """`value` as the reference encoders write it: one line, spaces after separators, no escapes beyond JSON's own."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise TemplateError(f"{where} cannot be written as JSON ({error}): give plain JSON data") from error


def read_object(text: str, where: str) -> dict[str, object]:
    """The JSON object in `text`; TemplateError where it holds anything else, nested deeper than allowed, or escapes of
    half a surrogate pair, which no UTF-8 text can hold.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"{where} is not JSON ({error}): give a JSON object") from error
    if not isinstance(value, dict):
        raise TemplateError(f"{where} holds a JSON {type(value).__name__}: give a JSON object")
    check_plain(value, where)
    return value


def short(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "…"
