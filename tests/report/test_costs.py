"""From records to lines: what work takes, measured and predicted costs, and what cannot be shown."""

import dataclasses
from pathlib import Path

import pytest

from daedal.config import ModelConfig
from daedal.cost import flops, hardware, plan, prices, work
from daedal.cost.count import report as counted
from daedal.errors import DataError
from daedal.report.assembly import Asked, Hardware, assemble
from daedal.report.lines import BYTE_SECONDS, DOLLARS, FLOPS, JOULES, SECONDS, Equal, Line, Report
from daedal.report.page import page
from daedal.report.settings import COUNTED, MEASURED, PREDICTED
from daedal.report.subjects import Subject, read_subject
from daedal.report.workloads import Reference
from tests.report.made import bench, item, items, reply, results, windows

MINE = """
version = "mine"
[[hourly]]
hardware = "this"
label = "my desk"
dollars_per_hour = 3.6
source = "me"
date = "2026-11-22"
"""


def none(name: str) -> ModelConfig:
    raise AssertionError(f"{name} is not to be looked for")


def read(*places: Path | str) -> list[Subject]:
    return [read_subject(str(place), find=none) for place in places]


def asked(tmp_path: Path, *chips: str, batches: tuple[int, ...] = (1,), own: str = MINE) -> Asked:
    path = tmp_path / "prices.toml"
    path.write_text(own)
    found = [Hardware(name=name, chip=hardware.read(name), devices=1) for name in chips]
    return Asked(hardware=found, batches=batches, prices=prices.read(path), references={})


def lines(report: Report, source: str, section: int = 0) -> list[Line]:
    return [line for line in report.sections[section].lines if line.place.source == source]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_compute_is_that_of_every_token_at_its_place(tmp_path: Path, family: str) -> None:
    place = results(
        tmp_path / "a", [item(0, right=True, shared=20, endings=(3, 5)), *windows(3, bits_per_byte=1.0)], family=family
    )
    (subject,) = read(place)
    report = assemble([subject], asked(tmp_path))
    assert [section.name for section in report.sections] == [
        "tasks",
        "text in windows of 64 tokens, read",
        "text in windows of 64 tokens, written",
    ]
    feeding = flops.Feeding.of(subject.config)
    by_item = feeding.flops(0, 20, 0) + feeding.flops(20, 3, 2) + feeding.flops(20, 5, 2)
    assert lines(report, COUNTED)[0].costs[FLOPS].per_gain.value == pytest.approx(by_item)
    written = [counted(subject.config, model="a", context=context) for context in range(1, 64)]
    whole = sum(one.decode_flops_per_token for one in written)
    assert lines(report, COUNTED, 2)[0].costs[FLOPS].per_amount.value == pytest.approx(whole / 200)


def test_measured_costs_are_rates_times_tokens(tmp_path: Path) -> None:
    place = results(tmp_path / "a", items(50, share=0.6))
    bench(place, [(16, 1, 100.0, 10.0), (64, 1, 400.0, 40.0)], joules=2.0)
    (subject,) = read(place)
    report = assemble([subject], asked(tmp_path))
    (line,) = lines(report, MEASURED)
    right, read_tokens = line.quality.gains, 20 + 3 + 4 + 5 + 6
    # Prompts of 23 to 26 tokens, weighed by their tokens; rates rise with the context, by the same power.
    context = sum(n * n for n in (23, 24, 25, 26)) / (23 + 24 + 25 + 26)
    rate = 100 * context / 16
    assert line.costs[SECONDS].per_gain.value == pytest.approx(50 * read_tokens / rate / right)
    assert line.costs[JOULES].per_gain.value == pytest.approx(50 * read_tokens * 2.0 / rate / right)
    assert line.costs[DOLLARS].per_gain.value == pytest.approx(0.001 * 50 * read_tokens / rate / right)
    held = work.model(subject.config).weight_bytes + 1000 * context
    assert line.costs[BYTE_SECONDS].per_amount.value == pytest.approx(held * read_tokens / rate)
    assert (line.price, line.energy, line.off.spread) == ("my desk", "a model: 10 W assumed", 0.02)
    assert line.costs[SECONDS].per_amount.low == pytest.approx(line.costs[SECONDS].per_amount.high)


