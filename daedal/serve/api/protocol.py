"""The bodies of the OpenAI API's requests: which fields there are, of which types, and what they mean to the engine.

Fields that this server does not have are refused where they would change the answer, and logged where they would not.
Ranges that the engine's own `SamplingParams` checks are not checked again. What only chats have is in `chat_protocol`.
Knows nothing of HTTP, models or text.
"""

import json
import logging
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from daedal.infer.request import MAX_PRIORITY, SamplingParams
from daedal.serve.state.errors import ApiError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

MAX_CHOICES = 128
MAX_PROMPTS_TIMES_CHOICES = 512
MAX_STOPS = 4
MAX_TIMEOUT_SECONDS = 10**6

# What fields take that are read by functions, for the OpenAPI document.
_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
_WORDS = {"type": "string", "minLength": 1}
_STOP_SCHEMA = {"anyOf": [_WORDS, {"type": "array", "items": _WORDS, "maxItems": MAX_STOPS}, {"type": "null"}]}
_BIAS_SCHEMA = {
    "type": ["object", "null"],
    "propertyNames": {"pattern": "^[0-9]{1,18}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_PROMPT_SCHEMA = {"anyOf": [_WORDS, _IDS, {"type": "array", "items": {"anyOf": [_WORDS, _IDS]}, "minItems": 1}]}

_RULE = re.compile(r"^(Input|String) should")

# Fields of the API, and of servers like this one, that would change the answer; with the values that mean "not used".
# An endpoint may have some of them.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (None, True),
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "grammar": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
# Fields that say nothing about the answer.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} strings, {MAX_STOPS} are allowed: give fewer")
    return tuple(stops)


def _bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    bias: dict[int, float] = {}
    for key, addend in value.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 18:
            raise ValueError(f"has the key {shown(key)}: keys must be token ids")
        if isinstance(addend, bool) or not isinstance(addend, int | float):
            raise ValueError(f"has {shown(addend)} for token {key}: it must be a number from -100 to 100")
        bias[int(key)] = addend
    return bias


def _prompts(value: object) -> list[str | tuple[int, ...]]:
    if value is None or value in ("", []):
        raise ValueError("is empty: give a text, a list of token ids, or a list of either")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and _are_ids(value):
        return [tuple(value)]
    if not isinstance(value, list):
        raise ValueError("must be a text, a list of token ids, or a list of either")
    prompts: list[str | tuple[int, ...]] = []
    for prompt in value:
        if prompt in ("", []):
            raise ValueError("holds an empty prompt: leave it out")
        if isinstance(prompt, str):
            prompts.append(prompt)
        elif isinstance(prompt, list) and _are_ids(prompt):
            prompts.append(tuple(prompt))
        else:
            raise ValueError("must be a text, a list of token ids (whole numbers from 0), or a list of either")
    return prompts


def _are_ids(value: list[object]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)


class StreamOptions(BaseModel):
    """`continuous_usage_stats`: usage so far in every chunk, as vLLM offers it."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(BaseModel):
    """The fields that both endpoints share; null means the default, as it does in the API."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(_STOP_SCHEMA)] = ()
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias), WithJsonSchema(_BIAS_SCHEMA)] = Field(
        default_factory=dict
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_cost: bool | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def asked_tokens(self) -> int | None:
        """The bound on the answer that the client gave, if any."""
        return self.max_tokens

    @property
    def skips_special_tokens(self) -> bool:
        return _or(self.skip_special_tokens, SamplingParams.skip_special_tokens)

    def sampling(self, *, choice: int, max_tokens: int, logprobs: int | None, echo: bool = False) -> SamplingParams:
        """The engine's parameters for one of `n` choices: each draws with a seed of its own."""
        default = SamplingParams()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, default.temperature),
            top_k=max(_or(self.top_k, default.top_k), 0),
            top_p=_or(self.top_p, default.top_p),
            min_p=_or(self.min_p, default.min_p),
            repetition_penalty=_or(self.repetition_penalty, default.repetition_penalty),
            presence_penalty=_or(self.presence_penalty, default.presence_penalty),
            frequency_penalty=_or(self.frequency_penalty, default.frequency_penalty),
            seed=_nth_seed(self.seed, choice),
            stop=self.stop,
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=self.skips_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
            logit_bias=self.logit_bias,
        )

    @classmethod
    def read(cls, body: Mapping[str, object]) -> Self:
        """Checks a body's fields; ApiError 400 names the first one at fault."""
        refuse_unsupported(
            body, {name: unused for name, unused in _UNSUPPORTED.items() if name not in cls.model_fields}
        )
        parsed = validated(cls, body)
        warn_unknown(parsed.model_extra, _IGNORED | _UNSUPPORTED.keys())
        if parsed.stream_options is not None and not parsed.stream:
            raise ApiError(400, "stream_options is given without stream: set stream to true", param="stream_options")
        parsed.check()
        return parsed

    def check(self) -> None:
        """Rules that join several fields."""


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str | tuple[int, ...]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def asked_tokens(self) -> int | None:
        return SamplingParams.max_tokens if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        if self.best_of is not None and self.best_of != self.num_choices:
            sentence = f"best_of is {shown(self.best_of)}, n is {self.num_choices}: only equal numbers are supported"
            raise ApiError(400, sentence, param="best_of")
        total = len(self.prompt) * self.num_choices
        if total > MAX_PROMPTS_TIMES_CHOICES:
            sentence = (
                f"{len(self.prompt)} prompts times n make {total} choices, {MAX_PROMPTS_TIMES_CHOICES} are allowed"
            )
            raise ApiError(400, f"{sentence}: send several requests", param="n" if self.num_choices > 1 else "prompt")


