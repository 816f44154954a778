"""Ways to heal one student, each with the same budget and on the same text: what KD adds to plain text, rates, shares.

    python benchmarks/healing_arms.py STUDENT TEACHER --text A.txt --text B.txt --held-out C.txt --minutes 5 \\
        --arm kd --arm text:share=0 --arm faster:rate=5e-4 --arm all:trained=attention+norm+dense_mlp

An arm is a name and fields of `Healing` that differ. Arms run one after the other; one that is done is not done again,
so more may be added. Prints perplexity over the original's by tokens, and one JSON line last.
"""

import argparse
import ast
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from daedal.distill.healing import Healed, Healing, heal
from daedal.distill.training import Point

Arm = tuple[str, dict[str, Any]]


def arm(text: str) -> Arm:
    """NAME or NAME:FIELD=VALUE,FIELD=VALUE; roles are joined by +."""
    name, _, given = text.partition(":")
    changes: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        field, _, value = part.partition("=")
        if field not in {known.name for known in dataclasses.fields(Healing)}:
            raise argparse.ArgumentTypeError(f"{field!r} is no field of Healing")
        changes[field] = tuple(value.split("+")) if field == "trained" else ast.literal_eval(value)
    return name, changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--held-out", type=Path, action="append", default=[])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--arm", type=arm, action="append", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/healing_arms"))
    asked = parser.parse_args()
    console = Console()
    base = Healing(minutes=asked.minutes, tokens=asked.tokens, held_out=tuple(asked.held_out))
    found: dict[str, Healed] = {}
    for name, changes in asked.arm:
        settings = dataclasses.replace(base, **changes)
        found[name] = heal(
            asked.student,
            asked.teacher,
            asked.out / name,
            text=asked.text,
            settings=settings,
            measured=partial(show, console, name),
            shards=asked.out / f"text-{settings.longest}-{settings.validation:g}",
        )
    report(found, console)


def show(console: Console, name: str, point: Point) -> None:
    console.print(f"{name}: {point.tokens:,} tokens, {point.measured['ratio']:.4f} times the original's perplexity")


def report(found: dict[str, Healed], console: Console) -> None:
    table = Table("arm", "tokens/s", "perplexity over the original's, at thousands of tokens", title="healing")
    for name, healed in found.items():
        curve = "  ".join(f"{point.tokens / 1000:.0f}: {point.measured['ratio']:.4f}" for point in healed.curve)
        table.add_row(name, f"{healed.tokens_per_second:.0f}", curve)
    console.print(table)
    print(json.dumps({"arms": {name: healed.record() for name, healed in found.items()}} | circumstances()))


if __name__ == "__main__":
    main()
