"""One run of a recipe in a directory: everything is built or restored, steps are taken, the model is written.

    OUT/tokenizer, OUT/shards    made of the text once (`preparation`)
    OUT/checkpoints              to go on from (`checkpoints`)
    OUT/metrics.jsonl, OUT/tensorboard    a line for each step (`reports`)
    OUT/model                    the stock checkpoint that comes out

Whoever iterates over `steps` decides when to evaluate, save and stop. Knows no command line and no terminal.
"""

import json
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from daedal import shapes
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train import precision
from daedal.train.batches import Batch, Batches, bits_per_byte
from daedal.train.checkpoints import Checkpoints, export
from daedal.train.dataset import Dataset
from daedal.train.encoding import tokenizer_digest
from daedal.train.learner import Alone, Learner
from daedal.train.loop import LoopConfig, StepReport, TrainingError, together, train
from daedal.train.manifest import TRAIN, VALIDATION
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.parallel.layout import Place
from daedal.train.parallel.spread import spread
from daedal.train.preparation import Prepared
from daedal.train.processes import ALONE
from daedal.train.recipe import PLAIN, Plan, Recipe
from daedal.train.sampling import Sampler

MODEL, CHECKPOINTS = "model", "checkpoints"
CONTINUES = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The chat template of a model that has read text and no conversation: it continues what it is given."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out text: bits of it per byte, and each part of the objective per target. targets: of all processes."""

    bits_per_byte: float
    parts: Mapping[str, float]
    targets: int


