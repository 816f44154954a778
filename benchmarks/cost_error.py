"""The planner beside what was measured: `python benchmarks/cost_error.py [--plot FILE.png]`.

Our own rates are from `cost_measured.json`, which `cost_measured.py` writes with this machine's ceilings before and
after each run: predictions take their mean. A point that was measured in several rounds counts once, with the medians
of what was measured and of what was predicted. `--once` takes the median of all for all, as someone has them who
calibrates once. The rest is from `cost_pairs.toml`. Every pair is predicted from ceilings and a model's configuration
alone. Rows that anything was fitted to are marked and left out of the sums, which `daedal/cost/efficiency.toml` repeats
for the command. Ends with one JSON line. Loads no torch and measures nothing.
"""

import argparse
import json
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from daedal.config import ModelConfig
from daedal.cost import hardware, plan, presets, prices, work
from daedal.cost.hardware import Chip

PAIRS, MEASURED = (Path(__file__).with_name(name) for name in ("cost_pairs.toml", "cost_measured.json"))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One measured rate and its prediction, tokens per second of one device. fitted: the ceilings were fitted to it."""

    machine: str
    kind: str
    model: str
    weights: str
    phase: str
    batch: int
    tokens: int
    measured: float
    predicted: float
    fitted: bool

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def pairs(table: dict[str, Any] | None = None, ours: dict[str, Any] | None = None) -> list[Pair]:
    """Every pair of the files, predicted."""
    table = tomllib.loads(PAIRS.read_text(encoding="utf-8")) if table is None else table
    ours = json.loads(MEASURED.read_text(encoding="utf-8")) if ours is None else ours
    return list(_pairs(table, ours))


def _pairs(table: dict[str, Any], ours: dict[str, Any]) -> Iterator[Pair]:
    money, chips = prices.read(), ours["chips"]
    repeats: dict[tuple[str, ...], list[Pair]] = {}
    for point in ours["points"]:
        run = {"kv_cache_dtype": "bf16", "fitted": False, **point}
        beside = hardware.described(median(chips[point["run"] : point["run"] + 2]))
        same = tuple(point[key] for key in ("model", "weights", "phase", "asked"))
        repeats.setdefault(same, []).append(_pair(_model(table, run), beside, 1, run, point, money))
    for found in repeats.values():
        rates = {side: statistics.median(getattr(pair, side) for pair in found) for side in ("measured", "predicted")}
        yield replace(found[0], **rates)
    machine = hardware.described(median(chips))
    for run in (one for one in table["measured"] if one["threads"] == ours["threads"]):
        for case in run["cases"]:
            yield _pair(_model(table, run), machine, 1, run, case, money)
    for run in table["published"]:
        yield _pair(_model(table, run), hardware.read(run["hardware"]), run["devices"], run, run, money)


def median(rows: Sequence[Any]) -> Any:
    """Of each number in objects alike, of those that have it; the first of what is no number."""
    first = rows[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for row in rows for key in row)
        return {key: median([row[key] for row in rows if key in row]) for key in keys}
    return statistics.median(rows) if isinstance(first, int | float) else first


def tested(found: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs that nothing was fitted to, by the kind of chip."""
    result: dict[str, list[Pair]] = {}
    for pair in found:
        if not pair.fitted:
            result.setdefault(pair.kind, []).append(pair)
    return result


