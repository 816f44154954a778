"""Names and counts of published checkpoints, and how a layout is told from the names in a directory."""

import pytest

from daedal import layouts, shapes
from daedal.config import ModelConfig
from daedal.errors import CheckpointError, ConfigError
from daedal.layouts import DEEPSEEK, TRANSFORMERS
from tests.tiny import tiny_config

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
FLASH = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "expert_dtype": "fp4",
    "quantization_config": QUANTIZATION,
}
PRO = FLASH | {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 384,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0],
}
V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "quantization_config": QUANTIZATION,
}


@pytest.mark.parametrize(
    ("published", "backbone", "all_of_it"), [(FLASH, 67_612, 69_187), (PRO, 142_773, 145_116), (V3, 90_427, 91_991)]
)
def test_the_published_checkpoints_have_as_many_tensors(
    published: dict[str, object], backbone: int, all_of_it: int
) -> None:
    config = ModelConfig.from_published(published)
    assert layouts.tensor_count(config, drafting=False) == backbone
    assert layouts.tensor_count(config, drafting=True) == all_of_it


# The measured table of V4-Pro: name, dtype, shape in the file, shape of the scales.
PRO_TENSORS = {
    "embed.weight": ("bfloat16", (129280, 7168), None),
    "head.weight": ("bfloat16", (129280, 7168), None),
    "norm.weight": ("bfloat16", (7168,), None),
    "hc_head_fn": ("float32", (4, 28672), None),
    "hc_head_base": ("float32", (4,), None),
    "hc_head_scale": ("float32", (1,), None),
    "layers.2.hc_attn_fn": ("float32", (24, 28672), None),
    "layers.2.hc_ffn_base": ("float32", (24,), None),
    "layers.2.hc_ffn_scale": ("float32", (3,), None),
    "layers.2.attn_norm.weight": ("bfloat16", (7168,), None),
    "layers.2.ffn_norm.weight": ("bfloat16", (7168,), None),
    "layers.2.attn.wq_a.weight": ("float8_e4m3fn", (1536, 7168), (12, 56)),
    "layers.2.attn.wq_b.weight": ("float8_e4m3fn", (65536, 1536), (512, 12)),
    "layers.2.attn.wkv.weight": ("float8_e4m3fn", (512, 7168), (4, 56)),
    "layers.2.attn.wo_a.weight": ("float8_e4m3fn", (16384, 4096), (128, 32)),
    "layers.2.attn.wo_b.weight": ("float8_e4m3fn", (7168, 16384), (56, 128)),
    "layers.2.attn.q_norm.weight": ("bfloat16", (1536,), None),
    "layers.2.attn.kv_norm.weight": ("bfloat16", (512,), None),
    "layers.2.attn.attn_sink": ("float32", (128,), None),
    "layers.2.attn.compressor.ape": ("float32", (4, 1024), None),
    "layers.1.attn.compressor.ape": ("float32", (128, 512), None),
    "layers.2.attn.compressor.wkv.weight": ("bfloat16", (1024, 7168), None),
    "layers.1.attn.compressor.wgate.weight": ("bfloat16", (512, 7168), None),
    "layers.2.attn.compressor.norm.weight": ("bfloat16", (512,), None),
    "layers.2.attn.indexer.wq_b.weight": ("float8_e4m3fn", (8192, 1536), (64, 12)),
    "layers.2.attn.indexer.weights_proj.weight": ("bfloat16", (64, 7168), None),
    "layers.2.attn.indexer.compressor.ape": ("float32", (4, 256), None),
    "layers.2.attn.indexer.compressor.wkv.weight": ("bfloat16", (256, 7168), None),
    "layers.2.attn.indexer.compressor.wgate.weight": ("bfloat16", (256, 7168), None),
    "layers.2.attn.indexer.compressor.norm.weight": ("bfloat16", (128,), None),
    "layers.2.ffn.gate.weight": ("bfloat16", (384, 7168), None),
    "layers.2.ffn.gate.tid2eid": ("int64", (129280, 6), None),
    "layers.3.ffn.gate.bias": ("float32", (384,), None),
    "layers.2.ffn.experts.383.w1.weight": ("float4_e2m1fn_x2", (3072, 3584), (3072, 224)),
    "layers.2.ffn.experts.0.w3.weight": ("float4_e2m1fn_x2", (3072, 3584), (3072, 224)),
    "layers.2.ffn.experts.0.w2.weight": ("float4_e2m1fn_x2", (7168, 1536), (7168, 96)),
    "layers.2.ffn.shared_experts.w1.weight": ("float8_e4m3fn", (3072, 7168), (24, 56)),
    "mtp.0.e_proj.weight": ("float8_e4m3fn", (7168, 7168), (56, 56)),
    "mtp.0.h_proj.weight": ("float8_e4m3fn", (7168, 7168), (56, 56)),
    "mtp.0.enorm.weight": ("bfloat16", (7168,), None),
    "mtp.0.hnorm.weight": ("bfloat16", (7168,), None),
    "mtp.0.norm.weight": ("bfloat16", (7168,), None),
    "mtp.0.hc_head_fn": ("float32", (4, 28672), None),
    "mtp.0.attn.wkv.weight": ("float8_e4m3fn", (512, 7168), (4, 56)),
    "mtp.0.ffn.gate.bias": ("float32", (384,), None),
    "mtp.0.ffn.experts.7.w2.weight": ("float4_e2m1fn_x2", (7168, 1536), (7168, 96)),
}


