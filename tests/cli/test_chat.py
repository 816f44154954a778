"""`daedal chat`: what is asked of the engine turn by turn, and what reaches the terminal. The engine is a stand-in."""

import io
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from daedal.cli import app, chat
from daedal.cli.opening import Opened
from daedal.errors import RequestError, TemplateError
from daedal.infer.request import Output, Request
from daedal.text.encodings.formats import V4
from daedal.text.encodings.stream import StreamParser
from daedal.text.encodings.tokens import DSML, EOS, THINK_END
from tests.tiny import tiny_checkpoint

KV_BYTES = 4096


class _Tokenizer:
    """One token per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


class _Plain:
    """A chat format without thoughts."""

    shows_special_tokens = False

    def render(
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool,
        thinking: bool | None,
        effort: str | None,
    ) -> str:
        assert add_generation_prompt
        assert thinking is effort is None
        return "".join(f"{message['role'][0]}:{message['content']};" for message in messages) + "a:"

    def parser(self, prompt: str, *, calls: bool) -> StreamParser:
        return StreamParser(None, thoughts=False)


@dataclass
class _Engine:
    """Answers every prompt with `answer`, a character a step, as the real one would."""

    answer: str = "yes"
    max_context: int = 64
    requests: list[Request] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    cancelled: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self.left) or self.cancelled

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.left = list(self.answer[: request.params.max_tokens])

    def cancel(self, request_id: str) -> bool:
        assert request_id == self.requests[-1].id
        self.left, self.cancelled = [], True
        return True

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(kv_bytes_used=KV_BYTES if self.left else 0)

    def step(self) -> list[Output]:
        name = self.requests[-1].id
        if self.cancelled:
            self.cancelled = False
            return [Output(request_id=name, text="", finish_reason="cancelled")]
        text = self.left.pop(0)
        return [Output(request_id=name, ids=[ord(text)], text=text, finish_reason=None if self.left else "stop")]


def _conversation(
    engine: _Engine, *, system: str | None = None, format: object = None, **wishes: Any
) -> chat.Conversation:
    opened = SimpleNamespace(
        name="m", engine=engine, tokenizer=_Tokenizer(), chat_format=format or _Plain(), model=None, without_chat=None
    )
    wishes = {"temperature": 0.0, "top_p": 1.0, "max_tokens": None, "seed": 3, **wishes}
    return chat.Conversation(cast("Opened", opened), chat.Wishes(**wishes), system)


def _prompts(engine: _Engine) -> list[str]:
    return ["".join(map(chr, request.prompt)) for request in engine.requests]


def test_each_turn_carries_what_was_said_until_cleared() -> None:
    engine = _Engine()
    conversation = _conversation(engine, system="be kind")
    pieces: list[str] = []
    costs = [conversation.answer(message, pieces.append, lambda: False) for message in ("hi", "ho")]
    conversation.clear()
    conversation.answer("ha", pieces.append, lambda: False)
    assert _prompts(engine) == ["s:be kind;u:hi;a:", "s:be kind;u:hi;a:yes;u:ho;a:", "s:be kind;u:ha;a:"]
    assert pieces == list("yes" * 3)
    assert [(cost.tokens, cost.kv_bytes, cost.stopped) for cost in costs] == [(3, KV_BYTES, False)] * 2
    assert len({request.id for request in engine.requests}) == 3


def test_an_answer_may_be_as_long_as_the_context_or_as_asked() -> None:
    engine = _Engine(max_context=20)
    _conversation(engine).answer("hi", str, lambda: False)
    _conversation(engine, max_tokens=2).answer("hi", str, lambda: False)
    length = len("u:hi;a:")
    assert [request.params.max_tokens for request in engine.requests] == [20 - length, 2]


def test_a_message_that_does_not_fit_is_refused_and_forgotten() -> None:
    engine = _Engine(max_context=12)
    conversation = _conversation(engine)
    with pytest.raises(RequestError, match=r"has 13 tokens, the context is 12: .* /clear"):
        conversation.answer("too long", str, lambda: False)
    conversation.answer("hi", str, lambda: False)
    assert _prompts(engine) == ["u:hi;a:"]


def test_stopping_cancels_and_keeps_what_was_said() -> None:
    engine = _Engine(answer="yesterday")
    conversation = _conversation(engine)
    pieces: list[str] = []
    cost = conversation.answer("hi", pieces.append, lambda: len(pieces) >= 3)
    assert (cost.tokens, cost.stopped, "".join(pieces)) == (3, True, "yes")
    assert str(cost).endswith(" · stopped")
    assert not engine.has_work
    conversation.answer("ho", str, lambda: False)
    assert _prompts(engine)[-1] == "u:hi;a:yes;u:ho;a:"


def test_without_a_template_there_is_no_chat() -> None:
    opened = SimpleNamespace(
        name="m", engine=None, tokenizer=None, chat_format=None, model=None, without_chat="m has no template: serve it"
    )
    wishes = chat.Wishes(temperature=0.0, top_p=1.0, max_tokens=None, seed=None)
    with pytest.raises(TemplateError, match="m has no template: serve it"):
        chat.Conversation(cast("Opened", opened), wishes, None)


def test_thoughts_are_told_apart_and_kept_for_the_format_to_decide() -> None:
    engine = _Engine(answer=f"hm<{THINK_END}yes\n{EOS}", max_context=2000)
    conversation = _conversation(engine, format=V4, effort="max")
    answered: list[str] = []
    thought: list[str] = []
    for message in ("hi", "ho"):
        cost = conversation.answer(message, answered.append, lambda: False, thought.append)
        assert cost.tokens == len(engine.answer)
    assert ("".join(answered), "".join(thought)) == ("yes\nyes\n", "hm<hm<")
    first = {"role": "user", "content": "hi"}
    past = {"role": "assistant", "content": "yes\n", "reasoning_content": "hm<"}
    messages = [first, past, {"role": "user", "content": "ho"}]
    assert _prompts(engine)[-1] == V4.render(messages, effort="max")
    assert [request.params.skip_special_tokens for request in engine.requests] == [False, False]


def test_what_stopped_within_a_thought_is_a_thought() -> None:
    engine = _Engine(answer=f"hm, so{THINK_END}yes", max_context=500)
    conversation = _conversation(engine, format=V4)
    thought: list[str] = []
    cost = conversation.answer("hi", pytest.fail, lambda: len(thought) >= 2, thought.append)
    assert (cost.stopped, "".join(thought)) == (True, "hm")
    without = _conversation(engine, format=V4, thinking=False)
    answered: list[str] = []
    without.answer("hi", answered.append, lambda: len(answered) >= 2)
    assert "".join(answered) == "hm"
    assert _prompts(engine)[-1] == V4.render([{"role": "user", "content": "hi"}], thinking=False)


@pytest.mark.parametrize(
    ("wishes", "message"), [({"effort": "low"}, "knows high, max"), ({"effort": "", "thinking": True}, "knows high")]
)
def test_what_the_format_cannot_do_is_said_before_the_first_message(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        _conversation(_Engine(), format=V4, **wishes)


def test_a_call_is_text_where_nobody_could_answer_it() -> None:
    call = f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}invoke>\n</{DSML}tool_calls>'
    answered: list[str] = []
    _conversation(_Engine(answer=THINK_END + call, max_context=500), format=V4).answer(
        "hi", answered.append, lambda: False
    )
    assert "".join(answered) == call


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_an_unknown_chat_format_is_a_mistake(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_checkpoint(tmp_path / "m")
    port = ["--port", "0"] if verb == "serve" else []
    for name, message in (("deepseek-v5", "'deepseek-v5' is unknown"), ("deepseek-v4", "has no token")):
        assert app.run([verb, str(directory), "--chat-format", name, *port]) == 2
        captured = capsys.readouterr()
        assert message in captured.err.splitlines()[-1]
        assert captured.out == ""


def test_a_pipe_gets_one_line_per_answer(capsys: pytest.CaptureFixture[str]) -> None:
    engine = _Engine(answer="a\n\nb")
    chat._with_pipe(_conversation(engine), io.StringIO("hi\n\n/clear\nho\n"))
    captured = capsys.readouterr()
    assert captured.out == "a b\na b\n"
    assert [line.split(" · ")[0] for line in captured.err.splitlines()] == ["4 tokens", "4 tokens"]
    assert _prompts(engine) == ["u:hi;a:", "u:ho;a:"]


def test_a_person_talks_clears_and_leaves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["hi", KeyboardInterrupt(), "/clear", "/help", "x" * 80, "", "ho", EOFError()])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    engine = _Engine(answer="ok\x1b[2J")
    chat._with_person(_conversation(engine))
    captured = capsys.readouterr()
    assert _prompts(engine) == ["u:hi;a:", "u:ho;a:"]
    assert "\x1b" not in captured.out
    assert captured.out.startswith("ok\N{REPLACEMENT CHARACTER}[2J\n")
    assert "/help is not a command" in captured.err
    assert "the context is 64" in captured.err


def test_a_person_sees_thoughts_dimmed_and_the_answer_after_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["hi", EOFError()])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    chat._with_person(_conversation(_Engine(answer=f"h\x1bm{THINK_END}[b]yes", max_context=500), format=V4))
    out = capsys.readouterr().out
    dimmed = "".join(f"\x1b[2m{character}\x1b[0m" for character in "h\N{REPLACEMENT CHARACTER}m")
    assert out.startswith(f"{dimmed}\n\n[b]yes\n")


def test_the_first_interrupt_stops_the_answer_and_the_second_the_program() -> None:
    before = signal.getsignal(signal.SIGINT)
    with chat.interrupt_flag() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