def test_replies_cost_what_was_measured_while_they_were_written(tmp_path: Path) -> None:
    rows = [reply(number, right=number % 2 == 0, seconds=0.5 + number % 3) for number in range(20)]
    place = results(tmp_path / "a", rows, family="deepseek_v3")
    (subject,) = read(place)
    report = assemble([subject], asked(tmp_path))
    (section,) = report.sections
    assert section.name == "problems"
    (line,) = lines(report, MEASURED)
    seconds = sum(row.device_seconds for row in rows)
    assert (line.quality.value.value, line.quality.chance) == (0.5, None)
    assert line.costs[SECONDS].per_gain.value == pytest.approx(seconds / 10)
    assert line.costs[JOULES].per_gain.value == pytest.approx(20 * seconds / 10)
    assert line.costs[DOLLARS].per_gain.value == pytest.approx(0.001 * seconds / 10)
    assert (line.energy, line.place.batch, line.off.spread) == ("a model: 20 W", None, None)
    assert BYTE_SECONDS not in line.costs
    # A prompt of 30 tokens, and ten of the eleven written ones are read again.
    feeding = flops.Feeding.of(subject.config)
    each = feeding.flops(0, 30, 1) + sum(feeding.flops(30 + done, 1, 1) for done in range(10))
    assert lines(report, COUNTED)[0].costs[FLOPS].per_amount.value == pytest.approx(each)


@pytest.mark.parametrize(
    ("points", "weights", "model", "said"),
    [
        ([(32, 1, 1.0, 1.0), (64, 1, 1.0, 1.0)], None, None, "was measured at 32 to 64 tokens, and the work has 25"),
        ([(16, 1, 1.0, 1.0)], None, None, "was measured at 16 tokens, and the work has 25"),
        (
            [(16, 1, 1.0, 1.0), (64, 1, 1.0, 1.0)],
            "int8",
            None,
            "measured weights in int8 and the answers were given with",
        ),
        ([], None, None, "holds no figures"),
    ],
)
def test_what_was_measured_elsewhere_is_not_taken_for_this(
    tmp_path: Path, points: list[tuple[int, int, float, float]], weights: str | None, model: str | None, said: str
) -> None:
    place = results(tmp_path / "a", items(10, share=1.0))
    bench(place, points, weights=weights, model=model)
    report = assemble(read(place), asked(tmp_path))
    assert lines(report, MEASURED) == []
    assert any(said in sentence for sentence in report.left_out)


def test_predicted_costs_are_the_planners_and_carry_its_error(tmp_path: Path) -> None:
    place = results(tmp_path / "a", windows(5, bits_per_byte=1.25), family="deepseek_v3")
    (subject,) = read(place)
    report = assemble([subject], asked(tmp_path, "h200", batches=(1, 64)))
    for batch, line in zip((1, 64), lines(report, PREDICTED, 1), strict=True):
        found = plan.predict(
            work.model(subject.config),
            hardware="h200",
            chip=hardware.read("h200"),
            devices=1,
            context=32,
            batch=batch,
            prices=prices.read(),
        )
        assert found.decode is not None
        per_byte = 63 / 200
        assert line.place.batch == batch
        assert line.costs[SECONDS].per_amount.value == pytest.approx(per_byte / found.decode.tokens_per_second)
        assert found.decode.joules_per_million is not None
        joules = per_byte * found.decode.joules_per_million / 1e6
        assert line.costs[JOULES].per_amount.value == pytest.approx(joules)
        (dollars,) = found.decode.dollars_per_million.values()
        assert line.costs[DOLLARS].per_amount.value == pytest.approx(per_byte * dollars / 1e6)
        assert (line.price, line.off.median, line.off.pairs) == ("total cost of ownership", 0.118, 4)
        # Bits saved against eight of a byte.
        saved = 8 - line.quality.value.value if line.quality.value.value else 0
        assert line.costs[JOULES].per_gain.value == pytest.approx(joules / saved)


def test_models_are_compared_on_what_all_answered_and_redrawn_together(tmp_path: Path) -> None:
    """The interval of two alike models' ratio is far narrower than those of their prices."""
    rows = items(400, share=0.5)
    first = results(tmp_path / "a", rows)
    second = results(tmp_path / "b", [*rows[:-1], item(399, right=True), item(1000, right=True)], num_hidden_layers=6)
    report = assemble(read(first, second), asked(tmp_path, "h200"))
    (section,) = report.sections
    assert any("not every model has done them: 1 items" in note for note in section.notes)
    one, other = lines(report, COUNTED)
    assert one.quality.units == other.quality.units == 400
    assert one.costs[FLOPS].beside is None
    beside, alone = other.costs[FLOPS].beside, other.costs[FLOPS].per_gain
    assert beside is not None
    assert beside.value == pytest.approx(alone.value / one.costs[FLOPS].per_gain.value)  # type: ignore[operator]
    width = (beside.high - beside.low) / beside.value  # type: ignore[operator]
    assert width < 0.1 * (alone.high - alone.low) / alone.value  # type: ignore[operator]


