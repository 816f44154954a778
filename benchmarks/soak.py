"""A soak: mixed traffic for half an hour, and what the server's memory, files and cache are like while it lasts.

    python -m tests.serve.deepseek DIR --format deepseek-v4      # a small random model that thinks and calls tools
    python benchmarks/soak.py DIR --minutes 30 --plot docs/soak.png --chat-format deepseek-v4

Clients ask all that the APIs have, and leave in the middle of every seventh answer or so. Nothing may be lost: each
answer is looked at. Memory is that of both processes, by a line through the samples after `--settle` minutes, in which
caches fill and allocators find their size. What else is given goes to `daedal serve`. Prints a table, and one JSON line
last; status 1 where something was lost, or pages or files are left.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy
from circumstances import circumstances
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from served import Server, serving
from soak_traffic import KINDS, Caller, Lost

SAMPLE_SECONDS = 5.0
OPTIONS = ("--max-batch", "8", "--max-waiting", "24")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at the server. minutes: since the traffic began."""

    minutes: float
    front_mb: float
    engine_mb: float
    front_files: float
    engine_files: float
    kv_bytes_used: int
    running: int
    requests: int


@dataclass
class Course:
    """What happened. ends: by kind and by how it ended."""

    samples: list[Sample] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    full: int = 0

    @property
    def requests(self) -> int:
        return sum(self.ends.values())


async def client(caller: Caller, course: Course, until: float) -> None:
    """Asks one thing after another."""
    kinds, weights = list(KINDS), list(KINDS.values())
    while time.monotonic() < until:
        (kind,) = caller.random.choices(kinds, weights)
        try:
            end = await kind(caller)
        except (Lost, httpx.HTTPError, KeyError, ValueError) as error:
            end = "lost"
            course.lost.append(f"{kind.__name__}: {type(error).__name__}: {error}")
        course.ends[f"{kind.__name__}: {end}"] += 1
    course.full += caller.full


def sample(server: Server, course: Course, begin: float) -> Sample:
    stats = server.stats()
    return Sample(
        minutes=(time.monotonic() - begin) / 60,
        kv_bytes_used=stats["kv_bytes_used"],
        running=stats["num_running"],
        requests=course.requests,
        **server.memory(),
    )


async def soak(server: Server, clients: int, seconds: float, seed: int) -> Course:
    course, begin = Course(), time.monotonic()
    context = server.stats()["max_context"]
    limits = httpx.Limits(max_connections=2 * clients, max_keepalive_connections=clients)
    with Progress(transient=True) as progress:
        shown = progress.add_task("soaking", total=seconds)
        async with httpx.AsyncClient(base_url=server.address, timeout=300, limits=limits) as http:
            seeds = random.Random(seed)
            callers = [Caller(http, context, seeds.getrandbits(32)) for _ in range(clients)]
            tasks = [asyncio.create_task(client(caller, course, begin + seconds)) for caller in callers]
            while (passed := time.monotonic() - begin) < seconds:
                course.samples.append(await asyncio.to_thread(sample, server, course, begin))
                progress.update(shown, completed=passed)
                await asyncio.sleep(min(SAMPLE_SECONDS, seconds - passed))
            await asyncio.gather(*tasks)
    return course


def growth(samples: list[Sample], name: str, settle: float) -> dict[str, float]:
    """Of one process: megabytes per hour by a line through the samples, and between the first and the last quarter of
    them, by their medians."""
    late = [one for one in samples if one.minutes >= settle] or samples
    minutes = numpy.array([one.minutes for one in late])
    held = numpy.array([getattr(one, name) for one in late])
    slope = float(numpy.polyfit(minutes, held, 1)[0]) if len(late) > 2 else 0.0
    quarter = max(len(late) // 4, 1)
    medians = [float(numpy.median(part)) for part in (held[:quarter], held[-quarter:])]
    return {"mb_per_hour": 60 * slope, "first_quarter_mb": medians[0], "last_quarter_mb": medians[1]}


def plot(samples: list[Sample], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    memory, files, cache = figure.subplots(3, 1, sharex=True)
    minutes = [one.minutes for one in samples]
    for name, label in (("front_mb", "front end"), ("engine_mb", "engine")):
        memory.plot(minutes, [getattr(one, name) for one in samples], label=label)
    memory.set(ylabel="resident MB", ylim=(0, None), title=f"Soak: {samples[-1].requests:,} requests")
    for name, label in (("front_files", "front end"), ("engine_files", "engine")):
        files.plot(minutes, [getattr(one, name) for one in samples], label=label)
    files.set(ylabel="open files", ylim=(0, None))
    cache.plot(minutes, [one.kv_bytes_used / 1e6 for one in samples], label="pages in use")
    cache.set(ylabel="cache MB", ylim=(0, None), xlabel="minutes")
    for axes in (memory, files, cache):
        axes.legend(loc="lower right")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def run(chosen: argparse.Namespace, options: list[str]) -> tuple[dict[str, Any], list[Sample]]:
    with serving(chosen.model, *OPTIONS, *options) as (server, _):
        before, fresh = server.settled(), server.memory()
        course = asyncio.run(soak(server, chosen.clients, 60 * chosen.minutes, chosen.seed))
        after = server.settled()
        idle = server.memory()
        told = {
            "minutes": chosen.minutes,
            "clients": chosen.clients,
            "requests": course.requests,
            "ends": dict(sorted(course.ends.items())),
            "told_to_come_back": course.full,
            "lost": len(course.lost),
            "first_lost": course.lost[:40],
            "kv_bytes": [before["kv_bytes_used"], after["kv_bytes_used"]],
            "front": growth(course.samples, "front_mb", chosen.settle),
            "engine": growth(course.samples, "engine_mb", chosen.settle),
            "fresh": fresh,
            "idle": idle,
            "tokens": after["prompt_tokens_total"] + after["generation_tokens_total"],
            "prefix_hits": after["prefix_hits_total"],
        }
    return told, course.samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--settle", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="a PNG file")
    parser.add_argument("--samples", type=Path, help="a JSON file of all that was seen")
    chosen, options = parser.parse_known_args()
    told, samples = run(chosen, options)
    if chosen.plot is not None:
        plot(samples, chosen.plot)
    if chosen.samples is not None:
        chosen.samples.write_text(json.dumps([asdict(one) for one in samples]))
    table = Table("what", "seen", title=f"daedal serve {chosen.model}, soaked")
    for name, value in told.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)
    print(json.dumps({**told, **circumstances()}))
    clean = told["lost"] == 0 and told["kv_bytes"][0] == told["kv_bytes"][1]
    # What clients held open is gone; a file more or less is a log's or a library's.
    files = all(told["idle"][name] <= told["fresh"][name] + 2 for name in ("front_files", "engine_files"))
    return 0 if clean and files else 1


if __name__ == "__main__":
    raise SystemExit(main())
