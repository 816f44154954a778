"""A converted model beside the one that it was made of, for the page: what a token costs with each, how well they do.

The original's config.json and the measured quality lie in `original.json` beside the weights; costs are counted here
from both configurations, as `daedal cost` counts them, so they cannot drift from what is served. Knows no tensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daedal.config import ModelConfig
from daedal.cost import count
from daedal.errors import CheckpointError
from daedal.text.files import read_optional

ORIGINAL = "original.json"
CONTEXT = 4096
"""Tokens before the one whose work is counted."""


def describe_original(name: str, original: Path, *, perplexity_ratio: float) -> str:
    """What `original.json` says. original: the checkpoint called `name`; perplexity_ratio: of the converted to it."""
    published = json.loads((original / "config.json").read_text(encoding="utf-8"))
    said = {"name": name, "perplexity_ratio": perplexity_ratio, "config": published}
    return json.dumps(said, indent=1) + "\n"


def beside_original(directory: Path, name: str, config: ModelConfig) -> tuple[Mapping[str, Any], ...]:
    """The model, then its original, each with the bytes that the cache keeps of a token, parameters that a token meets,
    its FLOPs after CONTEXT others, and perplexity over the original's; nothing where no original is known.

    CheckpointError where `original.json` is not what it should be.
    """
    path = directory / ORIGINAL
    said: dict[str, Any] = read_optional(path)
    if not said:
        return ()
    try:
        rows = ((name, config, float(said["perplexity_ratio"])), (str(said["name"]), _config(said["config"]), 1.0))
        return tuple(_row(*row) for row in rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model ({error!r}): restore or remove it") from error


def _config(published: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_published(published)


def _row(name: str, config: ModelConfig, ratio: float) -> dict[str, Any]:
    counted = count.report(config, model=name, context=min(CONTEXT, config.max_position_embeddings))
    return {
        "name": name,
        "context": counted.context,
        "kv_bytes_per_token": counted.kv_bytes_per_token,
        "active_params": counted.active_params,
        "decode_flops_per_token": counted.decode_flops_per_token,
        "perplexity_ratio": ratio,
    }
