"""Compiles every Triton kernel for chips that are not here: `python tools/compile_kernels.py [--chip mi300x] [--all]`.

Each kernel is compiled at the sizes of V3 and V4, in bfloat16, at the first point of its declared space, or at all of
them; nothing is run. A kernel fails where no point compiles within the memory that one block may use on the chip. Needs
Triton, no accelerator. What it found last stands in docs/silicon.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from daedal.ops import silicon
from daedal.ops.backends.triton import spaces
from daedal.ops.backends.triton.kernels import attention, elementwise, experts, routing, scaled, sparse, streams
from daedal.ops.backends.triton.spaces import Space

CHIPS = ("h200", "b200", "mi300x", "mi350x")
FLOATS = ("eps", "norm_eps", "scale", "limit")
SCHEDULE = ("num_warps", "num_stages")
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "v_mfma", "mma.sync")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at some sizes. pointers: element types by argument; what is left over is a whole number, or in `FLOATS`.

    native: another set of pointers for chips that multiply e4m3 as it is.
    """

    name: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    space: Space = ({"num_warps": 4},)
    native: Mapping[str, str] = field(default_factory=dict)


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


def cases() -> Iterator[Case]:
    """Every kernel, at sizes of V3 (7168 wide, 256 experts, latents of 512 + 64) and V4 (512, 64 index heads)."""
    yield from _elementwise()
    yield from _eight_bits()
    yield from _mixture()
    yield from _attention()
    yield from _sparse()


def _elementwise() -> Iterator[Case]:
    rows = {"x": "bf16", "weight": "bf16", "y": "bf16", "inverse": "fp32", "cos": "fp32", "sin": "fp32"}
    rows |= {"gate": "bf16", "up": "bf16", "grad": "bf16", "grad_x": "bf16", "partial": "fp32"}
    rows |= {"grad_gate": "bf16", "grad_up": "bf16"}
    norm = {"WEIGHTED": True, "BLOCK": 8192}
    turn = {"PAIRS": 32, "INTERLEAVED": True, "BACK": False, "HEADS": 8, "BLOCK": 32}
    gates = {"LIMITED": True, "BLOCK": 1024}
    rows |= {"streams": "bf16", "mixes": "fp32", "base": "fp32", "scale": "fp32", "post": "fp32", "comb": "fp32"}
    rows |= {"result": "bf16"}
    four = {"STREAMS": 4, "BLOCK": 1024}
    mixed = {**four, "FULL": True, "ITERATIONS": 20, "SLOTS": 4}
    for name, kernel, constants, space in (
        ("rms_norm", elementwise.rms_norm, {**norm, "KEPT": True}, spaces.ROWS),
        ("rms_norm, gradient", elementwise.rms_norm_backward, norm, spaces.ROWS),
        ("rotary", elementwise.rotate, turn, ({"num_warps": 4},)),
        ("swiglu", elementwise.swiglu, gates, ({"num_warps": 4},)),
        ("hyper_collapse", streams.collapse, mixed, ({"num_warps": 4},)),
        ("hyper_expand", streams.expand, four, ({"num_warps": 4},)),
        ("swiglu, gradient", elementwise.swiglu_backward, gates, ({"num_warps": 4},)),
    ):
        yield Case(name=name, kernel=kernel, pointers=rows, constants=constants, space=space)


def _eight_bits() -> Iterator[Case]:
    types = {"left": "bf16", "left_scales": "fp32", "right": "bf16", "right_scales": "fp32", "result": "bf16"}
    types |= {"x": "bf16", "codes": "bf16", "scales": "fp32"}
    native = {**types, "left": "fp8e4nv", "right": "fp8e4nv", "codes": "fp8e4nv"}
    whole = {**types, "left": "i8", "right": "i8", "codes": "i8"}
    rounding = {"GROUP": 128, "LARGEST": 448.0, "POWER_OF_TWO": True, "INTEGER": False}
    tiles, blocks = {"ROWS": 16, "SHARED": False}, {"ROWS": 128, "SHARED": True}
    eights = {"ROWS": 32, "GROUP": 32, "SHARED": True, "LARGEST": 127.0, "POWER_OF_TWO": False, "INTEGER": True}
    for name, kernel, pointers, chosen, constants, space in (
        ("round, 1 x 128", scaled.quantise, types, native, {**rounding, **tiles}, ({"num_warps": 4},)),
        ("round, 128 x 128", scaled.quantise, types, native, {**rounding, **blocks}, ({"num_warps": 4},)),
        ("round, int8", scaled.quantise, whole, whole, eights, ({"num_warps": 4},)),
        ("scaled_linear, e4m3", scaled.multiply, types, native, {"GROUP": 128, "INTEGER": False}, spaces.MULTIPLY),
        ("scaled_linear, mx", scaled.multiply, types, native, {"GROUP": 32, "INTEGER": False}, spaces.MULTIPLY),
        ("scaled_linear, int8", scaled.multiply, whole, whole, {"GROUP": 32, "INTEGER": True}, spaces.MULTIPLY),
    ):
        constants = constants if kernel is scaled.quantise else {**constants, "BM": 128}
        yield Case(name=name, kernel=kernel, pointers=pointers, native=chosen, constants=constants, space=space)


