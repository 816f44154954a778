"""Predictions: laws that hold for every model and chip, published figures, and the error that the command repeats."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from daedal.cost import hardware, plan, presets, prices, roofline, work
from daedal.cost.hardware import Chip
from daedal.cost.plan import Prediction
from daedal.errors import ConfigError

K, M = 1024, 1024 * 1024
PRICES = prices.read()
ROOT = Path(__file__).parents[2]


def _model(name: str, *, drafting: bool = False, skew: float = 0.0, weights: str = "shipped") -> work.Model:
    config = presets.read(name)
    assert config is not None
    return work.model(config, drafting=drafting, skew=skew, weights=weights)


def _predict(
    model: work.Model,
    chip: str | Chip = "h200",
    *,
    devices: int = 1,
    context: int = 4 * K,
    batch: int = 1,
    **more: object,
) -> Prediction:
    name, described = (chip, hardware.read(chip)) if isinstance(chip, str) else ("mine", chip)
    return plan.predict(
        model,
        hardware=name,
        chip=described,
        devices=devices,
        context=context,
        batch=batch,
        prices=PRICES,
        **more,  # type: ignore[arg-type]
    )


def _decode(prediction: Prediction) -> plan.Rate:
    assert prediction.decode is not None
    return prediction.decode


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", presets.names())
def test_batches_pay_and_contexts_cost(name: str, devices: int) -> None:
    model = _model(name)
    chip = replace(hardware.read("h200"), memory_bytes=1e15)
    along = [_predict(model, chip, devices=devices, batch=batch) for batch in (1, 2, 8, 64, 512)]
    rates = [_decode(one).tokens_per_second for one in along]
    assert rates == sorted(rates)
    each = [_decode(one).tokens_per_second / one.batch for one in along]
    assert each == sorted(each, reverse=True)
    longer = [_predict(model, chip, devices=devices, context=context) for context in (1, 128, 4 * K, 128 * K, M)]
    seconds = [_decode(one).seconds for one in longer]
    assert seconds == sorted(seconds)
    users = [one.fit.users for one in longer]
    assert users == sorted(users, reverse=True)
    first = [one.first_token for one in longer if one.first_token is not None]
    assert first == sorted(first)
    assert len(first) == len(longer)


@pytest.mark.parametrize("better", [{"bandwidth": 9.6e12}, {"peak": {"bf16": 2e15, "fp8": 4e15}}, {"link": 9e11}])
def test_a_better_chip_is_never_slower(better: dict[str, object]) -> None:
    chip = replace(hardware.read("h200"), memory_bytes=1e13)
    faster = replace(chip, **better)  # type: ignore[arg-type]
    gained = 0
    for name in presets.names():
        for context, batch in ((4 * K, 1), (128 * K, 64)):
            one, other = (
                _predict(_model(name), which, devices=8, context=context, batch=batch) for which in (chip, faster)
            )
            assert one.prefill is not None
            assert other.prefill is not None
            assert _decode(other).seconds <= _decode(one).seconds
            assert other.prefill.tokens_per_second >= one.prefill.tokens_per_second
            gained += other.prefill.tokens_per_second > one.prefill.tokens_per_second
    assert gained


def test_a_step_is_the_sum_of_its_parts_and_bounds() -> None:
    step = _decode(_predict(_model("deepseek-v3"), devices=8, batch=32)).step
    assert step.seconds == pytest.approx(sum(timed.seconds for timed in step.parts) + step.overhead)
    assert step.seconds == pytest.approx(sum(step.by_bound.values()))
    assert step.by_bound[step.bound] == max(step.by_bound.values())
    assert {timed.bound for timed in step.parts} <= {"memory", "compute", "link"}


def test_sparse_attention_reads_less_than_full_at_length() -> None:
    """V3.2 is V3 with an indexer: beyond its top-k a step takes less time, and the gap grows."""
    gaps = []
    for context in (32 * K, 128 * K, M):
        chip = replace(hardware.read("h200"), memory_bytes=1e13)
        full, sparse = (_predict(_model(name), chip, context=context) for name in ("deepseek-v3", "deepseek-v3.2"))
        gaps.append(_decode(full).seconds - _decode(sparse).seconds)
    assert gaps[0] > 0
    assert gaps == sorted(gaps)


def test_fewer_bits_take_less_room_and_uneven_loads_read_less() -> None:
    sizes = [_model("deepseek-v2", weights=form).weight_bytes for form in ("bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    even, uneven = (_predict(_model("deepseek-v2", skew=skew), devices=8, batch=32) for skew in (0.0, 1.0))
    assert _decode(uneven).seconds < _decode(even).seconds


def test_accepted_drafts_multiply_the_tokens_of_a_step() -> None:
    model = _model("deepseek-v3", drafting=True)
    none, most, every = (_predict(model, devices=8, batch=4, acceptance=share) for share in (0.0, 0.85, 1.0))
    assert (
        _decode(none).seconds
        == _decode(most).seconds
        > _decode(_predict(_model("deepseek-v3"), devices=8, batch=4)).seconds
    )
    assert _decode(most).tokens_per_second == pytest.approx(1.85 * _decode(none).tokens_per_second)
    assert _decode(every).tokens_per_second == pytest.approx(2 * _decode(none).tokens_per_second)


def test_what_does_not_fit_says_by_how_much_and_what_would_do() -> None:
    model = _model("deepseek-v3.2")
    alone = _predict(model)
    assert alone.decode is alone.prefill is alone.first_token is None
    assert alone.fit.users == 0
    needed = alone.fit.weights + alone.fit.kv_per_sequence + alone.fit.workspace
    assert alone.fit.short == pytest.approx(needed - 0.92 * 141e9)
    assert alone.devices_needed is not None
    assert _predict(model, devices=alone.devices_needed).decode is not None
    assert _predict(model, devices=alone.devices_needed // 2).decode is None
    roomy = _predict(model, devices=alone.devices_needed)
    assert _predict(model, devices=alone.devices_needed, batch=roomy.fit.users // 2).decode is not None


def test_rows_of_no_head_are_repeated_by_tensor_parallelism() -> None:
    """Eight devices that split sequences hold about eight times the caches of eight that split heads (one KV head)."""
    model, chip = _model("deepseek-v4-flash"), hardware.read("h200")
    tensor, expert = plan.parallel.layouts(model.config, 8)
    reached = hardware.efficiency(chip)
    users = [
        plan.memory.fit(model, layout, chip, reached, batch=8, context=128 * K).users for layout in (tensor, expert)
    ]
    assert 6 < users[1] / users[0] < 8.5


def test_experts_beyond_the_memory_are_bound_by_the_disk() -> None:
    """V4-Flash: 13.3 MB an expert, 3.4 GB a token, so 2 tokens a second at 7 GB/s with none at hand (published)."""
    model = _model("deepseek-v4-flash")
    (routed,) = (part for part in work.decode(model, batch=1, context=4 * K) if part.name == work.ROUTED)
    assert routed.weight_bytes == pytest.approx(3.44e9, rel=0.01)
    chip = replace(hardware.read("laptop"), memory_bytes=20e9, disk=7e9)
    held = _predict(model, chip, experts_in="disk")
    assert _decode(held).bound == "disk"
    assert 1.5 < _decode(held).tokens_per_second < 2.5
    roomier = _predict(model, replace(chip, memory_bytes=120e9), experts_in="disk")
    assert _decode(roomier).tokens_per_second > 1.8 * _decode(held).tokens_per_second
    enough = replace(chip, memory_bytes=400e9)
    assert _decode(_predict(model, enough, experts_in="disk")).seconds == _decode(_predict(model, enough)).seconds


def test_energy_lies_between_idle_and_peak_and_money_follows_the_rate() -> None:
    model, chip = _model("deepseek-v2-lite"), hardware.read("h200")
    for batch in (1, 64):
        rate = _decode(_predict(model, batch=batch))
        assert rate.joules_per_million is not None
        watts = rate.joules_per_million / 1e6 * rate.tokens_per_second
        assert chip.watts_idle is not None
        assert chip.watts_peak is not None
        assert chip.watts_idle < watts < chip.watts_peak
        (dollars,) = rate.dollars_per_million.values()
        assert dollars == pytest.approx(1.41 / 3600 / rate.tokens_per_second * 1e6)
    unknown = replace(chip, watts_peak=None, watts_idle=None)
    assert _decode(_predict(model, unknown)).joules_per_million is None
    assert _decode(_predict(model, "a100")).dollars_per_million == {}


@pytest.mark.parametrize(
    ("chip", "more", "said"),
    [
        ("h200", {"context": 0}, "--context is 0"),
        ("h200", {"batch": 0}, "--batch is 0"),
        ("h200", {"acceptance": 1.5}, "--acceptance is 1.5"),
        ("h200", {"acceptance": float("nan")}, "--acceptance is nan"),
        ("h200", {"experts_in": "cloud"}, "--experts-in is 'cloud'"),
        ("h200", {"experts_in": "disk"}, "reads from disk is not known"),
        ("h200", {"experts_in": "host", "devices": 2}, "on one device"),
        ("ascend-910b", {"devices": 2}, "how fast 2 of Huawei Ascend 910B .* give one device"),
        ("rtx-4090", {"devices": 16}, "give up to 8 devices"),
        ("ascend-910c", {"devices": 512}, "give up to 384 devices"),
        ("h200", {"devices": 1024}, "1024 devices cannot share the 128 heads evenly, nor the 256 experts"),
    ],
)
def test_what_makes_no_sense_is_refused(chip: str, more: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _predict(_model("deepseek-v3"), chip, **more)  # type: ignore[arg-type]


def test_models_without_drafting_modules_do_not_draft() -> None:
    with pytest.raises(ConfigError, match="--acceptance is for drafting"):
        _model("deepseek-v2", drafting=True)


def test_this_machine_is_known_once_it_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="has not been measured: run `daedal bench --calibrate` first"):
        hardware.read("this")
    found = {"name": "mine", "kind": "measured", "memory_bytes": 8e9, "bandwidth": 2e10, "peak": {"bf16": 1e11}}
    path = tmp_path / hardware.CALIBRATION
    path.write_text(json.dumps(found | {"reached": {"layer_seconds": 5e-6}}))
    chip = hardware.read("this")
    assert (chip.bandwidth, hardware.efficiency(chip).layer_seconds) == (2e10, 5e-6)
    assert chip.rate("fp4") == chip.rate("int8") == 1e11
    for wrong, said in (
        ({"bandwidth": -1}, "bandwidth of mine is -1"),
        ({"peak": {"fp8": 1e12}}, "no peak in bf16"),
        ({"peak": {"bf16": 0}}, "peak of bf16 of mine is 0"),
        ({"colour": 1}, "'colour'"),
        ({"reached": {"luck": 1}}, "'luck'"),
        ({"kind": "abacus"}, "'abacus'"),
    ):
        path.write_text(json.dumps(found | wrong))
        with pytest.raises(ConfigError, match=said):
            hardware.read("this")
    path.write_text("{")
    with pytest.raises(ConfigError, match="calibrate` again"):
        hardware.read("this")


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_error", ROOT / "benchmarks" / "cost_error.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_error_that_the_command_tells_is_that_of_the_measured_pairs() -> None:
    benchmark = _benchmark()
    groups = {kind: benchmark.error(chosen) for kind, chosen in benchmark.tested(benchmark.pairs()).items()}
    assert groups.keys() == {"gpu", "npu", "measured"}
    for kind in hardware.KINDS:
        chip = replace(hardware.read("h200"), kind=kind)
        reached = hardware.efficiency(chip)
        if kind not in groups:
            assert (reached.pairs, reached.median_error, reached.ninth_error) == (0, None, None)
            continue
        assert reached.pairs == groups[kind]["pairs"]
        assert reached.median_error == pytest.approx(groups[kind]["median"], abs=0.002)
        assert reached.ninth_error == pytest.approx(groups[kind]["ninth"], abs=0.002)
        assert groups[kind]["median"] < 0.2


def test_few_rows_are_slower_than_the_peak_between_numbers_that_were_measured() -> None:
    rates = {"bf16": {4: 1e11, 16: 4e11, 64: 5e11}}
    chip = replace(hardware.read("h200"), peak={"bf16": 1e12}, by_rows=rates)
    assert [chip.rate("bf16", rows) for rows in (1, 4, 16, 64, 512)] == [1e11, 1e11, 4e11, 5e11, 5e11]
    assert chip.rate("bf16", 8) == pytest.approx(2e11)
    assert chip.rate("fp8", 16) == 4e11
    assert chip.rate("bf16") == replace(chip, by_rows={}).rate("bf16", 4) == 1e12
    part = work.Part(name="attention", flops=1e11, weight_bytes=1.0, rows=8)
    reached = replace(hardware.efficiency(chip), compute=1.0)
    assert roofline.timed(part, chip, reached).seconds == pytest.approx(0.5)
    assert roofline.timed(replace(part, rows=None), chip, reached).seconds == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="peak of bf16 with 4 rows"):
        replace(chip, by_rows={"bf16": {4: 0.0}})


def test_each_kind_of_attention_has_its_own_shares_where_they_were_measured() -> None:
    chip = replace(hardware.read("h200"), bandwidth=1e12, peak={"bf16": 1e15})
    reached = replace(hardware.efficiency(chip), cache=1.0, attention=1.0)
    reached = replace(reached, cache_by={"full": 0.5}, attention_by={"latent": 0.25})
    read, multiplied = work.Part(name="cache", cache_bytes=1e12), work.Part(name="cache", flops=1e15, cache_bytes=1.0)
    seconds = {
        (kind, part.flops): roofline.timed(replace(part, kind=kind), chip, reached).seconds
        for kind in ("full", "latent", None)
        for part in (read, multiplied)
    }
    expected = {("full", 0): 2, ("full", 1e15): 1, ("latent", 0): 1, ("latent", 1e15): 4, (None, 0): 1, (None, 1e15): 1}
    assert seconds == pytest.approx(expected)


def test_weights_of_a_format_are_read_at_its_own_share_where_it_was_measured() -> None:
    chip = replace(hardware.read("h200"), bandwidth=1e12)
    reached = replace(hardware.efficiency(chip), bandwidth=1.0, bandwidth_by={"w4": 0.5})
    parts = [work.Part(name="head", weight_bytes=1e12, arithmetic=form) for form in ("w4", "int8")]
    assert [roofline.timed(part, chip, reached).seconds for part in parts] == pytest.approx([2.0, 1.0])


def test_experts_get_their_share_of_the_rows() -> None:
    model = _model("deepseek-v3")
    experts = {part.name: part for part in work.decode(model, batch=1, context=16)}
    assert (experts["routed_expert"].rows, experts["dense_mlp"].rows) == (pytest.approx(1.0), 1.0)
    experts = {part.name: part for part in work.prefill(model, prompts=1, context=4096, chunk=4096)[0]}
    assert experts["routed_expert"].rows == pytest.approx(4096 * 8 / 256, rel=1e-3)
    assert (experts["dense_mlp"].rows, experts["head"].rows) == (4096, 1.0)
