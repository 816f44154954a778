"""Converted and healed checkpoints beside their original: perplexity over its, on text that none of them read.

    python benchmarks/converted.py smollm2-135m start=C192 healed=H192 --held-out LETTERS.txt --held-out CODE.txt

Every checkpoint reads the same windows as the original, in the same arithmetic, at every context; the first is from an
empty one. A checkpoint may come from anywhere, as long as it has the original's vocabulary. Prints perplexity over the
original's by text, the divergence from it, and one JSON line last.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from circumstances import circumstances
from conversion import held_out_windows
from rich.console import Console
from rich.table import Table

from daedal.checkpoint.load import load
from daedal.checkpoint.sources import resolve
from daedal.convert.quality import Examiner, Quality
from daedal.text.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def named(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=CHECKPOINT")
    return name, place


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="a name that daedal pull knows, or a directory")
    parser.add_argument("checkpoints", nargs="+", type=named, metavar="NAME=CHECKPOINT")
    parser.add_argument("--held-out", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--held-out-tokens", type=int, default=20_480, help="at each context, over all texts")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the arithmetic, on both sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def table(found: dict[str, dict[int, Quality]]) -> Table:
    shown = Table("checkpoint", "context", "all", "KL, nats", title="perplexity over the original's")
    texts = list(next(iter(next(iter(found.values())).values())).ratios)
    for text in texts:
        shown.add_column(text, justify="right")
    for name, qualities in found.items():
        for context, quality in qualities.items():
            ratios = (f"{quality.ratios[text]:.4f}" for text in texts)
            shown.add_row(name, str(context), f"{quality.ratio:.4f}", f"{quality.divergence:.4f}", *ratios)
    return shown


def main() -> None:
    options, began = parsed(), time.monotonic()
    torch.set_num_threads(options.threads)
    source = resolve(options.original)
    tokenizer, dtype = Tokenizer.load(source), DTYPES[options.dtype]
    original = load(source, device="cpu", dtype=dtype)
    examiners = {
        context: Examiner(original, held_out_windows(options.held_out, tokenizer, context, options.held_out_tokens))
        for context in options.contexts
    }
    found: dict[str, dict[int, Quality]] = {}
    for name, place in options.checkpoints:
        model = load(resolve(place), device="cpu", dtype=dtype)
        found[name] = {context: examiner.examine(model) for context, examiner in examiners.items()}
        print(f"{name}: {', '.join(f'{quality.ratio:.4f} at {at}' for at, quality in found[name].items())}", flush=True)
    Console(width=160).print(table(found))
    rows = {name: {at: asdict(quality) for at, quality in qualities.items()} for name, qualities in found.items()}
    told = {**circumstances(), "dtype": options.dtype, "seconds": round(time.monotonic() - began, 1), "rows": rows}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
