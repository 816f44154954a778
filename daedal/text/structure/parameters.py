"""A call's arguments as DSML writes them, held to a JSON schema: one tag a parameter, strings as they are.

A parameter whose schema is a plain string, or names the strings that it may be, stands unquoted with `string="true"`.
Any other is JSON by its schema. So is a string under further rules (a pattern, a length), which then stands quoted:
that is lawful DSML, and the rule holds. Parameters come in the order of the schema. Knows nothing of the block.
"""

import json
from collections.abc import Mapping

from daedal.errors import RequestError
from daedal.text.encodings.dsml import PARAMETER
from daedal.text.encodings.plain import short
from daedal.text.structure.shape import Schema
from daedal.text.structure.values import json_value

_END = f"</{PARAMETER}>"
_KNOWN = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description"}
    | {"$schema", "$id", "$comment", "examples", "default", "strict"}
)
_SAYS_NOTHING = frozenset({"type", "title", "description", "default", "examples", "$comment", "deprecated"})
_BAD_IN_NAMES = ('"', "<", ">", "\n")


class DsmlParameters:
    """The grammar of one function's parameters. name: what its rules' names begin with. parameters: None for any.

    start: the rule's name; rules: it and all others. RequestError for a schema that is no plain object.
    """

    def __init__(self, name: str, parameters: Schema | None):
        self.start = name
        self.rules: list[str] = []
        if parameters is None:
            self._any()
        else:
            self._all(parameters)

    def _any(self) -> None:
        head = f'<{PARAMETER} name="'
        string = f'{_quoted(head)} /[^"<>\\n]+/ {_quoted(chr(34) + " string=" + chr(34) + "true" + chr(34) + ">")}'
        other = f'{_quoted(head)} /[^"<>\\n]+/ {_quoted(chr(34) + " string=" + chr(34) + "false" + chr(34) + ">")}'
        text = self._rule(f"{self.start}_text[lazy]", f"TEXT {_quoted(_END)}")
        value = self._rule(f"{self.start}_value", f"{json_value(True)} {_quoted(_END)}")
        one = self._rule(f"{self.start}_one", f"{string} {text} | {other} {value}")
        line = _quoted("\n")
        self.rules.append(f"{self.start}: {line}? | {one} ({line} {one})* {line}")

    def _all(self, parameters: Schema) -> None:
        unknown = sorted(set(parameters) - _KNOWN)
        if unknown or parameters.get("type", "object") != "object":
            what = f"{unknown[0]} at the top" if unknown else f"the type {short(parameters.get('type'))}"
            raise RequestError(
                f"a tool's parameters have {what}: for this model's calls they must be an object with properties",
                param="tools",
            )
        properties = parameters.get("properties") or {}
        required = parameters.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise RequestError(
                "a tool's properties or required are malformed: give an object and a list", param="tools"
            )
        shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        given = dict(properties)
        for name in required:
            given.setdefault(name, {})
        rules = [
            (self._parameter(f"{self.start}_{index}", name, schema, shared), name in required)
            for index, (name, schema) in enumerate(given.items())
        ]
        self._sequence(rules)

    def _sequence(self, rules: list[tuple[str, bool]]) -> None:
        """Each parameter on a line of its own; none at all is an empty line, as the format writes it."""
        line = _quoted("\n")
        if not rules:
            self.rules.append(f"{self.start}: {line}?")
            return
        wanted = " ".join(f"{rule} {line}" if needed else f"({rule} {line})?" for rule, needed in rules)
        none = "" if any(needed for _, needed in rules) else f" | {line}"
        self.rules.append(f"{self.start}: {wanted}{none}")

    def _parameter(self, rule: str, name: object, schema: object, shared: Mapping[str, object]) -> str:
        if not isinstance(name, str) or not name or any(mark in name for mark in _BAD_IN_NAMES):
            raise RequestError(
                f"a tool has the parameter {short(name)}: DSML has no way to write that name, choose another",
                param="tools",
            )
        choices = _strings(schema)
        kind = "true" if choices is not None else "false"
        head = _quoted(f'<{PARAMETER} name="{name}" string="{kind}">')
        if choices is None:
            told = {**schema, **shared} if isinstance(schema, Mapping) else schema
            value = f"{json_value(told)} {_quoted(_END)}"
        elif choices:
            value = f"({' | '.join(_quoted(choice + _END) for choice in choices)})"
        else:
            value = self._rule(f"{rule}_text[lazy]", f"TEXT {_quoted(_END)}")
        return self._rule(rule, f"{head} {value}")

    def _rule(self, head: str, body: str) -> str:
        self.rules.append(f"{head}: {body}")
        return head.partition("[")[0]


def _strings(schema: object) -> list[str] | None:
    """The strings that a parameter may be, [] for any; None where it may be something else, or more is asked of it."""
    if not isinstance(schema, Mapping):
        return None
    asked = set(schema) - _SAYS_NOTHING
    if schema.get("type") == "string" and not asked:
        return []
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if asked - {"enum", "const"} or not isinstance(choices, list) or not choices:
        return None
    strings = [choice for choice in choices if isinstance(choice, str) and _END not in choice]
    return strings if len(strings) == len(choices) and schema.get("type", "string") == "string" else None


def _quoted(text: str) -> str:
    return json.dumps(text)
