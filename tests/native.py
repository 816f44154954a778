"""The one reason for which tests of native kernels are skipped: there is no compiler, and so there are no kernels.

Kernels that do not compile where there is a compiler are broken, and their tests fail.
"""

import pytest

from daedal.ops.backends.cpu.building import compiler

needs_kernels = pytest.mark.skipif(compiler() is None, reason="no C++ compiler here, so there are no native kernels")
