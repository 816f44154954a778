"""Compiles Triton kernels for Huawei's chips, which are not here: `python tools/compile_ascend.py [--chip NAME]`.

    pip install triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11 attrs pyyaml

in an environment of its own with PyTorch, because that Triton takes the other one's place. Each kernel goes through
the front end of triton-ascend, and what comes of it through the BiSheng compiler, up to the chip's own operations:
memory beside the core planned, vector and matrix units chosen, waits inserted. The last step, `hivmc` or `hivmc-a5`,
makes machine code; it is part of CANN and not public. In its place stands a script that keeps what it was given, and a
kernel counts as lowered only where that describes a chip with the memory beside a core that the profile has. Tiles that
are too large must be refused. Nothing is run. Kernels for 950 are compiled twice: with the options that triton-ascend
has for that architecture, and with its usual ones, which release 3.2.0 takes wherever the caller does not say.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daedal.ops import silicon

if TYPE_CHECKING:  # needs Triton, without which the script says what is missing
    from tools.kernel_cases import Case

CHIPS = ("ascend-910b", "ascend-910c", "ascend-950")
LAST_STEPS = ("hivmc", "hivmc-a5")  # as the compiler calls it for 910, and for 950
PACKAGES = ("triton-ascend", "ascendnpu-ir")
SECONDS = 280


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one kernel for one chip. lowered: it reached the last step. wanted: whether it must; one that must
    not is to be refused for its size. units: what it runs on, as the front end says (aiv: vector cores, mix: both).
    """

    name: str
    chip: str
    lowered: bool
    wanted: bool
    options: str = "usual"
    units: str = ""
    seconds: float = 0.0
    problem: str = ""

    @property
    def too_large(self) -> bool:
        """Whether the compiler said that memory beside the core does not suffice."""
        return "overflow, requires" in self.problem


def missing() -> str | None:
    """Which package of the tool chain is not here; None where all are."""
    for package in PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed: the head of tools/compile_ascend.py says how"
    return None


def kernels(chip: str) -> Iterator[tuple["Case", bool]]:
    """Each kernel that a chip of Huawei's runs, at the block sizes that it is given there; and whether it must fit."""
    from daedal.ops.backends.triton.spaces import first_of
    from tools.kernel_cases import cases

    for case in cases():
        if case.on_chip:
            narrow = replace(case, space=(first_of(case.space, silicon.read(chip).narrowest),))
            yield narrow, True
            yield from ((wide, True) for wide in _in_float32(narrow))
        if case.too_large:
            constants = {**case.constants, **case.too_large}
            yield replace(case, name=f"{case.name}, too large", constants=constants, space=({},)), False


def _in_float32(case: "Case") -> Iterator["Case"]:
    pointers = {name: "fp32" if kind == "bf16" else kind for name, kind in case.pointers.items()}
    if pointers != dict(case.pointers):
        yield replace(case, name=f"{case.name}, float32", pointers=pointers)


def options_for(chip: str) -> tuple[str, ...]:
    """The sets of options with which kernels for a chip are compiled."""
    return ("usual", "new") if "950" in silicon.read(chip).target else ("usual",)


def compiled(case: "Case", asked: Verdict) -> Verdict:
    """`asked` with what became of one kernel."""
    started, found = time.monotonic(), asked
    try:
        text = front(case, asked)
    except subprocess.CalledProcessError as error:
        found = replace(asked, problem=f"front end: {_sentence(error.stderr.decode())}")
    except Exception as error:  # whatever a front end throws is this kernel's problem
        found = replace(asked, problem=f"front end: {type(error).__name__}: {_sentence(str(error))}")
    else:
        found = back(text, asked)
    return replace(found, seconds=time.monotonic() - started)


def front(case: "Case", asked: Verdict) -> str:
    """The kernel in linalg. Names of triton-ascend 3.2.0."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tools.kernel_cases import SCHEDULE, arguments

    point = {name: value for name, value in case.space[0].items() if name not in SCHEDULE}
    constants = {**case.constants, **point}
    kinds = arguments(case.kernel, case.pointers, constants)
    source = ASTSource(
        fn=case.kernel,
        signature={name: kind for name, kind in kinds.items() if kind != "constexpr"},
        constants={name: constants[name] for name, kind in kinds.items() if kind == "constexpr"},
    )
    backend, new = compiler.AscendBackend(GPUTarget("npu", silicon.read(asked.chip).target, 0)), asked.options == "new"
    options = backend.parse_options({"compile_on_910_95": new, "enable_select_analysis": new})
    context = ir.context()
    ir.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    told: dict[str, Any] = {**vars(options), "target": backend.target}
    linalg: str = compiler.ttir_to_linalg(compiler.make_ttir(module, told, options), told, options, named_ops=True)
    return linalg


def back(linalg: str, asked: Verdict) -> Verdict:
    """`asked` with the BiSheng compiler's verdict on a kernel in linalg."""
    units = re.search(r'mix_mode\s*=\s*"([^"]+)"', linalg)
    compiler, *options = _command(asked)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        given, reached = directory / "kernel.mlir", directory / "reached"
        given.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))
        _stand_in(directory / "bin", reached)
        places = str(directory / "bin"), str(Path(compiler).parent), os.environ["PATH"]  # of 950's compiler, the second
        done = subprocess.run(
            [compiler, *options, str(given), "-o", str(directory / "kernel")],
            capture_output=True, text=True, timeout=SECONDS, check=False,
            env={**os.environ, "PATH": os.pathsep.join(places)},
        )  # fmt: skip
        kept = reached.read_text() if done.returncode == 0 and reached.exists() else None
    problem = _sentence(done.stdout + done.stderr) if kept is None else _memory_problem(kept, asked.chip)
    return replace(asked, lowered=not problem, units=units[1] if units else "", problem=problem)


