"""`daedal export`: what arrives is the same model in published names and plain numbers; what cannot run is refused."""

import json
from pathlib import Path

import pytest
import torch

import daedal
from daedal.cli import app
from daedal.ports.export import export
from daedal.ports.support import RUNS
from tests.checkpoint.quantizable import quantized
from tests.tiny import FAMILIES, tiny_checkpoint, tiny_model

IDS = torch.tensor([[5, 9, 300, 17, 42, 8]])


@pytest.mark.parametrize("family", RUNS)
def test_what_is_exported_is_the_same_model(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", family)
    done: list[tuple[int, int]] = []
    report = export(source, tmp_path / "out", progress=lambda *step: done.append(step))
    before, after = daedal.load(source), daedal.load(tmp_path / "out")
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert (report.dtype, report.expanded) == ("float32", 0)
    assert done[-1] == (report.tensors, report.tensors)
    assert report.nbytes == sum(tensor.nbytes for tensor in after.parameters()) + _buffers(after)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_fp8_is_expanded_and_drafting_modules_stay_behind(tmp_path: Path) -> None:
    source = quantized(tmp_path, "deepseek_v3", "fp8")
    report = export(source, tmp_path / "out", dtype="float32")
    assert report.expanded > 0
    published = json.loads((tmp_path / "out" / "config.json").read_text())
    assert published["torch_dtype" if "torch_dtype" in published else "dtype"] == "float32"
    assert "quantization_config" not in published
    assert not published.get("num_nextn_predict_layers")
    exact, after = daedal.load(source, dtype=torch.float32), daedal.load(tmp_path / "out")
    assert torch.equal(after.logits(IDS), exact.logits(IDS))


def test_a_dtype_is_written_as_asked(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    daedal.save(model, tmp_path / "source")
    assert export(tmp_path / "source", tmp_path / "kept").dtype == "bfloat16"
    assert export(tmp_path / "source", tmp_path / "wide", dtype="float32").dtype == "float32"
    kept, wide = daedal.load(tmp_path / "kept"), daedal.load(tmp_path / "wide")
    assert kept.dtype == torch.bfloat16
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name].float()), name


def test_the_command_says_how_to_run_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_checkpoint(tmp_path / "source", "deepseek_v3")
    assert app.run(["export", str(source), str(tmp_path / "out"), "--to", "mindspore", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert f"python -m daedal.ports.mindspore {tmp_path / 'out'}" in lines[-1]
    report = json.loads(last)
    assert (report["to"], report["dtype"], report["expanded"]) == ("mindspore", "float32", 0)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(RUNS)))
def test_a_model_that_cannot_run_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    source = tiny_checkpoint(tmp_path / "source", family)
    assert app.run(["export", str(source), str(tmp_path / "out"), "--to", "mindspore"]) == 2
    error = capsys.readouterr().err
    assert f"model_type is '{family}'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{source}", "{source}", "--to", "mindspore"], "source and destination are both"),
        (["{source}", "{new}", "--to", "onnx"], "'onnx' is not"),
        (["{source}", "{new}"], "--to"),
        (["{new}", "{source}", "--to", "mindspore"], "new"),
        (["{source}", "{new}", "--to", "mindspore", "--dtype", "float64"], "'float64' is not one of"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    places = {"source": tiny_checkpoint(tmp_path / "source"), "new": tmp_path / "new"}
    assert app.run(["export", *(argument.format_map(places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("daedal: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def _buffers(model: torch.nn.Module) -> int:
    return sum(buffer.nbytes for buffer in model.buffers())
