"""Processes that compute one model together, over `torch.distributed`: how they find each other, and a team of them.

Gloo carries numbers between CPUs, and the accelerators' own library (NCCL and its kin) between accelerators. A team
holds one model for serving: each rank has a part of it, all see the same tokens, and sums over the ranks are the same
bits on each (Megatron-LM, section 3). What goes from rank to rank is tensors of numbers; nothing is pickled. Knows no
model and no steps.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = 600.0  # seconds for a process that does not answer, loading included
_ALWAYS = timedelta(days=3650)  # between two requests a server may have nothing to say


class TeamLost(SystemExit):
    """A rank is gone, or failed where the others did not: no step can be trusted any more, so this process must end."""


def join(device: torch.device | str = "cpu", *, patience: float = PATIENCE) -> int:
    """Makes this process one of those that `torchrun` started, and says how many there are; 1 without `torchrun`.

    patience: seconds after which a process that does not answer is given up.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return 1
    if not dist.is_initialized():
        kind = torch.device(device).type
        if kind != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        if kind == "cpu" and os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
            _stay_on_this_machine()
        dist.init_process_group(_backend(kind), timeout=timedelta(seconds=patience))
    return dist.get_world_size()


def meet(place: Path, *, rank: int, size: int, device: torch.device | str = "cpu", patience: float = PATIENCE) -> None:
    """The same for processes of one machine, without `torchrun` and without an open port to meet at: they find each
    other by the file `place`, which does not exist before.
    """
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    _stay_on_this_machine()
    limit = timedelta(seconds=patience)
    dist.init_process_group(
        _backend(device.type), init_method=f"file://{place}", rank=rank, world_size=size, timeout=limit
    )


def _backend(kind: str) -> str:
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def _stay_on_this_machine() -> None:
    # Left to itself gloo may look for an address by the machine's name, and wait for it.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


class Team:
    """All processes that have joined, which make theirs at the same time. rank, size: this one's place among them."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._plans = dist.new_group(backend="gloo", timeout=_ALWAYS)

    def sum(self, part: Tensor) -> Tensor:
        """`part` added up over all ranks, in float32 at least, rounded once to its dtype."""
        total = part.contiguous() if part.itemsize > 2 else part.float()
        dist.all_reduce(total)
        return total.to(part.dtype)

    def joined(self, part: Tensor) -> Tensor:
        """The parts of all ranks side by side along the last axis, in the order of the ranks; shapes are equal."""
        if not part.numel():  # the same on every rank: there is nothing to send
            return torch.cat([part] * self.size, -1)
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, -1)

    def tell(self, numbers: Sequence[int]) -> None:
        """Rank 0's word to the others, which wait for it with `told`."""
        dist.broadcast(torch.tensor([len(numbers)]), 0, group=self._plans)
        if numbers:
            dist.broadcast(torch.tensor(numbers, dtype=torch.int64), 0, group=self._plans)

    def told(self) -> list[int]:
        """What rank 0 tells next, however long that takes."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0, group=self._plans)
        numbers = torch.zeros(int(length), dtype=torch.int64)
        if len(numbers):
            dist.broadcast(numbers, 0, group=self._plans)
        heard: list[int] = numbers.tolist()
        return heard
