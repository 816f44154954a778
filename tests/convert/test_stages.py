"""Whole conversions of small models: stock results, reports that hold, stopping, going on, and refusing to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from daedal.checkpoint.load import load
from daedal.convert import stages
from daedal.convert.experts import ExpertSettings
from daedal.convert.settings import Settings
from daedal.convert.stages import ROUTER, Conversion, work_directory
from daedal.convert.texts import HELD_OUT, Texts, read_texts, split_text, write_parts
from daedal.convert.work import publish
from daedal.errors import CheckpointError, ConfigError
from daedal.text.tokenizer import Tokenizer
from tests.convert.texts import small_conversion, small_texts, write_text
from tests.tiny import tiny_checkpoint

SETTINGS = Settings(kv_dims=20, rope_dims=8, experts=ExpertSettings(experts=4, shared=1, active=2))


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", "llama", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(name="texts")
def _texts(tmp_path: Path, source: Path) -> Texts:
    return small_texts(tmp_path, source)


@pytest.mark.parametrize(("family", "dense_layers"), [("llama", 0), ("qwen2", 1)])
def test_a_whole_conversion_is_stock_and_its_reports_hold(tmp_path: Path, family: str, dense_layers: int) -> None:
    source = tiny_checkpoint(tmp_path / "a", family, intermediate_size=80)
    experts = ExpertSettings(experts=4, shared=1, active=2, dense_layers=dense_layers)
    settings = Settings(kv_dims=20, rope_dims=8, experts=experts)
    conversion = small_conversion(source, tmp_path / "b", small_texts(tmp_path, source), settings)
    reports = {report.stage: report for report in conversion.run(ROUTER)}
    qualities = {stage: report.quality for stage, report in reports.items()}
    assert qualities["exact"] is not None
    assert qualities["exact"].furthest < 1e-4
    assert abs(qualities["exact"].ratio - 1) < 1e-4
    assert qualities["norm"] is not None
    assert qualities["split"] is not None
    assert abs(qualities["split"].ratio - qualities["norm"].ratio) < 1e-4
    sizes = {stage: report.sizes for stage, report in reports.items()}
    assert (sizes["rotation"].kv_bytes_per_token, sizes["norm"].kv_bytes_per_token) == (3 * 32 * 2, 3 * 20 * 2)
    routers = (3 - dense_layers) * 3 * 49
    assert sizes["router"].active_params < sizes["split"].active_params == sizes["norm"].active_params + routers
    assert reports["split"].details["furthest_in_float64"] < 1e-9
    kept = reports["router"].details
    assert 0 < kept["output_energy_kept"] <= kept["output_energy_of_an_oracle"] <= 1
    checkpoint = conversion.checkpoint(ROUTER)
    assert checkpoint is not None
    publish(checkpoint, tmp_path / "b")
    published = json.loads((tmp_path / "b" / "config.json").read_text())
    assert published["first_k_dense_replace"] == dense_layers
    assert (published["model_type"], published["q_lora_rank"], published["attention_bias"]) == (
        "deepseek_v3",
        None,
        False,
    )
    _agrees_with_transformers(tmp_path / "b")


def _agrees_with_transformers(directory: Path) -> None:
    ids_BT = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found, exact = (load(directory, dtype=dtype).logits(ids_BT) for dtype in (torch.float32, torch.float64))
        wanted = stock(ids_BT).logits
    # Of models converted from random numbers, float32's own noise may be as large as that.
    noise, apart = ((found - other).norm() / wanted.norm() for other in (exact, wanted))
    assert float(apart) < 1e-4 + 2 * float(noise) < 3e-3


def test_dense_feed_forward_parts_are_stock_too(tmp_path: Path, source: Path, texts: Texts) -> None:
    conversion = small_conversion(source, tmp_path / "b", texts, Settings(kv_dims=12, rope_dims=4))
    assert [report.stage for report in conversion.run("heal")] == ["exact", "statistics", "rotation", "rank", "norm"]
    checkpoint = conversion.checkpoint("heal")
    assert checkpoint is not None
    _agrees_with_transformers(checkpoint)
    assert Tokenizer.load(checkpoint).encode("a wife") == Tokenizer.load(source).encode("a wife")


def test_experts_of_a_student_are_fitted_to_the_student(tmp_path: Path, source: Path, texts: Texts) -> None:
    """Its residual stream need not be the original's: twice as large it is the same function, with equal experts."""
    latent = small_conversion(source, tmp_path / "a", texts, Settings(kv_dims=20, rope_dims=8))
    list(latent.run("norm"))
    student = latent.checkpoint("norm")
    assert student is not None
    settings = Settings.of_student(load(student).config, load(source).config, SETTINGS.experts)
    ratios = []
    for name, given in (("plain", student), ("doubled", _doubled(student, tmp_path / "doubled"))):
        conversion = Conversion(
            source, tmp_path / f"from_{name}", settings, texts, student=given, command=lambda stage: stage
        )
        reports = list(conversion.run(ROUTER))
        assert [report.stage for report in reports] == ["split", ROUTER]
        ratios.append([report.quality.ratio for report in reports if report.quality is not None])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)


