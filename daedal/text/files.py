"""Reads the small JSON files that lie beside a checkpoint's weights. Knows nothing of what they mean.

Whatever is wrong with such a file ends in one sentence that names it: these files come from strangers.
"""

import json
from pathlib import Path

from daedal.errors import CheckpointError

MAX_FILE_BYTES = 2**28  # the largest published tokenizer.json files are a tenth of this


def read_text(path: Path) -> str:
    """The file's UTF-8 text; CheckpointError where it is absent, unreadable, far too large or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read: replace it with the published file"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, the checkpoint needs it: copy it beside the weights") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): fetch the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions"
        ) from error


def parse_object(text: str, path: Path) -> dict[str, object]:
    """The JSON object in `text`; `path` is only named in errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed: fetch the file again")
    return value


def read_optional(path: Path) -> dict[str, object]:
    """The JSON object in the file, or an empty one where there is no such file."""
    return parse_object(read_text(path), path) if path.is_file() else {}


def token_text(entry: object) -> str | None:
    """A special token as `tokenizer_config.json` spells it: a string, or an object with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
