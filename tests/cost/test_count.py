"""The counts of published models, against the numbers their papers and files give, and of small ones, by hand."""

import pytest

from daedal import layouts, shapes
from daedal.config import ModelConfig
from daedal.cost import count, presets
from daedal.cost.count import CostReport
from daedal.errors import ConfigError

K, M = 1024, 1024 * 1024
GIB = 1024**3
V2_LITE, V2, V3 = "deepseek-v2-lite", "deepseek-v2", "deepseek-v3"
V32, FLASH, PRO = "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro"
NAMES = (V2_LITE, V2, V3, V32, FLASH, PRO)


def _preset(name: str) -> ModelConfig:
    config = presets.read(name)
    assert config is not None
    return config


def _report(name: str, context: int = 4 * K) -> CostReport:
    return count.report(_preset(name), model=name, context=context)


def _within(published: float, rounding: float = 0.0) -> object:
    """Within 1 %, or the half unit by which a short published number is rounded."""
    return pytest.approx(published, rel=0.01, abs=rounding)


def test_presets_are_those_of_the_contract() -> None:
    assert presets.names() == NAMES
    assert presets.read("no-such-model") is None


@pytest.mark.parametrize(
    ("name", "total", "active", "drafting"),
    [
        (V2_LITE, 15.71, 2.45, 0.0),
        (V2, 235.74, 20.85, 0.0),
        (V3, 671.03, 36.63, 11.5),
        (V32, 671.88, 37.48, 11.6),
        (FLASH, 284.33, 13.27, 6.6),
        (PRO, 1573.0, 48.85, 25.8),
    ],
)
def test_published_parameter_counts(name: str, total: float, active: float, drafting: float) -> None:
    report = _report(name)
    assert round(report.total_params / 1e9, 2) == total
    assert round(report.active_params / 1e9, 2) == active
    assert report.drafting_params is not None
    assert report.drafting_params / 1e9 == _within(drafting)


@pytest.mark.parametrize(
    ("name", "bf16", "shipped", "mha", "gqa8"),
    [
        (V2_LITE, 31_104, 31_104, 221_184, 110_592),
        (V2, 69_120, 69_120, 3_932_160, 245_760),
        (V3, 70_272, 70_272, 3_997_696, 249_856),
        (V32, 85_888, 48_068, 3_997_696, 249_856),
        (FLASH, 6_880, 3_514.25, 1_409_024, 176_128),
        (PRO, 9_848, 5_031.4375, 3_997_696, 249_856),
    ],
)
def test_cache_bytes_per_token(name: str, bf16: int, shipped: float, mha: int, gqa8: int) -> None:
    report = _report(name)
    assert (report.kv_bytes_per_token_bf16, report.kv_bytes_per_token) == (bf16, shipped)
    assert (report.mha_kv_bytes_per_token, report.gqa8_kv_bytes_per_token) == (mha, gqa8)


@pytest.mark.parametrize(
    ("context", "name", "shipped", "gqa8", "mha"),
    [
        (128 * K, V2_LITE, 3.80, 13.5, 27),
        (128 * K, V2, 8.44, 30, 480),
        (128 * K, V3, 8.58, 30.5, 488),
        (128 * K, V32, 5.87, 30.5, 488),
        (128 * K, FLASH, 0.432, 21.5, 172),
        (128 * K, PRO, 0.618, 30.5, 488),
        (M, V2_LITE, 30.4, 108, 216),
        (M, V2, 67.5, 240, 3840),
        (M, V3, 68.6, 244, 3904),
        (M, V32, 46.9, 244, 3904),
        (M, FLASH, 3.44, 172, 1376),
        (M, PRO, 4.92, 244, 3904),
    ],
)
def test_cache_gibibytes_of_a_sequence(context: int, name: str, shipped: float, gqa8: float, mha: float) -> None:
    report = _report(name, context)
    assert report.kv_bytes_at_context / GIB == _within(shipped)
    assert report.gqa8_kv_bytes_at_context / GIB == _within(gqa8)
    assert report.mha_kv_bytes_at_context / GIB == _within(mha)


@pytest.mark.parametrize(
    ("name", "linear", "attention", "indexer", "weighted"),
    [(V32, 74, 34.8, 1048, 596), (PRO, 98, 76.7, 128.8, 158), (FLASH, 26, 23.6, 90.2, 59)],
)
def test_decode_gigaflops_at_1m(name: str, linear: float, attention: float, indexer: float, weighted: float) -> None:
    report = _report(name, M)
    # Published in whole gigaflops, V3.2's from 37 billion parameters.
    assert report.decode_flops_linear / 1e9 == _within(linear, rounding=1.0)
    assert report.decode_flops_attention / 1e9 == _within(attention)
    assert report.decode_flops_indexer / 1e9 == _within(indexer)
    assert report.decode_flops_weighted / 1e9 == _within(weighted)


