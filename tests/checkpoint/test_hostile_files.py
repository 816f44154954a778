"""Damaged and lying files end in an error that says so, never in a crash; `python -m tests.fuzz` runs many more."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings

from daedal.config import ModelConfig
from daedal.errors import ConfigError, DaedalError
from tests.checkpoint.hostile_files import TARGETS
from tests.hostile import Target
from tests.tiny import tiny_published


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_is_wrong_with_a_file_is_said(target: Target, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(target.examples)
    def every(example: object) -> None:
        with contextlib.suppress(DaedalError):
            target.check(example, tmp_path_factory.mktemp("hostile"))

    every()


@pytest.mark.parametrize(("field", "value"), [("rope_scaling", True), ("compress_ratios", [[0], [4], [128], [4]])])
def test_what_fuzzing_found(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_published(tiny_published("deepseek_v4", **{field: value}))
