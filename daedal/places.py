"""Where Daedal keeps what it fetched or made: models, packed weights, kernels; and models that come with the code."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$DAEDAL_CACHE`, else `$XDG_CACHE_HOME/daedal`, else `~/.cache/daedal`; it need not exist yet."""
    if chosen := os.environ.get("DAEDAL_CACHE"):
        return Path(chosen).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "daedal"
    return Path.home() / ".cache" / "daedal"


def bundles() -> dict[str, Path]:
    """The models that come with the package, each as what it does not share with another (`checkpoint.bundles`)."""
    found = sorted((Path(__file__).resolve().parent / "bundled").glob("*/bundle.json"))
    return {path.parent.name: path.parent for path in found}
