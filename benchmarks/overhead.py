"""What stands beside the arithmetic: Python's share of a decode step, the cost of a deterministic engine, and how long
answers wait while a long prompt is read.

    python benchmarks/overhead.py share                                # model (a), int4, batch 1 and 16
    python benchmarks/overhead.py deterministic --weights int8 bf16
    python benchmarks/overhead.py gaps --milliseconds 25 50 100 200    # of a step that reads prompts beside answers
    python benchmarks/overhead.py share --model PATH --weights int8

Share: each step of the engine is timed as a whole and inside its native calls, one for each pass of the model (a step
may make several); what is left is Python's, for each token. The two
engines of `deterministic`, and the settings of `gaps`, are asked in turn, round after round; ratios are medians of the
rounds' own. Prints a table, and one JSON line last.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances
from peer_models import MODELS, checkpoint
from rich.console import Console
from rich.table import Table

import daedal
from daedal.ops import Program

Row = dict[str, Any]

CONTEXT = 128
PREFILL = 512
LONG = 4096
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0, "seed": 1},
    "top-p 0.9": {"temperature": 1.0, "seed": 1, "top_p": 0.9},
}


class Timed:
    """Stands in the place of a recorded program and times it."""

    def __init__(self, program: Program):
        self._program = program
        self.seconds = 0.0

    def replay(self) -> None:
        start = time.perf_counter()
        self._program.replay()
        self.seconds += time.perf_counter() - start

    def taken(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Asked:
    """An engine, and requests of random ids for it."""

    def __init__(self, model: Any, **settings: Any):
        self.engine = daedal.Engine(model, max_context=8192, cache_bytes=1 << 30, **settings)
        self._vocab_size, self.passes = model.config.vocab_size, 1
        self._count = 0

    def add(self, length: int, most: int, **sampling: Any) -> str:
        self._count += 1
        ids = torch.randint(0, self._vocab_size, (length,), generator=torch.Generator().manual_seed(self._count))
        params = daedal.SamplingParams(max_tokens=most, ignore_eos=True, **sampling)
        self.engine.add(daedal.Request(id=str(self._count), prompt=tuple(ids.tolist()), params=params))
        return str(self._count)

    def step(self) -> float:
        """Seconds. `passes`: tokens that it brought each answer."""
        start = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - start
        self.passes = max((len(output.ids) for output in outputs), default=0) or 1
        return seconds

    def answering(self, batch: int, **sampling: Any) -> list[str]:
        """So many requests past their prompts."""
        names = [self.add(CONTEXT, 4000, **sampling) for _ in range(batch)]
        wanted = self.engine.stats().prompt_tokens_total + batch * CONTEXT
        while self.engine.stats().prompt_tokens_total < wanted:
            self.engine.step()
        for _ in range(5):
            self.engine.step()
        return names

    def clear(self, names: list[str]) -> None:
        for name in names:
            self.engine.cancel(name)
        self.engine.step()

    def decode(self, batch: int, steps: int) -> float:
        """Tokens per second."""
        names = self.answering(batch, temperature=0.0)
        seconds = statistics.median(self.step() / self.passes for _ in range(steps))
        self.clear(names)
        return batch / seconds

    def prefill(self, length: int) -> float:
        """Tokens per second."""
        self.add(length, 1, temperature=0.0)
        start = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return length / (time.perf_counter() - start)

    def reads(self, length: int) -> tuple[list[float], float]:
        """The steps, in seconds, that read a prompt beside one answer, and its tokens per second."""
        names = self.answering(1, temperature=0.0)
        before = self.engine.stats().prompt_tokens_total
        names.append(self.add(length, 2, temperature=0.0))
        gaps = [self.step()]
        while self.engine.stats().prompt_tokens_total == before:
            gaps.append(self.step())
        self.clear(names)
        return gaps, length / sum(gaps)


def shares(model: Any, weights: str, batches: list[int], steps: int) -> list[Row]:
    """For each batch and way of choosing: medians of a step, of its native call, and of the rest."""
    rows = []
    for batch in batches:
        asked = Asked(model, max_batch=batch)
        for sampling, settings in SAMPLING.items():
            names = asked.answering(batch, **settings)
            recorded = asked.engine._runner._recorded._steps.get(batch)
            if recorded is None:
                reason = asked.engine._runner._recorded.refusal
                raise SystemExit(f"no step of {batch} was recorded: {reason or 'there are no native kernels here'}")
            program, timed = recorded._program, Timed(recorded._program)
            recorded._program = timed
            asked.step()
            timed.taken()
            steps_taken = [(asked.step(), timed.taken(), asked.passes) for _ in range(steps)]
            recorded._program = program
            asked.clear(names)
            rest = statistics.median((whole - native) / passes for whole, native, passes in steps_taken)
            token = statistics.median(whole / passes for whole, _, passes in steps_taken)
            row = {"weights": weights, "batch": batch, "sampling": sampling, "token_us": token * 1e6}
            row["passes"] = statistics.fmean(passes for _, _, passes in steps_taken)
            rows.append(row | {"python_us": rest * 1e6, "python_share": rest / token})
    return rows


def deterministic(model: Any, weights: str, batches: list[int], steps: int, rounds: int) -> list[Row]:
    """How much slower a deterministic engine is: its rate over the other's, each round's."""
    sides = [Asked(model, max_batch=max(batches), deterministic=wanted) for wanted in (False, True)]
    cases = [("decode", batch) for batch in batches] + [("prefill", 1)]
    rows = []
    for phase, batch in cases:
        rates: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for side, found in zip(sides, rates, strict=True):
                rate = side.decode(batch, steps) if phase == "decode" else side.prefill(PREFILL)
                if turn:  # the first one warms up
                    found.append(rate)
        ratios = [exact / plain for plain, exact in zip(*rates, strict=True)]
        row = {"weights": weights, "phase": phase, "batch": batch, "plain": statistics.median(rates[0])}
        rows.append(row | {"deterministic": statistics.median(rates[1]), "ratios": ratios})
    return rows


def gaps(model: Any, weights: str, milliseconds: list[float], rounds: int) -> list[Row]:
    """One answer under way, one long prompt beside it: how long its steps are, and how fast the prompt is read."""
    settings = [*milliseconds, None]
    sides = [Asked(model, prefill_ms=wanted) for wanted in settings]
    found: list[list[tuple[list[float], float]]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, runs in zip(sides, found, strict=True):
            run = side.reads(LONG)
            if turn:
                runs.append(run)
    rows = []
    for wanted, runs in zip(settings, found, strict=True):
        steps = [seconds * 1e3 for taken, _ in runs for seconds in taken]
        row: Row = {"weights": weights, "prefill_ms": wanted, "median_ms": statistics.median(steps)}
        row |= {"longest_ms": max(steps), "prompt_rate": statistics.median(rate for _, rate in runs)}
        rows.append(row)
    return rows


def table(rows: list[Row]) -> Table:
    """Every field a column; ratios by their median and range."""
    shown = Table()
    for name in rows[0]:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    return shown


def _cell(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{statistics.median(value):.2f} ({min(value):.2f}-{max(value):.2f})"
    if name.endswith("share"):
        return f"{value:.1%}"
    return "no bound" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("share", "deterministic", "gaps"))
    parser.add_argument("--model", default="a", help=f"one of {', '.join(MODELS)}, or a checkpoint's directory")
    parser.add_argument("--weights", nargs="+", default=["int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--milliseconds", type=float, nargs="+", default=[25.0, 50.0, 100.0, 200.0])
    parser.add_argument("--steps", type=int, default=100, help="decode steps for each figure and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for weights in options.weights:
        directory = checkpoint(options.model, weights) if options.model in MODELS else Path(options.model)
        model = daedal.load(directory, weights=weights)
        if options.what == "share":
            rows += shares(model, weights, options.batches, options.steps)
        elif options.what == "deterministic":
            rows += deterministic(model, weights, options.batches, options.steps, options.rounds)
        else:
            rows += gaps(model, weights, options.milliseconds, options.rounds)
    Console(width=120).print(table(rows))
    first = rows[0]  # of one sequence, greedy
    share = {"daedal python_share": first["python_share"]} if "python_share" in first else {}
    print(json.dumps({**circumstances(), "model": options.model, **share, "rows": rows}))


if __name__ == "__main__":
    main()
