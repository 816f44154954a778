"""What the commands that run a recipe share: their options, the run's directory, its device, the command that goes on.

A recipe is a Python file (`recipes`); a run of one lies in a directory and can be gone on with. Knows neither training
nor distillation.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.errors import ConfigError

if TYPE_CHECKING:
    import torch

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A Python file that says recipe = Recipe(...).")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A field of the recipe, changed; may be repeated."),
]
OutOption = Annotated[Path | None, typer.Option(help="The run's directory; runs/ and the recipe's name if not given.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in --out.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object.")]


@dataclass(frozen=True, kw_only=True)
class RunWishes:
    """Of the command line. verb: the command's name. given_out: None for a directory named after the recipe."""

    verb: str
    path: Path
    settings: tuple[str, ...]
    given_out: Path | None
    resume: bool
    device: str
    json_line: bool

    @property
    def out(self) -> Path:
        return self.given_out or Path("runs") / self.path.stem

    @property
    def again(self) -> str:
        """The command that goes on."""
        settings = [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(["daedal", self.verb, str(self.path), *settings, "--out", str(self.out), "--resume"])

    def check_directory(self) -> None:
        """ConfigError where a run lies in the directory that is not to be gone on with."""
        from daedal.train.reports import METRICS

        if (self.out / METRICS).is_file() and not self.resume:
            raise ConfigError(f"{self.out} holds a run already: go on with --resume, or name another --out")

    def open_device(self) -> "torch.device":
        """The device, and memory handled as long runs on it need it."""
        from daedal.checkpoint.load import resolve_device

        where = resolve_device(self.device)
        if where.type == "cpu":
            from daedal.infer.memory import keep_freed_memory

            keep_freed_memory()
        return where
