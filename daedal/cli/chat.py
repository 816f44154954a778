"""`daedal chat`: a conversation in the terminal. Answers stream; the last line of each says what it cost.

Reads one message a line: from a person, who has /clear and Ctrl-C, or from a pipe, which gets one answer per line and
nothing else on stdout. Knows nothing of how tokens are made.
"""

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from daedal.cli.opening import (
    DEFAULT_MODEL,
    CacheOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    Limits,
    ModelArgument,
    Opened,
    open_model,
    say,
)
from daedal.cli.units import in_bytes
from daedal.errors import DaedalError, RequestError, TemplateError

if TYPE_CHECKING:
    from types import FrameType

    from daedal.infer.request import Output

# A model's text may hold escape sequences; on a terminal they would be obeyed.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def command(
    model: ModelArgument = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 0.9,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; what the context holds if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats the conversation's draws.")] = None,
    cache_gb: CacheOption = None,
    max_context: ContextOption = None,
) -> None:
    """Talk with a model in the terminal."""
    limits = Limits(cache_gb=cache_gb, max_context=max_context, max_batch=1)
    opened = open_model(model, device=device, dtype=dtype, limits=limits)
    wishes = Wishes(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    conversation = Conversation(opened, wishes, system)
    if sys.stdin.isatty():
        _with_person(conversation)
    else:
        _with_pipe(conversation, sys.stdin)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How to draw answers; see SamplingParams."""

    temperature: float
    top_p: float
    max_tokens: int | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one answer cost. kv_bytes: the most that the cache held for it."""

    tokens: int
    seconds: float
    kv_bytes: int
    stopped: bool

    def __str__(self) -> str:
        speed = f"{self.tokens / self.seconds:.1f} tokens/s" if self.seconds > 0 else "at once"
        words = [f"{self.tokens} tokens", speed, f"{in_bytes(self.kv_bytes)} of KV cache"]
        return " · ".join([*words, "stopped"] if self.stopped else words)


class Conversation:
    """Messages so far, and the engine that answers them."""

    def __init__(self, opened: Opened, wishes: Wishes, system: str | None):
        if opened.template is None:
            raise TemplateError(opened.without_chat or f"{opened.name} has no chat template: use `daedal serve`")
        self._engine = opened.engine
        self._tokenizer = opened.tokenizer
        self._template = opened.template
        self._wishes = wishes
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._answers = 0

    def clear(self) -> None:
        """Forgets everything said, but not the system message."""
        self._messages = list(self._opening)

    def answer(self, message: str, write: Callable[[str], object], stopped: Callable[[], bool]) -> Cost:
        """Answers `message`, handing on text as it comes, until done or `stopped`. RequestError: it does not fit."""
        from daedal.infer.request import Request, SamplingParams

        asked = [*self._messages, {"role": "user", "content": message}]
        rendered = self._template.render(asked, add_generation_prompt=True)
        prompt = tuple(self._tokenizer.encode(rendered, add_special_tokens=False))
        room = self._engine.max_context - len(prompt)
        if room < 1:
            length = f"the conversation has {len(prompt)} tokens, the context is {self._engine.max_context}"
            raise RequestError(f"{length}: say less, or start anew with /clear")
        params = SamplingParams(
            max_tokens=room if self._wishes.max_tokens is None else min(room, self._wishes.max_tokens),
            temperature=self._wishes.temperature,
            top_p=self._wishes.top_p,
            seed=self._wishes.seed,
        )
        self._answers += 1
        request = Request(id=f"answer-{self._answers}", prompt=prompt, params=params)
        pieces: list[str] = []
        began = time.perf_counter()
        tokens = kv_bytes = 0
        self._engine.add(request)
        for output in self._outputs(request.id, stopped):
            tokens += len(output.ids)
            kv_bytes = max(kv_bytes, self._engine.stats().kv_bytes_used)
            if output.text:
                pieces.append(output.text)
                write(output.text)
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        return Cost(tokens=tokens, seconds=time.perf_counter() - began, kv_bytes=kv_bytes, stopped=stopped())

    def _outputs(self, request_id: str, stopped: Callable[[], bool]) -> "Iterator[Output]":
        while self._engine.has_work:
            if stopped():
                self._engine.cancel(request_id)
            yield from (output for output in self._engine.step() if output.request_id == request_id)


def _with_person(conversation: Conversation) -> None:
    import readline  # noqa: F401  gives `input` a history and line editing

    say("Enter sends, Ctrl-C stops an answer, /clear starts anew, Ctrl-D leaves.")
    console = Console(stderr=True, highlight=False)
    while True:
        try:
            message = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            say("\nCtrl-D leaves.")
            continue
        if message == "/clear":
            conversation.clear()
            say("A new conversation.")
        elif message.startswith("/"):
            say(f"{message.split()[0]} is not a command: there is /clear, and Ctrl-D to leave")
        elif message:
            with interrupt_flag() as interrupted:
                try:
                    cost = conversation.answer(message, _write_to_terminal, interrupted)
                except DaedalError as error:
                    say(str(error))
                    continue
            print(flush=True)
            console.print(str(cost), style="dim")


def _with_pipe(conversation: Conversation, lines: TextIO) -> None:
    for line in lines:
        message = line.strip()
        if message == "/clear":
            conversation.clear()
        elif message:
            pieces: list[str] = []
            cost = conversation.answer(message, pieces.append, lambda: False)
            print(" ".join("".join(pieces).split()), flush=True)
            say(str(cost))


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside the block raises nothing, it makes the yielded function return True; a second one interrupts."""
    pressed = False

    def note(number: int, frame: "FrameType | None") -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _write_to_terminal(text: str) -> None:
    sys.stdout.write(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))
    sys.stdout.flush()
