"""What keeps experts equally busy, and what it costs: correction biases beside an auxiliary loss, on skewed data.

    python benchmarks/expert_balance.py                     # five seeds and two sources, four minutes alone
    python benchmarks/expert_balance.py --sources zipf --seeds 0 --family deepseek_v4 --layers 3

A small model learns a Markov chain whose frequent tokens draw each other to few experts. The same run, with the same
weights and data, is made with biases (V3, section 2.1.2) as recipes have them: a peak speed that follows from the
number of steps and the rate, falling as the rate does, and the sequence-wise loss at V3's 1e-4; with biases of one
speed all along; with an auxiliary loss alone, at strengths that are usual for it; and with neither. MaxVio is the
busiest expert's load over the mean, less one, the mean over layers: of the finished model on unread text (MaxVio_global
of arXiv 2408.15664), and of single steps, the mean over the last tenth of the run. The loss is that of unread text,
less the chain's entropy, which no model can go below; `dearer` is what it has more than with the auxiliary loss of the
same seed.

Two numbers say what can be reached. by chance: MaxVio of as many tokens as a step has, sent anywhere at random. whole:
MaxVio where all of the most frequent token goes to the same experts; what is below it has parted one token's
occurrences by what stands before them. Prints a table, and one JSON line last.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from torch import Tensor

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.balance import balance
from daedal.train.batches import Batches
from daedal.train.dataset import Dataset
from daedal.train.known import MarkovSource
from daedal.train.loop import LoopConfig, train
from daedal.train.manifest import VALIDATION
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.recipe import best_bias_speed
from daedal.train.sampling import Sampler
from daedal.train.schedule import Schedule
from daedal.train.shards import write_shards

EXPERTS, ACTIVE, CONTEXT = 8, 2, 64
OURS, THEIRS = "biases", "loss, 0.01"
GOAL = 0.2


@dataclass(frozen=True, kw_only=True)
class Way:
    """speed: of the biases, 0 for none, None for what recipes choose. falls: as the rate does. strength: of the
    sequence-wise loss.
    """

    speed: float | None = 0.0
    falls: bool = False
    strength: float = 0.0


WAYS: Mapping[str, Way] = {
    OURS: Way(speed=None, falls=True, strength=1e-4),
    "biases, 0.01 all along": Way(speed=1e-2, strength=1e-4),
    "biases, 0.001 all along": Way(speed=1e-3, strength=1e-4),
    THEIRS: Way(strength=1e-2),
    "loss, 0.1": Way(strength=1e-1),
    "neither": Way(),
}

SOURCES: Mapping[str, Mapping[str, float]] = {
    "zipf": {"size": 64, "concentration": 1.0, "skew": 1.0},  # as words in a text
    "steep": {"size": 32, "concentration": 1.0, "skew": 1.5},  # one token is a quarter to three quarters of the text
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """unread, of_steps: MaxVio. idle: experts without a token of unread text. excess: nats per token of it above the
    entropy.
    """

    unread: float
    of_steps: float
    idle: int
    excess: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """How long a run is. samples: of `CONTEXT` tokens in each step."""

    steps: int
    samples: int
    rate: float


def make_source(name: str, seed: int) -> MarkovSource:
    return MarkovSource(seed=seed, **SOURCES[name])  # type: ignore[arg-type]  # size is whole


def make_model(family: str, layers: int, vocabulary: int, seed: int) -> Transformer:
    """Experts in all layers; of V4's, the first of several chooses them by hash."""
    published: dict[str, object] = {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": ACTIVE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    if family == "deepseek_v4":
        published |= {"num_key_value_heads": 1, "head_dim": 24, "compress_ratios": [0, 4, 128, 4, 128, 4][:layers]}
        published |= {"o_groups": 2, "o_lora_rank": 24, "sliding_window": 16, "compress_rope_theta": 160000.0}
        published |= {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "num_hash_layers": int(layers > 1)}
    else:
        published |= {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "v_head_dim": 12}
        published |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    return initialise(empty(ModelConfig.from_published(published)), seed=seed)


def run(way: Way, model: Transformer, data: Path, span: Span, *, seed: int) -> Found:
    """Trains the model, and looks at the last tenth of the run and at unread text; `excess` is the whole loss."""
    schedule = Schedule(steps=span.steps, warmup=span.steps // 20, decay="linear", floor=0.0)
    optimizers = Optimizers(groups(model, model.config), OptimizerConfig(rate=span.rate, schedule=schedule))
    batches = Batches(Sampler(Dataset.open(data), context=CONTEXT, seed=seed), global_batch=span.samples)
    speed = best_bias_speed(span.steps, span.rate) if way.speed is None else way.speed
    config = LoopConfig(bias_speed=speed, bias_schedule=schedule if way.falls else None)
    steps = (batches.at(step) for step in range(span.steps))
    violations = []
    for report in train(model, steps, Pretraining(balance_weight=way.strength), optimizers, config=config):
        assert report.balance is not None
        violations.append(report.balance.max_violation)
    of_steps = fmean(violations[-max(1, span.steps // 10) :])
    loss, loads = evaluate(model, data)
    found = balance(loads)
    assert found is not None
    return Found(unread=found.max_violation, of_steps=of_steps, idle=found.idle, excess=loss)


@torch.no_grad()
def evaluate(model: Transformer, data: Path) -> tuple[float, dict[int, Tensor]]:
    """Of the text held out: nats per token, and what experts it chose."""
    sampler = Sampler(Dataset.open(data, split=VALIDATION), context=CONTEXT, epochs=1, shuffle=False)
    batches = Batches(sampler, global_batch=64)
    nats, targets, loads = 0.0, 0, dict[int, Tensor]()
    for step in range(batches.num_steps or 0):
        for batch in batches.at(step):
            loss = Pretraining(balance_weight=0.0)(model, batch)
            nats, targets = nats + float(loss.parts["next_token"]), targets + loss.targets
            loads = {layer: loads.get(layer, 0) + load_E for layer, load_E in loss.loads.items()}
    return nats / targets, loads


def by_chance(tokens: int) -> float:
    """MaxVio where each of so many tokens goes to experts at random, the mean of 2000 draws."""
    random = np.random.default_rng(0)
    chosen = random.random((2000, tokens, EXPERTS)).argpartition(ACTIVE, -1)[..., :ACTIVE]
    loads = np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in chosen])
    return float(loads.max(1).mean() * EXPERTS / (tokens * ACTIVE)) - 1.0


def whole(source: MarkovSource) -> float:
    """MaxVio where every occurrence of the most frequent token goes to the same experts, others filling up the rest."""
    return max(0.0, float(source.frequencies_V.max()) * EXPERTS / ACTIVE - 1.0)


def dearer(ours: Sequence[Found], theirs: Sequence[Found]) -> dict[str, float]:
    """Mean over seeds of the difference in loss, and its standard error (NaN of one seed)."""
    apart = [one.excess - other.excess for one, other in zip(ours, theirs, strict=True)]
    error = stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return {"mean": fmean(apart), "standard_error": error}


def table(name: str, rows: Mapping[str, Sequence[Found]]) -> Table:
    shown = Table(title=f"{name}: mean over seeds, worst seed in brackets; losses in nats, above the entropy")
    for heading in ("balanced by", "MaxVio of unread text", "of a step", "idle experts", "excess loss", "dearer"):
        shown.add_column(heading, justify="left" if heading == "balanced by" else "right")
    for way, each in rows.items():
        violations = ([getattr(found, key) for found in each] for key in ("unread", "of_steps"))
        cells = [f"{fmean(values):.3f} ({max(values):.3f})" for values in violations]
        cells += [f"{fmean(found.idle for found in each):.1f}", f"{fmean(found.excess for found in each):.4f}"]
        if THEIRS in rows:
            more = dearer(each, rows[THEIRS])
            cells.append(f"{more['mean']:+.4f} +- {more['standard_error']:.4f}")
        shown.add_row(way, *cells)
    return shown


def described(source: Sequence[MarkovSource], rows: Mapping[str, Sequence[Found]]) -> dict[str, object]:
    """One source's part of the JSON line."""
    found: dict[str, object] = {"whole": [whole(each) for each in source]}
    found["found"] = {way: [asdict(row) for row in each] for way, each in rows.items()}
    if OURS in rows:
        found["below_goal"] = sum(row.unread < GOAL for row in rows[OURS])
        found["dearer"] = dearer(rows[OURS], rows[THEIRS]) if THEIRS in rows else None
    return found


def measure(
    name: str, ways: Sequence[str], span: Span, *, seeds: Sequence[int], family: str, layers: int
) -> dict[str, list[Found]]:
    """Every way with every seed."""
    console, rows = Console(stderr=True, width=120), dict[str, list[Found]]()
    for seed in seeds:
        source = make_source(name, seed)
        with TemporaryDirectory() as folder:
            data = Path(folder)
            tokens = span.steps * span.samples * CONTEXT
            write_shards(source.documents(tokens), source.vocabulary, data, validation=0.1)
            for way in ways:
                started = time.perf_counter()
                row = run(WAYS[way], make_model(family, layers, source.size, seed), data, span, seed=seed)
                row = Found(**{**asdict(row), "excess": row.excess - source.entropy})
                rows.setdefault(way, []).append(row)
                console.print(f"{name}, seed {seed}, {way}: {row}, {time.perf_counter() - started:.0f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="deepseek_v3", choices=["deepseek_v3", "deepseek_v4"])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--layers", type=int, default=1, choices=range(1, 7))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8, help=f"of {CONTEXT} tokens in each step")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    span = Span(steps=options.steps, samples=options.samples, rate=options.rate)
    model, found = {"family": options.family, "layers": options.layers}, dict[str, object]()
    for name in options.sources:
        rows = measure(name, options.ways, span, seeds=options.seeds, **model)
        Console(width=120).print(table(name, rows))
        found[name] = described([make_source(name, seed) for seed in options.seeds], rows)
    described_run = {**model, **asdict(span), "seeds": options.seeds, "by_chance": by_chance(span.samples * CONTEXT)}
    print(json.dumps({**circumstances(), **described_run, "sources": found}))


if __name__ == "__main__":
    main()
