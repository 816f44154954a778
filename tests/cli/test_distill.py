"""`daedal distill`: teachers and real text to a stock checkpoint, stopping and going on, and mistakes."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import daedal
from daedal.cli import app
from daedal.cli.training_display import TrainingDisplay
from daedal.distill.compared import read_evaluations
from daedal.distill.provenance import verify
from tests.tiny import tiny_checkpoint

SENTENCE = "it is a truth that man in want of wife must know the feelings or views of his family and minds"
RECIPE = """
from daedal.distill.losses import Gate
from daedal.distill.permission import Permission
from daedal.distill.recipe import Grounding, Recipe, Teacher

OURS = Permission(stated_by="the tests", words="we made this model ourselves")

recipe = Recipe(
    student={student!r}, name="pupil", text=({text!r},), grounding=Grounding(real_share=1.0, gate=Gate()),
    teachers=(Teacher(name="big", source={teacher!r}, permission=OURS),),
    tokens={tokens}, rate=3e-3, context=32, samples=4, micro_samples=2, validation=0.2, evaluate_context=64,
    evaluate_tokens=512, evaluations=2, precision="float32",
)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [" ".join(draw.choices(SENTENCE.split(), k=draw.randint(20, 60))) for _ in range(60)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "sources.toml").write_text('["text.jsonl"]\nlicence = "CC0-1.0"\n', encoding="utf-8")
    student = tiny_checkpoint(tmp_path / "student", "deepseek_v3", seed=1)
    teacher = tiny_checkpoint(tmp_path / "teacher", "llama", hidden_size=64)
    path = tmp_path / "small.py"
    described = RECIPE.format(student=str(student), teacher=str(teacher), text=str(text), tokens=128 * 12)
    path.write_text(described, encoding="utf-8")
    return path


def run(recipe: Path, out: Path, *more: str) -> int:
    return app.run(["distill", str(recipe), "--out", str(out), "--device", "cpu", *more])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_recipe_becomes_a_stock_checkpoint(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(recipe, out, "--json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["steps"] == 12
    assert summary["tokens"] == 128 * 12
    assert summary["after"]["kl"] < summary["before"]["kl"]
    assert "teacher big (teacher): unknown, decided by the tests" in captured.err
    lines = rows(out)
    assert [line["step"] for line in lines] == list(range(12))
    assert [line["step"] for line in lines if line["held_out_kl"] is not None] == [5, 11]
    assert lines[-1]["loss_divergence"] < lines[0]["loss_divergence"]
    assert all(0 < line["loss_teacher_share"] < 0.5 for line in lines)
    assert list((out / "tensorboard").iterdir())
    assert list((out / "signals" / "big").glob("part-*.safetensors"))
    record = verify(out / "model")
    assert record["teachers"][0]["obtained"] == "hidden states of the local weights"
    assert [(data["role"], data["licence"]) for data in record["data"]] == [("real text", "CC0-1.0")]
    evaluations = read_evaluations(out / "curve.json")  # as `daedal grounding --curve` does
    assert (evaluations.tokens_E[0], evaluations.tokens_E[-1]) == (0, 128 * 12)
    ids = torch.randint(4, 300, (2, 24))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        ours = daedal.load(out / "model", device="cpu").logits(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_end(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, whole) == 0
    shown = TrainingDisplay.show

    def interrupting(self: TrainingDisplay, step: int, numbers: Any, remaining: float) -> None:
        shown(self, step, numbers, remaining)
        if numbers["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingDisplay, "show", interrupting)
        assert run(recipe, parts) == 130
    assert f"daedal distill {recipe} --out {parts} --resume" in capsys.readouterr().err
    assert run(recipe, parts) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(recipe, parts, "--resume", "--set", "share=0.1") == 2
    assert "another share" in capsys.readouterr().err
    assert run(recipe, parts, "--resume") == 0
    assert [line["step"] for line in rows(parts)] == list(range(12))
    tensors = [load_file(out / "model" / "model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_the_student_writes_and_two_teachers_score(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On-policy and off-policy, prompts with and without verified answers, a recording of another tokenizer."""
    second = tiny_checkpoint(tmp_path / "second", "qwen2", seed=5)
    prompts = tmp_path / "prompts.jsonl"
    items = [
        {"prompt": "it is a truth", "answer": "that man"},
        {"messages": [{"role": "user", "content": "in want of"}], "teacher": "second"},
        {"prompt": "a wife must", "teacher": "big"},
    ]
    prompts.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    recording = tmp_path / "recording.jsonl"
    recording.write_text(json.dumps({"prompt": "the feelings", "teacher_answer": "of a man"}) + "\n", encoding="utf-8")
    text = recipe.read_text(encoding="utf-8")
    text = text.replace("real_share=1.0, gate=Gate()),", "real_share=0.4, gate=Gate()), on_policy=0.3, answers=0.3,")
    text = text.replace(
        "permission=OURS),)",
        f"permission=OURS), Teacher(name='second', source={str(second)!r}, permission=OURS, carrier='live'), "
        f"Teacher(name='record', source={str(recording)!r}, kind='recorded', licence='Apache-2.0'))",
    )
    recipe.write_text(text, encoding="utf-8")
    out = tmp_path / "run"
    given = [f"prompts={str(prompts)!r}", "answer_tokens=12", "block=4"]
    settings = [word for setting in given for word in ("--set", setting)]
    assert run(recipe, out, *settings, "--json") == 0
    captured = capsys.readouterr()
    assert "4 prompts; teachers answer 1 of them wrongly" in captured.err
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["steps"] >= 12
    asked = [json.loads(line) for line in (out / "answers" / "big.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in asked] == ["it is a truth"]
    record = verify(out / "model")
    assert [use["model"]["name"] for use in record["teachers"]] == ["teacher", "second", "recording.jsonl"]
    assert record["teachers"][0]["generation"]["judged_wrong"] == 1


def prohibited(text: str) -> str:
    return text.replace(", permission=OURS", ", licence='OpenAI'")


def unstated(text: str) -> str:
    return text.replace(", permission=OURS", "")


def ungrounded(text: str) -> str:
    return text.replace("grounding=Grounding(real_share=1.0, gate=Gate()),", "")


def little_truth(text: str) -> str:
    return text.replace("real_share=1.0", "real_share=0.2")


def no_gate(text: str) -> str:
    return text.replace(", gate=Gate()", ", gate=None")


def no_budget(text: str) -> str:
    return text.replace("    tokens=", "    minutes=1.0, tokens=")


def nobody(text: str) -> str:
    return text.replace("evaluations=2", "evaluations=2, on_policy=0.5")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (prohibited, "may not be learnt from"),
        (unstated, "Its licence is not known"),
        (ungrounded, "grounding"),
        (little_truth, "at least 0.3 of what a student reads must be real text"),
        (no_gate, "give a Gate"),
        (no_budget, "give one of the two"),
        (nobody, "they must be shares of 1"),
    ],
)
def test_mistakes_end_in_one_sentence(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, sentence: str
) -> None:
    recipe.write_text(change(recipe.read_text(encoding="utf-8")), encoding="utf-8")
    assert run(recipe, tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("daedal: ")
    assert sentence in said
    assert not (tmp_path / "run" / "model").exists()


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_made(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_checkpoint(tmp_path / "other", "llama", vocab_size=384)
    text = recipe.read_text(encoding="utf-8").replace(str(tmp_path / "teacher"), str(other))
    recipe.write_text(text, encoding="utf-8")
    assert run(recipe, tmp_path / "run") == 2
    assert "has a vocabulary of 384 ids, the student of 320" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