def error(found: Sequence[Pair]) -> dict[str, float]:
    """Errors of predictions as shares of what was measured: the median, and what nine of ten stay under."""
    errors = sorted(abs(pair.ratio - 1) for pair in found)
    ratios = sorted(pair.ratio for pair in found)
    ninth = max(0, -(-9 * len(errors) // 10) - 1)
    return {
        "pairs": len(errors),
        "median": statistics.median(errors),
        "ninth": errors[ninth],
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def _model(table: dict[str, Any], run: dict[str, Any]) -> work.Model:
    published = table["models"].get(run["model"])
    config = presets.read(run["model"]) if published is None else ModelConfig.from_published(published)
    assert config is not None
    return work.model(config, weights=run["weights"], kv_dtype=run["kv_cache_dtype"])


def _pair(
    model: work.Model, chip: Chip, devices: int, run: dict[str, Any], case: dict[str, Any], money: prices.Prices
) -> Pair:
    predicted = plan.predict(
        model,
        hardware="",
        chip=chip,
        devices=devices,
        context=case["tokens"],
        batch=case["batch"] * devices if devices > 1 and case["batch"] > 1 else case["batch"],
        prices=money,
    )
    rate = predicted.decode if case["phase"] == "decode" else predicted.prefill
    assert rate is not None
    per = devices if case.get("per_device", devices > 1) else 1
    return Pair(
        machine=chip.name,
        kind=chip.kind,
        model=run["model"],
        weights=run["weights"],
        phase=case["phase"],
        batch=case["batch"],
        tokens=case["tokens"],
        measured=case["rate"],
        predicted=rate.tokens_per_second / per,
        fitted=run["fitted"],
    )


def plot(found: Sequence[Pair], path: Path) -> None:
    """Writes a PNG: predicted against measured, 10 % and 25 % to either side of where both are equal. Full marks are
    pairs that nothing was fitted to, hollow ones those that something was.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7.0), layout="constrained")
    axes = figure.subplots()
    rates = [pair.measured for pair in found]
    ends = min(rates) / 1.6, max(rates) * 1.6
    for share, shade in ((0.25, 0.10), (0.10, 0.18)):
        below, above = ([(1 + sign * share) * end for end in ends] for sign in (-1, 1))
        axes.fill_between(ends, below, above, color="#888888", alpha=shade, linewidth=0)
    axes.plot(ends, ends, color="#888888", linewidth=1)
    marks = dict(zip(sorted({(pair.kind, pair.model) for pair in found}), "osD^v<>Phd*X", strict=False))
    for pair in found:
        colour = {"prefill": "#c2571a", "decode": "#1f5fa8"}[pair.phase]
        face, mark = "none" if pair.fitted else colour, marks[pair.kind, pair.model]
        (dot,) = axes.plot(pair.measured, pair.predicted, mark, color=colour, alpha=0.8, linestyle="none")
        dot.set(markersize=5, markerfacecolor=face)
    for (kind, model), mark in marks.items():
        where = "this CPU" if kind == "measured" else kind
        axes.plot([], [], mark, color="#444444", linestyle="none", label=f"{model}, {where}")
    for phase, colour in (("prefill", "#c2571a"), ("decode", "#1f5fa8")):
        axes.plot([], [], "o", color=colour, linestyle="none", label=phase)
    axes.plot([], [], "o", color="#444444", markerfacecolor="none", linestyle="none", label="fitted to")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured, tokens per second", ylabel="predicted", title="predictions beside measurements")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="as cost_measured.py wrote it")
    parser.add_argument("--once", action="store_true", help="one calibration for all runs: the median")
    arguments = parser.parse_args()
    ours = json.loads(arguments.measured.read_text(encoding="utf-8"))
    if arguments.once:
        ours["chips"] = [median(ours["chips"])] * len(ours["chips"])
    found = pairs(ours=ours)
    shown = Table(title="tokens per second, measured and predicted")
    for heading in ("machine", "model", "weights", "phase", "batch", "tokens", "measured", "predicted", "error", ""):
        shown.add_column(heading)
    for pair in found:
        numbers = (f"{pair.measured:.1f}", f"{pair.predicted:.1f}", f"{pair.ratio - 1:+.0%}")
        what = (pair.machine, pair.model, pair.weights, pair.phase, str(pair.batch), str(pair.tokens))
        shown.add_row(*what, *numbers, "fitted" if pair.fitted else "")
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a file or a pipe takes the table whole
    console.print(shown)
    groups = {kind: error(chosen) for kind, chosen in tested(found).items()}
    for kind, parts in groups.items():
        console.print(
            f"{kind}: {parts['pairs']} pairs that nothing was fitted to, median error {parts['median']:.0%}, nine of "
            f"ten within {parts['ninth']:.0%}, predicted over measured {parts['lowest']:.2f} to {parts['highest']:.2f}"
        )
    if arguments.plot is not None:
        plot(found, arguments.plot)
    print(json.dumps(groups))


if __name__ == "__main__":
    main()
