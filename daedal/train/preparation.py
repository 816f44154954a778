"""From a recipe's text to what a run reads: a tokenizer, trained on the text where none is given, and shards of ids.

Both are made once, whole or not at all, whichever of the run's processes comes first; the others wait and find them.
So this happens before processes form a group. Knows nothing of models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from daedal.checkpoint.staging import locked, staged
from daedal.errors import ConfigError
from daedal.text.tokenizer import Tokenizer
from daedal.text.training import train_tokenizer
from daedal.train.documents import read_documents
from daedal.train.manifest import Manifest
from daedal.train.recipe import Recipe
from daedal.train.shards import prepare

TOKENIZER, SHARDS = "tokenizer", "shards"
_SAMPLE_CHARS = 2**24
"""Of the text a tokenizer learns from: more changes few of the pieces that it finds."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """tokenizer, shards: directories. vocabulary: ids of the tokenizer; bos_id, eos_id: as documents are framed."""

    tokenizer: Path
    shards: Path
    manifest: Manifest
    vocabulary: int

    @property
    def bos_id(self) -> int | None:
        return self.manifest.bos_id

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id


def prepare_text(recipe: Recipe, directory: Path, *, vocabulary: int, progress: Progress) -> Prepared:
    """The tokenizer and shards of a recipe in `directory`, made now unless they are there.

    vocabulary: ids of a tokenizer that is trained here. ConfigError and DataError say what is wrong with the text.
    """
    if not recipe.text:
        raise ConfigError("the recipe names no `text`: name files or directories, as with --set text=PATH")
    tokenizer = _tokenizer(recipe, directory / TOKENIZER, vocabulary, progress)
    manifest = prepare(
        recipe.text,
        tokenizer,
        directory / SHARDS,
        column=recipe.column,
        validation=recipe.validation,
        progress=lambda done, total: progress("tokenising", done, total),
        waiting=lambda: progress("another process is tokenising", 0, 0),
    )
    ids = Tokenizer.load(tokenizer).vocab_size
    return Prepared(tokenizer=tokenizer, shards=directory / SHARDS, manifest=manifest, vocabulary=ids)


def _tokenizer(recipe: Recipe, target: Path, vocabulary: int, progress: Progress) -> Path:
    if recipe.tokenizer is not None:
        return Path(recipe.tokenizer)
    with locked(target.with_name(f".{target.name}.lock"), waiting=lambda: progress("another trains a tokenizer", 0, 0)):
        if (target / "tokenizer.json").is_file():
            present = Tokenizer.load(target).vocab_size
            if present != vocabulary:
                raise ConfigError(
                    f"{target} has a vocabulary of {present} ids, the recipe asks for {vocabulary}: name another "
                    "--out, or remove it"
                )
            return target
        with staged(target) as partial:
            train_tokenizer(_sample(recipe, progress), partial, vocab_size=vocabulary)
    return target


def _sample(recipe: Recipe, progress: Progress) -> Iterator[str]:
    chars = 0
    read = read_documents(recipe.text, column=recipe.column, progress=lambda *at: progress("reading", *at))
    for document in read:
        if chars >= _SAMPLE_CHARS:
            return
        chars += len(document.text)
        yield document.text
