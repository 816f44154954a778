"""A model held by several processes, as `daedal serve --tensor-parallel-size N` has it: rank 0 is the engine's process,
which calls `open_shared`; each other rank is `python -m daedal.cli.rank DESCRIPTOR`, which no user types.

The ranks meet by a file in a directory that only this user can enter, and talk over the loopback interface. What is to
be loaded comes over the socket of the descriptor. Knows nothing of requests.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daedal.cli.log_format import LogFormat, use
from daedal.cli.placement import Placement
from daedal.config import ModelConfig
from daedal.shapes import sharing

if TYPE_CHECKING:
    import torch

    from daedal.mesh import Team
    from daedal.model.transformer import Transformer

COMMAND = (sys.executable, "-P", "-m", "daedal.cli.rank")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank is told. meeting: the file by which the ranks find each other."""

    directory: str
    device: str
    dtype: str
    rank: int
    placement: Placement
    meeting: str
    log_format: LogFormat

    def team(self) -> "Team":
        """All ranks, once they have met."""
        import torch

        from daedal import mesh

        self.placement.share_cores(torch.device(self.device))
        mesh.meet(Path(self.meeting), rank=self.rank, size=self.placement.ranks, device=self.device)
        return mesh.Team()


def open_shared(
    directory: Path,
    fill: "Callable[[Team], Transformer]",
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    placement: Placement,
    log_format: LogFormat,
) -> "Transformer":
    """Rank 0's part, loaded by `fill` while the other ranks, started here, load theirs. device: its kind. From now on
    this process ends when one of them does. A DaedalError says why the model cannot be shared so.
    """
    from daedal.serve.workers.ranks import Ranks

    sharing.check(ModelConfig.read(directory), placement.ranks)
    meeting = tempfile.mkdtemp(prefix="daedal-ranks-")
    parts = [
        Part(
            directory=str(directory),
            device=str(placement.device(device, rank)),
            dtype=str(dtype).removeprefix("torch."),
            rank=rank,
            placement=placement,
            meeting=f"{meeting}/meeting",
            log_format=log_format,
        )
        for rank in range(placement.ranks)
    ]
    ranks = Ranks(COMMAND, [asdict(part) for part in parts[1:]])
    model = fill(parts[0].team())
    ranks.loaded()
    if device.type == "cpu":  # accelerators' libraries may look into it later
        shutil.rmtree(meeting, ignore_errors=True)
    return model


def main() -> None:
    from daedal.cli.app import configure_logging
    from daedal.serve.workers.ranks import host_rank

    configure_logging(os.environ.get("DAEDAL_LOG", ""))
    host_rank(int(sys.argv[1]), _load)


def _load(options: Mapping[str, Any]) -> Callable[[], None]:
    import torch
    from pydantic import TypeAdapter

    from daedal.checkpoint.load import load
    from daedal.infer.following import follow
    from daedal.model.shard import Shard

    part = TypeAdapter(Part).validate_python(options)
    use(part.log_format)
    model = load(Path(part.directory), device=part.device, dtype=getattr(torch, part.dtype), team=part.team())
    assert isinstance(model, Shard)
    return partial(follow, model)


if __name__ == "__main__":
    main()
