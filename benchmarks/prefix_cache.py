"""What a prefix cache is worth where requests begin alike: many short questions behind one long system prompt.

    python benchmarks/prefix_cache.py                                     # the default model, 1 and 8 clients
    python benchmarks/prefix_cache.py --model PATH --weights int8 --shared 4000

Ids are random, of lengths as given: what is measured does not depend on what they mean. Two engines of one model, one
of which keeps what was read, are asked in turn, round after round, by clients who each ask the next question when they
have their answer. Every round begins with nothing kept. Times are from a question to its first token; a copy is what
takes the place of reading the system prompt. Prints a table, and one JSON line last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from circumstances import circumstances
from rich.console import Console
from rich.progress import track
from rich.table import Table

import daedal
from daedal.infer.prefixes import Copy

Row = dict[str, Any]


class Side:
    """One engine, and what its requests had to wait for."""

    def __init__(self, model: Any, clients: int, context: int, *, keeps: bool):
        self.engine = daedal.Engine(model, max_batch=clients, max_context=context, prefix_caching=keeps)
        self.clients, self.copies = clients, list[float]()
        self._copy = self.engine._runner.copy
        self.engine._runner.copy = self._timed  # type: ignore[method-assign]

    def _timed(self, copies: Sequence[Copy]) -> None:
        start = time.perf_counter()
        self._copy(copies)
        if copies:
            self.copies.append(time.perf_counter() - start)

    def ask(self, prompts: list[list[int]], answer: int) -> tuple[list[float], float, float]:
        """Seconds to each first token, seconds in all, and the share of prompt tokens that was found."""
        self.engine.forget_prefixes()
        params = daedal.SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        asked: dict[str, float] = {}
        firsts: list[float] = []
        found, waiting, begin = 0, list(enumerate(prompts)), time.perf_counter()
        under_way = 0
        while waiting or under_way:
            while waiting and under_way < self.clients:
                number, prompt = waiting.pop(0)
                asked[str(number)] = time.perf_counter()
                self.engine.add(daedal.Request(id=str(number), prompt=tuple(prompt), params=params))
                under_way += 1
            for output in self.engine.step():
                if output.request_id in asked:
                    firsts.append(time.perf_counter() - asked.pop(output.request_id))
                    found += output.num_cached
                under_way -= output.finish_reason is not None
        return firsts, time.perf_counter() - begin, found / sum(map(len, prompts))


def questions(vocab_size: int, *, shared: int, question: int, count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        found: list[int] = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        return found

    system = ids(shared)
    return [system + ids(question) for _ in range(count)]


def measure(model: Any, clients: int, options: argparse.Namespace) -> list[Row]:
    """A row without and a row with the cache, medians of the rounds; the first round only warms up."""
    context = options.shared + options.question + options.answer
    sides = [Side(model, clients, context, keeps=keeps) for keeps in (False, True)]
    runs: list[list[tuple[list[float], float, float]]] = [[], []]
    for turn in track(range(options.rounds + 1), description=f"{clients} clients", transient=True):
        asked = questions(
            model.config.vocab_size,
            shared=options.shared,
            question=options.question,
            count=options.requests,
            seed=turn,
        )
        for side, found in zip(sides, runs, strict=True):
            run = side.ask(asked, options.answer)
            if turn:
                found.append(run)
    rows = []
    for name, side, found in zip(("without", "with"), sides, runs, strict=True):
        firsts = [seconds * 1e3 for one, _, _ in found for seconds in one]
        row: Row = {"clients": clients, "prefix cache": name, "first token, median ms": statistics.median(firsts)}
        row["first token, p99 ms"] = statistics.quantiles(firsts, n=100, method="inclusive")[-1]
        row["requests/s"] = options.requests / statistics.median(seconds for _, seconds, _ in found)
        row["found"] = statistics.median(share for _, _, share in found)
        row["copy, median ms"] = statistics.median(side.copies) * 1e3 if side.copies else 0.0
        rows.append(row)
    return rows


def table(rows: list[Row]) -> Table:
    shown = Table()
    for name in rows[0]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-latent", help="a name or a checkpoint's directory")
    parser.add_argument("--weights", default="int8", help="as `daedal serve` has them; none for the checkpoint's own")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--shared", type=int, default=1000, help="tokens that all prompts begin with")
    parser.add_argument("--question", type=int, default=30)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--requests", type=int, default=24, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = daedal.load(options.model, weights=None if options.weights == "none" else options.weights)
    rows = [row for clients in options.clients for row in measure(model, clients, options)]
    Console(width=120).print(table(rows))
    print(json.dumps({**circumstances(), "model": options.model, "weights": options.weights, "rows": rows}))


if __name__ == "__main__":
    main()
