"""`/v1/responses`: OpenAI's Responses API over the same conversations as `/v1/chat/completions`.

A response is typed items, whole or as typed events. Stored ones, which the client may go on from, are kept in memory
and within a bound; every part of a conversation is sent to the model again. Knows nothing of formats.
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence

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
from daedal.serve.api.response_items import Event, ResponseItems
from daedal.serve.api.responses_protocol import ResponsesBody, as_asked
from daedal.serve.api.turn import message_json
from daedal.serve.state.errors import ApiError, as_api_error
from daedal.serve.state.keys import asker_of, owner_of
from daedal.serve.state.service import Service
from daedal.serve.state.stored import StoredResponse
from daedal.text.encodings.answers import Delta

_DIALECT = Dialect(named=True, done=False)


class ResponsesEndpoint:
    """The routes' handlers for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def create(self, request: Request) -> Response:
        body = ResponsesBody.read(await read_object(request))
        owner = owner_of(request)
        past = self._past(body, owner)
        chat = body.chat(past)
        try:
            name = new_id("resp").replace("-", "_")
            asked = await ask(self._service, chat, name, param="input", asker=asker_of(request))
        except ApiError as error:
            raise as_asked(error) from error
        answer = _Answer(self._service, body, chat, asked, [*past, *body.messages()], owner)
        if body.stream:
            generation = await asked.begin()
            return EventStream(generation, answer.events(generation), dialect=_DIALECT)
        whole = await unless_gone(request, answer.whole())
        return nobody() if whole is None else JSONResponse(whole)

    async def count(self, request: Request) -> Response:
        """`POST /v1/responses/input_tokens`."""
        body = ResponsesBody.read(await read_object(request))
        check_model(self._service, body.model)
        chat = body.chat(self._past(body, owner_of(request)))
        count = await run_in_threadpool(count_prompt, self._service, chat)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})

    async def stored(self, request: Request) -> Response:
        """`GET` and `DELETE /v1/responses/ID`."""
        name, owner = request.path_params["name"], owner_of(request)
        found = self._stored(name, owner, param=None)
        if request.method != "DELETE":
            return JSONResponse(found.response)
        self._service.stored.drop(name, owner)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    def _past(self, body: ResponsesBody, owner: str | None) -> Sequence[Mapping[str, object]]:
        if body.previous_response_id is None:
            return ()
        return self._stored(body.previous_response_id, owner, param="previous_response_id").messages

    def _stored(self, name: str, owner: str | None, *, param: str | None) -> StoredResponse:
        found = self._service.stored.get(name, owner)
        if found is None:
            sentence = f"the response {name[:100]!r} is not kept here, or no longer: send the whole conversation"
            raise ApiError(404, sentence, param=param, code="response_not_found")
        return found


class _Answer:
    """One response on its way."""

    def __init__(
        self,
        service: Service,
        body: ResponsesBody,
        chat: ChatBody,
        asked: Asked,
        messages: Sequence[Mapping[str, object]],
        owner: str | None,
    ):
        self._service, self._body, self._chat, self._asked = service, body, chat, asked
        self._messages, self._owner = messages, owner
        self._created = int(time.time())
        self._items = ResponseItems()
        self._said: list[Delta] = []

    async def whole(self) -> dict[str, object]:
        answers, (said,) = await self._asked.whole()
        for delta in said:
            for _ in self._items.take(delta):
                pass
        self._said = said
        for _ in self._items.finish(complete=answers[0].finish_reason == "stop"):
            pass
        cost = cost_json(self._service, self._chat, spent(answers))
        usage = self._usage(len(answers[0].ids), answers[0].num_cached, cost)
        return self._ended(answers[0].finish_reason, usage)

    async def events(self, generation: Generation) -> AsyncIterator[Event]:
        number = 0
        try:
            async for event in self._unnumbered(generation):
                yield {**event, "sequence_number": number}
                number += 1
        except Exception as error:
            refusal = as_api_error(error)
            failure = {"code": "server_error", "message": refusal.message}
            failed = self._response("failed", output=self._items.items, error=failure)
            yield {"type": "response.failed", "response": failed, "sequence_number": number}

    async def _unnumbered(self, generation: Generation) -> AsyncIterator[Event]:
        yield {"type": "response.created", "response": self._response("in_progress")}
        yield {"type": "response.in_progress", "response": self._response("in_progress")}
        reason = None
        async for index, output in generation:
            for delta in self._asked.turns[index].take(output):
                self._said.append(delta)
                for event in self._items.take(delta):
                    yield event
            reason = output.finish_reason
        for event in self._items.finish(complete=reason == "stop"):
            yield event
        cost = cost_json(self._service, self._chat, generation.spent)
        ended = self._ended(reason, self._usage(generation.num_generated, generation.num_cached, cost))
        yield {"type": f"response.{ended['status']}", "response": ended}

    def _ended(self, reason: str | None, usage: Mapping[str, object]) -> dict[str, object]:
        """The response when all is said; stored, if the client did not forbid it."""
        status = "completed" if reason == "stop" else "incomplete"
        details = None if reason == "stop" else {"reason": "max_output_tokens"}
        more = {"usage": usage, "incomplete_details": details}
        response = self._response(status, output=self._items.items, **more)
        if self._body.is_stored:
            said = {name: value for name, value in message_json(self._said).items() if value is not None}
            messages = [*self._messages, said]
            if len(said) == 1:  # the role alone: nothing was said
                messages.pop()
            stored = StoredResponse(response=response, messages=messages, owner=self._owner)
            self._service.stored.put(self._asked.request_id, stored)
        return response

    def _usage(self, num_generated: int, cached: int, cost: Mapping[str, object] | None) -> dict[str, object]:
        num_prompt = self._asked.num_prompt
        told: dict[str, object] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": num_generated,
            "output_tokens_details": {"reasoning_tokens": self._asked.num_reasoning},
            "total_tokens": num_prompt + num_generated,
        }
        return {**told, **(cost or {})}

    def _response(self, status: str, *, output: Sequence[object] = (), **more: object) -> dict[str, object]:
        body = self._body
        text = None if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
        reasoning = body.reasoning
        return {
            "id": self._asked.request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._service.model_name,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
            "store": body.is_stored,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **(text or {})},
            "tool_choice": body.tool_choice_json(),
            "tools": body.tools_json(),
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }
