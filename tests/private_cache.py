"""A user's cache of a test's own, so that packing temporary checkpoints leaves nothing behind."""

from pathlib import Path

from daedal.places import cache_directory


def private_cache(directory: Path) -> Path:
    """Makes `directory` a cache that shares the compiled kernels, which take long to make, and nothing else."""
    native = cache_directory() / "native"
    native.mkdir(parents=True, exist_ok=True)
    directory.mkdir()
    (directory / "native").symlink_to(native, target_is_directory=True)
    return directory
