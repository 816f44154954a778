"""Accuracy gates on real tasks: the score with each option of the engine on and off, item by item.

    python benchmarks/gates.py                           # the default model, int8
    python benchmarks/gates.py MODEL --items 20 --weights bf16

Problems are answered by the model itself, behind the same solved examples, so that prompts begin alike; the choices of
`--choices` are weighed by their log-probabilities. Alone means: one at a time, whole prompts, no prefix cache, no
drafts. Beside each score stands how many answers or choices differ from those, and the farthest that a choice's
log-probability went. In bfloat16 a batch of another shape rounds otherwise, and a near-tie may fall otherwise: what
`--deterministic` serving rules out, and so do tests in float32 (`tests/infer/test_gates.py`). Prints a table, and one
JSON line last.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circumstances import circumstances
from rich.console import Console
from rich.progress import track
from rich.table import Table

import daedal
from daedal.checkpoint.load import load
from daedal.checkpoint.sources import resolve
from daedal.cli.opening import DEFAULT_MODEL
from daedal.eval.items import Item, spread
from daedal.eval.problem_sets import read_problems
from daedal.eval.problems import Problem
from daedal.eval.scoring import encode
from daedal.eval.tasks import read_tasks
from daedal.text.tokenizer import Tokenizer

PROBLEMS = ("arithmetic:1", "reversing", "copying:64", "retrieval:128")
ALONE: Mapping[str, Any] = {"max_batch": 1, "prefix_caching": False, "max_step_tokens": 1024}
BATCHED: Mapping[str, Any] = {"max_batch": 16}
LOOKUP = daedal.Speculation(method="lookup", draft_tokens=4)
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "alone": {},
    "batching": BATCHED,
    "prefix cache": {"prefix_caching": True},
    "chunks of 64": {"max_step_tokens": 64},
    "drafts by look-up": {"speculate": LOOKUP},
    "FP8 cache": {"kv_cache_dtype": "fp8"},
    "deterministic": {**BATCHED, "deterministic": True},
    "all that is exact": {**BATCHED, "prefix_caching": True, "max_step_tokens": 64, "speculate": LOOKUP},
}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """replies: by problem. weights: log-probability of each item's choices."""

    replies: Sequence[str]
    weights: Sequence[Sequence[float]]
    seconds: float


class Gate:
    """What is asked, and of whom."""

    def __init__(self, model: Any, tokenizer: Tokenizer, problems: Sequence[Problem], items: Sequence[Item]):
        self.model, self.tokenizer, self.problems, self.items = model, tokenizer, problems, items
        limit = model.config.max_position_embeddings
        self._prompts = [tokenizer.encode(problem.prompt) for problem in problems]
        self._choices = [[encode(tokenizer, *choice, limit=limit) for choice in item.choices] for item in items]

    def run(self, options: Mapping[str, Any]) -> Scored:
        start = time.perf_counter()
        longest = max(map(len, self._prompts)) + max(problem.max_tokens for problem in self.problems)
        context = max(longest, *(len(one.ids) + 1 for item in self._choices for one in item))
        wanted = {**ALONE, **options}
        engine = daedal.Engine(self.model, tokenizer=self.tokenizer, max_context=context, **wanted)
        params = [
            daedal.SamplingParams(max_tokens=problem.max_tokens, temperature=0.0, stop=problem.stop)
            for problem in self.problems
        ]
        replies = [output.text or "" for output in engine.generate(self._prompts, params)]
        flat = [one for item in self._choices for one in item]
        scored = engine.generate(
            [list(one.ids) for one in flat], daedal.SamplingParams(max_tokens=0, prompt_logprobs=0)
        )
        sums = iter(
            sum(entry.logprob for entry in (output.prompt_logprobs or [])[one.start :] if entry is not None)
            for one, output in zip(flat, scored, strict=True)
        )
        weights = [[next(sums) for _ in item] for item in self._choices]
        return Scored(replies=replies, weights=weights, seconds=time.perf_counter() - start)

    def told(self, found: Scored, alone: Scored) -> dict[str, Any]:
        right = [
            problem.is_right(problem.found(reply)) for problem, reply in zip(self.problems, found.replies, strict=True)
        ]
        chosen, before = (
            [max(range(len(each)), key=each.__getitem__) for each in one.weights] for one in (found, alone)
        )
        gaps = [
            abs(now - then)
            for new, old in zip(found.weights, alone.weights, strict=True)
            for now, then in zip(new, old, strict=True)
        ]
        return {
            "problems_right": sum(right),
            "replies_that_differ": sum(new != old for new, old in zip(found.replies, alone.replies, strict=True)),
            "choices_right": sum(one == item.gold for one, item in zip(chosen, self.items, strict=True)),
            "choices_that_differ": sum(new != old for new, old in zip(chosen, before, strict=True)),
            "farthest_logprob": max(gaps),
            "seconds": found.seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--weights", default="int8", choices=("bf16", "int8", "int4"))
    parser.add_argument("--items", type=int, default=10, help="of each kind of problem")
    parser.add_argument("--choices", type=int, default=30, help="items of arc_easy")
    parser.add_argument("--options", nargs="+", choices=sorted(OPTIONS), default=list(OPTIONS))
    chosen = parser.parse_args()
    directory = resolve(chosen.model)
    problems = [one for found in read_problems(PROBLEMS, chosen.items, seed=0).values() for one in found]
    items = spread(read_tasks(["arc_easy"])["arc_easy"], chosen.choices)
    gate = Gate(load(directory, weights=chosen.weights), Tokenizer.load(directory), problems, items)
    asked = ["alone", *(name for name in chosen.options if name != "alone")]
    if gate.model.config.kv_lora_rank is None:
        asked = [name for name in asked if name != "FP8 cache"]
    found = {name: gate.run(OPTIONS[name]) for name in track(asked, transient=True)}
    rows = {name: gate.told(one, found["alone"]) for name, one in found.items()}
    table = Table(title=f"{chosen.model}, {chosen.weights}: {len(problems)} problems, {len(items)} items of arc_easy")
    for column in ("option", *rows["alone"]):
        table.add_column(column.replace("_", " "))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)
    print(json.dumps({"rows": rows, **circumstances()}))


if __name__ == "__main__":
    main()
