"""Documents keep up with the code: variables and commands are in the README, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

from daedal.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_environment_variable_is_documented() -> None:
    used = {name for path in (ROOT / "daedal").rglob("*.py") for name in re.findall(r"DAEDAL_[A-Z]+", path.read_text())}
    assert used == {"DAEDAL_CACHE", "DAEDAL_OPS", "DAEDAL_LOG"}
    assert all(name in README for name in used)


def test_every_command_is_documented() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    missing = {name for name in commands - {"version"} if f"daedal {name}" not in README}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for named in re.findall(r"`?(docs/[\w/.-]+\.md)`?", document.read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), named
