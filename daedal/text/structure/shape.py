"""What an answer must look like, said without any grammar's syntax: JSON, tool calls, or text in which calls may stand.

A thought before the answer is free. Knows nothing of tokenizers and of who enforces it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from daedal.text.encodings.spelling import CallSpelling

Schema = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Callee:
    """A function that may be called. parameters: what its arguments must match; None for any JSON object."""

    name: str
    parameters: Schema | None = None


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Calls of some functions. must: nothing else may come, and at least one call. many: more than one may come."""

    functions: tuple[Callee, ...]
    spelling: CallSpelling
    must: bool = False
    many: bool = True


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One answer's rule.

    json: what its text must match, None for any text. calls: None where none are looked for. With both, it is the one
    or the other. thought: "open" where the answer begins inside one, "may" where it may begin with one. gap: a blank
    line may follow the thought.
    """

    json: Schema | None = None
    calls: Calls | None = None
    thought: Literal["none", "open", "may"] = "none"
    gap: bool = False
