"""How many engines a server has, of how many processes each, and which of them one is; what each may then take.

On CPUs all of them share one machine's cores and memory, on accelerators every process has a device of its own.
Imports torch when asked.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.errors import RequestError
from daedal.shapes.sharing import MOST_RANKS

if TYPE_CHECKING:
    import torch

RanksOption = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        help="Processes that hold the model together: heads and widths are divided among them, experts dealt out; "
        "each has an accelerator of its own, or its share of the CPU.",
    ),
]
ReplicasOption = Annotated[
    int,
    typer.Option(help="Engines that answer side by side; requests that begin alike go to the same one."),
]
RayOption = Annotated[
    bool,
    typer.Option("--ray", help="Engines run where a Ray cluster has room: that of RAY_ADDRESS, else one started here."),
]
MOST_REPLICAS = 64


@dataclass(frozen=True, kw_only=True)
class Placement:
    """replicas: engines of the server. ranks: processes of each. replica: which engine this one is. apart: each engine
    sees no accelerators but its own (Ray deals them out).
    """

    replicas: int = 1
    ranks: int = 1
    replica: int = 0
    apart: bool = False

    def __post_init__(self) -> None:
        for name, value, most in (
            ("--replicas", self.replicas, MOST_REPLICAS),
            ("--tensor-parallel-size", self.ranks, MOST_RANKS),
        ):
            if not 1 <= value <= most:
                raise RequestError(f"{name} is {value}: it must be from 1 to {most}")

    @property
    def processes(self) -> int:
        return self.replicas * self.ranks

    def device(self, chosen: "torch.device", rank: int = 0) -> "torch.device":
        """Where a rank computes: accelerators are dealt out one by one. RequestError where there are too few."""
        import torch

        needed = self.ranks if self.apart else self.processes
        if chosen.type == "cpu" or needed == 1:
            return chosen
        if chosen.index is not None:
            raise RequestError(f"--device is {chosen}, one accelerator for {needed} processes: give {chosen.type}")
        if needed > (count := torch.accelerator.device_count()):
            raise RequestError(f"{needed} processes need as many accelerators, there are {count}: ask for fewer")
        return torch.device(chosen.type, rank if self.apart else self.replica * self.ranks + rank)

    def cache_bytes(self, device: "torch.device") -> int | None:
        """What the cache of one process may take where nobody says; None where it need not share memory."""
        from daedal.infer.memory import FREE_MEMORY_SHARE, free_bytes

        if device.type != "cpu" or self.processes == 1:
            return None
        return int(free_bytes(device) * FREE_MEMORY_SHARE) // self.processes

    def share_cores(self, device: "torch.device") -> None:
        """Leaves the others their share of the cores, unless the environment says how many threads to use."""
        import torch

        if device.type == "cpu" and self.processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(torch.get_num_threads() // self.processes, 1))