def _doubled(student: Path, target: Path) -> Path:
    """All by powers of two, and what norms add to squares by their square: the same numbers but for exponents, so that
    no choice between near equals falls another way.
    """
    shutil.copytree(student, target)
    config = json.loads((target / "config.json").read_text())
    config["rms_norm_eps"] *= 4
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(student / "model.safetensors")
    larger = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    for name, tensor in tensors.items():
        tensor *= 2.0 if name.endswith(larger) else 0.5 if name == "model.norm.weight" else 1.0
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path, source: Path, texts: Texts) -> None:
    whole = small_conversion(source, tmp_path / "whole", texts, SETTINGS)
    wanted = [report.quality for report in whole.run(ROUTER)]
    for last in ("exact", "rotation", "split", ROUTER):
        parts = small_conversion(source, tmp_path / "parts", texts, SETTINGS)
        told: list[str] = []
        reports = list(_told(parts, last, told))
        assert reports[-1].stage == last
    assert told == [ROUTER]
    assert [report.quality for report in reports] == wanted
    files = [conversion.checkpoint(ROUTER) for conversion in (whole, parts)]
    assert files[0] is not None
    assert files[1] is not None
    assert (files[0] / "model.safetensors").read_bytes() == (files[1] / "model.safetensors").read_bytes()


def _told(conversion: Conversion, last: str, made: list[str]):  # type: ignore[no-untyped-def]
    """Runs, noting the stages that were not there before."""
    before = {path.name for path in conversion.work.directory.iterdir()}
    for report in conversion.run(last):
        if report.stage not in before:
            made.append(report.stage)
        yield report


def test_a_killed_stage_is_made_again(
    tmp_path: Path, source: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies(scene: object, directory: Path) -> None:
        (directory / "half").write_text("half")
        raise Killed

    makers = dict(stages._MAKERS)
    conversion = small_conversion(source, tmp_path / "b", texts, SETTINGS)
    monkeypatch.setattr(stages, "_MAKERS", {**makers, "rank": dies})
    with pytest.raises(Killed):
        list(conversion.run("norm"))
    assert not (work_directory(tmp_path / "b") / "rank").exists()
    # As if the machine had gone down: what was begun lies there.
    stale = work_directory(tmp_path / "b") / ".rank.1.partial"
    stale.mkdir()
    monkeypatch.setattr(stages, "_MAKERS", makers)
    again = small_conversion(source, tmp_path / "b", texts, SETTINGS)
    assert [report.stage for report in again.run("norm")][-1] == "norm"
    assert not stale.exists()


def test_other_settings_texts_or_weights_are_refused(tmp_path: Path, source: Path, texts: Texts) -> None:
    destination = tmp_path / "b"
    list(small_conversion(source, destination, texts, SETTINGS).run("exact"))
    other = tiny_checkpoint(tmp_path / "other", "llama", seed=5, num_hidden_layers=2, tie_word_embeddings=True)
    cases = [
        (source, texts, Settings(kv_dims=22, rope_dims=8, experts=SETTINGS.experts), "another settings"),
        (other, texts, SETTINGS, "another source"),
        (source, small_texts(tmp_path, source, seed=7), SETTINGS, "another texts"),
    ]
    for given, words, settings, sentence in cases:
        with pytest.raises(ConfigError, match=sentence):
            list(small_conversion(given, destination, words, settings).run("exact"))


def test_impossible_wishes_are_refused_before_any_work(tmp_path: Path, source: Path, texts: Texts) -> None:
    with pytest.raises(ConfigError, match="a latent needs 2 besides"):
        Settings(kv_dims=9, rope_dims=8)
    with pytest.raises(ConfigError, match="the source keeps 32"):
        small_conversion(source, tmp_path / "b", texts, Settings(kv_dims=40, rope_dims=8))
    uneven = Settings(kv_dims=20, rope_dims=8, experts=ExpertSettings(experts=5, shared=1, active=2))
    with pytest.raises(ConfigError, match="5 experts cannot share 72 neurons"):
        small_conversion(source, tmp_path / "b", texts, uneven)
    with pytest.raises(CheckpointError, match="or inside it"):
        small_conversion(source, source / "inside", texts, SETTINGS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds files that are no checkpoint"):
        small_conversion(source, tmp_path / "full", texts, SETTINGS)
    assert not work_directory(tmp_path / "b").exists()


def test_publishing_replaces_a_checkpoint(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(source, target)
    (target / "model-00001-of-00002.safetensors").write_bytes(b"old")
    publish(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in source.iterdir())
    assert load(target).config == load(source).config


def test_held_out_text_is_never_calibrated_with(tmp_path: Path, source: Path) -> None:
    path = write_text(tmp_path / "one.txt", seed=0)
    first, last = split_text(path)
    assert first + last == path.read_text()
    assert abs(len(last) / len(first + last) - HELD_OUT) < 0.01
    tokenizer = Tokenizer.load(source)
    texts = read_texts([path], tokenizer, tokens=512, held_out_tokens=128, window=64)
    assert [len(ids_T) for ids_T in texts.calibration] == [64] * 8
    paths = [path, *(write_text(tmp_path / f"{name}.txt", seed=name) for name in range(2))]
    uneven = read_texts(paths, tokenizer, tokens=512, held_out_tokens=16, window=64)
    assert (len(uneven.calibration), [len(given) for given in uneven.held_out.values()]) == (8, [1, 1, 1])
    for windows, part in ((texts.calibration, first), (texts.held_out["one.txt"], last)):
        assert all(tokenizer.decode(ids_T.tolist()) in part for ids_T in windows)
    learnt, held_out = write_parts([path], tmp_path / "parts")
    assert (learnt[0].read_text(), held_out[0].read_text()) == (first, last)


def test_texts_that_cannot_serve_are_named(tmp_path: Path, source: Path) -> None:
    tokenizer = Tokenizer.load(source)
    (tmp_path / "short.txt").write_text("a b")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    twice = [write_text(tmp_path / "one.txt", seed=0)] * 2
    for paths, sentence in (
        ([tmp_path / "short.txt"], "short.txt is too short"),
        ([tmp_path / "binary.txt"], "binary.txt cannot be read"),
        ([tmp_path / "none.txt"], "none.txt cannot be read"),
        (twice, "two texts are called one.txt"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=sentence):
            read_texts(paths, tokenizer, tokens=64, held_out_tokens=16, window=16)
