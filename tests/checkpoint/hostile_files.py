"""Targets for `tests.hostile` among the files of checkpoints: safetensors, their index, config.json, GGUF."""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from daedal.checkpoint.gguf_import import import_gguf
from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.checkpoint.shards import Shards
from daedal.config import ModelConfig
from tests.hostile import JSON, Target, altered, edited, lying_header
from tests.tiny import tiny_model, tiny_published
from tests.tiny_gguf import write_gguf

_FAMILIES = ("llama", "qwen2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")
_INDEX = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
_HEAD = 4096  # bytes where the headers of these files lie


@dataclass(frozen=True, kw_only=True)
class Originals:
    """Whole files, before they are damaged."""

    weights: bytes
    config: str
    gguf: bytes


@cache
def originals() -> Originals:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save(tiny_model("deepseek_v3"), directory)
        write_gguf(directory / "model.gguf")
        return Originals(
            weights=(directory / "model.safetensors").read_bytes(),
            config=(directory / "config.json").read_text(encoding="utf-8"),
            gguf=(directory / "model.gguf").read_bytes(),
        )


def read_weights(content: bytes, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(content)
    shards = Shards(directory)
    for name in sorted(shards.files):
        assert tuple(shards.read(name).shape) == shards.shape(name)


def load_weights(content: bytes, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(content)
    (directory / "config.json").write_text(originals().config, encoding="utf-8")
    load(directory, device="cpu")


def read_index(content: Any, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(originals().weights)
    (directory / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    Shards(directory)


def read_config(content: Any, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    config = ModelConfig.read(directory)
    assert ModelConfig.from_published(config.to_published()) == config


def read_gguf(content: bytes, directory: Path) -> None:
    (directory / "model.gguf").write_bytes(content)
    import_gguf(directory / "model.gguf", directory)


TARGETS = (
    Target(
        name="safetensors, damaged",
        examples=st.deferred(lambda: edited(originals().weights, _HEAD)),
        check=read_weights,
    ),
    Target(
        name="safetensors, lying", examples=st.deferred(lambda: lying_header(originals().weights)), check=load_weights
    ),
    Target(name="an index", examples=altered(_INDEX) | JSON, check=read_index),
    *(
        Target(name=f"config.json of {family}", examples=altered(tiny_published(family)), check=read_config)
        for family in _FAMILIES
    ),
    Target(name="gguf", examples=st.deferred(lambda: edited(originals().gguf, _HEAD)), check=read_gguf),
)
