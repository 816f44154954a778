"""Healing: a converted student learns from the dense original it was made of, on files of text, under a budget.

The last stage of a conversion. Many short windows of different files in every step, forward KL from the original beside
the true next token, AdamW on attention and norms alone: what a first trial found to matter, in that order. A run that
was stopped goes on from its last checkpoint, and one that is done is not done again. What is written is a stock
checkpoint with its provenance. Knows nothing of how the student was converted.

    DESTINATION.healing/shards-NN, checkpoints    to go on from; removed once the student is written
    DESTINATION/healing.json                      settings, what it took, the curve
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from daedal.checkpoint.load import load
from daedal.distill import provenance
from daedal.distill.budget import Course
from daedal.distill.documents import document
from daedal.distill.healed import WORK, Healed, Healing, finished, write_receipt
from daedal.distill.held_out import HeldOut
from daedal.distill.lessons import TaughtBatch, compose
from daedal.distill.losses import Measure
from daedal.distill.mixture import Mixture, Source, Turns, Windows, shares_of
from daedal.distill.objective import Distilling
from daedal.distill.student import Student
from daedal.distill.teachers import LocalTeacher, check_vocabulary
from daedal.distill.texts import Text, open_texts, spread_windows
from daedal.distill.training import Point, Training
from daedal.errors import ConfigError
from daedal.infer.memory import keep_freed_memory
from daedal.train.loop import LoopConfig, StepReport

_TEACHER = "original"
__all__ = ["Healed", "Healing", "heal"]


def heal(
    student: Path,
    teacher: Path,
    destination: Path,
    *,
    text: Sequence[Path],
    settings: Healing,
    watch: Callable[[StepReport], None] = lambda report: None,
    measured: Callable[[Point], None] = lambda point: None,
    said: Callable[[str, int, int], None] = lambda what, done, total: None,
    save_every: float = 300.0,
    shards: Path | None = None,
    device: torch.device | str = "cpu",
) -> Healed:
    """Writes to `destination` the student of `student`, healed by the teacher of `teacher` on files of real text.

    text: each file has an equal share; all of it may be learnt from, but for what is held out as the settings say.
    watch: called after each step. measured: with each point of the curve after the first. said: with what is being
    prepared, and how far. save_every: seconds between checkpoints. shards: where the tokenised text lies, for other
    runs on it too; None is a place of this run's own. Raises PermissionRefused where the original may not be learnt
    from, TeacherError where it does not fit the student, ConfigError where `destination` holds another.
    """
    known, parent = provenance.Model.of(teacher), provenance.Model.of(student)
    verdict = known.verdict(student=settings.name or destination.name, permission=settings.permission).require()
    check_vocabulary(known.name, teacher, student)
    identity = _identity(parent, known, text, settings)
    if (done := finished(destination, identity)) is not None:
        return done
    keep_freed_memory()
    work = destination.with_name(destination.name + WORK)
    data = _data(student, text, work, settings, said, shards or work)
    narrow = settings.precision == "bfloat16"
    scorer = LocalTeacher(teacher, narrow=narrow, device=device)
    biases = settings.bias_speed > 0
    pupil = Student(student, roles=settings.trained, narrow=narrow, device=device, biases=biases)
    said("measuring the original", 0, 0)
    held_out = HeldOut.of(data.measured, scorer, device=device)
    training = Training(
        pupil,
        _Steps(data.mixture, scorer, settings),
        Distilling(measure=Measure(gate=settings.gate)),
        budget=settings.budget,
        course=Course(rate=settings.rate, warmup=settings.warmup, floor=settings.floor),
        loop=LoopConfig(clip=settings.clip, bias_speed=settings.bias_speed),
        directory=work / "checkpoints",
        identity=identity,
    )
    with closing(training):
        _run(training, held_out, settings.evaluations, watch, measured, save_every)
    pupil.export(destination, dtype=None if settings.saved_dtype is None else getattr(torch, settings.saved_dtype))
    written = load(destination, device=device, dtype=torch.bfloat16 if narrow else torch.float32)
    after = held_out.measure(written).record()
    healed = Healed(
        directory=destination,
        before=training.curve[0].measured,
        after=after,
        curve=tuple(training.curve),
        tokens=training.tokens,
        seconds=training.seconds,
    )
    told = provenance.Teaching(model=known, verdict=verdict, obtained="hidden states of the local weights")
    document(destination, _provenance(parent, told, data.texts, settings, healed), parent=student)
    write_receipt(healed, identity)
    shutil.rmtree(work, ignore_errors=True)
    return healed


def _run(
    training: Training,
    held_out: HeldOut,
    evaluations: int,
    watch: Callable[[StepReport], None],
    measured: Callable[[Point], None],
    save_every: float,
) -> None:
    """All steps that are left."""
    model = training.student.model
    training.resume()
    for report, point in training.measured_steps(
        lambda: held_out.measure(model).record(), evaluations=evaluations, save_every=save_every
    ):
        watch(report)
        if point is not None:
            measured(point)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Data:
    """texts: to learn from. mixture: of their windows. measured: held-out windows by file."""

    texts: Sequence[Text]
    mixture: Mixture
    measured: Mapping[str, Sequence[Any]]


@dataclass(frozen=True, eq=False)
class _Steps:
    """Batches of step n, with the teacher's signal on them if it has a share."""

    mixture: Mixture
    scorer: LocalTeacher
    settings: Healing

    def __call__(self, step: int) -> tuple[TaughtBatch, ...]:
        samples = self.settings.samples
        batch = compose([self.mixture.sample(step * samples + index) for index in range(samples)])
        return (replace(batch, signal=self.scorer.score(batch.inputs)) if self.settings.share > 0 else batch,)


