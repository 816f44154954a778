"""A V4-shaped model at long contexts, really run: memory of the cache and time of a decode step, to 1M tokens.

    python benchmarks/long_context.py                      # 4K, 32K, 128K and 1M; tens of minutes, nearly all prefill
    python benchmarks/long_context.py --contexts 4096 32768 --plot plot.png

The models have every kind of layer (window, CSA, HCA; hash-routed and learned experts) with the published window, rates
and top-k, and are small elsewhere; their weights are random, in bfloat16, and run through the engine as a user's would.
For each context one sequence is read; then decode steps of all of them are timed in turn, so that a drifting machine
treats them alike. Beside them the same weights in transformers, as far as its prefill of one context stays within
--peer-minutes. What the indexer and the HCA entries
must add is predicted from their bytes and multiplications and the machine's own ceilings. Prints a table and one JSON
line last; --plot draws both.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from daedal import shapes
from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.config import ModelConfig
from daedal.infer.cache import REWIND
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from daedal.model.transformer import Transformer, empty, initialise
from daedal.packed import WEIGHTS

PAGE = 128
ROUNDS = 101  # at most; each times one decode step at every context
ANSWER = 2 * ROUNDS + 8  # tokens that a sequence may be continued by
STEP = 512  # tokens of one step of the engine

TINY: dict[str, object] = {
    "model_type": "deepseek_v4",
    "vocab_size": 4096,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128],
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 512,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "hc_mult": 4,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576 + 4096,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}
# 107 million parameters, 39 million active.
SMALL = TINY | {
    "vocab_size": 32000,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 128,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128],
    "index_n_heads": 8,
    "index_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "num_hash_layers": 2,
}
MODELS = {"tiny": TINY, "small": SMALL}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One context; decode times are medians. predicted_extra_ms: what indexer and HCA add over the first context."""

    context: int
    prefill_seconds: float
    decode_ms: float
    predicted_extra_ms: float
    cache_bytes: int
    predicted_cache_bytes: int
    peer_prefill_seconds: float | None = None
    peer_decode_ms: float | None = None


