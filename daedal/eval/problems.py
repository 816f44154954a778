"""Problems whose answers a model writes itself, and whether what it wrote is right. Knows no models and no files.

A rule decides, never a model: numbers must be equal, texts must be the same word for word. What comes before a number
in a reply is reasoning, so its last number counts, as lm-evaluation-harness and OLMo's evaluations take it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Rule = Literal["number", "text", "beginning"]
"""number: the last number of the reply. text: all of it. beginning: its first words, as many as the answer has."""

# A sign after a digit or a bracket is a minus between two numbers.
_NUMBER = re.compile(r"(?:(?<![\d)])-)?\d[\d,]*(?:\.\d+)?")
_MOST_DIGITS = 100  # of a number that anybody asks for


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem. prompt: what the model goes on from. stop: texts that end its reply. max_tokens: of the reply."""

    task: str
    doc_id: int
    prompt: str
    answer: str
    rule: Rule
    stop: tuple[str, ...]
    max_tokens: int

    @property
    def key(self) -> str:
        """Of all that the problem says: the same key means the same problem, asked in the same way."""
        told = [self.task, self.doc_id, self.prompt, self.answer, self.rule, self.stop, self.max_tokens]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def found(self, reply: str) -> str | None:
        """What counts of a reply as its answer; None where it has none."""
        words = reply.split()
        if self.rule == "number":
            numbers = _NUMBER.findall(reply)
            return numbers[-1].replace(",", "") if numbers else None
        if self.rule == "beginning":
            words = words[: len(self.answer.split())]
        return " ".join(words) or None

    def is_right(self, found: str | None) -> bool:
        """Whether what was found in a reply is the answer."""
        if found is None or self.rule != "number":
            return found == self.answer
        return len(found) <= _MOST_DIGITS and Decimal(found) == Decimal(self.answer)
