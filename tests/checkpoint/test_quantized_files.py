"""Quantised checkpoints: transformers reads what we write, to the bit; other storage of the same numbers; damage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.errors import CheckpointError, ConfigError
from daedal.ops import formats
from tests.checkpoint.quantizable import FORMATS, edit, quantized

IDS_BT = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("family", "to", "layout"), FORMATS)
def test_transformers_reads_the_same_numbers(tmp_path: Path, family: str, to: str, layout: str | None) -> None:
    directory = quantized(tmp_path, family, to, layout)
    oracle, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    # The drafting module of V3 is the layer after the last, which transformers knows by its number in the real model.
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])
    model = load(directory, dtype=torch.float32)
    theirs = oracle.state_dict()
    for name, mine in model.state_dict().items():
        assert torch.equal(mine, theirs[name if name.startswith("lm_head") else f"model.{name}"].to(mine.dtype)), name
    with torch.no_grad():
        assert (model.logits(IDS_BT) - oracle.float()(IDS_BT).logits).abs().max() <= 1e-4


def test_each_matrix_stands_for_codes_times_scales(tmp_path: Path) -> None:
    directory = quantized(tmp_path, "deepseek_v4", "fp4")
    tensors = load_file(directory / "model.safetensors")
    model = load(directory, dtype=torch.float32)
    up = tensors["layers.2.ffn.experts.3.w3.weight"], tensors["layers.2.ffn.experts.3.w3.scale"]
    assert (up[0].dtype, up[1].dtype) == (torch.int8, torch.float8_e8m0fnu)
    assert torch.equal(model.get_parameter("layers.2.mlp.experts.gate_up_proj")[3, 64:], formats.dequantise_fp4(*up))
    query = tensors["layers.2.attn.wq_b.weight"], tensors["layers.2.attn.wq_b.scale"]
    values = formats.dequantise_blocks(*query, (128, 128))
    assert torch.equal(model.get_parameter("layers.2.self_attn.q_b_proj.weight"), values)
    rounded = load(directory, dtype=torch.bfloat16).get_parameter("layers.2.self_attn.q_b_proj.weight")
    assert torch.equal(rounded, values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixing_weights_stay_wide_and_tables_stay_ids(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(quantized(tmp_path, "deepseek_v4", "fp4"), dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert model.get_parameter("layers.1.attn_hc.fn").dtype == wide
    assert model.get_parameter("layers.1.self_attn.compressor.kv_proj.weight").dtype == wide
    assert model.get_parameter("layers.1.self_attn.q_a_proj.weight").dtype == dtype
    assert model.get_buffer("layers.0.mlp.gate.tid2eid").dtype == torch.int64
    assert model.get_buffer("layers.1.mlp.gate.e_score_correction_bias").dtype == wide
    save(model, tmp_path / "again")
    held = load_file(tmp_path / "again" / "model.safetensors")
    assert held["layers.1.hc_attn_fn"].dtype == torch.float32
    assert held["layers.1.attn.compressor.wkv.weight"].dtype == dtype
    assert held["layers.0.ffn.gate.tid2eid"].dtype == torch.int64


def test_other_storage_of_the_same_numbers(tmp_path: Path) -> None:
    """Scales as bytes, hash tables as int32, and the spelling of transformers' writer."""
    directory = quantized(tmp_path, "deepseek_v4", "fp4")
    wanted = load(directory, dtype=torch.float32, mtp=True).state_dict()

    def respell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.endswith(".scale"):
                tensor = tensor.view(torch.uint8)
            if name.endswith("tid2eid"):
                tensor = tensor.int()
            if name.startswith("hc_head_"):
                name = name.replace("hc_head_", "hc_head.hc_")
            name = name.replace("embed.", "embed_tokens.").replace(".attn.kv_norm.", ".attn.norm.")
            tensors[name if name.startswith("head") else f"model.{name}"] = tensor

    edit(directory, respell)
    again = load(directory, dtype=torch.float32, mtp=True).state_dict()
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


W1, WQ = "layers.1.ffn.experts.2.w1", "layers.1.attn.wq_a"
Change = Callable[[dict[str, Tensor]], object]


