"""That models learn what can be learnt: a source of known entropy, balance among experts, and what indexers are for.

The numbers over more seeds and longer runs are in docs/training_proofs.md, each with its command.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.batches import Batch, Batches
from daedal.train.dataset import Dataset
from daedal.train.known import MarkovSource
from daedal.train.loop import LoopConfig, train
from daedal.train.manifest import VALIDATION
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.sampling import Sampler
from daedal.train.schedule import Schedule
from daedal.train.shards import write_shards
from tests.tiny import tiny_model, tiny_published

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    yield importlib.import_module
    for name in names & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)


def model_of(family: str, vocabulary: int) -> Transformer:
    changes: dict[str, object] = {"vocab_size": vocabulary, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    changes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    if family == "deepseek_v4":
        changes = {name: value for name, value in changes.items() if "group" not in name}
        changes["compress_ratios"] = [0, 4]
    return initialise(empty(ModelConfig.from_published(tiny_published(family, **changes))), seed=0)


@torch.no_grad()
def fresh_loss(model: Transformer, data: Path) -> float:
    sampler = Sampler(Dataset.open(data, split=VALIDATION), context=64, epochs=1, shuffle=False)
    batches = Batches(sampler, global_batch=64)
    assert batches.num_steps is not None
    losses = [
        Pretraining(balance_weight=0.0)(model, batch) for step in range(batches.num_steps) for batch in batches.at(step)
    ]
    return sum(float(loss.parts["next_token"]) for loss in losses) / sum(loss.targets for loss in losses)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_a_source_of_known_entropy_is_learnt_to_within_two_percent(family: str, tmp_path: Path) -> None:
    """On documents that were never read: no lower than the entropy but by chance, no more than 2 % above."""
    source, steps = MarkovSource(size=16, seed=4), 120
    write_shards(source.documents(100_000), source.vocabulary, tmp_path / "data", validation=0.1)
    model = model_of(family, source.size)
    before = fresh_loss(model, tmp_path / "data")
    assert before > 1.3 * source.entropy
    settings = OptimizerConfig(rate=1e-2, schedule=Schedule(steps=steps, warmup=10))
    batches = Batches(Sampler(Dataset.open(tmp_path / "data"), context=64), global_batch=10)
    steps_of_it = (batches.at(step) for step in range(steps))
    optimizers = Optimizers(groups(model, model.config), settings)
    for _ in train(model, steps_of_it, Pretraining(), optimizers, config=LoopConfig()):
        pass
    assert fresh_loss(model, tmp_path / "data") == pytest.approx(source.entropy, rel=0.02)


def test_biases_balance_experts_on_skewed_text_as_cheaply_as_a_loss(bench: Any, tmp_path: Path) -> None:
    """One seed of five; the script has them all, other ways and another source."""
    script = bench("expert_balance")
    span, source = script.Span(steps=100, samples=8, rate=1e-2), script.make_source("zipf", 0)
    write_shards(source.documents(100 * 8 * script.CONTEXT), source.vocabulary, tmp_path / "data", validation=0.1)
    found = {}
    for way in (script.OURS, script.THEIRS):
        model = script.make_model("deepseek_v3", 1, source.size, 0)
        found[way] = script.run(script.WAYS[way], model, tmp_path / "data", span, seed=0)
    assert found[script.OURS].unread < script.GOAL, "2.7 where no bias moves"
    assert found[script.OURS].idle == 0
    assert found[script.OURS].excess < found[script.THEIRS].excess + 0.005


@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v4"])
def test_indexers_alone_come_closer_to_what_attention_looks_for(family: str) -> None:
    """In the warm-up, on one batch: nothing else moves. That they find what a task needs is shown by the script."""
    model = tiny_model(family, seed=2, **({"num_hidden_layers": 2} if family == "deepseek_v32" else {}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("indexer" in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    batch = Batch.of([torch.randint(320, (97,), generator=generator).numpy()])
    settings = OptimizerConfig(rate=2e-2, schedule=Schedule(steps=40))
    optimizers = Optimizers(groups(model, model.config), settings)
    reports = list(train(model, [(batch,)] * 40, Pretraining(stage="warm-up"), optimizers, config=LoopConfig()))
    first, last = reports[0].parts, reports[-1].parts
    assert last["indexer"] < 0.7 * first["indexer"]
    assert last["recall"] > first["recall"] + 0.1
    assert last["held"] > first["held"] + 0.05
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("indexer" not in name), name


def test_the_task_is_what_it_says(bench: Any) -> None:
    script = bench("indexer_recall")
    task = script.Task()
    texts = task.texts(np.random.default_rng(0), 3)
    ids_BT = texts.batch.inputs.ids_T.view(3, task.length)
    targets_BT = texts.batch.targets_T.view(3, task.length)
    assert not (targets_BT[:, : task.told] >= 0).any()
    first_query = task.classes * task.values
    for text in range(3):
        for query in range(task.asked):
            asked = int(ids_BT[text, task.told + query]) - first_query
            marked = ids_BT[text, texts.marks_BQR[text, query]].tolist()
            assert {token // task.values for token in marked} == {asked}
            answer = int(targets_BT[text, task.told + query]) - first_query - task.classes
            assert answer in {token % task.values for token in marked}
    assert 0 < texts.floor < np.log(task.repeats)


def test_an_indexer_finds_the_entries_that_attention_needs(bench: Any) -> None:
    """Every query needs as many entries as it may read: recall is of all of these, beside dense attention."""
    script = bench("indexer_recall")
    task, steps = script.Task(classes=2, asked=16), {"dense": 120, "warm-up": 60, "sparse": 10}
    model = script.make_model("deepseek_v32", task, 0)
    assert task.repeats == model.config.index_topk == 4 < task.told
    found = dict(script.learn(model, task, steps, samples=6, rate=1e-2, seed=0))
    assert found["dense"].excess_reading_all < 0.2 < 0.8 < found["dense"].excess_reading_chosen
    assert found["dense"].recall < 0.5
    assert min(found["warm-up"].recall, found["sparse"].recall) > 0.95
    assert found["sparse"].excess_reading_chosen < 0.25
