"""A directory that appears whole or not at all, however many processes want it and however they end.

Work happens in a hidden sibling under an inter-process lock, and one rename publishes it. A process that dies leaves
its sibling behind; the next one to take the lock removes it. Knows nothing of models or networks.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from daedal.errors import SourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file, which ends with the process at the latest; `waiting` is called if another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which becomes `target` when the block ends well and vanishes otherwise.

    The caller holds the lock for `target`, so every older sibling is a dead process's and is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(stale)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


def require_space(directory: Path, need: int) -> None:
    """SourceError where the disk of `directory` has fewer than `need` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise SourceError(f"the disk of {directory} has {_mb(free)} free, {_mb(need)} are needed: {_REMEDY}")


@contextmanager
def disk_errors(directory: Path, need: int) -> Iterator[None]:
    """Turns whatever the disk of `directory` refuses into a SourceError. need: bytes that the whole work takes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise SourceError(
                f"the disk of {directory} refused to hold more ({os.strerror(error.errno)}), {_mb(need)} of free space "
                f"are needed: {_REMEDY}"
            ) from error
        raise SourceError(f"{directory} cannot be written ({error}): {_REMEDY}") from error


_REMEDY = "free some space, or set DAEDAL_CACHE to a directory on another disk"


def _mb(num_bytes: int) -> str:
    return f"{-(-num_bytes // 10**6)} MB"


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
