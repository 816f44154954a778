"""The few published models that `daedal cost` knows by name, read from `presets.toml` beside this file.

Each is a published configuration, so it takes the same way into the house as a checkpoint's config.json. Knows nothing
of checkpoints, and of no model that is not in the file.
"""

import tomllib
from importlib import resources

from daedal.config import ModelConfig


def names() -> tuple[str, ...]:
    """The names that `read` knows."""
    return tuple(_table())


def read(name: str) -> ModelConfig | None:
    """The configuration called `name`, None if there is none."""
    published = _table().get(name)
    # TOML cannot say null, which is how a published file says that queries are not compressed.
    return None if published is None else ModelConfig.from_published({"q_lora_rank": None, **published})


def _table() -> dict[str, dict[str, object]]:
    text = resources.files("daedal.cost").joinpath("presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
