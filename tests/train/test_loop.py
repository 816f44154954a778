"""The loop: cutting a step changes nothing, losses that are not finite end the run, and models learn."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.batches import Batch
from daedal.train.loop import LoopConfig, StepReport, TrainingError, train
from daedal.train.objective import Loss, Pretraining, shifted
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.schedule import Schedule
from tests.tiny import tiny_published

FAMILIES = ("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")


def model_of(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    drafts = 1 if family in ("deepseek_v3", "deepseek_v4") else 0
    published = tiny_published(family, num_nextn_predict_layers=drafts) | changes
    return initialise(empty(ModelConfig.from_published(published), drafting=True, dtype=dtype), seed=seed)


def pieces(count: int, *, seed: int, length: int = 25) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(320, (length + index + 1,), generator=generator).numpy() for index in range(count)]


def optimizers(model: Transformer, rate: float = 1e-3, steps: int = 50) -> Optimizers:
    return Optimizers(groups(model, model.config), OptimizerConfig(rate=rate, schedule=Schedule(steps=steps)))


def run(model: Transformer, steps: Sequence[Sequence[Batch]], rate: float = 1e-3) -> list[StepReport]:
    return list(train(model, steps, Pretraining(), optimizers(model, rate), config=LoopConfig()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_micro_batches_is_the_step_in_one(family: str) -> None:
    one, cut = model_of(family, dtype=torch.float64), model_of(family, dtype=torch.float64)
    data = [pieces(4, seed=seed) for seed in range(2)]
    whole = run(one, [(Batch.of(step),) for step in data])
    parts = run(cut, [tuple(Batch.of([piece]) for piece in step) for step in data])
    for a, b in zip(whole, parts, strict=True):
        assert a.targets == b.targets
        assert a.balance == b.balance
        for name in a.parts.keys() - {"indexer", "recall"}:  # means over queries that have something to choose from
            torch.testing.assert_close(a.parts[name], b.parts[name], rtol=1e-6, atol=1e-9)  # routers run in float32
        torch.testing.assert_close(a.norm, b.norm, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_recomputation_changes_no_gradient(family: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = model_of(family)
        model.recompute = recompute
        Pretraining()(model, Batch.of(pieces(3, seed=2))).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-6)


def test_a_drafting_module_sees_one_token_further_and_no_other_document() -> None:
    batch = Batch.of([[1, 2, 3, 4], [5, 6], [7, 8, 9]])
    places_t, following, targets_t = shifted(batch, 1)
    assert places_t.tolist() == [0, 1, 4]
    assert following.ids_T.tolist() == [2, 3, 8]
    assert following.positions_T.tolist() == [0, 1, 0]
    assert following.starts == (0, 2, 2, 3)
    assert targets_t.tolist() == [3, 4, 9]


def test_a_loss_that_is_not_finite_names_its_step_and_changes_nothing() -> None:
    model = model_of("deepseek_v3")

    def broken(model: Transformer, batch: Batch) -> Loss:
        loss = Pretraining()(model, batch)
        return replace(loss, total=loss.total * math.nan) if broken_now else loss

    broken_now = False
    reports = train(
        model, ((Batch.of(pieces(2, seed=seed)),) for seed in range(3)), broken, optimizers(model), config=LoopConfig()
    )
    next(reports)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken_now = True
    with pytest.raises(TrainingError, match="of step 1 is nan: nothing was updated"):
        next(reports)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_step_without_targets_is_refused() -> None:
    model = model_of("llama")
    empty_step = (Batch.of([[1, 2, 3]], [[True, False, False]]),)
    with pytest.raises(TrainingError, match="step 0 has nothing to predict"):
        run(model, [empty_step])


def repeated(batch: Batch, count: int) -> Iterator[tuple[Batch, ...]]:
    return ((batch,) for _ in range(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_one_batch_by_heart(family: str) -> None:
    model = model_of(family)
    batch = Batch.of(pieces(2, seed=3, length=12))
    reports = list(train(model, repeated(batch, 40), Pretraining(), optimizers(model, 1e-2, 40), config=LoopConfig()))
    assert reports[0].loss > 5.5
    assert reports[-1].loss < 0.4 * reports[0].loss


def test_biases_move_at_the_speed_of_their_step() -> None:
    model = model_of("deepseek_v3")
    config = LoopConfig(bias_speed=0.5, bias_schedule=Schedule(steps=3, decay="linear", floor=0.0))
    biases = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("correction_bias")}
    before = {name: tensor.clone() for name, tensor in biases.items()}
    steps = [(Batch.of(pieces(2, seed=seed)),) for seed in range(3)]
    for report in train(model, steps, Pretraining(), optimizers(model), config=config):
        speed = 0.5 * (2 - report.step) / 3
        for name, tensor in biases.items():
            moved_E = (tensor - before[name]).abs()
            torch.testing.assert_close(moved_E[moved_E > 1e-6], torch.full_like(moved_E, speed)[moved_E > 1e-6])
            assert bool(moved_E.any()) == (report.step < 2)
            before[name].copy_(tensor)
    assert {LoopConfig(bias_speed=0.25).bias_speed_at(step) for step in (0, 10**6)} == {0.25}