def _data(
    student: Path,
    text: Sequence[Path],
    work: Path,
    settings: Healing,
    said: Callable[[str, int, int], None],
    shards: Path,
) -> _Data:
    validation = 0.0 if settings.held_out else settings.validation
    texts = open_texts(text, student, shards, validation=validation, window=settings.longest, progress=said)
    if settings.held_out:
        others = open_texts(settings.held_out, student, work / "held-out", progress=said)
        held = {one.name: one.train for one in others}
    else:
        held = {one.name: one.held_out for one in texts if one.held_out is not None}
    if not held:
        raise ConfigError(
            "no document of the text is held out to measure on, it is too short for that: give more text, a larger "
            "`validation`, or files as `held_out`"
        )
    return _Data(
        texts=texts,
        mixture=_mixture(texts, settings),
        measured=spread_windows(held, context=settings.evaluate_context, tokens=settings.evaluate_tokens),
    )


def _mixture(texts: Sequence[Text], settings: Healing) -> Mixture:
    """Each text alike, in windows of one length; with a share of long ones, for which the texts take turns."""

    def windows(context: int) -> tuple[Windows, ...]:
        return tuple(
            Windows(one.train, name=f"{one.name} {context}", context=context, share=settings.share, teacher=_TEACHER)
            for one in texts
        )

    sources: tuple[Source, ...] = windows(settings.context)
    weights = [1.0] * len(sources)
    if settings.long_context is not None and settings.long_share > 0:
        weights = [1.0 - settings.long_share] * len(sources) + [settings.long_share * len(sources)]
        sources = (*sources, Turns(windows(settings.long_context)))
    return Mixture(sources=sources, shares=shares_of(weights), seed=settings.seed)


def _identity(
    parent: provenance.Model, teacher: provenance.Model, text: Sequence[Path], settings: Healing
) -> dict[str, Any]:
    """What makes a healing this one, as JSON: other files or settings are another."""
    told = {
        "student": dict(parent.files),
        "teacher": dict(teacher.files),
        "text": [f"{path.name} {_size(path)}" for path in text],
        "settings": settings.record(),
    }
    identity: dict[str, Any] = json.loads(json.dumps(told))
    return identity


def _size(path: Path) -> int:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a file or a directory of text")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _provenance(
    parent: provenance.Model,
    teaching: provenance.Teaching,
    texts: Sequence[Text],
    settings: Healing,
    healed: Healed,
) -> provenance.Provenance:
    licences = {one.name: ", ".join(sorted({o.licence for o in one.manifest.origins})) for one in texts}
    files = [one for one in texts if one.path.is_file()]
    return provenance.Provenance(
        name=settings.name or healed.directory.name,
        parent=parent,
        teachers=(teaching,),
        data=[provenance.Data.of(one.path, role="real text", licence=licences[one.name] or "unknown") for one in files],
        training={"kind": "healing", "loss": "forward KL and cross-entropy", **settings.record()},
        metrics={"tokens": healed.tokens, "seconds": round(healed.seconds, 3), **healed.after},
        lost=(
            f"Perplexity on held-out text is {healed.after['ratio']:.4f} times the original's; before healing it was "
            f"{healed.before['ratio']:.4f} times.",
            "What is lost beyond text like the held-out files was not measured here.",
        ),
    )
