"""The licence of a model: what its files say, each of them, and whether they agree.

A checkpoint may say its licence in the receipt of how it was fetched, in the card (README.md), in config.json, in GGUF
metadata, in its own provenance record, or by the text of a LICENSE file. Nothing is guessed: where two of them name
different terms, or none names any, that is what comes out. What the licence permits is in `terms.py`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard

from daedal.checkpoint.gguf_header import read_gguf
from daedal.distill import terms
from daedal.errors import CheckpointError
from daedal.text.files import read_optional, read_text

RECEIPT = "daedal_source.json"
RECORD = "provenance.json"
_EMPTY = ("", "other", "unknown", "none")  # what cards say where they say nothing
_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence, as it was found or stated.

    id: as its source spells it, or as the table does; None where none was found or sources disagree. source: where it
    was read. text_sha256: of the licence's text where a file of it came along. disagreement: "SOURCE says ID" for each
    source, where they name different terms.
    """

    id: str | None
    source: str
    text_sha256: str | None = None
    disagreement: tuple[str, ...] = ()

    @property
    def terms(self) -> terms.Terms | None:
        """What the table knows of it."""
        return None if self.id is None else terms.named(self.id)

    def record(self) -> dict[str, Any]:
        """As it goes into a provenance record."""
        return {
            "id": self.id,
            "source": self.source,
            "text_sha256": self.text_sha256,
            "disagreement": list(self.disagreement),
        }


def stated(licence: str) -> Licence:
    """A licence that the user states."""
    found = terms.named(licence)
    return Licence(id=licence.strip() if found is None else found.id, source="stated by the user")


def of_endpoint(url: str) -> Licence:
    """The terms of the service behind an address such as "https://api.example.com/v1"."""
    host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    found = terms.of_host(host)
    return Licence(id=None if found is None else found.id, source=f"the address {host or url}")


def of_checkpoint(directory: Path) -> Licence:
    """What the files of a checkpoint say. CheckpointError where one of them is damaged."""
    text = _licence_text(directory)
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    said = list(_said(directory))
    if text is not None and (recognised := terms.of_text(text)) is not None:
        said.append(("the text of its LICENSE", recognised.id))
    if not said:
        return Licence(id=None, source="no file of the checkpoint", text_sha256=digest)
    meant = {_meaning(name) for _, name in said}
    if len(meant) > 1:
        disagreement = tuple(f"{source} says {name}" for source, name in said)
        return Licence(id=None, source="several files", text_sha256=digest, disagreement=disagreement)
    source, name = said[0]
    found = terms.named(name)
    return Licence(id=name if found is None else found.id, source=source, text_sha256=digest)


def _meaning(name: str) -> str:
    found = terms.named(name)
    return name.lower() if found is None else found.id


def _said(directory: Path) -> Iterator[tuple[str, str]]:
    """(file, licence) for each file that names one. The receipt of a fetch says nothing of a model made since."""
    if not (directory / RECORD).is_file():
        yield from _named(RECEIPT, read_optional(directory / RECEIPT).get("licence"))
    yield from _named(_CARD, _card_licence(directory / _CARD))
    yield from _named("config.json", read_optional(directory / "config.json").get("license"))
    yield from _named(RECORD, _object(read_optional(directory / RECORD).get("student")).get("licence"))
    for path in sorted(directory.glob("*.gguf")):
        metadata, _ = read_gguf(path)
        yield from _named(path.name, metadata.get("general.license"))


def _named(source: str, licence: object) -> Iterator[tuple[str, str]]:
    if isinstance(licence, str) and licence.strip().lower() not in _EMPTY:
        yield source, licence.strip()


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _card_licence(path: Path) -> object:
    """`license` of a card's front matter; `license_name` where that says "other"."""
    if not path.is_file():
        return None
    try:
        data = vars(ModelCard(read_text(path), ignore_metadata_errors=True).data)
    except Exception as error:  # of the YAML reader, which is not ours to import
        raise CheckpointError(f"{path} has no readable front matter ({error}): correct or remove it") from error
    licence = data.get("license")
    return data.get("license_name") if licence == "other" else licence


def licence_files(directory: Path) -> list[Path]:
    """LICENSE, LICENCE, COPYING and NOTICE files, in any spelling that begins so."""
    beginnings = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name.upper().startswith(beginnings))


def _licence_text(directory: Path) -> str | None:
    files = [path for path in licence_files(directory) if not path.name.upper().startswith("NOTICE")]
    return read_text(files[0]) if files else None
