"""What `daedal serve` keeps of prompts that it read: in the cache, and on disk where the user names a directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.errors import RequestError

if TYPE_CHECKING:
    from daedal.infer.prefix_files import PrefixDirectory

PrefixOption = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Requests that begin alike share what was read of their prompts; with keys, those of one key.",
    ),
]
DirectoryOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep that on disk too, for the next start. What was asked lies there, as tokens, for this user alone.",
    ),
]
SizeOption = Annotated[float, typer.Option(metavar="GB", help="What --prefix-cache-dir may take (10^9 bytes).")]


@dataclass(frozen=True, kw_only=True)
class Beginnings:
    """What a user wished. gb: of the directory."""

    shared: bool = True
    directory: Path | None = None
    gb: float = 4.0

    def __post_init__(self) -> None:
        if self.directory is not None and not self.shared:
            raise RequestError("--prefix-cache-dir is given with --no-prefix-cache: leave out one of them")
        if not 0.01 <= self.gb <= 1e6:
            raise RequestError(f"--prefix-cache-gb is {self.gb:g}: it must be from 0.01 to 1000000")

    def kept(self, checkpoint: Path, weights: str | None, drafter: Path | None) -> "PrefixDirectory | None":
        """On disk, for a checkpoint in a format of weights, and the one that drafts for it; None where nothing is."""
        if self.directory is None:
            return None
        from daedal.checkpoint.packing import fingerprint
        from daedal.infer.prefix_files import PrefixDirectory

        model = f"{fingerprint(checkpoint)} {weights} {'' if drafter is None else fingerprint(drafter)}"
        return PrefixDirectory(path=self.directory.resolve(), most_bytes=int(self.gb * 1e9), model=model)
