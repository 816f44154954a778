"""Whether results may depend on what shares a batch.

Kernels may choose their arithmetic by the number of rows: a matrix unit for many, dot products for few. Both are right
to the last bits and differ there. Inside `exactly` a backend that has such a choice takes the arithmetic of few rows
for any number, so that each row's result is its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def exactly(wanted: bool = True) -> Iterator[None]:
    """Inside the block no row of a result depends on the other rows; slower for many rows."""
    token = _exact.set(wanted)
    try:
        yield
    finally:
        _exact.reset(token)


def is_exact() -> bool:
    return _exact.get()
