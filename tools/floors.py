"""Holds the house to its plan: `python tools/floors.py [ROOT]` prints each breach as path:line and exits 1.

Imports go down the floors only, rooms of one floor never import each other, within a large room they go down its
storeys, only the roof imports inside functions, facts know the standard library alone, what must run without torch
reaches it by no path, and every other package that is imported is declared. Also refuses file names that say nothing
and calls that run or unpickle foreign code. Reads sources as syntax trees and imports none of them.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "daedal"
FLOORS = (
    ("config", "checks", "published", "published_v4", "rope", "shapes", "layouts", "packed", "places", "errors"),
    ("ops", "text", "cost", "charts", "mesh"),
    ("model",),
    ("checkpoint",),
    ("infer", "train", "convert", "ports"),
    ("serve", "eval", "bench"),
    ("distill", "report"),
    ("cli", "__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACTS, ROOF = 0, len(FLOORS) - 1
STOREYS = {"serve": ("workers", "state", "api")}
"""Folders of a room from the lowest up; the room's own modules stand above them (decision 024)."""

WITHOUT_TORCH = (
    "config",
    "shapes",
    "layouts",
    "packed",
    "errors",
    "cost",
    "report",
    "checkpoint.index",
    "ports.mindspore",
    "ports.support",
    "infer.scheduler",
    "infer.pages",
    "infer.request",
    "infer.stats",
    "serve",
    "cli",
    "__init__",
)
APART = {"mindspore"}  # has an environment of its own, which no extra can make (decision 041)
SHARED = {"opentelemetry"}  # names under which several packages put their parts
BRINGS_TORCH = {"torch", "triton", "transformers", "accelerate", "safetensors.torch"}

EMPTY_NAMES = {"utils", "helpers", "common", "base", "manager", "misc"}
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_WORDS = {"trust_remote_code", "allow_pickle"}
CODE_FOLDERS = (PACKAGE, "tools", "benchmarks", "recipes", "tests")


@dataclass(frozen=True, order=True)
class Breach:
    path: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


@dataclass(frozen=True)
class Import:
    """One imported name, absolute. at_run_time: not under TYPE_CHECKING; in_function: not run on import."""

    module: str
    line: int
    in_function: bool
    at_run_time: bool


@dataclass(frozen=True)
class Source:
    """A module of the package: its dotted name below the package, `__init__` for the package itself."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        return self.name.split(".")[0]


def breaches(root: Path) -> list[Breach]:
    """Everything under `root` that the plan forbids, in order of path and line. Paths are relative to `root`."""
    found: list[Breach] = []
    modules: dict[str, Source] = {}
    for path in sources(root):
        relative = path.relative_to(root)
        found += _empty_names(relative)
        try:
            tree = ast.parse(path.read_bytes(), filename=str(path))
        except SyntaxError as error:
            found.append(Breach(relative, error.lineno or 1, f"is not Python: {error.msg}"))
            continue
        found += _unsafe(relative, tree)
        if relative.parts[0] == PACKAGE:
            source = _source(relative, tree)
            modules[source.name] = source
    declared = declared_packages(root / "pyproject.toml")
    for source in modules.values():
        found += _stairs(source)
        found += _storeys(source)
        found += _undeclared(source, declared)
        found += _torch(source, modules)
    return sorted(set(found))


def sources(root: Path) -> Iterator[Path]:
    """Every Python file of the project."""
    for folder in CODE_FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))


def declared_packages(path: Path) -> set[str]:
    """Import names of what users get with the package or one of its extras; `dev` is for its developers."""
    if not path.exists():
        return set()
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    requirements = [*project["dependencies"], *(item for name in extras if name != "dev" for item in extras[name])]
    names = {re.split(r"[^\w.-]", item, maxsplit=1)[0].lower().replace("-", "_") for item in requirements}
    return names | {shared for shared in SHARED for name in names if name.startswith(f"{shared}_")}


def _undeclared(source: Source, declared: set[str]) -> Iterator[Breach]:
    for item in source.imports:
        top = item.module.split(".")[0]
        if top in (PACKAGE, *APART) or top in sys.stdlib_module_names:
            continue
        if declared and top not in declared:
            yield Breach(
                source.path, item.line, f"imports {top}, which pyproject.toml does not declare: it may be absent"
            )


def _source(path: Path, tree: ast.Module) -> Source:
    parts = list(path.with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    container = parts[:-1]
    imports = tuple(_imports(tree, container))
    name = ".".join(parts[1:-1] if is_package and len(parts) > 2 else parts[1:])
    return Source(name, path, tree, imports)


def _imports(tree: ast.Module, container: list[str]) -> Iterator[Import]:
    """Every import statement and `import_module` of a literal name. `container`: the package that holds the module."""
    for node, in_function, typing_only in _walk(tree, False, False):
        for module in _modules_named(node, container):
            yield Import(module, getattr(node, "lineno", 1), in_function, not typing_only)


def _walk(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = typing_only or (isinstance(node, ast.If) and child in node.body and _is_type_checking(node.test))
        yield child, inside, checking
        yield from _walk(child, inside, checking)


def _is_type_checking(test: ast.expr) -> bool:
    return _dotted(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _modules_named(node: ast.AST, container: list[str]) -> Iterator[str]:
    """Absolute dotted names that `node` imports; `from a import b` counts as a.b, which may be module or member."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = container[: len(container) - node.level + 1] if node.level else []
        stem = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{stem}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        named = node.args[0].value
        if isinstance(named, str) and _dotted(node.func) in ("importlib.import_module", "import_module", "__import__"):
            yield named