def test_heavy_entries_are_the_larger_part_of_pro_at_1m() -> None:
    report = _report(PRO, M)
    window = 4 * 128 * 512 * 128
    parts = report.decode_flops_attention_by_kind
    assert (parts["sparse"] + 30 * window) / 1e9 == _within(9.1)
    assert (parts["heavy"] + 31 * window) / 1e9 == _within(67.6)


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [
        (V3, (144, 631, 2301, 17_890)),
        (V32, (113, 142, 240, 1157)),
        (PRO, (109, 114, 133, 304)),
        (FLASH, (29, 32, 42, 140)),
    ],
)
def test_decode_flops_along_the_context(name: str, gigaflops: tuple[float, ...]) -> None:
    for context, published in zip((4 * K, 32 * K, 128 * K, M), gigaflops, strict=True):
        assert _report(name, context).decode_flops_per_token / 1e9 == _within(published, rounding=0.7)


def test_v4_beside_v32_at_1m() -> None:
    v32, flash, pro = (_report(name, M) for name in (V32, FLASH, PRO))
    assert v32.kv_bytes_at_context / pro.kv_bytes_at_context == _within(9.5)
    assert v32.kv_bytes_at_context / flash.kv_bytes_at_context == _within(13.7)
    assert v32.kv_bytes_at_context_bf16 / pro.kv_bytes_at_context_bf16 == _within(8.7)
    assert pro.kv_bytes_at_context_bf16 / GIB == _within(9.62)
    assert pro.decode_flops_weighted / v32.decode_flops_weighted == _within(0.265)
    assert flash.decode_flops_weighted / v32.decode_flops_weighted == _within(0.099)


@pytest.mark.parametrize(("name", "backbone", "whole"), [(FLASH, 67_612, 69_187), (PRO, 142_773, 145_116)])
def test_published_tensor_counts(name: str, backbone: int, whole: int) -> None:
    report = _report(name)
    assert (report.checkpoint_tensors, report.checkpoint_tensors_with_drafting) == (backbone, whole)


def test_tensors_and_bytes_are_those_of_the_layouts() -> None:
    short = {"num_hidden_layers": 3, "layer_types": (), "mlp_layer_types": ("dense", "sparse", "sparse")}
    unshared = _preset(V3).replace(n_shared_experts=0, **short)
    for config in (_dense(), _compressed(), unshared, _preset(V2), _preset(V32)):
        report = count.report(config, model="any", context=1)
        assert report.checkpoint_tensors == layouts.tensor_count(config, drafting=False)
        assert report.checkpoint_tensors_with_drafting == layouts.tensor_count(config, drafting=True)
        layout = layouts.choose(config, None)
        pieces = [piece for slot in shapes.parameters(config) for piece in layouts.pieces(slot, config, layout)]
        assert report.weight_bytes == sum(piece.nbytes for piece in pieces)


def test_weights_as_shipped() -> None:
    """A published repacking of Flash that keeps every number format has 156.1 GB, drafting left out."""
    report = _report(FLASH)
    assert report.weight_bytes / 1e9 == _within(156.1)
    experts = report.params_by_role["routed_expert"]
    assert report.weight_bytes_by_role["routed_expert"] == experts // 2 + experts // 32
    hash_tables = 3 * 129280 * 6 * 8
    assert report.weight_bytes_by_role["hash_table"] == hash_tables
    assert report.weight_bytes_bf16 == 2 * report.total_params + hash_tables
    assert _report(V2).weight_bytes == _report(V2).weight_bytes_bf16 == 2 * _report(V2).total_params


@pytest.mark.parametrize("context", [1, 127, 300 * K])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_the_whole(name: str, context: int) -> None:
    report, flat = _report(name, context), _report(name, context).flat()
    assert sum(report.params_by_role.values()) == report.total_params
    assert sum(report.weight_bytes_by_role.values()) == report.weight_bytes
    attention = sum(report.decode_flops_attention_by_kind.values())
    assert attention == report.decode_flops_attention
    assert report.decode_flops_linear == 2 * report.active_params
    assert report.decode_flops_linear + attention + report.decode_flops_indexer == report.decode_flops_per_token
    assert flat.keys() == _report(V3).flat().keys()
    assert flat["weight_bytes_routed_expert"] == report.weight_bytes_by_role["routed_expert"]
    assert flat["decode_flops_attention_latent"] == report.decode_flops_attention_by_kind["latent"]


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
    assert report.decode_flops_weighted == report.decode_flops_per_token
    assert report.gqa8_kv_bytes_per_token == report.mha_kv_bytes_per_token == 2 * (2 * 3 * 4) * 2
    assert report.weight_bytes == 2 * report.total_params


def test_comparison_uses_the_number_format_of_the_model() -> None:
    halves, singles = (
        count.report(_dense(torch_dtype=dtype), model="tiny", context=1) for dtype in ("bfloat16", "float32")
    )
    assert singles.mha_kv_bytes_per_token == 2 * halves.mha_kv_bytes_per_token
    assert singles.kv_bytes_per_token == 2 * halves.kv_bytes_per_token
    assert singles.kv_bytes_per_token_bf16 == halves.kv_bytes_per_token


