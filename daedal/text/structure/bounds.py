"""Which JSON schemas are taken at all: bounds on their size, their depth and what their patterns and counts may ask.

A schema is a stranger's program for a compiler. Most of what could burn time or memory there is refused here, in one
sentence; what gets through meets the limits of the compiling process. Knows nothing of compilers.
"""

import json
import re
from collections.abc import Mapping

from daedal.errors import RequestError
from daedal.text.encodings.plain import short

MAX_CHARS = 2**17
MAX_DEPTH = 32
MAX_NODES = 5000
MAX_PATTERN = 512
MAX_COUNT = 4096
"""The highest number in a pattern's `{m,n}`, of which the product counts where they are nested, and of any minimum or
maximum of lengths, items and properties."""

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains")
_BRACES = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_UNSUPPORTED_GROUPS = re.compile(r"\(\?(?!:)")


def check_schema(schema: Mapping[str, object], where: str) -> None:
    """Raises RequestError for a schema that is not taken; `where` names the field that brought it."""
    try:
        size = len(json.dumps(schema, ensure_ascii=False))
    except RecursionError as error:
        raise _refusal(where, f"is nested deeper than {MAX_DEPTH} levels: flatten it") from error
    if size > MAX_CHARS:
        raise _refusal(where, f"has {size} characters, {MAX_CHARS} are allowed: describe less")
    num_nodes = 0
    stack: list[tuple[object, int]] = [(schema, 0)]
    while stack:
        node, depth = stack.pop()
        num_nodes += 1
        if depth > MAX_DEPTH:
            raise _refusal(where, f"is nested deeper than {MAX_DEPTH} levels: flatten it")
        if num_nodes > MAX_NODES:
            raise _refusal(where, f"has more than {MAX_NODES} values: describe less")
        if isinstance(node, Mapping):
            _check_node(node, where)
            stack += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, list):
            stack += [(child, depth + 1) for child in node]


def _check_node(node: Mapping[str, object], where: str) -> None:
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise _refusal(where, f"refers to {short(reference)}: only references within the schema are followed")
    for name in _COUNTS:
        value = node.get(name)
        if isinstance(value, int | float) and value > MAX_COUNT:
            raise _refusal(where, f"has {name} {short(value)}, {MAX_COUNT} is the highest: lower it or leave it out")
    if isinstance(pattern := node.get("pattern"), str):
        check_pattern(pattern, where)
    patterns = node.get("patternProperties")
    for pattern in patterns if isinstance(patterns, Mapping) else ():
        check_pattern(pattern, where)


def check_pattern(pattern: str, where: str) -> None:
    """Raises RequestError for a regular expression that is too long, repeats too often, or looks around or back."""
    if len(pattern) > MAX_PATTERN:
        raise _refusal(where, f"has a pattern of {len(pattern)} characters, {MAX_PATTERN} are allowed: shorten it")
    if _UNSUPPORTED_GROUPS.search(pattern) or re.search(r"\\[1-9kbBGpP]", pattern):
        raise _refusal(
            where, f"has the pattern {short(pattern)}: groups that look around, references and \\b are not supported"
        )
    if _repeats(pattern) > MAX_COUNT:
        raise _refusal(where, f"has the pattern {short(pattern)}, which repeats more than {MAX_COUNT} times: lower it")


def _repeats(pattern: str) -> int:
    """At most how often something is written out: counts multiply where their groups are nested.

    Brackets and escapes are passed over; `*` and `+` count once, as they become loops.
    """
    counts = [1]  # the greatest product within each open group
    inner = 1  # of the group or character just closed
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            inner, at = 1, at + 1
        elif character == "[":
            inner, at = 1, _end_of_class(pattern, at)
        elif character == "(":
            counts.append(1)
        elif character == ")" and len(counts) > 1:
            inner = counts.pop()
            counts[-1] = max(counts[-1], inner)
        elif character == "{" and (braces := _BRACES.match(pattern, at)):
            numbers = [int(number) for number in braces.groups() if number and len(number) < 10]
            inner *= max([*numbers, 1]) if all(len(number or "") < 10 for number in braces.groups()) else 10**9
            counts[-1] = max(counts[-1], inner)
            at = braces.end() - 1
        elif character not in "?*+":
            inner = 1
        at += 1
    return max(counts)


def _end_of_class(pattern: str, at: int) -> int:
    """Where the bracket expression that begins at `at` ends."""
    at += 2 if pattern[at + 1 : at + 2] == "^" else 1
    first = True
    while at < len(pattern) and (first or pattern[at] != "]"):
        at += 2 if pattern[at] == "\\" else 1
        first = False
    return at


def _refusal(where: str, rule: str) -> RequestError:
    return RequestError(f"the schema in {where} {rule}", param=where)