def test_v4_pro_is_described_as_it_was_published() -> None:
    config = ModelConfig.from_published(PRO)
    slots = [slot for slot in shapes.parameters(config) if slot.layer in (None, 1, 2, 3)] + shapes.drafting(config)
    found = {piece.name: piece for slot in slots for piece in layouts.pieces(slot, config, DEEPSEEK)}
    for name, (dtype, shape, scale) in PRO_TENSORS.items():
        piece = found[name]
        assert (piece.dtype, piece.stored_shape) == (dtype, shape), name
        assert (piece.scale and piece.scale.shape) == scale, name
        if piece.scale is not None:
            assert (piece.scale.name, piece.scale.dtype) == (name.removesuffix("weight") + "scale", "float8_e8m0fnu")


def test_bytes_of_a_piece_count_its_scales() -> None:
    config = ModelConfig.from_published(PRO)
    slot = next(slot for slot in shapes.parameters(config) if slot.name == "layers.2.mlp.experts.down_proj")
    piece = next(layouts.pieces(slot, config, DEEPSEEK))
    assert piece.nbytes == 7168 * 1536 + 7168 * 96
    sink = next(slot for slot in shapes.parameters(config) if slot.name == "layers.2.self_attn.sinks")
    assert next(layouts.pieces(sink, config, DEEPSEEK)).nbytes == 128 * 4


def test_v3_drafting_is_one_more_layer() -> None:
    config = ModelConfig.from_published(V3)
    names = {piece.name for slot in shapes.drafting(config) for piece in layouts.pieces(slot, config, TRANSFORMERS)}
    prefix = "model.layers.61."
    assert {f"{prefix}{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")} <= names
    assert f"{prefix}mlp.experts.255.up_proj.weight" in names
    copied = [piece.name for _, piece in layouts.copies(config)]
    assert copied == [f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight"]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "llama"])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_pieces_cover_each_slot_once_and_names_never_meet(family: str, layout: str) -> None:
    config = tiny_config(family, num_nextn_predict_layers=0 if family == "llama" else 1)
    chosen = layouts.choose(config, None if family == "llama" else layout)
    names = []
    for slot in shapes.parameters(config) + shapes.drafting(config):
        found = list(layouts.pieces(slot, config, chosen))
        assert sum(piece.nbytes for piece in found) == slot.nbytes
        names += [piece.name for piece in found]
    assert len(set(names)) == len(names)
    assert layouts.detect(names, config) == chosen
    assert layouts.spellings(names, chosen) == {name: name for name in names}


def test_what_transformers_writes_means_the_published_names() -> None:
    written = {
        "model.embed_tokens.weight": "embed.weight",
        "head.weight": "head.weight",
        "model.norm.weight": "norm.weight",
        "model.hc_head.hc_fn": "hc_head_fn",
        "model.layers.0.attn.norm.weight": "layers.0.attn.kv_norm.weight",
        "model.layers.0.attn.compressor.norm.weight": "layers.0.attn.compressor.norm.weight",
        "model.layers.0.hc_attn_base": "layers.0.hc_attn_base",
        "model.layers.0.attn.wq_a.weight_scale_inv": "layers.0.attn.wq_a.scale",
        "model.layers.10.ffn.experts.3.w1.weight": "layers.10.ffn.experts.3.w1.weight",
    }
    assert layouts.detect(written, tiny_config("deepseek_v4")) == DEEPSEEK
    assert layouts.spellings(written, DEEPSEEK) == {published: name for name, published in written.items()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layers.0.attn.wq_a.weight", "model.layers.0.self_attn.q_a_proj.weight"], "different layouts"),
        (["layers.0.attn.wq_a.weight", "model.layers.1.attn.wq_a.weight"], "different layouts"),
        (["model.layers.0.attn_norm.weight", "model.layers.1.input_layernorm.weight"], "different layouts"),
        (["blk.0.attn_q.weight"], "no tensor is named"),
    ],
)
def test_a_mixture_of_layouts_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layouts.detect(names, tiny_config("deepseek_v4"))


def test_two_spellings_of_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*head\.weight|head\.weight.*lm_head\.weight"):
        layouts.spellings(["lm_head.weight", "head.weight"], DEEPSEEK)


def test_layouts_that_a_family_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="'deepseek': llama"):
        layouts.choose(tiny_config("llama"), DEEPSEEK)
    with pytest.raises(ConfigError, match="'gguf'"):
        layouts.choose(tiny_config("deepseek_v4"), "gguf")


def test_dspark_shows_in_names_or_in_the_configuration() -> None:
    config = tiny_config("deepseek_v4")
    assert layouts.dspark_sign(["mtp.0.enorm.weight", "layers.0.attn.main_proj"], config) is None
    assert layouts.dspark_sign(["mtp.0.main_proj.weight"], config) == "tensor mtp.0.main_proj.weight"
    configured = tiny_config("deepseek_v4", dspark_block_size=5)
    assert layouts.dspark_sign([], configured) == "field dspark_block_size of config.json"
