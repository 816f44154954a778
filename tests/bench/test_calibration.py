"""The machine's ceilings: what is measured, in which units, what is kept, and what a busy machine is told."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from daedal.bench import calibration, pieces
from daedal.bench.calibration import Calibration, Effort
from daedal.bench.measuring import Predictor, measure
from daedal.cost import energy, hardware, plan, prices, work
from daedal.errors import ConfigError
from tests.tiny import tiny_model

SMALL = Effort(seconds=0.001, read_bytes=2**16, side=64, past=256, chunk=64)


def calibrated(clock: Callable[[], float], others: float | None = 0.0) -> Calibration:
    return calibration.calibrate(
        device=torch.device("cpu"),
        dtype=torch.float32,
        meter=energy.meter(50.0),
        effort=SMALL,
        clock=clock,
        others=lambda: others,
    )


def steady() -> Callable[[], float]:
    """Every reading is a millisecond after the one before."""
    return (tick / 1000 for tick in itertools.count()).__next__


@pytest.fixture(scope="module")
def quiet() -> Calibration:
    torch.set_num_threads(1)
    return calibrated(steady())


def test_rates_are_amounts_over_seconds(quiet: Calibration) -> None:
    """The clock says that everything takes a millisecond."""
    forms = pieces.formats(torch.device("cpu"))
    assert list(quiet.read) == list(quiet.multiplied) == forms
    assert forms[:2] == ["float32", "bfloat16"]
    assert quiet.multiplied["float32"].per_second == pytest.approx(2 * pieces.ROWS * 64 * 64 * 1000)
    for form, rate in quiet.read.items():
        assert 2**15 < rate.amount <= 2**18, form
        assert rate.per_second == pytest.approx(rate.amount * 1000)
    assert list(quiet.by_threads) == [1]
    chip = quiet.chip
    assert chip.bandwidth == max(rate.per_second for rate in quiet.read.values())
    assert chip.peak["bf16"] == chip.peak["float32"] == pytest.approx(2 * pieces.ROWS * 64 * 64 * 1000)
    assert (chip.watts_peak, chip.kind) == (50.0, "measured")
    # A product of 64 rows takes as long as one of 4 here, and so is sixteen times as fast.
    assert chip.by_rows.keys() == chip.peak.keys() - {"float32"}
    for rates in chip.by_rows.values():
        assert tuple(rates) == pieces.BY_ROWS
        assert rates[64] == pytest.approx(16 * rates[4])
    forms = {"bf16": "bf16" if "bf16" in quiet.read else "bfloat16", "int8": "int8", "w4": "int4", "fp8": "fp8"}
    assert chip.reached["bandwidth_by"] == {
        name: pytest.approx(quiet.read[form].per_second / chip.bandwidth)
        for name, form in forms.items()
        if form in quiet.read
    }
    assert chip.reached["cache_by"].keys() == chip.reached["attention_by"].keys() == {"full", "latent", "compressed"}
    # Steps that all take as long leave nothing for layers, and so nothing is claimed of them.
    assert quiet.overheads.layer_seconds is None
    assert "layer_seconds" not in chip.reached
    assert (quiet.spread, quiet.busy) == (0.0, None)


def test_a_busy_machine_is_refused_unless_forced(
    quiet: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "cache"))
    busy = replace(quiet, spread=0.3)
    assert busy.busy is not None
    assert "repeats lie 30% apart" in busy.busy
    path = tmp_path / "cache" / hardware.CALIBRATION
    for found, said in ((busy, "repeats lie"), (replace(quiet, others=0.4), "other programs took 40%")):
        with pytest.raises(ConfigError, match=f"this machine is busy: {said}.*--force"):
            calibration.write(found)
        assert not path.exists()
    assert calibration.write(busy, force=True) == path
    assert [one.name for one in path.parent.iterdir()] == [hardware.CALIBRATION]
    assert replace(quiet, others=None).busy is None


def test_what_is_kept_is_what_the_planner_reads(
    quiet: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path))
    reached = {"layer_seconds": 1e-5, "sequence_seconds": 2e-6, "expert_seconds": 3e-6, "cache_by": {"full": 0.4}}
    calibration.write(replace(quiet, chip=replace(quiet.chip, reached=reached)))
    chip = hardware.read(hardware.THIS)
    assert replace(chip, name=quiet.chip.name) == replace(quiet.chip, reached=reached)
    assert json.loads((tmp_path / hardware.CALIBRATION).read_text())["reached"] == reached
    monkeypatch.setenv("DAEDAL_CACHE", "/proc/nowhere")
    with pytest.raises(ConfigError, match="cannot be written"):
        calibration.write(quiet)


def test_sequences_and_experts_add_to_a_step(quiet: Calibration) -> None:
    config = tiny_model("deepseek_v3").config
    model = work.model(config, weights="bf16", kv_dtype="bf16")

    def overhead(batch: int, **reached: float) -> float:
        chip = replace(quiet.chip, reached={"layer_seconds": 1e-5, "step_seconds": 1e-4} | reached)
        found = plan.predict(
            model, hardware="this", chip=chip, devices=1, context=32, batch=batch, prices=prices.read(None)
        )
        assert found.decode is not None
        return found.decode.step.overhead

    assert overhead(1, sequence_seconds=1e-3) == pytest.approx(1e-4 + 3e-5)
    assert overhead(5, sequence_seconds=1e-3) == pytest.approx(1e-4 + 3 * (1e-5 + 4e-3))
    # Two of three layers have experts, and one token meets four in each.
    assert overhead(1, expert_seconds=1e-3) == pytest.approx(1e-4 + 3e-5 + 8e-3)
    assert 8e-3 < overhead(5, expert_seconds=1e-3) < 24.2e-3


def test_prompts_pay_for_layers_that_are_not_replayed_and_for_rows_that_pass_between_matrices(
    quiet: Calibration,
) -> None:
    model = work.model(tiny_model("deepseek_v3").config, weights="bf16", kv_dtype="bf16")

    def overheads(**reached: float) -> tuple[float, float]:
        chip = replace(quiet.chip, reached={"layer_seconds": 1e-5, "step_seconds": 1e-4} | reached)
        found = plan.predict(
            model, hardware="this", chip=chip, devices=1, context=32, batch=1, prices=prices.read(None)
        )
        assert found.decode is not None
        assert found.prefill is not None
        return found.decode.step.overhead, found.prefill.step.overhead

    assert overheads() == pytest.approx((1e-4 + 3e-5, 1e-4 + 3e-5))
    assert overheads(prompt_layer_seconds=1e-3) == pytest.approx((1e-4 + 3e-5, 1e-4 + 3e-3))
    passed = 32 * model.activations / 1e6
    assert overheads(activations=1e6) == pytest.approx((1e-4 + 3e-5, 1e-4 + 3e-5 + passed))


def test_points_of_a_model_beside_their_predictions(quiet: Calibration) -> None:
    model = tiny_model("deepseek_v3")
    counted = work.model(model.config, weights="bf16", kv_dtype="bf16")
    predictor = Predictor(model=counted, chip=quiet.chip, prices=prices.read(None))
    found = list(
        measure(
            model,
            batches=(1, 2),
            contexts=(64, 9999),
            seconds=0.004,
            meter=energy.meter(50.0),
            predictor=predictor,
            clock=steady(),
        )
    )
    assert [(point.context, point.batch) for point in found] == [(64, 1), (64, 2), (9999, 1), (9999, 2)]
    assert all("9999" in str(point.refusal) and not point.phases for point in found[2:])
    for point in found[:2]:
        prefill, decode = point.phases
        assert (prefill.name, decode.name) == ("prefill", "decode")
        assert prefill.rate == pytest.approx(point.batch * 63 * 1000)
        assert decode.rate == pytest.approx(point.batch * 1000)
        assert 32 <= decode.held <= 96
        for phase in point.phases:
            assert phase.predicted is not None
            assert phase.error == pytest.approx(phase.predicted / phase.rate - 1)
            assert phase.joules_per_token is not None
            assert phase.joules_per_token >= 0
        assert point.kv_bytes is not None
        assert point.kv_bytes_predicted == point.batch * counted.kv_bytes(64)
    assert quiet.chip.bandwidth > 0
    with pytest.raises(ConfigError, match="--seconds is 0"):
        Effort(seconds=0)
