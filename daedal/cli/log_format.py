"""The log as lines of JSON, for machines that collect it. Knows nothing of what is logged."""

import json
import logging
from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

LogFormat = Literal["text", "json"]
LogFormatOption = Annotated[
    LogFormat, typer.Option(help="json: every line of the log is one object, and each request gets one.")
]
REQUESTS = "daedal.serve.request_log"


class JsonLines(logging.Formatter):
    """One object a record: time, level, logger, and its `fields`, or its message where it has none."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        told |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def use(chosen: LogFormat) -> None:
    """From now on the log of this process is of this format."""
    if chosen == "text":
        return
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())
    logging.getLogger(REQUESTS).setLevel(logging.INFO)
