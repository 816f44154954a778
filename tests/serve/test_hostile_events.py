"""Events hold any text and may be cut anywhere: both official clients read what was sent."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.hostile import Target
from tests.serve.hostile_events import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_clients_read_what_was_sent(target: Target, tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(target.examples)
    def every(example: object) -> None:
        target.check(example, tmp_path)

    every()
