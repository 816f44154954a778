"""`daedal cost`: what machines read from it."""

import json
from pathlib import Path

import pytest

from daedal.cli import app

CONTRACT = {"total_params", "active_params", "kv_bytes_per_token", "kv_bytes_at_context", "decode_flops_per_token"}
COMPARED = {"mha_kv_bytes_per_token", "mha_kv_bytes_at_context", "gqa8_kv_bytes_per_token", "gqa8_kv_bytes_at_context"}


def test_last_line_is_one_flat_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["cost", "deepseek-v3", "--context", "131072", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() >= CONTRACT | COMPARED
    assert all(isinstance(value, int | str) for value in report.values())
    assert (report["model"], report["context"]) == ("deepseek-v3", 131072)
    assert report["kv_bytes_at_context"] == 70_272 * 131072
    assert report["mha_kv_bytes_per_token"] == 3_997_696


def test_several_models_give_a_line_each_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["deepseek-v3", "deepseek-v2-lite", "deepseek-v2"]
    assert app.run(["cost", *names, "--json"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["model"] for line in out.splitlines()[-3:]] == names
    table = out[: out.index("{")]
    assert all(text in table for text in ("671.03 B", "15.71 B", "235.74 B", "with GQA-8"))


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
