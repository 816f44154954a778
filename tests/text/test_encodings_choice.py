"""Which chat format a checkpoint gets, and its way through a tokenizer: text to ids, ids to deltas."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from daedal.errors import CheckpointError, TemplateError
from daedal.text.chat import ChatFormat, TemplateFormat, load_format
from daedal.text.encodings.answers import Answer, gather
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    EOS,
    SEARCH_BEGIN,
    SYSTEM,
    THINK,
    THINK_END,
    USER,
)
from daedal.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
V3_TOKENS = (BOS, EOS, USER, ASSISTANT)
THOUGHTS = (THINK, THINK_END)
FIRST_ENCODER = "REASONING_EFFORT_MAX = ('Reasoning Effort: Absolute maximum with no shortcuts permitted.')"
LATER_ENCODER = FIRST_ENCODER + "\nOTHER = 'Reasoning Effort: Beyond maximum — exhaustive'"


def write(
    directory: Path,
    tokens: Iterable[str] = (),
    *,
    special: Iterable[str] = (BOS, EOS),
    encoder: str | None = None,
    template: str | None = None,
    **config: object,
) -> Path:
    """A checkpoint's small files: a tokenizer of bytes with these tokens added, and what else there is to go by."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in tokens])
    library.save(str(directory / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    (directory / "config.json").write_text(json.dumps(config))
    if encoder is not None:
        (directory / "encoding").mkdir()
        (directory / "encoding" / "encoding_dsv4.py").write_text(encoder, encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("model_type", "tokens", "name"),
    [
        ("deepseek_v4", FORMATS["deepseek-v4"].tokens, "deepseek-v4"),
        ("deepseek_v32", FORMATS["deepseek-v3.2"].tokens, "deepseek-v3.2"),
        ("deepseek_v3", V3_TOKENS, "deepseek-v3"),
        ("deepseek_v3", (*V3_TOKENS, *THOUGHTS, SEARCH_BEGIN), "deepseek-v3.1"),
    ],
)
def test_config_and_tokenizer_together_name_the_format(
    tmp_path: Path, model_type: str, tokens: tuple[str, ...], name: str
) -> None:
    format = load_format(write(tmp_path, tokens, model_type=model_type))
    assert format.name == name
    assert format.render(HELLO) == FORMATS[name].render(HELLO)
    assert not format.shows_special_tokens  # as in the published tokenizers, where tags are no special tokens


@pytest.mark.parametrize(
    ("model_type", "tokens", "message"),
    [
        ("deepseek_v4", V3_TOKENS, f"has no token {THINK}, deepseek-v4 needs it"),
        ("deepseek_v4", (*V3_TOKENS, *THOUGHTS), f"has no token {DSML}, deepseek-v4 needs it"),
        ("deepseek_v4", (*FORMATS["deepseek-v4"].tokens, SYSTEM), "which came with V4.1"),
        ("deepseek_v32", V3_TOKENS, f"has no token {THINK}, deepseek-v3.2 needs it"),
        ("deepseek_v3", (BOS, EOS), f"has no token {USER}, deepseek-v3 needs it"),
        ("deepseek_v3", (*V3_TOKENS, *THOUGHTS), "fits deepseek-v3 and deepseek-r1: put chat_template.jinja there"),
        ("deepseek_v41", FORMATS["deepseek-v4"].tokens, "its model_type 'deepseek_v41' names no chat format"),
        ("llama", V3_TOKENS, "has no chat template, and its model_type 'llama'"),
        (None, (), "has no chat template"),
    ],
)
def test_nothing_is_guessed(tmp_path: Path, model_type: str | None, tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        load_format(write(tmp_path, tokens, model_type=model_type))


def test_a_format_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, FORMATS["deepseek-v4"].tokens, model_type="deepseek_v3", template="{{ messages }}")
    for name, format in FORMATS.items():
        chosen = load_format(tmp_path, chat_format=name)
        assert chosen.render(HELLO) == format.render(HELLO)
    with pytest.raises(TemplateError, match=f"'deepseek-v5' is unknown: name one of {', '.join(FORMATS)}"):
        load_format(tmp_path, chat_format="deepseek-v5")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TemplateError, match="has no token"):
        load_format(tmp_path, chat_format="deepseek-v3")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_format(tmp_path)


@pytest.mark.parametrize(
    ("encoder", "name", "levels"),
    [
        (FIRST_ENCODER, "deepseek-v4", ("high", "max")),
        (LATER_ENCODER, "deepseek-v4-0731", ("low", "high", "max")),
        (None, "deepseek-v4", ()),
        ("raise SystemExit  # of another model", "deepseek-v4", ()),
    ],
)
def test_levels_of_effort_are_those_of_the_encoder_beside_the_weights(
    tmp_path: Path, encoder: str | None, name: str, levels: tuple[str, ...]
) -> None:
    format = load_format(write(tmp_path, FORMATS["deepseek-v4"].tokens, encoder=encoder, model_type="deepseek_v4"))
    assert format.name == name
    for level in levels:
        assert format.render(HELLO, effort=level) == FORMATS[name].render(HELLO, effort=level)
    if not levels:
        with pytest.raises(TemplateError, match="cannot be told without its encoding"):
            format.render(HELLO, effort="max")
    assert format.render(HELLO) == FORMATS[name].render(HELLO)


SAYS = "{{ messages[0].content }}|{{ tools }}|{{ thinking }}|{{ enable_thinking }}|{{ reasoning_effort }}"


def test_a_checkpoints_own_template_comes_first(tmp_path: Path) -> None:
    format = load_format(write(tmp_path, FORMATS["deepseek-v4"].tokens, template=SAYS, model_type="deepseek_v4"))
    assert isinstance(format, TemplateFormat)
    assert format.render(HELLO) == "Hello|None|||"
    assert format.render(HELLO, thinking=False) == "Hello|None|False|False|"
    assert format.render(HELLO, tools=[], thinking=True, effort="low") == "Hello|None|True|True|low"
    assert "&#39;" not in format.render(HELLO, tools=[TOOL])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": [TOOL]}, "does not read tools: describe them in the system message"),
        ({"thinking": True}, "does not read thinking: leave thinking out"),
        ({"effort": "max"}, "does not read effort: leave effort out"),
    ],
)
def test_a_template_is_not_told_what_it_does_not_read(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    format = load_format(write(tmp_path, template="{{ messages[0].content }}"))
    assert format.render(HELLO, thinking=False, tools=None) == "Hello"
    with pytest.raises(TemplateError, match=message):
        format.render(HELLO, **settings)


DSML_CALL = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}invoke>\n</{DSML}tool_calls>'
V3_CALL = f"{CALLS_BEGIN}{CALL_BEGIN}function{CALL_SEPARATOR}f\n```json\n{{}}\n```{CALL_END}{CALLS_END}"
V31_CALL = f"{CALLS_BEGIN}{CALL_BEGIN}f{CALL_SEPARATOR}{{}}{CALL_END}{CALLS_END}"


