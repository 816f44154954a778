"""The official client against a real server: everything it reads must also pass its own types, strictly."""

import asyncio
import math

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serve.live import MODEL

ASK = [{"role": "user", "content": "It is a truth"}]


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: str, path: str, **body: object) -> dict:
    answer = httpx.post(f"{server}/v1/{path}", json={"model": MODEL, **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_models(client: openai.OpenAI, server: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    Model.model_validate(httpx.get(f"{server}/v1/models/{MODEL}").json(), strict=True)
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("another")
    assert refusal.value.code == "model_not_found"


def test_chat_answers_with_the_types_of_the_api(server: str) -> None:
    body = post(server, "chat/completions", messages=ASK, max_tokens=6, logprobs=True, top_logprobs=20, seed=1)
    answer = ChatCompletion.model_validate(body, strict=True)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    rows = choice.logprobs.content
    assert len(rows) == answer.usage.completion_tokens
    assert b"".join(bytes(row.bytes) for row in rows).decode(errors="replace") == choice.message.content
    for row in rows:
        assert len(row.top_logprobs) == 20
        assert row.top_logprobs == sorted(row.top_logprobs, key=lambda top: -top.logprob)
        assert sum(math.exp(top.logprob) for top in row.top_logprobs) <= 1 + 1e-4


def test_usage_counts_the_rendered_prompt(server: str, client: openai.OpenAI) -> None:
    rendered = "<|start|>user\nIt is a truth<|end|>\n<|start|>assistant\n"
    whole = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=4, temperature=0)
    plain = client.completions.create(model=MODEL, prompt=rendered, max_tokens=4, temperature=0)
    assert plain.usage == whole.usage
    assert plain.choices[0].text == whole.choices[0].message.content


def test_the_answer_may_fill_the_context_by_default(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, seed=3, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"
    asked = client.chat.completions.create(model=MODEL, messages=ASK, seed=3, max_completion_tokens=512)
    assert asked.usage.total_tokens <= 512


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, server: str) -> None:
    asked = {"model": MODEL, "messages": ASK, "max_tokens": 60, "seed": 11, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    raw = client.chat.completions.with_streaming_response.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    with raw as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line, strict=True) for line in lines]
    *parts, last = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage == whole.usage
    deltas = [part.choices[0] for part in parts]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    rows = [row for choice in deltas if choice.logprobs for row in choice.logprobs.content]
    assert rows == whole.choices[0].logprobs.content
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_differ_and_repeat_with_a_seed(client: openai.OpenAI) -> None:
    def texts(**asked: object) -> list[str]:
        answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=12, **asked)
        return [choice.message.content for choice in answer.choices]

    three = texts(n=3, seed=5)
    assert len(set(three)) == 3
    assert three == texts(n=3, seed=5)
    assert three[:1] == texts(seed=5)
    edge = texts(n=2, seed=2**63 - 1)
    assert len(set(edge)) == 2


def test_stop_strings_are_left_out(client: openai.OpenAI) -> None:
    def ask(**more: object) -> openai.types.CompletionChoice:
        asked = {"model": MODEL, "prompt": "It is", "max_tokens": 40, "temperature": 0.0, **more}
        return client.completions.create(**asked).choices[0]

    whole = ask().text
    stop = whole[5:8]
    cut = ask(stop=[stop, "never seen in this answer"])
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]
    assert ask(stop=stop).text == cut.text


def test_completions_take_texts_and_ids(client: openai.OpenAI, server: str) -> None:
    def texts(prompt: object, **more: object) -> list[str]:
        body = post(server, "completions", prompt=prompt, max_tokens=5, temperature=0, **more)
        answer = Completion.model_validate(body, strict=True)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one, other = texts("It is"), texts("a wife")
    assert texts(["It is", "a wife"]) == [*one, *other]
    assert texts(["It is", "a wife"], n=2) == [*one, *one, *other, *other]
    ids = [[43, 86], [67, 222, 90]]
    assert texts(ids) == [*texts(ids[0]), *texts(ids[1])]
    assert len(post(server, "completions", prompt="It is", ignore_eos=True)["choices"][0]["text"]) > 0
    assert post(server, "completions", prompt="It is", ignore_eos=True)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["It is a truth, 真 🙂", [43, 86, 0, 222, 90]], ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 7])