class Run:
    """A recipe on its way, on this process or on all of those that `place` is one of. step: the next one to take."""

    def __init__(
        self, recipe: Recipe, prepared: Prepared, directory: Path, *, device: torch.device, place: Place | None = None
    ):
        self.recipe, self.prepared, self.directory = recipe, prepared, directory
        self.processes = ALONE if place is None else place.everyone
        self._first = place is None or place.stage == place.data_rank == 0
        self._rank, self._readers = (0, 1) if place is None else (place.data_rank, place.layout.data)
        self.config = model_config(recipe, prepared)
        self.plan: Plan = recipe.plan(self.config)
        self._micro_batches = self.plan.micro_batches(self._readers)
        digest = tokenizer_digest(prepared.tokenizer)
        self._data = Dataset.open(prepared.shards, split=TRAIN)
        self._data.check(vocab_size=self.config.vocab_size, tokenizer_digest=digest)
        self._held_out = Dataset.open(prepared.shards, split=VALIDATION) if recipe.validation else None
        model = _model(self.config, recipe, device)
        self.learner: Learner = Alone(model) if place is None else spread(model, place)
        self.model = self.learner.model
        self.optimizers = Optimizers(
            groups(self.model, self.config),
            OptimizerConfig(rate=self.plan.rate, schedule=self.plan.schedule, weight_decay=recipe.weight_decay),
        )
        self._identity = {
            "model": json.loads(json.dumps(self.config.to_published())),
            "context": self.plan.context,
            "samples": self.plan.samples,
            "seed": recipe.seed,
            "tokenizer": digest,
        }
        self.checkpoints = Checkpoints(directory / CHECKPOINTS, keep=recipe.keep)
        self.saved_step: int | None = None
        self.step = 0

    @property
    def tokens_seen(self) -> int:
        return self.step * self.plan.samples * self.plan.context

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps

    def steps(self, last: int | None = None) -> Iterator[tuple[str, StepReport]]:
        """(stage, report) of each step from the next one on, up to the end of the run or to step `last`.

        TrainingError where a loss is not finite: it names the step and the checkpoint to go on from.
        """
        end = self.plan.steps if last is None else min(last, self.plan.steps)
        try:
            for stage, first, stop in self.plan.stages:
                if max(first, self.step) < min(stop, end):
                    yield from ((stage, report) for report in self._stage(stage, min(stop, end)))
        except TrainingError as error:
            kept = "no checkpoint was saved yet" if self.saved_step is None else f"step {self.saved_step} is saved"
            raise TrainingError(f"{error} ({kept})") from error

    def _stage(self, stage: str, stop: int) -> Iterator[StepReport]:
        recipe, plan = self.recipe, self.plan
        freeze(self.model, stage)
        sampler = Sampler(self._data, context=plan.context, seed=recipe.seed)
        batches = Batches(
            sampler,
            global_batch=plan.samples,
            micro_batches=self._micro_batches,
            process=self._rank,
            processes=self._readers,
            start_step=self.step,
        )
        with closing(cast("Generator[tuple[Batch, ...]]", iter(batches))) as steps:
            for report in train(
                self.model,
                islice(steps, stop - self.step),
                self._objective(stage),
                self.optimizers,
                config=LoopConfig(clip=recipe.clip, bias_speed=plan.bias_speed, bias_schedule=plan.schedule),
                start_step=self.step,
                learner=self.learner,
            ):
                self.step = report.step + 1
                yield report

    def _objective(self, stage: str) -> Pretraining:
        recipe = self.recipe
        return Pretraining(mtp_weight=recipe.mtp_weight, balance_weight=recipe.balance_weight, stage=stage)

    def _stage_at(self, step: int) -> str:
        return next((name for name, _, stop in self.plan.stages if step < stop), self.plan.stages[-1][0])

    def evaluate(self, tokens: int | None = None) -> Evaluation | None:
        """The objective on held-out text, always the same samples: so many tokens of it at most, else all.

        None where the recipe holds nothing out. Balance is not counted, nothing is learnt.
        """
        if self._held_out is None:
            return None
        sampler = Sampler(self._held_out, context=self.plan.context, epochs=1, shuffle=False)
        samples = min(self.plan.micro_samples, 32) * self._readers
        batches = Batches(sampler, global_batch=samples, process=self._rank, processes=self._readers)
        assert batches.num_steps is not None
        count = batches.num_steps if tokens is None else -(-tokens // (samples * self.plan.context))
        objective = self._objective(self._stage_at(max(self.step - 1, 0)))
        targets = num_bytes = 0
        parts: dict[str, float] = {}
        self.model.eval()
        for step in range(min(count, batches.num_steps)):
            with together(f"the evaluation after step {self.step}"):
                sums = self.learner.measure(objective, batches.at(step))
            targets, num_bytes = targets + sums.targets, num_bytes + sums.num_bytes
            parts = {name: parts.get(name, 0.0) + value for name, value in sums.parts.items()}
        self.model.train()
        return Evaluation(
            bits_per_byte=bits_per_byte(parts["next_token"], num_bytes),
            parts={name: value / targets for name, value in parts.items()},
            targets=targets,
        )

    def save(self) -> None:
        """Writes a checkpoint to go on from, in the background; `close` waits for it."""
        self.checkpoints.save(self.step, self.model, self.optimizers, {"run": self._identity})
        self.saved_step = self.step

    def resume(self) -> None:
        """Goes on from the latest checkpoint. ConfigError where there is none, or it is another run's."""
        found = self.checkpoints.latest()
        if found is None:
            raise ConfigError(f"{self.directory} has no checkpoint to go on from: leave --resume out")
        self._check_identity(found.extra["run"])
        self.checkpoints.load_latest(self.model, self.optimizers)
        self.step = self.saved_step = found.step

    def _check_identity(self, before: Mapping[str, Any]) -> None:
        differing = [name for name, value in self._identity.items() if before.get(name) != value]
        if differing:
            raise ConfigError(
                f"{self.directory} holds a run with another {', '.join(differing)}: go on with the recipe it began "
                "with, or name another --out"
            )

    def export(self) -> Path:
        """Writes OUT/model of the latest checkpoint: a stock one with its tokenizer, which serves at once."""
        self.checkpoints.wait()
        target = self.directory / MODEL
        if self._first:
            export(self.checkpoints.directory, self.config, target, dtype=getattr(torch, self.recipe.saved_dtype))
            copy_tokenizer(self.prepared.tokenizer, target, continues=self.recipe.tokenizer is None)
        return target

    def close(self) -> None:
        """Waits until what was to be saved is on the disk."""
        self.checkpoints.close()


def model_config(recipe: Recipe, prepared: Prepared) -> ModelConfig:
    """Of the model that a recipe trains with this tokenizer."""
    published = recipe.published(vocabulary=prepared.vocabulary, bos_id=prepared.bos_id, eos_id=prepared.eos_id)
    return ModelConfig.from_published(published)


def freeze(model: Transformer, stage: str) -> None:
    """Only what a stage trains asks for gradients: all but indexers, indexers alone, everything."""
    slots = shapes.parameters(model.config) + shapes.drafting(model.config)
    indexers = {slot.name for slot in slots if slot.role == "indexer"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage == "sparse" or (name in indexers) == (stage == "warm-up"))


def copy_tokenizer(source: Path, target: Path, *, continues: bool) -> None:
    """The tokenizer's files beside a model. continues: with the chat template of a model that continues texts."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if continues:
        path = target / "tokenizer_config.json"
        described = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": CONTINUES}
        path.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model(config: ModelConfig, recipe: Recipe, device: torch.device) -> Transformer:
    """Random weights in float32; computes as the recipe's precision says."""
    model = initialise(empty(config, device=device, drafting=recipe.mtp > 0), seed=recipe.seed)
    if recipe.precision == "auto":
        raise ConfigError("precision is 'auto': it must be chosen for the device first")
    model.compute_dtype = None if recipe.precision == "float32" else torch.bfloat16
    if recipe.precision not in PLAIN:
        precision.apply(model, precision.preset(recipe.precision))
    model.recompute = recipe.recompute
    return model
