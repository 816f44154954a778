"""A chat request on its way to the engine, the same for every API that speaks of conversations.

The prompt is written and cut into tokens, the rule that the answer must obey is made, and for each choice there is a
`Turn` that will read it. How the answer looks in JSON is the endpoints' business. Knows nothing of HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.concurrency import run_in_threadpool

from daedal.infer.request import Output
from daedal.serve.api.chat_protocol import ChatBody
from daedal.serve.api.generation import Answer, Choice, Generation, collect
from daedal.serve.api.limits import admit, room, seconds_for
from daedal.serve.api.prompt import write_prompt
from daedal.serve.api.rules import rule_of
from daedal.serve.api.turn import Turn
from daedal.serve.state.errors import ApiError
from daedal.serve.state.keys import Asker, Charge, free
from daedal.serve.state.service import Service
from daedal.text.chat import ChatFormat
from daedal.text.encodings.answers import Delta


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request's choices, and for each of them what reads its answer. seconds: that the answers may take."""

    service: Service
    request_id: str
    choices: Sequence[Choice]
    turns: Sequence[Turn]
    charge: Charge = free
    seconds: float | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.choices[0].prompt)

    @property
    def num_reasoning(self) -> int:
        """Reasoning tokens so far, of all choices."""
        return sum(turn.reasoning_tokens for turn in self.turns)

    async def begin(self) -> Generation:
        return await Generation.begin(self.service, self.request_id, self.choices, self.charge, self.seconds)

    async def whole(self) -> tuple[list[Answer], list[list[Delta]]]:
        """Every choice's answer, and what its message is made of."""
        said: list[list[Delta]] = [[] for _ in self.turns]

        def follow(index: int, output: Output) -> None:
            said[index] += self.turns[index].take(output)

        return await collect(self.service, self.request_id, self.choices, follow, self.charge, self.seconds), said


async def ask(
    service: Service,
    body: ChatBody,
    request_id: str,
    *,
    param: str = "messages",
    asker: Asker | None = None,
) -> Asked:
    """Everything up to the engine's door. ApiError for what cannot be answered; param: what brought the prompt."""
    asker = asker or Asker()
    admit(service, body)
    priority = asker.priority(body.priority)
    asked = await run_in_threadpool(_ask, service, body, chat_format(service), request_id, param)
    choices = [replace(choice, salt=asker.salt, priority=priority) for choice in asked.choices]
    return replace(asked, choices=choices, charge=asker.charge, seconds=seconds_for(service, body))


def chat_format(service: Service) -> ChatFormat:
    """ApiError 400 where the model only completes text."""
    if service.chat_format is None:
        sentence = (
            f"the model {service.model_name!r} has no chat format: use /v1/completions, or name a format to the "
            f"server with --chat-format"
        )
        raise ApiError(400, sentence, param="model", code="no_chat_template")
    return service.chat_format


def count_prompt(service: Service, body: ChatBody) -> int:
    """Tokens of the prompt; blocks while it is rendered and cut."""
    return len(service.tokenizer.encode(write_prompt(body, chat_format(service)).text, add_special_tokens=False))


def _ask(service: Service, body: ChatBody, format: ChatFormat, request_id: str, param: str) -> Asked:
    written = write_prompt(body, format)
    prompt = tuple(service.tokenizer.encode(written.text, add_special_tokens=False))
    max_tokens = room(service, prompt, body.asked_tokens(), param=param)
    rule = rule_of(body, format, written)
    structure = None if rule is None else service.structures.make(rule)
    choices = []
    for index in range(body.num_choices):
        params = body.sampling(choice=index, max_tokens=max_tokens, logprobs=body.num_logprobs)
        if format.shows_special_tokens:
            params = replace(params, skip_special_tokens=False)
        choices.append(Choice(prompt=prompt, params=params, text=written.text, structure=structure))
    turns = [Turn(format.parser(written.opening, calls=body.looks_for_calls)) for _ in choices]
    return Asked(service=service, request_id=request_id, choices=choices, turns=turns)
