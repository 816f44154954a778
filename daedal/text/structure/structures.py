"""From shapes to rules for answers: llguidance reads the grammar, under limits of work and memory.

A grammar that exceeds them is refused in one sentence, whatever it is made of; the limits count steps, so that none
takes longer than a fraction of a second. What was made is kept, the latest of them. Knows nothing of requests.
"""

import threading
from collections import OrderedDict
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

from daedal.errors import ConfigError, RequestError
from daedal.text.structure.bounds import check_schema
from daedal.text.structure.lark import grammar_of
from daedal.text.structure.masks import CompiledStructure
from daedal.text.structure.shape import Schema, Shape
from daedal.text.structure.vocabulary import Vocabulary
from daedal.text.tokenizer import Tokenizer

llguidance: ModuleType | None = None
with suppress(ModuleNotFoundError):
    llguidance = import_module("llguidance")

MAX_KEPT = 128
# Work when a grammar is read and before each token (thousands of units take a millisecond), and memory.
_LIMITS = {
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Structures:
    """What makes rules of shapes, for one tokenizer. Every method may be called from any thread, and may block."""

    def __init__(self, tokenizer: Tokenizer):
        self._vocabulary = Vocabulary(tokenizer)
        self._lock = threading.Lock()
        self._told: Any = None
        self._kept: OrderedDict[str, CompiledStructure] = OrderedDict()

    def make(self, shape: Shape) -> CompiledStructure:
        """The rule of a shape. RequestError for a schema that is not taken or asks too much, with the field that
        brought it; ConfigError where llguidance is not installed."""
        for where, schema in _schemas(shape):
            check_schema(schema, where)
        if not self._vocabulary.end_ids:
            raise RequestError("the answer has a form that ends, and the tokenizer names no end token: ask for text")
        param = "tools" if shape.json is None else "response_format"
        return self.compiled(grammar_of(shape, self._vocabulary.tags), param)

    def compiled(self, grammar: str, param: str | None = None) -> CompiledStructure:
        """The rule of a grammar that `make` wrote, here or in another process. param: what is blamed where it asks too
        much."""
        with self._lock:
            made = self._kept.get(grammar)
            if made is None:
                made = self._kept[grammar] = self._made(grammar, param)
            self._kept.move_to_end(grammar)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return made

    def _made(self, grammar: str, param: str | None) -> CompiledStructure:
        library = self._library()
        matcher = library.LLMatcher(self._told, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS))
        if not matcher.is_error():
            # The first mask meets what is worked out late.
            matcher.deep_copy().compute_bitmask()
        if matcher.is_error():
            reason = " ".join(matcher.get_error().splitlines()[:1])[:300]
            blamed = param or "the grammar"
            raise RequestError(f"{blamed} cannot be enforced ({reason}): ask for something simpler", param=param)
        vocabulary = self._vocabulary
        return CompiledStructure(grammar, matcher, num_tokens=vocabulary.num_tokens, end_ids=vocabulary.end_ids)

    def _library(self) -> ModuleType:
        if llguidance is None:
            raise ConfigError("structured output needs the package llguidance: install daedal[serve]")
        if self._told is None:
            wrapped = llguidance.TokenizerWrapper(self._vocabulary)
            self._told = llguidance.LLTokenizer(wrapped, eos_token=self._vocabulary.end_ids)
        return llguidance


def _schemas(shape: Shape) -> list[tuple[str, Schema]]:
    found: list[tuple[str, Schema]] = [] if shape.json is None else [("response_format", shape.json)]
    for callee in shape.calls.functions if shape.calls is not None else ():
        if callee.parameters is not None:
            found.append(("tools", callee.parameters))
    return found
