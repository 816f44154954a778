"""Kernels for Huawei's chips through triton-ascend and the BiSheng compiler, where both are installed: that is in an
environment of its own, because triton-ascend takes the place of Triton (the head of tools/compile_ascend.py says how).
"""

import json
from importlib import metadata

import pytest


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


LACKING = [package for package in ("triton-ascend", "ascendnpu-ir") if not _installed(package)]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"{' and '.join(LACKING)}: not installed")


@pytest.mark.parametrize("chip", ["ascend-910b", "ascend-910c"])
def test_every_kernel_is_lowered_and_tiles_that_are_too_large_are_refused(
    chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import compile_ascend

    status = compile_ascend.main(["--chip", chip, "--json"])
    out = capsys.readouterr().out
    assert status == 0, out
    rows = json.loads(out.splitlines()[-1])["kernels"]
    assert sum(row["wanted"] for row in rows) >= 20
    refused = [row for row in rows if not row["wanted"]]
    assert len(refused) >= 3
    assert all("overflow" in row["problem"] for row in refused), refused


def test_a_kernel_that_does_not_fit_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import compile_ascend

    planned = list(compile_ascend.kernels())
    case = next(case for case, wanted in planned if not wanted)
    small = next(one for one, _ in planned if one.name == case.name.removesuffix(", too large"))
    monkeypatch.setattr(compile_ascend, "kernels", lambda: [(case, True)])
    assert compile_ascend.main(["--chip", "ascend-910c"]) == 1
    assert "0 of 1 kernels lowered" in capsys.readouterr().out
    monkeypatch.setattr(compile_ascend, "kernels", lambda: [(small, False)])
    assert compile_ascend.main(["--chip", "ascend-910c"]) == 1
