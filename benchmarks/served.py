"""A real `daedal serve` in processes of its own, looked at from outside: its memory, open files, log and numbers.

What the benchmarks of the server share. Knows nothing of what is asked of it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import httpx
import psutil

MEGABYTE = 1e6


class Server:
    """`daedal serve` and the process of its engine."""

    def __init__(self, process: subprocess.Popen[str], address: str, log: IO[str]):
        self.process, self.address, self._log = process, address, log
        self._front = psutil.Process(process.pid)

    @property
    def engine(self) -> psutil.Process:
        return next(child for child in self._front.children() if "daedal.cli.engine" in child.cmdline())

    def memory(self) -> dict[str, float]:
        """Resident megabytes of both processes, and files that they have open."""
        told: dict[str, float] = {}
        for name, process in (("front", self._front), ("engine", self.engine)):
            told[f"{name}_mb"] = process.memory_info().rss / MEGABYTE
            told[f"{name}_files"] = float(process.num_fds())
        return told

    def logged(self) -> list[dict[str, Any]]:
        """Requests that ended since this was asked last, as the log has them."""
        return [json.loads(line) for line in self._log if line.startswith('{"') and '"route"' in line]

    def stats(self) -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{self.address}/stats", timeout=60).json()
        return told

    def settled(self) -> dict[str, Any]:
        """The numbers once nothing runs."""
        while (stats := self.stats())["num_running"] or stats["num_waiting"]:
            time.sleep(0.05)
        return stats

    def pinned(self, cores: Sequence[int]) -> None:
        """Both processes, all their threads, to these cores."""
        for process in (self._front, self.engine):
            for thread in process.threads():
                psutil.Process(thread.id).cpu_affinity(list(cores))


@contextmanager
def serving(model: str, *options: str) -> Iterator[tuple[Server, float]]:
    """The server once it has said its address, and the seconds that took. Its log is read, and shown where it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "daedal", "serve", model, "--port", "0", "--log-format", "json", *options]
    with (
        TemporaryDirectory() as folder,
        (Path(folder) / "log").open("w+") as log,
        (Path(folder) / "log").open() as reading,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit(f"the server did not start: {(Path(folder) / 'log').read_text()[-2000:]}")
        try:
            yield Server(process, address, reading), time.perf_counter() - start
        finally:
            process.terminate()
