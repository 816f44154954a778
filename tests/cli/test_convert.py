"""`daedal convert`: stages shown and reported, stopping and going on, healing, and sentences for mistakes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from daedal.checkpoint.load import load
from daedal.cli import app
from daedal.distill.provenance import verify
from daedal.distill.records import history
from daedal.text.tokenizer import Tokenizer
from tests.convert.texts import write_text
from tests.tiny import tiny_checkpoint

SMALL = ["--kv-dims", "20", "--rope-dims", "8", "--tokens", "256", "--held-out", "64", "--window", "64"]
LICENCE = 'public "domain" – 1922'
PERMITTED = ["--permission", "the tests: made from random numbers here"]


@pytest.fixture(name="given")
def _given(tmp_path: Path) -> list[str]:
    """The beginning of every command line."""
    source = tiny_checkpoint(tmp_path / "source", "llama", num_hidden_layers=2, tie_word_embeddings=True)
    text = write_text(tmp_path / "text.txt", seed=0)
    (tmp_path / "sources.toml").write_text('["text.txt"]\nlicence = "public \\"domain\\" – 1922"\n', encoding="utf-8")
    return ["convert", str(source), str(tmp_path / "made"), "--text", str(text), *SMALL]


def _stages(out: str) -> dict[str, dict[str, object]]:
    return {stage["stage"]: stage for stage in json.loads(out.splitlines()[-1])["stages"]}


def test_stops_and_goes_on(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = ["--experts", "4", "--active", "0.75"]
    assert app.run([*given, *experts, "--stop-after", "rotation", "--json"]) == 0
    captured = capsys.readouterr()
    assert list(_stages(captured.out)) == ["exact", "statistics", "rotation"]
    assert "no checkpoint yet" in captured.err
    assert not (tmp_path / "made").exists()
    assert app.run([*given, *experts, "--stop-after", "router", "--json"]) == 0
    captured = capsys.readouterr()
    stages = _stages(captured.out)
    assert list(stages) == ["exact", "statistics", "rotation", "rank", "norm", "split", "router"]
    assert stages["exact"]["quality"]["furthest"] < 1e-4  # type: ignore[index]
    assert stages["router"]["command"].endswith(
        "--experts 4 --active 0.75 --dense-layers 0 --text "
        + given[4]
        + " --tokens 256 --held-out 64 --window 64 --stop-after router"
    )  # type: ignore[attr-defined]
    assert "router: perplexity" in captured.err
    made = tmp_path / "made"
    config = load(made).config
    assert config.n_routed_experts + config.n_shared_experts == 4
    assert Tokenizer.load(made).encode("a wife")
    record = verify(made)
    assert [stage["stage"] for stage in record["stages"]] == list(stages)
    assert (record["data"][0]["role"], record["data"][0]["licence"]) == ("calibration", LICENCE)


def test_heals_last_and_is_then_done(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*given, *PERMITTED, "--heal-minutes", "0.02", "--json"]
    assert app.run(asked) == 0
    stages = _stages(capsys.readouterr().out)
    assert list(stages) == ["exact", "statistics", "rotation", "rank", "norm", "heal"]
    assert stages["heal"]["details"]["tokens"] > 0  # type: ignore[index]
    made = tmp_path / "made"
    record = verify(made)
    older = history(record, record["parent"])
    assert older is not None
    assert [stage["stage"] for stage in older["stages"]] == ["exact", "statistics", "rotation", "rank", "norm"]
    assert [(data["role"], data["licence"]) for data in record["data"]] == [("real text", LICENCE)]
    assert load(made).config.kv_lora_rank == 12
    assert not (tmp_path / "made.convert").exists()
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert app.run(asked) == 0
    captured = capsys.readouterr()
    assert "is this conversion already" in captured.err
    assert list(_stages(captured.out)) == list(stages)
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_the_first_layers_stay_dense(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*given, "--experts", "4", "--active", "0.75", "--stop-after", "split"]
    assert app.run([*asked, "--dense-layers", "2"]) == 2
    assert "dense_layers is 2 of 2 layers: at least one must become experts" in capsys.readouterr().err
    assert app.run([*asked, "--dense-layers", "1", "--json"]) == 0
    assert "--dense-layers 1" in str(_stages(capsys.readouterr().out)["split"]["command"])
    published = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (published["first_k_dense_replace"], published["intermediate_size"]) == (1, 72)


def test_a_healed_student_gets_experts(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its attention stays; all is measured against the dense original, which is also the teacher."""
    assert app.run([*given, *PERMITTED, "--heal-minutes", "0.02", "--json"]) == 0
    healed = _stages(capsys.readouterr().out)["heal"]
    student, routed = tmp_path / "made", tmp_path / "routed"
    asked = [*given[:2], str(routed), *given[3:5], *SMALL[4:], "--student", str(student), "--experts", "4", *PERMITTED]
    assert app.run([*asked, "--active", "0.75", "--stop-after", "router", "--json"]) == 0
    captured = capsys.readouterr()
    stages = _stages(captured.out)
    assert list(stages) == ["split", "router"]
    assert f"--student {student} --experts 4" in str(stages["split"]["command"])
    ratio = healed["quality"]["ratio"]  # type: ignore[index]
    assert stages["split"]["quality"]["ratio"] == pytest.approx(ratio, rel=1e-4)  # type: ignore[index]
    before, after = (load_file(path / "model.safetensors") for path in (student, routed))
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." not in name)
    assert any(name.endswith("mlp.experts.0.gate_proj.weight") for name in after)
    assert verify(routed)["parent"]["name"] == "made"
    assert app.run([*asked, "--active", "0.75", "--heal-minutes", "0.02", "--json"]) == 0
    capsys.readouterr()
    healed_now = load_file(routed / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], healed_now[name])}
    assert {"model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"} < moved
    for more, sentence in (
        (["--kv-dims", "20"], "give the widths of a cache that is to be made, or a student"),
        (["--experts", "0"], "is latent already: give their number"),
        (["--student", str(routed)], "has 2 layers of experts: it must have"),
    ):
        assert app.run([*asked[:2], str(tmp_path / "other"), *asked[3:], *more]) == 2
        assert sentence in capsys.readouterr().err


def test_without_text_the_model_writes_its_own(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    del given[3:5]
    assert app.run([*given, "--stop-after", "statistics", "--json"]) == 0
    assert list(_stages(capsys.readouterr().out)) == ["exact", "statistics"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "licence"),
        (["--permission", "granted"], "write who states it, a colon"),
        (["--stop-after", "router"], "the last stage is 'router'"),
        (["--stop-after", "norm", "--rope-dims", "6"], "the rotated part must keep the source's frequencies"),
        (["--stop-after", "norm", "--experts", "5", "--active", "0.5"], "a share of 0.5 of 5 experts"),
        (["--stop-after", "norm", "--text", "missing.txt"], "the text missing.txt cannot be read"),
        (["--stop-after", "cut"], "'cut' is not one of"),
    ],
)
def test_mistakes(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert app.run([*given, *more]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("daedal: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_goes_on_under_the_same_settings_alone(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*given, "--stop-after", "exact"]) == 0
    assert app.run([*given, "--kv-dims", "22", "--stop-after", "exact"]) == 2
    assert "was begun with another settings" in capsys.readouterr().err
