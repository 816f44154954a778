"""What chips without FP8 cost in quality: a model with its linear layers in INT8 or HiF8, beside bfloat16.

    python benchmarks/silicon_quality.py --text NOVELS.txt.xz --text SPEECHES.txt.xz               # smollm2-135m
    python benchmarks/silicon_quality.py --model runs/tiny_cpu/model --window 256 --text NOVELS.txt.xz

Weights are rounded from the bfloat16 masters and activations as they come, in every layer that training in eight bits
rounds (`train.precision`): attention's projections, MLPs, experts. Embedding, head, norms, routers, attention itself
and its cache stay. What is emulated is the rounding of factors: products and sums are float32, which is exact for int8
and kinder than a chip for the rest. A text is a slice of each file, as in `quality.py`, which says what the columns
are. Prints a table, and one JSON line last.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import torch
from circumstances import circumstances
from quality import Quality, log_probabilities, measure, perplexity, read_texts, windows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from daedal.checkpoint.load import load
from daedal.checkpoint.sources import resolve
from daedal.model.transformer import Transformer
from daedal.ops.arithmetic import BF16, FP8, HIF8, INT8, MXFP8, W8A8, W8A8_TURNED, Arithmetic, Rounding
from daedal.text.tokenizer import Tokenizer
from daedal.train.precision import apply, preset


def _both(name: str, rounding: Rounding, turned: int | None = None) -> Arithmetic:
    return Arithmetic(name=name, activations=rounding, weights=rounding, gradients=rounding, turned=turned)


def _int8(name: str, along: int, turned: int | None = None) -> Arithmetic:
    return _both(name, Rounding(element="int8", across=1, along=along, scale="float32"), turned)


# Scales: one for each token of activations and each row of weights, for groups along these, for blocks, or one for all.
ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType(
    {
        found.name: found
        for found in (
            FP8,
            MXFP8,
            W8A8,
            replace(W8A8, name="w8a8, weights alone", activations=BF16.activations),
            replace(W8A8, name="w8a8, activations alone", weights=BF16.weights),
            replace(W8A8, name="w8a8, turned by 16", turned=16),
            W8A8_TURNED,
            replace(W8A8, name="w8a8, turned by 256", turned=256),
            _int8("int8, groups of 128", 128),
            _int8("int8, groups of 32", 32),
            _int8("int8, groups of 128, turned", 128, 64),
            INT8,
            HIF8,
            _both("hif8, tokens and rows", Rounding(element="hif8", across=1, largest=15.0)),
            replace(HIF8, name="hif8, turned", turned=64),
        )
    }
)


def compute_in(model: Transformer, arithmetic: Arithmetic) -> int:
    """How many modules compute in it from now on: those that training rounds."""
    apply(model, preset("w8a8"))
    rounded = [module for module in model.modules() if getattr(module, "arithmetic", None) is not None]
    for module in rounded:
        module.arithmetic = arithmetic  # type: ignore[assignment]
    return len(rounded)


def compare(model: Transformer, names: Sequence[str], parts: Sequence[Tensor]) -> dict[str, Quality]:
    """model: as loaded, without any arithmetic; its last is left to it. Its own quality comes first."""
    wanted = list(log_probabilities(model, parts, "bf16"))
    found = {"bf16": Quality(perplexity=perplexity(parts, wanted), worse=0.0, divergence=0.0, agreement=1.0)}
    for name in names:
        compute_in(model, ARITHMETICS[name])
        found[name] = measure(model, parts, wanted, name)
    return found


def table(found: Mapping[str, Quality]) -> Table:
    shown = Table(title="linear layers and experts in each arithmetic")
    headings = ("arithmetic", "activations", "weights", "turned", "perplexity", "worse", "divergence", "same choice")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in headings[:3] else "right")
    for name, row in found.items():
        used = ARITHMETICS.get(name, BF16)
        roundings = str(used.activations), str(used.weights), str(used.turned or "")
        cells = (f"{row.perplexity:.3f}", f"{row.worse:+.2%}", f"{row.divergence:.5f}", f"{row.agreement:.2%}")
        shown.add_row(name, *roundings, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name that daedal pull knows, or a directory")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file, also .xz; may be repeated")
    parser.add_argument("--arithmetics", nargs="+", default=list(ARITHMETICS), choices=list(ARITHMETICS))
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read from an empty context")
    options = parser.parse_args()
    directory = resolve(options.model)
    parts = windows(read_texts(options.text), Tokenizer.load(directory), options.window)
    model = load(directory, dtype=torch.bfloat16)
    found = compare(model, options.arithmetics, parts)
    tokens = sum(part.shape[1] - 1 for part in parts)
    modules = compute_in(model, BF16)
    what = f"{options.model}, {modules} modules rounded, {tokens} tokens scored, windows of {options.window}"
    Console(width=150).print(table(found), what)
    rows = {name: asdict(row) for name, row in found.items()}
    print(json.dumps({**circumstances(), "model": options.model, "tokens": tokens, "modules": modules, **rows}))


if __name__ == "__main__":
    main()
