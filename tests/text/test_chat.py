"""Chat templates: the same text as transformers renders, and no template that runs away or breaks out."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from daedal.errors import CheckpointError, TemplateError
from daedal.text.chat import ChatTemplate
from daedal.text.sandbox import Limits

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|end|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message ~ "<|eot|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("Unknown role " + message.role) }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}
    {%- else %}
        {{- '<|head|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|end|>\\n\\n' }}
{%- endif %}"""
THINKING = """{%- macro text_of(content) %}
    {%- if content is string %}{{- content }}{%- else %}
        {%- for part in content %}{{- part.text if part.type == 'text' else '<|' ~ part.type ~ '|>' }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index0 > 5 %}{%- break %}{%- endif %}
    {%- set body = text_of(message.content) %}
    {%- if message.role == 'assistant' and '</think>' in body %}
        {%- set thought = body.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set body = body.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}{%- set body = '<think>' + thought + '</think>' + body %}{%- endif %}
    {%- endif %}
    {{- '<|im_start|>%s\\n' % message.role + '{}<|im_end|>'.format(body | replace('\\r', '')) ~ loop.revindex }}
    {%- for name, value in (message.extra or {}) | dictsort %}
        {{- name | upper }}={{ [value, loop.last] | join(',') }};
    {%- endfor %}
    {%- generation %}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }}
    {% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}
    {{- '<think></think>' }}
{%- endif %}"""

PLAIN = [{"role": "user", "content": "Hi <b>&'\"\n"}, {"role": "assistant", "content": " 你好 🦊 "}]
SYSTEM = [{"role": "system", "content": " Be brief. "}, *PLAIN, {"role": "user", "content": "Bye\r\n"}]
THOUGHT = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}], "extra": {"b": 2, "a": None}},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": ["<1>", 2.5, None, True]}}}]


@pytest.mark.parametrize(
    ("source", "messages", "variables"),
    [
        (CHATML, PLAIN, {}),
        (CHATML, SYSTEM, {"add_generation_prompt": False}),
        (HEADERS, PLAIN, {}),
        (HEADERS, SYSTEM, {"tools": TOOLS, "date_string": "1 May 2025"}),
        (
            HEADERS,
            [
                *PLAIN,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "é<"}}}],
                },
            ],
            {"add_generation_prompt": False},
        ),
        (THINKING, SYSTEM, {}),
        (THINKING, THOUGHT, {"enable_thinking": False}),
        (THINKING, PLAIN * 5, {}),
    ],
)
def test_the_text_is_what_transformers_renders(
    source: str, messages: list[dict[str, object]], variables: dict[str, object]
) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", chat_template=source)
    variables = {"add_generation_prompt": True} | variables
    expected = theirs.apply_chat_template(messages, tokenize=False, **variables)
    assert expected
    assert ChatTemplate(source, tokens={"bos_token": "<s>"}).render(messages, **variables) == expected


