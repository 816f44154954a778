"""Results of models that never ran: what `daedal eval --out` and `daedal bench --out` leave, with chosen numbers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from daedal.eval.records import ItemRecord, Records, ReplyRecord, WindowRecord
from tests.tiny import tiny_published


def item(
    number: int, *, right: bool, task: str = "task", shared: int = 20, endings: Sequence[int] = (3, 4, 5, 6)
) -> ItemRecord:
    """One item of as many choices as endings, of which the first is the right one."""
    count = len(endings)
    likelier = 0 if right else 1
    return ItemRecord(
        key=f"{task} {number}",
        task=task,
        doc_id=number,
        gold=0,
        logprobs=tuple(-1.0 if place == likelier else -5.0 for place in range(count)) if count > 1 else (-1.0,),
        greedy=(right,) * count,
        tokens=(2,) * count,
        chars=(4,) * count,
        num_bytes=(4,) * count,
        fed=tuple(shared + ending for ending in endings),
        shared=shared,
    )


def items(count: int, *, share: float, task: str = "task", seed: int = 0) -> list[ItemRecord]:
    """So many, of which about a share is answered right; which ones depends on the seed."""
    draws = np.random.default_rng(seed).random(count)
    return [item(number, right=bool(draws[number] < share), task=task) for number in range(count)]


def windows(
    count: int, *, bits_per_byte: float, kind: str = "prose", context: int = 64, seed: int = 0
) -> list[WindowRecord]:
    """So many windows of about so many bits per byte."""
    noise = np.random.default_rng(seed).normal(1.0, 0.02, count)
    return [
        WindowRecord(
            key=f"{kind} {context} {number}",
            kind=kind,
            context=context,
            nats=bits_per_byte * 200 * math.log(2) * noise[number],
            tokens=context - 1,
            num_bytes=200,
        )
        for number in range(count)
    ]


def reply(number: int, *, right: bool, prompt: int = 30, tokens: int = 11, seconds: float = 0.5) -> ReplyRecord:
    """One problem with a reply of so many tokens, which took so many seconds of the device."""
    return ReplyRecord(
        key=f"problem {number}",
        task="sums",
        doc_id=number,
        answer="4",
        text="four: 4",
        found="4" if right else None,
        right=right,
        prompt_tokens=prompt,
        tokens=tokens,
        finish_reason="stop",
        flops=1.0,
        kv_byte_seconds=1.0,
        device_seconds=seconds,
        joules=20 * seconds,
        energy_source="a model: 20 W",
    )


def results(
    directory: Path,
    rows: Sequence[ItemRecord | WindowRecord | ReplyRecord],
    *,
    family: str = "llama",
    weights: str = "checkpoint",
    dtype: str = "checkpoint",
    **changes: object,
) -> Path:
    """The directory of a model that gave these answers."""
    Records(directory, {"model": f"sum of {directory.name}", "dtype": dtype, "weights": weights}).add(rows)
    published = tiny_published(family, torch_dtype="bfloat16", **changes)
    (directory / "config.json").write_text(json.dumps(published))
    return directory


def bench(
    directory: Path,
    points: Sequence[tuple[int, int, float, float]],
    *,
    weights: str | None = None,
    joules: float | None = 0.5,
    model: str | None = None,
) -> None:
    """points: context, batch, tokens per second read and written."""
    told = {
        "model": model or directory.name,
        "device": "cpu",
        "weights": weights,
        "energy": "a model: 10 W assumed",
        "points": [
            {
                "batch": batch,
                "context": context,
                "kv_bytes": 1000 * batch * context,
                "phases": [
                    {
                        "phase": phase,
                        "tokens_per_second": rate,
                        "spread": 0.02,
                        "held_tokens": context,
                        "joules_per_token": None if joules is None else joules / rate,
                    }
                    for phase, rate in (("prefill", read), ("decode", written))
                ],
            }
            for context, batch, read, written in points
        ],
    }
    (directory / "bench.json").write_text(json.dumps(told))
