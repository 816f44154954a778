"""`daedal quantize`: a checkpoint in another number format. How, `checkpoint.quantize` knows."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from daedal.cli.console import table_console
from daedal.cli.fetching import FetchDisplay, resolve_shown
from daedal.cli.units import in_bytes

if TYPE_CHECKING:
    from daedal.checkpoint.quantize import QuantizeReport


FormatName = Literal["bf16", "fp8", "fp4", "int8", "int4"]
LayoutName = Literal["deepseek", "transformers", "packed"]


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's directory, or a name.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty directory, or a checkpoint to replace.")],
    to: Annotated[
        FormatName,
        typer.Option(
            help="Number format; fp4 is routed experts in FP4, the rest in FP8. int8 and int4 are packed for Daedal's "
            "CPU kernels, in no stock layout."
        ),
    ],
    layout: Annotated[
        LayoutName | None,
        typer.Option(help="Names to write; the family's published ones if not given; packed for Daedal alone."),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|self",
            help="Round for a text (UTF-8, also .xz; may be repeated), or for what the model itself writes: "
            "slower, and closer to the unrounded model.",
        ),
    ] = None,
    calibrate_tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate with.")] = 16_384,
    keep: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="With --calibrate: leave this share of the numbers in bfloat16, where rounding costs most.",
        ),
    ] = 0.0,
    json_line: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Write a checkpoint in another number format, tensor by tensor, and say what that changed."""
    from daedal.checkpoint.quantize import quantize
    from daedal.cli.calibrating import windows

    source = resolve_shown(src)
    bars = Progress(console=Console(stderr=True))
    display = FetchDisplay(bars)
    try:
        given = partial(windows, source, calibrate or (), calibrate_tokens, partial(display, "writing text"))
        calibration = given if calibrate else None
        progress = partial(display, "converting")
        report = quantize(source, dst, to=to, layout=layout, calibration=calibration, keep=keep, progress=progress)
    finally:
        if bars.tasks:
            bars.stop()
    _document(source, dst, report, list(calibrate or ()))
    table_console().print(_table(report))
    if json_line:
        print(json.dumps({"source": str(source), "destination": str(dst), **dataclasses.asdict(report)}))


def _document(source: Path, destination: Path, report: "QuantizeReport", texts: list[str]) -> None:
    """A record of the new weights where the source has one of its own, which becomes their parent's."""
    from daedal.distill.documents import document
    from daedal.distill.licence import RECORD
    from daedal.distill.provenance import Data, Model, Provenance
    from daedal.distill.terms import UNKNOWN

    if not (source / RECORD).exists():
        return
    files = [Path(text) for text in texts if text != "self"]
    described = Provenance(
        name=destination.resolve().name,
        parent=Model.of(source),
        data=[Data.of(path, role="calibration", licence=UNKNOWN) for path in files],
        stages=[{"stage": "quantize", **dataclasses.asdict(report)}],
        lost=("What rounding the weights cost was not measured here.",),
    )
    document(destination, described, parent=source)


def _table(report: "QuantizeReport") -> Table:
    inexact = f"; {report.inexact} FP4 matrices did not fit into FP8 exactly" if report.inexact else ""
    title = (
        f"{in_bytes(report.bytes_before)} became {in_bytes(report.bytes_after)}, {report.tensors:,} tensors{inexact}"
    )
    if (done := report.calibration) is not None:
        title += f"\n{done.matrices:,} matrices rounded for {done.tokens:,} tokens of text"
        title += f"; {done.unreached:,} of experts that too few reached, plainly" if done.unreached else ""
        title += f"; {len(done.exact):,} left in bfloat16" if done.exact else ""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("tensors", justify="right")
    table.add_column("stored in")
    table.add_column("largest relative error", justify="right")
    for role in report.roles:
        error = f"{role.largest_error:.2e}" if role.largest_error else "exact"
        table.add_row(role.role.replace("_", " "), f"{role.tensors:,}", ", ".join(role.dtypes), error)
    return table
