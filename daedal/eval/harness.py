"""Asks a model everything that is not on record yet: the items of tasks, problems to be answered, windows of text.

What is answered goes to the records batch by batch, so that a run can be stopped anywhere and taken up again. Knows
neither where items come from nor what is made of the answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from daedal.checkpoint.download import Progress, silent
from daedal.errors import DataError
from daedal.eval.answering import Reply, replies
from daedal.eval.items import Item
from daedal.eval.problems import Problem
from daedal.eval.records import ItemRecord, Records, ReplyRecord, WindowRecord
from daedal.eval.scoring import BATCH_TOKENS, Continuation, Likelihood, common, encode, likelihoods
from daedal.eval.windows import Window, surprises
from daedal.model.transformer import Transformer
from daedal.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Questions:
    """tasks: items by the name of their task; problems: what the model is to answer itself, by theirs. windows: of
    texts, cut by the model's own tokenizer.
    """

    tasks: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    problems: Mapping[str, Sequence[Problem]] = field(default_factory=dict)
    windows: Sequence[Window] = ()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The records that belong to some questions, in the order of these."""

    tasks: Mapping[str, Sequence[ItemRecord]]
    windows: Sequence[WindowRecord]
    replies: Mapping[str, Sequence[ReplyRecord]] = field(default_factory=dict)


def ask(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Questions,
    records: Records,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> Answers:
    """Fills `records` with what is missing. progress: by task and kind of text, how many are done."""
    for task, items in questions.tasks.items():
        for done in _ask_items(model, tokenizer, items, records, batch_tokens):
            progress(task, done, len(items))
    for task, problems in questions.problems.items():
        for done in _ask_problems(model, tokenizer, problems, records):
            progress(task, done, len(problems))
    wanted: dict[str, list[Window]] = {}
    for window in questions.windows:
        wanted.setdefault(f"{window.kind}, windows of {window.context}", []).append(window)
    for name, windows in wanted.items():
        for done in _ask_windows(model, windows, records, batch_tokens):
            progress(name, done, len(windows))
    return answers(questions, records)


def answers(questions: Questions, records: Records) -> Answers:
    """What is on record of the questions; DataError where something is not."""
    known = records.items.keys() | records.replies.keys()
    asked: dict[str, Sequence[Item] | Sequence[Problem]] = {**questions.tasks, **questions.problems}
    missing = [task for task, some in asked.items() if any(one.key not in known for one in some)]
    if missing:
        raise DataError(
            f"the results lack some items of {', '.join(missing)}: evaluate that model on the same tasks, as many items"
        )
    return Answers(
        tasks={task: [records.items[one.key] for one in items] for task, items in questions.tasks.items()},
        windows=[records.windows[one.key] for one in questions.windows if one.key in records.windows],
        replies={task: [records.replies[one.key] for one in asked] for task, asked in questions.problems.items()},
    )


def _ask_items(
    model: Transformer, tokenizer: Tokenizer, items: Sequence[Item], records: Records, batch_tokens: int
) -> Iterator[int]:
    """How many are on record, from the beginning to the end."""
    missing = [item for item in items if item.key not in records.items]
    done = len(items) - len(missing)
    yield done
    limit = model.config.max_position_embeddings
    groups = [_encoded(item, tokenizer, limit) for item in missing]
    for batch in likelihoods(model, groups, batch_tokens=batch_tokens):
        records.add(_record(missing[index], groups[index], found) for index, found in batch)
        done += len(batch)
        yield done


def _ask_problems(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], records: Records
) -> Iterator[int]:
    missing = [problem for problem in problems if problem.key not in records.replies]
    done = len(problems) - len(missing)
    yield done
    if not missing:
        return
    for index, reply in replies(model, tokenizer, missing):
        records.add([_reply_record(missing[index], reply)])
        done += 1
        yield done


def _ask_windows(model: Transformer, windows: Sequence[Window], records: Records, batch_tokens: int) -> Iterator[int]:
    missing = [window for window in windows if window.key not in records.windows]
    done = len(windows) - len(missing)
    yield done
    for window, nats in surprises(model, missing, batch_tokens=batch_tokens):
        records.add(
            [
                WindowRecord(
                    key=window.key,
                    kind=window.kind,
                    context=window.context,
                    nats=nats,
                    tokens=len(window.ids) - 1,
                    num_bytes=window.num_bytes,
                )
            ]
        )
        done += 1
        yield done


def _encoded(item: Item, tokenizer: Tokenizer, limit: int) -> list[Continuation]:
    try:
        return [encode(tokenizer, context, continuation, limit=limit) for context, continuation in item.choices]
    except DataError as error:
        raise DataError(f"{item.task}, item {item.doc_id}: {error}") from error


def _reply_record(problem: Problem, reply: Reply) -> ReplyRecord:
    found = problem.found(reply.text)
    return ReplyRecord(
        key=problem.key,
        task=problem.task,
        doc_id=problem.doc_id,
        answer=problem.answer,
        text=reply.text,
        found=found,
        right=problem.is_right(found),
        prompt_tokens=reply.prompt_tokens,
        tokens=reply.tokens,
        finish_reason=reply.finish_reason,
        flops=reply.spent.flops,
        kv_byte_seconds=reply.spent.kv_byte_seconds,
        device_seconds=reply.spent.device_seconds,
        joules=reply.spent.joules,
        energy_source=reply.energy_source,
    )


def _record(item: Item, group: Sequence[Continuation], found: Sequence[Likelihood]) -> ItemRecord:
    # A space before a choice belongs to the prompt's layout, not to the choice.
    texts = [continuation.removeprefix(" ") for _, continuation in item.choices]
    return ItemRecord(
        key=item.key,
        task=item.task,
        doc_id=item.doc_id,
        gold=item.gold,
        logprobs=tuple(one.logprob for one in found),
        greedy=tuple(one.greedy for one in found),
        tokens=tuple(one.tokens for one in found),
        chars=tuple(map(len, texts)),
        num_bytes=tuple(len(text.encode()) for text in texts),
        fed=tuple(len(one.ids) - 1 for one in group),
        shared=common(group),
    )
