"""Speculative decoding: tokens are guessed cheaply, and the model checks several of them in one pass.

Guesses ("drafts") are single tokens, not distributions, and `sampling.verify` keeps those that the request's own
choices turn out to be; so they never change an answer, only how many passes it takes (Leviathan et al. 2023; Chen et
al. 2023). Who drafts is a `Drafter`: a look-up in the text so far, a smaller model, or the model's own drafting
modules. Here is what they have in common, and what a user chooses among. Knows neither of them, nor the engine.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from daedal.errors import ConfigError
from daedal.infer.cache import REWIND
from daedal.infer.step import Step

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer

METHODS = ("lookup", "model", "mtp")


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Who drafts, and how far ahead.

    method: "lookup" repeats what followed the last few tokens earlier in the same text; "model" asks `draft_model`, a
    smaller one of the same vocabulary; "mtp" the model's own drafting module (V3, V4), which it must have been loaded
    with. draft_tokens: at most as many a step. Raises ConfigError.
    """

    method: Literal["lookup", "model", "mtp"]
    draft_tokens: int = 3
    draft_model: "Transformer | None" = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method of speculation is {self.method!r}: it must be one of {', '.join(METHODS)}")
        tokens = self.draft_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= REWIND:
            raise ConfigError(f"draft_tokens is {tokens!r}: it must be a whole number from 1 to {REWIND}")
        if (self.method == "model") != (self.draft_model is not None):
            raise ConfigError(f"method of speculation is {self.method!r}: give a draft_model with 'model' alone")

    def check(self, target: "Transformer", context: int) -> None:
        """ConfigError if it cannot draft for `target` with sequences of up to `context` tokens."""
        if self.method == "mtp" and not len(target.mtp):
            if not target.config.num_nextn_predict_layers:
                reason = "its num_nextn_predict_layers is 0; draft by lookup or with a model"
            else:
                reason = "it was loaded without them; load it with mtp=True"
            raise ConfigError(f"speculation is by mtp, and the model has no drafting modules: {reason}")
        if self.method == "lookup" and target.config.vocab_size > sys.maxunicode + 1:
            raise ConfigError(
                f"the vocabulary has {target.config.vocab_size} tokens: drafting by lookup is for at most "
                f"{sys.maxunicode + 1}"
            )
        if self.draft_model is None:
            return
        drafts, own = self.draft_model.config, target.config
        if drafts.vocab_size != own.vocab_size:
            raise ConfigError(
                f"the draft model's vocabulary has {drafts.vocab_size} tokens, the model's {own.vocab_size}: "
                "give one of the same vocabulary"
            )
        if drafts.max_position_embeddings < context:
            raise ConfigError(
                f"the draft model's context is {drafts.max_position_embeddings}, the engine's {context}: give a model "
                "that reads as far, or a lower max_context"
            )
        if self.draft_model.device != target.device:
            raise ConfigError(
                f"the draft model is on {self.draft_model.device}, the model on {target.device}: load both on one"
            )


@dataclass(kw_only=True)
class Acceptance:
    """What became of drafts.

    num_drafts: how often a request's next tokens were drafted. num_drafted: tokens so drafted. accepted_at: of the
    first of them, of the second and so on, how many became part of the answer.
    """

    num_drafts: int = 0
    num_drafted: int = 0
    accepted_at: list[int]

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """One request's drafts of one step."""
        self.num_drafts += num_drafted > 0
        self.num_drafted += num_drafted
        for place in range(num_accepted):
            self.accepted_at[place] += 1


class Drafter(Protocol):
    """Guesses for the requests of one engine. It may be wrong in every guess; if it raises, the step fails."""

    def propose(self, step: Step) -> Mapping[str, Sequence[int]]:
        """Before a step runs: by request id up to `max_drafts` tokens to follow a chunk's `ids`, or none.

        Sees every step, and in each chunk what the sequence gained since the last; of what it saw or proposed before,
        all from `past` on was withdrawn. A chunk with tokens `before` begins anew: their rows are in every cache.
        """

    def forget(self, request_id: str) -> None:
        """The request is over. One that was never seen is no error."""
