"""Chips that are not here: their profiles, the plan that follows from one, and backends that are absent or broken."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from daedal import ops
from daedal.cli import app, op_samples, silicon_plan
from daedal.cost import hardware
from daedal.errors import BackendError, ConfigError
from daedal.ops import self_check, silicon
from daedal.ops.arithmetic import FP8, HIF8
from daedal.ops.backends.triton.supports import PREDICATES
from daedal.ops.registry import REGISTRY, Candidate, Registry

HERE = Path(__file__)
INTERPRETED = (
    "test_triton.py",
    "test_triton_sparse.py",
    "test_triton_compress.py",
    "test_triton_limits.py",
    "test_triton_training.py",
    "test_backends.py",
)


def _chosen(chip: str) -> dict[str, str]:
    return {row["op"]: row["backend"] for row in silicon_plan.planned(silicon.read(chip)) if row["chosen"]}


def test_every_chip_has_memory_formats_and_a_source() -> None:
    for name in silicon.names():
        profile = silicon.read(name)
        assert profile.multiplies(torch.bfloat16)
        assert profile.source
        assert profile.maker in ("nvidia", "amd", "huawei")
        for key in profile.memory:
            chip = hardware.read(key)
            assert ("fp8" in chip.peak) <= any(form.startswith("float8") for form in profile.formats), key


def test_a_chip_that_nobody_described_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"profile is 'h2000': give one of h200, .*, or this"):
        silicon.read("h2000")
    row = {"name": "x", "device": "cuda", "target": "sm_1", "formats": ["float32"], "source": "s", "certainty": "c"}
    assert silicon.described("x", row).cores is None
    with pytest.raises(ConfigError, match="cores of x is 0"):
        silicon.described("x", {**row, "cores": 0})
    with pytest.raises(ConfigError, match="speed"):
        silicon.described("x", {**row, "speed": 3})


def test_this_machine_has_a_profile_and_an_assumed_one_ends_with_its_block() -> None:
    cpu = torch.device("cpu")
    assert silicon.of(cpu).device == "cpu"
    with silicon.assumed(silicon.read("mi300x")):
        assert silicon.of(cpu).target == "gfx942"
        assert not silicon.of(cpu).multiplies(torch.float8_e4m3fn)
    assert silicon.of(cpu).device == "cpu"


@pytest.mark.parametrize("chip", ["h200", "b200", "mi300x", "mi350x"])
def test_a_gpu_runs_our_kernels_and_its_makers_products(chip: str) -> None:
    chosen = _chosen(chip)
    scaled = "cublas" if chip == "h200" else "triton"
    for op in PREDICATES:
        assert chosen[op] == (scaled if op.startswith("scaled") else "triton"), op
    assert chosen["linear"] == chosen["grouped_linear"] == "aten"
    assert chosen.keys() == set(REGISTRY.ops)


def test_kernels_decline_a_chip_for_which_they_were_not_compiled() -> None:
    untried = replace(silicon.read("ascend-950"), sums_on_chip=False)
    rows = [row for row in silicon_plan.planned(untried) if row["backend"] == "triton"]
    assert {row["op"] for row in rows} == set(PREDICATES)
    assert not any(row["chosen"] for row in rows)


@pytest.mark.parametrize("chip", ["ascend-910b", "ascend-910c", "ascend-950"])
def test_kernels_take_of_another_chips_ops_those_that_its_maker_lacks(chip: str) -> None:
    rows = silicon_plan.planned(silicon.read(chip))
    reasons = {row["op"]: row["reason"] for row in rows if row["backend"] == "triton"}
    assert reasons.keys() == PREDICATES.keys()
    chosen = {op for op, backend in _chosen(chip).items() if backend == "triton"}
    assert chosen == {"hyper_collapse", "hyper_expand", "hyper_head", "sparse_attention", "pool_groups"}
    for op in ("choose_entries", "route"):
        assert reasons[op] == "npu is preferred"
    told = f"compiles for GPUs of NVIDIA and AMD, and this is {silicon.read(chip).name}"
    assert {reasons[op] for op in reasons.keys() - chosen - {"choose_entries", "route"}} == {told}


def test_kernels_say_what_they_do_not_take() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with silicon.assumed(silicon.read("h200")):
        assert PREDICATES["rms_norm"](x, x[0], 1e-6) is None
        assert "not torch.float64" in str(PREDICATES["rms_norm"](x.double(), None, 1e-6))
        assert PREDICATES["scaled_linear"](x, weight, FP8) is None
        assert "hif8" in str(PREDICATES["scaled_linear"](x, weight, HIF8))
        rows = ops.FlatRows(torch.ones(2, 8, requires_grad=True), (0, 2))
        told = "has no gradients of keys that are their own values"
        assert PREDICATES["attention"](x[:, None], (0, 2), rows, 4, scale=1.0) == told
        assert PREDICATES["attention"](x[:, None], (0, 2), rows, rows, scale=1.0) is None
        wide = ops.FlatRows(torch.ones(2, 320), (0, 2))
        told = "has gradients of keys and values of 256 numbers at most, and these have 320"
        assert PREDICATES["attention"](x[:, None], (0, 2), rows, wide, scale=1.0) == told


def test_doctor_shows_the_plan_for_a_chip(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["doctor", "--profile", "ascend-950", "--json"]) == 0
    out = capsys.readouterr().out
    plan = json.loads(out.splitlines()[-1])
    assert plan.keys() == silicon_plan.Plan.__annotations__.keys()
    assert plan["silicon"]["memory_bytes"] == [128e9, 144e9]
    assert {row["op"] for row in plan["ops"]} == set(REGISTRY.ops)
    assert "Huawei Ascend 950" in out
    assert app.run(["doctor", "--profile", "abacus"]) == 2
    assert "profile is 'abacus'" in capsys.readouterr().err


def test_absent_backends_are_listed_and_never_called() -> None:
    registry = Registry()
    registry.register("add", "reference")(lambda a, b: a + b)
    registry.absent("far", "it is not installed", {"add": lambda a, b: None})
    assert registry.call("add", 1, 2) == 3
    assert registry.backends == ("reference",)
    reasons = {choice.backend: choice.reason for choice in registry.explain("add", 1, 2)}
    assert reasons["far"] == "absent: it is not installed"
    assert [choice.backend for choice in registry.plan("add", 1, 2) if choice.chosen] == ["far"]
    with pytest.raises(BackendError, match=r"'far' is absent \(it is not installed\)"), registry.using("far"):
        pass


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (docs/silicon.md has a dated run)")
def test_kernels_equal_the_reference_through_the_interpreter() -> None:
    """The one test of all backends too, as far as it concerns this one."""
    files = [str(HERE.with_name(name)) for name in INTERPRETED]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=HERE.parents[2])
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


PLANTED = {
    "does not import": ("raise ImportError('libtriton.so: cannot open shared object file')\n", "libtriton.so"),
    "lacks a symbol": ("", "has no attribute"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_broken_triton_stops_with_its_name_and_remedy(fault: str, tmp_path: Path) -> None:
    """A package of that name that is no Triton: nothing falls back in silence."""
    source, named = PLANTED[fault]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    (tmp_path / "triton" / "language.py").write_text("")
    paths = os.pathsep.join([str(tmp_path), str(HERE.parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "daedal", "doctor"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("daedal: backend 'triton' is present but does not load")
    assert named in result.stderr
    assert "uninstall triton" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("op", ["rms_norm", "keep_on_pages", "route"])
def test_a_wrong_result_stops_the_self_check_with_its_name(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, whole numbers, and what an op writes to its arguments."""

    def planted(*args: object, **kwargs: object) -> object:
        with ops.using("reference"):
            result = REGISTRY.call(op, *args, **kwargs)
        if op == "rms_norm":
            return result * 1.1
        if op == "route":
            return result[0].flip(-1), result[1]
        args[2].pool.mul_(2)
        return None

    def make() -> self_check.Call:
        return op_samples.samples(torch.device("cpu"), torch.float32, seed=1)[op]

    assert self_check.check(op, make)[1] < 1e-4
    candidates = [Candidate("planted", planted, lambda *args, **kwargs: None), *REGISTRY.candidates(op)]
    monkeypatch.setitem(REGISTRY._candidates, op, candidates)
    with pytest.raises(BackendError, match=f"'planted' gives a wrong result for {op} .* DAEDAL_OPS=reference"):
        self_check.check(op, make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_passes_its_self_check(dtype: torch.dtype) -> None:
    for op in REGISTRY.ops:
        _, error = self_check.check(op, lambda op=op: op_samples.samples(torch.device("cpu"), dtype, seed=1)[op])
        assert error <= self_check.TOLERANCE[dtype]
