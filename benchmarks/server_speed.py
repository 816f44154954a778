"""Decoding through `daedal serve` beside `Engine.generate` in a process of its own: what HTTP and the front end cost.

    python benchmarks/server_speed.py                      # the default model in int8, one request at a time
    python benchmarks/server_speed.py --weights int4 --rounds 40

A machine's speed drifts by a third within a minute, so pieces are short, in an order drawn anew in every round, and
ratios are of pieces of the same round. A piece is a long answer less a short one to the same prompt: decoding alone.
Whole answers and streams are asked for. Prints a table, and one JSON line last.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import httpx
import torch
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from served import serving

import daedal
from daedal.infer.request import SamplingParams

PROMPT = tuple(range(100, 228))
SHORT = 20
Answer = Callable[[int], float]  # seconds of an answer of so many tokens


def asked(client: httpx.Client, model: str, *, stream: bool) -> Answer:
    """Through the server."""

    def answer(tokens: int) -> float:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        start = time.perf_counter()
        client.post("/v1/completions", json={**body, "stream": stream}).raise_for_status()
        return time.perf_counter() - start

    return answer


def generated(model: str, weights: str) -> Answer:
    """In this process."""
    engine = daedal.Engine(daedal.load(model, device="cpu", dtype=torch.bfloat16, weights=weights))

    def answer(tokens: int) -> float:
        start = time.perf_counter()
        engine.generate([PROMPT], SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        return time.perf_counter() - start

    return answer


def measured(arms: Mapping[str, Answer], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds that `tokens` tokens took each arm, round by round."""
    for answer in arms.values():
        answer(SHORT)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        order = list(arms)
        random.Random(number).shuffle(order)
        for name in order:
            short = arms[name](SHORT)
            seconds[name].append(arms[name](SHORT + tokens) - short)
    return seconds


def found(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Rates, and ratios to the first arm's: the middle one and the quartiles."""
    base = next(iter(seconds.values()))
    rows = {}
    for name, each in seconds.items():
        low, middle, high = statistics.quantiles([one / own for one, own in zip(base, each, strict=True)], n=4)
        rate = tokens / statistics.median(each)
        rows[name] = {"tokens_per_second": rate, "ratio": middle, "lower_quartile": low, "upper_quartile": high}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-latent")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with (
        serving(options.model, "--weights", options.weights) as (server, _),
        httpx.Client(base_url=server.address, timeout=120) as client,
    ):
        arms = {"Engine.generate": generated(options.model, options.weights)}
        arms |= {kind: asked(client, options.model, stream=kind == "a stream") for kind in ("whole", "a stream")}
        rows = found(measured(arms, options.tokens, options.rounds), options.tokens)
    table = Table("asked", "tokens/s", "to the engine", "quartiles", title=f"{options.model}, {options.weights}")
    for name, row in rows.items():
        quartiles = f"{row['lower_quartile']:.3f} to {row['upper_quartile']:.3f}"
        table.add_row(name, f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.3f}", quartiles)
    Console(width=100).print(table)
    print(json.dumps({**circumstances(), **vars(options), "found": rows}))


if __name__ == "__main__":
    main()
