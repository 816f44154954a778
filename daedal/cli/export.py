"""`daedal export`: a checkpoint as another framework's runner reads it. How, `ports.export` knows."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from daedal.cli.fetching import displayed, resolve_shown
from daedal.cli.units import in_bytes

if TYPE_CHECKING:
    from daedal.ports.export import ExportReport

TargetName = Literal["mindspore"]
ExportDtype = Literal["float32", "float16", "bfloat16"]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty directory, or a checkpoint to replace.")],
    to: Annotated[TargetName, typer.Option(help="The framework that is to run it.")],
    dtype: Annotated[
        ExportDtype | None, typer.Option(help="Of the weights; as the files have it if not given.")
    ] = None,
    json_line: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Write a checkpoint as MindSpore reads it, and say how to run it there."""
    from daedal.ports.export import export

    source = resolve_shown(model)
    with displayed() as display:
        report = export(source, out, dtype=dtype, progress=lambda done, total: display("writing", done, total))
    _document(source, out, report)
    expanded = f", {report.expanded:,} of them expanded" if report.expanded else ""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{report.tensors:,} tensors in {report.dtype}, {in_bytes(report.nbytes)}{expanded}", markup=False)
    run = shlex.join(["python", "-m", "daedal.ports.mindspore", str(out), "--prompt", "Once upon a time"])
    console.print(f"run it where MindSpore is: {run}", markup=False)
    if json_line:
        print(json.dumps({"source": str(source), "destination": str(out), "to": to, **dataclasses.asdict(report)}))


def _document(source: Path, destination: Path, report: "ExportReport") -> None:
    """A record of the new files where the source has one of its own, which becomes their parent's."""
    from daedal.distill.documents import document
    from daedal.distill.licence import RECORD
    from daedal.distill.provenance import Model, Provenance

    if not (source / RECORD).exists():
        return
    described = Provenance(
        name=destination.resolve().name,
        parent=Model.of(source),
        stages=[{"stage": "export", **dataclasses.asdict(report)}],
        lost=("Nothing was measured here; numbers are the parent's, rounded where the parent has another dtype.",),
    )
    document(destination, described, parent=source)
