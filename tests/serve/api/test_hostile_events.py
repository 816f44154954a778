"""Events hold any text and may be cut anywhere: both official clients read what was sent."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.hostile import Target
from tests.serve.api.hostile_events import TARGETS, read_events


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_clients_read_what_was_sent(target: Target, tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(target.examples)
    def every(example: object) -> None:
        target.check(example, tmp_path)

    every()


def test_an_event_is_one_line_by_whichever_rule(tmp_path: Path) -> None:
    """Of all that Python, httpx and with them many clients take for an end of a line, an event holds none."""
    breaks = "a\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029z"
    read_events(([{"content": breaks}], True, [30]), tmp_path)
