"""Loss curves of one process and of several, step by step: `python benchmarks/parallel_curves.py [--steps 50]`.

The same small models, batches and optimisers (Muon and AdamW) are trained in float32 by one process, and then laid out
as FSDP, expert parallelism and pipeline stages, started by torchrun as a user would start them. Printed is the largest
difference from the one process over all steps: of the loss and its parts in nats, of the gradients' norm relatively,
of MaxVio. The data is a source of known entropy, so that the curves are those of learning and not of noise.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from daedal.config import ModelConfig
from daedal.mesh import join
from daedal.model.transformer import Transformer, empty, initialise
from daedal.train.batches import Batches
from daedal.train.dataset import Dataset
from daedal.train.known import MarkovSource
from daedal.train.learner import Alone, Learner
from daedal.train.loop import LoopConfig, train
from daedal.train.objective import Pretraining
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.parallel.layout import Layout, Place
from daedal.train.parallel.spread import spread
from daedal.train.sampling import Sampler
from daedal.train.schedule import Schedule
from daedal.train.shards import write_shards

LAYOUTS = {
    "fsdp 2": Layout(data=2),
    "experts 2": Layout(data=2, experts=2),
    "stages 2": Layout(stages=2),
    "fsdp 4": Layout(data=4),
    "fsdp 2 x experts 2": Layout(data=4, experts=2),
    "stages 2 x experts 2": Layout(data=2, experts=2, stages=2),
}
SOURCE = MarkovSource(size=64, seed=3, mean_length=48.0)
SAMPLES, CONTEXT = 8, 96

_V3: dict[str, object] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_V4: dict[str, object] = {
    name: value
    for name, value in _V3.items()
    if name not in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_group", "topk_group", "intermediate_size")
} | {
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_hash_layers": 1,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 32,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128},
}
MODELS = {"deepseek_v3": _V3, "deepseek_v4": _V4}


def model_of(family: str) -> Transformer:
    config = ModelConfig.from_published({"model_type": family, "torch_dtype": "float32"} | MODELS[family])
    return initialise(empty(config, drafting=True), seed=1)


def curve(family: str, data: Path, steps: int, layout: Layout | None) -> list[dict[str, Any]]:
    """What each step reports. layout: None for one process."""
    learner: Learner
    if layout is None:
        learner, rank, count = Alone(model_of(family)), 0, 1
    else:
        place = Place(layout)
        learner, rank, count = spread(model_of(family), place), place.data_rank, layout.data
    optimizers = Optimizers(
        groups(learner.model, learner.model.config), OptimizerConfig(rate=2e-3, schedule=Schedule(steps=steps))
    )
    sampler = Sampler(Dataset.open(data), context=CONTEXT, seed=5)
    batches = Batches(sampler, global_batch=SAMPLES, micro_batches=2, process=rank, processes=count)
    found = []
    for report in train(
        learner.model, map(batches.at, range(steps)), Pretraining(), optimizers, config=LoopConfig(), learner=learner
    ):
        assert report.balance is not None
        found.append(dict(report.parts) | {"norm": report.norm, "MaxVio": report.balance.max_violation})
    return found


def together(family: str, data: Path, steps: int, name: str, target: Path) -> list[dict[str, Any]]:
    """The curve of several processes, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(LAYOUTS[name].processes), __file__, "--steps", str(steps)]
    command += ["--worker", family, str(data), name, str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment)
    curves: list[dict[str, Any]] = json.loads(target.read_text(encoding="utf-8"))
    return curves


def worker(steps: int, family: str, data: str, name: str, target: str) -> None:
    join(patience=120.0)
    found = curve(family, Path(data), steps, LAYOUTS[name])
    if torch.distributed.get_rank() == 0:
        Path(target).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def apart(one: list[dict[str, Any]], several: list[dict[str, Any]]) -> dict[str, float]:
    """The largest differences over all steps."""
    pairs = list(zip(one, several, strict=True))
    parts = sorted(one[0].keys() - {"norm", "MaxVio", "next_token"})
    return {
        "loss": max(abs(a["next_token"] - b["next_token"]) for a, b in pairs),
        "other parts": max(abs(a[name] - b[name]) for a, b in pairs for name in parts),
        "norm": max(abs(a["norm"] - b["norm"]) / a["norm"] for a, b in pairs),
        "MaxVio": max(abs(a["MaxVio"] - b["MaxVio"]) for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--families", nargs="*", default=list(MODELS))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.worker:
        worker(given.steps, *given.worker)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_shards(SOURCE.documents(100_000), SOURCE.vocabulary, data, inputs=SOURCE.description)
        for family in given.families:
            one = curve(family, data, given.steps, None)
            for name in given.layouts:
                several = together(family, data, given.steps, name, Path(folder) / "curve.json")
                rows.append({"family": family, "layout": name} | apart(one, several))
                rows[-1] |= {"first loss": one[0]["next_token"], "last loss": one[-1]["next_token"]}
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table = Table(title=f"{given.steps} steps, float32: largest difference from one process")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    print(
        json.dumps(
            {
                "benchmark": "parallel_curves",
                "command": " ".join(["python", *sys.argv]),
                "commit": commit.stdout.strip() or "unknown",
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
                "entropy": SOURCE.entropy,
                "steps": given.steps,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
