"""Makes a healed conversion of a known model a bundle of the package: `python tools/bundle.py HEALED BUNDLE ASSEMBLED`.

BUNDLE is what ships, ASSEMBLED what a user gets from it: a stock checkpoint, with a record of its own that says what
rounding cost. That is measured here, on the last tenth of texts, which conversion and healing do not learn from. What
a bundle is, `daedal.checkpoint.bundles` says.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from daedal.checkpoint.bundling import make_bundle
from daedal.checkpoint.load import load
from daedal.checkpoint.sources import package_weights
from daedal.convert.quality import Examiner, Quality
from daedal.convert.texts import read_texts
from daedal.distill.documents import document
from daedal.distill.provenance import Data, Model, Provenance
from daedal.errors import DaedalError
from daedal.serve.state.ancestry import ORIGINAL, describe_original
from daedal.text.tokenizer import Tokenizer
from daedal.train.documents import licence_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("healed", type=Path, help="the checkpoint to bundle")
    parser.add_argument("bundle", type=Path, help="a new directory, named as users will ask for the model")
    parser.add_argument("assembled", type=Path, help="a new directory for what the bundle is put together to")
    parser.add_argument("--original", default="smollm2-135m", help="the known name of what HEALED was made of")
    parser.add_argument("--share", type=float, default=1 / 32, help="of a row's typical number that is one step")
    parser.add_argument("--text", type=Path, action="append", required=True, help="to measure on; may be repeated")
    parser.add_argument("--tokens", type=int, default=8192, help="that are measured on, in all")
    parser.add_argument("--window", type=int, default=1024, help="tokens of one piece of text")
    given = parser.parse_args(arguments)
    try:
        print(json.dumps(bundled(given)))
    except DaedalError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    return 0


def bundled(given: argparse.Namespace) -> dict[str, object]:
    """Sizes, the error of rounding, and quality before and after it."""
    with TemporaryDirectory() as work:
        return _bundled(given, package_weights(given.original, Path(work) / given.original))


def _bundled(given: argparse.Namespace, original: Path) -> dict[str, object]:
    name = given.bundle.name
    texts = read_texts(
        given.text, Tokenizer.load(original), tokens=16, held_out_tokens=given.tokens, window=given.window
    )
    examiner = Examiner(load(original, device="cpu", dtype=torch.float32), texts.held_out)
    examine = partial(_examined, examiner)
    before = examine(given.healed)
    after: list[Quality] = []

    def describe(directory: Path, error: float) -> None:
        after.append(examine(directory))
        said = describe_original(given.original, original, perplexity_ratio=after[0].ratio)
        (directory / ORIGINAL).write_text(said, encoding="utf-8")
        described = Provenance(
            name=name,
            parent=Model.of(given.healed),
            data=[Data.of(path, role="held out", licence=licence_of(path)) for path in given.text],
            stages=[{"stage": "bundle", "step": given.share, "error": error, "ratio before": before.ratio}],
            metrics={"perplexity ratio": after[0].ratio, "divergence": after[0].divergence},
            lost=(
                f"Perplexity on held-out text is {after[0].ratio:.4f} times that of {given.original}; before its "
                f"attention was rounded to steps it was {before.ratio:.4f} times.",
                "What is lost beyond text like the held-out files was not measured here.",
            ),
        )
        document(directory, described, parent=given.healed)

    made = make_bundle(
        given.healed,
        original,
        given.bundle,
        given.assembled,
        name=name,
        original_name=given.original,
        share=given.share,
        describe=describe,
    )
    quality = {
        when: {"ratio": found.ratio, "ratios": found.ratios, "divergence": found.divergence, "tokens": found.tokens}
        for when, found in (("before", before), ("after", after[0]))
    }
    return {"bundle": str(given.bundle), **made.record(), **quality}


def _examined(examiner: Examiner, directory: Path) -> Quality:
    return examiner.examine(load(directory, device="cpu", dtype=torch.float32))


if __name__ == "__main__":
    sys.exit(main())
