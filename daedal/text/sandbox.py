"""Runs a stranger's Jinja template in this process, inside bounds of text, work and time.

Jinja's own sandbox keeps a template away from Python's internals, but lets it burn any amount of time and memory. Here
a meter is charged for every turn of a loop, call, filter and operator, and for the size of whatever they make; what
would grow far beyond its operands is refused before it is computed (see `growth.py`). The compiled template carries the
hooks: its syntax tree is rewritten so that loops, literals, `~` and slices pass through the environment. One
environment, one meter, one rendering. Knows nothing of chats.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from types import CodeType, GeneratorType
from typing import NoReturn, ParamSpec, TypeVar, cast

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from daedal.text import growth

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")

_NO_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")  # unbounded or not repeatable
_MAX_INDENT = 32
_MAX_JSON = 2**22
_NO_GLOBALS = ("lipsum",)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """source, output: characters of a template and of what it renders. value: size of one value, as `growth` counts.

    work: operations and sizes of all that one rendering makes, in all. seconds: its time.
    """

    source: int = 2**18
    output: int = 2**22
    value: int = 2**23
    work: int = 2**26
    seconds: float = 5.0


class LimitExceeded(TemplateRuntimeError):
    """The template asks for more than its limits allow."""


class Meter:
    """Counts down what one rendering may still do."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._left = limits.work
        self._deadline = time.monotonic() + limits.seconds

    def charge(self, amount: int) -> None:
        """LimitExceeded where the work or the time is used up."""
        self._left -= amount
        if self._left < 0:
            raise LimitExceeded(f"it does more than {self._limits.work} units of work")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"it takes more than {self._limits.seconds:g} s")

    def allow(self, size: int) -> None:
        """LimitExceeded where a value of this size may not be made."""
        if size > self._limits.value:
            raise LimitExceeded(f"it makes a value of size {size}, at most {self._limits.value} is allowed")

    def made(self, value: Value) -> Value:
        """Charges for a value that was just made; a generator is charged for as it runs."""
        if isinstance(value, GeneratorType):
            return cast(Value, self._running(value))
        own, _ = growth.measure(value, self.allow)
        self.charge(1 + own)
        return value

    def turns(self, items: Iterable[Value]) -> Iterator[Value]:
        """The same items, one charge for each."""
        for item in items:
            self.charge(1)
            yield item

    def _running(self, items: Iterable[Value]) -> Iterator[Value]:
        for item in items:
            yield self.made(item)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML, and templates of models are written for one that does not."""
    if isinstance(indent, str) or (indent is not None and indent > _MAX_INDENT):
        raise SecurityError(f"it indents JSON by {str(indent)[:20]}, at most {_MAX_INDENT} is allowed")
    if separators is not None and any(len(separator) > _MAX_INDENT for separator in separators):
        raise SecurityError(f"it separates JSON by more than {_MAX_INDENT} characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    pieces = []
    total = 0
    for piece in encoder.iterencode(value):  # indentation grows with depth, which the value's own size does not show
        total += len(piece)
        if total > _MAX_JSON:
            raise LimitExceeded(f"it writes more than {_MAX_JSON} characters of indented JSON")
        pieces.append(piece)
    return "".join(pieces)


class SafeNamespace(Namespace):
    """Jinja's `namespace`, closed to underscored names, and printed without what it holds (which has no bound)."""

    def __init__(*args: object, **kwargs: object) -> None:
        # `self` is taken from args because `namespace(self=…)` is a legal call.
        self, rest = cast(SafeNamespace, args[0]), cast("tuple[dict[str, object], ...]", args[1:])
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_public(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"it sets the namespace attribute {name!r}, which is reserved")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """What published templates expect of their environment, with a meter."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, limits: Limits):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.meter = Meter(limits)
        for name in _NO_FILTERS:
            del self.filters[name]
        for name in _NO_GLOBALS:
            del self.globals[name]
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = self._metered_filter(name, function)
        self.globals["namespace"] = SafeNamespace

    def hook_turns(self, items: Iterable[object]) -> Iterator[object]:
        return self.meter.turns(items)

    def hook_made(self, value: object) -> object:
        return self.meter.made(value)

    def hook_slice(self, value: object) -> object:
        # The parts of a slice were measured where they were made.
        if isinstance(value, str):
            self.meter.charge(1 + len(value))
        elif isinstance(value, list | tuple):
            self.meter.charge(1 + growth.ELEMENT * len(value))
        return value

    def hook_join(self, *values: object) -> str:
        return self.concat(str(value) for value in values)

    def concat(self, parts: Iterable[str]) -> str:
        total = 0
        kept = []
        for part in parts:
            total += len(part)
            self.meter.allow(total)
            kept.append(part)
        self.meter.charge(1 + total)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        growth.check_operator(operator, left, right, self.meter.allow)
        return self.meter.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Callable[..., object], /, *args: object, **kwargs: object) -> object:
        receiver = getattr(obj, "__self__", None)
        if receiver is self:
            return super().call(context, obj, *args, **kwargs)
        name = getattr(obj, "__name__", "")
        growth.check_name(receiver, name)
        if isinstance(receiver, str):
            if name == "join" and args and isinstance(args[0], Iterable):
                args = (list(self.meter.turns(args[0])), *args[1:])
            growth.check_method(receiver, name, [*args, *kwargs.values()], self.meter.allow)
        self.meter.charge(1)
        return self.meter.made(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        inner, text = wrapped, str(getattr(value, "__self__", ""))
        growth.check_name(text, getattr(value, "__name__", ""))

        def formatted(*args: object, **kwargs: object) -> str:
            growth.check_braces(text, [*args, *kwargs.values()], self.meter.allow)
            return inner(*args, **kwargs)

        return formatted

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which is closed to templates")

    def _metered_filter(self, name: str, function: Callable[Arguments, object]) -> Callable[Arguments, object]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes first

        @wraps(function)
        def metered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> object:
            given: list[object] = list(args)
            value = given[skipped] if len(given) > skipped else None
            if name == "join" and isinstance(value, GeneratorType):
                given[skipped] = value = list(value)
            growth.check_filter(name, value, [*given[skipped + 1 :], *kwargs.values()], self.meter.allow)
            self.meter.charge(1)
            call = cast(Callable[..., object], function)
            return self.meter.made(call(*given, **kwargs))

        return metered


class _Hooks(NodeTransformer):
    """Leads through the environment what Jinja compiles to bare Python."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _hooked("hook_turns", node, [cast(nodes.Expr, node.iter)])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hooked("hook_join", node, node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _hooked("hook_made", node, [node])

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _hooked("hook_made", node, [node])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _hooked("hook_made", node, [node]) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _hooked("hook_slice", node, [node]) if isinstance(node.arg, nodes.Slice) else node


