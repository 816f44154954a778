"""Packed weights: what becomes of every family's numbers, what is taken over, and that packing happens once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import daedal
from daedal import layouts, ops
from daedal.checkpoint import packing
from daedal.checkpoint.load import load
from daedal.checkpoint.quantize import quantize
from daedal.checkpoint.save import save
from daedal.config import ModelConfig
from daedal.errors import BackendError, CheckpointError, ConfigError, SourceError
from daedal.model.attention_latent import Expansion
from daedal.ops import formats
from daedal.ops.packed import Packed
from daedal.packed import WEIGHTS, kept
from daedal.shapes import parameters
from tests.checkpoint.quantizable import edit, quantizable_model, quantized
from tests.private_cache import private_cache
from tests.tiny import FAMILIES, tiny_checkpoint

IDS_BT = torch.tensor([[3, 250, 17, 8, 99, 120], [4, 4, 31, 2, 260, 5]])

# Of a matrix's largest magnitude: rounding to 8 bits of precision, half a step of 254, a fifteenth with ends cut off,
# 4 bits of precision, half of the gap between 4 and 6 where the largest magnitude is about 5.
LARGEST_CHANGE = {"bf16": 2**-8, "int8": 0.51 / 127, "int4": 0.17, "fp8": 2**-4, "fp4": 1 / 5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = private_cache(tmp_path / "cache")
    monkeypatch.setenv("DAEDAL_CACHE", str(directory))
    return directory


def _entries(cache: Path) -> list[Path]:
    return sorted((cache / "packed").iterdir()) if (cache / "packed").exists() else []


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_with_what_it_was_packed_from(tmp_path: Path, family: str, weights: str) -> None:
    """Logits equal those of the same numbers held dense, and no number is further off than its format allows."""
    tied = family in ("qwen2", "deepseek_v2")
    directory = tiny_checkpoint(tmp_path / "tiny", family, tie_word_embeddings=tied)
    wanted = load(directory, dtype=torch.float32).state_dict()
    packed = load(directory, weights=weights)
    dense = load(directory, weights=weights, dtype=torch.float32)
    assert (packed.dtype, dense.dtype) == (torch.bfloat16, torch.float32)
    with ops.using("reference"), torch.no_grad():
        near = packed.logits(IDS_BT)
        exact = dense.logits(IDS_BT)
        assert torch.isfinite(near).all()
        assert (packed.to(torch.float32).logits(IDS_BT) - exact).abs().max() <= 1e-5
    held = dense.state_dict()
    if tied:
        wanted["lm_head.weight"] = wanted["embed_tokens.weight"]
    assert held.keys() == wanted.keys()
    slots = {slot.name: slot for slot in parameters(dense.config)}
    for name, before in wanted.items():
        slot = slots[name]
        forms = kept(slot, dense.config, weights)
        if forms:
            largest = before.abs().amax((-2, -1), keepdim=True)
            assert ((held[name] - before).abs() <= 1.02 * LARGEST_CHANGE[forms[0].format] * largest).all(), name
        else:
            kept_whole = slot.wide or slot.role == "hash_table"
            assert torch.equal(held[name], before if kept_whole else before.bfloat16().float()), name


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_an_engine_says_the_same_on_packed_and_on_dense_numbers(tmp_path: Path, family: str) -> None:
    """Decoding takes the absorbed form of latent attention, prefill the naive one."""
    directory = tiny_checkpoint(tmp_path / "tiny", family)
    params = daedal.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    said = []
    with ops.using("reference"):
        for dtype in (None, torch.float32):
            model = load(directory, weights="int8", dtype=dtype).to(torch.float32)
            engine = daedal.Engine(model, max_batch=2, max_context=128)
            said.append([output.ids for output in engine.generate([[5, 9, 200], [7] * 40], params)])
    assert said[0] == said[1]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_keys_and_folded_keys_are_the_same_numbers(tmp_path: Path, weights: str) -> None:
    sizes = {"kv_lora_rank": 72, "qk_nope_head_dim": 80}
    model = load(tiny_checkpoint(tmp_path / "tiny", "deepseek_v3", **sizes), weights=weights)
    expansion = model.layers[1].self_attn.kv_b_proj
    assert isinstance(expansion, Expansion)
    assert expansion.keys is not None
    assert expansion.values is not None
    assert expansion.folded is not None
    assert expansion.keys.shape == (6, 80, 72)
    assert expansion.values.shape == (6, 12, 72)
    assert torch.equal(expansion.folded.dense(), expansion.keys.dense().transpose(1, 2))
    assert not list(expansion.parameters())


def test_what_is_packed_is_no_parameter_and_all_else_is_there(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "tiny", "deepseek_v4"), weights="int4", mtp=False)
    packed = {
        f"{name}.{leaf}": value
        for name, module in model.named_modules()
        for leaf, value in vars(module).items()
        if isinstance(value, Packed)
    }
    state = model.state_dict()
    assert not packed.keys() & state.keys()
    slots = parameters(model.config)
    assert packed.keys() | state.keys() == {slot.name for slot in slots}
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in model.state_dict(keep_vars=True).values())
    found = {name.rsplit(".layers.", 1)[-1].split(".", 2)[-1]: value.format for name, value in packed.items()}
    assert found["self_attn.o_a_proj.weight"] == found["mlp.experts.gate_up_proj"] == "int4"
    assert packed["lm_head.weight"].format == "int8"
    assert packed["layers.0.self_attn.o_a_proj.weight"].shape == (3, 10, 40)
    for part in ("compressor.kv_proj", "scorer.weights_proj", "mlp.gate.weight", "attn_hc.fn", "sinks"):
        assert not any(part in name for name in packed)


def _matrices(directory: Path, weights: str | None) -> dict[str, Tensor]:
    return load(directory, weights=weights, dtype=torch.float32, mtp=True).state_dict()


@pytest.mark.parametrize(
    ("family", "stored", "weights"),
    [
        ("deepseek_v3", "fp8", "fp8"),
        ("deepseek_v32", "fp8", "fp8"),
        ("deepseek_v4", "fp8", "fp8"),
        ("deepseek_v4", "fp4", "fp4"),
        ("deepseek_v4", "fp4", "fp8"),
    ],
)
def test_published_codes_are_taken_over(tmp_path: Path, family: str, stored: str, weights: str) -> None:
    directory = quantized(tmp_path, family, stored)
    wanted, held = _matrices(directory, None), _matrices(directory, weights)
    assert held.keys() == wanted.keys()
    for name, before in wanted.items():
        # The expansion of latent attention is int8: its keys are held twice. V3's eh_proj is published in bfloat16.
        if "kv_b_proj" not in name and "eh_proj" not in name:
            assert torch.equal(held[name], before), name
    model = load(directory, weights=weights, mtp=True)
    experts = model.layers[1].mlp.experts.down_proj
    assert isinstance(experts, Packed)
    assert experts.format == ("fp4" if weights == "fp4" else "fp8")
    assert isinstance(model.layers[1].self_attn.q_b_proj.weight, Packed)
    assert model.layers[1].self_attn.q_b_proj.weight.format == "fp8"
    assert model.lm_head.weight.format == "bf16"


def test_fp4_codes_are_the_file_s_bit_for_bit(tmp_path: Path) -> None:
    directory = quantized(tmp_path, "deepseek_v4", "fp4")
    config = ModelConfig.read(directory)
    slot = next(slot for slot in parameters(config) if slot.name == "layers.2.mlp.experts.down_proj")
    contents, _ = packing._contents(directory, config)
    packed = load(directory, weights="fp4").layers[2].mlp.experts.down_proj
    assert isinstance(packed, Packed)
    for expert in range(slot.shape[0]):
        stored = contents.stored(slot, expert)
        assert stored.dtype == layouts.FP4
        codes = formats.unpack_fp4(stored.tensor) * formats.scale_values(stored.scale).repeat_interleave(32, -1)
        assert torch.equal(packed[expert].dense(), codes)


def test_fp8_in_other_blocks_is_quantised_anew(tmp_path: Path) -> None:
    directory = tmp_path / "source"
    save(quantizable_model("deepseek_v3", drafting=False), directory)

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("o_proj.weight")]:
            codes, scale = formats.quantise_blocks(tensors[name], (16, 32))
            tensors.update({name: codes, f"{name}_scale_inv": scale})

    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
    edit(directory, narrow, quantization_config=quantization, num_nextn_predict_layers=0)
    name = "layers.0.self_attn.o_proj.weight"
    before = load(directory, dtype=torch.float32).state_dict()[name]
    after = load(directory, dtype=torch.float32, weights="fp8").state_dict()[name]
    assert 0 < (after - before).norm() / before.norm() < 0.04


def test_packing_happens_once_and_again_when_the_source_changes(tmp_path: Path, cache: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", "llama")
    steps: list[tuple[int, int]] = []
    note = lambda *step: steps.append(step)  # noqa: E731
    first = load(directory, weights="int8", progress=note)
    (entry,) = _entries(cache)
    written = (entry / "weights.bin").stat()
    assert steps[-1] == (written.st_size, written.st_size)
    assert steps == sorted(steps)
    steps.clear()
    again = load(directory, weights="int8", progress=note)
    assert not steps
    assert torch.equal(first.lm_head.weight.data, again.lm_head.weight.data)
    tiny_checkpoint(directory, "llama", seed=1)
    other = load(directory, weights="int8", progress=note)
    assert steps
    assert not torch.equal(first.lm_head.weight.data, other.lm_head.weight.data)
    assert _entries(cache) == [entry]
    load(directory, weights="int4")
    assert len(_entries(cache)) == 2
    assert not list(cache.rglob("*.partial"))


def _damages(entry: Path) -> dict[str, object]:
    index = json.loads((entry / "index.json").read_text())
    moved = {**index, "entries": {**index["entries"], "norm.weight": ["bfloat16", [48], 0, 96]}}
    return {
        "truncated": lambda: (entry / "weights.bin").write_bytes((entry / "weights.bin").read_bytes()[:-1]),
        "without weights": lambda: (entry / "weights.bin").unlink(),
        "without index": lambda: (entry / "index.json").unlink(),
        "half an index": lambda: (entry / "index.json").write_text(json.dumps(index)[:-9]),
        "no object": lambda: (entry / "index.json").write_text("[1]"),
        "another version": lambda: (entry / "index.json").write_text(json.dumps({**index, "version": 0})),
        "an entry elsewhere": lambda: (entry / "index.json").write_text(json.dumps(moved)),
    }


def test_a_damaged_entry_is_made_anew(tmp_path: Path, cache: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", "deepseek_v2")
    wanted = load(directory, weights="int4").lm_head.weight.data.clone()
    (entry,) = _entries(cache)
    sound = {path.name: path.read_bytes() for path in entry.iterdir()}
    for name, damage in _damages(entry).items():
        damage()
        assert torch.equal(load(directory, weights="int4").lm_head.weight.data, wanted), name
        assert {path.name: path.read_bytes() for path in entry.iterdir()} == sound, name


def test_a_failure_leaves_nothing_behind(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", "llama")
    edit(directory, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: the weights hold infinities"):
        load(directory, weights="int4")
    assert _entries(cache) == []
    tiny_checkpoint(directory, "llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SourceError, match="free some space, or set DAEDAL_CACHE"):
        load(directory, weights="int4")
    assert _entries(cache) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match="cannot be written"):
        load(directory, weights="int4")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_drafting_modules_are_packed_too(tmp_path: Path, family: str) -> None:
    save(quantizable_model(family), tmp_path / "source")
    plain = load(tmp_path / "source", weights="int8")
    assert len(plain.mtp) == 0
    model = load(tmp_path / "source", weights="int8", mtp=True)
    drafter = model.mtp[0]
    names = ("e_proj", "h_proj") if family == "deepseek_v4" else ("eh_proj",)
    assert all(isinstance(getattr(drafter, name).weight, Packed) for name in names)
    assert isinstance(drafter.mlp.experts.gate_up_proj, Packed)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_drafting_modules_that_are_not_there_are_missed_only_when_asked_for(tmp_path: Path) -> None:
    save(quantizable_model("deepseek_v4", drafting=False), tmp_path / "source")
    edit(tmp_path / "source", lambda tensors: None, num_nextn_predict_layers=1)
    load(tmp_path / "source", weights="int8")
    with pytest.raises(CheckpointError, match=r"lacks tensor mtp\.0"):
        load(tmp_path / "source", weights="int8", mtp=True)
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers is 0"):
        load(tiny_checkpoint(tmp_path / "tiny", "llama"), weights="int8", mtp=True)


def test_mistakes_are_said(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", "llama")
    with pytest.raises(ConfigError, match="weights is 'int3': it must be one of bf16, int8, int4, fp8, fp4"):
        load(directory, weights="int3")
    with pytest.raises(ConfigError, match=r"dtype is torch\.float16: packed weights compute in bfloat16"):
        load(directory, weights="int8", dtype=torch.float16)
    with pytest.raises(BackendError, match=r"'cuda', this machine has cpu|packed weights run on the CPU alone"):
        load(directory, weights="int8", device="cuda")
    with pytest.raises(ConfigError, match="weights are packed, which no stock layout knows"):
        daedal.save(load(directory, weights="int8"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v4"])
def test_a_checkpoint_can_be_written_packed(tmp_path: Path, cache: Path, family: str, to: str) -> None:
    source, destination = tiny_checkpoint(tmp_path / "source", family), tmp_path / "packed"
    report = quantize(source, destination, to=to)
    assert (report.to, report.layout) == (to, "packed")
    assert report.bytes_before == (source / "model.safetensors").stat().st_size > report.bytes_after
    assert report.bytes_after == (destination / "packed" / "weights.bin").stat().st_size
    errors = {role.role: role.largest_error for role in report.roles}
    assert 0.0 < errors["head"] < 0.01 < errors["attention"] < 0.15 or to == "int8"
    assert 0.0 < errors["head"] <= max(errors.values()) < 0.01 or to == "int4"
    names = {path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "packed/index.json",
        "packed/weights.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shutil.rmtree(source)
    moved = destination.rename(tmp_path / "moved")
    model = daedal.load(moved)
    assert isinstance(model.lm_head.weight, Packed)
    assert not _entries(cache)
    with ops.using("reference"):
        ids = daedal.Engine(model, max_context=64).generate([[3, 4]], daedal.SamplingParams(max_tokens=4))[0].ids
    assert 0 < len(ids) <= 4
    other = "int4" if to == "int8" else "int8"
    with pytest.raises(ConfigError, match=f"weights is '{other}', .* holds {to} alone"):
        load(moved, weights=other)
    (moved / "packed" / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes, its index promises"):
        load(moved)


def test_packed_weights_written_and_cached_are_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "source"
    save(quantizable_model("deepseek_v3"), source)
    quantize(source, tmp_path / "packed", to="int4")
    load(source, weights="int4")
    (entry,) = _entries(cache)
    assert (entry / "weights.bin").read_bytes() == (tmp_path / "packed" / "packed" / "weights.bin").read_bytes()
    assert len(load(tmp_path / "packed", mtp=True).mtp) == 1
    with pytest.raises(CheckpointError, match="is packed as int4 already"):
        quantize(tmp_path / "packed", tmp_path / "again", to="int8")


def test_a_packed_destination_can_be_replaced_either_way(tmp_path: Path) -> None:
    source, destination = tiny_checkpoint(tmp_path / "source", "llama"), tmp_path / "destination"
    quantize(source, destination, to="bf16")
    quantize(source, destination, to="int8")
    assert not list(destination.glob("*.safetensors*"))
    assert isinstance(load(destination).lm_head.weight, Packed)
    quantize(source, destination, to="bf16")
    assert not list(destination.glob("packed/*"))
    assert isinstance(load(destination).lm_head.weight, Tensor)


def test_large_matrices_go_some_panels_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from daedal.checkpoint import repacking

    source = tmp_path / "source"
    save(quantizable_model("deepseek_v3", drafting=False), source)
    quantize(source, tmp_path / "whole", to="int4")
    monkeypatch.setattr(repacking, "_SLAB", 2**15)
    quantize(source, tmp_path / "parts", to="int4")
    whole, parts = (tmp_path / name / "packed" / "weights.bin" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
