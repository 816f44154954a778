"""What an engine tells of itself: its numbers after a step, and a step that failed. Plain data, no torch.

A front end in another process reads these without the engine. Knows no requests beyond their ids.
"""

from dataclasses import dataclass

from daedal.cost.spending import Spent


class StepError(RuntimeError):
    """A step failed for a reason of ours, not the user's. `request_ids`: the requests in it, which are dropped."""

    def __init__(self, message: str, *, request_ids: tuple[str, ...]):
        super().__init__(message)
        self.request_ids = request_ids


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Gauges of now, and counters (`_total`, `num_preemptions`) since the engine was made.

    Bytes are of the cache, a draft model's included: of pages in use, and of the rings (V4's windows) of all that run.
    prompt_tokens_total counts a prompt when it has been read wholly, and once even if it had to be read again.
    num_drafts_total: how often a request's next tokens were drafted; num_drafted_total: tokens so drafted;
    num_accepted_total: those that became part of an answer; num_accepted_at: of them the first drafted, the second, and
    so on, empty for an engine that does not draft. spent_total: None for an engine without a tariff.
    prefix_queries_total: tokens of requests that began and might have begun from kept pages; prefix_hits_total: those
    of them that did. A request that was preempted is not counted again.
    """

    num_running: int
    num_waiting: int
    pages_used: int
    pages_total: int
    kv_bytes_used: int
    kv_bytes_total: int
    num_preemptions: int
    prompt_tokens_total: int
    generation_tokens_total: int
    num_drafts_total: int = 0
    num_drafted_total: int = 0
    num_accepted_total: int = 0
    num_accepted_at: tuple[int, ...] = ()
    spent_total: Spent | None = None
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0


@dataclass(frozen=True, kw_only=True)
class ExpertsSeen:
    """How often each expert was chosen by `num_tokens` tokens: `counts[i][e]` in layer `layers[i]`. Empty for a model
    without experts.
    """

    layers: tuple[int, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()
    num_tokens: int = 0