def _hooked(name: str, node: nodes.Node, values: list[nodes.Expr]) -> nodes.Expr:
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Call(nodes.EnvironmentAttribute(name, **place), values, [], None, None, **place)


def compile_template(source: str, limits: Limits) -> CodeType:
    """Parses and compiles; any exception of Jinja's or Python's compiler may come out."""
    if len(source) > limits.source:
        raise LimitExceeded(f"it has {len(source)} characters, at most {limits.source} are allowed")
    environment = MeteredEnvironment(limits)
    return environment.compile(_Hooks().visit(environment.parse(source)), filename="<chat template>")


def render_template(
    code: CodeType,
    variables: Mapping[str, object],
    *,
    functions: Mapping[str, Callable[..., object]],
    limits: Limits,
) -> str:
    """Renders plain data. functions: what the template may call beside Jinja's own.

    Any exception may come out of a stranger's code, LimitExceeded where it goes too far.
    """
    environment = MeteredEnvironment(limits)
    environment.globals.update(functions)
    template = Template.from_code(environment, code, environment.make_globals(None))
    pieces = []
    total = 0
    for piece in template.generate(variables):
        total += len(piece)
        if total > limits.output:
            raise LimitExceeded(f"it renders more than {limits.output} characters")
        environment.meter.charge(1 + len(piece))
        pieces.append(piece)
    return "".join(pieces)
