"""`daedal bench`: what a model does on this machine, beside what was predicted; `--calibrate` measures the machine.

The figures come from `daedal.bench`; here they are asked for, shown and written. Imports torch when asked.
"""

import json
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from daedal.cli import bench_tables, cost_arguments
from daedal.cli.console import table_console
from daedal.cli.fetching import resolve_shown
from daedal.cli.opening import DeviceOption, KvCacheName, KvCacheOption, display_name, say
from daedal.cli.precision import choose_dtype
from daedal.cli.units import in_bytes
from daedal.cli.weights import WeightsName, WeightsOption, choose_weights
from daedal.config import ModelConfig
from daedal.cost import hardware, prices, work
from daedal.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from daedal.bench.measuring import Point, Predictor
    from daedal.cost.energy import Meter
    from daedal.model.transformer import Transformer

REPORT, PLOT = "bench.json", "bench.png"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """seconds: from the checkpoint on disk to a model, packing included where it was due."""

    model: "Transformer"
    directory: Path
    weights: str | None
    seconds: float


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint's directory, or a name; none to calibrate.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, for `daedal cost --hardware this`.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Keep a calibration although the machine is busy.")] = False,
    weights: WeightsOption = "auto",
    kv_cache_dtype: KvCacheOption = "auto",
    batch: Annotated[str, typer.Option(help="Sequences at once, one or more: 1,16.")] = "1,16",
    context: Annotated[str, typer.Option(help="Tokens of each, one or more: 128,2k,8k.")] = "128,2048",
    seconds: Annotated[float | None, typer.Option(help="For each measurement; 0.4 to calibrate, else 2.")] = None,
    watts: Annotated[
        float | None, typer.Option(help="The processor's design power, where its own counters cannot be read.")
    ] = None,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Write bench.json and bench.png there.")] = None,
    json_line: Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")] = False,
) -> None:
    """Measure a model here, beside what was predicted; or measure the machine itself."""
    from daedal.checkpoint.load import resolve_device
    from daedal.cost import energy

    if calibrate == (model is not None):
        raise ConfigError("give either a MODEL to measure or --calibrate for the machine itself")
    if force and not calibrate:
        raise ConfigError("--force is for --calibrate: leave it out")
    if seconds is not None and not 0 < seconds <= 600:
        raise ConfigError(f"--seconds is {seconds:g}: it must be above 0 and at most 600")
    chosen, meter = resolve_device(device), energy.meter(watts)
    if model is None:
        told = _calibrate(chosen, meter, seconds, force)
    else:
        told = _bench(model, chosen, meter, weights, kv_cache_dtype, batch, context, seconds or 2.0, out)
    if json_line:
        print(json.dumps(told))


def _calibrate(device: "torch.device", meter: "Meter", seconds: float | None, force: bool) -> dict[str, object]:
    from daedal.bench import calibration
    from daedal.bench.calibration import Effort

    effort = Effort() if seconds is None else Effort(seconds=seconds)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("measuring", total=None)
        found = calibration.calibrate(
            device=device,
            dtype=choose_dtype("auto", device).dtype,
            meter=meter,
            effort=effort,
            progress=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        )
    table_console().print(*bench_tables.calibration_tables(found))
    if found.busy:
        say(f"this machine is busy: {found.busy}")
    path = calibration.write(found, force=force)
    say(f"kept in {path}: `daedal cost MODEL --hardware this` reads it")
    return {**bench_tables.calibration_object(found), "path": str(path)}


