"""`POST /v1/completions`: texts or token ids in, their continuations out, whole or as they come."""

import time
from collections.abc import AsyncIterator, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.infer.request import Output
from daedal.serve.api.body import read_object
from daedal.serve.api.costs import cost_json
from daedal.serve.api.delivery import EventStream, nobody, unless_gone
from daedal.serve.api.generation import Answer, Choice, Generation, collect, new_id, num_cached, spent, usage
from daedal.serve.api.limits import admit, room, seconds_for
from daedal.serve.api.logprob_rows import CompletionRows, joined
from daedal.serve.api.protocol import CompletionBody, StreamOptions
from daedal.serve.state.keys import Asker, asker_of
from daedal.serve.state.service import Service


class CompletionEndpoint:
    """The route's handler for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def answer(self, request: Request) -> Response:
        body = CompletionBody.read(await read_object(request))
        admit(self._service, body)
        asker = asker_of(request)
        choices = await run_in_threadpool(self._choices, body, asker)
        num_prompt = sum(len(choice.prompt) for choice in choices[:: body.num_choices])
        head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
        }
        name, charge, seconds = str(head["id"]), asker.charge, seconds_for(self._service, body)
        if body.stream:
            generation = await Generation.begin(self._service, name, choices, charge, seconds)
            return EventStream(generation, self._chunks(generation, choices, num_prompt, head, body))
        work = collect(self._service, name, choices, charge=charge, seconds=seconds)
        answers = await unless_gone(request, work)
        if answers is None:
            return nobody()
        pairs = zip(choices, answers, strict=True)
        tally = usage(
            num_prompt,
            sum(len(answer.ids) for answer in answers),
            cached=num_cached(choices, [answer.num_cached for answer in answers]),
            cost=cost_json(self._service, body, spent(answers)),
        )
        return JSONResponse(
            {
                **head,
                "choices": [self._choice(index, *pair, body) for index, pair in enumerate(pairs)],
                "usage": tally,
            }
        )

    def _choices(self, body: CompletionBody, asker: Asker) -> list[Choice]:
        """n choices for the first prompt, then n for the second, and so on."""
        tokenizer = self._service.tokenizer
        skips, priority = body.skips_special_tokens, asker.priority(body.priority)
        choices: list[Choice] = []
        for given in body.prompt:
            ids = tuple(tokenizer.encode(given)) if isinstance(given, str) else given
            text = ""
            if body.echo:
                text = given if isinstance(given, str) else tokenizer.decode(given, skip_special_tokens=skips)
            max_tokens = room(self._service, ids, body.asked_tokens(), param="prompt")
            for index in range(body.num_choices):
                params = body.sampling(
                    choice=index, max_tokens=max_tokens, logprobs=body.logprobs, echo=bool(body.echo)
                )
                choices.append(Choice(prompt=ids, params=params, text=text, salt=asker.salt, priority=priority))
        return choices

    def _choice(self, index: int, choice: Choice, answer: Answer, body: CompletionBody) -> dict[str, object]:
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._rows(body, len(choice.text)).rows(answer.ids, answer.logprobs)
            if body.echo:
                logprobs = joined(self._prompt_rows(choice, answer, body), logprobs)
        text = choice.text + answer.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _rows(self, body: CompletionBody, start: int = 0) -> CompletionRows:
        return CompletionRows(self._service.tokenizer, start, skip_special_tokens=body.skips_special_tokens)

    def _prompt_rows(self, choice: Choice, answer: Answer | Output, body: CompletionBody) -> dict[str, list[object]]:
        return self._rows(body).rows(choice.prompt, answer.prompt_logprobs or ())

    async def _chunks(
        self,
        generation: Generation,
        choices: list[Choice],
        num_prompt: int,
        head: Mapping[str, object],
        body: CompletionBody,
    ) -> AsyncIterator[Mapping[str, object]]:
        options = body.stream_options or StreamOptions()
        followed = [self._rows(body, len(choice.text)) for choice in choices]
        begun: set[int] = set()
        async for index, output in generation:
            text = output.text or ""
            rows = followed[index].rows(output.ids, output.logprobs or ()) if body.logprobs is not None else None
            if body.echo and index not in begun:
                text = choices[index].text + text
                if rows is not None:
                    rows = joined(self._prompt_rows(choices[index], output, body), rows)
            begun.add(index)
            if not text and not (rows and rows["tokens"]) and output.finish_reason is None:
                continue
            choice = {"index": index, "text": text, "logprobs": rows, "finish_reason": output.finish_reason}
            tally = None
            if options.continuous_usage_stats:
                tally = usage(num_prompt, generation.num_generated, cached=generation.num_cached)
            yield {**head, "choices": [choice], "usage": tally}
        if options.include_usage:
            cost = cost_json(self._service, body, generation.spent)
            tally = usage(num_prompt, generation.num_generated, cached=generation.num_cached, cost=cost)
            yield {**head, "choices": [], "usage": tally}
