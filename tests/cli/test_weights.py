"""`--weights` of `serve` and `chat`: what `auto` chooses and says, and what comes of each wish."""

import io
from pathlib import Path

import pytest
import torch

from daedal.checkpoint.quantize import quantize
from daedal.checkpoint.save import save
from daedal.cli import app, weights
from daedal.cli.weights import choose_weights
from daedal.ops import using
from daedal.ops.backends.cpu import program
from tests.checkpoint.quantizable import quantizable_model, quantized
from tests.private_cache import private_cache
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = private_cache(tmp_path / "cache")
    monkeypatch.setenv("DAEDAL_CACHE", str(directory))
    return directory


def _auto(directory: Path, device: torch.device = CPU, *, full_precision: bool = False) -> str:
    return str(choose_weights("auto", directory, device, full_precision=full_precision))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose kernels read every format."""
    monkeypatch.setattr(weights, "_lacking", lambda format: None)


@pytest.mark.usefixtures("kernels")
def test_auto_keeps_published_formats_and_takes_int8_otherwise(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", "deepseek_v3")
    vnni = "weights: int8 (this CPU has kernels for it; --weights bf16 keeps the checkpoint's numbers)"
    assert _auto(plain) == vnni
    assert _auto(quantized(tmp_path / "v3", "deepseek_v3", "fp8")) == "weights: fp8 (as published)"
    assert _auto(quantized(tmp_path / "v4", "deepseek_v4", "fp4")) == "weights: fp4 (as published)"
    assert _auto(quantized(tmp_path / "base", "deepseek_v4", "fp8")) == "weights: fp8 (as published)"
    quantize(plain, tmp_path / "int4", to="int4")
    assert _auto(tmp_path / "int4") == "weights: int4 (the checkpoint is packed so)"
    held = "weights: as the checkpoint holds them"
    assert _auto(plain, full_precision=True) == f"{held} (float32 was asked for)"
    assert _auto(plain, torch.device("meta")) == f"{held} (packing is for CPUs, this is meta)"


def test_auto_packs_nothing_where_it_would_not_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_checkpoint(tmp_path / "plain")
    held = "weights: as the checkpoint holds them"
    monkeypatch.setattr(program, "missing", lambda: "no C++ compiler was found: install one")
    assert _auto(directory) == f"{held} (no native kernels: no C++ compiler was found: install one)"
    monkeypatch.setattr(program, "missing", lambda: None)
    for level, sentence in (("generic", "pay from AVX2"), ("amx", "no fast backend reads packed weights here")):
        monkeypatch.setattr(program, "native", lambda level=level: type("Library", (), {"level": level}))
        with using("reference"):
            assert sentence in _auto(directory)


def _chat(directory: Path, *options: str) -> int:
    arguments = ["--temperature", "0", "--max-tokens", "4", "--max-context", "128", "--cache-gb", "0.01"]
    return app.run(["chat", str(directory), *arguments, *options])


def test_chat_packs_once_with_a_bar_and_is_there_at_once_afterwards(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", "deepseek_v3")
    said = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        with using("reference"):
            assert _chat(directory, "--weights", "int4") == 0
        said.append(capsys.readouterr())
    assert "packing weights as int4" in said[0].err
    assert "packing" not in said[1].err
    assert said[0].out == said[1].out
    assert "in bfloat16: packed weights compute in it" in said[1].err
    assert [path.name.rsplit("-", 1)[0] for path in (cache / "packed").iterdir()] == ["tiny-int4"]


def test_a_packed_checkpoint_is_recognised(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny_checkpoint(tmp_path / "tiny", "llama"), tmp_path / "int8", to="int8")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with using("reference"):
        assert _chat(tmp_path / "int8") == 0
    assert "weights: int8 (the checkpoint is packed so)" in capsys.readouterr().err
    assert not (cache / "packed").exists()
    assert _chat(tmp_path / "int8", "--weights", "bf16") == 2
    assert "holds int8 alone: leave it out" in capsys.readouterr().err.splitlines()[-1]


def test_wishes_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny")
    assert app.run(["serve", str(directory), "--port", "0", "--weights", "int3"]) == 2
    assert "'int3' is not one of" in capsys.readouterr().err


def test_quantize_writes_packed_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(quantizable_model("deepseek_v3"), tmp_path / "source")
    assert app.run(["quantize", str(tmp_path / "source"), str(tmp_path / "int4"), "--to", "int4"]) == 0
    captured = capsys.readouterr()
    assert "int4" in next(line for line in captured.out.splitlines() if "routed expert" in line)
    assert app.run(["quantize", str(tmp_path / "int4"), str(tmp_path / "fp8"), "--to", "fp8"]) == 2
    assert "is packed as int4 already" in capsys.readouterr().err
    wish = ["quantize", str(tmp_path / "source"), str(tmp_path / "new"), "--to", "int8", "--layout", "deepseek"]
    assert app.run(wish) == 2
    assert "int8 has no stock layout" in capsys.readouterr().err
