"""What tests of ops share."""

from collections.abc import Iterator

import pytest

from daedal.ops.backends.cpu.program import LEVELS, native
from tests.native import use_level


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of native kernels in turn; those that this machine lacks are passed over."""
    use_level(request.param)
    yield request.param
    native().use(None)
