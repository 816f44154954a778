"""What rounding costs a training run: loss curves of one model in FP8, INT8 and HiF8, and with experts in FP4, beside
bfloat16's.

    python benchmarks/precision_curves.py --text sotu.txt.xz                    # 3 seeds, 300 steps
    python benchmarks/precision_curves.py --text sotu.txt.xz --plot curves.png  # needs matplotlib

A small V3 (latent attention, routed and shared experts) is trained on real text through shards and batches, from the
same weights on the same data in each arithmetic. float32 beside bfloat16, and bfloat16 on data in another order, show
what differs without any rounding to eight bits. Means over consecutive windows of steps are compared, and the loss on
held-out text in the run's own arithmetic. Each run has one thread. Prints a table, and one JSON line last.
"""

import argparse
import json
import lzma
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from daedal.config import ModelConfig
from daedal.model.transformer import Transformer, empty, initialise
from daedal.text.training import train_tokenizer
from daedal.train.batches import Batches
from daedal.train.dataset import Dataset
from daedal.train.documents import Source
from daedal.train.loop import LoopConfig, train
from daedal.train.manifest import VALIDATION
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.precision import apply, preset
from daedal.train.sampling import Sampler
from daedal.train.schedule import Schedule
from daedal.train.shards import prepare

BASE = "bf16"
# Name to (dtype of activations, precision of products); None leaves products to that dtype.
ARITHMETICS: Mapping[str, tuple[torch.dtype | None, str | None]] = {
    "float32": (None, None),
    BASE: (torch.bfloat16, None),
    "fp8": (torch.bfloat16, "fp8"),
    "fp4": (torch.bfloat16, "fp4"),
    "int8": (torch.bfloat16, "int8"),
    "w8a8": (torch.bfloat16, "w8a8"),
    "w8a8-turned": (torch.bfloat16, "w8a8-turned"),
    "hif8": (torch.bfloat16, "hif8"),
}
VOCABULARY, CONTEXT = 1024, 64
MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. seed: of the weights; order: of the data."""

    arithmetic: str
    seed: int
    order: int
    steps: int
    samples: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """losses: of each step, nats per token. held_out: after the last. rounded: modules that have an arithmetic."""

    run: Run
    losses: tuple[float, ...]
    held_out: float
    rounded: int
    seconds: float


def make_model(seed: int) -> Transformer:
    return initialise(empty(ModelConfig.from_published(MODEL)), seed=seed)


def train_one(run: Run, data: Path) -> Curve:
    """In a process of its own."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = make_model(run.seed)
    model.compute_dtype, precision = ARITHMETICS[run.arithmetic]
    if precision is not None:
        apply(model, preset(precision))
    sampler = Sampler(Dataset.open(data), context=CONTEXT, seed=run.order)
    schedule = Schedule(steps=run.steps, warmup=run.steps // 16)
    # AdamW for everything, as V3 was trained.
    members = [replace(group, kind="adamw", split=1) for group in groups(model, model.config)]
    optimizers = Optimizers(members, OptimizerConfig(rate=run.rate, schedule=schedule))
    losses = []
    steps = iter(Batches(sampler, global_batch=run.samples))
    for report in train(model, steps, Pretraining(), optimizers, config=LoopConfig()):
        losses.append(report.loss)
        if len(losses) == run.steps:
            break
    return Curve(
        run=run,
        losses=tuple(losses),
        held_out=evaluate(model, data),
        rounded=sum(getattr(module, "arithmetic", None) is not None for module in model.modules()),
        seconds=time.perf_counter() - started,
    )


def evaluate(model: Transformer, data: Path, steps: int = 6) -> float:
    """Nats per token of held-out text, the same for every run. Gradients stay on: without them kernels for inference
    would take over, with an arithmetic of their own.
    """
    model.eval()
    sampler = Sampler(Dataset.open(data, split=VALIDATION), context=CONTEXT, epochs=1, shuffle=False)
    batches = Batches(sampler, global_batch=32)
    nats = tokens = 0.0
    for step in range(min(steps, batches.num_steps or steps)):
        for batch in batches.at(step):
            loss = Pretraining(balance_weight=0.0)(model, batch)
            nats, tokens = nats + float(loss.parts["next_token"]), tokens + loss.targets
    return nats / tokens


def windows(losses: Sequence[float], length: int) -> list[float]:
    """Means over consecutive windows, the first left out: there the model learns how frequent tokens are."""
    means = [sum(losses[start : start + length]) / length for start in range(0, len(losses) - length + 1, length)]
    return means[1:]


def differences(curve: Curve, base: Curve, length: int) -> dict[str, float]:
    """Relative to the base. curve: the largest of all windows in magnitude, signed; last: of the last window."""
    pairs = zip(windows(curve.losses, length), windows(base.losses, length), strict=True)
    apart = [found / wanted - 1 for found, wanted in pairs]
    mean = sum(curve.losses[length:]) / sum(base.losses[length:]) - 1
    largest = max(apart, key=abs)
    return {"largest": largest, "mean": mean, "last": apart[-1], "held_out": curve.held_out / base.held_out - 1}


def plan(options: argparse.Namespace) -> list[Run]:
    """Every arithmetic for every seed, and bfloat16 on data in another order; the longest runs first."""
    size = {"steps": options.steps, "samples": options.samples, "rate": options.rate}
    seeds = range(options.seeds)
    runs = [
        Run(arithmetic=name, seed=seed, order=seed, **size)
        for name in reversed(ARITHMETICS)
        for seed in seeds
        if name in options.arithmetics or name == BASE
    ]
    return runs + [Run(arithmetic=BASE, seed=seed, order=1000 + seed, **size) for seed in seeds]


def prepared(text: Path, directory: Path) -> Path:
    """The text tokenised, a twentieth of its documents held out."""
    raw = text.read_bytes()
    whole = (lzma.decompress(raw) if text.suffix == ".xz" else raw).decode("utf-8", errors="replace")
    parts = [whole[start : start + 2**14] for start in range(0, len(whole), 2**16)]
    train_tokenizer(parts, directory / "tokenizer", vocab_size=VOCABULARY)
    source = Source(path=text, document_chars=4096)
    prepare([source], directory / "tokenizer", directory / "data", validation=0.05)
    return directory / "data"


def train_all(runs: Sequence[Run], data: Path, processes: int, console: Console) -> list[Curve]:
    context = multiprocessing.get_context("spawn")
    curves = []
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for curve in pool.map(train_one, runs, [data] * len(runs)):
            run = curve.run
            console.print(
                f"{run.arithmetic}, seed {run.seed}, order {run.order}: last loss {curve.losses[-1]:.4f}, held out "
                f"{curve.held_out:.4f}, {curve.seconds:.0f} s"
            )
            curves.append(curve)
    return curves


def compare(curves: Iterable[Curve], length: int) -> list[dict[str, Any]]:
    """A row for each run beside bfloat16 of the same seed and order, or of the same seed alone."""
    curves = list(curves)
    bases = {curve.run.seed: curve for curve in curves if curve.run.arithmetic == BASE and curve.run.order < 1000}
    rows = []
    for curve in curves:
        run, base = curve.run, bases[curve.run.seed]
        if curve is base:
            continue
        name = run.arithmetic if run.order == run.seed else "bf16, other data"
        found = differences(curve, base, length)
        if name not in ARITHMETICS:  # other data has other losses step by step
            found = {"held_out": found["held_out"]}
        same_start = curve.losses[0] == base.losses[0]
        rows.append({"name": name, "seed": run.seed, "rounded": curve.rounded, "same_start": same_start, **found})
    return sorted(rows, key=lambda row: (row["name"], row["seed"]))


def table(rows: Iterable[Mapping[str, Any]], curves: Iterable[Curve]) -> Table:
    base = {curve.run.seed: curve for curve in curves if curve.run.arithmetic == BASE and curve.run.order < 1000}
    shown = Table(title="beside bfloat16 of the same weights and data")
    for heading in ("arithmetic", "seed", "modules rounded", "mean", "last window", "largest window", "held out"):
        shown.add_column(heading, justify="left" if heading == "arithmetic" else "right")
    for row in rows:
        shares = (f"{row[name]:+.3%}" if name in row else "" for name in ("mean", "last", "largest", "held_out"))
        shown.add_row(row["name"], str(row["seed"]), str(row["rounded"]), *shares)
    for seed, curve in base.items():
        shown.add_row(f"{BASE}: loss", str(seed), "0", f"{curve.losses[-1]:.4f}", "", "", f"{curve.held_out:.4f}")
    return shown


def draw(curves: Iterable[Curve], length: int, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    colours = {name: f"C{number}" for number, name in enumerate(ARITHMETICS)}
    curves = list(curves)
    bases = {c.run.order: windows(c.losses, length) for c in curves if c.run.arithmetic == BASE}
    for curve in curves:
        run = curve.run
        if run.arithmetic == BASE:
            continue
        pairs = zip(windows(curve.losses, length), bases[run.order], strict=True)
        apart = [100 * (found / wanted - 1) for found, wanted in pairs]
        label = run.arithmetic if run.seed == 0 else None
        steps = [length * (number + 2) for number in range(len(apart))]
        axes.plot(steps, apart, colours[run.arithmetic], label=label, alpha=0.8)
    for bound in (-0.25, 0.25):
        axes.axhline(bound, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"step (means over {length})")
    axes.set_ylabel("loss beside bfloat16, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, also .xz")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=8, help=f"of {CONTEXT} tokens in each step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--window", type=int, default=50, help="steps whose mean is compared")
    parser.add_argument("--arithmetics", nargs="+", default=list(ARITHMETICS), choices=list(ARITHMETICS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    options = parser.parse_args()
    console = Console(stderr=True, width=120)
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        data = prepared(options.text, Path(folder))
        curves = train_all(plan(options), data, options.processes, console)
    rows = compare(curves, options.window)
    Console(width=120).print(table(rows, curves))
    if options.plot is not None:
        draw(curves, options.window, options.plot)
    parameters = sum(tensor.numel() for tensor in make_model(0).parameters())
    summary = {"parameters": parameters, "tokens": options.steps * options.samples * CONTEXT, "differences": rows}
    finals = [asdict(curve.run) | {"last": curve.losses[-1], "held_out": curve.held_out} for curve in curves]
    seconds = round(time.perf_counter() - started)
    assert all(math.isfinite(loss) for curve in curves for loss in curve.losses)
    print(json.dumps({**circumstances(), **summary, "runs": finals, "seconds": seconds}))


if __name__ == "__main__":
    main()
