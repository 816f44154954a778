"""The sides of `peers.py`, each in a process of its own: `python peer_sides.py SIDE FILE WEIGHTS THREADS CACHE`.

A side loads its file, reads a short prompt to the first token, says how long that took, and then answers requests from
standard input, one JSON object a line, on standard output. What is asked of all: the seconds of decode steps at a given
batch and context; of reading a prompt; bytes of the cache per token, of weights per step, and of memory at the peak;
logits of a fixed prompt. Daedal runs through `daedal.load` and `Engine`, as a user's script does.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PROMPT = [(7 * index) % 1000 + 3 for index in range(48)]
STEPS = 48  # of one request at most: the context must stay what the row of the table says


class Side(Protocol):
    def start(self, batch: int, context: int, ids: list[int]) -> None:
        """Fresh sequences that hold `context` tokens each, `ids` over and over."""

    def rewind(self) -> None:
        """Back to about the tokens that `start` left."""

    def step(self) -> int:
        """More tokens for every sequence, the likeliest; how many each."""

    def prefill(self, ids: list[int]) -> None:
        """One fresh sequence of `ids`, to the choice of its first token."""

    def kv_bytes_per_token(self) -> float:
        """Of the cache as allocated, over the tokens it has room for."""

    def active_bytes(self, batch: int) -> float:
        """Of the weights that one step reads; with random routing for the experts."""

    def prompt_logits(self, ids: list[int], *, full_precision: bool) -> Any:
        """[T, V]: after each token of `ids`, in one pass."""


class Daedal:
    PAGE = 16

    def __init__(self, directory: Path, weights: str, threads: int, kv_cache_dtype: str = "auto"):
        import torch

        import daedal

        torch.set_num_threads(threads)
        # "plain" is the model in bfloat16 without packing, through whatever ops the machine has.
        self.directory, self.weights = directory, None if weights == "plain" else weights
        self.model = daedal.load(directory, device="cpu", dtype=torch.bfloat16, weights=self.weights)
        self.kv_cache_dtype: Any = kv_cache_dtype
        self.engine: Any = None
        self.shape = (0, 0)

    def _open(self, batch: int, length: int) -> None:
        import daedal

        self.engine = None
        self.shape = (batch, length)
        self.engine = daedal.Engine(
            self.model,
            max_batch=batch,
            max_context=length,
            page_size=self.PAGE,
            kv_cache_dtype=self.kv_cache_dtype,
            prefix_caching=False,  # the same prompt is to be read every time
        )

    def _add(self, ids: list[int], *, name: str, answer: int) -> None:
        from daedal.infer.request import Request, SamplingParams

        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        self.engine.add(Request(id=name, prompt=tuple(ids), params=params))

    def start(self, batch: int, context: int, ids: list[int]) -> None:
        self.context, self.ids = context, ids
        self.drift = max(STEPS, context // 16)
        self._open(batch, context + self.drift + STEPS + 2 * self.PAGE)
        self._begin()

    def _begin(self) -> None:
        """Step until every prompt is read. The first of them may by then have a few tokens of its answer."""
        batch, length = self.shape
        for index in range(batch):
            self.engine.cancel(str(index))
        self.engine.step()
        prompt = [self.ids[position % len(self.ids)] for position in range(self.context)]
        for index in range(batch):
            self._add(prompt, name=str(index), answer=length - self.context)
        waiting, self.steps = {str(index) for index in range(batch)}, 0
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.ids}
            self.steps += 1

    def rewind(self) -> None:
        if self.steps > self.drift:
            self._begin()

    def step(self) -> int:
        outputs = self.engine.step()
        (gained,) = {len(output.ids) for output in outputs}
        assert len(outputs) == self.shape[0]
        self.steps += gained
        return gained

    def prefill(self, ids: list[int]) -> None:
        if self.shape[0] != 1 or self.shape[1] < len(ids) + 1 or self.engine.has_work:
            self._open(1, len(ids) + 1)
        self._add(ids, name="prefill", answer=1)
        while self.engine.has_work:
            self.engine.step()

    def kv_bytes_per_token(self) -> float:
        stats = self.engine.stats()
        return stats.kv_bytes_total / stats.pages_total / self.PAGE

    def active_bytes(self, batch: int) -> float:
        from daedal.ops.packed import Packed

        config, total = self.model.config, 0.0
        part = 1.0
        if config.n_routed_experts:
            part = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
        for path, module in self.model.named_modules():
            held = dict(module._parameters) | {
                name: value.data for name, value in vars(module).items() if isinstance(value, Packed)
            }
            for name, tensor in held.items():
                # The embedding gives one row; decode reads the keys of the expansion in their folded form alone.
                if tensor is not None and path != "embed_tokens" and name != "keys":
                    total += tensor.nbytes * (part if path.endswith(".experts") else 1.0)
        return total

    def prompt_logits(self, ids: list[int], *, full_precision: bool) -> Any:
        import torch

        import daedal

        model = self.model
        if full_precision:
            model = daedal.load(self.directory, device="cpu", dtype=torch.float32, weights=self.weights)
        with torch.inference_mode():
            return model.logits(torch.tensor([ids]))[0].float().numpy()


class Transformers:
    """By `sides.Transformers`: its cache is filled with random numbers, which changes none of the timings."""

    def __init__(self, directory: Path, weights: str, threads: int):
        import sides
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.directory, self.inner = directory, sides.Transformers(directory, torch.bfloat16)

    def start(self, batch: int, context: int, ids: list[int]) -> None:
        self.depth = context
        self.inner.prepare(batch, context, STEPS)
        self.tokens = context

    def rewind(self) -> None:
        if self.tokens > self.depth:
            self.inner.cache.crop(self.depth - self.tokens)
        self.tokens = self.depth

    def step(self) -> int:
        self.inner.feed(1)
        self.tokens += 1
        return 1

    def prefill(self, ids: list[int]) -> None:
        from transformers import DynamicCache

        self.inner.batch, self.inner.cache = 1, DynamicCache()
        self.inner.feed(len(ids))
        self.tokens = len(ids)

    def kv_bytes_per_token(self) -> float:
        return self.inner.cache_bytes() / self.tokens / self.inner.batch

    def active_bytes(self, batch: int) -> float:
        config, total = self.inner.model.config, 0.0
        experts = getattr(config, "n_routed_experts", None)
        part = 1 - (1 - config.num_experts_per_tok / experts) ** batch if experts else 1.0
        tied = config.tie_word_embeddings
        for name, tensor in self.inner.model.named_parameters():
            if "embed_tokens" not in name or tied:
                total += tensor.nbytes * (part if ".experts." in name else 1.0)
        return total

    def prompt_logits(self, ids: list[int], *, full_precision: bool) -> Any:
        import sides
        import torch

        inner = sides.Transformers(self.directory, torch.float32) if full_precision else self.inner
        return inner.model(torch.tensor([ids])).logits[0].float().numpy()


def make(name: str, path: Path, weights: str, threads: int, kv_cache_dtype: str) -> Side:
    """kv_cache_dtype: Daedal's alone; peers keep theirs as they do."""
    if name == "daedal":
        return Daedal(path, weights, threads, kv_cache_dtype)
    if name == "llama.cpp":
        from llama_side import LlamaCpp

        return LlamaCpp(path, threads)
    return Transformers(path, weights, threads)


