"""The server under load beside llama-cpp-python's, by a public load generator: locust.

    python benchmarks/load.py                            # SmolLM2-135M, 8 bits on both sides; needs daedal[bench]
    python benchmarks/load.py --python PATH              # of an environment with locust and llama-cpp-python[server]

Clients ask, read the stream, and ask again, for `--seconds`; what is under way then may end. Throughput is what came
within that time; times are as clients saw them, of all answers. Prompts of one kind are all different, those of the
other begin alike: there Daedal is asked with and without its prefix cache. llama-cpp-python's server is given what it
has to be fast: flash attention, all cores, no logits of prompts, and it does not drop one request for the next; it
answers one after another. Both read the same numbers: the same bits a weight. Prints a table, and one JSON line last.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from circumstances import circumstances
from peer_models import checkpoint, gguf_file
from rich.console import Console
from rich.progress import track
from rich.table import Table
from served import serving

CLIENTS = (1, 4, 16, 64)
ALIKE_CLIENTS = 16
OURS = {"stream_options": {"include_usage": True}}
THEIRS = {"repeat_penalty": 1.0}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """shared, own: words of a prompt, those that all begin with and those of its own. answer: its tokens at most."""

    name: str
    shared: int
    own: int
    answer: int


DIFFERENT = Traffic(name="different", shared=0, own=100, answer=64)
ALIKE = Traffic(name="alike", shared=600, own=30, answer=16)


def quantile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else math.nan


class Generator:
    """Locust, in a process of its own. python: of an environment that has it."""

    def __init__(self, python: str, seconds: float):
        self._python, self._seconds = python, seconds

    def run(self, address: str, clients: int, traffic: Traffic, more: dict[str, Any]) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "seen.json"
            command = [self._python, "-m", "locust", "-f", str(Path(__file__).with_name("load_clients.py"))]
            command += ["--headless", "--only-summary", "--loglevel", "WARNING", "--host", address, "--out", str(out)]
            command += ["-u", str(clients), "-r", str(clients), "-t", f"{self._seconds:g}s", "--stop-timeout", "300"]
            command += ["--shared", str(traffic.shared), "--own", str(traffic.own), "--answer", str(traffic.answer)]
            command += ["--more", json.dumps(more)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not out.exists():
                raise SystemExit(f"locust did not run: {done.stderr[-2000:]}")
            return told(json.loads(out.read_text()), self._seconds)


def told(seen: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Rates; seconds to the first event with text, between two events, and for each token after the first: a server may
    put several into one event."""
    whole = [one for one in seen if one["reason"] is not None]
    ends = min((one["asked"] for one in seen), default=0.0) + seconds
    firsts = [one["events"][0] - one["asked"] for one in whole if one["events"]]
    gaps = [later - one["events"][at] for one in whole for at, later in enumerate(one["events"][1:])]
    lengths = [one["tokens"] or len(one["events"]) for one in whole]
    each = [
        (one["events"][-1] - one["events"][0]) / (length - 1)
        for one, length in zip(whole, lengths, strict=True)
        if len(one["events"]) > 1
    ]
    in_time = sum(
        length * sum(at <= ends for at in one["events"]) / max(len(one["events"]), 1)
        for one, length in zip(whole, lengths, strict=True)
    )
    return {
        "answers": len(whole),
        "failed": len(seen) - len(whole),
        "requests_per_second": sum(one["ended"] <= ends for one in whole) / seconds,
        "tokens_per_second": in_time / seconds,
        "tokens_an_answer": statistics.fmean(lengths) if lengths else math.nan,
        **{f"first_p{share}": quantile(firsts, share) for share in (50, 99)},
        **{f"between_p{share}": quantile(gaps, share) for share in (50, 99)},
        **{f"per_token_p{share}": quantile(each, share) for share in (50, 99)},
    }


@contextmanager
def llama_server(python: str, weights: str, threads: int) -> Iterator[str]:
    """The address of llama-cpp-python's server, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = gguf_file("smol", weights)
    options = {"host": "127.0.0.1", "port": port, "model": model, "n_threads": threads, "n_threads_batch": threads}
    options |= {"n_ctx": 2048, "flash_attn": True, "logits_all": False, "interrupt_requests": False, "verbose": False}
    command = [python, "-m", "llama_cpp.server"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while not _answers(address):
            if process.poll() is not None:
                assert process.stderr is not None
                raise SystemExit(f"llama_cpp.server did not start: {process.stderr.read()[-2000:]}")
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.communicate()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/v1/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def measure(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    generator, brief = (Generator(chosen.python, seconds) for seconds in (chosen.seconds, 4.0))
    rows: list[dict[str, Any]] = []

    def cells(side: str, address: str, more: dict[str, Any], asked: list[tuple[int, Traffic]]) -> None:
        brief.run(address, 2, DIFFERENT, more)
        for clients, traffic in track(asked, description=side, transient=True):
            found = generator.run(address, clients, traffic, more)
            rows.append({"side": side, "traffic": traffic.name, "clients": clients, **found})

    every = [(clients, DIFFERENT) for clients in chosen.clients]
    model = str(checkpoint("smol", chosen.weights))
    ours = ("--weights", chosen.weights, "--max-context", "2048", *chosen.serve)
    with serving(model, *ours) as (server, _):
        cells("daedal", server.address, OURS, [*every, (ALIKE_CLIENTS, ALIKE)])
    with serving(model, *ours, "--no-prefix-cache") as (server, _):
        cells("daedal without prefix cache", server.address, OURS, [(ALIKE_CLIENTS, ALIKE)])
    with llama_server(chosen.python, chosen.weights, chosen.threads) as address:
        cells("llama-cpp-python", address, THEIRS, [*every, (ALIKE_CLIENTS, ALIKE)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of an environment with locust and the peer's server")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each cell")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--weights", choices=("int8", "int4"), default="int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="what else goes to `daedal serve`")
    chosen = parser.parse_args()
    rows = measure(chosen)
    table = Table(title=f"SmolLM2-135M, {chosen.weights}, {chosen.seconds:g} s each")
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=180).print(table)
    print(json.dumps({"rows": rows, **circumstances()}))


if __name__ == "__main__":
    main()
