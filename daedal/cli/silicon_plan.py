"""`daedal doctor --profile NAME`: what a chip that may not be here can do, and which implementation each op would get.

The plan asks the same predicates that choose at run time, with tensors that hold no data and the chip's profile in
place of the machine's, backends that are absent here included. It compiles and runs nothing: docs/silicon.md says what
was.
"""

import json
from typing import TYPE_CHECKING, TypedDict

from rich import box
from rich.console import Console
from rich.table import Table

from daedal.cli.op_samples import samples
from daedal.cli.units import in_bytes

if TYPE_CHECKING:
    from daedal.ops.silicon import Profile


class OpChoice(TypedDict):
    """One backend for one op."""

    op: str
    backend: str
    chosen: bool
    reason: str


class Silicon(TypedDict):
    """A profile as `--json` prints it; None for what nobody told."""

    profile: str
    name: str
    device: str
    target: str
    formats: list[str]
    cores: int | None
    lanes: int | None
    on_chip_bytes: int | None
    memory_bytes: list[float]
    source: str
    certainty: str


class Plan(TypedDict):
    """What `doctor --profile NAME --json` prints."""

    silicon: Silicon
    ops: list[OpChoice]


def show_plan(name: str, console: Console, *, as_json: bool) -> None:
    """Prints the plan for a chip; ConfigError for one that nobody described."""
    from daedal.ops import silicon

    profile = silicon.read(name)
    plan = Plan(silicon=described(profile), ops=planned(profile))
    show_silicon(plan["silicon"], console)
    show_ops(f"ops of a decode step and of FP8 training, as {profile.name} would run them", plan["ops"], console)
    if as_json:
        print(json.dumps(plan))


def planned(profile: "Profile") -> list[OpChoice]:
    """For every op and backend, whether it would run on the chip in bfloat16, and the reason."""
    import torch

    from daedal import ops
    from daedal.ops import silicon

    choices: list[OpChoice] = []
    with torch.no_grad(), silicon.assumed(profile):
        for op, (arguments, keywords) in samples(torch.device("meta"), torch.bfloat16).items():
            for choice in ops.plan(op, *arguments, **keywords):
                choices.append(OpChoice(op=op, backend=choice.backend, chosen=choice.chosen, reason=choice.reason))
    return choices


def described(profile: "Profile") -> Silicon:
    """A profile with the memory that `cost/hardware.toml` gives it, one number for each of its kinds."""
    from daedal.cost import hardware

    return Silicon(
        profile=profile.key,
        name=profile.name,
        device=profile.device,
        target=profile.target,
        formats=sorted(profile.formats),
        cores=profile.cores,
        lanes=profile.lanes,
        on_chip_bytes=profile.on_chip_bytes,
        memory_bytes=[hardware.read(key).memory_bytes for key in profile.memory],
        source=profile.source,
        certainty=profile.certainty,
    )


def show_silicon(found: Silicon, console: Console) -> None:
    """A profile as a table for people."""
    table = Table(title=found["name"], title_justify="left", show_header=False, box=box.SIMPLE)
    memory = ", ".join(in_bytes(size) for size in found["memory_bytes"])
    on_chip = found["on_chip_bytes"]
    for label, value in (
        ("torch calls it", found["device"]),
        ("compilers call it", found["target"]),
        ("multiplies", ", ".join(found["formats"])),
        ("cores", str(found["cores"] or "")),
        ("lanes", str(found["lanes"] or "")),
        ("memory beside a core", in_bytes(on_chip) if on_chip else ""),
        ("memory", memory),
        ("source", f"{found['source']} ({found['certainty']})"),
    ):
        if value:
            table.add_row(label, value)
    console.print(table)


def show_ops(title: str, choices: list[OpChoice], console: Console) -> None:
    """Which backend runs which op, and why the others do not."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("op", "backend", "", "reason"):
        table.add_column(column)
    for choice in choices:
        mark, style = ("chosen", "bold") if choice["chosen"] else ("", "dim")
        table.add_row(choice["op"], choice["backend"], mark, choice["reason"], style=style)
    console.print(table)
