"""Holds functions to 60 lines and files to 400: `python tools/sizes.py [ROOT]` prints each breach and exits 1.

A function is counted from `def` to its end without its docstring; a file whole. Knows nothing of what the code does:
a breach is a sign to look for the seam, not to squeeze lines.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION_LINES = 60
FILE_LINES = 400
CODE_FOLDERS = ("daedal", "tools", "benchmarks", "recipes", "tests")


def breaches(root: Path) -> list[str]:
    """Functions and files under `root` that are too long, as `path:line: what`, paths relative to `root`."""
    found = []
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name, length = path.relative_to(root), len(text.splitlines())
            if length > FILE_LINES:
                found.append(f"{name}:{FILE_LINES + 1}: the file has {length} lines, the limit is {FILE_LINES}")
            for line, function, length in _functions(ast.parse(text, filename=str(path))):
                if length > FUNCTION_LINES:
                    found.append(f"{name}:{line}: {function} has {length} lines, the limit is {FUNCTION_LINES}")
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    """Line, name and length of every function, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.lineno, node.name, node.end_lineno - node.lineno + 1 - _docstring_lines(node)


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(function, clean=False) is None:
        return 0
    first = function.body[0]
    assert first.end_lineno is not None
    return first.end_lineno - first.lineno + 1


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = breaches(root)
    for breach in found:
        print(breach)
    print(f"sizes: {len(found)} breaches" if found else "sizes: every function and file within its limit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