def test_echo_with_logprobs_covers_prompt_and_answer(
    client: openai.OpenAI, server: str, prompt: object, max_tokens: int
) -> None:
    asked = {"prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": 5, "seed": 2}
    body = post(server, "completions", **asked)
    choice, usage = body["choices"][0], body["usage"]
    table = choice["logprobs"]
    rows = usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == max_tokens
    assert {len(column) for column in table.values()} == {rows}
    assert table["token_logprobs"][0] is table["top_logprobs"][0] is None
    assert all(5 <= len(top) <= 6 for top in table["top_logprobs"][1:])
    assert bytes(byte for row in table["bytes"] for byte in row).decode(errors="replace") == choice["text"]
    assert table["text_offset"] == sorted(table["text_offset"])
    for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
        if not token.startswith(("bytes:", "token_id:", "<|")):
            assert choice["text"][offset:].startswith(token)
    chunks = client.completions.create(model=MODEL, stream=True, **asked)
    pieces = [chunk.choices[0] for chunk in chunks]
    assert "".join(piece.text for piece in pieces) == choice["text"]
    for name, column in table.items():
        assert [item for piece in pieces for item in piece.logprobs.to_dict()[name]] == column


def test_logprobs_do_not_depend_on_how_they_are_asked_for(server: str) -> None:
    first = post(server, "completions", prompt="It is", max_tokens=4, temperature=0, logprobs=0)
    ids_text = first["choices"][0]["text"]
    echoed = post(server, "completions", prompt="It is" + ids_text, max_tokens=0, echo=True, logprobs=0)
    got, again = first["choices"][0]["logprobs"], echoed["choices"][0]["logprobs"]
    if again["tokens"][-4:] == got["tokens"]:  # the text is split into the same tokens
        assert again["token_logprobs"][-4:] == pytest.approx(got["token_logprobs"], abs=1e-4)


def test_logit_bias_and_penalties_reach_the_engine(server: str) -> None:
    forced = post(server, "completions", prompt="It is", max_tokens=6, logit_bias={"70": 100}, logprobs=0)
    assert set(forced["choices"][0]["logprobs"]["tokens"]) == {forced["choices"][0]["text"][:1]}
    asked = {"prompt": "It is", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    plain = post(server, "completions", **asked)["choices"][0]["text"]
    for more in ({"frequency_penalty": 2}, {"presence_penalty": 2.0}, {"repetition_penalty": 5}):
        assert post(server, "completions", **asked, **more)["choices"][0]["text"] != plain, more


def test_special_tokens_are_text_where_that_is_asked_for(client: openai.OpenAI, server: str) -> None:
    """Padding, which the model is made to write, in the prompt and in the answer."""
    name = "<|pad|>"
    asked = {"prompt": [43, 2, 86], "max_tokens": 3, "logit_bias": {"2": 100}, "echo": True, "logprobs": 0, "seed": 1}
    hidden = post(server, "completions", **asked)["choices"][0]
    visible = post(server, "completions", **asked, skip_special_tokens=False)["choices"][0]
    before, after = hidden["text"]
    assert visible["text"] == before + name + after + 3 * name
    for choice in (hidden, visible):
        rows = choice["logprobs"]
        assert bytes(byte for row in rows["bytes"] for byte in row).decode() == choice["text"]
        assert rows["tokens"] == [before, name, after, *[name] * 3]
    assert visible["logprobs"]["text_offset"] == [0, 1, 8, 9, 16, 23]
    assert hidden["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2]
    more = {"extra_body": {"skip_special_tokens": False}}
    pieces = client.completions.create(model=MODEL, stream=True, **asked, **more)
    assert "".join(piece.choices[0].text for piece in pieces) == visible["text"]
    answer = post(server, "completions", **{**asked, "echo": False}, skip_special_tokens=False, stop=[f"{name}<|p"])
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 2)
    chat = {"messages": ASK, "max_tokens": 2, "logit_bias": {"2": 100}}
    assert post(server, "chat/completions", **chat)["choices"][0]["message"]["content"] == ""
    shown = post(server, "chat/completions", **chat, skip_special_tokens=False)
    assert shown["choices"][0]["message"]["content"] == 2 * name


def test_many_clients_at_once_get_what_each_gets_alone(server: str) -> None:
    asked = [{"prompt": f"It is {number}", "max_tokens": 10, "seed": number} for number in range(12)]
    alone = [post(server, "completions", **body)["choices"][0]["text"] for body in asked]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(client.completions.create(model=MODEL, **body) for body in asked))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(together()) == alone


def test_errors_reach_the_client_as_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "so long " * 600}])
    assert refusal.value.code == "context_length_exceeded"
    assert refusal.value.param == "messages"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="another", messages=ASK)


def test_roles_and_parts(server: str) -> None:
    def text(messages: list[dict]) -> str:
        answer = post(server, "chat/completions", messages=messages, max_tokens=5, temperature=0)
        return answer["choices"][0]["message"]["content"]

    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    parts = [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]
    assert text(plain) == text([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    assert text([*plain, called, {"role": "tool", "content": "yes", "tool_call_id": "1"}]) is not None
