"""What the server's answers look like, as JSON schemas for its OpenAPI document: one table of names and schemas.

Written by hand, and held to what is really answered by tests that validate every answer with them. Fields that only
some answers have are listed after those that all have. Knows nothing of paths.
"""

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def of(*values: str | None) -> Schema:
    """One of these strings, or null."""
    return {"enum": list(values)}


def several(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def fields(always: Mapping[str, Schema], sometimes: Mapping[str, Schema] | None = None) -> Schema:
    """An object. Others than these fields do not occur."""
    return {
        "type": "object",
        "properties": {**always, **(sometimes or {})},
        "required": list(always),
        "additionalProperties": False,
    }


_ERROR = {"message": TEXT, "type": TEXT, "param": nullable(TEXT), "code": nullable(TEXT)}
_COST = {"cost": NUMBER, "cost_details": ANY_OBJECT}
_FINISH = of("stop", "length", "tool_calls", "cancelled")
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": several(COUNT)}
_CHAT_LOGPROBS = fields(
    {
        "content": several(fields({**_TOKEN, "top_logprobs": several(fields(_TOKEN))})),
        "refusal": {"type": "null"},
    }
)
_COMPLETION_LOGPROBS = fields(
    {
        "tokens": several(TEXT),
        "token_logprobs": several(nullable(NUMBER)),
        "top_logprobs": several(nullable(ANY_OBJECT)),
        "text_offset": several(COUNT),
        "bytes": several(several(COUNT)),
    }
)
_CALL = fields(
    {"id": TEXT, "type": of("function"), "function": fields({"name": TEXT, "arguments": TEXT})},
)
_HEAD = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT}

ANSWERS: dict[str, Schema] = {
    "Error": fields({"error": fields(_ERROR)}),
    "MessagesError": fields({"type": of("error"), "error": fields(_ERROR)}),
    "Usage": fields(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": fields({"cached_tokens": COUNT}),
            "prompt_cache_hit_tokens": COUNT,
            "prompt_cache_miss_tokens": COUNT,
            "completion_tokens_details": fields({"reasoning_tokens": COUNT}),
        },
        _COST,
    ),
    "ChatCompletion": fields(
        {
            **_HEAD,
            "object": of("chat.completion"),
            "choices": several(
                fields(
                    {
                        "index": COUNT,
                        "message": fields(
                            {
                                "role": of("assistant"),
                                "content": nullable(TEXT),
                                "refusal": {"type": "null"},
                                "reasoning_content": nullable(TEXT),
                            },
                            {"tool_calls": several(_CALL)},
                        ),
                        "logprobs": nullable(_CHAT_LOGPROBS),
                        "finish_reason": _FINISH,
                    }
                )
            ),
            "usage": named("Usage"),
        }
    ),
    "Completion": fields(
        {
            **_HEAD,
            "object": of("text_completion"),
            "choices": several(
                fields(
                    {"index": COUNT, "text": TEXT, "logprobs": nullable(_COMPLETION_LOGPROBS), "finish_reason": _FINISH}
                )
            ),
            "usage": named("Usage"),
        }
    ),
    "Response": fields(
        {
            "id": TEXT,
            "object": of("response"),
            "created_at": COUNT,
            "status": of("completed", "incomplete", "failed", "in_progress"),
            "background": {"const": False},
            "error": nullable(fields({"code": TEXT, "message": TEXT})),
            "incomplete_details": nullable(fields({"reason": TEXT})),
            "instructions": nullable(TEXT),
            "max_output_tokens": nullable({"type": "integer"}),
            "metadata": {"type": "object", "additionalProperties": TEXT},
            "model": TEXT,
            "output": several(
                {
                    "type": "object",
                    "properties": {"id": TEXT, "type": of("reasoning", "message", "function_call"), "status": TEXT},
                    "required": ["id", "type", "status"],
                }
            ),
            "parallel_tool_calls": FLAG,
            "previous_response_id": nullable(TEXT),
            "reasoning": fields({"effort": nullable(TEXT), "summary": {"type": "null"}}),
            "store": FLAG,
            "temperature": NUMBER,
            "text": ANY_OBJECT,
            "tool_choice": {"type": ["string", "object"]},
            "tools": several(ANY_OBJECT),
            "top_p": NUMBER,
            "truncation": of("disabled"),
            "usage": nullable(
                fields(
                    {
                        "input_tokens": COUNT,
                        "input_tokens_details": fields({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
                        "output_tokens": COUNT,
                        "output_tokens_details": fields({"reasoning_tokens": COUNT}),
                        "total_tokens": COUNT,
                    },
                    _COST,
                )
            ),
        }
    ),
    "DeletedResponse": fields({"id": TEXT, "object": of("response"), "deleted": {"const": True}}),
    "InputTokens": fields({"object": of("response.input_tokens"), "input_tokens": COUNT}),
    "MessagesAnswer": fields(
        {
            "id": TEXT,
            "type": of("message"),
            "role": of("assistant"),
            "model": TEXT,
            "content": several(
                {
                    "type": "object",
                    "properties": {"type": of("thinking", "text", "tool_use")},
                    "required": ["type"],
                }
            ),
            "stop_reason": of("end_turn", "max_tokens", "tool_use", "stop_sequence", None),
            "stop_sequence": nullable(TEXT),
            "usage": fields(
                {
                    "input_tokens": COUNT,
                    "cache_creation_input_tokens": COUNT,
                    "cache_read_input_tokens": COUNT,
                    "output_tokens": COUNT,
                },
                _COST,
            ),
        }
    ),
    "MessagesCount": fields({"input_tokens": COUNT}),
    "Tokens": fields(
        {
            "count": COUNT,
            "max_model_len": COUNT,
            "tokens": several(COUNT),
            "token_strs": nullable(several(TEXT)),
        }
    ),
    "Text": fields({"prompt": TEXT}),
    "Model": fields(
        {"id": TEXT, "object": of("model"), "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT},
    ),
    "Models": fields({"object": of("list"), "data": several(named("Model"))}),
    "Health": fields({"status": of("ok", "starting", "restarting", "stopped")}),
    "Ready": fields({"ready": FLAG}),
    "Numbers": ANY_OBJECT,
}
