"""Healing: a spoilt student comes back to its original, goes on after a kill, and says where it came from."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import daedal
from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.distill.errors import TeacherError
from daedal.distill.healed import RECEIPT, WORK
from daedal.distill.healing import Healing, heal
from daedal.distill.mixture import Windows
from daedal.distill.permission import Permission, PermissionRefused
from daedal.distill.provenance import verify
from daedal.distill.student import Student
from daedal.distill.texts import open_texts
from daedal.errors import ConfigError
from tests.tiny import tiny_checkpoint

OURS = Permission(stated_by="the tests", words="we made this model ourselves")
SENTENCE = "it is a truth that man in want of wife must know the feelings or views of his family and minds"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher): latent attention with experts, and the same with noise in its attention."""
    place = tmp_path_factory.mktemp("models")
    teacher = tiny_checkpoint(place / "teacher", "deepseek_v3")
    student = tiny_checkpoint(place / "student", "deepseek_v3")
    model = load(student)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.layers:
            weight = layer.self_attn.kv_b_proj.weight
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.15)
    save(model, student)
    return student, teacher


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    paths = [place / "prose.jsonl", place / "talk.jsonl"]
    for path in paths:
        rows = [" ".join(draw.choices(SENTENCE.split(), k=draw.randint(20, 60))) for _ in range(60)]
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return paths


def settings(**changes: Any) -> Healing:
    given: dict[str, Any] = {
        "tokens": 12_000,
        "share": 1.0,  # the teacher knows nothing of the text: the truth would pull away from it
        "rate": 5e-3,
        "context": 32,
        "samples": 8,
        "validation": 0.2,
        "evaluate_context": 64,
        "evaluate_tokens": 512,
        "evaluations": 3,
        "precision": "float32",
        "permission": OURS,
    }
    return Healing(**given | changes)


