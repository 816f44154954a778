"""The body of a request, read piece by piece up to a bound, as one strict JSON object.

Strict: no NaN or Infinity, no number beyond a float's range, no text that UTF-8 cannot hold. Knows nothing of fields.
"""

import asyncio
import json
import math
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request

from daedal.serve.state.errors import ApiError

MAX_BODY_BYTES = 8 * 2**20
DRAIN_BYTES = 8 * MAX_BODY_BYTES  # a client that still sends reads no answer, so some of its excess is taken
BODY_SECONDS = 60.0


async def read_object(request: Request) -> dict[str, object]:
    """The JSON object of a request; ApiError 400, 408 or 413 where there is none."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _read(request)
    except ClientDisconnect as error:
        raise ApiError(400, "the client left before its body was whole: send it again") from error
    except TimeoutError as error:
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:.0f} s: send it faster") from error
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply: send a flatter JSON object", code="invalid_json") from error
    except UnicodeEncodeError as error:
        sentence = "the body holds half of a surrogate pair: send text that UTF-8 can hold"
        raise ApiError(400, sentence, code="invalid_json") from error
    except ValueError as error:
        sentence = f"the body is not valid JSON ({error}): send one JSON object"
        raise ApiError(400, sentence, code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {_kind(value)}: send one JSON object", code="invalid_json")
    return value


async def _read(request: Request) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MAX_BODY_BYTES:
            pieces.append(piece)
        else:
            pieces.clear()
        if size > DRAIN_BYTES:
            break
    if size > MAX_BODY_BYTES:
        sentence = f"the body is larger than {MAX_BODY_BYTES} bytes: send less in one request"
        raise ApiError(413, sentence, code="body_too_large", headers={"Connection": "close"})
    return b"".join(pieces)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond the range of a number")
    return value


def _kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
