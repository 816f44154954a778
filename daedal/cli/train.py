"""`daedal train`: a recipe to a stock checkpoint, on one process or on as many as `torchrun` starts.

Ctrl-C finishes the step, saves, says how to go on, and exits with 130; pressed again it ends at once. SIGTERM does the
same as the first. How a run goes, `train.run` knows.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal import shapes
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
from daedal.cli.training_display import TrainingDisplay
from daedal.cli.units import in_flops, in_parameters
from daedal.cost.count import active_params

if TYPE_CHECKING:
    import torch

    from daedal.train.parallel.layout import Place
    from daedal.train.preparation import Prepared
    from daedal.train.recipe import Recipe
    from daedal.train.reports import Pace
    from daedal.train.run import Evaluation, Run

_SAMPLE_TOKENS = 120


@dataclass(frozen=True, kw_only=True)
class Wishes(RunWishes):
    """steps: to take now at most. rank: of this process among those that torchrun started."""

    steps: int | None
    rank: int

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0


def command(
    recipe: RecipeArgument,
    settings: SettingsOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Take at most so many steps now, save and stop; go on with --resume.")
    ] = None,
    device: DeviceOption = "auto",
    json_line: JsonOption = False,
) -> None:
    """Train a model from a recipe; under torchrun on many processes."""
    wishes = Wishes(
        verb="train",
        path=recipe,
        settings=tuple(settings or ()),
        given_out=out,
        resume=resume,
        steps=steps,
        device=device,
        json_line=json_line,
        rank=int(os.environ.get("RANK", "0")),
    )
    chosen, where = _chosen(wishes)
    wishes.check_directory()
    prepared = _prepared(chosen, wishes)
    from daedal.train.run import Run

    with _joined(chosen, where) as place:
        run = Run(chosen, prepared, wishes.out, device=where, place=place)
        with closing(run):
            if wishes.resume:
                run.resume()
            _train(run, wishes)


def _chosen(wishes: Wishes) -> "tuple[Recipe, torch.device]":
    """The recipe with a precision that fits the device, and the device."""
    import torch

    from daedal.train.recipe import Recipe

    recipe = read_recipe(wishes.path, wishes.settings, Recipe)
    where = wishes.open_device()
    if where.type != "cpu":
        where = torch.device(where.type, int(os.environ.get("LOCAL_RANK", "0")))
    if recipe.precision == "auto":
        precision = choose_dtype("auto", where)
        recipe = recipe.with_settings({"precision": str(precision.dtype).removeprefix("torch.")})
        if wishes.first:
            say(f"training on {where} in {precision}")
    return recipe, where


def _prepared(recipe: "Recipe", wishes: Wishes) -> "Prepared":
    from daedal.train.preparation import prepare_text

    with displayed(quiet=not wishes.first) as display:
        return prepare_text(recipe, wishes.out, vocabulary=recipe.published()["vocab_size"], progress=display)


def _train(run: "Run", wishes: Wishes) -> None:
    """All steps, then what is left to do once they are taken."""
    from daedal.train.reports import Board, MetricsFile, Pace

    _introduce(run, wishes)
    pace = Pace(flops_per_token=run.plan.flops_per_token, peak=_peak(run, wishes))
    metrics = MetricsFile(wishes.out, first=run.step) if wishes.first else None
    last = None if wishes.steps is None else run.step + wishes.steps
    if wishes.first and not Board.available:
        say("no TensorBoard files, which need the package tensorboard: install daedal[train]")
    with (
        closing(Board(wishes.out, active=wishes.first)) as board,
        stopping() as stopped,
        TrainingDisplay(steps=run.plan.steps, done=run.step, quiet=not wishes.first) as display,
    ):
        began = time.perf_counter()
        interrupted = False
        for numbers in _rows(run, pace, last):
            if metrics is not None:
                metrics.add(numbers)
            board.add(numbers)
            display.show(run.step, numbers, pace.remaining(run.plan.steps - run.step))
            interrupted = bool(run.processes.total([int(stopped())])[0])
            if interrupted:
                break
            if run.step % run.plan.save_every == 0 and not run.done:
                run.save()
        run.save()
    run.checkpoints.wait()
    if interrupted:
        if wishes.first:
            say(f"stopped after step {run.step} of {run.plan.steps}, saved; go on with: {wishes.again}")
        raise typer.Exit(INTERRUPTED)
    _finish(run, wishes, pace, time.perf_counter() - began)


def _rows(run: "Run", pace: "Pace", last: int | None) -> "Iterator[dict[str, float | int | str | None]]":
    """A line for each step, with the held-out text every so often."""
    from daedal.train.reports import row

    for stage, report in run.steps(last):
        pace.add(report.tokens, report.seconds)
        numbers = row(report, stage=stage, tokens=run.tokens_seen, pace=pace)
        due = run.step % run.plan.evaluate_every == 0 and not run.done
        held_out = run.evaluate(run.recipe.evaluate_tokens) if due else None
        numbers["held_out_bits_per_byte"] = None if held_out is None else held_out.bits_per_byte
        yield numbers


def _introduce(run: "Run", wishes: Wishes) -> None:
    if not wishes.first:
        return
    slots = shapes.parameters(run.config)
    total = sum(slot.numel for slot in slots if slot.role != "hash_table")
    active, plan = active_params(run.config, slots), run.plan
    say(
        f"{run.config.model_type}, {in_parameters(total)} parameters, {in_parameters(active)} active; {plan.steps} "
        f"steps of {plan.samples * plan.context:,} tokens, {in_parameters(plan.tokens)} in all, rate {plan.rate:g}, "
        f"{in_flops(plan.flops_per_token)} a token"
    )
    if run.step:
        say(f"going on with step {run.step}")


def _peak(run: "Run", wishes: Wishes) -> float:
    import torch

    from daedal.train.peak import measured_peak

    dtype = torch.float32 if run.recipe.precision == "float32" else torch.bfloat16
    each = measured_peak(run.model.device, dtype)
    peak = float(run.processes.sum(torch.tensor([each], dtype=torch.float64))[0])
    if wishes.first:
        say(f"one large product reaches {in_flops(peak)}/s here, which MFU is measured by")
    return peak


def _finish(run: "Run", wishes: Wishes, pace: "Pace", seconds: float) -> None:
    """The model, the last word on held-out text, a sample."""
    held_out = run.evaluate()
    target = run.export()
    if not wishes.first:
        return
    say(f"{run.step} of {run.plan.steps} steps taken; the model is {target}: daedal serve {target}")
    if not run.done:
        say(f"go on with: {wishes.again}")
    if held_out is not None:
        print(f"held-out text: {held_out.bits_per_byte:.4f} bits per byte over {held_out.targets:,} tokens")
    if run.recipe.prompt:
        print(f"sample: {_sample(target, run.recipe.prompt, run.model.device)}")
    if wishes.json_line:
        print(json.dumps(_summary(run, target, held_out, pace, seconds)))


def _summary(
    run: "Run", target: Path, held_out: "Evaluation | None", pace: "Pace", seconds: float
) -> dict[str, str | float | int | bool | None]:
    return {
        "model": str(target),
        "finished": run.done,
        "steps": run.step,
        "tokens": run.tokens_seen,
        "seconds": round(seconds, 3),
        "tokens_per_second": pace.tokens_per_second,
        "flops_utilisation": pace.utilisation,
        "held_out_bits_per_byte": None if held_out is None else held_out.bits_per_byte,
    }


def _sample(directory: Path, prompt: str, device: "torch.device") -> str:
    """What the finished model, loaded as any other, makes of a prompt."""
    from daedal.checkpoint.load import load
    from daedal.infer.engine import Engine
    from daedal.infer.request import SamplingParams
    from daedal.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    engine = Engine(load(directory, device=device), tokenizer=tokenizer, max_batch=1)
    ids = tokenizer.encode(prompt)
    room = min(_SAMPLE_TOKENS, engine.max_context - len(ids))
    params = SamplingParams(max_tokens=max(room, 1), temperature=0.7, top_p=0.95, seed=0)
    return prompt + (engine.generate([ids], params)[0].text or "")


@contextmanager
def _joined(recipe: "Recipe", where: "torch.device") -> "Iterator[Place | None]":
    """Where this process stands, once all processes have met; None where it is alone."""
    import torch.distributed as dist

    from daedal.mesh import join
    from daedal.train.parallel.layout import Layout, Place

    count = join(where)
    if count == 1:
        yield None
        return
    try:
        layout = Layout.of(count, experts=recipe.expert_processes, stages=recipe.pipeline_stages)
        yield Place(layout, where)
    finally:
        dist.destroy_process_group()
