"""`POST /v1/chat/completions`: a conversation in, the assistant's next turn out, whole or as it comes."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.infer.request import TokenLogprobs
from daedal.serve.api.asking import Asked, ask
from daedal.serve.api.body import read_object
from daedal.serve.api.chat_protocol import ChatBody
from daedal.serve.api.costs import cost_json
from daedal.serve.api.delivery import EventStream, nobody, unless_gone
from daedal.serve.api.generation import Generation, new_id, num_cached, spent, usage
from daedal.serve.api.logprob_rows import chat_rows
from daedal.serve.api.protocol import StreamOptions
from daedal.serve.api.turn import delta_json, message_json
from daedal.serve.state.keys import asker_of
from daedal.serve.state.service import Service
from daedal.text.encodings.answers import Delta


class ChatEndpoint:
    """The route's handler for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def answer(self, request: Request) -> Response:
        body = ChatBody.read(await read_object(request))
        asked = await ask(self._service, body, new_id("chatcmpl"), asker=asker_of(request))
        head = {
            "id": asked.request_id,
            "created": int(time.time()),
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
        }
        if body.stream:
            generation = await asked.begin()
            return EventStream(generation, self._chunks(generation, asked, head, body))
        whole = await unless_gone(request, self._whole(asked, head, body))
        return nobody() if whole is None else JSONResponse(whole)

    async def _whole(self, asked: Asked, head: Mapping[str, object], body: ChatBody) -> dict[str, object]:
        answers, said = await asked.whole()
        messages = [
            {
                "index": index,
                "message": message_json(deltas),
                "logprobs": self._logprobs(answer.logprobs) if body.logprobs else None,
                "finish_reason": turn.finish_reason(answer.finish_reason),
            }
            for index, (turn, deltas, answer) in enumerate(zip(asked.turns, said, answers, strict=True))
        ]
        num_generated = sum(len(answer.ids) for answer in answers)
        cached = num_cached(asked.choices, [answer.num_cached for answer in answers])
        return {
            **head,
            "object": "chat.completion",
            "choices": messages,
            "usage": _usage(asked, num_generated, cached, cost_json(self._service, body, spent(answers))),
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, object]:
        return {"content": chat_rows(self._service.tokenizer, entries), "refusal": None}

    async def _chunks(
        self,
        generation: Generation,
        asked: Asked,
        head: Mapping[str, object],
        body: ChatBody,
    ) -> AsyncIterator[Mapping[str, object]]:
        options = body.stream_options or StreamOptions()
        head = {**head, "object": "chat.completion.chunk"}
        turns = asked.turns
        begun: set[int] = set()
        async for index, output in generation:
            deltas = [delta_json(delta) for delta in turns[index].take(output)]
            tally = None
            if options.continuous_usage_stats:
                tally = _usage(asked, generation.num_generated, generation.num_cached)
            if index not in begun:
                begun.add(index)
                opening = {"role": "assistant", "content": "", "refusal": None, **delta_json(Delta())}
                yield {**head, "choices": [_chunk_choice(index, opening)], "usage": tally}
            logprobs = self._logprobs(output.logprobs) if output.logprobs else None
            if logprobs is not None and not deltas:
                deltas = [delta_json(Delta())]
            for delta in deltas:
                yield {**head, "choices": [_chunk_choice(index, delta, logprobs=logprobs)], "usage": tally}
                logprobs = None
            if output.finish_reason is not None:
                choice = _chunk_choice(
                    index, delta_json(Delta()), reason=turns[index].finish_reason(output.finish_reason)
                )
                yield {**head, "choices": [choice], "usage": tally}
        if options.include_usage:
            cost = cost_json(self._service, body, generation.spent)
            tally = _usage(asked, generation.num_generated, generation.num_cached, cost)
            yield {**head, "choices": [], "usage": tally}


def _chunk_choice(
    index: int, delta: Mapping[str, object], *, logprobs: object = None, reason: str | None = None
) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _usage(
    asked: Asked, num_generated: int, cached: int, cost: Mapping[str, object] | None = None
) -> dict[str, object]:
    return usage(asked.num_prompt, num_generated, asked.num_reasoning, cached=cached, cost=cost)
