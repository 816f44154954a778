"""What tests of ops share."""

from collections.abc import Iterator

import pytest

from daedal.ops.backends.cpu.building import compiler
from daedal.ops.backends.cpu.program import LEVELS, native


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of native kernels in turn; those that this machine lacks are passed over."""
    if compiler() is None:
        pytest.skip("no C++ compiler here, so there are no native kernels")
    if not native().use(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native().use(None)
