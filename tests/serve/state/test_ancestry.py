"""A converted model beside its original: what `original.json` says, and what is counted from it."""

import json
from pathlib import Path

import pytest

from daedal.config import ModelConfig
from daedal.errors import CheckpointError
from daedal.serve.state.ancestry import ORIGINAL, beside_original, describe_original
from tests.tiny import tiny_published


@pytest.fixture(name="latent")
def _latent(tmp_path: Path) -> Path:
    """The directory of a converted model that knows its original."""
    (tmp_path / "dense").mkdir()
    dense = tiny_published("llama", head_dim=16, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))
    directory = tmp_path / "latent"
    directory.mkdir()
    (directory / ORIGINAL).write_text(describe_original("dense", tmp_path / "dense", perplexity_ratio=1.03))
    return directory


CONFIG = ModelConfig.from_published(
    tiny_published("deepseek_v3", kv_lora_rank=20, qk_rope_head_dim=12, hidden_size=64, torch_dtype="bfloat16")
)


def test_both_are_counted_as_costs_are(latent: Path) -> None:
    mine, its = beside_original(latent, "latent", CONFIG)
    assert [(row["name"], row["perplexity_ratio"]) for row in (mine, its)] == [("latent", 1.03), ("dense", 1.0)]
    assert mine["kv_bytes_per_token"] == 3 * (20 + 12) * 2
    assert its["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4  # in float32, as its config.json says
    assert mine["context"] == its["context"] == 512
    assert all(row["decode_flops_per_token"] > 2 * row["active_params"] for row in (mine, its))


def test_a_model_of_its_own_has_nothing_beside_it(tmp_path: Path) -> None:
    assert beside_original(tmp_path, "own", CONFIG) == ()


@pytest.mark.parametrize("change", [{"config": None}, {"config": {}}, {"perplexity_ratio": "good"}, {"name": None}])
def test_a_description_that_is_none_is_refused(latent: Path, change: dict[str, object]) -> None:
    said = {**json.loads((latent / ORIGINAL).read_text()), **change}
    if change == {"name": None}:
        del said["name"]
    (latent / ORIGINAL).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"original\.json does not describe a model"):
        beside_original(latent, "latent", CONFIG)
