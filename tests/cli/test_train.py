"""`daedal train`: from text to a stock checkpoint, stopping and going on, reports, and mistakes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import daedal
from daedal.cli import app
from daedal.cli.training_display import TrainingDisplay, clock, describe
from daedal.model.transformer import Transformer
from daedal.train.batches import Batch
from daedal.train.objective import Loss, Pretraining

WORDS = (
    "the a king queen river mountain country people government of and in to with for law war peace treaty state union "
    "great small old new shall will may has had was were is are commerce trade land sea ship army navy money bank tax"
)
STEPS = 8
RECIPE = """
from daedal.train.recipe import Recipe

recipe = Recipe(
    size=1, vocabulary=320, layers=2, context=32, batch=128, tokens=128 * {steps}, validation=0.2, rate=3e-3,
    precision="float32", saved_dtype="float32", evaluate_every=3, save_every=3, micro_tokens=64, family="{family}",
    text=({text!r},), prompt="the king",
)
"""


def write_text(path: Path, *, documents: int = 60) -> None:
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS.split(), k=draw.randint(10, 120))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return made(tmp_path, "deepseek_v3")


def made(directory: Path, family: str) -> Path:
    write_text(directory / "text.jsonl")
    path = directory / "small.py"
    described = RECIPE.format(steps=STEPS, family=family, text=str(directory / "text.jsonl"))
    path.write_text(described, encoding="utf-8")
    return path


def run(recipe: Path, out: Path, *more: str) -> int:
    return app.run(["train", str(recipe), "--out", str(out), "--device", "cpu", *more])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_text_becomes_a_stock_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    out = tmp_path / "run"
    assert run(made(tmp_path, family), out, "--json") == 0
    captured = capsys.readouterr()
    *_, held_out, sample, last = captured.out.splitlines()
    summary = json.loads(last)
    assert (summary["finished"], summary["steps"], summary["tokens"]) == (True, STEPS, 128 * STEPS)
    assert held_out.startswith("held-out text: ")
    assert f"{summary['held_out_bits_per_byte']:.4f} bits per byte" in held_out
    assert sample.startswith("sample: the king")
    assert "daedal serve" in captured.err
    lines = rows(out)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert len({tuple(line) for line in lines}) == len({line["stage"] for line in lines})
    assert lines[-1]["loss"] < lines[0]["loss"] < 1.1 * math.log(320)
    assert [line["step"] for line in lines if line["held_out_bits_per_byte"] is not None] == [2, 5]
    assert all(line["flops_utilisation"] > 0 and line["max_violation"] >= 0 for line in lines)
    ids = torch.randint(4, 300, (2, 24))
    ours = daedal.load(out / "model", device="cpu", mtp=True)
    assert len(ours.mtp) == 1
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_chat_continues_what_it_is_given(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from daedal.text.chat import load_format
    from daedal.text.tokenizer import Tokenizer

    out = tmp_path / "run"
    assert run(recipe, out, "--steps", "1", "--set", "prompt=''") == 0
    rendered = load_format(out / "model").render([{"role": "user", "content": "the king"}])
    tokenizer = Tokenizer.load(out / "model")
    assert tokenizer.encode(rendered, add_special_tokens=False) == tokenizer.encode("the king")


def test_a_run_in_two_parts_is_the_run_in_one(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(recipe, whole) == 0
    assert run(recipe, parts, "--steps", "5") == 0
    assert [line["step"] for line in rows(parts)] == list(range(5))
    said = capsys.readouterr().err
    assert f"5 of {STEPS} steps taken" in said
    assert f"daedal train {recipe} --out {parts} --resume" in said
    assert run(recipe, parts, "--resume") == 0
    assert [line["step"] for line in rows(parts)] == list(range(STEPS))
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert all(a[name] == b[name] for name in ("loss", "gradient_norm", "max_violation"))
    after = weights(parts)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(whole).items())


def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shown = TrainingDisplay.show

    def interrupting(self: TrainingDisplay, step: int, numbers: Any, remaining: float) -> None:
        shown(self, step, numbers, remaining)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingDisplay, "show", interrupting)
        assert run(recipe, out, "--set", "prompt=''") == 130
    said = capsys.readouterr().err
    assert f"stopped after step 2 of {STEPS}, saved" in said
    assert f"""daedal train {recipe} --set 'prompt='"'"''"'"'' --out {out} --resume""" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert not (out / "model").exists()
    assert run(recipe, out, "--set", "prompt=''", "--resume") == 0
    assert [line["step"] for line in rows(out)] == list(range(STEPS))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, computed, calls = tmp_path / "run", Pretraining.__call__, 0

    def broken(self: Pretraining, model: Transformer, batch: Batch) -> Loss:
        nonlocal calls
        calls += torch.is_grad_enabled()
        loss = computed(self, model, batch)
        # A step has two micro-batches: this is the fifth step, after the checkpoint of the third.
        return replace(loss, total=loss.total * math.nan) if calls > 8 else loss

    with monkeypatch.context() as patched:
        patched.setattr(Pretraining, "__call__", broken)
        assert run(recipe, out) == 2
    said = capsys.readouterr().err
    assert "of step 4 is nan: nothing was updated" in said
    assert "(step 3 is saved)" in said
    assert run(recipe, out, "--resume", "--set", "rate=1e-3") == 0
    assert [line["step"] for line in rows(out)] == list(range(STEPS))


Change = Callable[[Path], tuple[str, ...]]


def no_text(directory: Path) -> tuple[str, ...]:
    return ("--set", "text=()")


def empty_file(directory: Path) -> tuple[str, ...]:
    (directory / "text.jsonl").write_text("", encoding="utf-8")
    return ()


def binary_file(directory: Path) -> tuple[str, ...]:
    (directory / "noise.txt").write_bytes(bytes(range(256)) * 50)
    return ("--set", f"text={directory / 'noise.txt'}")


def own_tokenizer_and_fewer_ids(directory: Path) -> tuple[str, ...]:
    from tests.tiny import tiny_tokenizer

    place = directory / "tokenizer"
    place.mkdir()
    tiny_tokenizer().save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}', encoding="utf-8")
    return ("--set", f"tokenizer={place}", "--set", "vocabulary=64")


def a_run_is_there(directory: Path) -> tuple[str, ...]:
    (directory / "run").mkdir()
    (directory / "run" / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    return ()


def not_python(directory: Path) -> tuple[str, ...]:
    (directory / "small.py").write_text("recipe = (\n", encoding="utf-8")
    return ()


def it_raises(directory: Path) -> tuple[str, ...]:
    path = directory / "small.py"
    path.write_text("from daedal.train.recipe import Recipe\n\nrecipe = Recipe(size=0)\n", encoding="utf-8")
    return ()


def no_recipe(directory: Path) -> tuple[str, ...]:
    (directory / "small.py").write_text("size = 4\n", encoding="utf-8")
    return ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_text, "the recipe names no `text`"),
        (empty_file, "is empty, every file must hold text"),
        (binary_file, "noise.txt"),
        (own_tokenizer_and_fewer_ids, "the model has a vocabulary of 64 ids"),
        (a_run_is_there, "holds a run already: go on with --resume"),
        (not_python, "line 1 cannot be run (SyntaxError"),
        (it_raises, "line 3 cannot be run (`size` is 0: it must be a whole number from 1"),
        (no_recipe, "says nothing of `recipe`"),
        (lambda directory: ("--resume",), "has no checkpoint to go on from"),
        (lambda directory: ("--set", "size"), "--set 'size' is no setting"),
        (lambda directory: ("--set", "sise=3"), "a recipe has no 'sise'"),
        (lambda directory: ("--set", "batch=100"), "batch is 100 tokens, a sample has 32"),
        (lambda directory: ("--set", "changes={'n_group': 5}"), "n_group"),
        (lambda directory: ("--set", "validation=0.001"), "no validation documents"),
    ],
)
def test_mistakes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, sentence: str
) -> None:
    assert run(recipe, tmp_path / "run", *change(tmp_path)) == 2
    said = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert said.startswith("daedal: ")
    assert sentence in said


def test_another_recipe_does_not_go_on(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(recipe, out, "--steps", "1", "--set", "prompt=''") == 0
    assert run(recipe, out, "--resume", "--set", "seed=5", "--set", "experts=4") == 2
    assert "holds a run with another model, seed" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    assert run(recipe, out) == 2
    assert "free some space, and go on with --resume" in capsys.readouterr().err


def test_two_processes_of_torchrun_train_the_model_of_one(recipe: Path, tmp_path: Path) -> None:
    settings = ["--set", "prompt=''", "--device", "cpu", "--steps", "4"]
    arguments = ["daedal", "train", str(recipe), "--out", str(tmp_path / "two"), *settings]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(daedal.__file__).parents[1])}
    done = subprocess.run([*torchrun, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("4 of 8 steps taken") == 1
    assert run(recipe, tmp_path / "one", *settings[:2], *settings[4:]) == 0
    for mine, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
        assert theirs["max_violation"] == mine["max_violation"]
    assert daedal.load(tmp_path / "two" / "model", device="cpu").config.vocab_size == 320


def test_numbers_in_words() -> None:
    numbers = {"loss": 2.5, "bits_per_byte": math.nan, "tokens_per_second": 12345.6, "flops_utilisation": 0.214}
    assert describe(numbers | {"max_violation": None}, 75.2) == "loss 2.500  12,346 tokens/s  MFU 21%  ETA 1:15"
    assert [clock(seconds) for seconds in (5, 3661, math.nan)] == ["0:05", "1:01:01", "-"]
