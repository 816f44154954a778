"""`daedal version`: which Daedal this is. Knows nothing else."""

from daedal import __version__


def command() -> None:
    """Print the version."""
    print(__version__)