def predicted_cache_bytes(config: ModelConfig, tokens: int) -> int:
    """From `shapes` alone: whole pages of rows that stay, and one sequence's rings; in bfloat16 but for wide rows."""
    pages = -(-tokens // PAGE)
    total = 0
    for slot in shapes.cache(config):
        rows = slot.ring + REWIND if slot.ring else pages * PAGE // slot.rate
        total += rows * slot.numel * (4 if slot.wide else 2)
    return total


def entry_work(config: ModelConfig, context: int) -> tuple[int, int]:
    """(bytes read, multiply-adds) of one decode step that grow with the context: index keys and HCA entries."""
    nbytes = work = 0
    heads, index_heads = config.num_attention_heads, config.index_n_heads or 0
    for slot in shapes.cache(config):
        if slot.name == "index_key":
            rows = context // slot.rate
            nbytes += rows * slot.numel * 2
            # Scores per head, then their weighted sum and the choice of the best, which pass over every score.
            work += rows * index_heads * slot.numel
        elif slot.name == "entry" and slot.rate > 4:
            rows = context // slot.rate
            nbytes += rows * slot.numel * 2
            work += 2 * rows * heads * slot.numel
    return nbytes, work


def ceilings() -> tuple[float, float]:
    """(bytes per second read from memory, multiply-adds per second), in float32, on this machine as torch gets them."""
    big = torch.ones(2**26)
    square = torch.randn(1024, 1024)
    reads = min(_time(lambda: big.sum()) for _ in range(7))
    products = min(_time(lambda: square @ square) for _ in range(7))
    return big.nbytes / reads, 1024**3 / products


def _time(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Reader:
    """One sequence of an engine: its prompt is read in chunks, then it is continued token by token."""

    def __init__(self, model: Transformer, tokens: int):
        self.length = tokens
        # As the other side does it: a token at a time, and nothing kept for sequences to come.
        alone = {"stride_ms": None, "prefix_caching": False}
        self.engine = Engine(model, max_batch=1, max_context=tokens + ANSWER, page_size=PAGE, **alone)
        ids = torch.randint(model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
        params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
        self.engine.add(Request(id="only", prompt=tuple(ids), params=params))

    def read(self, advance: Callable[[int], None]) -> float:
        """Seconds until the first token of the answer."""
        start, tokens = time.perf_counter(), 0
        while not any(output.ids for output in self.engine.step()):
            tokens += STEP
            advance(tokens)
        advance(self.length)
        return time.perf_counter() - start

    def feed(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def cache_bytes(self) -> int:
        """Bytes of the cache as allocated."""
        return self.engine.stats().kv_bytes_total


class Peer:
    """The same weights in transformers, in this process."""

    def __init__(self, directory: Path):
        from transformers import DeepseekV4ForCausalLM

        self.model = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self.generator = torch.Generator().manual_seed(1)
        self.past: Any = None
        self.length = 0

    def feed(self, count: int) -> None:
        ids = torch.randint(self.model.config.vocab_size, (1, count), generator=self.generator)
        result = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.length = result.past_key_values, self.length + count


def read_peer(peer: Peer, context: int, chunk: int, limit: float) -> float | None:
    """Seconds until `context` tokens are read; None, and it stops, beyond `limit` seconds."""
    start = time.perf_counter()
    while peer.length < context:
        peer.feed(min(chunk, context - peer.length))
        if time.perf_counter() - start > limit:
            return None
    return time.perf_counter() - start


def decode_ms(sides: Sequence[Reader | Peer | None], seconds: float) -> list[float | None]:
    """The median time of one more token for each side, all asked in turn in every round, for at least 5 rounds."""
    times: list[list[float]] = [[] for _ in sides]
    start = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 5 and time.perf_counter() - start > seconds:
            break
        for side, taken in zip(sides, times, strict=True):
            if side is not None:
                side.feed(1)  # what the others left in the processor's cache is not its own
                taken.append(_time(lambda side=side: side.feed(1)))
    return [1e3 * statistics.median(taken) if taken else None for taken in times]


def measure(options: argparse.Namespace) -> list[Point]:
    config = ModelConfig.from_published(MODELS[options.model])
    contexts = sorted(options.contexts)
    readers: list[Reader] = []
    peers: list[Peer | None] = []
    seconds, peer_seconds = [], []
    with tempfile.TemporaryDirectory() as directory, Progress(console=Console(stderr=True)) as progress:
        save(initialise(empty(config, dtype=torch.bfloat16), seed=0), Path(directory))
        model = load(Path(directory), dtype=torch.bfloat16, weights=options.weights)
        for context in contexts:
            bar = progress.add_task(f"{context} tokens", total=context)
            readers.append(Reader(model, context))
            seconds.append(readers[-1].read(partial(_advance, progress, bar)))
            reachable = options.peer_minutes > 0 and None not in peer_seconds
            peer = Peer(Path(directory)) if reachable else None
            limit = 60 * options.peer_minutes
            peer_seconds.append(None if peer is None else read_peer(peer, context, options.peer_chunk, limit))
            peers.append(peer if peer_seconds[-1] is not None else None)
    times = decode_ms([*readers, *peers], options.seconds)
    bandwidth, rate = ceilings()
    first_bytes, first_work = entry_work(config, contexts[0])
    points = []
    for index, (context, reader) in enumerate(zip(contexts, readers, strict=True)):
        nbytes, work = entry_work(config, context)
        ms = times[index]
        assert ms is not None
        points.append(
            Point(
                context=context,
                prefill_seconds=seconds[index],
                decode_ms=ms,
                predicted_extra_ms=1e3 * max((nbytes - first_bytes) / bandwidth, (work - first_work) / rate),
                cache_bytes=reader.cache_bytes(),
                predicted_cache_bytes=predicted_cache_bytes(config, context + ANSWER),
                peer_prefill_seconds=peer_seconds[index],
                peer_decode_ms=times[len(contexts) + index],
            )
        )
    return points


def _advance(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def show(points: list[Point]) -> None:
    table = Table(title="A V4-shaped model at long contexts, one sequence")
    for name in (
        "context",
        "prefill, s",
        "decode, ms",
        "limit, ms",
        "cache, MiB",
        "predicted",
        "transformers prefill, s",
        "decode, ms",
    ):
        table.add_column(name, justify="right")
    for point in points:
        limit = 1.5 * points[0].decode_ms + point.predicted_extra_ms
        peer = [
            f"{value:.1f}" if value is not None else "-" for value in (point.peer_prefill_seconds, point.peer_decode_ms)
        ]
        table.add_row(
            f"{point.context}",
            f"{point.prefill_seconds:.1f}",
            f"{point.decode_ms:.2f}",
            f"{limit:.2f}",
            f"{point.cache_bytes / 2**20:.2f}",
            f"{point.predicted_cache_bytes / 2**20:.2f}",
            *peer,
        )
    Console(width=140).print(table)


def plot(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10, 4))
    contexts = [point.context for point in points]
    time_axis.plot(contexts, [point.decode_ms for point in points], "o-", label="Daedal")
    peers = [point for point in points if point.peer_decode_ms is not None]
    if peers:
        time_axis.plot(
            [point.context for point in peers], [point.peer_decode_ms for point in peers], "s--", label="transformers"
        )
    time_axis.set(xscale="log", xlabel="tokens of context", ylabel="ms", title="One decode step")
    time_axis.set_ylim(bottom=0)
    time_axis.legend()
    memory_axis.plot(contexts, [point.predicted_cache_bytes / 2**20 for point in points], "-", label="predicted")
    memory_axis.plot(contexts, [point.cache_bytes / 2**20 for point in points], "o", label="allocated")
    memory_axis.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="MiB", title="Cache of the sequence")
    memory_axis.legend()
    for axis in (time_axis, memory_axis):
        axis.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072, 1048576])
    parser.add_argument("--model", default="tiny", choices=MODELS)
    parser.add_argument("--weights", default="bf16", choices=WEIGHTS, help="as daedal.load packs them")
    parser.add_argument("--peer-chunk", type=int, default=512)
    parser.add_argument("--peer-minutes", type=float, default=5.0, help="stop transformers beyond; 0 leaves it out")
    parser.add_argument("--seconds", type=float, default=60.0, help="of decode steps in all, once five rounds are done")
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    with torch.inference_mode():
        points = measure(options)
    show(points)
    if options.plot is not None:
        plot(points, options.plot)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "command": shlex.join(["python", "benchmarks/long_context.py", *sys.argv[1:]]),
                "commit": commit.stdout.strip(),
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__,
                "points": [asdict(point) for point in points],
            }
        )
    )


if __name__ == "__main__":
    main()
