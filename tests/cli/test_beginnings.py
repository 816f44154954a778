"""What a user may wish to keep of prompts, and for which weights it is kept."""

import os
from pathlib import Path

import pytest

from daedal.cli.beginnings import Beginnings
from daedal.cli.serve import _tracing
from daedal.errors import RequestError


def test_wishes_that_cannot_be() -> None:
    with pytest.raises(RequestError, match="--prefix-cache-dir is given with --no-prefix-cache"):
        Beginnings(shared=False, directory=Path("x"))
    for gb in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(RequestError, match="--prefix-cache-gb is"):
            Beginnings(gb=gb)
    with pytest.raises(RequestError, match="give the address of a collector"):
        _tracing("localhost:4317")


def test_other_weights_and_other_drafters_have_other_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
        os.utime(tmp_path / name / "model.safetensors", ns=(5, 5 if name == "one" else 6))
    one, two = tmp_path / "one", tmp_path / "two"
    wish = Beginnings(directory=tmp_path / "kept", gb=0.5)
    assert Beginnings().kept(one, None, None) is None
    kept = [wish.kept(*of) for of in ((one, None, None), (one, "bf16", None), (two, None, None), (one, None, two))]
    assert len({each.model for each in kept if each is not None}) == 4
    again = wish.kept(one, None, None)
    assert again == kept[0]
    assert again is not None
    assert (again.path, again.most_bytes) == (tmp_path / "kept", 500_000_000)