def refuse_unsupported(body: Mapping[str, object], unsupported: Mapping[str, tuple[object, ...]]) -> None:
    """ApiError 400 for a field that this server does not have; unsupported: by field the values that mean nothing."""
    for name, unused in unsupported.items():
        if name in body and body[name] not in unused:
            sentence = f"{name} is not supported by this server: leave it out"
            raise ApiError(400, sentence, param=name, code="unsupported_parameter")


def warn_unknown(extra: Mapping[str, object] | None, known: Collection[str]) -> None:
    """Logs the fields that nobody reads."""
    unknown = sorted((extra or {}).keys() - set(known))
    if unknown:
        logger.warning("fields that this server does not know were ignored: %s", shown(unknown))


def validated(kind: type[Body], body: Mapping[str, object]) -> Body:
    """`body` as this model; ApiError 400 names the first field at fault."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    except OverflowError as error:
        raise ApiError(400, f"a number is beyond the range of its field ({error}): give a smaller one") from error
    param = ".".join(str(part) for part in first["loc"] if not _is_type_name(part))
    complaint = _complaint(first["type"], first["msg"], first["input"], first.get("ctx", {}))
    raise ApiError(400, f"{param} {complaint}", param=param or None)


def _complaint(kind: str, message: str, value: object, bounds: Mapping[str, object]) -> str:
    if kind == "missing":
        return "is missing: give it"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "too_short":
        return "is empty: give at least one"
    if kind == "too_long":
        return "has {actual_length} entries, {max_length} are allowed: give fewer".format(**bounds)
    if kind == "extra_forbidden":
        return "is not supported by this server: leave it out"
    rule = "it must be an object" if kind in ("model_type", "dict_type") else _RULE.sub("it must", message)
    return f"is {shown(value)}: {rule}"


def _is_type_name(part: int | str) -> bool:
    """Pydantic names the branch of a union in the path; clients know only fields and indices."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def shown(value: object) -> str:
    """A value as JSON, cut to a length that fits a sentence."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to show"
    except RecursionError:
        return "a value too deep to show"
    return text if len(text) <= 60 else text[:60] + "…"


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _nth_seed(seed: int | None, choice: int) -> int | None:
    """`seed + choice`, wrapped into 64 bits where the addition leaves them."""
    if seed is None or choice == 0:
        return seed
    return (seed + choice + 2**63) % 2**64 - 2**63
