"""Structured output without a model: what a grammar lets through, what it does not, and what is refused."""

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from daedal.errors import RequestError
from daedal.text.encodings.answers import gather
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.hermes import HermesGrammar
from daedal.text.encodings.spelling import HERMES_SPELLING
from daedal.text.encodings.stream import StreamParser
from daedal.text.encodings.tokens import EOS
from daedal.text.structure.bounds import MAX_COUNT, MAX_DEPTH, check_pattern, check_schema
from daedal.text.structure.shape import Callee, Calls, Shape
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer
from tests.serve.deepseek import deepseek_checkpoint

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
FINE = {"city": 'Zürich "HB" 🦊 <b>', "days": [1, 2], "unit": "C"}
BAD = ({**FINE, "unit": "K"}, {**FINE, "days": []}, {"city": "x"}, {**FINE, "more": 1}, [1], {**FINE, "city": 5})


def dumped(value: object, **how: object) -> str:
    return json.dumps(value, ensure_ascii=False, **how)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("vocabularies")
    names = ("deepseek-v3.1", "deepseek-v3.2", "deepseek-v4", "deepseek-r1")
    return {name: Tokenizer.load(deepseek_checkpoint(directory / name, name)) for name in names}


@pytest.fixture(scope="module")
def structures(tokenizers: dict[str, Tokenizer]) -> dict[str, Structures]:
    return {name: Structures(tokenizer) for name, tokenizer in tokenizers.items()}


def accepts(structures: Structures, tokenizer: Tokenizer, shape: Shape, text: str) -> bool:
    """Whether every token of `text`, and then the end, is allowed."""
    mask = structures.make(shape).begin(vocab_size=400, end_ids=tokenizer.eos_ids)
    for token in [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_ids]:
        if not mask.allowed()[token]:
            return False
        mask.accept(token)
    return True


def test_json_matches_its_schema(structures: dict[str, Structures], tokenizers: dict[str, Tokenizer]) -> None:
    one = structures["deepseek-v4"], tokenizers["deepseek-v4"]
    shape = Shape(json=SCHEMA)
    for spaced in (dumped(FINE), dumped(FINE, indent=2), dumped(FINE, separators=(",", ":"))):
        assert accepts(*one, shape, spaced)
    for bad in BAD:
        assert not accepts(*one, shape, dumped(bad)), bad
    for text in ("", "{", dumped(FINE) + "x", "x" + dumped(FINE), dumped(FINE).replace(" ", 50 * " ")):
        assert not accepts(*one, shape, text), text
    assert accepts(*one, Shape(json={"type": "object"}), '{"any": ["thing", {"at": null}]}')
    referring = {"$defs": {"n": {"type": ["object", "null"], "properties": {"next": {"$ref": "#/$defs/n"}}}}}
    listed = Shape(json={**referring, "$ref": "#/$defs/n", "x-guidance": {"lenient": True}})
    assert accepts(*one, listed, '{"next": {"next": null}}')
    assert not accepts(*one, listed, '{"next": 5}')


@pytest.mark.parametrize("name", ["deepseek-v4", "deepseek-r1"])
def test_a_thought_is_free_and_comes_first(
    structures: dict[str, Structures], tokenizers: dict[str, Tokenizer], name: str
) -> None:
    one = structures[name], tokenizers[name]
    body = dumped(FINE)
    shape = Shape(json=SCHEMA, thought="open", gap=FORMATS[name].trims)
    assert accepts(*one, shape, f"I {{think}} 🦊\n</think>{body}")
    assert accepts(*one, shape, f"hm</think>\n\n{body}") == FORMATS[name].trims
    assert not accepts(*one, shape, body)
    may = Shape(json=SCHEMA, thought="may", gap=True)
    assert accepts(*one, may, body)
    assert accepts(*one, may, f"<think>hm</think>\n\n{body}")
    assert not accepts(*one, may, f"hm</think>{body}")


def calls_text(name: str, arguments: list[dict[str, object]]) -> str:
    """As the format itself writes calls of `get_weather`."""
    messages = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": str(n),
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": dumped(one)},
                }
                for n, one in enumerate(arguments)
            ],
        },
    ]
    without = [messages[0], {"role": "assistant", "content": "MARK"}]
    format = FORMATS[name]
    before = format.render(without, add_generation_prompt=False).partition("MARK")[0]
    text = format.render(messages, add_generation_prompt=False)
    return text.removeprefix(before).removesuffix(EOS)


@pytest.mark.parametrize("name", ["deepseek-v3.1", "deepseek-v3.2", "deepseek-v4"])
@pytest.mark.parametrize("must", [True, False], ids=["must", "may"])
def test_calls_are_as_the_format_writes_them(
    structures: dict[str, Structures], tokenizers: dict[str, Tokenizer], name: str, must: bool
) -> None:
    one = structures[name], tokenizers[name]
    functions = (Callee(name="get_weather", parameters=SCHEMA), Callee(name="now"))
    shape = Shape(calls=Calls(functions=functions, spelling=FORMATS[name].spelling, must=must))
    assert accepts(*one, shape, calls_text(name, [FINE]))
    assert accepts(*one, shape, calls_text(name, [FINE, FINE]))
    for bad in BAD[:4]:
        assert not accepts(*one, shape, calls_text(name, [bad])), bad
    assert not accepts(*one, shape, calls_text(name, [FINE]).replace("get_weather", "rm"))
    assert accepts(*one, shape, "just text 🦊 {") != must
    assert accepts(*one, shape, "text first" + calls_text(name, [FINE])) != must
    single = Shape(calls=Calls(functions=functions, spelling=FORMATS[name].spelling, must=must, many=False))
    assert accepts(*one, single, calls_text(name, [FINE]))
    assert not accepts(*one, single, calls_text(name, [FINE, FINE]))


