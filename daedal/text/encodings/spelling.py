"""How each family spells a block of tool calls, as data: what a grammar must know to hold a model to the spelling.

The parsers (`dsml_stream`, `token_calls`, `hermes`) read far more than this; what is written here is the one spelling
that the formats themselves render. Knows nothing of grammars.
"""

from dataclasses import dataclass
from typing import Literal

from daedal.text.encodings.dsml import INVOKE, V4_BLOCK, V32_BLOCK
from daedal.text.encodings.hermes import HERMES_BEGIN, HERMES_END
from daedal.text.encodings.tokens import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END, DSML


@dataclass(frozen=True, kw_only=True)
class CallSpelling:
    """One block: `lead`, `begin`, calls with `between` among them, `end`. A call: `before_name`, its name,
    `after_name`, arguments, `call_end`. begin: also what a model that may call begins a block with, after any text.
    arguments: one JSON object, or DSML parameters."""

    begin: str
    before_name: str
    after_name: str
    call_end: str
    end: str
    between: str = ""
    lead: str = ""
    arguments: Literal["json", "dsml"] = "json"


def _dsml(block: str) -> CallSpelling:
    return CallSpelling(
        lead="\n\n",
        begin=f"<{DSML}{block}>",
        before_name=f'\n<{INVOKE} name="',
        after_name='">\n',
        call_end=f"</{INVOKE}>",
        end=f"\n</{DSML}{block}>",
        arguments="dsml",
    )


V32_SPELLING = _dsml(V32_BLOCK)
V4_SPELLING = _dsml(V4_BLOCK)
V3_SPELLING = CallSpelling(
    begin=CALLS_BEGIN,
    before_name=f"{CALL_BEGIN}function{CALL_SEPARATOR}",
    after_name="\n```json\n",
    call_end=f"\n```{CALL_END}",
    end=CALLS_END,
    between="\n",
)
V31_SPELLING = CallSpelling(
    begin=CALLS_BEGIN, before_name=CALL_BEGIN, after_name=CALL_SEPARATOR, call_end=CALL_END, end=CALLS_END
)
HERMES_SPELLING = CallSpelling(
    begin="",
    before_name=f'{HERMES_BEGIN}\n{{"name": "',
    after_name='", "arguments": ',
    call_end=f"}}\n{HERMES_END}",
    end="",
    between="\n",
)
