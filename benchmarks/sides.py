"""The two sides of a benchmark, each in a process of its own: `python sides.py daedal|transformers DIRECTORY DTYPE`.

A side loads a checkpoint by its own loader, then answers requests from standard input, one JSON object a line, on
standard output. What is asked of both: the time of one decode step or one prefill chunk at a given batch and depth,
with a cache that is filled with random numbers up to that depth; the logits of a fixed prompt; peak memory. Keeping
both alive and asking them in turn pairs every figure with its peer's under the same conditions of the machine.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

PROMPT = [(7 * index) % 1000 + 3 for index in range(48)]


class Side(Protocol):
    def prepare(self, batch: int, depth: int, room: int) -> None:
        """A cache of `batch` sequences filled with random numbers to `depth`, with room for more tokens."""

    def feed(self, tokens: int) -> None:
        """One forward pass of `tokens` new tokens per sequence, to the choice of each sequence's next token."""

    def cache_bytes(self) -> int:
        """Bytes of the cache that the sequences hold."""

    def logits(self) -> torch.Tensor:
        """Logits after each token of PROMPT, in one pass, with the weights widened to float32."""


class Daedal:
    PAGE = 16

    def __init__(self, directory: Path, dtype: torch.dtype):
        from daedal.checkpoint.load import load
        from daedal.infer.memory import keep_freed_memory

        keep_freed_memory()  # as the engine does
        self.model = load(directory, dtype=dtype)

    def prepare(self, batch: int, depth: int, room: int) -> None:
        from daedal.infer.cache import PagedCache
        from daedal.infer.pages import PageAllocator

        self.cache = None
        whole, tail = -(-depth // self.PAGE), -(-room // self.PAGE) + 1
        # As a running engine lays them out: pages for the prompts first, then page by page in turn; a third of the
        # cache is free, as it must be for other requests to come.
        allocator = PageAllocator(batch * (whole + tail) * 3 // 2)
        tables = [list(allocator.allocate(whole)) if whole else [] for _ in range(batch)]
        for _ in range(tail):
            for table in tables:
                table.extend(allocator.allocate(1, after=table[-1] if table else None))
        self.tables, self.num_pages = tables, allocator.num_pages
        self.cache = PagedCache(
            self.model.config,
            num_pages=allocator.num_pages,
            page_size=self.PAGE,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        for pools in self.cache.pools.values():
            for pool in pools.values():
                pool.normal_()
        self.past = depth

    def feed(self, tokens: int) -> None:
        from daedal.model.batch import RaggedBatch

        num_sequences = len(self.tables)
        ids = [PROMPT[position % len(PROMPT)] for position in range(tokens)]
        pasts, counts = [self.past] * num_sequences, [tokens] * num_sequences
        batch = RaggedBatch.of([ids] * num_sequences, pasts)
        last = torch.tensor([end - 1 for end in batch.starts[1:]])
        self.model(batch, self.cache.view(self.tables, pasts, counts), rows=last).argmax(-1).tolist()
        self.past += tokens

    def cache_bytes(self) -> int:
        held = sum(len(table) for table in self.tables)
        return self.cache.nbytes // self.num_pages * held

    def logits(self) -> torch.Tensor:
        return self.model.float().logits(torch.tensor([PROMPT]))[0]


class Transformers:
    def __init__(self, directory: Path, dtype: torch.dtype):
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    def prepare(self, batch: int, depth: int, room: int) -> None:
        from transformers import DynamicCache

        config = self.model.config
        self.cache = DynamicCache()
        if getattr(config, "kv_lora_rank", None):
            shapes = (1, config.kv_lora_rank), (1, config.qk_rope_head_dim)
        else:
            heads = config.num_key_value_heads
            shapes = (heads, config.head_dim), (heads, config.head_dim)
        for layer in range(config.num_hidden_layers):
            rows = [torch.randn(batch, heads, depth, width, dtype=self.model.dtype) for heads, width in shapes]
            self.cache.update(*rows, layer)
        self.batch = batch

    def feed(self, tokens: int) -> None:
        ids = torch.tensor([[PROMPT[position % len(PROMPT)] for position in range(tokens)]] * self.batch)
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).tolist()

    def cache_bytes(self) -> int:
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def logits(self) -> torch.Tensor:
        return self.model.float()(torch.tensor([PROMPT])).logits[0]


def steps(side: Side, *, batch: int, context: int, tokens: int, seconds: float) -> dict[str, float]:
    """Median seconds of passes of `tokens` per sequence that end near `context`, after one that is not counted."""
    passes = 15 if tokens == 1 else 5
    room = tokens * (passes + 1 if tokens == 1 else 1)
    side.prepare(batch, context - tokens, room)
    side.feed(tokens)
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < passes):
        if tokens > 1:
            side.prepare(batch, context - tokens, room)
        start = time.perf_counter()
        side.feed(tokens)
        times.append(time.perf_counter() - start)
    return {"seconds": sorted(times)[len(times) // 2], "cache_bytes": side.cache_bytes()}


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    if request["ask"] == "steps":
        return steps(side, **{name: value for name, value in request.items() if name != "ask"})
    if request["ask"] == "logits":
        return {"logits": side.logits().tolist()}
    # Not `getrusage`: its maximum is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return {"peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024}


def main() -> None:
    sides: dict[str, Callable[[Path, torch.dtype], Side]] = {"daedal": Daedal, "transformers": Transformers}
    name, directory, dtype = sys.argv[1:4]
    replies = sys.stdout
    sys.stdout = sys.stderr
    started = time.perf_counter()
    side = sides[name](Path(directory), getattr(torch, dtype))
    with torch.inference_mode():
        print(json.dumps({"load_seconds": time.perf_counter() - started}), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(side, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
