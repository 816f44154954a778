"""The options by which `serve` and `chat` speculate, and from them to who drafts. Knows nothing of how that goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daedal.cli.fetching import resolve_shown
from daedal.errors import RequestError

if TYPE_CHECKING:
    import torch

    from daedal.infer.speculative import Speculation
    from daedal.infer.stats import EngineStats

SpeculateOption = Annotated[
    str | None,
    typer.Option(
        metavar="mtp|lookup|MODEL",
        help="Draft tokens and check several at once, which changes no answer: with the model's own MTP module, by "
        "looking up what followed the same words before, or with a smaller model of the same vocabulary.",
    ),
]
DraftTokensOption = Annotated[int | None, typer.Option(help="Tokens drafted at once, from 1 to 8.")]


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What the user wants drafted, and by whom; neither says nothing is."""

    speculate: str | None = None
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and self.speculate is None:
            raise RequestError(f"--draft-tokens is {self.draft_tokens}, and nobody drafts: say who with --speculate")

    @property
    def by_module(self) -> bool:
        """Whether the model must be loaded with its drafting modules."""
        return self.speculate == "mtp"

    @property
    def directory(self) -> Path | None:
        """Of the model that drafts, where one does."""
        return None if self.speculate in (None, "lookup", "mtp") else resolve_shown(self.speculate)

    def open(self, *, device: "torch.device", dtype: "torch.dtype | None") -> "Speculation | None":
        """The engine's wish, a draft model loaded. A DaedalError says what is wrong."""
        from daedal.checkpoint.load import load
        from daedal.infer.speculative import Speculation

        if self.speculate is None:
            return None
        count = Speculation.draft_tokens if self.draft_tokens is None else self.draft_tokens
        if self.speculate == "mtp":
            return Speculation(method="mtp", draft_tokens=count)
        checked = Speculation(method="lookup", draft_tokens=count)
        if self.speculate == "lookup":
            return checked
        draft_model = load(resolve_shown(self.speculate), device=device, dtype=dtype)
        return Speculation(method="model", draft_tokens=count, draft_model=draft_model)


def acceptance(stats: "EngineStats") -> str:
    """What became of the drafts, in words."""
    drafted, accepted = stats.num_drafted_total, stats.num_accepted_total
    share = f" ({accepted / drafted:.0%})" if drafted else ""
    return f"{accepted} of {drafted} drafted tokens were accepted{share}"
