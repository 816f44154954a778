"""Answers full of tags, cut anywhere, are read the same and without a crash; `python -m tests.fuzz` runs many more."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from daedal.errors import DaedalError
from tests.hostile import Target
from tests.text.hostile_answers import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_answer_breaks_a_parser(target: Target, tmp_path: Path) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(target.examples)
    def every(example: object) -> None:
        with contextlib.suppress(DaedalError):
            target.check(example, tmp_path)

    every()
