"""`daedal distill`: a recipe of teachers, a student and real text to a stock checkpoint that says where it came from.

Ctrl-C finishes the step, saves, says how to go on, and exits with 130; pressed again it ends at once. How a run goes,
`distill.run` knows.
"""

import json
import time
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING

import typer

from daedal.cli.fetching import displayed
from daedal.cli.opening import DeviceOption, say
from daedal.cli.precision import choose_dtype
from daedal.cli.recipe_run import (
    JsonOption,
    OutOption,
    RecipeArgument,
    ResumeOption,
    RunWishes,
    SettingsOption,
)
from daedal.cli.recipes import read_recipe
from daedal.cli.stopping import INTERRUPTED, stopping
from daedal.cli.training_display import TrainingDisplay, clock
from daedal.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from daedal.distill.recipe import Recipe
    from daedal.distill.run import Run
    from daedal.distill.training import Point
    from daedal.train.loop import StepReport

_BAR_STEPS = 1000


def command(
    recipe: RecipeArgument,
    settings: SettingsOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    device: DeviceOption = "auto",
    json_line: JsonOption = False,
) -> None:
    """Distil teachers into a student from a recipe, grounded in real text."""
    wishes = RunWishes(
        verb="distill",
        path=recipe,
        settings=tuple(settings or ()),
        given_out=out,
        resume=resume,
        device=device,
        json_line=json_line,
    )
    chosen, where, narrow = _chosen(wishes)
    wishes.check_directory()
    from daedal.distill.run import Run

    with displayed() as display:
        run = Run(chosen, wishes.out, device=where, narrow=narrow, said=display)
    with closing(run):
        if wishes.resume and not run.training.resume():
            raise ConfigError(f"{wishes.out} has no checkpoint to go on from: leave --resume out")
        _distil(run, wishes)


def _chosen(wishes: RunWishes) -> "tuple[Recipe, torch.device, bool]":
    """The recipe, the device, and whether to compute in bfloat16."""
    import torch

    from daedal.distill.recipe import Recipe

    recipe = read_recipe(wishes.path, wishes.settings, Recipe)
    where = wishes.open_device()
    precision = choose_dtype(recipe.precision, where)
    say(f"distilling on {where} in {precision}")
    return recipe, where, precision.dtype == torch.bfloat16


def _distil(run: "Run", wishes: RunWishes) -> None:
    """All steps, then what is left to do once they are taken."""
    from daedal.train.reports import Board, MetricsFile

    _introduce(run)
    training = run.training
    metrics = MetricsFile(wishes.out, first=training.step)
    done = round(training.spent * _BAR_STEPS)
    interrupted = False
    with (
        closing(Board(wishes.out)) as board,
        stopping() as stopped,
        TrainingDisplay(steps=_BAR_STEPS, done=done) as display,
    ):
        for report, point in run.steps():
            numbers = _row(report, point, run)
            metrics.add(numbers)
            board.add(numbers)
            left = training.seconds * (1 / training.spent - 1) if training.spent else float("nan")
            display.show(min(round(training.spent * _BAR_STEPS), _BAR_STEPS), numbers, max(left, 0.0))
            if point is not None:
                display.say(_told(point))
            interrupted = stopped()
            if interrupted:
                break
    if interrupted:
        training.save()
        training.checkpoints.wait()
        say(f"stopped after step {training.step}, saved; go on with: {wishes.again}")
        raise typer.Exit(INTERRUPTED)
    _finish(run, wishes)


def _row(report: "StepReport", point: "Point | None", run: "Run") -> dict[str, float | int | str | None]:
    """One step as a line; measurements are null on the steps that have none."""
    training = run.training
    first = training.curve[0].measured
    return {
        "step": report.step,
        "tokens": training.tokens,
        "loss": report.loss,
        **{f"loss_{name}": value for name, value in report.parts.items() if name != "next_token"},
        "gradient_norm": report.norm,
        "rate": max(report.rates.values()),
        "seconds": training.seconds,
        "tokens_per_second": training.tokens / training.seconds,
        **{f"held_out_{name}": None if point is None else point.measured[name] for name in first},
    }


def _told(point: "Point") -> str:
    compared = ""
    if "ratio" in point.measured:
        compared = f", {point.measured['ratio']:.4f} times the teacher's perplexity, KL {point.measured['kl']:.4f}"
    spent = f"after {point.tokens:,} tokens, {clock(point.seconds)}"
    return f"{spent}: {point.measured['nats']:.4f} nats a token on held-out text{compared}"


def _introduce(run: "Run") -> None:
    for name, verdict in run.faculty.verdicts.items():
        say(f"teacher {name} ({verdict.teacher}): {verdict.verdict}, decided by {verdict.decided_by}")
    wrong = sum(one.right is False for one in run.judged)
    if run.judged:
        say(f"{len(run.judged)} prompts; teachers answer {wrong} of them wrongly, which are learnt from the truth")
    say(f"{run.student.num_moving:,} numbers of the student are trained: {', '.join(run.student.roles)}")
    if run.training.step:
        say(f"going on with step {run.training.step}")


def _finish(run: "Run", wishes: RunWishes) -> None:
    training, began = run.training, time.perf_counter()
    if training.stopped:
        say(f"ended before the budget was spent: {training.stopped}")
    target, after = run.export()
    say(f"{training.step} steps taken; the model is {target}: daedal serve {target}")
    print(f"held-out text: {_numbers(after)}")
    if wishes.json_line:
        summary = {
            "model": str(target),
            "steps": training.step,
            "tokens": training.tokens,
            "seconds": round(training.seconds, 3),
            "tokens_per_second": training.tokens / training.seconds if training.seconds else None,
            "export_seconds": round(time.perf_counter() - began, 3),
            "stopped": training.stopped or None,
            "before": dict(training.curve[0].measured) if training.curve else None,
            "after": dict(after),
        }
        print(json.dumps(summary))


def _numbers(measured: Mapping[str, float]) -> str:
    words = {"nats": "{:.4f} nats a token", "ratio": "{:.4f} times the teacher's perplexity", "kl": "KL {:.4f}"}
    return ", ".join(form.format(measured[name]) for name, form in words.items() if name in measured)
