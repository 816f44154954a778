"""Whether a request can be taken at all: is the server ready, is the model the one served, does the prompt fit.

Knows nothing of how answers are made. What only the engine can judge, such as ids beyond the vocabulary, it refuses
itself.
"""

from collections.abc import Sequence

from daedal.serve.api.costs import check_cost
from daedal.serve.api.protocol import GenerationBody
from daedal.serve.state.errors import ApiError
from daedal.serve.state.service import Service

STOPPING_SECONDS = 10  # after which a server that stops may be there again


def admit(service: Service, body: GenerationBody) -> None:
    """Refuses what names another model, comes before the server is ready or when it is full, or asks for costs that
    nobody counts."""
    check_open(service)
    check_model(service, body.model)
    check_cost(service, body)
    check_places(service, body.num_choices)


def check_open(service: Service) -> None:
    """Refuses while the server is not ready, or no longer."""
    if not service.ready:
        wait, why = (STOPPING_SECONDS, "is stopping") if service.draining else (1, "is not ready")
        headers = {"Retry-After": str(wait)}
        sentence = f"the server {why}: try again in {wait} s"
        raise ApiError(503, sentence, code="unavailable", kind="server_error", headers=headers)


def check_places(service: Service, count: int = 1) -> None:
    """Refuses where `count` requests more would be too many now. (What is too many at any time the engine refuses.)"""
    most, held = service.max_requests, service.worker.num_requests
    if most is not None and held + count > most >= count:
        wait = service.seconds_to_wait
        sentence = f"{held} requests are under way, the limit is {most}: try again in {wait} s"
        headers = {"Retry-After": str(wait)}
        raise ApiError(429, sentence, code="queue_full", kind="rate_limit_error", headers=headers)


def seconds_for(service: Service, body: GenerationBody) -> float | None:
    """How long a request may take from its arrival to its end: what it asks for, at most what the server allows."""
    given = [seconds for seconds in (body.timeout, service.max_seconds) if seconds is not None]
    return min(given, default=None)


def check_model(service: Service, name: str | None) -> None:
    """Refuses another model's name."""
    if name is not None and name not in (service.model_name, *service.aliases):
        raise unknown_model(service, name)


def unknown_model(service: Service, name: str) -> ApiError:
    sentence = f"the model {name[:100]!r} is not served here: use {service.model_name!r}"
    return ApiError(404, sentence, param="model", code="model_not_found")


def room(service: Service, prompt: Sequence[int], asked: int | None, *, param: str) -> int:
    """Tokens that the answer may have: what was asked, or what the context has left; ApiError where that is none."""
    context = service.max_context
    if not prompt:
        raise ApiError(400, f"{param} has no tokens: give some text", param=param)
    if asked is not None and asked > context:
        sentence = f"max_tokens is {asked if asked < 10**20 else 'huge'}, the context is {context}: ask for less"
        raise ApiError(400, sentence, param="max_tokens", code="context_length_exceeded")
    left = context - len(prompt)
    if left < 0 or (left == 0 and asked != 0):
        # Clients know it by the words in the middle, which are those of OpenAI's API.
        sentence = (
            f"the prompt has {len(prompt)} tokens, and this model's maximum context length is {context} tokens, answer "
            f"included: shorten it"
        )
        raise ApiError(400, sentence, param=param, code="context_length_exceeded")
    return left if asked is None else min(asked, left)