def test_a_spoilt_student_comes_back(models: tuple[Path, Path], text: list[Path], tmp_path: Path) -> None:
    student, teacher = models
    points, steps = [], []
    healed = heal(
        student,
        teacher,
        tmp_path / "healed",
        text=text,
        settings=settings(),
        watch=steps.append,
        measured=points.append,
    )
    assert healed.before["kl"] > 2.5 * healed.after["kl"]
    assert healed.tokens >= 12_000
    assert len(steps) == healed.curve[-1].step
    assert [point.step for point in healed.curve[1:]] == [point.step for point in points]
    assert len(healed.curve) == 4
    assert healed.curve[-1].measured == pytest.approx(healed.after, rel=1e-4)
    assert not (tmp_path / f"healed{WORK}").exists()
    before, after = (load_file(path / "model.safetensors") for path in (student, tmp_path / "healed"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "self_attn" in name or "norm" in name}
    record = verify(tmp_path / "healed")
    assert record["parent"]["name"] == "student"
    assert [use["model"]["name"] for use in record["teachers"]] == ["teacher"]
    assert {data["name"] for data in record["data"]} == {"prose.jsonl", "talk.jsonl"}
    assert daedal.load(tmp_path / "healed").logits(torch.arange(9)[None]).isfinite().all()
    assert (tmp_path / "healed" / "tokenizer.json").is_file()
    again = heal(student, teacher, tmp_path / "healed", text=text, settings=settings(), watch=steps.append)
    assert again.after == healed.after
    assert len(steps) == healed.curve[-1].step
    with pytest.raises(ConfigError, match="healed with another settings"):
        heal(student, teacher, tmp_path / "healed", text=text, settings=settings(rate=1e-3))


def test_an_original_without_a_share_is_not_asked(models: tuple[Path, Path], text: list[Path], tmp_path: Path) -> None:
    reports: list[Any] = []
    few = settings(tokens=600, evaluations=1, share=0.0)
    healed = heal(*models, tmp_path / "text-alone", text=text, settings=few, watch=reports.append)
    assert len(reports) > 1
    assert all(report.parts["divergence"] == report.parts["teacher_share"] == 0.0 for report in reports)
    assert healed.after["kl"] > 0.0


class KilledError(Exception):
    pass


def test_a_killed_healing_goes_on_where_it_was(models: tuple[Path, Path], text: list[Path], tmp_path: Path) -> None:
    student, teacher = models
    whole, parts, shards = tmp_path / "whole", tmp_path / "parts", tmp_path / "shards"
    few = settings(tokens=4_000, evaluations=2)
    wanted = heal(student, teacher, whole, text=text, settings=few, shards=shards)
    assert len(list(shards.glob("shards-*"))) == len(text)

    def killing(report: Any) -> None:
        if report.step == 9:
            raise KilledError

    with pytest.raises(KilledError):
        heal(student, teacher, parts, text=text, settings=few, watch=killing, save_every=0.0)
    assert not parts.exists()
    with pytest.raises(ConfigError, match="holds a run with another settings"):
        heal(student, teacher, parts, text=text, settings=settings(tokens=4_000, evaluations=2, share=0.5))
    steps: list[int] = []
    found = heal(
        student, teacher, parts, text=text, settings=few, watch=lambda report: steps.append(report.step), shards=shards
    )
    assert steps[0] in (9, 10)
    assert found.after == wanted.after
    tensors = [load_file(path / "model.safetensors") for path in (whole, parts)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert json.loads((parts / RECEIPT).read_text(encoding="utf-8"))["tokens"] == wanted.tokens


@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_a_healthy_student_is_left_alone(
    models: tuple[Path, Path], text: list[Path], tmp_path: Path, precision: str, near: float
) -> None:
    """Teacher = student: with the teacher's share at one, there is nothing to learn and nothing moves far."""
    teacher = models[1]
    still = settings(tokens=1_000, rate=1e-6, precision=precision, long_context=128, long_share=0.25)
    healed = heal(teacher, teacher, tmp_path / "same", text=text, settings=still)
    assert healed.before["ratio"] == pytest.approx(1.0, abs=near)
    assert healed.before["kl"] == pytest.approx(0.0, abs=near)
    assert healed.after["ratio"] == pytest.approx(1.0, abs=near + 1e-4)
    assert {tensor.dtype for tensor in load_file(tmp_path / "same" / "model.safetensors").values()} == {torch.float32}


def test_a_long_window_is_one_context(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where a part of the text is held out, which cuts it into documents: no window reads across their ends."""
    draw, path = random.Random(1), tmp_path / "novel.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(SENTENCE.split(), k=40)) for _ in range(2000)), encoding="utf-8")
    window = settings(long_context=2048).longest
    text = open_texts([path], models[0], tmp_path / "shards", validation=0.1, window=window)[0]
    windows = Windows(text.train, name="novel", context=window, share=1.0, teacher=None)
    whole = [len(windows.sample(index).pieces) == 1 for index in range(len(windows))]
    assert len(whole) > 20
    assert sum(whole) > 0.7 * len(whole)


def test_who_may_not_be_learnt_from(models: tuple[Path, Path], text: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PermissionRefused, match="may not be learnt from"):
        heal(*models, tmp_path / "healed", text=text, settings=settings(permission=None))
    other = tiny_checkpoint(tmp_path / "other", "llama", vocab_size=384)
    with pytest.raises(TeacherError, match="vocabulary"):
        heal(models[0], other, tmp_path / "healed", text=text, settings=settings())
    assert not list(tmp_path.glob("healed*"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"minutes": 1.0}, "give one of the two"),
        ({"tokens": None}, "give one of the two"),
        ({"share": 1.5}, "`share` is 1.5"),
        ({"trained": ("nothing",)}, None),
        ({"validation": 0.0}, "`validation` is 0"),
    ],
)
def test_settings_that_cannot_be(
    models: tuple[Path, Path], text: list[Path], tmp_path: Path, changes: dict[str, Any], sentence: str | None
) -> None:
    with pytest.raises(ConfigError, match=sentence or "give roles out of"):
        heal(*models, tmp_path / "healed", text=text, settings=settings(**changes))


def test_what_stands_still_asks_for_nothing(models: tuple[Path, Path]) -> None:
    student = Student(models[0], roles=("attention",), narrow=True)
    dtypes = {name: parameter.dtype for name, parameter in student.model.named_parameters()}
    asking = {name for name, parameter in student.model.named_parameters() if parameter.requires_grad}
    assert asking == {name for name in dtypes if ".self_attn." in name and "norm" not in name}
    assert {dtypes[name] for name in asking} == {torch.float32}
    assert dtypes["layers.0.mlp.down_proj.weight"] == dtypes["layers.1.mlp.experts.down_proj"] == torch.bfloat16
    assert dtypes["layers.1.mlp.gate.weight"] == torch.float32
    with pytest.raises(ConfigError, match="give roles out of"):
        Student(models[0], roles=("indexer",), narrow=False)