def bring_in(name: str) -> None:
    """What a side imports, before its clock starts."""
    if name == "llama.cpp":
        import llama_side  # noqa: F401
    elif name == "daedal":
        import daedal.checkpoint.load
        import daedal.infer.engine  # noqa: F401
    else:
        import sides  # noqa: F401
        import transformers  # noqa: F401


def decode(side: Side, *, seconds: float) -> list[float]:
    """Seconds of each token, after a step that is not counted."""
    side.rewind()
    side.step()
    times: list[float] = []
    while len(times) < STEPS - 1 and sum(times) < seconds:
        start = time.perf_counter()
        gained = side.step()
        times += [(time.perf_counter() - start) / gained] * gained
    return times


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    what = request["ask"]
    if what == "start":
        side.start(request["batch"], request["context"], PROMPT)
        return {"kv_bytes_per_token": side.kv_bytes_per_token()}
    if what == "decode":
        return {"times": decode(side, seconds=request["seconds"])}
    if what == "prefill":
        ids = [PROMPT[position % len(PROMPT)] for position in range(request["tokens"])]
        return {"times": [_time(lambda: side.prefill(ids))]}
    if what == "bytes":
        return {"active_bytes": side.active_bytes(request["batch"])}
    if what == "logits":
        rows = side.prompt_logits(PROMPT, full_precision=request["full_precision"])
        return {"logits": rows.tolist()}
    # Not `getrusage`: its maximum is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return {"peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024}


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    name, path, weights, threads, kv_cache_dtype = sys.argv[1:6]
    replies = sys.stdout
    sys.stdout = sys.stderr
    try:
        bring_in(name)
        started = time.perf_counter()
        side = make(name, Path(path), weights, int(threads), kv_cache_dtype)
        side.prefill(PROMPT[:4])
        ready = {"load_seconds": time.perf_counter() - started}
    except (ImportError, ValueError, RuntimeError) as error:
        print(json.dumps({"absent": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    print(json.dumps(ready), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(side, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