def test_no_answer_is_right_and_one_item(tmp_path: Path) -> None:
    wrong = results(tmp_path / "wrong", [item(number, right=False) for number in range(20)])
    (line,) = lines(assemble(read(wrong), asked(tmp_path)), COUNTED)
    price = line.costs[FLOPS].per_gain
    assert (price.value, price.high) == (None, None)
    assert line.costs[FLOPS].per_amount.value is not None
    assert price.low == pytest.approx(line.costs[FLOPS].per_amount.value / (1 - 0.05 ** (1 / 20)))
    assert str(price.why).startswith("none of 20 answers is correct, so a correct one has no price: were 13.91% right")
    assert line.quality.guesses
    one = results(tmp_path / "one", [item(0, right=True)])
    (line,) = lines(assemble(read(one), asked(tmp_path)), COUNTED)
    assert line.costs[FLOPS].per_gain.value == line.costs[FLOPS].per_amount.value
    assert (line.costs[FLOPS].per_gain.low, line.quality.value.low) == (None, None)


def test_a_text_that_is_known_worse_than_xz_does_saves_nothing(tmp_path: Path) -> None:
    place = results(tmp_path / "a", windows(8, bits_per_byte=2.5))
    known = {"prose": Reference(name="xz", bits_per_byte=2.0, source="abc")}
    report = assemble(read(place), dataclasses.replace(asked(tmp_path), references=known))
    price = lines(report, COUNTED, 1)[0].costs[FLOPS].per_gain
    assert (price.value, price.why) == (None, "it saves no bits against the reference, so none has a price")
    assert report.sources["xz"] == "abc"


def test_weights_count_in_the_format_that_answered(tmp_path: Path) -> None:
    found = {}
    for weights, dtype in (("checkpoint", "checkpoint"), ("checkpoint", "bfloat16"), ("int8", "checkpoint")):
        place = results(tmp_path / f"{weights}-{dtype}", items(2, share=1.0), weights=weights, dtype=dtype)
        (subject,) = read(place)
        found[weights, dtype] = subject.weights
    assert list(found.values()) == ["shipped", "bf16", "int8"]


def test_work_that_took_nothing_measurable_stops_nothing(tmp_path: Path) -> None:
    rows = [reply(number, right=number % 2 == 0, seconds=0.0) for number in range(6)]
    report = assemble(read(results(tmp_path / "a", rows), results(tmp_path / "b", rows)), asked(tmp_path))
    assert [line.costs[SECONDS].per_gain.value for line in lines(report, MEASURED)] == [0.0, 0.0]
    assert page(report)


def test_what_does_not_fit_and_what_has_no_price_or_power_is_said(tmp_path: Path) -> None:
    small = results(tmp_path / "small", items(10, share=1.0))
    large = results(
        tmp_path / "large",
        items(10, share=1.0),
        hidden_size=16384,
        num_hidden_layers=80,
        vocab_size=128000,
        intermediate_size=65536,
        num_attention_heads=128,
        head_dim=128,
        num_key_value_heads=8,
    )
    report = assemble(
        read(small, large), asked(tmp_path, "h200", "ascend-910c", "ascend-950pr", own='version = "mine"')
    )
    assert [line.model for line in lines(report, PREDICTED)] == ["small"] * 3
    assert any(
        sentence.startswith("large, tasks, predicted for h200 at batch 1: it does not fit: ")
        and "would hold it" in sentence
        for sentence in report.left_out
    )
    assert any("no price is known for ascend-910c, ascend-950pr" in note for note in report.notes)
    assert any("no power is known for ascend-950pr" in note for note in report.notes)
    assert any("ascend-910c disputed" in note for note in report.notes)
    assert any("the idle power of ascend-910c is not known, so joules there" in note for note in report.notes)


def test_a_cost_without_a_quality_cannot_be_made(tmp_path: Path) -> None:
    """A measured speed alone has no way into a report: neither as a model, nor as a line, nor as a comparison."""
    place = tmp_path / "fast"
    place.mkdir()
    bench(place, [(64, 1, 1e6, 1e6)])
    with pytest.raises(DataError, match="no cost is shown without the quality it bought: run `daedal eval"):
        read(place)
    with pytest.raises(DataError, match="has no answers on record"):
        read(results(tmp_path / "empty", []))
    (line,) = lines(assemble(read(results(tmp_path / "a", items(3, share=1.0))), asked(tmp_path)), COUNTED)
    with pytest.raises(DataError, match="stands beside no quality"):
        dataclasses.replace(line, quality=None)
    with pytest.raises(DataError, match="of no units"):
        dataclasses.replace(line.quality, units=0)
    with pytest.raises(DataError, match="stand beside no quality"):
        Equal(base="a", other="b", place=line.place, resource=JOULES, base_cost=1.0, other_cost=2.0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((items(3, share=1.0), items(3, share=1.0, task="other")), "answered nothing in common"),
        (([dataclasses.replace(item(0, right=True), fed=())],), "do not say how many tokens were read"),
    ],
)
def test_records_that_do_not_serve_are_refused(tmp_path: Path, rows: tuple[list[object], ...], said: str) -> None:
    places = [results(tmp_path / str(number), each) for number, each in enumerate(rows)]  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        assemble(read(*places), asked(tmp_path))
