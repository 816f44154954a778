"""The declarations of `npu_schemas.toml`, as PyTorch reads them; tests and `tools/npu_schemas.py` share them."""

import tomllib
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("npu_schemas.toml")


def read() -> dict[str, list[str]]:
    """By name the arguments, and last what comes back, behind an arrow."""
    found: dict[str, list[str]] = tomllib.loads(FILE.read_text(encoding="utf-8"))["ops"]
    return found


def package() -> str:
    """Name and version, as pip writes them."""
    told: dict[str, Any] = tomllib.loads(FILE.read_text(encoding="utf-8"))["package"]
    return f"{told['name']}=={told['version']}"


def schema(name: str, told: list[str]) -> str:
    """One declaration in PyTorch's own notation."""
    *arguments, returns = told
    given = returns.removeprefix("-> ")
    return f"{name}({', '.join(arguments)}) -> {f'({given})' if ',' in given else given}"


def define() -> torch.library.Library:
    """Declares the ops in this process; they last as long as what is returned."""
    library = torch.library.Library("npu", "DEF")
    for name, told in read().items():
        library.define(schema(name, told))
    return library
