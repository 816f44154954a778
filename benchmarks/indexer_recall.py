"""Whether indexers learn to find what attention looks for: retrieval of marked tokens from far back, stage by stage.

    python benchmarks/indexer_recall.py                      # V3.2 and V4, a minute and a half alone
    python benchmarks/indexer_recall.py --families deepseek_v4 --seed 1
    python benchmarks/indexer_recall.py --needed 2           # of the four entries that are read

The first part of a text holds marked tokens, each of a class and with a value, a few of every class; every token of the
second part asks for a class, and its target is the value of one of the marked tokens of that class. Nothing but these
tells the answer, and a query reads `READ` entries: by default as many as it needs. Where it needs fewer, nothing says
which of the others attention should prefer, and recall counts those too. A model of one layer first learns with
attention that reads everything, then its indexer alone, then both with what the indexer chooses. Measured on fresh
texts, for queries that ask: marked, the share of the marked tokens of the class that are in a chosen entry; recall and
held, beside dense attention (`train.indexing`); and the losses of reading everything and of reading what is chosen,
beside the least that is possible. Prints a table, and one JSON line last.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from torch import Tensor

from daedal.config import ModelConfig
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import Attended, Indexed
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.batches import IGNORED, Batch
from daedal.train.indexing import lesson
from daedal.train.loop import LoopConfig, train
from daedal.train.objective import Pretraining, Watch
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.schedule import Schedule

STAGES = ("dense", "warm-up", "sparse")
READ = 4  # entries of a query in the sparse stage


@dataclass(frozen=True, kw_only=True)
class Task:
    """classes, values: of marked tokens; repeats: marked tokens of each class in a text. spacing: a marked token stands
    somewhere in every so many tokens, others fill the rest. asked: queries that follow.
    """

    classes: int = 4
    values: int = 4
    repeats: int = READ
    spacing: int = 4
    asked: int = 32
    fillers: int = 24

    @property
    def vocabulary(self) -> int:
        """Marked tokens, then queries, then values, then fillers."""
        return self.classes * self.values + self.classes + self.values + self.fillers

    @property
    def told(self) -> int:
        """Tokens of the first part."""
        return self.classes * self.repeats * self.spacing

    @property
    def length(self) -> int:
        return self.told + self.asked

    def texts(self, random: np.random.Generator, count: int) -> "Texts":
        ids, targets, marks = [], [], []
        floor = 0.0
        first_query, first_value = self.classes * self.values, self.classes * self.values + self.classes
        for _ in range(count):
            classes = random.permutation(np.repeat(np.arange(self.classes), self.repeats))
            values = random.integers(self.values, size=len(classes))
            places = np.arange(len(classes)) * self.spacing + random.integers(self.spacing, size=len(classes))
            told = random.integers(self.vocabulary - self.fillers, self.vocabulary, size=self.told)
            told[places] = classes * self.values + values
            of_class = np.stack([np.flatnonzero(classes == name) for name in range(self.classes)])
            asked = random.integers(self.classes, size=self.asked)
            answers = of_class[asked, random.integers(self.repeats, size=self.asked)]
            shares = (values[of_class][:, :, None] == np.arange(self.values)).mean(1)
            surprise = -np.log(shares, where=shares > 0, out=np.zeros_like(shares))
            floor += float((shares * surprise).sum(1)[asked].sum())
            ids.append(np.concatenate((told, first_query + asked)))
            targets.append(np.concatenate((np.full(self.told, IGNORED), first_value + values[answers])))
            marks.append(places[of_class[asked]])
        batch = Batch(
            inputs=RaggedBatch.rectangular(torch.from_numpy(np.stack(ids))),
            targets_T=torch.from_numpy(np.concatenate(targets)),
            num_targets=count * self.asked,
            num_bytes=0,
        )
        return Texts(batch=batch, marks_BQR=torch.from_numpy(np.stack(marks)), floor=floor / (count * self.asked))


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """marks_BQR: for each query that asks the places of the marked tokens of its class. floor: the least loss that is
    possible, nats per query.
    """

    batch: Batch
    marks_BQR: Tensor
    floor: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """Means over queries that ask; the losses in nats per query, less the least possible."""

    marked: float
    recall: float
    held: float
    excess_reading_all: float
    excess_reading_chosen: float


class Asked(Watch):
    """Watches attention read everything, and says what the indexer would have chosen for the queries that ask."""

    def __init__(self, texts: Texts, count: int) -> None:
        super().__init__(stage="warm-up", index_topk=count, balances=False)
        self.texts, self.count = texts, count
        self.marked: list[float] = []

    def indexed(self, seen: Indexed, attended: Attended, *, again: bool) -> None:
        batch = attended.batch
        texts, queries, _ = self.texts.marks_BQR.shape
        asks_T = self.texts.batch.targets_T != IGNORED
        entries_QR = self.texts.marks_BQR.flatten(0, 1) // seen.rate
        chosen_QA = seen.choose(batch, self.count)[asks_T]
        # V4's entries pool the group before their own too.
        reached = [entries_QR] if seen.rate == 1 else [entries_QR, entries_QR + 1]
        hit_QR = torch.stack([(chosen_QA[:, None] == names[..., None]).any(-1) for names in reached]).any(0)
        self.marked.append(float(hit_QR.float().mean()))
        found = lesson(_only(seen, asks_T), _these(attended, asks_T, texts, queries), count=self.count)
        self.indexer_losses.append(found.loss)
        self.recall, self.held = self.recall + found.recall, self.held + found.held
        self.queries += found.queries


def _only(seen: Indexed, asks_T: Tensor) -> Indexed:
    """The indexer's side of the queries that ask."""
    return replace(seen, q_TIK=seen.q_TIK[asks_T], weights_TI=seen.weights_TI[asks_T])


