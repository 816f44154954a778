"""Compiles every Triton kernel for chips that are not here: `python tools/compile_kernels.py [--chip mi300x] [--all]`.

Each kernel is compiled at the sizes of V3 and V4, in bfloat16, at the first point of its declared space, or at all of
them; nothing is run. A kernel fails where no point compiles within the memory that one block may use on the chip. Needs
Triton, no accelerator. What it found last stands in docs/silicon.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from daedal.ops import silicon
from tools.kernel_cases import SCHEDULE, Case, arguments, cases

CHIPS = ("h200", "b200", "mi300x", "mi350x")
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "v_mfma", "mma.sync")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one case went for one chip: how many points fit, the first one's bytes beside a core, or what was wrong."""

    name: str
    chip: str
    fitting: int
    points: int
    bytes: int
    instructions: tuple[str, ...]
    seconds: float
    problem: str = ""


def compiled(case: Case, chip: str, *, everything: bool) -> Outcome:
    """Compiles the first point, or everything; the first that fits the chip gives the figures."""
    profile = silicon.read(chip)
    native = bool(case.native) and profile.multiplies(torch.float8_e4m3fn)
    pointers = case.native if native else case.pointers
    space = case.space if everything else case.space[:1]
    started, fitting, first, problem = time.monotonic(), 0, None, ""
    for point in space:
        constants = {**case.constants, **{name: value for name, value in point.items() if name not in SCHEDULE}}
        try:
            binary = triton.compile(
                _source(case.kernel, pointers, constants),
                target=target(profile),
                options={name: point[name] for name in SCHEDULE if name in point},
            )
        except Exception as error:  # whatever a compiler throws is this point's problem
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            continue
        if binary.metadata.shared > (profile.on_chip_bytes or 0):
            problem = f"needs {binary.metadata.shared} bytes beside a core, {profile.on_chip_bytes} are there"
            continue
        fitting += 1
        first = first or binary
    text = "" if first is None else str(first.asm.get("ptx") or first.asm.get("amdgcn") or "")
    return Outcome(
        name=case.name,
        chip=chip,
        fitting=fitting,
        points=len(space),
        bytes=0 if first is None else first.metadata.shared,
        instructions=tuple(word for word in INSTRUCTIONS if word in text),
        seconds=time.monotonic() - started,
        problem=problem if fitting < len(space) else "",
    )


def target(profile: silicon.Profile) -> GPUTarget:
    """As Triton names it."""
    if profile.maker == "nvidia":
        return GPUTarget("cuda", int(profile.target.removeprefix("sm_")), profile.lanes)
    return GPUTarget("hip", profile.target, profile.lanes)


def _source(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any]) -> ASTSource:
    signature = arguments(kernel, pointers, constants)
    places = {(place,): constants[name] for place, name in enumerate(kernel.arg_names) if name in constants}
    return ASTSource(kernel, signature, constexprs=places)


def _job(place: int, chip: str, everything: bool) -> Outcome:
    return compiled(list(cases())[place], chip, everything=everything)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each kernel and chip; 1 where a kernel fits a chip at no point."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for chips that are not here.")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="may be repeated; all four without it")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--all", action="store_true", help="every point of the declared spaces")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args(arguments)
    places = [place for place, case in enumerate(cases()) if options.only in case.name]
    pairs = [(place, chip, options.all) for chip in options.chip or CHIPS for place in places]
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(_job, *zip(*pairs, strict=True)):
            outcomes.append(outcome)
            print(
                f"{outcome.chip:8} {outcome.name:34} {outcome.fitting}/{outcome.points} {outcome.bytes:7} B "
                f"{outcome.seconds:5.1f} s {' '.join(outcome.instructions)} {outcome.problem}",
                flush=True,
            )
    failed = [outcome for outcome in outcomes if not outcome.fitting]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} kernels compiled, Triton {triton.__version__}")
    if options.json:
        rows = [{**vars(outcome), "instructions": list(outcome.instructions)} for outcome in outcomes]
        print(json.dumps({"triton": triton.__version__, "kernels": rows}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
