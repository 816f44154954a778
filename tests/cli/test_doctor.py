"""`daedal doctor` leaves no op out, and says what it was told by the machine and the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daedal.cli import app, doctor, op_samples, precision
from daedal.ops.backends.cpu import program as doctor_native
from daedal.ops.backends.cpu import rows
from daedal.ops.backends.cpu.program import missing
from daedal.ops.registry import REGISTRY

TRAINING = {"scaled_linear", "scaled_experts"}  # not part of a decode step


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_has_a_sample_that_it_accepts(dtype: torch.dtype, weights: str | None) -> None:
    samples = op_samples.samples(torch.device("cpu"), dtype, weights)
    assert samples.keys() == set(REGISTRY.ops)
    for op, (arguments, keywords) in samples.items():
        REGISTRY.call(op, *arguments, **keywords)


def test_a_decode_step_is_explained_as_it_runs() -> None:
    """Without gradients, for which some backends would decline, and with the weights packed as `serve` packs them."""
    choices = doctor.op_choices(torch.device("cpu"), torch.bfloat16)
    chosen = {choice["op"]: choice["backend"] for choice in choices if choice["chosen"]}
    assert missing() is not None or chosen == {op: "aten" if op in TRAINING else "cpu" for op in REGISTRY.ops}


def test_without_a_compiler_pytorch_runs_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor_native, rows):
        monkeypatch.setattr(module, "missing", lambda: "no C++ compiler was found")
    choices = doctor.op_choices(torch.device("cpu"), torch.float32)
    chosen = {choice["op"]: choice["backend"] for choice in choices if choice["chosen"]}
    only_reference = {"route", "angles", "keep_on_pages", *TRAINING}
    assert chosen == {op: "reference" if op in only_reference else "aten" for op in REGISTRY.ops}
    reasons = {choice["op"]: choice["reason"] for choice in choices if choice["backend"] == "cpu"}
    assert all("not packed" in reasons.pop(op) for op in ("grouped_linear", "experts"))
    assert set(reasons.values()) == {"no C++ compiler was found"}
    assert doctor._native_kernels().startswith("absent: no C++ compiler was found.")


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "not yet there"))
    assert app.run(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found.keys() == doctor.Diagnosis.__annotations__.keys()
    assert found["cache"] == found["variables"]["DAEDAL_CACHE"] == str(tmp_path / "not yet there")
    assert found["cache_free_bytes"] > 0
    for op in REGISTRY.ops:
        rows = [row for row in found["ops"] if row["op"] == op]
        assert sum(row["chosen"] for row in rows) == 1
        assert {row["backend"] for row in rows} >= {candidate.backend for candidate in REGISTRY.candidates(op)}
        assert all(row["reason"] for row in rows)
    assert "ops, for a decode step" in out


def test_an_unknown_backend_is_a_mistake() -> None:
    environment = {**os.environ, "DAEDAL_OPS": "abacus"}
    command = [sys.executable, "-m", "daedal", "doctor"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("daedal: backend 'abacus' is unknown")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("capabilities", "dtype", "reason"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, "natively (avx512_bf16)"),
        ({"bf16": True}, torch.bfloat16, "natively (bf16)"),
        ({"avx2": True, "avx512_bf16": False}, torch.float32, "does not multiply bfloat16"),
        (None, torch.float32, "cannot tell"),
    ],
)
def test_dtype_follows_what_the_cpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object] | None, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: capabilities)
    chosen = precision.choose_dtype("auto", torch.device("cpu"))
    assert chosen.dtype is dtype
    assert reason in chosen.reason
    assert precision.choose_dtype("float32", torch.device("cpu")).dtype is torch.float32
