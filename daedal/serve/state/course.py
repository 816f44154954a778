"""How one API request went, for who follows requests: plain data, filled while it runs. Knows no HTTP and no texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from daedal.infer.request import SamplingParams


@dataclass(kw_only=True)
class Course:
    """Seconds are of a monotonic clock; None for what did not come to pass.

    id: as the client has it. params: of each choice. arrived: at the engine's door. waited: until the first choice
    started. first: when the first token came. reasons: why choices ended. failed: the engine did, or the time was over.
    """

    id: str
    model: str
    params: Sequence[SamplingParams]
    num_prompt: int
    priority: int
    arrived: float
    waited: float | None = None
    first: float | None = None
    ended: float | None = None
    num_generated: int = 0
    num_cached: int = 0
    reasons: list[str] = field(default_factory=list)
    failed: str | None = None
