"""From a chat request to the rule that its answer must obey, if any: `response_format`, `tool_choice`, strict tools.

Without such a wish an answer is free, its tool calls too: models are trained to write them, and a rule costs time. What
cannot be enforced is refused with the field that asks for it. Knows nothing of grammars.
"""

from daedal.serve.api.chat_protocol import ChatBody
from daedal.serve.api.prompt import Prompt
from daedal.serve.state.errors import ApiError
from daedal.text.chat import ChatFormat, TemplateFormat
from daedal.text.encodings.stream import starts_in_thought
from daedal.text.encodings.tokens import THINK_END
from daedal.text.structure.shape import Callee, Calls, Shape


def rule_of(body: ChatBody, format: ChatFormat, prompt: Prompt) -> Shape | None:
    """The rule; None for a free answer. ApiError 400 where calls are to be held to a spelling that is not known."""
    schema = None if body.response_format is None else body.response_format.schema_of_answer
    calls = _calls(body, format, is_json=schema is not None)
    if schema is None and calls is None:
        return None
    if body.ignore_eos:
        raise ApiError(400, "ignore_eos is true, and the answer has a form that ends: leave it out", param="ignore_eos")
    in_thought = starts_in_thought(prompt.opening)
    # A template may leave it to the model to open a thought, a DeepSeek format never does.
    chooses = isinstance(format, TemplateFormat) and format.thoughts and prompt.text == prompt.opening
    may_think = chooses and not prompt.opening.rstrip("\n").endswith(THINK_END)
    return Shape(
        json=schema,
        calls=calls,
        thought="open" if in_thought else "may" if may_think else "none",
        gap=format.trims,
    )


def _calls(body: ChatBody, format: ChatFormat, *, is_json: bool) -> Calls | None:
    functions = body.callable_tools
    strict = any(function.strict for function in functions)
    single = body.parallel_tool_calls is False
    if not functions or not (body.must_call or strict or single or is_json):
        return None
    if format.spelling is None:
        param = "tool_choice" if body.must_call else "parallel_tool_calls" if single else "tools"
        sentence = f"{param} asks for tool calls of one form, and how this model's chat template writes them is unknown"
        raise ApiError(400, f"{sentence}: leave it out", param=param, code="unsupported_parameter")
    return Calls(
        functions=tuple(
            Callee(name=function.name, parameters=function.parameters if function.strict or body.must_call else None)
            for function in functions
        ),
        spelling=format.spelling,
        must=body.must_call,
        many=not single,
    )
