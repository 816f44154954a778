"""`daedal bench`: the machine and a model, what is shown, written and refused. Never how fast."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from daedal.bench import calibration
from daedal.cli import app
from daedal.cost import hardware
from tests.private_cache import private_cache
from tests.tiny import tiny_checkpoint

QUICK = calibration.Effort(seconds=0.001, read_bytes=2**16, side=64, past=256, chunk=64)


@pytest.fixture(autouse=True)
def _private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(private_cache(tmp_path / "cache")))
    monkeypatch.setattr(calibration, "Effort", functools.partial(lambda **_: QUICK))


def last(captured: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(captured.rstrip("\n").rpartition("\n")[2])
    return told


def test_the_machine_then_a_model_beside_its_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bench", "--calibrate", "--force", "--watts", "65", "--json"]) == 0
    captured = capsys.readouterr()
    told = last(captured.out)
    assert told["chip"]["watts_peak"] == 65
    assert told["read_bytes_per_second"].keys() == told["flops_per_second"].keys() >= {"float32", "bfloat16"}
    assert "other programs" in captured.out
    assert "65.0 W, a model: 65 W as given" in captured.out
    assert Path(told["path"]) == tmp_path / "cache" / hardware.CALIBRATION

    tiny = str(tiny_checkpoint(tmp_path / "tiny", "deepseek_v3"))
    assert app.run(["cost", tiny, "--hardware", "this", "--context", "64", "--json"]) == 0
    predicted = last(capsys.readouterr().out)["predictions"][0]
    assert predicted["decode_tokens_per_second"] > 0
    assert predicted["joules_per_million_output"] > 0

    arguments = ("--batch", "1,2", "--context", "64,1024", "--seconds", "0.01", "--weights", "bf16")
    assert app.run(["bench", tiny, *arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    told = last(captured.out)
    assert [(point["context"], point["batch"]) for point in told["points"]] == [(64, 1), (64, 2), (1024, 1), (1024, 2)]
    assert (told["weights"], told["unpredicted"]) == ("bf16", None)
    assert told["load_seconds"] > 0
    assert told["peak_bytes"] > 2**20
    first, refused = told["points"][1], told["points"][2]
    assert [phase["phase"] for phase in first["phases"]] == ["prefill", "decode"]
    for phase in first["phases"]:
        error = 100 * (phase["predicted_tokens_per_second"] / phase["tokens_per_second"] - 1)
        assert phase["error_percent"] == pytest.approx(error)
    assert first["kv_bytes"] >= first["kv_bytes_predicted"] > 0
    assert "give 2 to 512" in refused["refusal"]
    assert refused["phases"] == []
    assert refused["refusal"] in captured.out
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == told
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_calibration_nothing_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(tiny_checkpoint(tmp_path / "tiny"))
    arguments = ("--batch", "1", "--context", "64", "--seconds", "0.01", "--weights", "bf16", "--json")
    assert app.run(["bench", tiny, *arguments]) == 0
    told = last(capsys.readouterr().out)
    assert "daedal bench --calibrate" in told["unpredicted"]
    assert all(phase["error_percent"] is None for phase in told["points"][0]["phases"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either a MODEL to measure or --calibrate"),
        (("{tiny}", "--calibrate"), "give either a MODEL to measure or --calibrate"),
        (("{tiny}", "--force"), "--force is for --calibrate"),
        (("{tiny}", "--seconds", "0"), "--seconds is 0"),
        (("{tiny}", "--watts", "-3"), "--watts is -3"),
        (("{tiny}", "--context", "9999"), "nothing could be measured: context is 9999"),
        (("{tiny}", "--batch", "0"), "batch is 0"),
        (("{tiny}", "--kv-cache-dtype", "fp8"), "kv_cache_dtype fp8 packs the rows of latent attention"),
        (("nowhere", "--batch", "1"), "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(tiny_checkpoint(tmp_path / "tiny"))
    assert app.run(["bench", *(argument.format(tiny=tiny) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert error[-1].startswith("daedal: ")


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calibration, "MOST_OTHERS", -1.0)
    monkeypatch.setattr(calibration, "MOST_SPREAD", -1.0)
    assert app.run(["bench", "--calibrate"]) == 2
    error = capsys.readouterr().err
    assert "this machine is busy" in error
    assert "give --force" in error