def _with(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def _without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def _byte(value: int) -> Callable[[Tensor], Tensor]:
    return lambda scale: scale.view(torch.uint8).index_fill(0, torch.tensor([0]), value).view(scale.dtype)


TABLE = "layers.0.ffn.gate.tid2eid"
DAMAGES: dict[str, tuple[Change, dict[str, object], str]] = {
    "no FP4 scales": (_without(f"{W1}.scale"), {}, f"lacks {W1}.scale, the scales of {W1}.weight"),
    "no FP8 scales": (_without(f"{WQ}.scale"), {}, f"lacks {WQ}.scale"),
    "no weights": (_without(f"{W1}.weight"), {}, f"lacks tensor {W1}.weight"),
    "scales without codes": (_with(f"{WQ}.weight", Tensor.float), {}, rf"{WQ}\.scale has no place"),
    "a stray scale": (
        lambda t: t.update({"layers.0.attn.q_norm.scale": torch.ones(1)}),
        {},
        "q_norm.scale has no place",
    ),
    "transposed FP4 scales": (_with(f"{W1}.scale", Tensor.t), {}, rf"{W1}.scale has shape \[8, 64\].*\[64, 8\]"),
    "FP8 scales for FP4": (_with(f"{W1}.scale", lambda s: s[:1, :2]), {}, rf"{W1}.scale has shape \[1, 2\]"),
    "scales of whole numbers": (_with(f"{WQ}.scale", lambda s: s.float().int()), {}, f"{WQ}.scale is torch.int32"),
    "an FP4 scale that is no number": (_with(f"{W1}.scale", _byte(255)), {}, f"{W1}.weight: scales hold the byte 255"),
    "an FP8 scale that is no number": (_with(f"{WQ}.scale", _byte(255)), {}, f"{WQ}.weight: scales hold the byte 255"),
    "an infinite FP8 scale": (_with(f"{WQ}.scale", lambda s: s.float() / 0), {}, f"{WQ}.weight: scales hold"),
    "bytes where FP8 is due": (
        _with(f"{WQ}.weight", lambda w: w.view(torch.int8)),
        {},
        rf"{WQ}\.weight is torch\.int8",
    ),
    "FP4 that config.json calls FP8": (lambda t: None, {"expert_dtype": "fp8"}, r"w1\.weight is torch\.int8.*float8"),
    "half of the FP4": (
        _with(f"{W1}.weight", lambda w: w[:, ::2]),
        {},
        rf"{W1}.weight has shape \[64, 64\].*\[64, 128\]",
    ),
    "FP8 that nobody quantises": (
        _with("layers.1.attn.compressor.wkv.weight", lambda w: w.to(formats.FP8)),
        {},
        r"compressor\.wkv\.weight is torch\.float8_e4m3fn, but its kind is never quantised",
    ),
    "no quantization_config": (lambda t: None, {"quantization_config": None}, "has no quantization_config"),
    "an expert too many in the table": (_with(TABLE, lambda t: t + 1), {}, rf"{TABLE} has experts 1 to 4.*0 to 3"),
    "an expert below zero": (_with(TABLE, lambda t: (t - 1).int()), {}, rf"{TABLE} has experts -1 to 2"),
    "a table of floats": (_with(TABLE, Tensor.float), {}, rf"{TABLE} is torch.float32, int64 is due"),
    "a mixture of layouts": (
        lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
        {},
        "follow different layouts",
    ),
    "a tensor nobody knows": (lambda t: t.update({"layers.0.attn.wk": torch.ones(4)}), {}, "wk has no place"),
    "V4.1": (lambda t: None, {"model_type": "deepseek_v41"}, "V4.1"),
}


@pytest.fixture(scope="module")
def fp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("fp4"), "deepseek_v4", "fp4")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_quantised_checkpoint_is_refused_in_one_sentence(fp4: Path, tmp_path: Path, damage: str) -> None:
    for file in fp4.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change, config, message = DAMAGES[damage]
    edit(tmp_path, change, **config)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_fp4_of_columns_that_do_not_fill_groups_is_refused(fp4: Path, tmp_path: Path) -> None:
    for file in fp4.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if ".experts." in name and ".shared_experts." not in name:
                tensors[name] = tensors[name].view(torch.uint8)[:33].clone().view(tensors[name].dtype)

    edit(tmp_path, narrow, moe_intermediate_size=33)
    with pytest.raises(CheckpointError, match=r"w2\.weight has 33 columns: FP4 comes in groups of 32"):
        load(tmp_path)
