"""One JSON value by its schema, in llguidance's dialect of Lark.

White space between tokens is bounded: a model that writes nothing else would never end. Strings hold their characters
as they are, without general `\\u` escapes, which could spell half of a surrogate pair. Knows nothing of what is around
the value.
"""

import json

_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


def json_value(schema: object) -> str:
    """The rule's body. A schema's own wishes for this dialect are put aside."""
    told = schema if isinstance(schema, dict) else {} if schema is True else {"not": {}}
    return f"%json {json.dumps({**told, 'x-guidance': _OPTIONS})}"
