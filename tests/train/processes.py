"""Runs a test's function in several processes that form a group of `torch.distributed` on this machine.

Each process returns tensors by name, which come back through files. A failure in any of them fails the test with its
traceback, and all of them are gone after a minute whatever happens.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 60.0  # seconds

Result = Mapping[str, Tensor] | None


def run(function: Callable[..., Result], count: int, *args: Any, dying: int | None = None) -> list[dict[str, Tensor]]:
    """What `function(rank, *args)` returns in each of `count` processes, by rank; {} for None.

    dying: the process that does not live to return anything.

    function: of a module's top level, with arguments that a fresh process can be given. It finds the process group
    ready (gloo), one thread, seed 0, and memory poisoned as in any test. Run a model once in the caller before: native
    kernels that are not built yet would be built under the time limit.
    """
    # A server that has torch already makes each process in a moment; it is single-threaded, so forking it is safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "tests.train.small_runs"])
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        processes = [
            context.Process(target=_enter, args=(directory, rank, count, function, args)) for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, directory, dying)
        finally:
            for process in processes:
                _end(process)
        return [{} if rank == dying else load_file(_result(directory, rank)) for rank in range(count)]


def _end(process: BaseProcess) -> None:
    """Ends a process and what it started, a compiler of kernels for one."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _wait(processes: list[BaseProcess], directory: Path, dying: int | None) -> None:
    """Until all are done. AssertionError when one fails, which leaves the others waiting for it, or at the limit."""
    end = time.monotonic() + LIMIT
    waiting = list(processes)
    while waiting:
        ready = wait([process.sentinel for process in waiting], end - time.monotonic())
        if not ready:
            raise AssertionError(f"{len(waiting)} of {len(processes)} processes still ran after {LIMIT:.0f} seconds")
        waiting = [process for process in waiting if process.sentinel not in ready]
        ended = [process for rank, process in enumerate(processes) if process not in waiting and rank != dying]
        if any(process.exitcode for process in ended):
            # One that failed first may make others fail a moment later: all that is told by now is shown.
            told = [path.read_text(encoding="utf-8") for path in sorted(directory.glob("failure_*"))]
            raise AssertionError("\n".join(told) or "a process ended without a word")


def _enter(directory: Path, rank: int, count: int, function: Callable[..., Result], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        torch.set_num_threads(1)
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        meeting = f"file://{directory / 'meeting'}"
        patience = timedelta(seconds=LIMIT / 2)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=patience)
        found = function(rank, *args) or {}
        alone = {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}
        save_file(alone, _result(directory, rank))
        dist.destroy_process_group()
    except BaseException:
        text = f"process {rank} of {count}:\n{traceback.format_exc()}"
        (directory / f"failure_{rank}").write_text(text, encoding="utf-8")
        sys.exit(1)


def _result(directory: Path, rank: int) -> Path:
    return directory / f"result_{rank}.safetensors"
