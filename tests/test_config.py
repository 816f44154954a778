"""Configurations: legacy spellings, round trips, and one clear sentence for each bad field."""

import pytest
import transformers

from daedal import shapes
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from tests.tiny import FAMILIES, tiny_config, tiny_published

V3 = "deepseek_v3"


@pytest.mark.parametrize("family", FAMILIES)
def test_published_round_trip(family: str) -> None:
    config = tiny_config(family)
    assert ModelConfig.from_published(config.to_published()) == config


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ],
)
def test_old_rope_spellings_mean_the_new_one(old: dict[str, object]) -> None:
    new = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
    published = tiny_published(V3)
    del published["rope_theta"]
    assert ModelConfig.from_published({**published, **old}) == ModelConfig.from_published(
        {**published, "rope_parameters": new}
    )


def test_v3_lengthens_the_softmax_scale_and_leaves_the_rotation() -> None:
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    rope = tiny_config(V3, rope_scaling=yarn).rope_parameters
    assert rope.length_scale() == pytest.approx(1.8739, abs=1e-4)
    assert rope.rotation_scale() == 1.0


def test_sparse_layers_follow_first_k_and_frequency() -> None:
    config = tiny_config(V3, num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert config.mlp_layer_types == ("dense", "dense", "sparse", "dense", "sparse", "dense")
    assert ModelConfig.from_published(config.to_published()) == config


def test_v3_shape_has_the_published_size() -> None:
    config = ModelConfig.from_published(
        {
            "model_type": V3,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
        }
    )
    assert sum(slot.numel for slot in shapes.parameters(config)) == 671_026_419_200
    assert sum(slot.nbytes for slot in shapes.cache(config)) == 70_272


BAD = {
    "hidden_size": (0, "hidden_size"),
    "vocab_size": (-5, "vocab_size"),
    "num_hidden_layers": (2**40, "num_hidden_layers"),
    "num_attention_heads": ("six", "num_attention_heads"),
    "intermediate_size": (1.5, "intermediate_size"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps"),
    "max_position_embeddings": (0, "max_position_embeddings"),
    "hidden_act": ("gelu", "hidden_act"),
    "tie_word_embeddings": ("yes", "tie_word_embeddings"),
    "eos_token_id": (-1, "special token"),
    "dtype": ("int8", "dtype"),
    "qk_rope_head_dim": (7, "even"),
    "n_group": (5, "groups must be of equal size"),
    "topk_group": (9, "topk_group"),
    "num_experts_per_tok": (7, "only 6 experts"),
    "scoring_func": ("softmax", "scoring_func"),
    "routed_scaling_factor": (float("inf"), "routed_scaling_factor"),
    "mlp_layer_types": (["dense"], "give one per layer"),
    "rope_scaling": ({"type": "longrope"}, "longrope"),
    "quantization_config": ({"quant_method": "awq"}, "awq"),
    "kv_lora_rank": (0, "kv_lora_rank"),
    "first_k_dense_replace": ("one", "first_k_dense_replace"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_field_is_named(field: str) -> None:
    value, message = BAD[field]
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(V3, **{field: value})
    assert "\n" not in str(caught.value)


def test_null_means_absent_except_where_it_is_an_answer() -> None:
    sixteen = {"n_routed_experts": 16}  # which the family's silent 8 groups divide
    nulls = {
        "scoring_func": None,
        "topk_method": None,
        "routed_scaling_factor": None,
        "n_group": None,
        "topk_group": None,
    }
    absent = {name: value for name, value in tiny_published(V3).items() if name not in nulls}
    assert tiny_config(V3, **nulls, **sixteen) == ModelConfig.from_published({**absent, **sixteen})
    assert tiny_config(V3, q_lora_rank=None).q_lora_rank is None
    assert tiny_config(V3, n_shared_experts=None).n_shared_experts == 0


def test_the_older_rope_spelling_counts_where_both_are_given() -> None:
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert tiny_config("llama", **both).rope_parameters.rope_type == "linear"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": ["yarn"]},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
        {"rope_type": "yarn", "factor": 2.0, "truncate": "no"},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    ],
)
def test_rope_that_cannot_turn_is_refused(rope: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"rope_type|rope_theta|truncate|high_freq_factor"):
        tiny_config("llama", rope_parameters=rope, original_max_position_embeddings=64)


def test_a_window_that_reaches_no_layer_is_none() -> None:
    tiny_config("qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=3)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        tiny_config("llama", num_key_value_heads=4)
    with pytest.raises(ConfigError, match="sliding"):
        tiny_config("qwen2", use_sliding_window=True, sliding_window=128)
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        tiny_config(
            "llama", rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
        )
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        tiny_config("deepseek_v2", norm_topk_prob=True)
    published = tiny_published("llama")
    del published["hidden_size"]
    with pytest.raises(ConfigError, match="`hidden_size` is missing"):
        ModelConfig.from_published(published)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hc_sinkhorn_iters", 10**6), ("num_nextn_predict_layers", 10**9), ("num_nextn_predict_layers", -1)],
)
def test_counts_that_would_keep_a_reader_busy_for_ever_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"`{field}` is {value}: it must be a whole number from"):
        tiny_config("deepseek_v4", **{field: value})


def test_v4_ignores_what_its_readers_ignore() -> None:
    left_over = tiny_config("deepseek_v4", n_group=4, topk_group=2, norm_topk_prob=False)
    assert left_over == tiny_config("deepseek_v4")


def test_layers_of_a_silent_v4_file_are_those_that_transformers_assumes() -> None:
    published = tiny_published("deepseek_v4", num_hidden_layers=7)
    del published["compress_ratios"]
    theirs = transformers.DeepseekV4Config(num_hidden_layers=7)
    assert list(ModelConfig.from_published(published).layer_types) == theirs.layer_types


def test_the_rotated_part_of_v4_as_a_share() -> None:
    assert tiny_config("deepseek_v4", qk_rope_head_dim=None, partial_rotary_factor=0.4).rope_dim == 8
    assert tiny_config("deepseek_v4", partial_rotary_factor=0.4).rope_dim == 8
    with pytest.raises(ConfigError, match="they contradict each other"):
        tiny_config("deepseek_v4", partial_rotary_factor=0.8)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        tiny_config("deepseek_v4", qk_rope_head_dim=None, partial_rotary_factor=float("nan"))


def test_v4_with_a_tied_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="`tie_word_embeddings` is true: V4 has a head of its own"):
        tiny_config("deepseek_v4", tie_word_embeddings=True)
