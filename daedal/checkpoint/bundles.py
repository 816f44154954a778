"""A model that comes with the package as what it does not share with another, its original, and is put together here.

    bundle.json               name, original, checksums of all the files here and of all numbers before and after
    tensors.json.gz           where each tensor of the model comes from
    overlay.safetensors.gz    tensors that the original has not, as they are or in steps (`step_codes`); orders of rows,
                              and their mixtures (`row_mixtures`)
    config.json, ...          all other files of the checkpoint; large ones deflated, under their names with .gz

A tensor of the original comes in the model's number format, its rows or columns in another order where they were dealt
out to experts. What is put together is a stock checkpoint, its numbers the same on any machine, and is refused where
they are not. Knows neither where an original is fetched nor how a bundle is made (`bundling`).
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from daedal.checkpoint.download import Progress, sha256_of, silent
from daedal.checkpoint.row_mixtures import mixed
from daedal.checkpoint.shards import Shards
from daedal.checkpoint.step_codes import decode
from daedal.checkpoint.writing import SHARD_BYTES, Planned, write_checkpoint
from daedal.errors import CheckpointError
from daedal.text.files import parse_object, read_text

FORMAT = "daedal-bundle/1"
BUNDLE, TENSORS, OVERLAY, PACKED = "bundle.json", "tensors.json.gz", "overlay.safetensors.gz", ".gz"
CONFIG = "config.json"
CODES, STEP = ".codes", ".step"  # behind a tensor's name, of what is in steps
PLACES, WEIGHTS = ".places", ".weights"  # the same, of a mixture of rows

_AGAIN = "install the package again"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a tensor comes from. source: of the original, the tensor it is taken from, "" where it is in the overlay.
    order: in the overlay, which of the source's rows (axis 0) or columns (axis 1) it has, "" for all as they are.
    in_steps: the overlay has it as codes, of the way from its source where it has one; mixture: or from mixtures of the
    source's rows.
    """

    shape: tuple[int, ...]
    dtype: str
    source: str = ""
    order: str = ""
    axis: int = 0
    in_steps: bool = False
    mixture: bool = False

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def tensor(self, name: str, overlay: Mapping[str, Tensor], original: Shards) -> Tensor:
        """The tensor itself, called `name`."""
        if self.in_steps:
            base = self.taken(name, overlay, original) if self.source else None
            return decode(overlay[name + CODES], overlay[name + STEP], base).to(self.torch_dtype)
        return self.taken(name, overlay, original).to(self.torch_dtype) if self.source else overlay[name]

    def taken(self, name: str, overlay: Mapping[str, Tensor], original: Shards) -> Tensor:
        """What the original gives: its source, in its order or mixed."""
        found = original.read(self.source)
        if self.mixture:
            return mixed(found, overlay[name + PLACES], overlay[name + WEIGHTS])
        return found.index_select(self.axis, overlay[self.order]) if self.order else found


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What bundle.json says. original: a known name. original_sha256, weights_sha256: of `digest`, of the tensors that
    are taken, and of the model's. num_bytes: of the model's tensors. files: sha256 of all others. sha256: of
    bundle.json, so of all.
    """

    directory: Path
    sha256: str
    name: str
    original: str
    original_sha256: str
    weights_sha256: str
    num_bytes: int
    files: Mapping[str, str]

    @classmethod
    def read(cls, directory: Path) -> "Bundle":
        """CheckpointError where it is none, or of another format."""
        path = directory / BUNDLE
        said = parse_object(read_text(path), path)
        try:
            if said.pop("format") != FORMAT:
                raise ValueError("`format`")
            found = cls(directory=directory, sha256=sha256_of(path), **said)  # type: ignore[arg-type]
            if not isinstance(found.files, dict) or not isinstance(found.num_bytes, int):
                raise ValueError("`files` or `num_bytes`")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not what a {FORMAT} has ({error}): {_AGAIN}") from error
        return found

    def content(self, file: str) -> bytes:
        """A file, inflated where it is deflated. CheckpointError where it is not the one that was bundled."""
        path = self.directory / file
        if not path.is_file() or sha256_of(path) != self.files.get(file):
            raise CheckpointError(f"{path} is missing, cut or altered: {_AGAIN}")
        data = path.read_bytes()
        return gzip.decompress(data) if file.endswith(PACKED) else data

    def parts(self) -> dict[str, Part]:
        """Of every tensor of the model, by its published name."""
        try:
            said: dict[str, Any] = json.loads(self.content(TENSORS))
            return {name: Part(**{**part, "shape": tuple(part["shape"])}) for name, part in said.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(TENSORS, error) from error

    def overlay(self) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self.content(OVERLAY))
        except SafetensorError as error:
            raise self._damaged(OVERLAY, error) from error

    @property
    def small_files(self) -> dict[str, str]:
        """Of the checkpoint, all files but the weights: name there to name here."""
        others = (file for file in self.files if file not in (TENSORS, OVERLAY))
        return {file.removesuffix(PACKED): file for file in others}

    def _damaged(self, file: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.directory / file} is damaged ({error!r}): {_AGAIN}")


def assemble(bundle: Bundle, original: Path, directory: Path, *, progress: Progress = silent) -> None:
    """Makes `directory` the bundle's checkpoint. original: a checkpoint. progress: told of the tensors done.

    CheckpointError where `original` has other numbers than the bundle was made of, or what comes out is another model.
    """
    parts, overlay, shards = bundle.parts(), bundle.overlay(), Shards(original)
    if digest_taken(parts.values(), shards) != bundle.original_sha256:
        raise CheckpointError(
            f"{original} has other weights than those that {bundle.name} is made of: remove the directory, so that "
            f"{bundle.original} is fetched again"
        )
    for name, file in bundle.small_files.items():
        (directory / name).write_bytes(bundle.content(file))
    config = parse_object(read_text(directory / CONFIG), directory / CONFIG)
    plan = [Planned(part.num_bytes, partial(_made, name, part, overlay, shards)) for name, part in parts.items()]
    told = partial(progress, f"putting {bundle.name} together")
    write_checkpoint(directory, config, plan, shard_bytes=SHARD_BYTES, progress=told)
    if digest_all(Shards(directory)) != bundle.weights_sha256:
        raise CheckpointError(
            f"{bundle.name} came out with other numbers than it was bundled with: {_AGAIN}, or name another model"
        )


def _made(name: str, part: Part, overlay: Mapping[str, Tensor], original: Shards) -> dict[str, Tensor]:
    return {name: part.tensor(name, overlay, original).contiguous()}


def digest_taken(parts: Iterable[Part], original: Shards) -> str:
    """Of the original's tensors that are taken. CheckpointError where one is missing."""
    wanted = sorted({part.source for part in parts if part.source})
    if missing := [name for name in wanted if name not in original]:
        raise CheckpointError(f"{original.directory} lacks tensor {missing[0]}: name the model that it was made of")
    return digest((name, original.read(name)) for name in wanted)


def digest_all(shards: Shards) -> str:
    return digest((name, shards.read(name)) for name in sorted(shards.files))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, types, shapes and numbers, however they lie in files."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
