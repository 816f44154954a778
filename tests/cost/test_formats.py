"""Sizes of packed weights and cached rows, which the planner counts without torch, against the rooms that make them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from daedal import packed, shapes
from daedal.checkpoint.load import load
from daedal.cost import cached, formats, presets
from daedal.errors import ConfigError
from daedal.infer.cache import page_nbytes
from daedal.model.transformer import Transformer
from daedal.ops.packed import Packed
from tests.private_cache import private_cache
from tests.tiny import tiny_checkpoint, tiny_config

FAMILIES = ("llama", "qwen2", "deepseek_v2", "deepseek_v32", "deepseek_v4")


@pytest.mark.parametrize("form", packed.WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_take_what_a_loaded_model_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, form: str
) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(private_cache(tmp_path / "cache")))
    directory = tiny_checkpoint(tmp_path / "tiny", family, tie_word_embeddings=family in ("qwen2", "deepseek_v2"))
    model = load(directory, weights=form)
    slots = shapes.parameters(model.config)
    found = list(formats.held(model.config, slots, form))
    matrices = [one for module in model.modules() for one in vars(module).values() if isinstance(one, Packed)]
    plain = [tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)]
    held = sum(one.data.numel() for one in matrices) + sum(tensor.nbytes for tensor in plain)
    assert matrices
    assert sum(one.nbytes for one in found) == held
    # What is looked up, and one of the two copies of latent attention's keys, is not read by a pass.
    keys = sum(one.data.numel() for name, one in _named(model) if name == "keys")
    embedding = 0 if model.lm_head.weight is None else model.embed_tokens.weight.nbytes
    tables = sum(slot.nbytes for slot in slots if slot.role == "hash_table")
    assert sum(one.read for one in found) == held - keys - embedding - tables


def _named(model: Transformer) -> Iterator[tuple[str, Packed]]:
    for module in model.modules():
        yield from ((name, one) for name, one in vars(module).items() if isinstance(one, Packed))


@pytest.mark.parametrize("name", presets.names())
def test_cached_rows_take_what_the_cache_allocates(name: str) -> None:
    config = presets.read(name)
    assert config is not None
    grows = [slot for slot in shapes.cache(config) if not slot.ring]
    for kv_dtype, asked in (("bf16", "auto"), ("fp8", "fp8")):
        size = cached.size_of(kv_dtype, shapes.cache(config))
        page = sum(128 // slot.rate * size(slot) for slot in grows)
        assert page == page_nbytes(config, 128, torch.bfloat16, kv_dtype="fp8" if asked == "fp8" else "auto")


def test_formats_that_do_not_exist_or_pack_nothing_are_refused() -> None:
    config = tiny_config("llama")
    with pytest.raises(ConfigError, match="--weights is 'int3': it may be shipped, bf16"):
        list(formats.held(config, shapes.parameters(config), "int3"))
    with pytest.raises(ConfigError, match="fp8 packs the rows of latent attention"):
        cached.size_of("fp8", shapes.cache(config))
    with pytest.raises(ConfigError, match="--kv-cache-dtype is 'fp3'"):
        cached.size_of("fp3", shapes.cache(config))
