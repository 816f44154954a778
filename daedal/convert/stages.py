"""A dense checkpoint becomes a stock DeepSeek-V3 one, stage by stage, each with a report; it can stop anywhere.

Each stage reads what the ones before it left in the work directory beside the destination, and leaves its own there,
whole or not at all. So a run that was stopped or killed goes on where it was, and refuses to under other settings,
other texts or another source. Healing, the last stage, is distillation, of which this room knows nothing: whoever
runs it brings its result back by `adopt`.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from daedal.checkpoint.download import sha256_of
from daedal.checkpoint.load import load
from daedal.config import ModelConfig
from daedal.convert import attention_stages, expert_stages
from daedal.convert.attention_stages import CHECKPOINT, EXACT, NORM, RANK, ROTATION, Outcome
from daedal.convert.expert_stages import ROUTER, SPLIT
from daedal.convert.report import Sizes, StageReport
from daedal.convert.scene import STATISTICS, Scene, Watch
from daedal.convert.settings import Settings
from daedal.convert.texts import Texts
from daedal.convert.work import Work, finish
from daedal.errors import CheckpointError, ConfigError

HEAL = "heal"
STAGES = (EXACT, STATISTICS, ROTATION, RANK, NORM, SPLIT, ROUTER, HEAL)

_MAKERS: Mapping[str, Callable[[Scene, Path], Outcome]] = MappingProxyType(
    {
        EXACT: attention_stages.exact,
        STATISTICS: attention_stages.statistics,
        ROTATION: attention_stages.rotation,
        RANK: attention_stages.rank,
        NORM: attention_stages.norm,
        SPLIT: expert_stages.split,
        ROUTER: expert_stages.router,
    }
)


class Conversion:
    """One conversion of `source` into `destination`. CheckpointError or ConfigError where it cannot be, before work.

    student: a latent form of `source`, healed perhaps: its attention stays as it is, and only experts are made.
    command: the command line that gives a stage again, of its name. watch: told (what, done, in all).
    """

    def __init__(
        self,
        source: Path,
        destination: Path,
        settings: Settings,
        texts: Texts,
        *,
        student: Path | None = None,
        command: Callable[[str], str],
        watch: Watch = lambda what, done, total: None,
    ):
        settings.check(ModelConfig.read(source))
        for place in (source, *([] if student is None else [student])):
            check_places(place, destination)
        self.settings, self._student = settings, student
        self.stages = _stages(settings, student)
        self.identity = _identity(source, settings, texts, student)
        self._source, self._destination, self._texts = source, destination, texts
        self._command, self._watch = command, watch

    @cached_property
    def work(self) -> Work:
        return Work(work_directory(self._destination), self.identity)

    @cached_property
    def _scene(self) -> Scene:
        return Scene(
            source=self._source,
            student=self._student,
            settings=self.settings,
            texts=self._texts,
            work=self.work,
            watch=self._watch,
        )

    def run(self, last: str) -> Iterator[StageReport]:
        """A report for each stage up to `last`, or up to healing, done now or before."""
        if last not in self.stages:
            raise ConfigError(f"the last stage is {last!r}: this conversion has {', '.join(self.stages)}")
        for stage in self.stages[: self.stages.index(last) + 1]:
            if stage != HEAL:
                yield self._known(stage) or self._make(stage)

    def checkpoint(self, last: str) -> Path | None:
        """Where the latest checkpoint of the stages up to `last` lies; None where none has come so far."""
        for stage in reversed(self.stages[: self.stages.index(last) + 1]):
            if (self.work / stage / CHECKPOINT).is_dir():
                return self.work / stage / CHECKPOINT
        return None

    def adopt(self, stage: str, checkpoint: Path, *, seconds: float, details: Mapping[str, float]) -> StageReport:
        """The report of a stage that was made elsewhere: examined, and noted as done."""
        known = self._known(stage)
        if known is None:
            began = time.monotonic()
            model = load(checkpoint, device="cpu", dtype=torch.float32)
            quality = self._scene.examine(model)
            known = StageReport(
                stage=stage,
                sizes=Sizes.of(model.config),
                quality=quality,
                details=details,
                seconds=seconds + time.monotonic() - began,
                command=self._command(stage),
            )
            with self.work.making(stage) as directory:
                finish(directory, known.record())
        return known

    def _known(self, stage: str) -> StageReport | None:
        record = self.work.report(stage)
        return None if record is None else StageReport.of_record(record)

    def _make(self, stage: str) -> StageReport:
        began = time.monotonic()
        with self.work.making(stage) as directory:
            quality, details = _MAKERS[stage](self._scene, directory)
            report = StageReport(
                stage=stage,
                sizes=self._sizes(stage, directory),
                quality=quality,
                details=details,
                seconds=time.monotonic() - began,
                command=self._command(stage),
            )
            finish(directory, report.record())
        return report

    def _sizes(self, stage: str, directory: Path) -> Sizes:
        """Of the model that a stage would serve: the source until the cut, then the stock one."""
        if (directory / CHECKPOINT).is_dir():
            return Sizes.of(ModelConfig.read(directory / CHECKPOINT))
        return Sizes.of(self._scene.stock if stage == RANK else self._scene.config)


def work_directory(destination: Path) -> Path:
    """Where a conversion lies until it is done."""
    return destination.with_name(f"{destination.name}.convert")


def check_places(source: Path, destination: Path) -> None:
    """CheckpointError where `destination` cannot become a checkpoint made of `source`."""
    if destination.resolve() == source.resolve() or source.resolve() in destination.resolve().parents:
        raise CheckpointError(f"the destination {destination} is the source, or inside it: give a place elsewhere")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: give a directory that is empty or does not exist yet")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / "config.json").is_file():
        raise CheckpointError(f"{destination} holds files that are no checkpoint: give an empty or new directory")


def _stages(settings: Settings, student: Path | None) -> tuple[str, ...]:
    """Of STAGES those that such a conversion has."""
    if student is None:
        return tuple(stage for stage in STAGES if settings.experts is not None or stage not in (SPLIT, ROUTER))
    if settings.experts is None:
        raise ConfigError(f"no experts were asked for, and {student} is latent already: give their number")
    return SPLIT, ROUTER, HEAL


def _files(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of what decides a checkpoint's function."""
    paths = sorted((*checkpoint.glob("*.safetensors"), checkpoint / "config.json"))
    return {path.name: sha256_of(path) for path in paths}


def _identity(source: Path, settings: Settings, texts: Texts, student: Path | None) -> dict[str, Any]:
    windows = {
        "calibration": [len(ids_T) for ids_T in texts.calibration],
        "held_out": {name: [len(ids_T) for ids_T in given] for name, given in texts.held_out.items()},
    }
    identity = {
        "source": _files(source),
        "settings": asdict(settings),
        "texts": dict(texts.digests),
        "windows of text": windows,
    }
    if student is not None:
        identity["student"] = _files(student)
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found