def test_the_default_models_own_template(smollm2: Path) -> None:
    text = ChatTemplate.load(smollm2).render([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def nested(update: str, *, start: str = "[1]", use: str = "") -> str:
    return f"{{% set ns=namespace(v={start}) %}}{{% for i in range(99) %}}{{% set ns.v={update} %}}{{% endfor %}}{use}"


RUNAWAYS = {
    "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested silent loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested printing loops": "{% for i in range(99999) %}{% for j in range(999) %}xy{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for x in [1,2] recursive %}{{ loop([1,2]) if loop.depth < 50 }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "text times a number": "{{ 'a' * 10**10 }}",
    "a number times a list": "{{ (10**9) * [messages] }}",
    "a power of powers": "{{ 9**(9**9) }}",
    "repeated squares": nested("ns.v * ns.v", start="7"),
    "text doubled by +": nested("ns.v + ns.v", start="'ab'"),
    "text doubled by ~": nested("ns.v ~ ns.v", start="'ab'"),
    "text doubled in a block": "{% set ns=namespace(v='ab') %}{% for i in range(99) %}{% set w %}{{ ns.v }}{{ ns.v }}"
    "{% endset %}{% set ns.v = w %}{% endfor %}",
    "lists shared in lists": nested("[ns.v, ns.v]", use="{{ ns.v }}"),
    "tuples shared in tuples": nested("(ns.v, ns.v)", use="{{ ns.v | string }}"),
    "dicts shared in dicts": nested("{'a': ns.v, 'b': ns.v}", use="{{ ns.v | tojson }}"),
    "dicts made by calls": nested("dict(a=ns.v, b=ns.v)", use="{{ ns.v | tojson }}"),
    "a block captured": "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
    "center as a filter": "{{ 'x' | center(10**9) }}",
    "center through map": "{{ ['x'] | map('center', 10**9) | list }}",
    "center as a block": "{% filter center(10**9) %}x{% endfilter %}",
    "center as a method": "{% set f = 'x'.center %}{{ f(10**9) }}",
    "a width after %": "{{ '%1000000000d' % 1 }}",
    "a computed width after %": "{{ '%*d' % (10**9, 1) }}",
    "a width in the filter format": "{{ '%1000000000d' | format(1) }}",
    "a width in format": "{{ '{:>1000000000}'.format(1) }}",
    "a computed width in format": "{{ '{:{}}'.format(1, 10**9) }}",
    "many fields in format": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "indent by a number": "{{ 'a\nb' | indent(10**9) }}",
    "indent by a text": "{{ ('a\n' * 99999) | indent('x' * 99999) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10**9) }}",
    "join as a method": "{{ ('x' * 99999).join('y' * 99999) }}",
    "join as a filter": "{{ ('y' * 99999) | join('x' * 99999) }}",
    "replace as a method": "{{ ('y' * 99999).replace('', 'x' * 99999) }}",
    "replace as a filter": "{{ ('y' * 99999) | replace('y', 'x' * 99999) }}",
    "tabs": "{{ '\t'.expandtabs(tabsize=10**9) }}",
    "translation": "{{ 'aaa'.translate({97: 'x' * 99999}) }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "a batch filled up": "{{ [1] | batch(10**9, 0) | list }}",
    "a slice of nothing": "{{ [1] | slice(10**9) | list }}",
    "a precision": "{{ 1.5 | round(10**9, 'ceil') }}",
    "a width of time": "{{ strftime_now('%1000000000d') }}",
    "elements of a long text": "{{ ('ab' * 10**6) | list }}",
    "slices of a long text": "{% set s='ab' * 10**6 %}{% for i in range(9999) %}{% set t=s[1:] %}{% endfor %}",
    "a long source": "x" * (2**18 + 1),
    "deep parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "deep blocks": "{% if x %}" * 9999 + "{% endif %}" * 9999,
}


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_runaway_template_is_stopped_by_its_work_not_by_the_clock(name: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(RUNAWAYS[name], limits=Limits(work=2**20, seconds=3600.0)).render(PLAIN)
    # Not stopped for some slip in the test itself.
    assert not any(error in str(caught.value) for error in ("TypeError", "ValueError", "Undefined", "Syntax"))
    assert len(str(caught.value)) < 700


def test_time_and_output_have_their_own_limits() -> None:
    loop = ChatTemplate("{% for i in range(99) %}{% endfor %}", limits=Limits(seconds=0.0))
    with pytest.raises(TemplateError, match="takes more than 0 s"):
        loop.render(PLAIN)
    with pytest.raises(TemplateError, match="renders more than 10 characters"):
        ChatTemplate("{{ messages[0].content * 3 }}", limits=Limits(output=10)).render(PLAIN)


BREAKOUTS = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'].__mro__ }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['__class__'] | map(attribute='__class__') | list }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ '%s'.format_map({}) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['os'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ self._TemplateReference__context }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__html__=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ lipsum(n=10**9) }}",
]


@pytest.mark.parametrize("source", BREAKOUTS)
def test_a_template_cannot_reach_python(source: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(TemplateError):
        template.render(PLAIN)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages are empty"),
        ("hi", "messages are empty or not a list"),
        ({"role": "user"}, "messages are empty or not a list"),
        (["hi"], r"messages\[0\] is a str: give an object with role and content"),
        ([*PLAIN, {"content": "x"}], r"messages\[2\]\.role is None: give a string"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\.role is 1"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is 3"),
        ([{"role": "user", "content": [{"x": object()}]}], r"messages\[0\] holds a object: give plain JSON data"),
        ([{"role": "user", "content": "x", 1: "y"}], "give strings as keys"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: object, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(CHATML).render(messages)  # type: ignore[arg-type]


def test_a_templates_own_refusal_and_failure_are_told() -> None:
    with pytest.raises(TemplateError, match="refuses these messages: Unknown role judge"):
        ChatTemplate(HEADERS).render([{"role": "judge", "content": "x"}])
    with pytest.raises(TemplateError, match="has no attribute 'nothing'"):
        ChatTemplate("{{ messages[0].nothing.at.all }}").render(PLAIN)
    with pytest.raises(TemplateError, match="cannot be compiled"):
        ChatTemplate("{% for %}")


def test_where_a_template_is_found(tmp_path: Path) -> None:
    def write(**config: object) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(TemplateError, match="has no chat template"):
        ChatTemplate.load(tmp_path)
    write(chat_template="one {{ bos_token }}", bos_token={"content": "<s>", "special": True})
    assert ChatTemplate.load(tmp_path).render(PLAIN) == "one <s>"
    write(chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}])
    assert ChatTemplate.load(tmp_path).render(PLAIN) == "two"
    write(chat_template=[{"name": "rag", "template": "no"}])
    with pytest.raises(TemplateError, match="are named rag"):
        ChatTemplate.load(tmp_path)
    write(chat_template=5)
    with pytest.raises(TemplateError, match="chat_template is a int"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("three\n")
    assert ChatTemplate.load(tmp_path).render(PLAIN) == "three"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ChatTemplate.load(tmp_path)
