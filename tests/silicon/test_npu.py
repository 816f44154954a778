"""Ascend without Ascend: an `npu` device in Python, first bare, then with the vendor's ops, in processes of their own;
the plan for chips of three kinds; and faults that must stop.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daedal.cli import app, silicon_plan
from daedal.ops import silicon
from daedal.ops.backends.npu.supports import PREDICATES
from daedal.ops.backends.npu.vendor import NAMES
from daedal.ops.registry import REGISTRY
from tests.silicon import vendor_schemas
from tests.tiny import tiny_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _run(
    *command: str, adapter: bool = False, packages: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A process, whose PyTorch has the adapter of `adapter/` if it is to have one. packages: a directory of others."""
    paths = [str(ROOT), *([str(HERE / "adapter")] if adapter else []), *([] if packages is None else [str(packages)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=200, cwd=ROOT
    )


def _passes(file: str, *, adapter: bool = False) -> None:
    result = _run("pytest", "-q", "-x", "--durations=3", str(HERE / file), adapter=adapter)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


def test_every_family_runs_on_a_device_as_on_the_cpu() -> None:
    _passes("on_npu.py")


def test_the_vendors_ops_equal_the_reference() -> None:
    _passes("on_vendor_ops.py", adapter=True)


def test_every_call_of_a_vendors_op_has_its_declaration() -> None:
    assert set(vendor_schemas.read()) == set(NAMES)


def test_an_adapter_that_does_not_load_stops_with_its_name_and_remedy() -> None:
    result = _run("daedal", "doctor", adapter=True, DAEDAL_TEST_FAULT="does not load")
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    told = "daedal: backend 'npu' is present but does not load (ImportError: libascendcl.so"
    assert result.stderr.startswith(told), result.stderr
    assert "install CANN and the torch-npu that fits PyTorch" in result.stderr
    assert result.stderr.count("\n") == 1


def _planted_triton(packages: Path, compiler: str) -> Path:
    """A package that has a compiler for one maker's chips, and nothing that could be imported."""
    (packages / "triton" / "backends" / compiler).mkdir(parents=True)
    (packages / "triton" / "__init__.py").write_text("")
    return packages


def test_a_triton_for_other_chips_is_absent_and_says_so(tmp_path: Path) -> None:
    """Where kernels could not run they are not registered: PyTorch runs the op, and doctor tells why."""
    result = _run("daedal", "doctor", "--json", adapter=True, packages=_planted_triton(tmp_path, "nvidia"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    rows = [row for row in json.loads(result.stdout.splitlines()[-1])["ops"] if row["op"] == "hyper_collapse"]
    (kernels,) = (row for row in rows if row["backend"] == "triton")
    assert kernels["reason"].startswith("absent: the Triton that is installed compiles for another maker's chips")
    assert "pip install triton-ascend" in kernels["reason"]
    assert [row["backend"] for row in rows if row["chosen"]] == ["aten"]


def test_a_triton_for_ascend_without_its_compiler_stops_with_its_name_and_remedy(tmp_path: Path) -> None:
    result = _run("daedal", "doctor", adapter=True, packages=_planted_triton(tmp_path, "ascend"))
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    told = "daedal: backend 'triton' is present but does not load (FileNotFoundError: bishengir-compile of CANN is not"
    assert result.stderr.startswith(told), result.stderr
    assert "source the set_env.sh of CANN" in result.stderr
    assert result.stderr.count("\n") == 1


def _chosen(chip: str) -> dict[str, str]:
    return {row["op"]: row["backend"] for row in silicon_plan.planned(silicon.read(chip)) if row["chosen"]}


@pytest.mark.parametrize("chip", ["ascend-910b", "ascend-910c", "ascend-950"])
def test_the_plan_for_a_chip_has_its_vendors_ops(chip: str) -> None:
    chosen = _chosen(chip)
    for op in ("rms_norm", "rotary", "swiglu", "attention", "choose_entries", "route", "experts"):
        assert chosen[op] == "npu", op
    assert chosen["linear"] == "aten"
    kernels = "triton" if silicon.read(chip).sums_on_chip else "aten"  # V4's have no op there
    assert chosen["sparse_attention"] == chosen["hyper_collapse"] == kernels
    assert "npu" not in _chosen("h200").values()
    assert "npu" not in REGISTRY.backends
    reasons = [choice for choice in silicon_plan.planned(silicon.read("h200")) if choice["backend"] == "npu"]
    assert {row["op"] for row in reasons} == set(PREDICATES)


@pytest.mark.parametrize("verb", ["serve", "chat", "bench", "train"])
def test_a_device_that_is_not_here_is_one_sentence(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ROOT / "recipes" / "tiny_cpu.py" if verb == "train" else tiny_checkpoint(tmp_path, "llama")
    assert app.run([verb, str(given), "--device", "npu"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "device is 'npu', which PyTorch does not know here: give cpu, or auto" in told
