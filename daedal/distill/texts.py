"""Files of text as sources of samples: tokenised once, each with a part that is held out, or with files of their own
for that.

Each file, or directory, is a dataset of its own, so that a mixture can give all of them their share. Documents that are
held out are never trained on; which they are, the hash of each decides. Knows no models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from daedal.errors import ConfigError
from daedal.train.batches import Batch
from daedal.train.dataset import Dataset
from daedal.train.documents import Source
from daedal.train.manifest import TRAIN, VALIDATION, Manifest
from daedal.train.sampling import Sampler
from daedal.train.shards import prepare

SHORT_DOCUMENT = 2**12
"""Characters of the documents that a text is cut into where a part of it is held out: small, so that there are many."""
LONG_DOCUMENT = 16
"""Characters for each token of a window: four windows of English lie in a document, three of them whole."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """One source of text, tokenised. held_out: None where no document of it fell to that part."""

    name: str
    path: Path
    manifest: Manifest
    train: Dataset
    held_out: Dataset | None


def open_texts(
    paths: Sequence[Path],
    tokenizer: Path,
    directory: Path,
    *,
    column: str = "text",
    validation: float = 0.0,
    window: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> list[Text]:
    """Each path's text as a dataset below `directory`, made now unless it is there already.

    tokenizer: a directory with tokenizer.json. column: of the text, in JSON lines and Parquet. validation: the share of
    documents that is held out. window: tokens of the longest window that is to be read: none reads across the end of a
    document. progress: told what is tokenised and how far. DataError says what is wrong with a file.
    """
    if not paths:
        raise ConfigError("no text is named: name files or directories of real text")
    found: list[Text] = []
    for name, path in named(paths).items():
        place = directory / f"shards-{len(found):02d}"
        chars = max(SHORT_DOCUMENT if validation else Source.document_chars, LONG_DOCUMENT * window)
        manifest = prepare(
            [Source(path=path, document_chars=chars)],
            tokenizer,
            place,
            column=column,
            validation=validation,
            progress=partial(progress, f"tokenising {name}"),
        )
        splits = {shard.split for shard in manifest.shards}
        if TRAIN not in splits:
            raise ConfigError(f"{path} is so short that all of it is held out: give more text, or files to hold out")
        held_out = Dataset.open(place, split=VALIDATION) if VALIDATION in splits else None
        text = Text(name=name, path=path, manifest=manifest, train=Dataset.open(place), held_out=held_out)
        found.append(text)
    return found


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names of paths, each another."""
    found: dict[str, Path] = {}
    for path in paths:
        name, count = path.name, 2
        while name in found:
            name, count = f"{path.name} ({count})", count + 1
        found[name] = path
    return found


def spread_windows(datasets: Mapping[str, Dataset], *, context: int, tokens: int) -> dict[str, list[Batch]]:
    """From each dataset windows of `context` places, spread evenly over it and always the same, as batches of one.

    tokens: of all of them together, about; each gives at least one window.
    """
    count = max(1, tokens // context // max(len(datasets), 1))
    return {name: list(_spread(dataset, context, count)) for name, dataset in datasets.items()}


def _spread(dataset: Dataset, context: int, count: int) -> list[Batch]:
    sampler = Sampler(dataset, context=context, epochs=1, shuffle=False)
    last = sampler.num_samples
    assert last is not None
    whole = max(1, dataset.num_tokens // context - 1)  # the last window is short
    numbers = sorted({min(index * whole // count, last - 1) for index in range(count)})
    batches = []
    for number in numbers:
        pieces = [dataset.read(piece.document, piece.start, piece.length + 1) for piece in sampler.sample(number)]
        batches.append(Batch.of(pieces, bytes_per_token_V=dataset.bytes_per_token_V))
    return batches
