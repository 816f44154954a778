"""Drafting modules in checkpoints: written and read in every layout, as transformers reads them, DSpark told apart."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import MtpModel

from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.errors import CheckpointError
from tests.checkpoint.quantizable import edit, quantizable_model, quantized
from tests.tiny import tiny_model

IDS_BT = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("family", "layout"),
    [("deepseek_v3", None), ("deepseek_v32", None), ("deepseek_v4", None), ("deepseek_v4", "transformers")],
)
def test_drafting_modules_are_written_and_read(tmp_path: Path, family: str, layout: str | None) -> None:
    drawn = quantizable_model(family)
    save(drawn, tmp_path / "drawn", layout=layout, shard_bytes=300_000)
    model = load(tmp_path / "drawn", mtp=True)  # what is kept in float32 but published in bf16 is rounded by now
    wanted = model.state_dict()
    assert wanted.keys() == drawn.state_dict().keys()
    assert {name for name in wanted if name.startswith("mtp.0.")}
    for name, held in drawn.state_dict().items():
        assert (held - wanted[name]).abs().max() <= 2**-8 * held.abs().max(), name
    save(model, tmp_path / "with", layout=layout)
    again = load(tmp_path / "with", mtp=True)
    assert again.config.num_nextn_predict_layers == 1
    assert all(torch.equal(held, wanted[name]) for name, held in again.state_dict().items())
    backbone = load(tmp_path / "with")
    assert not backbone.mtp
    save(backbone, tmp_path / "without", layout=layout)
    without = load(tmp_path / "without")
    assert without.config.num_nextn_predict_layers == 0
    assert torch.equal(without.logits(IDS_BT), model.logits(IDS_BT))
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers is 0"):
        load(tmp_path / "without", mtp=True)


def _as_dspark(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("mtp.")]:
        del tensors[name]
    tensors |= {"mtp.0.main_proj.weight": torch.zeros(4, 4), "mtp.2.markov_head.markov_w1": torch.zeros(4)}


def test_a_dspark_draft_disturbs_only_those_who_want_to_draft(tmp_path: Path) -> None:
    save(quantizable_model("deepseek_v4"), tmp_path)
    wanted = load(tmp_path).logits(IDS_BT)
    edit(tmp_path, lambda tensors: None, dspark_block_size=5)
    with pytest.raises(CheckpointError, match=r"dspark_block_size of config\.json shows a DSpark draft"):
        load(tmp_path, mtp=True)
    edit(tmp_path, _as_dspark, dspark_block_size=None)
    with pytest.raises(CheckpointError, match="DSpark"):
        load(tmp_path, mtp=True)
    assert torch.equal(load(tmp_path).logits(IDS_BT), wanted)


def test_transformers_finds_the_drafting_module_of_v3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the module by its number in the real model, 61, of which it is told another here."""
    known = transformers.DeepseekV3PreTrainedModel
    monkeypatch.setattr(known, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    save(tiny_model("deepseek_v3", drafting=True, num_nextn_predict_layers=1), tmp_path)
    main, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs = MtpModel.from_pretrained(main).state_dict()
    outside = {"norm.weight": "post_norm.weight"} | {
        f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj")
    }
    for name, mine in load(tmp_path, mtp=True).mtp[0].state_dict().items():
        assert torch.equal(mine, theirs[f"layers.0.{outside.get(name, f'mtp_block.{name}')}"]), name


@pytest.mark.parametrize("name", ["mtp.0.enorm.weight", "mtp.0.ffn.experts.3.w2.scale"])
def test_damage_to_drafting_modules_concerns_those_who_want_them(tmp_path: Path, name: str) -> None:
    directory = quantized(tmp_path, "deepseek_v4", "fp4")
    edit(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks.*{name}"):
        load(directory, mtp=True)
    load(directory)
    edit(directory, lambda tensors: tensors.update({name: torch.ones(3), "mtp.0.head.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=name):
        load(directory, mtp=True)
