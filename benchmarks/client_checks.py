"""What common clients make of a running server, each as its own documents use it.

    python benchmarks/client_checks.py http://127.0.0.1:8000 NAME

Runs in an environment of the clients alone: it imports nothing of this project. Each check asserts what a user of that
client would rely on. The last line is one JSON object: by client its version, and by check `ok` or what went wrong.
Started by `clients.py`.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ASK = [{"role": "user", "content": "It is a truth"}]
PICK = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": PICK}}
FORM = {"type": "json_schema", "json_schema": {"name": "pick", "schema": PICK, "strict": True}}
LONG = [{"role": "user", "content": "so long " * 20_000}]
ROOM = 400  # tokens: a thought comes before a call or a form
Checks = Iterator[tuple[str, Callable[[], object]]]


def is_pick(value: object) -> None:
    picked = json.loads(value) if isinstance(value, str) else value
    assert picked in ({"colour": "red"}, {"colour": "blue"}), value


def raises(kinds: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except kinds as error:
        told = str(error)
    else:
        raise AssertionError("nothing was raised")
    assert all(word in told for word in words), told


def openai_checks(address: str, model: str) -> Checks:
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    plain = {"thinking": {"type": "disabled"}}

    def ask(**more: Any) -> Any:
        settings = {"messages": ASK, "max_tokens": 12, "extra_body": plain, **more}
        return client.chat.completions.create(model=model, **settings)

    def whole_and_stream() -> None:
        whole = ask(seed=1)
        chunks = list(ask(seed=1, stream=True, stream_options={"include_usage": True}))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12

    def tools() -> None:
        asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": ROOM}
        is_pick(ask(**asked).choices[0].message.tool_calls[0].function.arguments)
        deltas = [choice.delta for chunk in ask(**asked, stream=True) for choice in chunk.choices]
        pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
        is_pick("".join(piece.function.arguments or "" for piece in pieces if piece.index == 0))

    def form() -> None:
        is_pick(ask(response_format=FORM, max_tokens=ROOM).choices[0].message.content)
        settings = {"messages": ASK, "max_tokens": ROOM, "extra_body": plain, "response_format": FORM}
        with client.chat.completions.stream(model=model, **settings) as stream:
            is_pick(stream.get_final_completion().choices[0].message.content)

    def responses() -> None:
        whole = client.responses.create(model=model, input="It is a truth", max_output_tokens=16)
        assert whole.usage.output_tokens > 0
        after = client.responses.create(
            model=model, input="and?", max_output_tokens=16, previous_response_id=whole.id, stream=True
        )
        kinds = [event.type for event in after]
        assert kinds[0] == "response.created", kinds
        assert kinds[-1] in ("response.completed", "response.incomplete"), kinds

    def completions() -> None:
        whole = client.completions.create(model=model, prompt="It is", max_tokens=6, echo=True, logprobs=2)
        assert whole.choices[0].text.startswith("It is")
        assert len(whole.choices[0].logprobs.tokens) == whole.usage.total_tokens

    def errors() -> None:
        raises(openai.BadRequestError, lambda: ask(temperature=7), "temperature")
        raises(openai.BadRequestError, lambda: ask(messages=LONG), "maximum context length")
        raises(openai.NotFoundError, lambda: client.models.retrieve("another"))
        assert model in [one.id for one in client.models.list()]

    yield "whole and streamed", whole_and_stream
    yield "tools", tools
    yield "structured output", form
    yield "responses", responses
    yield "completions", completions
    yield "errors", errors


def anthropic_checks(address: str, model: str) -> Checks:
    import anthropic

    client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)

    def ask(**more: Any) -> Any:
        return client.messages.create(**{"model": model, "messages": ASK, "max_tokens": 12, **more})

    def whole_and_stream() -> None:
        whole = ask()
        assert whole.usage.output_tokens > 0
        with client.messages.stream(model=model, messages=ASK, max_tokens=12) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "".join(block.text for block in final.content if block.type == "text")
        assert final.stop_reason in ("max_tokens", "end_turn")

    def thoughts() -> None:
        thinking = {"type": "enabled", "budget_tokens": 1024}
        kinds = [block.type for block in ask(thinking=thinking, max_tokens=1100).content]
        assert kinds[0] == "thinking", kinds

    def tools() -> None:
        tool = {"name": "paint", "description": "Paints.", "input_schema": PICK}
        plain = {"thinking": {"type": "disabled"}}  # random weights would think to the end of the room
        asked = {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": ROOM, **plain}
        called = [block for block in ask(**asked).content if block.type == "tool_use"]
        is_pick(called[0].input)
        with client.messages.stream(model=model, messages=ASK, **asked) as stream:
            streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
        is_pick(streamed[0].input)
        result = {"type": "tool_result", "tool_use_id": called[0].id, "content": "done"}
        turn = [*ASK, {"role": "assistant", "content": called[:1]}, {"role": "user", "content": [result]}]
        assert ask(messages=turn, tools=[tool]).usage.output_tokens > 0

    def counted() -> None:
        tokens = client.messages.count_tokens(model=model, messages=ASK).input_tokens
        usage = ask().usage
        assert tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)

    def errors() -> None:
        raises(anthropic.BadRequestError, lambda: ask(extra_body={"temperature": 7}), "temperature")
        raises(anthropic.BadRequestError, lambda: ask(messages=LONG))
        raises(anthropic.NotFoundError, lambda: ask(model="another"))

    yield "whole and streamed", whole_and_stream
    yield "thoughts", thoughts
    yield "tools", tools
    yield "tokens counted", counted
    yield "errors", errors


def litellm_checks(address: str, model: str) -> Checks:
    import litellm

    litellm.suppress_debug_info = True
    plain = {"thinking": {"type": "disabled"}}

    def ask(messages: list[dict[str, str]] = ASK, *, to: str = "openai", **more: Any) -> Any:
        base = address if to == "anthropic" else f"{address}/v1"
        common = {"api_base": base, "api_key": "none", "max_tokens": 12, "num_retries": 0}
        extra = {} if to == "anthropic" else {"extra_body": plain}
        return litellm.completion(model=f"{to}/{model}", messages=messages, **{**common, **extra, **more})

    def whole_and_stream() -> None:
        whole = ask(seed=1)
        chunks = list(ask(seed=1, stream=True, stream_options={"include_usage": True}))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == whole.choices[0].message.content
        assert text
        assert whole.usage.completion_tokens == 12
        assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == 12

    def thoughts() -> None:
        # Without a seed random weights may end their thought, or all of the answer, at the first token.
        message = ask(to="deepseek", seed=1, extra_body={"thinking": {"type": "enabled"}}).choices[0].message
        assert getattr(message, "reasoning_content", None), message

    def tools() -> None:
        asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": ROOM}
        (call,) = ask(**asked).choices[0].message.tool_calls[:1]
        assert call.function.name == "paint"
        is_pick(call.function.arguments)
        chunks = list(ask(**asked, stream=True))
        (built,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[:1]
        is_pick(built.function.arguments)

    def form() -> None:
        is_pick(ask(response_format=FORM, max_tokens=ROOM).choices[0].message.content)

    def anthropic() -> None:
        whole = ask(to="anthropic")
        assert 0 < whole.usage.completion_tokens <= 12
        ends = [choice.finish_reason for piece in ask(to="anthropic", stream=True) for choice in piece.choices]
        assert {"length", "stop"} & set(ends), ends

    def errors() -> None:
        raises(litellm.BadRequestError, lambda: ask(temperature=7), "temperature")
        raises(litellm.ContextWindowExceededError, lambda: ask(LONG))
        other = {"api_base": f"{address}/v1", "api_key": "none", "messages": ASK}
        raises(litellm.NotFoundError, lambda: litellm.completion(model="openai/another", **other))

    yield "whole and streamed", whole_and_stream
    yield "thoughts, as deepseek/", thoughts
    yield "tools", tools
    yield "structured output", form
    yield "messages, as anthropic/", anthropic
    yield "errors", errors
    yield "several at once", lambda: asyncio.run(litellm_together(address, model))


async def litellm_together(address: str, model: str) -> None:
    import litellm

    settings = {"model": f"openai/{model}", "messages": ASK, "api_base": f"{address}/v1", "api_key": "none"}
    answers = await asyncio.gather(*(litellm.acompletion(**settings, max_tokens=4) for _ in range(4)))
    assert all(answer.usage.completion_tokens == 4 for answer in answers)


def langchain_checks(address: str, model: str) -> Checks:
    import openai
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    question = [HumanMessage("It is a truth")]

    def chat(**more: Any) -> Any:
        plain = {"thinking": {"type": "disabled"}}
        settings = {"model": model, "max_tokens": 12, "max_retries": 0, "extra_body": plain}
        return ChatOpenAI(base_url=f"{address}/v1", api_key="none", **{**settings, **more})

    def whole_and_stream() -> None:
        whole = chat(seed=1).invoke(question)
        pieces = list(chat(seed=1, stream_usage=True).stream(question))
        assert "".join(str(piece.content) for piece in pieces) == whole.content
        total = pieces[0]
        for piece in pieces[1:]:
            total += piece
        assert whole.usage_metadata["output_tokens"] == total.usage_metadata["output_tokens"] == 12

    async def later() -> None:
        answers = await chat().abatch([question] * 3)
        assert len(answers) == 3
        assert [piece async for piece in chat().astream(question)]

    def tools() -> None:
        able = chat(max_tokens=ROOM).bind_tools([TOOL], tool_choice="required")
        message = able.invoke(question)
        is_pick(message.tool_calls[0]["args"])
        result = ToolMessage("done", tool_call_id=message.tool_calls[0]["id"])
        # Random weights call until the room ends, and the call that it cuts would be sent back as it is.
        called = {"tool_calls": message.tool_calls[:1], "invalid_tool_calls": []}
        turn = [*question, message.model_copy(update=called), result]
        assert chat().bind_tools([TOOL]).invoke(turn).usage_metadata["output_tokens"] > 0
        total = None
        for piece in able.stream(question):
            total = piece if total is None else total + piece
        is_pick(total.tool_calls[0]["args"])

    def form() -> None:
        schema = {"title": "pick", "description": "A colour.", **PICK}
        for method in ("json_schema", "function_calling"):
            is_pick(chat(max_tokens=ROOM).with_structured_output(schema, method=method, strict=True).invoke("?"))

    def errors() -> None:
        raises(openai.BadRequestError, lambda: chat(temperature=7).invoke(question), "temperature")
        raises(openai.NotFoundError, lambda: chat(model="another").invoke(question))
        raises(openai.BadRequestError, lambda: chat().invoke("so long " * 20_000))

    yield "whole and streamed", whole_and_stream
    yield "several at once", lambda: asyncio.run(later())
    yield "tools", tools
    yield "structured output", form
    yield from langchain_others(address, model)
    yield "errors", errors


def langchain_others(address: str, model: str) -> Checks:
    """Its two other APIs."""
    from langchain_openai import ChatOpenAI, OpenAI

    def responses() -> None:
        able = ChatOpenAI(
            model=model, base_url=f"{address}/v1", api_key="none", use_responses_api=True, max_tokens=16, max_retries=0
        )
        assert able.invoke(ASK).usage_metadata["output_tokens"] > 0
        assert list(able.stream(ASK))

    def completions() -> None:
        able = OpenAI(model=model, base_url=f"{address}/v1", api_key="none", max_tokens=6, seed=1, max_retries=0)
        assert able.invoke("It is") == "".join(able.stream("It is"))

    yield "responses", responses
    yield "completions", completions


def llm_checks(address: str, model: str) -> Checks:
    home = Path(tempfile.mkdtemp())
    entry = {"model_id": "here", "model_name": model, "api_base": f"{address}/v1", "can_stream": True}
    entry |= {"supports_schema": True, "supports_tools": True, "reasoning": True, "api_key_name": "here"}
    # JSON is YAML
    (home / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (home / "keys.json").write_text(json.dumps({"here": "none"}))
    os.environ["LLM_USER_PATH"] = str(home)
    import llm

    def ask(**more: Any) -> Any:
        # Random weights would think to the end of the room.
        return llm.get_model("here").prompt("It is a truth", **{"max_tokens": ROOM, "reasoning_effort": "none", **more})

    def whole_and_stream() -> None:
        whole = ask(stream=False, max_tokens=12, seed=1)
        pieces = ask(stream=True, max_tokens=12, seed=1)
        assert whole.text() == "".join(pieces) != ""
        assert whole.usage().output == 12

    def thoughts() -> None:
        thinking = ask(stream=False, max_tokens=12, reasoning_effort="high")
        told = thinking.usage().details["completion_tokens_details"]["reasoning_tokens"]
        assert told, "it thinks where it is asked to"

    def paint(colour: str) -> str:
        """Paints."""
        return colour

    def tools() -> None:
        # Nothing makes a random model call a tool unasked: that the definition is understood is seen in the prompt.
        with_tool, without = (ask(stream=False, max_tokens=4, tools=tools) for tools in ([paint], []))
        assert with_tool.usage().input > without.usage().input

    def form() -> None:
        for stream in (False, True):
            is_pick(ask(stream=stream, schema=PICK).text())

    def conversation() -> None:
        talk = llm.get_model("here").conversation()
        first = talk.prompt("It is", stream=False, max_tokens=4)
        second = talk.prompt("and?", stream=False, max_tokens=4)
        assert first.text() is not None
        assert second.usage().input > first.usage().input

    def errors() -> None:
        raises(Exception, lambda: ask(stream=False, temperature=2, max_tokens=10**9).text(), "max_tokens")

    yield "whole and streamed", whole_and_stream
    yield "thoughts", thoughts
    yield "tools", tools
    yield "structured output", form
    yield "conversation", conversation
    yield "errors", errors


CLIENTS = {
    "openai": openai_checks,
    "anthropic": anthropic_checks,
    "litellm": litellm_checks,
    "langchain-openai": langchain_checks,
    "llm": llm_checks,
}


def main() -> int:
    address, model = sys.argv[1:3]
    told: dict[str, dict[str, str]] = {}
    for client, checks in CLIENTS.items():
        try:
            told[client] = {"version": version(client)}
        except PackageNotFoundError:
            told[client] = {"version": "not installed"}
            continue
        for name, check in checks(address, model):
            try:
                check()
                told[client][name] = "ok"
            except Exception as error:
                told[client][name] = f"{type(error).__name__}: {error}"[:600]
            print(f"{client}: {name}: {told[client][name]}", file=sys.stderr, flush=True)
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
