"""`POST /v1/chat/completions`: a conversation in, the assistant's next turn out, whole or as it comes."""

import time
from collections.abc import AsyncIterator, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.infer.request import Output
from daedal.serve.body import read_object
from daedal.serve.delivery import EventStream, nobody, unless_gone
from daedal.serve.errors import ApiError
from daedal.serve.generation import Answer, Choice, Generation, collect, new_id, usage
from daedal.serve.limits import admit, room
from daedal.serve.logprob_rows import chat_rows
from daedal.serve.protocol import ChatBody, StreamOptions
from daedal.serve.service import Service


class ChatEndpoint:
    """The route's handler for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def answer(self, request: Request) -> Response:
        body = ChatBody.read(await read_object(request))
        admit(self._service, body)
        choices = await self._choices(body)
        head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
        }
        if body.stream:
            generation = await Generation.begin(self._service, str(head["id"]), choices)
            return EventStream(generation, self._chunks(generation, choices, head, body))
        answers = await unless_gone(request, collect(self._service, str(head["id"]), choices))
        if answers is None:
            return nobody()
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": [self._choice(index, answer, body) for index, answer in enumerate(answers)],
                "usage": usage(len(choices[0].prompt), sum(len(answer.ids) for answer in answers)),
            }
        )

    async def _choices(self, body: ChatBody) -> list[Choice]:
        service = self._service
        if service.chat_template is None:
            sentence = f"the model {service.model_name!r} has no chat template: use /v1/completions"
            raise ApiError(400, sentence, param="model", code="no_chat_template")
        messages = [message.as_template_sees_it() for message in body.messages]
        prompt = tuple(await run_in_threadpool(service.render, messages, body.chat_template_kwargs or {}))
        max_tokens = room(service, prompt, body.asked_tokens(), param="messages")
        return [
            Choice(
                prompt=prompt,
                params=body.sampling(choice=index, max_tokens=max_tokens, logprobs=body.num_logprobs),
            )
            for index in range(body.num_choices)
        ]

    def _choice(self, index: int, answer: Answer, body: ChatBody) -> dict[str, object]:
        rows = chat_rows(self._service.tokenizer, answer.logprobs) if body.logprobs else None
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None if rows is None else {"content": rows, "refusal": None},
            "finish_reason": answer.finish_reason,
        }

    async def _chunks(
        self, generation: Generation, choices: list[Choice], head: Mapping[str, object], body: ChatBody
    ) -> AsyncIterator[Mapping[str, object]]:
        options = body.stream_options or StreamOptions()
        num_prompt = len(choices[0].prompt)
        head = {**head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        async for index, output in generation:
            tally = usage(num_prompt, generation.num_generated) if options.continuous_usage_stats else None
            if index not in begun:
                begun.add(index)
                delta = {"role": "assistant", "content": "", "refusal": None}
                yield {**head, "choices": [_chunk_choice(index, delta)], "usage": tally}
            rows = chat_rows(self._service.tokenizer, output.logprobs or ()) if body.logprobs else []
            if output.text or rows:
                choice = _chunk_choice(index, {"content": output.text or ""})
                choice["logprobs"] = {"content": rows, "refusal": None} if rows else None
                yield {**head, "choices": [choice], "usage": tally}
            if output.finish_reason is not None:
                yield {**head, "choices": [_chunk_choice(index, {}, output)], "usage": tally}
        if options.include_usage:
            yield {**head, "choices": [], "usage": usage(num_prompt, generation.num_generated)}


def _chunk_choice(index: int, delta: Mapping[str, object], output: Output | None = None) -> dict[str, object]:
    reason = None if output is None else output.finish_reason
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
