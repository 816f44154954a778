"""A real server under faults: overload, clients that vanish, a killed engine, an end with answers under way.

    python benchmarks/faults.py MODEL [--disconnects 1000] [--rounds 6]

Starts `daedal serve MODEL` with few places, and looks at it from outside: what clients got, times, open files, memory
of both processes, bytes of the cache. Prints a table, and one JSON line last.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.parse import urlsplit

import httpx
import psutil
from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from daedal.infer.request import Output
from daedal.infer.stats import EngineStats
from daedal.serve import wire

BATCH, WAITING = 4, 4
SHORT = {"prompt": "It is a truth", "max_tokens": 24, "ignore_eos": True}
LONG = {"prompt": "It is a truth", "max_tokens": 400, "ignore_eos": True, "stream": True}
COMPLETE = "/v1/completions"
AT_ONCE = 50
MEGABYTE = 1e6


@dataclass
class Seen:
    """What clients met. seconds: of answers that came whole, as clients saw them; served: the same as the server's log
    has them, without what it took these clients to get there."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)

    def told(self) -> dict[str, object]:
        statuses = {str(status): count for status, count in sorted(self.statuses.items())}
        sides = {"": self.seconds, "served_": self.served}
        quantiles = {f"{side}p{share}": quantile(all, share) for side, all in sides.items() for share in (50, 99)}
        return {"statuses": statuses, **quantiles}


def quantile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else math.nan


class Server:
    """`daedal serve` and the process of its engine."""

    def __init__(self, process: subprocess.Popen[str], address: str, log: IO[str]):
        self.process, self.address, self._log = process, address, log
        self._front = psutil.Process(process.pid)

    @property
    def engine(self) -> psutil.Process:
        return next(child for child in self._front.children() if "daedal.cli.engine" in child.cmdline())

    def memory(self) -> dict[str, float]:
        """Resident megabytes, and files that the front end has open."""
        pair = {"front_mb": self._front, "engine_mb": self.engine}
        told = {name: process.memory_info().rss / MEGABYTE for name, process in pair.items()}
        return {**told, "front_files": float(self._front.num_fds())}

    def served(self) -> list[float]:
        """Seconds of completions that were answered since this was asked last, by the log."""
        lines = [json.loads(line) for line in self._log if line.startswith("{")]
        return [line["seconds"] for line in lines if line.get("route") == COMPLETE and line["status"] == 200]

    def load(self, clients: int, rounds: int) -> Seen:
        """`clients` who ask again and again."""
        self.served()
        seen = asyncio.run(load(self.address, clients, rounds))
        seen.served = self.served()
        return seen

    def stats(self) -> dict[str, float]:
        return httpx.get(f"{self.address}/stats", timeout=30).json()

    def settled(self) -> dict[str, float]:
        """The numbers once nothing runs."""
        while (stats := self.stats())["num_running"] or stats["num_waiting"]:
            time.sleep(0.05)
        return stats


