"""What a model writes in answer to problems: greedily, many at once through the engine, each reply as soon as it ends.

The engine counts what every reply cost. Knows neither what is right nor where replies are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from daedal.cost.spending import Spent, Tariff, chip_here, energy_of
from daedal.errors import DataError
from daedal.eval.problems import Problem
from daedal.infer.engine import Engine
from daedal.infer.request import FinishReason, Request, SamplingParams
from daedal.model.transformer import Transformer
from daedal.text.tokenizer import Tokenizer

TOGETHER = 16
"""Replies under way at once."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """text: without what stopped it. prompt_tokens, tokens: read and written. energy_source: what joules rest on."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: FinishReason
    spent: Spent
    energy_source: str | None


def replies(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], *, together: int = TOGETHER
) -> Iterator[tuple[int, Reply]]:
    """(index of a problem, its reply), in the order in which they end; the longest prompts are read first.

    DataError for a problem that is longer than the model reads.
    """
    prompts = [tuple(tokenizer.encode(problem.prompt)) for problem in problems]
    context = _context(model, prompts, problems)
    on_cpu = model.device.type == "cpu"
    counter = energy_of(chip_here(on_cpu=on_cpu), on_cpu=on_cpu)
    engine = Engine(
        model,
        tokenizer=tokenizer,
        max_batch=together,
        max_context=context,
        prefix_caching=False,  # what a reply costs is its own, and not a matter of what was asked before
        tariff=Tariff(energy=counter),
    )
    waiting = sorted(range(len(problems)), key=lambda index: len(prompts[index]))
    texts: dict[str, str] = {}
    counts: dict[str, int] = {}
    while waiting or engine.has_work:
        while waiting and len(texts) < 2 * together:
            index = waiting.pop()
            texts[str(index)], counts[str(index)] = "", 0
            engine.add(Request(id=str(index), prompt=prompts[index], params=_params(problems[index])))
        for output in engine.step():
            name = output.request_id
            texts[name] += output.text or ""
            counts[name] += len(output.ids)
            if output.finish_reason is not None:
                assert output.spent is not None
                yield (
                    int(name),
                    Reply(
                        text=texts.pop(name),
                        prompt_tokens=len(prompts[int(name)]),
                        tokens=counts.pop(name),
                        finish_reason=output.finish_reason,
                        spent=output.spent,
                        energy_source=None if counter is None else counter.source,
                    ),
                )


def _context(model: Transformer, prompts: Sequence[Sequence[int]], problems: Sequence[Problem]) -> int:
    """Tokens that the longest prompt and its reply need, as far as the model reads."""
    limit = model.config.max_position_embeddings
    for prompt, problem in zip(prompts, problems, strict=True):
        if not 0 < len(prompt) < limit:
            raise DataError(
                f"{problem.task}, problem {problem.doc_id}, has {len(prompt)} tokens, and the model reads 1 to "
                f"{limit - 1} before it answers: leave the task out, or ask for a smaller size"
            )
    needed = max(len(prompt) + problem.max_tokens for prompt, problem in zip(prompts, problems, strict=True))
    return min(needed, limit)


def _params(problem: Problem) -> SamplingParams:
    return SamplingParams(max_tokens=problem.max_tokens, temperature=0.0, stop=problem.stop)
