"""The nouns of serving: what is asked for, and what comes out. Plain data, no device, no torch.

What can be judged without a model is judged here, once, when the noun is made; what depends on the engine's model and
size is judged by `admission`.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from daedal.cost.spending import Spent
from daedal.errors import RequestError

FinishReason = Literal["length", "stop", "cancelled"]

MAX_LOGPROBS = 20  # the API's own bound on top_logprobs
MAX_PRIORITY = 100  # and the same below 0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    max_tokens: generated tokens at most. temperature: 0 is greedy, as is anything below 1e-5. top_k: 0 is off. top_p,
    min_p: 1 and 0 are off.
    repetition_penalty divides (or multiplies) the logits of every token seen in prompt or answer; presence and
    frequency penalties are subtracted for tokens of the answer, as in the OpenAI API. seed: the draw repeats with it.
    stop: strings that end the answer (not part of its text); stop_ids: ids that do. logprobs: None for none, n for the
    chosen token's and the n likeliest; prompt_logprobs the same for the prompt. logit_bias: id to addend. Any sequence
    will do for `stop` and `stop_ids`; tuples are kept. skip_special_tokens: they are no text; else the text, which stop
    strings are sought in, has their names, but not that of the one that ends the answer. Raises RequestError with the
    field's name.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, which leaves no token to choose: give a value above 0", param="top_p")
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}: it must be true or false", param=name)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_ids", _token_ids("stop_ids", self.stop_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(
                f"logit_bias is {self.logit_bias!r}: give a map from token id to number", param="logit_bias"
            )
        _token_ids("logit_bias", tuple(self.logit_bias))
        for token, addend in self.logit_bias.items():
            _check_number(f"logit_bias[{token}]", addend, -100.0, 100.0, param="logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def num_certain(self) -> int:
        """Tokens that the answer will have in any case."""
        ends_early = self.stop or self.stop_ids or not self.ignore_eos
        return min(self.max_tokens, 1) if ends_early else self.max_tokens


class Mask(Protocol):
    """Which tokens may come next in one answer; it follows the answer token by token.

    failed: it could not be worked out any more; from then on it allows but an end, and the answer is a cut one.
    """

    failed: bool

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """bool [V], at least one of them true; None where every token is allowed."""

    def accept(self, token: int) -> None:
        """The answer goes on with `token`."""


class Structure(Protocol):
    """A rule that answers obey; many requests may share it."""

    def begin(self, *, vocab_size: int, end_ids: frozenset[int]) -> Mask:
        """For one answer, which may end by one of `end_ids` where the rule is fulfilled."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate. prompt: token ids, at least one. id: unique among the engine's live requests.
    structure: what the answer must look like; it then ends by an end-of-sequence id, which so may not be ignored.
    cache_salt: only requests of the same salt begin from what others have read, so that nobody can find out by the
    clock what strangers ask; among equally urgent ones salts take turns. priority: lower ones go first, from
    -MAX_PRIORITY to MAX_PRIORITY. seconds: within which it must be answered, None for any time; where that is too
    little, the request is refused.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    structure: Structure | None = field(default=None, compare=False)
    cache_salt: str = ""
    priority: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _token_ids("prompt", self.prompt))
        if not self.prompt:
            raise RequestError("prompt is empty: give at least one token", param="prompt")
        if not isinstance(self.cache_salt, str):
            raise RequestError(f"cache_salt is {self.cache_salt!r}: it must be a string", param="cache_salt")
        _check_integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.seconds is not None:
            _check_number("seconds", self.seconds, 0.0, math.inf)
        if self.structure is not None and self.params.ignore_eos:
            raise RequestError(
                "ignore_eos is true, and the answer has a form that ends: leave it out", param="ignore_eos"
            )


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """The model's own log-probabilities at one position, before temperature and penalties.

    `top`: (id, logprob), likeliest first; the chosen token appears there only if it is among them.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True)
class Output:
    """What a request produced: from `Engine.step` what is new since the last one, from `Engine.generate` all of it.

    ids: generated ids only, the one that stopped the answer included. text: their text, None without a tokenizer;
    while streaming it lags behind ids where a character or a stop string is still incomplete; what stops the answer,
    string or id, is not part of it. lengths: characters of the text that came out with each id. Given once, with the
    first output: prompt_logprobs, one entry per prompt token, the first None; num_cached, the prompt's tokens that were
    not computed, because an earlier request had begun alike; waited, seconds from its coming until it first started.
    With the last one come stop, the stop string that ended it, if one did, and spent, where the engine has a tariff:
    what the whole request has cost.
    """

    request_id: str
    ids: list[int] = field(default_factory=list)
    text: str | None = None
    lengths: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None
    spent: Spent | None = None
    num_cached: int = 0
    waited: float | None = field(default=None, compare=False)

    def extend(self, later: "Output") -> None:
        """Appends what came out of the same request after this."""
        assert later.request_id == self.request_id
        self.ids += later.ids
        self.lengths += later.lengths
        if later.text is not None:
            self.text = (self.text or "") + later.text
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop, self.spent = later.stop, later.spent
        self.num_cached += later.num_cached
        self.waited = later.waited if self.waited is None else self.waited


def requests_of(
    prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[Request]:
    """One request for each prompt, called by its place; `params` for all of them, or one per prompt."""
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(
            f"params has {len(params)} entries for {len(prompts)} prompts: give one for each, or one for all",
            param="params",
        )
    requests = []
    for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        # What is no sequence at all goes on as it is, for Request to refuse.
        ids = tuple(prompt) if isinstance(prompt, Sequence) else prompt
        requests.append(Request(id=str(index), prompt=ids, params=chosen))
    return requests


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}: it must be an integer from {low} to {high}", param=name)


def _check_number(name: str, value: float, low: float, high: float, *, param: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}: it must be a number from {low:g} to {high:g}", param=param or name)


def _stop_strings(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise RequestError(f"stop is {stop!r}: give a list of strings", param="stop")
    for text in stop:
        if not isinstance(text, str):
            raise RequestError(f"stop holds {text!r}: give strings only", param="stop")
        if not text:
            raise RequestError("stop holds an empty string, which matches everywhere: leave it out", param="stop")
    return tuple(stop)


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    """Any sequence, or one-dimensional array, of whole numbers of any kind."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise RequestError(f"{name} is of type {type(ids).__name__}: give a list of token ids", param=name)
    kept = []
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise RequestError(f"{name} holds {token!r}: token ids are integers", param=name)
        kept.append(operator.index(token))
    return tuple(kept)
