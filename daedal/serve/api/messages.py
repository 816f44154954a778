"""`/v1/messages`: Anthropic's Messages API over the same conversations as `/v1/chat/completions`.

Thoughts come as thinking blocks, tool calls as `tool_use`; a message whose last turn is the assistant's is gone on
from. Knows nothing of formats.
"""

from collections.abc import AsyncIterator, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.serve.api.asking import Asked, ask, count_prompt
from daedal.serve.api.body import read_object
from daedal.serve.api.chat_protocol import ChatBody
from daedal.serve.api.costs import cost_json
from daedal.serve.api.delivery import Dialect, EventStream, nobody, unless_gone
from daedal.serve.api.generation import Generation, new_id, spent
from daedal.serve.api.limits import check_model
from daedal.serve.api.message_blocks import Event, MessageBlocks
from daedal.serve.api.messages_protocol import CountBody, MessagesBody, as_asked
from daedal.serve.state.errors import ApiError
from daedal.serve.state.keys import asker_of
from daedal.serve.state.service import Service

_DIALECT = Dialect(named=True, done=False, failure=ApiError.anthropic_body)


class MessagesEndpoint:
    """The routes' handlers for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def create(self, request: Request) -> Response:
        body = MessagesBody.read(await read_object(request))
        chat = body.chat()
        try:
            name = new_id("msg").replace("-", "_")
            asked = await ask(self._service, chat, name, asker=asker_of(request))
        except ApiError as error:
            raise as_asked(error) from error
        if body.stream:
            generation = await asked.begin()
            return EventStream(generation, self._events(generation, asked, chat), dialect=_DIALECT)
        whole = await unless_gone(request, self._whole(asked, chat))
        return nobody() if whole is None else JSONResponse(whole)

    async def count(self, request: Request) -> Response:
        """`POST /v1/messages/count_tokens`."""
        body = CountBody.read(await read_object(request))
        check_model(self._service, body.model)
        return JSONResponse({"input_tokens": await run_in_threadpool(count_prompt, self._service, body.chat())})

    async def _whole(self, asked: Asked, chat: ChatBody) -> dict[str, object]:
        (answer,), (said,) = await asked.whole()
        blocks = MessageBlocks()
        for delta in said:
            for _ in blocks.take(delta):
                pass
        for _ in blocks.finish():
            pass
        cost = cost_json(self._service, chat, spent([answer]))
        return {
            **self._message(asked),
            "content": blocks.blocks,
            **_stopped(asked, answer.finish_reason, answer.stop),
            "usage": _usage(asked, len(answer.ids), answer.num_cached, cost),
        }

    async def _events(self, generation: Generation, asked: Asked, chat: ChatBody) -> AsyncIterator[Event]:
        yield {"type": "message_start", "message": {**self._message(asked), "usage": _usage(asked, 0)}}
        blocks = MessageBlocks()
        reason, stop = None, None
        async for index, output in generation:
            for delta in asked.turns[index].take(output):
                for event in blocks.take(delta):
                    yield event
            reason, stop = output.finish_reason, output.stop
        for event in blocks.finish():
            yield event
        cost = cost_json(self._service, chat, generation.spent)
        usage = _usage(asked, generation.num_generated, generation.num_cached, cost)
        yield {"type": "message_delta", "delta": _stopped(asked, reason, stop), "usage": usage}
        yield {"type": "message_stop"}

    def _message(self, asked: Asked) -> dict[str, object]:
        return {
            "id": asked.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._service.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }


def _stopped(asked: Asked, reason: str | None, stop: str | None) -> dict[str, object]:
    told = asked.turns[0].finish_reason(reason)
    if stop is not None and told == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": None if told is None else reasons[told], "stop_sequence": None}


def _usage(
    asked: Asked, num_generated: int, cached: int = 0, cost: Mapping[str, object] | None = None
) -> dict[str, object]:
    """cached: of the prompt's tokens; this API does not count them among the `input_tokens`."""
    told: dict[str, object] = {
        "input_tokens": asked.num_prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": num_generated,
    }
    return {**told, **(cost or {})}
