"""Reading and writing whole checkpoints: round trips, transformers as reader and writer, FP8, shards."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.errors import BackendError, CheckpointError, ConfigError
from daedal.ops.formats import dequantise_blocks, quantise_blocks
from daedal.shapes import parameters
from tests.tiny import FAMILIES, tiny_checkpoint, tiny_model, tiny_published

IDS_BT = torch.tensor([[3, 250, 17, 8, 99, 120], [4, 4, 31, 2, 260, 5]])


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in FAMILIES for tied in (False, True) if not (tied and family == "deepseek_v4")],
)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    save(model, tmp_path / "ours")
    oracle, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        wanted = model.logits(IDS_BT)
        assert (oracle(IDS_BT).logits - wanted).abs().max() <= 1e-4
        oracle.save_pretrained(tmp_path / "theirs")
        assert torch.equal(load(tmp_path / "theirs").logits(IDS_BT), wanted)


@pytest.mark.parametrize(("family", "layout"), [("llama", None), ("deepseek_v3", "deepseek"), ("deepseek_v4", None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_save_then_load_is_the_identity(tmp_path: Path, family: str, layout: str | None, dtype: torch.dtype) -> None:
    save(tiny_model(family, dtype=dtype), tmp_path / "drawn", layout=layout)
    model = load(tmp_path / "drawn")  # what is kept in float32 but published in the model's dtype is rounded by now
    tmp_path = tmp_path / "saved"
    save(model, tmp_path, layout=layout, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load(tmp_path)
    assert again.dtype == dtype
    assert again.config == model.config.replace(dtype=str(dtype).removeprefix("torch."))
    others = {
        slot.name: torch.float32 if slot.wide else torch.int64
        for slot in parameters(model.config)
        if slot.wide or slot.role == "hash_table"
    }
    for (name, mine), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert theirs.dtype == others.get(name, dtype), name
        assert torch.equal(mine, theirs), name
    save(again, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_mapped_model_can_be_trained_without_touching_its_file(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    with torch.no_grad():
        model.embed_tokens.weight.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_config_keeps_what_it_does_not_know_and_drops_code(tmp_path: Path) -> None:
    save(tiny_model("llama", auto_map={"AutoModel": "evil.Model"}, some_vendor_field=[1, 2]), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["some_vendor_field"] == [1, 2]
    assert "auto_map" not in written


def _as_fp8(directory: Path, *, power_of_two: bool) -> dict[str, torch.Tensor]:
    """Rewrites a checkpoint's linear weights as FP8 in 16 x 32 blocks; returns the exact values they now stand for."""
    tensors = load_file(directory / "model.safetensors")
    exact = {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and ("proj" in name):
            codes, scale = quantise_blocks(tensor, (16, 32), power_of_two=power_of_two)
            exact[name] = dequantise_blocks(codes, scale, (16, 32))
            tensors[name] = codes
            tensors[f"{name}_scale_inv"] = scale.to(torch.float8_e8m0fnu) if power_of_two else scale
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
    (directory / "config.json").write_text(json.dumps(config))
    return exact


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_weights_are_expanded_exactly(tmp_path: Path, power_of_two: bool) -> None:
    save(tiny_model("deepseek_v3"), tmp_path)
    exact = _as_fp8(tmp_path, power_of_two=power_of_two)
    model = load(tmp_path, dtype=torch.float32)
    name = "layers.1.mlp.experts"
    gate_up = model.get_parameter(f"{name}.gate_up_proj")
    assert torch.equal(gate_up[5, :20], exact[f"model.{name}.5.gate_proj.weight"])
    assert torch.equal(gate_up[5, 20:], exact[f"model.{name}.5.up_proj.weight"])
    query = "layers.0.self_attn.q_b_proj.weight"
    assert torch.equal(model.get_parameter(query), exact[f"model.{query}"])
    rounded = load(tmp_path, dtype=torch.bfloat16).get_parameter(query)
    assert torch.equal(rounded, exact[f"model.{query}"].bfloat16())


def test_drafting_modules_do_not_disturb_the_backbone(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", num_nextn_predict_layers=1)
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(48, 96)
    tensors["model.layers.3.enorm.weight"] = torch.zeros(48)
    tensors["mtp.0.e_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).logits(IDS_BT), model.logits(IDS_BT))


def test_scoring_fields_may_be_absent_in_v3() -> None:
    published = tiny_published("deepseek_v3")
    assert "scoring_func" not in published
    assert tiny_model("deepseek_v3").config.scoring_func == "sigmoid"


def _rewrite(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def _change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def _break_header(directory: Path, header: bytes, body: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    (directory / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + body)


def _tensor(start: int, end: int, *, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}'


DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "not an object"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "unknown architecture": (lambda d: _rewrite(d, model_type="mamba"), "'mamba'"),
    "no architecture": (lambda d: (d / "config.json").write_text("{}"), "model_type is None"),
    "truncated": (lambda d: _truncate(d, 1000), "damaged"),
    "truncated in the header": (lambda d: _truncate(d, 30), "damaged"),
    "empty file": (lambda d: _truncate(d, 0), "damaged"),
    "header longer than the file": (lambda d: _break_header(d, b"{}", length=2**40), "damaged"),
    "header of length zero": (lambda d: _break_header(d, b""), "damaged"),
    "header is not JSON": (lambda d: _break_header(d, b"not json"), "damaged"),
    "overlapping tensors": (
        lambda d: _break_header(d, f'{{"a":{_tensor(0, 4)},"b":{_tensor(2, 6)}}}'.encode(), b"\0" * 6),
        "damaged",
    ),
    "shape that does not fit its bytes": (
        lambda d: _break_header(d, f'{{"a":{_tensor(0, 4, shape="[99]")}}}'.encode(), b"\0" * 4),
        "damaged",
    ),
    "shape whose product overflows": (
        lambda d: _break_header(d, f'{{"a":{_tensor(0, 4, shape="[4294967296,4294967296]")}}}'.encode(), b"\0" * 4),
        "damaged",
    ),
    "unknown element type": (
        lambda d: _break_header(d, f'{{"a":{_tensor(0, 4, dtype="Z9")}}}'.encode(), b"\0" * 4),
        "damaged",
    ),
    "missing tensor": (lambda d: _change(d, "model.norm.weight", None), "lacks tensor model.norm.weight"),
    "misshapen tensor": (lambda d: _change(d, "model.norm.weight", torch.ones(7)), r"shape \[7\].*\[48\]"),
    "unknown tensor": (
        lambda d: _change(d, "model.surprise.weight", torch.ones(7)),
        "model.surprise.weight has no place",
    ),
    "integer weights": (
        lambda d: _change(d, "model.norm.weight", torch.ones(48, dtype=torch.int8)),
        "model.norm.weight is torch.int8",
    ),
    "a layer that the config forgets": (lambda d: _rewrite(d, num_hidden_layers=2), "model.layers.2.*has no place"),
    "a layer too many in the config": (lambda d: _rewrite(d, num_hidden_layers=4), "lacks tensor model.layers.3"),
}


def _truncate(directory: Path, size: int) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    tiny_checkpoint(tmp_path, "deepseek_v3")
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path, shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "{}", '{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    tiny_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(tmp_path)


def test_fp8_without_scales_or_with_wrong_ones_is_refused(tmp_path: Path) -> None:
    save(tiny_model("deepseek_v3"), tmp_path)
    _as_fp8(tmp_path, power_of_two=False)
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    _change(tmp_path, scale, torch.ones(2, 2))
    with pytest.raises(CheckpointError, match=rf"{scale}.*\[2, 2\]"):
        load(tmp_path)
    _change(tmp_path, scale, None)
    with pytest.raises(CheckpointError, match=f"lacks {scale}"):
        load(tmp_path)
    _rewrite(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointError, match="no quantization_config"):
        load(tmp_path)


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "llama")
    canary = tmp_path / "ran"
    (tmp_path / "modeling.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    _rewrite(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"})
    load(tmp_path)
    assert not canary.exists()


def test_formats_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(ConfigError, match="weights is 'int3'"):
        load(tmp_path, weights="int3")


def test_without_a_dtype_the_files_decide_and_not_what_config_declares(tmp_path: Path) -> None:
    """A publisher may declare what a model was trained in beside files that hold more."""
    save(tiny_model("llama"), tmp_path)
    _rewrite(tmp_path, dtype="bfloat16")
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["abacus", "cpu:x", "npu"])
def test_a_device_that_is_not_here_is_refused(tmp_path: Path, name: str) -> None:
    tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(BackendError, match=f"device is '{name}'"):
        load(tmp_path, device=name)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_model_without_shared_experts_goes_both_ways(tmp_path: Path, family: str) -> None:
    """Stock readers expect matrices of width 0 there."""
    model = tiny_model(family, n_shared_experts=0)
    save(model, tmp_path / "ours")
    oracle, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    oracle.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert (load(tmp_path / "theirs").logits(IDS_BT) - oracle(IDS_BT).logits).abs().max() <= 1e-4


def test_a_model_can_be_copied(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", quantization_config=None)
    twin = copy.deepcopy(model)
    assert twin.config == model.config
    assert torch.equal(twin.logits(IDS_BT), model.logits(IDS_BT))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_of_endless_depth_is_refused(tmp_path: Path, file: str) -> None:
    tiny_checkpoint(tmp_path, "llama")
    (tmp_path / file).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=file):
        load(tmp_path)
