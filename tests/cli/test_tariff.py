"""By what costs are counted: a machine that was measured, hardware that is named, prices, and contradictions."""

import json
from pathlib import Path

import pytest

from daedal.cli.tariff import Rates
from daedal.cost import energy
from daedal.cost.hardware import CALIBRATION
from daedal.errors import ConfigError

CHIP = {
    "name": "a test",
    "kind": "measured",
    "memory_bytes": 1e10,
    "bandwidth": 1e10,
    "peak": {"bf16": 1e11},
    "watts_peak": 44.0,
}
OWN = """
[[owned]]
hardware = "this"
label = "mine"
dollars = 876
years = 1
utilisation = 0.1
source = "a test"
date = "2026-11-22"
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a machine that counts no energy."""
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path))
    monkeypatch.setattr(energy, "_zones", lambda root: [])
    (tmp_path / "own.toml").write_text(OWN)
    return tmp_path


def calibrate(home: Path) -> None:
    (home / CALIBRATION).write_text(json.dumps(CHIP))


def test_a_machine_that_nobody_measured_still_counts_joules() -> None:
    tariff = Rates().tariff(on_cpu=True)
    assert tariff.price is None
    assert tariff.energy is not None
    assert "assumed" in tariff.energy.source
    assert Rates().tariff(on_cpu=False).energy is None


def test_a_measured_machine_is_this(home: Path) -> None:
    calibrate(home)
    plain, priced = Rates().tariff(on_cpu=True), Rates(prices=home / "own.toml").tariff(on_cpu=True)
    assert plain.energy is not None
    assert plain.energy.watts == 44.0
    assert plain.price is None
    assert priced.price is not None
    assert priced.price.label == "mine"
    assert priced.price.dollars_per_second == pytest.approx(1 / 3600)
    assert priced.price.dollars_per_joule > 0


def test_hardware_that_is_named(home: Path) -> None:
    tariff = Rates(hardware="h200").tariff(on_cpu=False)
    assert isinstance(tariff.energy, energy.Steady)
    assert tariff.energy.watts == 700.0
    assert tariff.price is not None
    assert tariff.price.dollars_per_second == pytest.approx(1.41 / 3600)
    with pytest.raises(ConfigError, match=r"h100 has several prices, .*: choose one with --price"):
        Rates(hardware="h100").tariff(on_cpu=False)
    assert Rates(hardware="h100", price="rented").tariff(on_cpu=False).price is not None
    with pytest.raises(ConfigError, match="hardware is 'abacus'"):
        Rates(hardware="abacus").tariff(on_cpu=True)
    with pytest.raises(ConfigError, match="this machine has not been measured"):
        Rates(hardware="this").tariff(on_cpu=True)


def test_processes_that_share_a_model(home: Path) -> None:
    """On accelerators each has one, and both are paid for; on a CPU they share its cores, and the machine is one."""
    chips = Rates(hardware="h200").tariff(on_cpu=False, processes=2)
    assert (chips.processes, chips.devices) == (2, 2)
    assert chips.energy is not None
    assert chips.energy.watts == 1400.0
    for measured in (False, True):
        if measured:
            calibrate(home)
        cpu = Rates().tariff(on_cpu=True, processes=2)
        assert (cpu.processes, cpu.devices) == (2, 1)
        assert cpu.energy is not None
        assert "as of one of 2 processes alike" in cpu.energy.source


@pytest.mark.parametrize("given", ["prices", "price"])
def test_prices_of_nothing_are_refused(home: Path, given: str) -> None:
    value = home / "own.toml" if given == "prices" else "mine"
    with pytest.raises(ConfigError, match=f"--{given} is given and nobody knows of which hardware: name it"):
        Rates(**{given: value}).tariff(on_cpu=True)
