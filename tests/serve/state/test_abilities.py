"""What the page may offer is what the chat format takes."""

import pytest

from daedal.serve.state.abilities import LEVELS, abilities
from daedal.text.chat import ChatFormat, ChatTemplate, TemplateFormat
from daedal.text.encodings.formats import FORMATS

PLAIN = "{{ messages[0].content }}"
READS_ALL = PLAIN + "{% if enable_thinking %}{{ reasoning_effort }}{% endif %}{{ tools }}"


def template(source: str) -> ChatFormat:
    return TemplateFormat(template=ChatTemplate(source))


@pytest.mark.parametrize(
    ("format", "thinks", "efforts", "tools"),
    [
        (None, [], [], False),
        (FORMATS["deepseek-v3"], [False], [], False),
        (FORMATS["deepseek-r1"], [True], [], False),
        (FORMATS["deepseek-v3.1"], [True, False], [], True),
        (FORMATS["deepseek-v4"], [True, False], ["high", "max"], True),
        (FORMATS["deepseek-v4-0731"], [True, False], ["low", "high", "max"], True),
        (template(PLAIN), [False], [], False),
        (template(READS_ALL), [True, False], list(LEVELS), True),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_abilities(format: ChatFormat | None, thinks: list[bool], efforts: list[str], tools: bool) -> None:
    assert abilities(format) == {"thinks": thinks, "efforts": efforts, "tools": tools}
