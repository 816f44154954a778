"""What a chat format can do, for the page to offer: thinking, levels of effort, tools. It is found by trying.

Templates are strangers' programs and say nothing of themselves, so each wish is rendered once with one short question,
and what is refused is no ability. Knows nothing of HTTP.
"""

from typing import Any

from daedal.errors import TemplateError
from daedal.text.chat import ChatFormat

LEVELS = ("low", "medium", "high", "max")  # of effort, those that a person would choose from
_QUESTION = ({"role": "user", "content": "?"},)
_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def abilities(format: ChatFormat | None) -> dict[str, object]:
    """`thinks`: which of true and false may be asked for; `efforts`: which of LEVELS the format has; `tools`:
    whether it takes some. All empty without a format."""
    if format is None:
        return {"thinks": [], "efforts": [], "tools": False}
    return {
        "thinks": [choice for choice in (True, False) if _takes(format, thinking=choice)],
        "efforts": [level for level in LEVELS if _takes(format, effort=level)],
        "tools": _takes(format, tools=[_TOOL]),
    }


def _takes(format: ChatFormat, **wish: Any) -> bool:
    try:
        format.render(_QUESTION, **wish)
    except TemplateError:
        return False
    return True
