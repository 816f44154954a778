"""The checkers find a planted breach of each kind, and nothing in the house as it stands."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tools import floors, sizes, venv

ROOT = Path(__file__).resolve().parent.parent


def _plant(root: Path, files: dict[str, str]) -> None:
    """Writes modules, by their paths without `.py`."""
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


PLANTED = {
    "up": (
        {"daedal/model/layer": "\nfrom daedal.infer import engine\n"},
        "daedal/model/layer.py:2: model (floor 2) imports infer",
    ),
    "up, relative": (
        {"daedal/ops/gather": "from ..model import batch\n"},
        "daedal/ops/gather.py:1: ops (floor 1) imports model",
    ),
    "up, by name": (
        {"daedal/serve/app": "import importlib\nimportlib.import_module('daedal.cli.app')\n"},
        "daedal/serve/app.py:2: serve (floor 5) imports cli",
    ),
    "the roof from below": (
        {"daedal/infer/loop": "from daedal import load\n"},
        "daedal/infer/loop.py:1: infer (floor 4) imports __init__",
    ),
    "typing only": (
        {"daedal/model/layer": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import daedal.train.loop\n"},
        "daedal/model/layer.py:3: model (floor 2) imports train",
    ),
    "across": ({"daedal/infer/engine": "import daedal.train.loop\n"}, "daedal/infer/engine.py:1: infer imports train"),
    "up within a room": (
        {"daedal/serve/workers/wire": "from daedal.serve.state import keys\n"},
        "daedal/serve/workers/wire.py:1: workers imports daedal.serve.state.keys, which is above it in serve: up",
    ),
    "up to what the room has above its storeys": (
        {"daedal/serve/api/chat": "import math\nfrom daedal.serve.app import build_app\n"},
        "daedal/serve/api/chat.py:2: api imports daedal.serve.app.build_app, which is above it in serve: up",
    ),
    "a storey that is not in the plan": (
        {"daedal/serve/attic/box": "x = 1\n"},
        "daedal/serve/attic/box.py:1: the plan has no storey 'attic' in serve",
    ),
    "in a function": (
        {"daedal/ops/pick": "def pick():\n    import math\n    return math\n"},
        "daedal/ops/pick.py:2: imports math inside a function",
    ),
    "a fact with a dependency": ({"daedal/shapes": "import numpy\n"}, "daedal/shapes.py:1: imports numpy: facts know"),
    "a room without a floor": ({"daedal/attic/box": "x = 1\n"}, "daedal/attic/box.py:1: the plan has no room 'attic'"),
    "torch at hand": (
        {"daedal/cost/count": "import torch.nn\n"},
        "daedal/cost/count.py:1: must run without torch, but loads torch",
    ),
    "torch behind a module": (
        {
            "daedal/infer/scheduler": "\nfrom daedal.infer.cache import Pages\n",
            "daedal/infer/cache": "from torch import Tensor\n",
        },
        "daedal/infer/scheduler.py:2: must run without torch, but loads infer.cache -> torch.Tensor",
    ),
    "torch in the room's own __init__": (
        {"daedal/infer/request": "import math\n", "daedal/infer/__init__": "import torch\n"},
        "daedal/infer/request.py:1: must run without torch, but loads infer -> torch",
    ),
    "an empty name": ({"daedal/text/utils": "x = 1\n"}, "daedal/text/utils.py:1: the name 'utils' says nothing"),
    "an empty name beside the package": ({"tools/misc": "x = 1\n"}, "tools/misc.py:1: the name 'misc' says nothing"),
    "pickle": ({"daedal/checkpoint/read": "import pickle\n"}, "daedal/checkpoint/read.py:1: imports pickle"),
    "marshal": (
        {"daedal/checkpoint/read": "from marshal import loads\n"},
        "daedal/checkpoint/read.py:1: imports marshal",
    ),
    "torch.load": (
        {"daedal/checkpoint/read": "import torch\ntorch.load('x')\n"},
        "daedal/checkpoint/read.py:2: calls torch.load",
    ),
    "torch.load, renamed": (
        {"daedal/checkpoint/read": "import torch as t\nt.load('x')\n"},
        "read.py:2: calls torch.load",
    ),
    "torch.load, imported": ({"daedal/checkpoint/read": "from torch import load\n"}, "read.py:1: imports torch.load"),
    "eval": ({"daedal/text/chat": "\n\neval('1')\n"}, "daedal/text/chat.py:3: calls eval"),
    "exec": ({"tools/run": "exec('1')\n"}, "tools/run.py:1: calls exec"),
    "yaml.load": (
        {"daedal/convert/read": "import yaml\nyaml.load('x')\n"},
        "daedal/convert/read.py:2: calls yaml.load",
    ),
    "remote code": (
        {"daedal/eval/tasks": "open('x', trust_remote_code=True)\n"},
        "tasks.py:1: says trust_remote_code",
    ),
    "remote code, in a dictionary": (
        {"daedal/eval/tasks": "x = {'trust_remote_code': True}\n"},
        "says trust_remote_code",
    ),
    "not Python": ({"daedal/text/chat": "def\n"}, "daedal/text/chat.py:1: is not Python"),
}


@pytest.mark.parametrize(("files", "expected"), PLANTED.values(), ids=PLANTED)
def test_floors_finds(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    _plant(tmp_path, files)
    found = [str(breach) for breach in floors.breaches(tmp_path)]
    assert len(found) == 1
    assert expected in found[0]


def test_floors_finds_a_package_that_users_would_not_have(tmp_path: Path) -> None:
    _plant(tmp_path, {"daedal/serve/app": "import starlette\nimport numpy\nimport pytest\n"})
    declared = 'dependencies = ["Numpy>=2"]\noptional-dependencies = { serve = ["starlette>=1"], dev = ["pytest"] }\n'
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{declared}")
    (found,) = map(str, floors.breaches(tmp_path))
    assert found.startswith("daedal/serve/app.py:3: imports pytest, which pyproject.toml does not declare")


def test_floors_allows_what_the_plan_allows(tmp_path: Path) -> None:
    files = {
        "daedal/shapes": "import math\nfrom daedal.config import ModelConfig\n",
        "daedal/config": "import json\n",
        "daedal/cli/app": "def serve():\n    import daedal.serve.app\n    import torch\n",
        "daedal/__init__": "def __getattr__(name):\n    from daedal.infer import engine\n",
        "daedal/infer/engine": "import torch\nfrom daedal.infer.request import Request\n",
        "daedal/infer/request": "import math\n",
        "daedal/serve/app": "from daedal.serve.api.chat import ChatEndpoint\nfrom daedal.serve.door import Door\n",
        "daedal/serve/api/chat": "from daedal.serve.state import keys\nfrom daedal.serve.api import body\n",
        "daedal/model/batch": "import torch\ndef go(model):\n    model.eval()\n    model.load('x')\n",
        "daedal/cost/count": "from daedal import shapes\nif TYPE_CHECKING:\n    import torch\n",
    }
    _plant(tmp_path, files)
    assert floors.breaches(tmp_path) == []


def _function(lines: int, docstring: int = 0) -> str:
    words = ["    '''word"] + ["    word"] * (docstring - 2) + ["    '''"] if docstring else []
    return "\n".join(["@cached", "def f():", *words, *["    x = 1"] * (lines - 1)]) + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_function(61), "daedal/ops/a.py:2: f has 61 lines, the limit is 60"),
        ("class A:\n" + "".join(f"    {line}\n" for line in _function(62).splitlines()), "a.py:3: f has 62 lines"),
        ("x = 1\n" * 401, "daedal/ops/a.py:401: the file has 401 lines, the limit is 400"),
    ],
)
def test_sizes_finds(tmp_path: Path, text: str, expected: str) -> None:
    _plant(tmp_path, {"daedal/ops/a": text})
    (found,) = sizes.breaches(tmp_path)
    assert expected in found


def test_sizes_allows_the_limits_and_does_not_count_docstrings(tmp_path: Path) -> None:
    files = {"a": _function(60), "b": _function(60, docstring=30), "c": "x = 1\n" * 400}
    _plant(tmp_path, {f"daedal/ops/{name}": text for name, text in files.items()})
    assert sizes.breaches(tmp_path) == []


@pytest.mark.parametrize("tool", ["floors", "sizes"])
def test_a_breach_is_printed_and_fails_the_command(tmp_path: Path, tool: str) -> None:
    _plant(tmp_path, {"daedal/ops/base": _function(70)})
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout.startswith("daedal/ops/base.py:")


def test_the_house_stands() -> None:
    assert [str(breach) for breach in floors.breaches(ROOT)] == []
    assert sizes.breaches(ROOT) == []


@pytest.mark.parametrize(
    "command", [["-c", "import daedal"], ["-m", "daedal", "--help"], ["-m", "daedal", "cost", "deepseek-v3"]]
)
def test_light_commands_load_no_torch(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "daedal" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "tokenizers"}


def test_set_up_is_repeated_only_when_something_changed(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("first")
    before = venv.fingerprint(tmp_path)
    stamp = tmp_path / "stamp.json"
    assert venv.installed_extras(stamp, before) is None
    stamp.write_text(json.dumps({"fingerprint": before, "extras": ["serve"]}))
    assert venv.installed_extras(stamp, before) == {"serve"}
    (tmp_path / "constraints.txt").write_text("second")
    assert venv.installed_extras(stamp, venv.fingerprint(tmp_path)) is None
    stamp.write_text('{"fingerprint"')
    assert venv.installed_extras(stamp, before) is None


def test_an_environment_of_another_python_is_known(tmp_path: Path) -> None:
    """Both are 3.11, say, and neither can import what the other has compiled."""
    assert venv.other_python(tmp_path) is None
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.0rc1\n")
    assert venv.other_python(tmp_path) == "3.11.0rc1"
    (tmp_path / "pyvenv.cfg").write_text(f"version = {platform.python_version()}\nhome = /usr/bin\n")
    assert venv.other_python(tmp_path) is None


def test_an_index_that_never_answers_is_not_waited_for() -> None:
    assert not venv.reachable("http://127.0.0.1:9/", seconds=1.0)
    assert not venv.reachable("not a url", seconds=1.0)
    assert venv.torch_index_options("") == []
