"""`daedal serve` as a process: its address once it is warm, a clean end, a port in use; and `daedal chat` in a pipe."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from daedal.cli import app
from tests.tiny import tiny_checkpoint

DAEDAL = [sys.executable, "-m", "daedal"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny", "deepseek_v3")


@pytest.fixture
def server(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    command = [*DAEDAL, "serve", str(checkpoint), "--port", "0", "--max-context", "128", "--cache-gb", "0.01", "--cost"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _get(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return reply.status, reply.read()


def test_serves_says_so_and_ends_when_told(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert _get(f"{address}/ready")[0] == 200
    assert json.loads(_get(f"{address}/v1/models")[1])["data"][0]["id"] == "tiny"
    numbers = json.loads(_get(f"{address}/stats")[1])
    assert 0 < numbers["active_params"] < numbers["total_params"]
    assert numbers["max_context"] == 128
    asked = urllib.request.Request(f"{address}/v1/completions", json.dumps({"prompt": "It is"}).encode())
    with urllib.request.urlopen(asked, timeout=30) as reply:
        cost = json.loads(reply.read())["usage"]["cost_details"]
    assert cost["flops"] > 0
    assert cost["joules"] >= 0
    assert "x utilisation of" in cost["energy_source"] or "RAPL" in cost["energy_source"]
    os.killpg(server.pid, signal.SIGTERM)
    _, err = server.communicate(timeout=15)
    assert server.returncode == 0
    assert "Traceback" not in err
    assert "on cpu in " in err


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.run(["serve", "no-such-model", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"port {port}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("milliseconds", ["0", "-5", "nan"])
def test_a_time_that_no_step_can_keep(milliseconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["serve", "no-such-model", "--port", "0", f"--prefill-ms={milliseconds}"]) == 2
    err = capsys.readouterr().err
    assert "--prefill-ms is" in err
    assert err.count("\n") == 1


def test_chat_over_a_pipe(checkpoint: Path) -> None:
    command = [*DAEDAL, "chat", str(checkpoint), "--dtype", "float32", "--temperature", "0", "--max-tokens", "6"]
    result = subprocess.run(command, input="hello\nagain\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 2
    first, *costs = result.stderr.splitlines()
    assert "on cpu in float32: as asked" in first
    assert all("tokens/s" in line and "KV cache" in line for line in costs)
    assert len(costs) == 2


def test_chat_without_a_template_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tiny_checkpoint(tmp_path / "bare", chat=False)
    assert app.run(["chat", str(bare)]) == 2
    assert "template" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--request-timeout=0", "--request-timeout=nan", "--drain-seconds=-1"])
def test_seconds_that_cannot_be(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["serve", "no-such-model", "--port", "0", option]) == 2
    err = capsys.readouterr().err
    assert option.partition("=")[0] in err
    assert err.count("\n") == 1


def test_a_model_that_cannot_be_loaded_is_one_sentence_from_the_other_process(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(
            path.read_bytes()[:4000] if path.suffix == ".safetensors" else path.read_bytes()
        )
    result = subprocess.run([*DAEDAL, "serve", str(broken), "--port", "0"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("daedal: ")
    assert result.stdout == ""
