"""The one reason for which tests of native kernels are skipped: there is no compiler, and so there are no kernels.

Kernels that do not compile where there is a compiler are broken, and their tests fail.
"""

import pytest

from daedal.ops.backends.cpu.building import compiler
from daedal.ops.backends.cpu.program import native

needs_kernels = pytest.mark.skipif(compiler() is None, reason="no C++ compiler here, so there are no native kernels")


def use_level(name: str) -> None:
    """Chooses an instruction set for all kernels; whoever calls puts the best one back. Skips where it is not here."""
    if compiler() is None:
        pytest.skip("no C++ compiler here, so there are no native kernels")
    if not native().use(name):
        pytest.skip(f"this CPU has no {name}")
