"""`POST /tokenize` and `POST /detokenize`, as vLLM has them: what a text or a conversation is in tokens, and back.

A conversation is cut as `/v1/chat/completions` would cut it. Knows nothing of engines.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.serve.api.asking import chat_format
from daedal.serve.api.body import read_object
from daedal.serve.api.chat_protocol import ChatBody
from daedal.serve.api.limits import check_model
from daedal.serve.api.prompt import write_prompt
from daedal.serve.api.protocol import validated
from daedal.serve.state.errors import ApiError
from daedal.serve.state.service import Service

MAX_TOKENS = 2**20


class TextBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class IdsBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKENS)]


class TokenRoutes:
    """The routes' handlers for one service."""

    def __init__(self, service: Service):
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        given = await read_object(request)
        names = bool(given.get("return_token_strs"))
        if "messages" in given:
            chat = ChatBody.read({name: value for name, value in given.items() if name != "return_token_strs"})
            check_model(self._service, chat.model)
            ids = await run_in_threadpool(self._conversation, chat)
        else:
            body = validated(TextBody, given)
            check_model(self._service, body.model)
            encode = self._service.tokenizer.encode
            ids = await run_in_threadpool(encode, body.prompt, body.add_special_tokens)
        texts = list(map(self._service.tokenizer.token_text, ids)) if names else None
        answer = {"count": len(ids), "max_model_len": self._service.max_context, "tokens": ids, "token_strs": texts}
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        body = validated(IdsBody, await read_object(request))
        check_model(self._service, body.model)
        tokenizer = self._service.tokenizer
        for token in body.tokens:
            if token >= tokenizer.vocab_size:
                sentence = f"tokens holds the id {token}, the vocabulary has {tokenizer.vocab_size}: give smaller ones"
                raise ApiError(400, sentence, param="tokens")
        text = await run_in_threadpool(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONResponse({"prompt": text})

    def _conversation(self, body: ChatBody) -> list[int]:
        text = write_prompt(body, chat_format(self._service)).text
        return self._service.tokenizer.encode(text, add_special_tokens=False)
