"""What attention reaches on this machine: bytes of the cache per second when decoding, FLOP/s when reading prompts.

One call of the ops for each kind of attention and phase, on random rows with the head sizes of published models: keys
and values of groups of heads, latent rows (DeepSeek-V2, section 2.1), the windows and entries of V4. FLOPs and bytes
are counted as the planner counts them. Knows no model and no engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from daedal import ops
from daedal.bench.machine import settle
from daedal.bench.pieces import Rate
from daedal.bench.timing import Clock, repeated
from daedal.ops.rows import FlatRows

SEQUENCES, CHUNK = 8, 512
_HEADS, _GROUPS, _WIDTH = 16, 4, 64
_RANK, _ROPE, _NOPE, _VALUE = 512, 64, 128, 128
_ENTRY, _WINDOW, _RATE = 128, 128, 4

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Attending:
    """By kind, as `work.Part` names them. decode: bytes of cache; prefill: FLOPs of attention."""

    decode: Mapping[str, Rate]
    prefill: Mapping[str, Rate]


def attending(device: torch.device, *, dtype: torch.dtype, clock: Clock, seconds: float, past: int) -> Attending:
    """Measures each kind for `seconds`, twice. past: rows of a sequence, which decoding reads; prompts have half."""
    kinds = {"full": _full, "latent": _latent, "compressed": _compressed}
    made = Rows(device=device, dtype=dtype)
    decode, prefill = {}, {}
    with torch.inference_mode():
        for kind, build in kinds.items():
            call, nbytes, _ = build(made, SEQUENCES, 1, past)
            decode[kind] = _rate(call, nbytes, device, clock, seconds)
            call, _, flops = build(made, 1, min(CHUNK, past // 4), past // 2)
            prefill[kind] = _rate(call, flops, device, clock, seconds)
    return Attending(decode=MappingProxyType(decode), prefill=MappingProxyType(prefill))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Makes tensors that attention reads."""

    device: torch.device
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def flat(self, sequences: int, held: int, *shape: int) -> FlatRows:
        """`held` rows of each sequence."""
        return FlatRows(self.random(sequences * held, *shape), boundaries(sequences, held))


def boundaries(sequences: int, length: int) -> tuple[int, ...]:
    """Of sequences that lie side by side."""
    return tuple(length * index for index in range(sequences + 1))


def read(tokens: int, held: int) -> int:
    """Rows that the last `tokens` of `held` tokens read, added up."""
    return tokens * held - tokens * (tokens - 1) // 2


def _full(made: Rows, sequences: int, tokens: int, held: int) -> tuple[Call, float, float]:
    q_THK = made.random(sequences * tokens, _HEADS, _WIDTH)
    keys, values = (made.flat(sequences, held, _GROUPS, _WIDTH) for _ in range(2))
    starts = boundaries(sequences, tokens)
    rows = sequences * read(tokens, held)
    return (
        lambda: ops.attention(q_THK, starts, keys, values, scale=_WIDTH**-0.5),
        float(keys.rows.nbytes + values.rows.nbytes),
        4.0 * _HEADS * _WIDTH * rows,
    )


def _latent(made: Rows, sequences: int, tokens: int, held: int) -> tuple[Call, float, float]:
    """Decoding absorbed, prompts expanded."""
    starts, rows = boundaries(sequences, tokens), sequences * read(tokens, held)
    scale = (_NOPE + _ROPE) ** -0.5
    if tokens == 1:
        q_THK, latents = made.random(sequences, _HEADS, _RANK + _ROPE), made.flat(sequences, held, _RANK + _ROPE)
        flops = 2.0 * _HEADS * (2 * _RANK + _ROPE) * rows
        return (lambda: ops.attention(q_THK, starts, latents, _RANK, scale=scale)), float(latents.rows.nbytes), flops
    q_THK = made.random(sequences * tokens, _HEADS, _NOPE + _ROPE)
    keys, values = (made.flat(sequences, held, _HEADS, width) for width in (_NOPE + _ROPE, _VALUE))
    flops = 2.0 * _HEADS * (_NOPE + _ROPE + _VALUE) * rows
    return (lambda: ops.attention(q_THK, starts, keys, values, scale=scale)), float(keys.rows.nbytes), flops


def _compressed(made: Rows, sequences: int, tokens: int, held: int) -> tuple[Call, float, float]:
    """A window, and all entries of the tokens before: one for each four."""
    past = held - tokens
    q_THK = made.random(sequences * tokens, _HEADS, _ENTRY)
    entries = made.flat(sequences, held // _RATE, _ENTRY)
    span = min(_WINDOW, held)
    window = made.flat(sequences, min(held, span - 1 + tokens), _ENTRY)
    rows = sequences * (tokens * span + read(tokens, held) // _RATE)
    sinks_H = torch.zeros(_HEADS, dtype=made.dtype, device=made.device)
    starts, pasts = boundaries(sequences, tokens), (past,) * sequences

    def call() -> object:
        return ops.sparse_attention(
            q_THK,
            starts,
            pasts,
            entries,
            None,
            window,
            sinks_H,
            value_dim=_ENTRY,
            scale=_ENTRY**-0.5,
            rate=_RATE,
            span=span,
        )

    nbytes = entries.rows.nbytes + sequences * span * _ENTRY * made.dtype.itemsize
    return call, float(nbytes), 4.0 * _HEADS * _ENTRY * rows


def _rate(call: Call, amount: float, device: torch.device, clock: Clock, seconds: float) -> Rate:
    def settled() -> None:
        call()
        settle(device)

    return Rate(amount=amount, timing=repeated(settled, clock=clock, seconds=seconds))