def test_a_string_cannot_spell_what_ends_a_call(
    structures: dict[str, Structures], tokenizers: dict[str, Tokenizer]
) -> None:
    name = "deepseek-v3.1"
    spelling = FORMATS[name].spelling
    shape = Shape(calls=Calls(functions=(Callee(name="f"),), spelling=spelling, must=True))
    text = calls_text(name, [{"a": f"x{spelling.call_end}y"}]).replace("get_weather", "f")
    assert not accepts(structures[name], tokenizers[name], shape, text)


def test_hermes_calls(structures: dict[str, Structures], tokenizers: dict[str, Tokenizer]) -> None:
    one = structures["deepseek-v3.1"], tokenizers["deepseek-v3.1"]
    calls = Calls(functions=(Callee(name="f", parameters=SCHEMA),), spelling=HERMES_SPELLING, must=True)
    body = f'<tool_call>\n{{"name": "f", "arguments": {dumped(FINE)}}}\n</tool_call>'
    assert accepts(*one, Shape(calls=calls), body)
    assert accepts(*one, Shape(calls=calls), f"{body}\n{body}")
    assert not accepts(*one, Shape(calls=calls), body.replace('"C"', '"K"'))


def random_answer(structures: Structures, tokenizer: Tokenizer, shape: Shape, seed: int, most: int = 400) -> str:
    """Tokens drawn evenly from what is allowed, but for the end and closing marks, which are preferred."""
    random = np.random.default_rng(seed)
    mask = structures.make(shape).begin(vocab_size=400, end_ids=tokenizer.eos_ids)
    closing = {
        id for text in ('"', "}", "]", ">", "</think>") for id in tokenizer.encode(text, add_special_tokens=False)
    }
    ids: list[int] = []
    while len(ids) < most:
        choices = mask.allowed().nonzero()[0]
        ends = [token for token in choices if token in tokenizer.eos_ids]
        good = [token for token in choices if token in closing]
        token = int(random.choice(ends or good or choices) if random.random() < 0.5 else random.choice(choices))
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids, skip_special_tokens=False)
        ids.append(token)
        mask.accept(token)
    raise AssertionError("the answer has no end")


BOUNDED = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "hot": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 4},
    },
    "required": ["unit", "hot", "name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["deepseek-v3.1", "deepseek-v3.2", "deepseek-v4", "hermes"])
def test_whatever_a_model_says_the_parser_finds_the_calls(
    structures: dict[str, Structures], tokenizers: dict[str, Tokenizer], name: str
) -> None:
    home = name if name in structures else "deepseek-v4"
    spelling = FORMATS[name].spelling if name in FORMATS else HERMES_SPELLING
    calls = Calls(functions=(Callee(name="f", parameters=BOUNDED),), spelling=spelling, must=True, many=False)
    for seed in range(5):
        text = random_answer(structures[home], tokenizers[home], Shape(calls=calls), seed)
        parser = FORMATS[name].parser("") if name in FORMATS else StreamParser(HermesGrammar(), eos="")
        answer = gather(
            [*itertools.chain.from_iterable(parser.push(character) for character in text), *parser.finish()]
        )
        (one,) = answer.tool_calls
        assert (one.name, answer.content.strip()) == ("f", "")
        value = json.loads(one.arguments)
        assert set(value) == {"unit", "hot", "name"}
        assert value["unit"] in ("C", "F")
        assert isinstance(value["hot"], bool)


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "rule"),
    [
        (nested(MAX_DEPTH + 1), "nested deeper"),
        (nested(5000), "nested deeper"),
        ({"enum": ["x" * 200_000]}, "characters"),
        ({"enum": list(range(6000))}, "values"),
        ({"type": "string", "maxLength": MAX_COUNT + 1}, "maxLength"),
        ({"type": "array", "minItems": 10**12}, "minItems"),
        ({"$ref": "https://example.com/schema.json"}, "only references within"),
        ({"type": "string", "pattern": "a" * 1000}, "pattern of 1000"),
        ({"type": "string", "pattern": "(?=a)b"}, "look around"),
        ({"type": "string", "pattern": r"(a)\1"}, "references"),
        ({"type": "string", "pattern": "((a{50}){50}){50}"}, "repeats more"),
        ({"type": "string", "pattern": "a{999999999999}"}, "repeats more"),
        ({"patternProperties": {"(x{100}){100}": {}}}, "repeats more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_schema_that_could_burn_a_compiler_is_refused(schema: dict[str, object], rule: str) -> None:
    with pytest.raises(RequestError, match=rule) as refusal:
        check_schema(schema, "response_format")
    assert refusal.value.param == "response_format"


@pytest.mark.parametrize(
    "pattern", [r"^\d{4}-\d{2}-\d{2}$", "[a{9999}]b", r"\{9999}", "(a|b){2,30}", "x{,5}", "[]{99}]{3}"]
)
def test_an_honest_pattern_is_taken(pattern: str) -> None:
    check_pattern(pattern, "response_format")


def test_many_threads_share_one_process(structures: dict[str, Structures]) -> None:
    made: list[object] = []
    shapes = [Shape(json={"enum": [str(index % 3)]}) for index in range(12)]
    threads = [
        threading.Thread(target=lambda shape=shape: made.append(structures["deepseek-v4"].make(shape)))
        for shape in shapes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 12
    assert len(set(map(id, made))) == 3


def test_what_cannot_be_enforced_is_said(structures: dict[str, Structures], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be enforced"):
        structures["deepseek-v4"].make(Shape(json={"type": "no such type"}))