def _mixture() -> Iterator[Case]:
    routed = {"SCORING": 1, "BIASED": True, "GROUPS": 8, "KEPT": 4, "PAIRS": True, "ACTIVE": 8, "NORMALISED": True}
    types = {"logits": "fp32", "bias": "fp32", "ids": "i64", "weights": "fp32"}
    yield Case(name="route", kernel=routing.route, pointers=types, constants={**routed, "BLOCK": 256, "SLOTS": 8})
    rows = {"x": "bf16", "tokens": "i64", "tiles": "i32", "weight": "bf16", "hidden": "bf16", "result": "fp32"}
    for block in (16, 128):
        up = {"LIMITED": True, "BM": block}
        down = {"BM": block}
        yield Case(
            name=f"experts, up, {block}", kernel=experts.gate_up, pointers=rows, constants=up, space=spaces.EXPERTS
        )
        yield Case(
            name=f"experts, down, {block}", kernel=experts.down, pointers=rows, constants=down, space=spaces.EXPERTS
        )
    summed = {"rows": "fp32", "places": "i64", "weights": "fp32", "y": "bf16"}
    yield Case(name="experts, sum", kernel=experts.gather_sum, pointers=summed, constants={"ACTIVE": 8, "BLOCK": 1024})


def _attention() -> Iterator[Case]:
    types = {"q": "bf16", "keys": "bf16", "values": "bf16", "out": "fp32", "logs": "fp32"}
    types |= {"tiles": "i32", "starts": "i32", "lengths": "i32", "places": "i32"}
    latent = {"SHARED": True, "HEADS": 128, "PART_A": 512, "PART_B": 64, "VALUE": 512}
    latent |= {"BLOCK_A": 512, "BLOCK_B": 64, "BLOCK_V": 512}
    heads = {"SHARED": False, "HEADS": 1, "PART_A": 128, "PART_B": 64, "VALUE": 128}
    heads |= {"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_V": 128}
    for name, shape, kind, split in (
        ("attention, latent, on pages", latent, 1, True),
        ("attention, by heads", heads, 0, False),
    ):
        for block in (16, 64):
            constants = {**shape, "KIND": kind, "SPLIT": split, "BM": block}
            yield Case(
                name=f"{name}, {block}",
                kernel=attention.attend,
                pointers=types if split else {**types, "out": "bf16"},
                constants=constants,
                space=spaces.ATTENTION,
            )
    merged = {"parts": "fp32", "logs": "fp32", "sinks": "fp32", "out": "bf16"}
    constants = {"SINKS": True, "VALUE": 512, "BLOCK_S": 64, "BLOCK_V": 512}
    yield Case(name="attention, merge", kernel=attention.merge, pointers=merged, constants=constants)


def _sparse() -> Iterator[Case]:
    types = {"q": "bf16", "out": "fp32", "logs": "fp32", "sequences": "i32", "positions": "i32", "entries": "bf16"}
    types |= {"entry_places": "i32", "chosen": "i64", "window": "bf16", "window_places": "i32", "window_firsts": "i32"}
    types |= {"weights": "fp32", "scores": "fp32", "seen": "i32", "keys": "bf16", "places": "i32"}
    v3 = {"WINDOW": False, "WINDOW_KIND": 0, "PART_A": 512, "PART_B": 64, "BLOCK_A": 512, "BLOCK_B": 64}
    v4 = {"WINDOW": True, "WINDOW_KIND": 2, "PART_A": 512, "PART_B": 0, "BLOCK_A": 512, "BLOCK_B": 16}
    both = {"ENTRIES": True, "ENTRY_KIND": 1}
    for name, shape, chosen in (
        ("sparse_attention, V3.2", v3, True),
        ("sparse_attention, V4 chosen", v4, True),
        ("sparse_attention, V4 all", v4, False),
    ):
        for block in (16, 64):
            yield Case(
                name=f"{name}, {block}",
                kernel=sparse.attend_sparse,
                pointers=types,
                constants={**shape, **both, "CHOSEN": chosen, "BM": block},
                space=spaces.ATTENTION,
            )
    scores = {"KIND": 1, "BLOCK_I": 64, "BLOCK_K": 128, "BN": 64}
    yield Case(name="choose_entries, scores", kernel=sparse.score_entries, pointers=types, constants=scores)
    yield Case(name="choose_entries, best", kernel=sparse.take_best, pointers=types, constants={"BLOCK": 1024})


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
    signature, places = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], places[(place,)] = "constexpr", constants[name]
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
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
