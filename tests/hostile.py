"""What a stranger may hand to the parsers: damaged files, headers that lie, answers full of tags, cut anywhere.

A target takes one example and must end well or with an error of `daedal.errors`; anything else is a defect. The tests
beside the rooms run a few examples of each, `python -m tests.fuzz` as many as fit in some minutes.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

_NUMBERS = (0, 1, 2, 7, 127, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "I64", "U8", "BOOL", "F4", "C64", "", "float32")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """examples: what is given. check: takes one, and an empty directory of its own."""

    name: str
    examples: st.SearchStrategy[Any]
    check: Callable[[Any, Path], None]


@st.composite
def edited(draw: st.DrawFn, original: bytes, head: int) -> bytes:
    """`original` with some bytes replaced, put in, taken out or cut off, mostly among the first `head`."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 5))):
        reach = min(len(data), head) if draw(st.integers(0, 4)) else len(data)
        at = draw(st.integers(0, reach))
        kind = draw(st.sampled_from(("replace", "number", "insert", "remove", "cut")))
        if kind == "replace":
            new = draw(st.binary(min_size=1, max_size=4))
            data[at : at + len(new)] = new
        elif kind == "number":
            width = draw(st.sampled_from((4, 8)))
            data[at : at + width] = struct.pack("<Q", draw(st.sampled_from(_NUMBERS)))[:width]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 16))]
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


@st.composite
def lying_header(draw: st.DrawFn, original: bytes) -> bytes:
    """A safetensors file whose header is JSON and says something else of a tensor than the file holds."""
    (length,) = struct.unpack("<Q", original[:8])
    header: dict[str, Any] = json.loads(original[8 : 8 + length])
    names = sorted(header)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        entry = header.get(name)
        field = draw(st.sampled_from(("dtype", "shape", "data_offsets", "all", "gone", "renamed")))
        if field == "gone":
            header.pop(name, None)
        elif field == "renamed":
            header[draw(st.text(max_size=8))] = header.pop(name, {})
        elif field == "all" or not isinstance(entry, dict):
            header[name] = draw(JSON)
        else:
            numbers = st.lists(st.sampled_from(_NUMBERS), max_size=3)
            header[name] = {**entry, field: draw(st.sampled_from(_DTYPES) if field == "dtype" else numbers | JSON)}
    written = json.dumps(header).encode()
    stated = draw(st.sampled_from((len(written), len(written), len(written) + 8, *_NUMBERS)))
    return struct.pack("<Q", stated) + written + original[8 + length :]


@st.composite
def altered(draw: st.DrawFn, original: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with some of its fields gone, or of other values."""
    changed = dict(original)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(original)))
        if draw(st.booleans()):
            changed[name] = draw(JSON | st.sampled_from(_NUMBERS))
        else:
            changed.pop(name, None)
    return changed
