"""`daedal chat`: a conversation in the terminal. Answers stream; the last line of each says what it cost.

Reads one message a line: from a person, who has /clear and Ctrl-C and sees thoughts dimmed, or from a pipe, which gets
one answer per line and nothing else on stdout. Knows nothing of how tokens are made.
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

from daedal.cli.drafting import Drafting, DraftTokensOption, SpeculateOption, acceptance
from daedal.cli.opening import (
    DEFAULT_MODEL,
    CacheOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KvCacheOption,
    Limits,
    ModelArgument,
    Opened,
    open_model,
    say,
)
from daedal.cli.units import in_bytes
from daedal.cli.weights import WeightsOption
from daedal.errors import DaedalError, RequestError, TemplateError

if TYPE_CHECKING:
    from types import FrameType

    from daedal.infer.request import Output, SamplingParams
    from daedal.text.encodings.answers import Delta

# A model's text may hold escape sequences; on a terminal they would be obeyed.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def command(
    model: ModelArgument = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 0.9,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; what the context holds if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats the conversation's draws.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Think first; as the chat format has it if not given."),
    ] = None,
    effort: Annotated[str | None, typer.Option(help="How hard to think, in the chat format's own words.")] = None,
    kv_cache_dtype: KvCacheOption = "auto",
    cache_gb: CacheOption = None,
    max_context: ContextOption = None,
    chat_format: FormatOption = None,
    speculate: SpeculateOption = None,
    draft_tokens: DraftTokensOption = None,
) -> None:
    """Talk with a model in the terminal."""
    limits = Limits(cache_gb=cache_gb, max_context=max_context, max_batch=1, kv_cache_dtype=kv_cache_dtype)
    drafting = Drafting(speculate=speculate, draft_tokens=draft_tokens)
    opened = open_model(
        model,
        device=device,
        dtype=dtype,
        weights=weights,
        limits=limits,
        chat_format=chat_format,
        drafting=drafting,
    )
    wishes = Wishes(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, thinking=thinking, effort=effort
    )
    conversation = Conversation(opened, wishes, system)
    if sys.stdin.isatty():
        _with_person(conversation)
    else:
        _with_pipe(conversation, sys.stdin)
    if speculate is not None:
        say(acceptance(opened.engine.stats()))


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How to draw answers, see SamplingParams; and how to think, see ChatFormat."""

    temperature: float
    top_p: float
    max_tokens: int | None
    seed: int | None
    thinking: bool | None = None
    effort: str | None = None


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
    """Messages so far, and the engine that answers them. TemplateError: the chat format cannot do what is wished."""

    def __init__(self, opened: Opened, wishes: Wishes, system: str | None):
        if opened.chat_format is None:
            raise TemplateError(opened.without_chat or f"{opened.name} has no chat format: use `daedal serve`")
        self._engine = opened.engine
        self._tokenizer = opened.tokenizer
        self._format = opened.chat_format
        self._wishes = wishes
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._answers = 0
        self._render([*self._messages, {"role": "user", "content": "Hello"}])

    def clear(self) -> None:
        """Forgets everything said, but not the system message."""
        self._messages = list(self._opening)

    def answer(
        self,
        message: str,
        write: Callable[[str], object],
        stopped: Callable[[], bool],
        think: Callable[[str], object] | None = None,
    ) -> Cost:
        """Answers `message` until done or `stopped`, handing on the answer's text to `write` and its thought's to
        `think` as they come. RequestError: it does not fit.
        """
        from daedal.infer.request import Request
        from daedal.text.encodings.answers import gather

        asked = [*self._messages, {"role": "user", "content": message}]
        rendered = self._render(asked)
        prompt = tuple(self._tokenizer.encode(rendered, add_special_tokens=False))
        room = self._engine.max_context - len(prompt)
        if room < 1:
            length = f"the conversation has {len(prompt)} tokens, the context is {self._engine.max_context}"
            raise RequestError(f"{length}: say less, or start anew with /clear")
        self._answers += 1
        request = Request(id=f"answer-{self._answers}", prompt=prompt, params=self._params(room))
        parser = self._format.parser(rendered, calls=False)
        said: list[Delta] = []
        began = time.perf_counter()
        tokens = kv_bytes = 0
        self._engine.add(request)
        for output in self._outputs(request.id, stopped):
            tokens += len(output.ids)
            kv_bytes = max(kv_bytes, self._engine.stats().kv_bytes_used)
            deltas = parser.push(output.text or "")
            if output.finish_reason is not None:
                deltas += parser.finish()
            for delta in deltas:
                if delta.content:
                    write(delta.content)
                elif think is not None:
                    think(delta.reasoning)
            said += deltas
        answer = gather(said)
        thought = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        self._messages = [*asked, {"role": "assistant", "content": answer.content, **thought}]
        return Cost(tokens=tokens, seconds=time.perf_counter() - began, kv_bytes=kv_bytes, stopped=stopped())

    def _render(self, messages: list[dict[str, str]]) -> str:
        wishes = self._wishes
        return self._format.render(messages, add_generation_prompt=True, thinking=wishes.thinking, effort=wishes.effort)

    def _params(self, room: int) -> "SamplingParams":
        from daedal.infer.request import SamplingParams

        return SamplingParams(
            max_tokens=room if self._wishes.max_tokens is None else min(room, self._wishes.max_tokens),
            temperature=self._wishes.temperature,
            top_p=self._wishes.top_p,
            seed=self._wishes.seed,
            skip_special_tokens=not self._format.shows_special_tokens,
        )

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
                    screen = Screen()
                    cost = conversation.answer(message, screen.write, interrupted, screen.think)
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


class Screen:
    """One answer on a terminal: the thought dimmed, a blank line, the answer."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self._thinking = False

    def think(self, text: str) -> None:
        self._thinking = True
        self._console.out(_safe(text), style="dim", end="", highlight=False)
        sys.stdout.flush()

    def write(self, text: str) -> None:
        sys.stdout.write(("\n\n" if self._thinking else "") + _safe(text))
        sys.stdout.flush()
        self._thinking = False


def _safe(text: str) -> str:
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
