"""How a training run looks: a bar on a terminal, a line now and then in a file. Knows numbers, no run."""

import math
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINES = 40
"""Lines of a whole run where there is no terminal."""

Numbers = Mapping[str, float | int | str | None]


class TrainingDisplay:
    """Shows steps on stderr. steps: of the whole run; quiet: shows nothing, as processes but the first."""

    def __init__(self, *, steps: int, done: int, quiet: bool = False):
        self._steps, self._quiet = steps, quiet
        self._every = max(1, steps // LINES)
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(*columns, console=self.console)
            self._task: TaskID = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "TrainingDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, numbers: Numbers, remaining: float) -> None:
        """step: how many are done."""
        sentence = describe(numbers, remaining)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=sentence)
        elif step % self._every == 0 or step in (1, self._steps):
            self.say(f"step {step}/{self._steps}  {sentence}")

    def say(self, sentence: str) -> None:
        """A line that stays, above the bar."""
        self.console.print(sentence, markup=False, soft_wrap=True)


def describe(numbers: Numbers, remaining: float) -> str:
    """One step in words; what has no number is left out."""
    forms = (
        ("loss", "loss {:.3f}"),
        ("bits_per_byte", "{:.3f} bits/byte"),
        ("held_out_bits_per_byte", "held out {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("flops_utilisation", "MFU {:.0%}"),
        ("max_violation", "MaxVio {:.2f}"),
    )
    words = [form.format(value) for name, form in forms if _is_number(value := numbers.get(name))]
    return "  ".join([*words, f"ETA {clock(remaining)}"])


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_number(value: float | int | str | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
