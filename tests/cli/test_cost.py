"""`daedal cost`: what machines and people read from it, and what docs/cost.md says it prints."""

import json
import re
import shlex
from pathlib import Path

import pytest

from daedal.cli import app
from daedal.cli.units import in_bytes, in_flops
from daedal.cost import count, presets

CONTRACT = {"total_params", "active_params", "kv_bytes_per_token", "kv_bytes_at_context", "decode_flops_per_token"}
COMPARED = {"mha_kv_bytes_per_token", "mha_kv_bytes_at_context", "gqa8_kv_bytes_per_token", "gqa8_kv_bytes_at_context"}
PARTS = {
    "drafting_params",
    "checkpoint_tensors",
    "checkpoint_tensors_with_drafting",
    "weight_bytes",
    "weight_bytes_bf16",
    "weight_bytes_routed_expert",
    "params_routed_expert",
    "kv_bytes_per_token_bf16",
    "kv_bytes_at_context_bf16",
    "state_bytes",
    "decode_flops_linear",
    "decode_flops_attention",
    "decode_flops_attention_sparse",
    "decode_flops_indexer",
    "decode_flops_weighted",
}
PAGE = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")


def test_last_line_is_one_flat_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["cost", "deepseek-v3", "--context", "131072", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() >= CONTRACT | COMPARED | PARTS
    assert all(isinstance(value, int | str) for value in report.values())
    assert (report["model"], report["context"]) == ("deepseek-v3", 131072)
    assert report["kv_bytes_at_context"] == 70_272 * 131072
    assert report["mha_kv_bytes_per_token"] == 3_997_696


def test_bytes_per_token_may_be_fractional(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["cost", "deepseek-v4-flash", "--context", "1048576", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kv_bytes_per_token"] == 3514.25
    assert (report["checkpoint_tensors"], report["checkpoint_tensors_with_drafting"]) == (67_612, 69_187)


def test_several_models_give_a_line_each_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["deepseek-v3", "deepseek-v2-lite", "deepseek-v2"]
    assert app.run(["cost", *names, "--json"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["model"] for line in out.splitlines()[-3:]] == names
    table = out[: out.index("{")]
    assert all(text in table for text in ("671.03 B", "15.71 B", "235.74 B", "with GQA-8"))


def test_the_table_has_the_parts_that_its_models_have(capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("attention, latent", "attention, window", "attention, heavy", "indexer", "state beside them")
    shown = {}
    for model in ("deepseek-v2", "deepseek-v4-pro"):
        assert app.run(["cost", model]) == 0
        out = capsys.readouterr().out
        shown[model] = [part for part in parts if part in out]
    assert shown == {"deepseek-v2": ["attention, latent"], "deepseek-v4-pro": list(parts[1:])}


def test_a_directory_needs_only_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    published = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert app.run(["cost", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["total_params"] == report["active_params"] == 134_515_008
    assert report["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 2
    assert report["checkpoint_tensors"] == 272


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"^    \$ daedal (cost .*)\n((?:    .*\n|\n)+)", PAGE, re.MULTILINE)
    assert shown
    for command, block in shown:
        assert app.run(shlex.split(command)) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert [line[4:].rstrip() for line in block.splitlines() if line.strip()] == printed


def test_the_page_has_every_preset_at_three_lengths() -> None:
    rows = re.findall(r"^\| (deepseek-\S+) \|(.*)\|$", PAGE, re.MULTILINE)
    assert tuple(name for name, _ in rows) == presets.names()
    for name, cells in rows:
        config = presets.read(name)
        assert config is not None
        reports = [count.report(config, model=name, context=context) for context in (4096, 131072, 1048576)]
        expected = [in_bytes(report.kv_bytes_at_context) for report in reports]
        expected += [in_flops(report.decode_flops_per_token) for report in reports]
        assert [cell.strip() for cell in cells.split("|")] == expected


def test_the_page_explains_every_key() -> None:
    config = presets.read("deepseek-v4-pro")
    assert config is not None
    for key in count.report(config, model="deepseek-v4-pro", context=1).flat():
        stem = re.sub(r"^(params|weight_bytes|decode_flops_attention)_(?!bf16).*", r"\1_", key)
        assert f"`{stem}" in PAGE, key