def _memory_problem(given: str, chip: str) -> str:
    """Where what the last step was given describes a chip with other memory than the profile's."""
    bits, bytes_ = re.search(r'"UB_SIZE", (\d+)', given), silicon.read(chip).on_chip_bytes
    if bits and bytes_ and int(bits[1]) == 8 * bytes_:
        return ""
    return f"the profile has {bytes_} bytes beside a core, the compiler {int(bits[1]) // 8 if bits else 'does not say'}"


def _command(asked: Verdict) -> list[str]:
    """The compiler for a chip, with the options that triton-ascend gives it. For 950 it starts another that lies beside
    it.
    """
    package = find_spec("ascendnpuir")
    assert package is not None
    assert package.origin is not None
    usual = asked.options == "usual"
    options = ["--enable-hfusion-compile=true", "--enable-triton-kernel-compile=true"]
    options += [
        f"--enable-auto-multi-buffer={str(usual).lower()}",
        f"--enable-auto-bind-sub-block={str(usual).lower()}",
    ]
    options += ["--enable-hivm-compile=true"] if usual else []
    compiler = Path(package.origin).parent / "bin" / "bishengir-compile"
    return [str(compiler), f"--target={silicon.read(asked.chip).target}", *options]


def _stand_in(directory: Path, reached: Path) -> None:
    """Programs called as the last step, which keep the files that they are given and that are there."""
    directory.mkdir()
    for name in LAST_STEPS:
        script = directory / name
        script.write_text(f'#!/bin/sh\nfor one in "$@"; do [ -s "$one" ] && cat "$one" >> "{reached}"; done\nexit 0\n')
        script.chmod(0o755)


def _sentence(said: str) -> str:
    """The one that matters of what a compiler said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if "Failed to run" not in line] or lines  # which is said of whatever failed
    for word in ("overflow, requires", "error: ", "Assertion", "[ERROR]"):
        for line in lines:
            if word in line:
                return line[-240:] if word == "error: " else line[:240]
    return lines[-1][:240] if lines else "it said nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each kernel and chip; 1 where one that must fit does not, or one too large does."""
    parser = argparse.ArgumentParser(description="Compile Triton kernels for chips of Huawei's that are not here.")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="may be repeated; all without it")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args(arguments)
    if (why := missing()) is not None:
        parser.error(why)
    verdicts: list[Verdict] = []
    for chip in options.chip or CHIPS:
        planned = [(case, wanted) for case, wanted in kernels(chip) if options.only in case.name]
        for (case, wanted), set_ in product(planned, options_for(chip)):
            asked = Verdict(name=case.name, chip=chip, lowered=False, wanted=wanted, options=set_)
            verdicts.append(compiled(case, asked))
            _show(verdicts[-1])
    fitting = [verdict for verdict in verdicts if verdict.wanted]
    refused = [verdict for verdict in verdicts if not verdict.wanted]
    versions: Mapping[str, str] = {package: metadata.version(package) for package in PACKAGES}
    print(
        f"{sum(verdict.lowered for verdict in fitting)} of {len(fitting)} kernels lowered, "
        f"{sum(verdict.too_large for verdict in refused)} of {len(refused)} that are too large refused; "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
    )
    if options.json:
        print(json.dumps({"versions": versions, "kernels": [vars(verdict) for verdict in verdicts]}))
    return int(not all(verdict.lowered if verdict.wanted else verdict.too_large for verdict in verdicts))


def _show(verdict: Verdict) -> None:
    said = "lowered" if verdict.lowered else "too large" if verdict.too_large else "failed"
    print(
        f"{verdict.chip:12} {verdict.options:5} {verdict.name:40} {said} {verdict.units:4} {verdict.seconds:5.1f} s "
        f"{verdict.problem}".rstrip(),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
