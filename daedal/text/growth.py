"""How large a template's values are, and how large an operation would make them, before it is done.

Sizes count characters, and 16 for every element of a container (about what one takes in memory, in characters). A value
held twice counts twice, since printing or comparing it costs twice. Knows nothing of templates beyond the names of
their filters and methods.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter

from jinja2.exceptions import SecurityError

ELEMENT = 16
MAX_WIDTH = 10_000  # of one padding, precision, indentation or batch
MAX_BITS = 4096  # of one integer

Allow = Callable[[int], None]
_NUMBERED = {"batch", "center", "indent", "round", "slice", "tojson", "truncate"}
_PADDING = {"center", "ljust", "rjust", "zfill"}
_REFUSED = {"encode", "format_map", "to_bytes", "translate"}  # without bytes, only text needs bounds
_PRINTF = re.compile(r"%(?:\([^)]*\))?([-#0 +.*\d]*)")


def measure(value: object, allow: Allow) -> tuple[int, int]:
    """(own, whole): what making the value took, and its size with all inside; `allow` sees the whole as it grows."""
    if isinstance(value, str):
        allow(len(value))
        return len(value), len(value)
    whole = 0
    elements = 0
    stack: list[object] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            whole += len(item)
        elif isinstance(item, Mapping):
            elements += 2 * len(item)
            allow(whole + ELEMENT * elements)
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            elements += len(item)
            allow(whole + ELEMENT * elements)
            stack.extend(item)
    whole += ELEMENT * elements
    allow(whole)
    return ELEMENT * elements, whole


def check_operator(operator: str, left: object, right: object, allow: Allow) -> None:
    """Refuses `*`, `**` and `%` whose result would be too large; the others at most double their operands."""
    if operator == "%" and isinstance(left, str):
        check_format(left, right, allow)
    elif operator == "*":
        _check_product(left, right, allow)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 0:
        _check_bits(left.bit_length() * right)


def _check_product(left: object, right: object, allow: Allow) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(sequence, str | list | tuple):
            allow(measure(sequence, allow)[1] * max(times, 0))


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"it makes an integer of {bits} bits, at most {MAX_BITS} are allowed")


def check_format(text: str, arguments: object, allow: Allow) -> None:
    """Refuses a printf-like format with a huge or computed width, or too many fields."""
    fields = _PRINTF.findall(text)
    if any("*" in field or re.search(r"\d{5}", field) for field in fields):
        raise SecurityError(f"it formats with a width that is computed or above {MAX_WIDTH - 1}")
    allow(len(text) + len(fields) * (MAX_WIDTH * _has_digits(fields) + measure(arguments, allow)[1]))


def check_braces(text: str, arguments: Sequence[object], allow: Allow) -> None:
    """The same for `str.format`."""
    specs = [spec or "" for _, field, spec, _ in Formatter().parse(text) if field is not None]
    if any("{" in spec or re.search(r"\d{5}", spec) for spec in specs):
        raise SecurityError(f"it formats with a width that is computed or above {MAX_WIDTH - 1}")
    allow(len(text) + len(specs) * (MAX_WIDTH * _has_digits(specs) + measure(list(arguments), allow)[1]))


def _has_digits(specs: Iterable[str]) -> bool:
    return any(character.isdigit() for spec in specs for character in spec)


def check_method(receiver: str, name: str, arguments: Sequence[object], allow: Allow) -> None:
    """Refuses calls of string methods whose result would be too large. arguments: positional, then named ones."""
    if name in _PADDING:
        allow(len(receiver) + sum(number for number in arguments if isinstance(number, int)))
    elif name == "expandtabs":
        tab = next((number for number in arguments if isinstance(number, int)), 8)
        allow(len(receiver) * max(tab, 1))
    elif name == "replace" and len(arguments) >= 2:
        _check_replace(receiver, arguments[0], arguments[1], allow)
    elif name == "join" and arguments:
        _check_join(receiver, arguments[0], allow)


def check_name(receiver: object, name: str) -> None:
    """Refuses methods that no template needs and whose results have no bound."""
    if name in _REFUSED and isinstance(receiver, str | int):
        raise SecurityError(f"it calls {type(receiver).__name__}.{name}, which templates may not")


def check_filter(name: str, value: object, arguments: Sequence[object], allow: Allow) -> None:
    """Refuses filters whose result would be too large. arguments: positional, then named ones."""
    if name in _NUMBERED:
        for number in arguments:
            if isinstance(number, int) and abs(number) > MAX_WIDTH:
                raise SecurityError(f"it calls the filter {name} with {number}, at most {MAX_WIDTH} is allowed")
    if name == "indent" and arguments:
        width = arguments[0]
        step = len(width) if isinstance(width, str) else width if isinstance(width, int) else 4
        text = str(value)
        allow(len(text) + len(text.splitlines()) * step)
    elif name == "replace" and len(arguments) >= 2:
        _check_replace(str(value), str(arguments[0]), str(arguments[1]), allow)
    elif name == "join":
        _check_join(str(arguments[0]) if arguments else "", value, allow)
    elif name == "sum" and any(isinstance(start, list | tuple) for start in arguments):
        raise SecurityError("it sums lists with the filter sum, which is for numbers")
    elif name == "format":
        check_format(str(value), list(arguments), allow)


def _check_replace(text: str, old: object, new: object, allow: Allow) -> None:
    if isinstance(old, str) and isinstance(new, str):  # else the call itself will say what is wrong with them
        allow(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _check_join(separator: str, items: object, allow: Allow) -> None:
    count = len(items) if isinstance(items, str | list | tuple | Mapping) else 0
    allow(measure(items, allow)[1] + count * len(separator))
