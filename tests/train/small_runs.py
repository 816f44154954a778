"""Short runs of small models on one process or on several, alike in everything but their layout."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.batches import Batch
from daedal.train.checkpoints import Checkpoints
from daedal.train.learner import Alone, Learner
from daedal.train.loop import LoopConfig, train
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.parallel.layout import Layout, Place
from daedal.train.parallel.spread import spread
from daedal.train.schedule import Schedule
from tests.tiny import tiny_published

SAMPLES = 4  # of a step, over all processes


def model_of(family: str, **changes: object) -> Transformer:
    drafts = 1 if family in ("deepseek_v3", "deepseek_v4") else 0
    published = tiny_published(family, num_nextn_predict_layers=drafts) | changes
    return initialise(empty(ModelConfig.from_published(published), drafting=True), seed=0)


def steps(first: int, last: int, *, rank: int = 0, count: int = 1, micro_batches: int = 1) -> Iterator[Sequence[Batch]]:
    """The same samples for any number of processes; they differ in length, and one has nothing to draft."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        lengths = [28, 2 if step % 2 else 17, 33, 21]
        samples = [torch.randint(320, (length,), generator=generator).numpy() for length in lengths]
        own = samples[rank * SAMPLES // count : (rank + 1) * SAMPLES // count]
        each = len(own) // micro_batches
        yield tuple(Batch.of(own[start : start + each]) for start in range(0, len(own), each))


def optimizers_of(model: Transformer) -> Optimizers:
    config = OptimizerConfig(rate=2e-3, schedule=Schedule(steps=50))
    return Optimizers(groups(model, model.config), config)


def learn(
    learner: Learner,
    optimizers: Optimizers,
    batches: Iterator[Sequence[Batch]],
    *,
    start: int = 0,
    saving: tuple[Checkpoints, int] | None = None,
) -> dict[str, Tensor]:
    """Losses, norms, MaxVio, and all weights and biases at the end. saving: where, and after how many steps."""
    reports = []
    for report in train(
        learner.model, batches, Pretraining(), optimizers, config=LoopConfig(), start_step=start, learner=learner
    ):
        reports.append(report)
        if saving is not None and report.step + 1 == saving[1]:
            saving[0].save(saving[1], learner.model, optimizers, {"next": saving[1]})
    found = {
        "losses": torch.tensor([[report.parts[name] for name in sorted(report.parts)] for report in reports]).double(),
        "norms": torch.tensor([report.norm for report in reports]).double(),
        "violations": torch.tensor(
            [-1.0 if report.balance is None else report.balance.worst_violation for report in reports]
        ),
    }
    for name, tensor in learner.model.state_dict(keep_vars=True).items():
        found[f"model.{name}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def learn_alone(family: str, last: int, *, micro_batches: int = 1, **changes: object) -> dict[str, Tensor]:
    learner = Alone(model_of(family, **changes))
    return learn(learner, optimizers_of(learner.model), steps(0, last, micro_batches=micro_batches))


def learner_of(layout: Layout, family: str, *, recompute: bool = False, **changes: object) -> tuple[Learner, Place]:
    model = model_of(family, **changes)
    model.recompute = recompute
    place = Place(layout)
    return spread(model, place), place


def batches_of(place: Place, first: int, last: int, micro_batches: int) -> Iterator[Sequence[Batch]]:
    return steps(first, last, rank=place.data_rank, count=place.layout.data, micro_batches=micro_batches)


def learn_together(
    rank: int, layout: Layout, family: str, last: int, micro_batches: int, recompute: bool = False
) -> dict[str, Tensor]:
    """As a process of `tests.train.processes.run`. Evaluation in between must change nothing."""
    learner, place = learner_of(layout, family, recompute=recompute)
    optimizers = optimizers_of(learner.model)
    measured = [learner.measure(Pretraining(), next(batches_of(place, 0, 1, micro_batches)))]
    found = learn(learner, optimizers, batches_of(place, 0, last, micro_batches))
    measured.append(learner.measure(Pretraining(), next(batches_of(place, 0, 1, micro_batches))))
    found["measured"] = torch.tensor([sums.parts["next_token"] / sums.targets for sums in measured]).double()
    return found


def save_and_go_on(rank: int, directory: Path, layout: Layout, family: str) -> dict[str, Tensor]:
    """Four steps, of which the second is saved."""
    learner, place = learner_of(layout, family)
    checkpoints = Checkpoints(directory)
    batches = batches_of(place, 0, 4, SAMPLES // layout.data)
    found = learn(learner, optimizers_of(learner.model), batches, saving=(checkpoints, 2))
    checkpoints.close()
    return found


def resume(rank: int, directory: Path, layout: Layout | None, family: str) -> dict[str, Tensor]:
    """The last two of the four steps, from the checkpoint. layout: None for one process without a group."""
    if layout is None:
        learner, batches = Alone(model_of(family)), steps(2, 4, micro_batches=SAMPLES)
    else:
        learner, place = learner_of(layout, family)
        batches = batches_of(place, 2, 4, SAMPLES // layout.data)
    with torch.no_grad():
        for tensor in learner.model.state_dict().values():
            tensor.zero_()  # so that whatever is not loaded shows
    checkpoints, optimizers = Checkpoints(directory), optimizers_of(learner.model)
    saved = checkpoints.load_latest(learner.model, optimizers)
    assert saved is not None
    assert (saved.step, saved.extra) == (2, {"next": 2})
    found = learn(learner, optimizers, batches, start=2)
    checkpoints.close()
    return found
