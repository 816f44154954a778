"""`POST /v1/chat/completions`: a conversation in, the assistant's next turn out, whole or as it comes."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.infer.request import Output, TokenLogprobs
from daedal.serve.body import read_object
from daedal.serve.chat_protocol import ChatBody
from daedal.serve.delivery import EventStream, nobody, unless_gone
from daedal.serve.errors import ApiError
from daedal.serve.generation import Choice, Generation, collect, new_id, usage
from daedal.serve.limits import admit, room
from daedal.serve.logprob_rows import chat_rows
from daedal.serve.prompt import write_prompt
from daedal.serve.protocol import StreamOptions
from daedal.serve.service import Service
from daedal.serve.turn import Turn, delta_json, message_json
from daedal.text.chat import ChatFormat
from daedal.text.encodings.answers import Delta


class ChatEndpoint:
    """The route's handler for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def answer(self, request: Request) -> Response:
        body = ChatBody.read(await read_object(request))
        admit(self._service, body)
        format = self._format()
        choices = await run_in_threadpool(self._choices, body, format)
        turns = [Turn(format.parser(choice.text, calls=body.looks_for_calls)) for choice in choices]
        head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
        }
        if body.stream:
            generation = await Generation.begin(self._service, str(head["id"]), choices)
            return EventStream(generation, self._chunks(generation, choices, turns, head, body))
        whole = await unless_gone(request, self._whole(choices, turns, head, body))
        return nobody() if whole is None else JSONResponse(whole)

    async def _whole(
        self, choices: list[Choice], turns: list[Turn], head: Mapping[str, object], body: ChatBody
    ) -> dict[str, object]:
        said: list[list[Delta]] = [[] for _ in turns]

        def follow(index: int, output: Output) -> None:
            said[index] += turns[index].take(output)

        answers = await collect(self._service, str(head["id"]), choices, follow)
        messages = [
            {
                "index": index,
                "message": message_json(deltas),
                "logprobs": self._logprobs(answer.logprobs) if body.logprobs else None,
                "finish_reason": turn.finish_reason(answer.finish_reason),
            }
            for index, (turn, deltas, answer) in enumerate(zip(turns, said, answers, strict=True))
        ]
        num_generated = sum(len(answer.ids) for answer in answers)
        return {
            **head,
            "object": "chat.completion",
            "choices": messages,
            "usage": _usage(choices, num_generated, turns),
        }

    def _format(self) -> ChatFormat:
        service = self._service
        if service.chat_format is None:
            sentence = (
                f"the model {service.model_name!r} has no chat format: use /v1/completions, or name a format to the "
                f"server with --chat-format"
            )
            raise ApiError(400, sentence, param="model", code="no_chat_template")
        return service.chat_format

    def _choices(self, body: ChatBody, format: ChatFormat) -> list[Choice]:
        text = write_prompt(body, format)
        prompt = tuple(self._service.tokenizer.encode(text, add_special_tokens=False))
        max_tokens = room(self._service, prompt, body.asked_tokens(), param="messages")
        choices = []
        for index in range(body.num_choices):
            params = body.sampling(choice=index, max_tokens=max_tokens, logprobs=body.num_logprobs)
            if format.shows_special_tokens:
                params = replace(params, skip_special_tokens=False)
            choices.append(Choice(prompt=prompt, params=params, text=text))
        return choices

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, object]:
        return {"content": chat_rows(self._service.tokenizer, entries), "refusal": None}

    async def _chunks(
        self,
        generation: Generation,
        choices: list[Choice],
        turns: list[Turn],
        head: Mapping[str, object],
        body: ChatBody,
    ) -> AsyncIterator[Mapping[str, object]]:
        options = body.stream_options or StreamOptions()
        head = {**head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        async for index, output in generation:
            deltas = [delta_json(delta) for delta in turns[index].take(output)]
            tally = _usage(choices, generation.num_generated, turns) if options.continuous_usage_stats else None
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
            yield {**head, "choices": [], "usage": _usage(choices, generation.num_generated, turns)}


def _chunk_choice(
    index: int, delta: Mapping[str, object], *, logprobs: object = None, reason: str | None = None
) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _usage(choices: Sequence[Choice], num_generated: int, turns: Sequence[Turn]) -> dict[str, object]:
    return usage(len(choices[0].prompt), num_generated, sum(turn.reasoning_tokens for turn in turns))
