"""A real server under faults: overload, clients that vanish, a killed engine, an end with answers under way.

    python benchmarks/faults.py MODEL [--disconnects 1000] [--seconds 60] [--only-overload]

Starts `daedal serve MODEL` with few places, and looks at it from outside: what clients got, times, open files, memory
of both processes, bytes of the cache. Clients under load write and read bare bytes and come back when they are told
to, so that on a small machine it is the server that is looked at. Prints a table, and one JSON line last.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import os
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from served import Server, serving

from daedal.infer.request import Output
from daedal.infer.stats import EngineStats
from daedal.serve.workers import wire

BATCH, WAITING = 4, 4
SHORT = {"prompt": "It is a truth", "max_tokens": 24, "ignore_eos": True}
LONG = {"prompt": "It is a truth", "max_tokens": 400, "ignore_eos": True, "stream": True}
COMPLETE = "/v1/completions"
AT_ONCE = 50


@dataclass
class Seen:
    """What clients met. seconds: of answers that came whole, from the try that was admitted; served: the same as the
    server's log has them; refusals: seconds of each, by the log."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    lasted: float = 0.0

    def told(self) -> dict[str, object]:
        statuses = {str(status): count for status, count in sorted(self.statuses.items())}
        sides = {"": self.seconds, "served_": self.served, "refusal_": self.refusals}
        quantiles = {f"{side}p{share}": quantile(all, share) for side, all in sides.items() for share in (50, 99)}
        return {"statuses": statuses, "answers_per_second": self.statuses[200] / self.lasted, **quantiles}


def quantile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else math.nan


OPTIONS = ("--max-batch", str(BATCH), "--max-waiting", str(WAITING), "--drain-seconds", "5")


def under_load(server: Server, clients: int, seconds: float) -> dict[str, object]:
    """`clients` who ask again and again, what they met, and the server's memory then."""
    server.logged()
    seen = asyncio.run(load(server.address, clients, seconds))
    server.settled()
    for line in server.logged():
        if line["route"] == COMPLETE and line["status"] in (200, 429):
            (seen.served if line["status"] == 200 else seen.refusals).append(line["seconds"])
    return {**seen.told(), **server.memory()}


async def load(address: str, clients: int, seconds: float) -> Seen:
    seen, begin = Seen(), time.monotonic()
    host, port = urlsplit(address).netloc.split(":")
    request = message(SHORT)

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < begin + seconds:
            start = time.monotonic()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            await reader.readexactly(int(fields["content-length"]))
            status = int(head.split(" ", 2)[1])
            seen.statuses[status] += 1
            if status == 200:
                seen.seconds.append(time.monotonic() - start)
            else:
                await asyncio.sleep(float(fields["retry-after"]))
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.lasted = time.monotonic() - begin
    return seen


def message(body: dict[str, object]) -> bytes:
    """A request's bytes."""
    data = json.dumps(body).encode()
    return f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def vanish(address: str, count: int) -> int:
    """Clients that reset their connection, at moments that differ; how many had begun to be answered."""
    host, port = urlsplit(address).netloc.split(":")
    request = message(LONG)
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


def faults(server: Server, disconnects: int) -> dict[str, object]:
    """Clients that vanish, a killed engine, and the server's end."""
    begun = vanish(server.address, disconnects)
    stats, gone = server.settled(), server.memory()
    kill = asyncio.run(killed(server))
    return {
        "disconnects": {"clients": disconnects, "begun": begun, "kv_bytes": stats["kv_bytes_used"], **gone},
        "kill": kill,
        "drain": drained(server),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of full load, and of overload")
    parser.add_argument("--only-overload", action="store_true")
    chosen = parser.parse_args()
    with serving(chosen.model, *OPTIONS) as (server, seconds):
        rows: dict[str, object] = {
            "wire_us": {f"{count} outputs": wire_microseconds(count) for count in (1, 16, 64)},
            "start": {"seconds": seconds, **server.memory()},
        }
        for name, times in (("warm", 1), ("full", 1), ("overload", 10)):
            rows[name] = under_load(server, times * (BATCH + WAITING), chosen.seconds / (4 if name == "warm" else 1))
        if not chosen.only_overload:
            rows |= faults(server, chosen.disconnects)
    table = Table("fault", "what came of it", title=f"daedal serve {chosen.model}: {BATCH} run, {WAITING} wait")
    for name, row in rows.items():
        table.add_row(name, json.dumps(row, default=str))
    Console().print(table)
    print(json.dumps({**rows, **circumstances()}))


if __name__ == "__main__":
    main()
