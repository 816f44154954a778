"""What each weight format costs in quality: perplexity on a fixed text, divergence from the unpacked model, choices.

    python benchmarks/quality.py                                   # smollm2-135m on this project's own documents
    python benchmarks/quality.py --model PATH --text NOVEL.txt --text MANUAL.txt.xz --formats int8 int4
    python benchmarks/quality.py --formats fp8 --directory "fp8, calibrated=PATH"   # beside what daedal quantize wrote

Every format is measured twice: through the kernels that serve it, in bfloat16, against the unpacked bfloat16 model; and
expanded, in float32 arithmetic, against the checkpoint in float32, which shows the format alone. A text is a slice of
each file given, read in windows from an empty context; the first token of a window is not scored. Prints a table, and
one JSON line last.
"""

import argparse
import json
import lzma
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from circumstances import circumstances
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from daedal.checkpoint.load import load
from daedal.checkpoint.sources import resolve
from daedal.model.transformer import Transformer
from daedal.packed import WEIGHTS
from daedal.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SLICE = 12_000  # characters of each text, from its middle: no title pages


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over tokens. perplexity: of the text; worse: than unpacked, as a share. divergence: Kullback-Leibler, in
    nats, from the unpacked model. agreement: share of tokens after which both find the same one likeliest.
    """

    perplexity: float
    worse: float
    divergence: float
    agreement: float


def read_texts(paths: Sequence[Path]) -> list[str]:
    """A slice of each file; of the project's own documents, put together, where none is given."""
    if paths:
        whole = [_text(path) for path in paths]
    else:
        documents = sorted((ROOT / "docs").glob("*.md"))
        whole = ["\n\n".join(_text(path) for path in (ROOT / "README.md", *documents))]
        return [whole[0][start : start + SLICE] for start in range(0, min(len(whole[0]), 2 * SLICE), SLICE)]
    return [text[max(0, (len(text) - SLICE) // 2) :][:SLICE] for text in whole]


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8", errors="replace")


def windows(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[Tensor]:
    """int64 [1, T] each, of at most `length` ids; single tokens that are left over are dropped."""
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        found += [part.unsqueeze(0) for part in ids.split(length) if part.numel() > 1]
    return found


@torch.inference_mode()
def log_probabilities(model: Transformer, parts: Sequence[Tensor], what: str) -> Iterator[Tensor]:
    """[T - 1, V] float32 for each window: of every token that follows one."""
    for ids_1T in track(parts, description=what, console=Console(stderr=True)):
        yield model.logits(ids_1T)[0, :-1].log_softmax(-1)


def perplexity(parts: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Of the windows' tokens, given each window's log-probabilities."""
    surprises = [-logs.gather(1, ids_1T[0, 1:, None]) for ids_1T, logs in zip(parts, found, strict=True)]
    return math.exp(float(torch.cat(surprises).mean(dtype=torch.float64)))


def measure(model: Transformer, parts: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> Quality:
    """wanted: the unpacked model's log-probabilities of each window."""
    divergence = same = 0.0
    count = sum(part.shape[1] - 1 for part in parts)
    found = []
    for logs, oracle in zip(log_probabilities(model, parts, what), wanted, strict=True):
        divergence += float((oracle.exp() * (oracle - logs)).sum(dtype=torch.float64))
        same += float((oracle.argmax(-1) == logs.argmax(-1)).sum())
        found.append(logs)
    base, reached = perplexity(parts, wanted), perplexity(parts, found)
    return Quality(perplexity=reached, worse=reached / base - 1, divergence=divergence / count, agreement=same / count)


def compare(
    directory: Path, formats: Sequence[str], others: Mapping[str, Path], parts: Sequence[Tensor]
) -> dict[str, dict[str, Quality]]:
    """Way of running, then format (None as "unpacked"), to its quality. others: checkpoints of the same model, by the
    names that they have here.
    """
    found: dict[str, dict[str, Quality]] = {}
    for way, dtype in (("running", torch.bfloat16), ("expanded", torch.float32)):
        wanted = list(log_probabilities(load(directory, dtype=dtype), parts, f"{way}: unpacked"))
        same = Quality(perplexity=perplexity(parts, wanted), worse=0.0, divergence=0.0, agreement=1.0)
        rows = {"unpacked": same}
        for name in formats:
            rows[name] = measure(load(directory, dtype=dtype, weights=name), parts, wanted, f"{way}: {name}")
        for name, other in others.items():
            rows[name] = measure(load(other, dtype=dtype), parts, wanted, f"{way}: {name}")
        found[way] = rows
    return found


def table(found: dict[str, dict[str, Quality]]) -> Table:
    shown = Table(title="running: bfloat16 through the kernels that serve; expanded: the same numbers in float32")
    for heading in ("arithmetic", "weights", "perplexity", "worse", "divergence (nats)", "same choice"):
        shown.add_column(heading, justify="left" if heading in ("arithmetic", "weights") else "right")
    for way, rows in found.items():
        for name, row in rows.items():
            cells = (f"{row.perplexity:.3f}", f"{row.worse:+.2%}", f"{row.divergence:.5f}", f"{row.agreement:.2%}")
            shown.add_row(way, name, *cells)
    return shown


def named(text: str) -> tuple[str, Path]:
    """NAME=PATH taken apart."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=PATH: write it as fp8=/models/fp8")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name that daedal pull knows, or a directory")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file, also .xz; may be repeated")
    parser.add_argument("--formats", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument(
        "--directory", type=named, action="append", default=[], help="NAME=PATH: a checkpoint made of the model"
    )
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read from an empty context")
    options = parser.parse_args()
    directory = resolve(options.model)
    parts = windows(read_texts(options.text), Tokenizer.load(directory), options.window)
    found = compare(directory, options.formats, dict(options.directory), parts)
    tokens = sum(part.shape[1] - 1 for part in parts)
    Console(width=120).print(table(found), f"{options.model}, {tokens} tokens scored, windows of {options.window}")
    rows = {way: {name: asdict(row) for name, row in rows.items()} for way, rows in found.items()}
    print(json.dumps({**circumstances(), "model": options.model, "tokens": tokens, **rows}))


if __name__ == "__main__":
    main()
