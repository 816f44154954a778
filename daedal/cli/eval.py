"""`daedal eval`: how well a model knows real texts and tasks, and whether it is as good as it believes.

Two models may be set side by side: the baseline is asked the same, or its recorded answers are read. What is asked and
counted is the business of `daedal.eval`; here it is chosen, shown and written.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from daedal.cli.console import table_console
from daedal.cli.eval_tables import tables
from daedal.cli.fetching import FetchDisplay, resolve_shown
from daedal.cli.opening import DeviceOption, display_name, say
from daedal.errors import ConfigError

if TYPE_CHECKING:
    from daedal.eval.harness import Answers, Questions
    from daedal.eval.items import Item
    from daedal.eval.problems import Problem

DtypeName = Literal["checkpoint", "float32", "bfloat16"]
WeightsName = Literal["checkpoint", "bf16", "int8", "int4", "fp8", "fp4"]

REPORT, PLOT, CONFIG = "report.json", "reliability.png", "config.json"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every model of one command is asked. tasks: with choices; problems: to be answered. texts: (kind, file)."""

    tasks: "Mapping[str, Sequence[Item]]"
    problems: "Mapping[str, Sequence[Problem]]"
    texts: Sequence[tuple[str, Path]]
    contexts: Sequence[int]
    text_tokens: int

    def of(self, directory: Path) -> "Questions":
        """Texts are cut by the tokenizer of the checkpoint."""
        from daedal.eval.harness import Questions
        from daedal.eval.windows import read_windows
        from daedal.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(directory)
        windows = []
        for context in self.contexts:
            for kind, path in self.texts:
                windows += read_windows(path, kind, tokenizer, context=context, tokens=self.text_tokens)
        return Questions(tasks=self.tasks, problems=self.problems, windows=windows)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How models are run."""

    device: str
    dtype: DtypeName
    weights: WeightsName


@dataclass(frozen=True, kw_only=True)
class Found:
    """One model's answers, and the seconds that those took which were not on record."""

    answers: "Answers"
    seconds: float


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a name.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks, or files of items, or `all` that have choices; six usual ones where neither tasks nor texts "
            "are given.",
        ),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Items of a task, at most; spread evenly over it.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Other problems of the kinds that are made by rule.")] = 0,
    text: Annotated[
        list[str] | None, typer.Option(metavar="[KIND=]FILE", help="A UTF-8 text, also .gz or .xz; may be repeated.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of a window of text, 1024 if not given; may be repeated.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of each text, at most; windows spread over it.")] = 16_384,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL|DIR", help="A model to compare with, or what --out kept of one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep every answer there; a stopped run goes on from what is there.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Number format to compute in.")] = "checkpoint",
    weights: Annotated[WeightsName, typer.Option(help="Pack the weights for the CPU's kernels first.")] = "checkpoint",
    json_line: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Measure bits per byte of texts, accuracy on tasks with choices and on problems, and calibration."""
    way = Way(device=device, dtype=dtype, weights=weights)
    texts = [_kind(given) for given in text or ()]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    display = FetchDisplay(bars)
    try:
        names = _names(tasks, has_texts=bool(texts))
        asked = Asked(
            tasks=_items(names, items, display),
            problems=_problems(names, items, seed, display),
            texts=texts,
            contexts=sorted(set(context or (1024,))),
            text_tokens=text_tokens,
        )
        beside = None if baseline is None else _baseline(baseline, model, asked, way, out, display)
        found = _evaluate(model, asked, way, out, display)
    except KeyboardInterrupt:
        say(f"stopped: {f'the same command goes on from what is in {out}' if out else 'without --out nothing is kept'}")
        raise
    finally:
        if bars.tasks:
            bars.stop()
    _report(model, found, None if beside is None or baseline is None else (baseline, beside), out, json_line)


def _names(tasks: str | None, *, has_texts: bool) -> Sequence[str]:
    from daedal.eval.tasks import TASKS, USUAL

    if tasks is None:
        return () if has_texts else USUAL
    return tuple(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]


def _items(names: Sequence[str], items: int, display: FetchDisplay) -> "dict[str, list[Item]]":
    from daedal.eval.items import spread
    from daedal.eval.problem_sets import is_problem_set
    from daedal.eval.tasks import read_tasks

    chosen = [name for name in names if not is_problem_set(name)]
    return {task: spread(found, items) for task, found in read_tasks(chosen, progress=display).items()}


def _problems(names: Sequence[str], items: int, seed: int, display: FetchDisplay) -> "dict[str, list[Problem]]":
    from daedal.eval.problem_sets import is_problem_set, read_problems

    return read_problems([name for name in names if is_problem_set(name)], items, seed=seed, progress=display)


def _kind(given: str) -> tuple[str, Path]:
    """KIND=FILE, or a file that is called by its own name without endings."""
    kind, sign, name = given.partition("=")
    if not sign or Path(given).is_file():
        return Path(given).name.split(".")[0], Path(given)
    if not kind or not name:
        raise ConfigError(f"--text is {given!r}: write it as KIND=FILE, such as prose=novel.txt")
    return kind, Path(name)


def _baseline(name: str, model: str, asked: Asked, way: Way, out: Path | None, display: FetchDisplay) -> Found:
    """Recorded answers where `name` is a directory of them, else those of the model."""
    from daedal.eval.harness import answers
    from daedal.eval.records import Records, is_run

    if is_run(Path(name)):
        return Found(answers=answers(asked.of(resolve_shown(model)), Records.open(Path(name))), seconds=0.0)
    return _evaluate(name, asked, way, out and out / "baseline", display)


def _evaluate(name: str, asked: Asked, way: Way, out: Path | None, display: FetchDisplay) -> Found:
    """Asks a model all that `out` does not hold already."""
    import torch

    from daedal.checkpoint.load import load, resolve_device
    from daedal.eval.harness import ask
    from daedal.eval.identity import fingerprint
    from daedal.eval.records import Records
    from daedal.ops.backends.cpu.program import pending
    from daedal.text.tokenizer import Tokenizer

    title = display_name(name)

    def progress(message: str, done: int = 0, total: int = 0, /) -> None:
        display(f"{title}: {message}", done, total)

    directory = resolve_shown(name)
    questions = asked.of(directory)
    records = Records()
    if out is not None:
        identity = {"model": fingerprint(directory, progress=progress), "dtype": way.dtype, "weights": way.weights}
        records = Records(out, identity)
        (out / CONFIG).write_bytes((directory / CONFIG).read_bytes())  # what a cost is counted from
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(way.dtype)
    packed = None if way.weights == "checkpoint" else way.weights
    if resolve_device(way.device).type == "cpu" and pending():
        say("compiling the native kernels for this machine, once: about a minute")
    filled = partial(progress, "loading weights")
    model = load(directory, device=way.device, dtype=dtype, weights=packed, progress=filled)
    started = time.monotonic()
    answers = ask(model, Tokenizer.load(directory), questions, records, progress=progress)
    return Found(answers=answers, seconds=time.monotonic() - started)


def _report(model: str, found: Found, beside: tuple[str, Found] | None, out: Path | None, json_line: bool) -> None:
    from daedal.eval.summary import compare, summarise

    summary = summarise(found.answers)
    told: dict[str, object] = {"model": model, "seconds": round(found.seconds, 3), **asdict(summary)}
    other = difference = None
    if beside is not None:
        other, difference = summarise(beside[1].answers), compare(found.answers, beside[1].answers)
        told |= {"baseline": {"model": beside[0], **asdict(other)}, "difference": asdict(difference)}
    console = table_console()
    for table in tables(summary, other, difference):
        console.print(table)
    if summary.texts and difference is not None and not difference.texts:
        say("the texts are not compared: the baseline was not asked them, or cuts them into other tokens")
    if out is not None:
        (out / REPORT).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        _plot(out / PLOT, {display_name(model): found} | ({f"baseline {beside[0]}": beside[1]} if beside else {}))
    if json_line:
        print(json.dumps(told))


def _plot(path: Path, found: Mapping[str, Found]) -> None:
    from daedal.eval.summary import reliability_bins

    bins = {name: held for name, one in found.items() if (held := reliability_bins(one.answers))}
    if not bins:
        return
    if find_spec("matplotlib") is None:
        say(f"{path.name} is not drawn: it needs matplotlib, install daedal[plots]")
        return
    from daedal.eval.plot import plot_reliability

    plot_reliability(path, bins)