@contextmanager
def serving(model: str) -> Iterator[tuple[Server, float]]:
    """The server once it has said its address, and the seconds that took."""
    options = ["--port", "0", "--max-batch", str(BATCH), "--max-waiting", str(WAITING), "--drain-seconds", "5"]
    options += ["--log-format", "json"]
    start = time.perf_counter()
    command = [sys.executable, "-m", "daedal", "serve", model, *options]
    with (
        TemporaryDirectory() as folder,
        (Path(folder) / "log").open("w+") as log,
        (Path(folder) / "log").open() as reading,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            yield Server(process, address, reading), time.perf_counter() - start
        finally:
            process.terminate()


async def load(address: str, clients: int, rounds: int) -> Seen:
    """`clients` who ask again and again, and come back when they are told to."""
    seen = Seen()

    async def client(http: httpx.AsyncClient) -> None:
        for _ in range(rounds):
            start = time.perf_counter()
            answer = await http.post(COMPLETE, json=SHORT)
            seen.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                seen.seconds.append(time.perf_counter() - start)
            else:
                await asyncio.sleep(float(answer.headers.get("retry-after", 1)))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seen


def vanish(address: str, count: int) -> int:
    """Clients that reset their connection, at moments that differ; how many had begun to be answered."""
    host, port = urlsplit(address).netloc.split(":")
    body = json.dumps(LONG).encode()
    request = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    begun = 0
    for first in range(0, count, AT_ONCE):
        socks = []
        for place in range(first, min(first + AT_ONCE, count)):
            sock = socket.create_connection((host, int(port)), timeout=30)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.sendall(request[: len(request) - (40 if place % 5 == 0 else 0)])
            socks.append((place, sock))
        for place, sock in socks:
            if place % 5 > 1:
                begun += b" 200 " in sock.recv(200)
            sock.close()
    return begun


async def killed(server: Server) -> dict[str, object]:
    """The engine is killed while it answers twice as many as it runs at once."""

    async def client(http: httpx.AsyncClient) -> str:
        last = ""
        async with http.stream("POST", "/v1/completions", json=LONG) as answer:
            async for line in answer.aiter_lines():
                last = line if line.startswith("data: {") else last
        return "cut" if "error" in json.loads(last.removeprefix("data: ")) else "whole"

    async with httpx.AsyncClient(base_url=server.address, timeout=None) as http:
        clients = [asyncio.create_task(client(http)) for _ in range(2 * BATCH)]
        while (await http.get("/stats")).json()["num_running"] < BATCH:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        start = time.perf_counter()
        os.kill(server.engine.pid, signal.SIGKILL)
        while (await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.001)
        noticed = time.perf_counter() - start
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        ready = time.perf_counter() - start
        ends = Counter(await asyncio.gather(*clients))
    return {"noticed_seconds": noticed, "ready_again_seconds": ready, "answers": dict(ends)}


def drained(server: Server) -> dict[str, object]:
    """SIGTERM with answers under way."""
    with (
        httpx.Client(base_url=server.address, timeout=None) as http,
        http.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        start = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        ends = list(lines)[-2:]
    status = server.process.wait()
    return {
        "seconds": time.perf_counter() - start,
        "status": status,
        "answer": "cut" if "error" in ends[0] else "whole",
    }


def wire_microseconds(num_outputs: int, *, repeats: int = 500) -> float:
    """Of the CPU, for the outputs of one step to be written by one process and read by the other."""
    numbers = {one.name: 0 for one in dataclasses.fields(EngineStats) if one.default is dataclasses.MISSING}
    outputs = tuple(Output(request_id=f"cmpl-{place:032}-0", ids=[1234], text=" word") for place in range(num_outputs))
    report = wire.Delivered(outputs=outputs, stats=EngineStats(**numbers))
    ours, theirs = socket.socketpair()
    front, engine = wire.front_end(ours), wire.engine_side(theirs)
    start = time.process_time()
    for _ in range(repeats):
        engine.send(report)
        front.receive()
    seconds = time.process_time() - start
    front.close()
    engine.close()
    return 1e6 * seconds / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=6, help="requests of each client under load")
    chosen = parser.parse_args()
    with serving(chosen.model) as (server, seconds):
        fresh = server.memory()
        full = server.load(BATCH + WAITING, chosen.rounds)
        before = server.memory()
        over = server.load(10 * (BATCH + WAITING), chosen.rounds)
        after = server.memory()
        begun = vanish(server.address, chosen.disconnects)
        stats, gone = server.settled(), server.memory()
        kill = asyncio.run(killed(server))
        end = drained(server)
    rows: dict[str, object] = {
        "wire_us": {f"{count} outputs": wire_microseconds(count) for count in (1, 16, 64)},
        "start": {"seconds": seconds, **fresh},
        "full": {**full.told(), **before},
        "overload": {**over.told(), **after},
        "disconnects": {"clients": chosen.disconnects, "begun": begun, "kv_bytes": stats["kv_bytes_used"], **gone},
        "kill": kill,
        "drain": end,
    }
    table = Table("fault", "what came of it", title=f"daedal serve {chosen.model}: {BATCH} run, {WAITING} wait")
    for name, row in rows.items():
        table.add_row(name, json.dumps(row, default=str))
    Console().print(table)
    print(json.dumps({**rows, **circumstances()}))


if __name__ == "__main__":
    main()