def _stairs(source: Source) -> Iterator[Breach]:
    """Imports that climb, cross a floor, hide in a function, or give facts a dependency."""
    floor = FLOOR_OF.get(source.room)
    if floor is None:
        rule = f"the plan has no room {source.room!r}: add it to FLOORS in tools/floors.py and to the plan"
        yield Breach(source.path, 1, rule)
        return
    for item in source.imports:
        top, *rest = item.module.split(".")
        if item.in_function and floor != ROOF:
            yield Breach(source.path, item.line, f"imports {item.module} inside a function: only the roof may")
        if top != PACKAGE:
            if floor == FACTS and top not in sys.stdlib_module_names:
                yield Breach(source.path, item.line, f"imports {top}: facts know the standard library alone")
            continue
        room = rest[0] if rest and rest[0] in FLOOR_OF else "__init__"
        other = FLOOR_OF[room]
        if other > floor:
            yield Breach(source.path, item.line, f"{source.room} (floor {floor}) imports {room} (floor {other}): up")
        elif other == floor and room != source.room and floor not in (FACTS, ROOF):
            yield Breach(source.path, item.line, f"{source.room} imports {room}: rooms of floor {floor} stay apart")


def _storeys(source: Source) -> Iterator[Breach]:
    """Imports that climb within a room, and folders of it that the plan does not know."""
    storeys = STOREYS.get(source.room)
    if storeys is None:
        return
    above = len(storeys)  # where the room's own modules stand, and the room as a whole
    parts = source.path.parent.parts[2:]
    if parts and parts[0] not in storeys:
        rule = f"the plan has no storey {parts[0]!r} in {source.room}: add it to STOREYS in tools/floors.py"
        yield Breach(source.path, 1, rule)
        return
    storey = storeys.index(parts[0]) if parts else above
    for item in source.imports:
        package, room, *rest = [*item.module.split("."), ""]
        if (package, room) != (PACKAGE, source.room):
            continue
        other = storeys.index(rest[0]) if rest[0] in storeys else above
        if other > storey:
            yield Breach(source.path, item.line, f"{parts[0]} imports {item.module}, which is above it in {room}: up")


def _torch(source: Source, modules: dict[str, Source]) -> Iterator[Breach]:
    """The chain by which a module that must not need torch would load it, if there is one."""
    if not any(source.name == name or source.name.startswith(f"{name}.") for name in WITHOUT_TORCH):
        return
    chain = _chain_to_torch(source, modules)
    if chain:
        line, names = chain
        yield Breach(source.path, line, f"must run without torch, but loads {' -> '.join(names)}")


def _chain_to_torch(source: Source, modules: dict[str, Source]) -> tuple[int, list[str]] | None:
    queue: list[tuple[Source, int, list[str]]] = [(source, 0, [])]
    queue += [(parent, 1, [parent.name]) for parent in _parents(source.name, modules)]
    seen = {source.name}
    while queue:
        module, first_line, names = queue.pop(0)
        for item in module.imports:
            if item.in_function or not item.at_run_time:
                continue
            line = first_line or item.line
            if any(item.module == name or item.module.startswith(f"{name}.") for name in BRINGS_TORCH):
                return line, [*names, item.module]
            for loaded in _loaded(item.module, modules):
                if loaded.name not in seen:
                    seen.add(loaded.name)
                    queue.append((loaded, line, [*names, loaded.name]))
    return None


def _loaded(module: str, modules: dict[str, Source]) -> list[Source]:
    """The package's modules that run when `module` (or a member of a module) is imported: its parents and itself."""
    top, _, name = module.partition(".")
    if top != PACKAGE:
        return []
    return [*_parents(name, modules), *([modules[name]] if name in modules else [])]


def _parents(name: str, modules: dict[str, Source]) -> list[Source]:
    parts = name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return [modules[parent] for parent in ["__init__", *above] if parent in modules and parent != name]


def _empty_names(path: Path) -> Iterator[Breach]:
    for part in (*path.parts[:-1], path.stem):
        if part in EMPTY_NAMES:
            yield Breach(path, 1, f"the name {part!r} says nothing: name what is inside")


def _unsafe(path: Path, tree: ast.Module) -> Iterator[Breach]:
    """Calls and imports that could run code from a file, and the words that allow it in libraries."""
    aliases = dict(_aliases(tree))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        for module in _modules_named(node, []):
            if module.split(".")[0] in UNSAFE_MODULES or module in UNSAFE_CALLS:
                yield Breach(path, line, f"imports {module}: it can run code from a file")
        if isinstance(node, ast.Call):
            called = _dotted(node.func)
            head, _, tail = called.partition(".")
            full = ".".join(filter(None, (aliases.get(head, head), tail)))
            if full in UNSAFE_CALLS:
                yield Breach(path, line, f"calls {full}: it can run code from a file")
        for word in _words(node):
            if word in UNSAFE_WORDS:
                yield Breach(path, line, f"says {word}: code from a checkpoint is never run")


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)


def _words(node: ast.AST) -> Iterable[str]:
    """Names under which an option could be handed on: keyword, variable, or key of a dictionary."""
    if isinstance(node, ast.keyword) and node.arg:
        return [node.arg]
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Dict):
        return [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return []


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a plain chain of names, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        stem = _dotted(node.value)
        return f"{stem}.{node.attr}" if stem else ""
    return ""


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = breaches(root)
    for breach in found:
        print(breach)
    print(f"floors: {len(found)} breaches" if found else "floors: every import goes down")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
