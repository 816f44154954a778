"""The real default model, fetched once into the user's cache, for the tests that need true weights."""

from pathlib import Path

from daedal.checkpoint.sources import SMOLLM2, resolve


def smollm2_directory() -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct; the first call on a machine fetches it."""
    return resolve(SMOLLM2.name)
