"""What tokens cost, fed one by one or together: as decoding and the planner count them; and money, by hand."""

from pathlib import Path

import pytest

from daedal import shapes
from daedal.cost import flops, presets, prices, work
from daedal.cost.energy import Modelled, Steady
from daedal.cost.flops import Feeding
from daedal.cost.spending import Price, Spent, Tariff, price_of
from daedal.cost.weights import active_params
from daedal.errors import ConfigError

K = 1024


@pytest.mark.parametrize("context", [1, 3, 128, 5000, 128 * K])
@pytest.mark.parametrize("name", presets.names())
def test_a_decoded_token_costs_what_daedal_cost_says(name: str, context: int) -> None:
    config = presets.read(name)
    assert config is not None
    decoded = flops.decode(config, active=active_params(config, shapes.parameters(config)), context=context)
    assert Feeding.of(config).flops(context - 1, 1, 1) == decoded.total


@pytest.mark.parametrize(("context", "prompts"), [(7, 1), (512, 1), (300, 4)])
@pytest.mark.parametrize("name", presets.names())
def test_a_prompt_costs_what_the_planner_says(name: str, context: int, prompts: int) -> None:
    config = presets.read(name)
    assert config is not None
    parts, steps = work.prefill(work.model(config), prompts=prompts, context=context, chunk=8 * K)
    assert steps == 1
    assert prompts * Feeding.of(config).flops(0, context, 1) == pytest.approx(sum(one.flops for one in parts))


@pytest.mark.parametrize("name", presets.names())
def test_a_prompt_in_pieces_costs_no_less_and_tokens_alone_the_most(name: str) -> None:
    config = presets.read(name)
    assert config is not None
    feeding = Feeding.of(config)
    whole = feeding.flops(0, 2000, 1)
    pieces = feeding.flops(0, 1500, 0) + feeding.flops(1500, 500, 1)
    single = sum(feeding.flops(past, 1, 0) for past in range(2000)) + feeding.head
    assert whole <= pieces * (1 + 1e-12)
    assert pieces <= single * (1 + 1e-12)
    if not config.is_latent or config.is_indexed:
        assert whole == pytest.approx(single)  # there is one form only


def test_a_drafting_module_is_one_more_layer() -> None:
    config = presets.read("deepseek-v3")
    assert config is not None
    module = Feeding.of_drafting(config)
    assert module.matrices == 2 * active_params(config, shapes.drafting(config))
    # It reads what a layer of the backbone reads.
    backbone = Feeding.of(config)
    reads = backbone.flops(4095, 1, 0) - backbone.matrices
    assert module.flops(4095, 1, 0) - module.matrices == reads / config.num_hidden_layers


TABLE = """
[electricity]
dollars_per_kwh = 0.36
overhead = 2.0

[[hourly]]
hardware = "mine"
label = "rented"
dollars_per_hour = 7.2
source = "a test"
date = "2026-11-22"

[[owned]]
hardware = "mine"
label = "bought"
dollars = 17520
years = 2
utilisation = 0.5
source = "a test"
date = "2026-11-22"
"""


def test_money_by_hand(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TABLE)
    table = prices.read(tmp_path / "mine.toml")
    with pytest.raises(ConfigError, match="mine has several prices, 'rented', 'bought': choose one with --price"):
        price_of(table, "mine")
    with pytest.raises(ConfigError, match="--price is 'lent', and the prices of mine are 'rented', 'bought'"):
        price_of(table, "mine", "lent")
    assert price_of(table, "nothing that is sold") is None
    counted = {"flops": 1.0, "kv_byte_seconds": 2.0, "device_seconds": 10.0, "joules": 1000.0}
    energy = Steady(700.0, "mine", clock=lambda: 3.0)
    assert energy.read() == 2100.0
    rented, bought = (price_of(table, "mine", label) for label in ("rented", "bought"))
    # 7.2 dollars an hour for 10 seconds; electricity is in the rent.
    assert Tariff(energy=energy, price=rented).spent(**counted).dollars == pytest.approx(0.02)
    assert Tariff(price=rented).spent(**counted) == Spent(
        flops=1.0, kv_byte_seconds=2.0, device_seconds=10.0, joules=None, dollars=pytest.approx(0.02)
    )
    # 2 dollars an hour of work, and 1000 J of 0.36 dollars for 3.6 MJ, twice for what is lost.
    assert Tariff(energy=energy, price=bought).spent(**counted).dollars == pytest.approx(20 / 3600 + 0.0002)
    assert Tariff(price=bought).spent(**counted).dollars is None
    assert Tariff().spent(**counted).dollars is None


def test_several_processes_cost_what_all_of_them_cost() -> None:
    """Two processes share a model: on accelerators one each, on a CPU its cores. Each has a cache like the other's."""
    counted = {"flops": 1.0, "kv_byte_seconds": 2.0, "device_seconds": 10.0, "joules": 1000.0}
    price = Price(label="rented", dollars_per_second=0.5, dollars_per_joule=0.001)
    chips = Tariff(energy=Steady(700.0, "mine", devices=2, clock=lambda: 3.0), price=price, processes=2, devices=2)
    assert chips.energy is not None
    assert chips.energy.read() == 4200.0
    assert chips.energy.source == "a model: 1400 W, the peak power of 2 x mine, while it works"
    assert chips.spent(**counted) == Spent(
        flops=1.0, kv_byte_seconds=4.0, device_seconds=20.0, joules=1000.0, dollars=pytest.approx(11.0)
    )
    cpu = Tariff(energy=Modelled(80.0, 4, given=True, processes=2, used=lambda: 3.0), price=price, processes=2)
    assert cpu.energy is not None
    assert cpu.energy.read() == 120.0
    assert cpu.energy.source == "a model: 80 W as given x utilisation of 4 cores, as of one of 2 processes alike"
    assert cpu.spent(**counted) == Spent(
        flops=1.0, kv_byte_seconds=4.0, device_seconds=10.0, joules=1000.0, dollars=pytest.approx(6.0)
    )


def test_sums_know_what_all_of_them_know() -> None:
    one = Spent(flops=1.0, kv_byte_seconds=2.0, device_seconds=3.0, joules=4.0, dollars=5.0)
    other = Spent(flops=1.0, kv_byte_seconds=1.0, device_seconds=1.0, joules=None, dollars=1.0)
    assert one + other == Spent(flops=2.0, kv_byte_seconds=3.0, device_seconds=4.0, joules=None, dollars=6.0)
