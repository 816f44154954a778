"""The counts of published models, against the numbers their papers and files give."""

import pytest

from daedal import shapes
from daedal.config import ModelConfig
from daedal.cost import count, presets
from daedal.errors import ConfigError

K = 1024


def _report(name: str, context: int = 4 * K) -> count.CostReport:
    config = presets.read(name)
    assert config is not None
    return count.report(config, model=name, context=context)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("deepseek-v2-lite", 15.71, 2.45), ("deepseek-v2", 235.74, 20.85), ("deepseek-v3", 671.03, 36.63)],
)
def test_published_parameter_counts(name: str, total: float, active: float) -> None:
    report = _report(name)
    assert round(report.total_params / 1e9, 2) == total
    assert round(report.active_params / 1e9, 2) == active


@pytest.mark.parametrize(
    ("name", "latent", "mha", "gqa8"),
    [
        ("deepseek-v2-lite", 31_104, 221_184, 110_592),
        ("deepseek-v2", 69_120, 3_932_160, 245_760),
        ("deepseek-v3", 70_272, 3_997_696, 249_856),
    ],
)
def test_cache_beside_mha_and_gqa8(name: str, latent: int, mha: int, gqa8: int) -> None:
    report = _report(name, 128 * K)
    per_token = (report.kv_bytes_per_token, report.mha_kv_bytes_per_token, report.gqa8_kv_bytes_per_token)
    at_context = (report.kv_bytes_at_context, report.mha_kv_bytes_at_context, report.gqa8_kv_bytes_at_context)
    assert per_token == (latent, mha, gqa8)
    assert at_context == tuple(128 * K * value for value in per_token)


@pytest.mark.parametrize(("context", "gigaflops"), [(4 * K, 144), (32 * K, 631), (128 * K, 2301)])
def test_decode_flops_of_v3(context: int, gigaflops: float) -> None:
    assert _report("deepseek-v3", context).decode_flops_per_token / 1e9 == pytest.approx(gigaflops, rel=0.01)


def _dense(**changes: object) -> ModelConfig:
    published: dict[str, object] = {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
    return ModelConfig.from_published(published | changes)


@pytest.mark.parametrize("tied", [False, True])
def test_dense_model_counted_by_hand(tied: bool) -> None:
    config = _dense(tie_word_embeddings=tied)
    layer = 6 * 12 + 2 * 6 * 4 + 12 * 6 + 3 * 6 * 5 + 2 * 6
    table, backbone = 11 * 6, 2 * layer + 6
    report = count.report(config, model="tiny", context=10)
    assert report.total_params == backbone + (table if tied else 2 * table)
    assert report.active_params == backbone + table
    assert report.kv_bytes_per_token == 2 * (2 * 1 * 4) * 2
    assert report.decode_flops_per_token == 2 * report.active_params + 10 * 2 * (4 * 3 * 4)
    assert report.gqa8_kv_bytes_per_token == report.mha_kv_bytes_per_token == 2 * (2 * 3 * 4) * 2


def test_comparison_uses_the_number_format_of_the_cache() -> None:
    halves, singles = (
        count.report(_dense(torch_dtype=dtype), model="tiny", context=1) for dtype in ("bfloat16", "float32")
    )
    assert singles.mha_kv_bytes_per_token == 2 * halves.mha_kv_bytes_per_token
    assert singles.kv_bytes_per_token == 2 * halves.kv_bytes_per_token


def test_cache_bytes_are_those_of_the_shapes() -> None:
    config = presets.read("deepseek-v3")
    assert config is not None
    assert _report("deepseek-v3").kv_bytes_per_token == sum(slot.nbytes for slot in shapes.cache(config))


def test_models_to_come_are_refused_and_unknown_names_left_to_others() -> None:
    for name in presets.NOT_YET:
        with pytest.raises(ConfigError, match=f"{name} is not supported yet"):
            presets.read(name)
    assert presets.read("no-such-model") is None
    with pytest.raises(ConfigError, match="context is 0"):
        _report("deepseek-v3", 0)