def _these(attended: Attended, asks_T: Tensor, texts: int, queries: int) -> Attended:
    """Attention's side: the last `queries` tokens of each text, as if those before were known already."""
    batch = attended.batch
    told = batch.counts[0] - queries
    later = RaggedBatch(
        ids_T=batch.ids_T[asks_T],
        positions_T=batch.positions_T[asks_T],
        starts=tuple(range(0, texts * queries + 1, queries)),
        pasts=(told,) * texts,
    )
    return replace(attended, batch=later, q_THK=attended.q_THK[asks_T])


def make_model(family: str, task: Task, seed: int) -> Transformer:
    published: dict[str, object] = {
        "model_type": family,
        "vocab_size": task.vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": READ,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    if family == "deepseek_v4":
        published |= {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "compress_ratios": [4],
            "num_hash_layers": 0,
            "o_groups": 2,
            "o_lora_rank": 32,
            "sliding_window": 8,
            "compress_rope_theta": 160000.0,
        }
    else:
        published |= {
            "num_key_value_heads": 4,
            "kv_lora_rank": 48,
            "qk_nope_head_dim": 24,
            "v_head_dim": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        }
    return initialise(empty(ModelConfig.from_published(published)), seed=seed)


@torch.no_grad()
def measure(model: Transformer, texts: Texts) -> Found:
    assert model.config.index_topk is not None
    watch = Asked(texts, model.config.index_topk)
    model.states(texts.batch.inputs, observer=watch)
    losses = {
        stage: float(Pretraining(stage=stage)(model, texts.batch).parts["next_token"]) / texts.batch.num_targets
        for stage in ("dense", "sparse")
    }
    return Found(
        marked=sum(watch.marked) / len(watch.marked),
        recall=watch.shares()["recall"],
        held=watch.shares()["held"],
        excess_reading_all=losses["dense"] - texts.floor,
        excess_reading_chosen=losses["sparse"] - texts.floor,
    )


def trains(name: str, stage: str) -> bool:
    """Whether a stage trains a parameter."""
    return {"dense": "indexer" not in name, "warm-up": "indexer" in name, "sparse": True}[stage]


def learn(
    model: Transformer, task: Task, steps: Mapping[str, int], *, samples: int, rate: float, seed: int
) -> Iterator[tuple[str, Found]]:
    """Each stage's name, and what is found after it; before all of them "untrained"."""
    random = np.random.default_rng([seed, 1])
    fresh = task.texts(np.random.default_rng([seed, 2]), 16)
    yield "untrained", measure(model, fresh)
    for stage in STAGES:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains(name, stage))
        schedule = Schedule(steps=steps[stage], warmup=min(10, steps[stage]))
        peak = rate if stage != "sparse" else rate / 4
        optimizers = Optimizers(groups(model, model.config), OptimizerConfig(rate=peak, schedule=schedule))
        batches = ((task.texts(random, samples).batch,) for _ in range(steps[stage]))
        for _ in train(model, batches, Pretraining(stage=stage), optimizers, config=LoopConfig()):
            pass
        yield stage, measure(model, fresh)


def table(found: Mapping[str, Mapping[str, Found]]) -> Table:
    shown = Table(title="queries that ask for what stands far back; excess loss in nats")
    for heading in ("family", "after", "marked", "recall", "held", "excess, all read", "excess, chosen read"):
        shown.add_column(heading, justify="left" if heading in ("family", "after") else "right")
    for family, stages in found.items():
        for stage, row in stages.items():
            shares = (f"{value:.1%}" for value in (row.marked, row.recall, row.held))
            losses = (f"{value:.3f}" for value in (row.excess_reading_all, row.excess_reading_chosen))
            shown.add_row(family, stage, *shares, *losses)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["deepseek_v32", "deepseek_v4"])
    parser.add_argument("--steps", nargs=3, type=int, default=[300, 160, 40], help="of each stage")
    parser.add_argument("--samples", type=int, default=6, help="texts in each step")
    parser.add_argument("--needed", type=int, default=READ, choices=range(1, READ + 1), help="of the entries read")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task, console = Task(repeats=options.needed), Console(stderr=True, width=120)
    steps = dict(zip(STAGES, options.steps, strict=True))
    started = time.perf_counter()
    found: dict[str, dict[str, Found]] = {}
    for family in options.families:
        model = make_model(family, task, options.seed)
        found[family] = {}
        for stage, row in learn(model, task, steps, samples=options.samples, rate=options.rate, seed=options.seed):
            found[family][stage] = row
            console.print(f"{family}, {stage}: {row}, {time.perf_counter() - started:.0f} s")
    Console(width=120).print(table(found))
    rows = {family: {stage: asdict(row) for stage, row in stages.items()} for family, stages in found.items()}
    print(json.dumps({**circumstances(), "task": asdict(task), "found": rows}))


if __name__ == "__main__":
    main()
