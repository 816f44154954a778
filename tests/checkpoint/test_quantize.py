"""Moving checkpoints between number formats: what changes, what must not, what is exact, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from daedal import layouts, shapes
from daedal.checkpoint.load import load
from daedal.checkpoint.quantize import quantize
from daedal.checkpoint.save import save
from daedal.checkpoint.writing import STAGING
from daedal.config import ModelConfig
from daedal.errors import CheckpointError, ConfigError
from daedal.ops import formats
from tests.checkpoint.quantizable import edit, quantizable_model, quantized
from tests.tiny import tiny_checkpoint

KEPT = {"embedding", "head", "norm", "router", "router_bias", "hash_table", "compressor", "hyper_connection"}


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    alike = (
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in ((first[name], second[name]) for name in first)
    )
    return first.keys() == second.keys() and all(alike)


@pytest.mark.parametrize(("family", "to"), [("deepseek_v3", "fp8"), ("deepseek_v32", "fp8"), ("deepseek_v4", "fp4")])
def test_only_what_publishers_quantise_is_quantised(tmp_path: Path, family: str, to: str) -> None:
    directory = quantized(tmp_path, family, to)
    before, after = _tensors(tmp_path / "source"), _tensors(directory)
    config = ModelConfig.read(directory)
    slots = shapes.parameters(config) + shapes.drafting(config)
    for slot in slots:
        for piece in layouts.pieces(slot, config, layouts.choose(config, None)):
            held = after[piece.name]
            if piece.scale is None:
                assert torch.equal(held, before[piece.name]), piece.name
            else:
                assert slot.role not in KEPT
                assert held.dtype == (torch.int8 if piece.dtype == layouts.FP4 else formats.FP8)
                assert held.shape == piece.stored_shape
                assert after[piece.scale.name].shape == piece.scale.shape
    assert any(slot.role in KEPT and ".indexer." in slot.name for slot in slots) or family != "deepseek_v4"
    assert len(after) == layouts.tensor_count(config, drafting=True)


def test_config_says_what_the_files_hold(tmp_path: Path) -> None:
    written = {
        (family, to): json.loads((quantized(tmp_path / family / to, family, to) / "config.json").read_text())
        for family, to in (
            ("deepseek_v3", "fp8"),
            ("deepseek_v32", "fp8"),
            ("deepseek_v4", "fp8"),
            ("deepseek_v4", "fp4"),
        )
    }
    stock = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert written["deepseek_v3", "fp8"]["quantization_config"] == stock
    for case in (("deepseek_v32", "fp8"), ("deepseek_v4", "fp8"), ("deepseek_v4", "fp4")):
        assert written[case]["quantization_config"] == {**stock, "scale_fmt": "ue8m0"}
        assert written[case]["dtype"] == "bfloat16"
        assert written[case]["num_nextn_predict_layers"] == 1
    assert written["deepseek_v4", "fp8"]["expert_dtype"] == "fp8"
    assert written["deepseek_v4", "fp4"]["expert_dtype"] == "fp4"
    assert "expert_dtype" not in written["deepseek_v3", "fp8"]
    quantize(tmp_path / "deepseek_v4/fp4/fp4", tmp_path / "plain", to="bf16")
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in plain
    assert "expert_dtype" not in plain


def test_scales_of_v3_are_float32_and_those_of_v32_powers_of_two(tmp_path: Path) -> None:
    for family, powers in (("deepseek_v3", False), ("deepseek_v32", True)):
        tensors = _tensors(quantized(tmp_path / family, family, "fp8"))
        scales = torch.cat([t.flatten() for name, t in tensors.items() if name.endswith("_scale_inv")])
        assert scales.dtype == torch.float32
        assert formats.are_powers_of_two(scales) == powers


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("to", ["fp8", "fp4"])
def test_the_other_layout_holds_the_same_codes(tmp_path: Path, to: str, layout: str) -> None:
    other = next(name for name in layouts.LAYOUTS if name != layout)
    first = quantized(tmp_path, "deepseek_v4", to, layout)
    report = quantize(first, tmp_path / "there", to=to, layout=other)
    assert report.layout == other
    assert all(role.largest_error == 0.0 for role in report.roles)
    quantize(tmp_path / "there", tmp_path / "back", to=to, layout=layout)
    assert _same(_tensors(first), _tensors(tmp_path / "back"))
    assert not _tensors(first).keys() & _tensors(tmp_path / "there").keys()


def test_fp4_becomes_fp8_with_the_same_numbers(tmp_path: Path) -> None:
    fp4 = quantized(tmp_path, "deepseek_v4", "fp4")
    report = quantize(fp4, tmp_path / "fp8", to="fp8")
    assert report.inexact == 0
    assert all(role.largest_error == 0.0 for role in report.roles)
    assert report.bytes_after > report.bytes_before
    wanted = load(fp4, dtype=torch.float32, mtp=True).state_dict()
    held = load(tmp_path / "fp8", dtype=torch.float32, mtp=True).state_dict()
    assert _same(wanted, held)


def test_fp4_of_wide_spread_is_reported_as_inexact(tmp_path: Path) -> None:
    fp4 = quantized(tmp_path, "deepseek_v4", "fp4")

    def widen(tensors: dict[str, Tensor]) -> None:
        scale = tensors["layers.1.ffn.experts.2.w1.scale"].view(torch.uint8)
        scale[0, 0] = scale.max() + 30

    edit(fp4, widen)
    report = quantize(fp4, tmp_path / "fp8", to="fp8")
    assert report.inexact == 1
    assert {role.role for role in report.roles if role.largest_error} == {"routed_expert"}


def test_plain_again_is_the_dequantised_numbers_rounded_once(tmp_path: Path) -> None:
    fp4 = quantized(tmp_path, "deepseek_v4", "fp4", "transformers")
    quantize(fp4, tmp_path / "plain", to="bf16")
    wanted = load(fp4, dtype=torch.bfloat16, mtp=True).state_dict()
    held = load(tmp_path / "plain", mtp=True).state_dict()
    assert _same(wanted, held)


def test_the_report_measures_what_changed(tmp_path: Path) -> None:
    save(quantizable_model("deepseek_v3"), tmp_path / "source")
    steps: list[tuple[int, int]] = []
    report = quantize(tmp_path / "source", tmp_path / "fp8", to="fp8", progress=lambda *step: steps.append(step))
    assert steps == [(done + 1, len(steps)) for done in range(len(steps))]
    before = load(tmp_path / "source", dtype=torch.float32, mtp=True).state_dict()
    after = load(tmp_path / "fp8", dtype=torch.float32, mtp=True).state_dict()
    errors = {role.role: role.largest_error for role in report.roles}
    names = [name for name in before if name.endswith(("q_b_proj.weight", "o_proj.weight", "kv_b_proj.weight"))]
    norms = [float((after[name] - before[name]).norm() / before[name].norm()) for name in names]
    assert max(norms) <= errors["attention"] * 1.0001 < 0.04
    assert errors["norm"] == errors["embedding"] == errors["router"] == 0.0
    assert report.tensors == len(_tensors(tmp_path / "fp8"))
    assert report.bytes_before == (tmp_path / "source" / "model.safetensors").stat().st_size
    assert report.bytes_after == (tmp_path / "fp8" / "model.safetensors").stat().st_size < report.bytes_before


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    one = quantized(tmp_path, "deepseek_v4", "fp4")
    quantize(tmp_path / "source", tmp_path / "many", to="fp4", shard_bytes=200_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 5
    assert _same(_tensors(one), _tensors(tmp_path / "many"))


def test_a_source_without_drafting_modules_promises_none(tmp_path: Path) -> None:
    save(quantizable_model("deepseek_v4", drafting=False), tmp_path / "source")
    edit(tmp_path / "source", lambda tensors: None, num_nextn_predict_layers=1)
    quantize(tmp_path / "source", tmp_path / "fp8", to="fp8")
    assert ModelConfig.read(tmp_path / "fp8").num_nextn_predict_layers == 0


def test_small_files_come_along_and_other_weights_do_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(quantizable_model("deepseek_v3"), source)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", ".hidden", "pytorch_model.bin"):
        (source / name).write_text(name)
    (source / "assets").mkdir()
    quantize(source, tmp_path / "fp8", to="fp8")
    names = {"LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "fp8").iterdir()} == names
    assert (tmp_path / "fp8" / "LICENSE").read_text() == "LICENSE"


def test_a_failure_leaves_the_destination_as_it_was(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    save(quantizable_model("deepseek_v4"), source)
    tiny_checkpoint(destination, "llama")
    before = {path.name: path.read_bytes() for path in destination.iterdir()}
    edit(source, lambda tensors: tensors["mtp.0.ffn.experts.3.w2.weight"].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=r"mtp\.0\.ffn\.experts\.3\.w2\.weight: the weights hold infinities"):
        quantize(source, destination, to="fp4", shard_bytes=200_000)
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before
    edit(source, lambda tensors: tensors["mtp.0.ffn.experts.3.w2.weight"].fill_(1.0))
    quantize(source, destination, to="fp4")
    assert load(destination).config.model_type == "deepseek_v4"


def test_strangers_files_stay_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    save(quantizable_model("deepseek_v4"), source)
    (source / "encoding").mkdir()
    (source / "encoding" / "encoding_dsv4.py").write_text("levels")
    (destination / STAGING / "encoding").mkdir(parents=True)
    (destination / STAGING / "model.safetensors").write_bytes(b"half")
    quantize(source, destination, to="fp8")
    assert (destination / "encoding" / "encoding_dsv4.py").read_text() == "levels"
    assert not (destination / STAGING).exists()
    (destination / "inner").mkdir()
    (destination / "inner" / "download.partial").write_text("mine")
    quantize(source, destination, to="fp4")
    assert (destination / "inner" / "download.partial").read_text() == "mine"


@pytest.mark.parametrize(
    ("family", "to", "message"),
    [
        ("deepseek_v3", "fp4", "deepseek_v3 is published in bf16 and fp8"),
        ("deepseek_v32", "fp4", "deepseek_v32 is published in bf16 and fp8"),
        ("llama", "fp8", "llama is published in bf16"),
        ("llama", "fp4", "llama is published in bf16"),
        ("deepseek_v4", "int3", "'int3': Daedal writes bf16, fp8, fp4, int8, int4"),
        ("deepseek_v4", "fp4", "`hidden_size` is 48: FP4 packs groups of 32"),
    ],
)
def test_formats_that_a_family_does_not_have_are_refused(tmp_path: Path, family: str, to: str, message: str) -> None:
    tiny_checkpoint(tmp_path / "source", family)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        quantize(tmp_path / "source", tmp_path / "destination", to=to)
    assert not list(tmp_path.glob("destination/*"))


def test_destinations_that_are_not_free_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "deepseek_v3")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    for destination, message in (
        ("source", "both"),
        ("link", "both"),
        ("papers", "no checkpoint"),
        ("papers/thesis.txt", "is a file"),
        ("source/inner", "lies inside"),
    ):
        with pytest.raises(CheckpointError, match=message):
            quantize(source, tmp_path / destination, to="bf16")
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "mine"


def test_a_dspark_draft_is_refused_rather_than_dropped(tmp_path: Path) -> None:
    save(quantizable_model("deepseek_v4", drafting=False), tmp_path / "source")
    edit(
        tmp_path / "source",
        lambda t: t.update({"mtp.0.main_proj.weight": torch.ones(4, 4)}),
        num_nextn_predict_layers=1,
    )
    with pytest.raises(CheckpointError, match=r"mtp\.0\.main_proj\.weight shows a DSpark draft"):
        quantize(tmp_path / "source", tmp_path / "fp8", to="fp8")
