"""One run of a recipe in a directory: teachers are judged and asked, steps are taken, the student is written.

    OUT/shards, OUT/answers, OUT/signals    made once: tokens of the text, what teachers wrote, what they scored
    OUT/checkpoints                         to go on from
    OUT/metrics.jsonl, OUT/tensorboard      a line for each step
    OUT/model, OUT/curve.json               the stock checkpoint that comes out, with its provenance; what was measured

Whoever iterates over `steps` decides when to stop. Knows no command line and no terminal.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from daedal.checkpoint.load import load
from daedal.checkpoint.sources import resolve
from daedal.distill import fingerprints, provenance
from daedal.distill.atomic import write_text
from daedal.distill.budget import Course
from daedal.distill.carriers import Blocks
from daedal.distill.curriculum import Answered, Curriculum, Judged, Prompts
from daedal.distill.documents import document
from daedal.distill.faculty import Faculty
from daedal.distill.held_out import HeldOut
from daedal.distill.items import Rendering, Verifier, exact
from daedal.distill.losses import Measure
from daedal.distill.mixture import Mixture, Source, Windows, shares_of
from daedal.distill.objective import Distilling
from daedal.distill.on_policy import Actor
from daedal.distill.recipe import Recipe
from daedal.distill.student import Student
from daedal.distill.texts import Progress, Text, open_texts, spread_windows
from daedal.distill.training import Point, Training
from daedal.errors import ConfigError
from daedal.train.documents import licence_of
from daedal.train.loop import LoopConfig, StepReport

MODEL, CHECKPOINTS, CURVE = "model", "checkpoints", "curve.json"


class Run:
    """A recipe on its way. narrow: computes in bfloat16. verify: judges answers. said: told what is being prepared."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        *,
        device: torch.device,
        narrow: bool,
        said: Progress = lambda what, done, total: None,
        verify: Verifier = exact,
    ):
        self.recipe, self.directory, self._device, self._narrow = recipe, directory, device, narrow
        self._source = resolve(recipe.student)
        self._parent = provenance.Model.of(self._source)
        self.faculty = Faculty(recipe=recipe, student=self._source, work=directory, narrow=narrow, device=device)
        self.faculty.check()
        self._texts = self._open_texts(said)
        self._held = self._held_out_windows(said)
        self.judged: list[Judged] = self.faculty.ask(verify, said)
        biases = recipe.bias_speed > 0
        self.student = Student(self._source, roles=recipe.trained, narrow=narrow, device=device, biases=biases)
        own = Measure(divergence=recipe.own)
        self.training = Training(
            self.student,
            self._blocks(),
            Distilling(
                measure=Measure(divergence=recipe.divergence, gate=recipe.grounding.gate),
                own=own,
                balance_weight=recipe.balance_weight,
            ),
            budget=recipe.budget,
            course=Course(rate=recipe.rate, warmup=recipe.warmup, floor=recipe.floor),
            loop=LoopConfig(clip=recipe.clip, bias_speed=recipe.bias_speed),
            directory=directory / CHECKPOINTS,
            identity=self._identity(),
        )

    def steps(self) -> Iterator[tuple[StepReport, Point | None]]:
        """From the next one on, with what was measured after it, until the budget is spent or grounding ends the run.

        TrainingError where a loss is not finite.
        """
        recipe = self.recipe
        yield from self.training.measured_steps(
            self.measure,
            evaluations=recipe.evaluations,
            save_every=60 * recipe.save_minutes,
            rule=recipe.grounding.stop,
        )

    def measure(self) -> Mapping[str, float]:
        """The student as it is, on held-out text."""
        return self.held_out.measure(self.student.model).record()

    @cached_property
    def held_out(self) -> HeldOut:
        first = self.recipe.first_scorer
        scorer = None if first is None else self.faculty.roster.scorer(first.name)
        return HeldOut.of(self._held, scorer, device=self._device)

    def export(self) -> tuple[Path, Mapping[str, float]]:
        """Writes OUT/model with its provenance; what it measures on held-out text as it was written."""
        target = self.directory / MODEL
        dtype = None if self.recipe.saved_dtype is None else getattr(torch, self.recipe.saved_dtype)
        self.student.export(target, dtype=dtype)
        written = load(target, device=self._device, dtype=torch.bfloat16 if self._narrow else torch.float32)
        after = self.held_out.measure(written).record()
        document(target, self._provenance(after), parent=self._source)
        curve = {"curve": [point.record() for point in self.training.curve], "stopped": self.training.stopped}
        write_text(self.directory / CURVE, json.dumps(curve, indent=1) + "\n")
        return target, after

    def close(self) -> None:
        """Waits until checkpoints are on the disk, and writes signals that are still in memory."""
        self.training.close()
        self.faculty.close()

    def _open_texts(self, said: Progress) -> list[Text]:
        recipe = self.recipe
        paths = [Path(one.path) for one in recipe.readings]
        validation = 0.0 if recipe.held_out else recipe.validation
        shards = self.directory / "shards"
        return open_texts(
            paths,
            self._source,
            shards,
            column=recipe.column,
            validation=validation,
            window=recipe.context,
            progress=said,
        )

    def _held_out_windows(self, said: Progress) -> Mapping[str, Sequence[Any]]:
        recipe = self.recipe
        if recipe.held_out:
            place = self.directory / "shards-held-out"
            others = open_texts([Path(p) for p in recipe.held_out], self._source, place, progress=said)
            held = {one.name: one.train for one in others}
        else:
            held = {one.name: one.held_out for one in self._texts if one.held_out is not None}
        if not held:
            raise ConfigError("no document is held out to measure on: give more text, a larger `validation`, or files")
        return spread_windows(held, context=recipe.evaluate_context, tokens=recipe.evaluate_tokens)

    def _blocks(self) -> Blocks:
        recipe = self.recipe
        writes = recipe.on_policy > 0
        curriculum = Curriculum(mixture=self._mixture(), count=recipe.samples, write=self._write)
        scorers = [teacher for teacher in recipe.teachers if teacher.scores]
        return Blocks(
            samples=curriculum,
            carriers=self.faculty.carriers(self._data_digest()),
            length=recipe.block if writes or len(scorers) > 1 else 1,
            micro_samples=recipe.micro_samples,
        )

    def _mixture(self) -> Mixture:
        recipe, first = self.recipe, self.recipe.first_scorer
        sources: list[Source] = []
        for text, said in zip(self._texts, recipe.readings, strict=True):
            teacher = said.teacher or (None if first is None else first.name)
            share = recipe.share if teacher else 0.0
            sources.append(Windows(text.train, name=text.name, context=recipe.context, share=share, teacher=teacher))
        total = sum(one.weight for one in recipe.readings)
        weights = [recipe.grounding.real_share * one.weight / total for one in recipe.readings]
        rendering = Rendering(self._source)
        sources.append(Answered(self.judged, rendering, share=recipe.share, longest=recipe.context))
        sources.append(Prompts(self.judged, rendering, longest=recipe.context))
        for name, source in zip(("answers", "on_policy"), sources[-2:], strict=True):
            if getattr(recipe, name) and not len(source):
                raise ConfigError(f"`{name}` is above 0, and no prompt is left for it: give others, or leave it 0")
        shares = shares_of([*weights, recipe.answers, recipe.on_policy])
        return Mixture(sources=tuple(sources), shares=shares, seed=recipe.seed)

    @cached_property
    def _actor(self) -> Actor:
        return Actor(self.student, narrow=self._narrow)

    def _write(self, prompts: Sequence[Sequence[int]], seed: int) -> Sequence[Sequence[int]]:
        self._actor.refresh()
        recipe = self.recipe
        return self._actor.write(
            prompts, max_tokens=recipe.answer_tokens, temperature=recipe.temperature, seed=recipe.seed + seed
        )

    def _data_digest(self) -> str:
        """Of the windows that keys of cached signals name."""
        shards = [
            f"{text.name} {shard.tokens_sha256} {shard.documents_sha256}"
            for text in self._texts
            for shard in text.manifest.shards
        ]
        return fingerprints.of_texts([*shards, f"context {self.recipe.context}"])

    def _identity(self) -> dict[str, Any]:
        recipe = self.recipe
        settings = {name: repr(getattr(recipe, name)) for name in _DECISIVE}
        teachers = {name: dict(model.files) for name, model in self.faculty.models.items()}
        found = {"student": dict(self._parent.files), "teachers": teachers, "data": self._data_digest(), **settings}
        identity: dict[str, Any] = json.loads(json.dumps(found))
        return identity

    def _provenance(self, after: Mapping[str, float]) -> provenance.Provenance:
        recipe, first = self.recipe, self.training.curve[0].measured
        settings = {name: repr(getattr(recipe, name)) for name in _DECISIVE}
        lost = [
            f"On held-out real text it has {after['nats']:.4f} nats a token; it began with {first['nats']:.4f}.",
            "What is lost beyond held-out text was not measured here.",
        ]
        if self.training.stopped:
            lost.append(f"The run was ended before its budget was spent: {self.training.stopped}.")
        return provenance.Provenance(
            name=recipe.name,
            parent=self._parent,
            teachers=self.faculty.teachings(self.judged),
            data=self._data(),
            training={"kind": "distillation", "tokens": self.training.tokens, **settings},
            metrics={**after, "seconds": round(self.training.seconds, 3)},
            lost=lost,
        )

    def _data(self) -> list[provenance.Data]:
        found = []
        for text in self._texts:
            licences = ", ".join(sorted({origin.licence for origin in text.manifest.origins})) or "unknown"
            if text.path.is_file():
                found.append(provenance.Data.of(text.path, role="real text", licence=licences))
        for path in self.recipe.prompts:
            found.append(provenance.Data.of(Path(path), role="prompts", licence=licence_of(Path(path))))
        for teacher in self.recipe.recordings:
            source = Path(teacher.source)
            found.append(
                provenance.Data.of(source, role="teacher's answers", licence=teacher.licence or licence_of(source))
            )
        return found


_DECISIVE = (
    "trained",
    "grounding",
    "on_policy",
    "answers",
    "divergence",
    "own",
    "answer_tokens",
    "temperature",
    "block",
    "share",
    "balance_weight",
    "bias_speed",
    "context",
    "samples",
    "seed",
)
"""Fields that make a run another one; its length, rate and precision may change when it goes on."""
