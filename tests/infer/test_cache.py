"""The cache holds what `shapes.cache` lists, to the byte, and gives back what was stored and nothing else."""

import pytest
import torch

from daedal import shapes
from daedal.config import ModelConfig
from daedal.infer.cache import PagedCache, page_nbytes
from tests.infer.models import tiny


def deepseek_v3() -> ModelConfig:
    """V3's attention, without the experts, which the cache never sees."""
    return ModelConfig.from_published(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 163840,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 61,
        }
    )


def test_v3_keeps_576_numbers_per_token_and_layer() -> None:
    config = deepseek_v3()
    cache = PagedCache(config, num_pages=3, page_size=16, dtype=torch.bfloat16)
    assert cache.nbytes == 576 * 61 * 2 * 3 * 16
    assert cache.nbytes == sum(slot.nbytes for slot in shapes.cache(config)) * 3 * 16
    assert cache.nbytes == 3 * page_nbytes(config, 16, torch.bfloat16)
    assert {layer: list(pools) for layer, pools in cache.pools.items()} == {layer: ["latent"] for layer in range(61)}


def test_rows_come_back_from_scattered_pages_and_nothing_else_is_touched() -> None:
    config = tiny("dense").config
    cache = PagedCache(config, num_pages=5, page_size=2, dtype=torch.float32)
    for pools in cache.pools.values():
        for pool in pools.values():
            pool.fill_(torch.nan)
    generator = torch.Generator().manual_seed(3)
    key_TGK, value_TGK = torch.randn(2, 6, 2, 8, generator=generator)
    tables = [(4, 1), (2,)]
    first = cache.view(tables, [0, 0], [2, 1])
    second = cache.view(tables, [2, 1], [2, 1])
    for layer in (0, 1):
        first.append(layer, key=key_TGK[:3] + layer, value=value_TGK[:3])
        second.append(layer, key=key_TGK[3:] + layer, value=value_TGK[3:])
        rows = second.read(layer)
        assert torch.equal(rows["key"].sequence(0), key_TGK[[0, 1, 3, 4]] + layer)
        assert torch.equal(rows["value"].sequence(1), value_TGK[[2, 5]])
        assert rows["key"].lengths == (4, 2)
        assert first.read(layer)["key"].lengths == (2, 1)
    for pools in cache.pools.values():
        assert all(pool[[0, 3]].isnan().all() and not pool[[1, 2, 4]].isnan().any() for pool in pools.values())


def test_a_layer_that_stores_other_slots_is_refused() -> None:
    cache = PagedCache(tiny("latent").config, num_pages=1, page_size=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"stores \['key'\].*keeps \['latent'\]"):
        cache.view([(0,)], [0], [1]).append(0, key=torch.zeros(1, 14))
