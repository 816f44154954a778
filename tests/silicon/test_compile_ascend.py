"""Kernels for Huawei's chips through triton-ascend and the BiSheng compiler, where both are installed: that is in an
environment of its own, because triton-ascend takes the place of Triton (the head of tools/compile_ascend.py says how).
What the script makes of a compiler's answer is tested everywhere, with a script in the compiler's place.
"""

import json
from importlib import metadata
from pathlib import Path

import pytest

from daedal.ops import silicon
from tools import compile_ascend


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


LACKING = [package for package in ("triton-ascend", "ascendnpu-ir") if not _installed(package)]
with_compilers = pytest.mark.skipif(bool(LACKING), reason=f"{' and '.join(LACKING)}: not installed")
LAST_STEP = {"ascend-910b": "hivmc", "ascend-910c": "hivmc", "ascend-950": "hivmc-a5"}


def _answer(chip: str, script: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> compile_ascend.Verdict:
    """The verdict where the compiler for a chip is this script."""
    binaries = place / "ascendnpuir" / "bin"
    binaries.mkdir(parents=True)
    (binaries.parent / "__init__.py").touch()
    compiler = binaries / "bishengir-compile"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.syspath_prepend(str(place))
    asked = compile_ascend.Verdict(name="kernel", chip=chip, lowered=False, wanted=True)
    return compile_ascend.back('module { mix_mode = "aiv" }', asked)


@pytest.mark.parametrize("chip", LAST_STEP)
def test_a_kernel_counts_where_the_last_step_was_reached_by_its_name(
    chip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, step = 8 * (silicon.read(chip).on_chip_bytes or 0), LAST_STEP[chip]
    script = f"""echo '#dlti.dl_entry<"UB_SIZE", {bits} : i32>' > given.mlir; {step} given.mlir -o kernel"""
    monkeypatch.chdir(tmp_path)
    verdict = _answer(chip, script, tmp_path, monkeypatch)
    assert verdict.lowered, verdict.problem
    assert verdict.units == "aiv"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 0", "it said nothing"),
        (
            "hivmc-other || echo '[ERROR] Cannot find hivmc-other' && echo '[ERROR] Failed to run BiShengIR' && exit 1",
            "Cannot find",
        ),
        ("echo 'loc(2): error: Failed to run one' && echo 'loc(8): error: linalg.reduce' && exit 1", "linalg.reduce"),
        ("echo 'loc(1): error: ub overflow, requires 9 bits while 8 available' && exit 1", "overflow, requires 9"),
        ("echo '\"UB_SIZE\", 8 : i32' > given; hivmc given", "196608 bytes beside a core, the compiler 1"),
        ("echo module > given; hivmc given", "the compiler does not say"),
    ],
)
def test_what_does_not_count_is_told(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verdict = _answer("ascend-910c", script, tmp_path, monkeypatch)
    assert not verdict.lowered
    assert problem in verdict.problem
    assert verdict.too_large == ("overflow" in problem)


@with_compilers
@pytest.mark.parametrize("chip", ["ascend-910b", "ascend-910c", "ascend-950"])
def test_every_kernel_is_lowered_and_tiles_that_are_too_large_are_refused(
    chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = compile_ascend.main(["--chip", chip, "--json"])
    out = capsys.readouterr().out
    assert status == 0, out
    rows = json.loads(out.splitlines()[-1])["kernels"]
    assert sum(row["wanted"] for row in rows) >= 20
    refused = [row for row in rows if not row["wanted"]]
    assert len(refused) >= 3
    assert all("overflow" in row["problem"] for row in refused), refused


@with_compilers
def test_a_kernel_that_does_not_fit_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = list(compile_ascend.kernels("ascend-910c"))
    case = next(case for case, wanted in planned if not wanted)
    small = next(one for one, _ in planned if one.name == case.name.removesuffix(", too large"))
    monkeypatch.setattr(compile_ascend, "kernels", lambda chip: [(case, True)])
    assert compile_ascend.main(["--chip", "ascend-910c"]) == 1
    assert "0 of 1 kernels lowered" in capsys.readouterr().out
    monkeypatch.setattr(compile_ascend, "kernels", lambda chip: [(small, False)])
    assert compile_ascend.main(["--chip", "ascend-910c"]) == 1
