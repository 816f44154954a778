"""Repeats, spread, energy counters, and small models as loads: counts and units, never how fast."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from daedal.bench import small_models
from daedal.bench.timing import Timing, repeated
from daedal.bench.workload import Workload
from daedal.cost import energy
from daedal.errors import ConfigError
from tests.tiny import tiny_model


def ticking(*steps: float) -> Callable[[], float]:
    """A clock whose every second reading lies one step after the one before; steps come over and over."""
    now, index = 0.0, 0

    def read() -> float:
        nonlocal now, index
        if index % 2:
            now += steps[index // 2 % len(steps)]
        index += 1
        return now

    return read


def test_repeats_until_time_is_spent() -> None:
    calls: list[int] = []
    timing = repeated(lambda: calls.append(1), clock=ticking(0.25), seconds=2.0)
    assert (len(timing.seconds), len(calls)) == (8, 9)
    assert (timing.median, timing.spread) == (0.25, 0.0)
    assert len(repeated(calls.copy, clock=ticking(9.0), seconds=1.0, least=3).seconds) == 3
    assert len(repeated(calls.copy, clock=ticking(0.1), seconds=60.0, most=7).seconds) == 7


def test_spread_is_the_middle_half_over_the_median() -> None:
    assert Timing(seconds=[1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)
    assert Timing(seconds=[3.0]).spread == 0.0
    assert Timing(seconds=[1.0] * 9 + [50.0]).spread == 0.0


def zone(root: Path, number: str, name: str, microjoules: int) -> Path:
    path = root / f"intel-rapl:{number}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text("999999999\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_rapl_counts_packages_and_memory_and_wraps(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 999_000_000)
    zone(tmp_path, "0:0", "core", 5)
    memory = zone(tmp_path, "0:1", "dram", 1_000_000)
    meter = energy.meter(None, root=tmp_path)
    assert meter.source.startswith("RAPL")
    assert meter.watts is None
    (package / "energy_uj").write_text("1000000")  # 1 J up to the end of the counter, 1 J after it
    (memory / "energy_uj").write_text("1500000")
    zone(tmp_path, "0:0", "core", 7_000_000)
    assert meter.read() == pytest.approx(2.5, abs=1e-5)
    assert meter.read() == pytest.approx(2.5, abs=1e-5)


def test_without_counters_energy_is_a_model_and_says_so(tmp_path: Path) -> None:
    assumed = energy.meter(None, root=tmp_path, cores=4)
    assert (assumed.watts, assumed.source) == (20.0, "a model: 20 W assumed x utilisation of 4 cores")
    used = iter((1.0, 3.0))
    given = energy.Modelled(80.0, 4, given=True, used=lambda: next(used))
    assert -given.read() + given.read() == 2 * 80 / 4
    assert "80 W as given" in given.source
    with pytest.raises(ConfigError, match="--watts is -1"):
        energy.meter(-1.0)


@pytest.mark.parametrize("packed", [False, True])
def test_small_models_decode(packed: bool) -> None:
    for config in (small_models.dense(2), small_models.latent(2)):
        model = small_models.build(config, packed=packed, dtype=torch.float32, device=torch.device("cpu"))
        assert model.dtype == (torch.bfloat16 if packed else torch.float32)
        load = Workload(model, batch=2, context=24)
        load.start()
        load.step()


@pytest.mark.parametrize(("batch", "context"), [(1, 40), (3, 200), (2, 512)])
def test_a_load_ends_near_its_context_with_every_sequence_running(batch: int, context: int) -> None:
    load = Workload(tiny_model("deepseek_v3"), batch=batch, context=context)
    assert load.read_prompts() == batch * (context - 1)
    assert load.stats().prompt_tokens_total == batch * (context - 1)
    assert load.steps_left == 0
    load.start()
    before = load.stats().generation_tokens_total
    steps = load.steps_left - 1
    assert steps >= min(20, context // 4)
    while load.steps_left > 1:
        load.step()
    assert load.stats().generation_tokens_total == before + steps * batch
    assert load.stats().num_running == batch
    assert context // 2 < load.held <= max(context, context // 2 + 64)
    assert load.stats().kv_bytes_total > 0


def test_loads_that_cannot_be_are_refused() -> None:
    model = tiny_model("llama")
    for batch, context, said in ((1, 513, "give 2 to 512"), (0, 64, "batch is 0"), (512, 64, "batch is 512")):
        with pytest.raises(ConfigError, match=said):
            Workload(model, batch=batch, context=context)