def _compressed(**changes: object) -> ModelConfig:
    """One layer of each kind: window only (hash-routed), sparse, heavy; and one drafting module."""
    published: dict[str, object] = {
        "model_type": "deepseek_v4",
        "vocab_size": 11,
        "hidden_size": 16,
        "moe_intermediate_size": 6,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 4,
        "max_position_embeddings": 512,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 128, 0],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 3,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "hc_mult": 2,
        "num_nextn_predict_layers": 1,
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]},
        "torch_dtype": "bfloat16",
    }
    return ModelConfig.from_published(published | changes)


HYPER = 2 * (8 * 32 + 8 + 3)
ATTENTION = 8 * 16 + 64 * 8 + 16 * 16 + 16 * 32 + 16 * 16 + 4
EXPERT = 3 * 6 * 16
LAYER = HYPER + (ATTENTION + 8 + 16) + 2 * 16 + 4 * 16 + 5 * EXPERT
SPARSE = (2 * 32 * 16 + 4 * 32 + 16) + (2 * 16 * 16 + 4 * 16 + 8) + 16 * 8 + 2 * 16
HEAVY = 2 * 16 * 16 + 128 * 16 + 16
ENDS = 2 * 11 * 16 + 16 + (2 * 32 + 2 + 1)


def test_compressed_model_counted_by_hand() -> None:
    report = count.report(_compressed(), model="tiny", context=300)
    bias = 4
    assert report.total_params == 3 * LAYER + 2 * bias + SPARSE + HEAVY + ENDS
    assert report.active_params == report.total_params - 11 * 16 - 3 * 2 * EXPERT
    assert report.drafting_params == LAYER + bias + 3 * 16 + 2 * 16 * 16 + (2 * 32 + 2 + 1)

    fp4_expert = EXPERT // 2 + 6 + 6 + 16
    fp8_attention = ATTENTION + (2 + 8 + 4 + 8 + 4) + 3 * 4
    weights = report.weight_bytes_by_role
    assert weights["routed_expert"] == 3 * 4 * fp4_expert
    assert weights["attention"] == 3 * fp8_attention
    assert weights["shared_expert"] == 3 * (EXPERT + 3 * 2)
    assert weights["hash_table"] == 11 * 2 * 8

    row, key = 24, 5  # 12 + 1 + 2 * 4 padded to 8; 8 / 2 + 1
    assert report.kv_bytes_per_token == (row + key) / 4 + row / 128
    assert report.kv_bytes_per_token_bf16 == (32 + 16) / 4 + 32 / 128
    assert report.kv_bytes_at_context == 3 * 8 * row + 75 * (row + key) + 2 * row
    assert report.state_bytes == 8 * (2 * 32) * 4 + 8 * (2 * 16) * 4 + 128 * (2 * 16) * 4
    assert report.mha_kv_bytes_per_token == report.gqa8_kv_bytes_per_token == 3 * 4 * 2 * 128 * 2

    per_row, per_key = 2 * 2 * 4 * 16, 2 * 2 * 8
    parts = {"full": 0, "latent": 0, "window": 3 * 8 * per_row, "sparse": 3 * per_row, "heavy": 2 * per_row}
    assert report.decode_flops_attention_by_kind == parts
    assert report.decode_flops_indexer == 75 * per_key
    assert report.decode_flops_weighted == report.active_params + sum(parts.values()) + 75 * per_key // 4


@pytest.mark.parametrize(("context", "window", "entries"), [(1, 1, 0), (3, 3, 0), (4, 4, 1), (9, 8, 2)])
def test_sequences_shorter_than_the_window_or_an_entry(context: int, window: int, entries: int) -> None:
    report = count.report(_compressed(), model="tiny", context=context)
    assert report.kv_bytes_at_context == 3 * window * 24 + entries * 29
    assert report.decode_flops_attention == (3 * window + entries) * 256
    assert report.decode_flops_indexer == entries * 32
    assert report.state_bytes == count.report(_compressed(), model="tiny", context=300).state_bytes


def test_the_indexer_bounds_what_latent_attention_reads() -> None:
    short, at_top, long = (_report(V32, context) for context in (1000, 2048, 5000))
    assert short.decode_flops_attention * 2048 == at_top.decode_flops_attention * 1000
    assert long.decode_flops_attention == at_top.decode_flops_attention
    assert long.decode_flops_indexer == 61 * 2 * 64 * 128 * 5000


def test_drafting_modules_that_daedal_does_not_know_are_not_counted() -> None:
    report = count.report(_compressed(dspark_block_size=5), model="tiny", context=1)
    assert report.drafting_params is None
    assert report.drafting_weight_bytes is None
    assert report.checkpoint_tensors_with_drafting is None
    assert report.total_params == count.report(_compressed(), model="tiny", context=1).total_params


@pytest.mark.parametrize("name", [V3, V32])
def test_cache_bytes_are_those_of_the_shapes(name: str) -> None:
    assert _report(name).kv_bytes_per_token == sum(slot.nbytes for slot in shapes.cache(_preset(name)))


def test_a_context_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="context is 0"):
        _report(V3, 0)