def _bench(
    name: str,
    device: "torch.device",
    meter: "Meter",
    weights: WeightsName,
    kv_cache_dtype: KvCacheName,
    batch: str,
    context: str,
    seconds: float,
    out: Path | None,
) -> dict[str, object]:
    from daedal.bench.calibration import MOST_OTHERS
    from daedal.bench.machine import Others, peak_bytes
    from daedal.bench.measuring import measure

    batches, contexts = cost_arguments.batches(batch), cost_arguments.contexts(context)
    loaded = _load(name, device, weights)
    predictor, unpredicted = _predictor(loaded, kv_cache_dtype)
    counted, beside = meter if device.type == "cpu" else None, Others()
    points = list(
        measure(
            loaded.model,
            batches=batches,
            contexts=contexts,
            kv_cache_dtype=kv_cache_dtype,
            seconds=seconds,
            meter=counted,
            predictor=predictor,
            note=lambda what: say(f"measuring {what}"),
        )
    )
    if all(point.refusal for point in points):
        raise ConfigError(f"nothing could be measured: {points[0].refusal}")
    peak, others = peak_bytes(), beside.share()
    title = f"{display_name(name)}, weights {loaded.weights or 'as loaded'}, cache {kv_cache_dtype}"
    _show(title, points, loaded, peak, None if counted is None else counted.source, unpredicted)
    if others is not None and others > MOST_OTHERS:
        say(f"this machine was busy: other programs took {others:.0%} of the processors, so rates are too low")
    told: dict[str, object] = {
        "model": display_name(name),
        "device": str(device),
        "weights": loaded.weights,
        "kv_cache_dtype": kv_cache_dtype,
        "load_seconds": loaded.seconds,
        "peak_bytes": peak,
        "energy": None if counted is None else counted.source,
        "others": others,
        "unpredicted": unpredicted,
        "points": [bench_tables.point_object(point) for point in points],
    }
    if out is not None:
        _write(out, title, told, points)
    return told


def _load(name: str, device: "torch.device", weights: WeightsName) -> Loaded:
    import torch

    from daedal.checkpoint.load import load

    directory = resolve_shown(name)
    chosen = choose_weights(weights, directory, device, full_precision=False)
    dtype = torch.bfloat16 if chosen.format is not None else choose_dtype("auto", device).dtype
    say(f"{name} on {device}, {chosen}")
    started = time.perf_counter()
    model = load(directory, device=device, dtype=dtype, weights=chosen.format)
    return Loaded(model=model, directory=directory, weights=chosen.format, seconds=time.perf_counter() - started)


def _predictor(loaded: Loaded, kv_cache_dtype: KvCacheName) -> "tuple[Predictor | None, str | None]":
    """Or why there is none."""
    import torch

    from daedal.bench.measuring import Predictor

    if loaded.model.dtype != torch.bfloat16:
        return None, "weights are held in float32 here, which the planner does not know"
    try:
        chip = hardware.read(hardware.THIS)
    except ConfigError as error:
        return None, str(error)
    kv_dtype = "fp8" if kv_cache_dtype == "fp8" else "bf16"
    config = ModelConfig.read(loaded.directory)
    model = work.model(config, weights=loaded.weights or "bf16", kv_dtype=kv_dtype)
    return Predictor(model=model, chip=chip, prices=prices.read(None)), None


def _show(
    title: str, points: "list[Point]", loaded: Loaded, peak: int, energy: str | None, unpredicted: str | None
) -> None:
    console = table_console()
    console.print(bench_tables.points_table(title, points))
    lines = [f"loaded in {loaded.seconds:.2f} s; memory at the peak {in_bytes(peak)}"]
    lines += [f"{one.batch} x {one.context:,} tokens: {one.refusal}" for one in points if one.refusal]
    lines.append(f"energy by {energy}" if energy else "energy of accelerators is not counted")
    if unpredicted:
        lines.append(f"nothing is predicted: {unpredicted}")
    for line in lines:
        console.print(line)


def _write(out: Path, title: str, told: dict[str, object], points: "list[Point]") -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / REPORT).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}): choose another place") from error
    if find_spec("matplotlib") is None:
        say("no plot: it needs matplotlib, which comes with daedal[plots]")
        return
    from daedal.bench.plot import plot

    plot(out / PLOT, title, points)
    say(f"written: {out / REPORT} and {out / PLOT}")