@pytest.mark.parametrize(
    ("template", "tokens", "call", "reads_thoughts", "reads_calls"),
    [
        (f"{{# {DSML} {THINK_END} #}}", (), DSML_CALL, True, True),
        (f"{{# {CALLS_BEGIN} ```json {THINK_END} #}}", (), V3_CALL, True, True),
        (f"{{# {CALLS_BEGIN} #}}", (), V31_CALL, False, True),
        (f"{{# {CALLS_BEGIN} #}}", THOUGHTS, V31_CALL, True, True),
        ("plain", (), DSML_CALL, False, False),
    ],
)
def test_a_templates_answers_are_parsed_by_the_markers_in_it(
    tmp_path: Path, template: str, tokens: tuple[str, ...], call: str, reads_thoughts: bool, reads_calls: bool
) -> None:
    format = load_format(write(tmp_path, tokens, template=template))
    parser = format.parser(f"{ASSISTANT}{THINK}\n")
    text = f"\nhm\n{THINK_END}\n\nyes{call}{EOS}"
    answer = gather([*parser.push(text), *parser.finish()])
    assert len(answer.tool_calls) == reads_calls
    assert answer.reasoning == ("hm" if reads_thoughts else "")
    assert answer.content == ("" if reads_thoughts else f"\nhm\n{THINK_END}\n\n") + "yes" + (
        "" if reads_calls else call
    )


def through_ids(format: ChatFormat, tokenizer: Tokenizer, prompt: str, text: str) -> Answer:
    """The answer as a server reads it: its text becomes ids, and each id's text goes to the parser."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    parser = format.parser(prompt)
    detokenizer = tokenizer.detokenizer()
    deltas = [delta for id in ids for delta in parser.push(detokenizer.push(id))]
    return gather([*deltas, *parser.push(detokenizer.finish()), *parser.finish()])


def test_ids_become_deltas(tmp_path: Path) -> None:
    directory = write(tmp_path, FORMATS["deepseek-v4"].tokens, model_type="deepseek_v4")
    format, tokenizer = load_format(directory), Tokenizer.load(directory)
    prompt = format.render(HELLO, tools=[TOOL])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.token_text(ids[-1]) == THINK
    arguments = {"city": "Zürich 🦊", "n": [1, None]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    turn = {"role": "assistant", "content": "你好", "reasoning_content": "hm …", "tool_calls": [call]}
    answer = format.render([*HELLO, turn], tools=[TOOL]).removeprefix(prompt)
    read = through_ids(format, tokenizer, prompt, answer)
    assert (read.reasoning, read.content, read.tool_calls[0].name) == ("hm …", "你好", "f")
    assert json.loads(read.tool_calls[0].arguments) == arguments


def test_hidden_tags_ask_for_visible_special_tokens(tmp_path: Path) -> None:
    tokens = FORMATS["deepseek-v4"].tokens
    directory = write(tmp_path, tokens, special=(BOS, EOS, THINK_END), model_type="deepseek_v4")
    assert load_format(directory).shows_special_tokens
    directory = write(tmp_path, (*V3_TOKENS, *THOUGHTS), special=(THINK_END,), template=THINK_END)
    assert load_format(directory).shows_special_tokens
    directory = write(tmp_path, (*V3_TOKENS, *THOUGHTS), template=THINK_END)
    assert not load_format(directory).shows_special_tokens
