"""The command line's manners: a sentence and status 2 for a mistake, 130 for an interrupt, a traceback for a defect."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import daedal
from daedal.cli import app
from daedal.cost import count


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = app.run(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["srve"], "No such command 'srve'"),
        (["cost"], "Missing argument 'MODEL...'"),
        (["cost", "deepseek-v3", "--contxt", "1"], "No such option"),
        (["cost", "deepseek-v3", "--context", "many"], "Invalid value for '--context'"),
        (["cost", "deepseek-v3", "--context", "0"], "context is 0"),
        (["cost", "no-such-model"], "no-such-model"),
        (["cost", "{empty}"], "has no config.json"),
        (["cost", "{broken}"], "is not JSON"),
        (["serve", "no-such-model", "--port", "0"], "no-such-model"),
        (["serve", "{empty}", "--port", "0"], "has no config.json"),
        (["serve", "--dtype", "int3"], "'int3'"),
        (["serve", "--port", "65536"], "port is 65536"),
        (["serve", "--max-batch", "0"], "--max-batch is 0"),
        (["serve", "--cache-gb", "-1"], "--cache-gb is -1"),
        (["serve", "--cache-gb", "nan"], "--cache-gb is nan"),
        (["chat", "{empty}"], "has no config.json"),
        (["pull", "no-such-model"], "no-such-model"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    status, out, err = _run(capsys, *(argument.format_map(places) for argument in arguments))
    assert status == 2
    assert out == ""
    assert err.startswith("daedal: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _run(capsys)
    assert (status, err) == (0, "")
    assert all(f" {verb} " in out for verb in ("serve", "chat", "pull", "doctor", "cost", "version"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "version") == (0, f"{daedal.__version__}\n", "")


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(count, "report", interrupted)
    assert _run(capsys, "cost", "deepseek-v3") == (130, "", "")


def test_a_defect_is_not_dressed_up_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(count, "report", defective)
    with pytest.raises(ZeroDivisionError, match="ours"):
        app.run(["cost", "deepseek-v3"])


def test_log_level(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAEDAL_LOG", "loud")
    status, _, err = _run(capsys, "version")
    assert status == 2
    assert "DAEDAL_LOG is 'loud'" in err
    monkeypatch.setenv("DAEDAL_LOG", "debug")
    status, _, err = _run(capsys, "cost", "deepseek-v3", "--context", "0")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("daedal: context is 0")


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "daedal", "cost", "deepseek-v3", "--json"]
        result = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == ""
