"""Experts and attention as training calls them, forward and backward, on every backend that takes them.

    python benchmarks/op_gradients.py [--device cuda] [--tokens 16384] [--length 4096] [--experts 32] [--shrink 1]

Sizes are those of DeepSeek-V3, divided by --shrink: experts of 7168 x 2048, eight for each token, --experts of them as
on one device of many; 128 heads with keys of 192 and values of 128 numbers, sequences of --length tokens side by side.
Backends run in turn, so that a drifting machine treats them alike; the first --warm runs, in which Triton chooses block
sizes, do not count. FLOPs are those of the products that the mathematics needs: backward has twice those of forward,
and shares that are worked out anew do not count. "apart": how far a backend's gradients lie from the first one's, as a
share of the largest number. Prints a table and one JSON line last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from circumstances import circumstances
from rich.console import Console
from rich.table import Table
from torch import Tensor

from daedal import ops
from daedal.bench.machine import settle
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows

HIDDEN, WIDTH, ACTIVE = 7168, 2048, 8
HEADS, KEY, VALUE = 128, 192, 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One call of an op. make: its arguments from `leaves`, whose gradients are wanted. flops: of forward."""

    op: str
    leaves: Sequence[Tensor]
    make: Callable[..., list[Any]]
    settings: dict[str, Any]
    flops: float

    def backends(self) -> list[str]:
        """Those that take it with gradients, the most preferred first; the reference only where there is no other."""
        candidates = REGISTRY.candidates(self.op)
        names = [
            found.backend for found in candidates if found.supports(*self.make(*self.leaves), **self.settings) is None
        ]
        return names[:-1] or [REFERENCE]

    def forward(self) -> Tensor:
        result: Tensor = REGISTRY.call(self.op, *self.make(*self.leaves), **self.settings)
        return result

    def gradients(self, result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, self.leaves, torch.ones_like(result))


def works(options: argparse.Namespace) -> list[Work]:
    """Both ops at the sizes that are asked for."""
    device, tokens, shrink = torch.device(options.device), options.tokens, options.shrink
    hidden, width, heads = HIDDEN // shrink, WIDTH // shrink, max(1, HEADS // shrink)
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)
        return made.to(device).requires_grad_()

    ids_TA = torch.rand(tokens, options.experts, generator=generator).argsort(-1)[:, :ACTIVE].to(device)
    weights_TA = torch.rand(ids_TA.shape, generator=generator).to(device).requires_grad_()
    up, down = new(options.experts, 2 * width, hidden, scale=0.02), new(options.experts, hidden, width, scale=0.02)
    starts = (*range(0, tokens, options.length), tokens)
    pairs = sum(length * (length + 1) // 2 for length in FlatRows(up, starts).lengths)
    return [
        Work(
            op="experts",
            leaves=(new(tokens, hidden), weights_TA, up, down),
            make=lambda x, weights, *others: [x, ids_TA, weights, *others],
            settings={"limit": None},
            flops=6.0 * ids_TA.numel() * hidden * width,
        ),
        Work(
            op="attention",
            leaves=(new(tokens, heads, KEY), new(tokens, heads, KEY), new(tokens, heads, VALUE)),
            make=lambda q, k, v: [q, starts, FlatRows(k, starts), FlatRows(v, starts)],
            settings={"scale": KEY**-0.5},
            flops=2.0 * heads * (KEY + VALUE) * pairs,
        ),
    ]


def measured(work: Work, rounds: int, warm: int) -> list[dict[str, Any]]:
    """A row for each backend."""
    device = work.leaves[0].device
    names = work.backends()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    found: dict[str, tuple[Tensor, ...]] = {}
    for _ in range(warm + rounds):
        for name in names:
            with ops.using(name):
                settle(device)
                began = time.perf_counter()
                result = work.forward()
                settle(device)
                turned = time.perf_counter()
                found[name] = work.gradients(result)
                settle(device)
                seconds[name].append((turned - began, time.perf_counter() - turned))
    rows = []
    for name in names:
        forward, backward = (statistics.median(taken) for taken in zip(*seconds[name][warm:], strict=True))
        rows.append({"op": work.op, "backend": name, "forward_s": forward, "backward_s": backward})
        rows[-1] |= {"forward_flops_per_s": work.flops / forward, "backward_flops_per_s": 2 * work.flops / backward}
        rows[-1]["apart"] = max(_apart(mine, first) for mine, first in zip(found[name], found[names[0]], strict=True))
    return rows


def _apart(mine: Tensor, first: Tensor) -> float:
    return float((mine.float() - first.float()).abs().max() / first.float().abs().max())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm", type=int, default=2)
    options = parser.parse_args(arguments)
    rows = [row for work in works(options) for row in measured(work, options.rounds, options.warm)]
    table = Table("op", "backend", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "apart")
    for row in rows:
        figures = (
            f"{row[key] * factor:.4g}"
            for key, factor in (
                ("forward_s", 1e3),
                ("forward_flops_per_s", 1e-12),
                ("backward_s", 1e3),
                ("backward_flops_per_s", 1e-12),
                ("apart", 1),
            )
        )
        table.add_row(row["op"], row["backend"], *figures)
    Console().print(table)
    device = torch.device(options.device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(json.dumps(circumstances() | {"device": named, "rows": rows}))


if __name__ == "__main__":
    main()
