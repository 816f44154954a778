"""How likely a model finds texts after contexts: log-likelihoods of continuations, many at a time.

Context and continuation are encoded together and parted where the context ends alone, spaces going to the continuation,
as lm-evaluation-harness does. What the continuations of one item have in common is computed once: a batch is two passes
on one cache, the common beginnings, then all endings side by side. A result depends on its own tokens; what shares a
batch changes it by rounding alone. Knows neither tasks nor right answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from daedal.errors import CheckpointError, DataError
from daedal.infer.cache import PagedCache, page_multiple
from daedal.model.batch import RaggedBatch
from daedal.model.transformer import Transformer
from daedal.text.tokenizer import Tokenizer

BATCH_TOKENS = 4096
"""Tokens of a batch: more keep no processor busier, and take memory."""

_HEAD_ROWS = 256  # rows whose logits exist at once
_LEAST_SHARED = 4  # tokens; fewer are not worth a pass of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """`ids[start:]` are to be weighed, after all that comes before them; start is at least 1."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """Of one continuation. logprob: natural. greedy: whether no token was likelier in any place."""

    logprob: float
    greedy: bool
    tokens: int


def encode(tokenizer: Tokenizer, context: str, continuation: str, *, limit: int) -> Continuation:
    """limit: positions that the model has; a longer context loses its beginning.

    A text without a context, where the tokenizer puts no BOS, follows the BOS or else the EOS all the same. DataError
    where nothing is left to weigh, or the continuation alone is longer than the model allows.
    """
    if context:
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
    ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    if start == 0:
        first = tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids, default=None)
        if first is None:
            raise DataError("an item has an empty context, and the tokenizer has neither BOS nor EOS to begin with")
        ids, start = [first, *ids], 1
    excess = max(0, len(ids) - 1 - limit)
    if not excess < start < len(ids):
        raise DataError(
            f"the continuation {continuation[:40]!r} has {len(ids) - start} tokens after {start} of context: the model "
            f"can weigh 1 to {limit}, leave the item out"
        )
    return Continuation(ids=tuple(ids[excess:]), start=start - excess)


def likelihoods(
    model: Transformer, groups: Sequence[Sequence[Continuation]], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[list[tuple[int, list[Likelihood]]]]:
    """Batch by batch (index of a group, its likelihoods in order), longest groups first.

    groups: continuations that belong together and begin alike, as the choices of an item.
    """
    sharing = page_multiple(model.config) == 1
    planned = sorted((_Group.of(index, group, sharing) for index, group in enumerate(groups)), key=_by_length)
    batches = list(_batches(planned, batch_tokens))
    cache = None
    if sharing and batches:
        most = max(sum(group.tokens for group in batch) for batch in batches)
        cache = PagedCache(model.config, num_pages=most, page_size=1, dtype=model.dtype, device=model.device)
    for batch in batches:
        yield _weigh(model, batch, cache)


def token_scores(model: Transformer, hidden_ND: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """(logprobs_N in float64, greedy_N) of the wanted ids, int64, after normed states; few rows of logits at a time.

    CheckpointError where logits are no numbers.
    """
    logprobs, greedy = [], []
    for rows in torch.arange(hidden_ND.shape[0], device=hidden_ND.device).split(_HEAD_ROWS):
        logits_nV, wanted_n = model.head(hidden_ND[rows]), wanted_N[rows]
        chosen_n, peak_n = logits_nV.gather(1, wanted_n[:, None]).squeeze(1), logits_nV.amax(-1)
        # In place, and with amax, as argmax is slow on CPUs: beside a small model's head every pass shows.
        mass_n = logits_nV.sub_(peak_n[:, None]).exp_().sum(-1)
        logprobs.append((chosen_n - peak_n).double() - mass_n.double().log())
        greedy.append(chosen_n == peak_n)
    logprobs_N = torch.cat(logprobs)
    if not logprobs_N.isfinite().all():
        raise CheckpointError("the model's logits are not finite: its weights are damaged, or overflow in their format")
    return logprobs_N, torch.cat(greedy)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """shared: how many first tokens all continuations have in common and are computed once."""

    index: int
    continuations: Sequence[Continuation]
    shared: int

    @classmethod
    def of(cls, index: int, continuations: Sequence[Continuation], sharing: bool) -> "_Group":
        shared = common(continuations) if sharing and len(continuations) > 1 else 0
        return cls(index=index, continuations=continuations, shared=shared if shared >= _LEAST_SHARED else 0)

    @property
    def endings(self) -> list[tuple[int, ...]]:
        """What each continuation feeds after what is shared; its last token is only weighed."""
        return [one.ids[self.shared : -1] for one in self.continuations]

    @property
    def tokens(self) -> int:
        return self.shared + sum(map(len, self.endings))


def _by_length(group: _Group) -> tuple[int, int]:
    return -group.tokens, group.index


def common(continuations: Sequence[Continuation]) -> int:
    """First tokens that are the same in all, less those whose states are needed to weigh a token."""
    least = min(one.start for one in continuations) - 1
    first = continuations[0].ids
    for place in range(least):
        if any(one.ids[place] != first[place] for one in continuations):
            return place
    return least


def _batches(groups: Sequence[_Group], batch_tokens: int) -> Iterator[list[_Group]]:
    batch: list[_Group] = []
    for group in groups:
        if batch and sum(one.tokens for one in batch) + group.tokens > batch_tokens:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


@torch.inference_mode()
def _weigh(
    model: Transformer, groups: Sequence[_Group], cache: PagedCache | None
) -> list[tuple[int, list[Likelihood]]]:
    rows: list[int] = []
    wanted: list[int] = []
    counts, first = [], 0
    for group in groups:
        for one, ending in zip(group.continuations, group.endings, strict=True):
            rows += range(first + one.start - 1 - group.shared, first + len(ending))
            wanted += one.ids[one.start :]
            counts.append(len(one.ids) - one.start)
            first += len(ending)
    rows_N = torch.tensor(rows, device=model.device)
    hidden_ND = _endings(model, groups, cache, rows_N)
    logprobs_N, greedy_N = token_scores(model, hidden_ND, torch.tensor(wanted, device=model.device))
    weighed = (
        Likelihood(logprob=float(logprobs_n.sum()), greedy=bool(greedy_n.all()), tokens=len(greedy_n))
        for logprobs_n, greedy_n in zip(logprobs_N.split(counts), greedy_N.split(counts), strict=True)
    )
    return [(group.index, list(islice(weighed, len(group.continuations)))) for group in groups]


def _endings(model: Transformer, groups: Sequence[_Group], cache: PagedCache | None, rows_N: Tensor) -> Tensor:
    """hidden_ND at some rows of all endings side by side."""
    sequences = [ending for group in groups for ending in group.endings]
    if cache is None:
        return model.forward(RaggedBatch.of(sequences, device=model.device), rows=rows_N, hidden=True)
    pages = count()
    beginnings = [list(islice(pages, group.shared)) for group in groups]
    _fill(model, groups, cache, beginnings)
    tables, pasts = [], []
    for group, beginning in zip(groups, beginnings, strict=True):
        for ending in group.endings:
            tables.append([*beginning, *islice(pages, len(ending))])
            pasts.append(group.shared)
    view = cache.view(tables, pasts, [len(ending) for ending in sequences])
    return model.forward(RaggedBatch.of(sequences, pasts, device=model.device), view, rows=rows_N, hidden=True)


def _fill(model: Transformer, groups: Sequence[_Group], cache: PagedCache, tables: Sequence[Sequence[int]]) -> None:
    """Runs what the continuations of each group share, onto its pages."""
    begun = [(group, table) for group, table in zip(groups, tables, strict=True) if table]
    if not begun:
        return
    sequences = [group.continuations[0].ids[: group.shared] for group, _ in begun]
    lengths = [group.shared for group, _ in begun]
    view = cache.view([table for _, table in begun], [0] * len(begun), lengths)
    none = torch.empty(0, dtype=torch.int64, device=model.device)
    model.forward(RaggedBatch.of(sequences, device=model.device), view, rows=none, hidden=True)
