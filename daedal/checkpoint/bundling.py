"""Makes a bundle of a model: what it has of its original by name and order, the rest as it is or in steps.

A tensor that the original has too, in the model's number format, is taken from there. So are matrices of experts whose
rows, or columns of the last matrix, are those of the dense one in another order, as an exact split leaves them. What is
put together again is the model that was given, bit for bit, but for other matrices where rounding is asked for: these
come in steps, from what the original has where that is near. What it has, `resemblance` finds; how a model is put
together, `bundles` knows.
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from daedal.checkpoint.bundles import (
    BUNDLE,
    CODES,
    CONFIG,
    FORMAT,
    OVERLAY,
    PACKED,
    PLACES,
    STEP,
    TENSORS,
    WEIGHTS,
    Bundle,
    Part,
    assemble,
    digest,
    digest_taken,
)
from daedal.checkpoint.download import Progress, sha256_of, silent
from daedal.checkpoint.index import INDEX
from daedal.checkpoint.resemblance import Mixture, Original, Place
from daedal.checkpoint.shards import Shards
from daedal.checkpoint.sources import RECEIPT
from daedal.checkpoint.staging import staged
from daedal.checkpoint.step_codes import decode, encode
from daedal.errors import CheckpointError, ConfigError

# What may be rounded: the matrices between norms. Routers choose, and embeddings are the original's.
_ROUNDED = re.compile(r".*\.(self_attn\.\w+_proj\w*|mlp\.(.*\.)?(gate|up|down)_proj)\.weight")
_LARGE = 2**16  # bytes of a file that is worth deflating


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a bundle consists of. taken, held, rounded: tensors. num_bytes: of the bundle's files. error: of what is
    rounded, the norm of the change divided by that of what was there.
    """

    taken: int
    held: int
    rounded: int
    num_bytes: int
    error: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class _Division:
    """parts: of all tensors; overlay: what goes into the bundle. before, changed: squares, of what is rounded."""

    parts: dict[str, Part] = field(default_factory=dict)
    overlay: dict[str, Tensor] = field(default_factory=dict)
    before: float = 0.0
    changed: float = 0.0
    _orders: dict[bytes, str] = field(default_factory=dict)

    def placed(self, part: Part, place: Place | None) -> Part:
        """The part with its place; an order goes into the overlay, once."""
        if place is None:
            return part
        label = ""
        if place.order is not None:
            label = self._orders.setdefault(place.order.numpy().tobytes(), f"order.{len(self._orders)}")
            self.overlay[label] = place.order
        return replace(part, source=place.source, axis=place.axis, order=label)

    def based(self, part: Part, name: str, base: Place | Mixture | None) -> Part:
        """The part with what it is close to."""
        if not isinstance(base, Mixture):
            return self.placed(part, base)
        self.overlay |= {name + PLACES: base.places, name + WEIGHTS: base.weights}
        return replace(part, source=base.source, mixture=True)


def make_bundle(
    model: Path,
    original: Path,
    bundle: Path,
    assembled: Path,
    *,
    name: str,
    original_name: str,
    share: float | None,
    describe: Callable[[Path, float], None] = lambda directory, error: None,
    progress: Progress = silent,
) -> Made:
    """Writes a bundle of the checkpoint `model` to `bundle`, and what it is put together to, to `assembled`.

    original: the checkpoint that users have as `original_name`. share: of a row's typical number that is one step; None
    rounds nothing. describe: writes what else belongs beside the rounded model, given its directory and the error.
    CheckpointError where a place is taken, ConfigError for a share that is none.
    """
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"the share is {share}: a step is above 0 and at most 1 of a row's typical number")
    for place in (bundle, assembled):
        if place.exists():
            raise CheckpointError(f"{place} exists already: name a new directory, or remove it")
    shards = Shards(original)
    divided = _divided(Shards(model), shards, share, progress)
    error = (divided.changed / divided.before) ** 0.5 if divided.before else 0.0
    said = {
        "name": name,
        "original": original_name,
        "original_sha256": digest_taken(divided.parts.values(), shards),
        "weights_sha256": digest(
            (label, part.tensor(label, divided.overlay, shards)) for label, part in sorted(divided.parts.items())
        ),
        "num_bytes": sum(part.num_bytes for part in divided.parts.values()),
    }
    with staged(bundle) as directory, staged(assembled) as whole:
        _write_weights(directory, divided)
        _write_rest(directory, model, said)
        assemble(Bundle.read(directory), original, whole, progress=progress)
        describe(whole, error)
        _write_rest(directory, whole, said)
        sizes = [path.stat().st_size for path in directory.iterdir()]
    parts = divided.parts.values()
    return Made(
        taken=sum(bool(part.source) and not part.in_steps for part in parts),
        held=sum(not part.source and not part.in_steps for part in parts),
        rounded=sum(part.in_steps for part in parts),
        num_bytes=sum(sizes),
        error=error,
    )


def _divided(model: Shards, original: Shards, share: float | None, progress: Progress) -> _Division:
    division, known = _Division(), Original(original)
    for done, name in enumerate(model.files, 1):
        tensor = model.read(name)
        plain = Part(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        if (found := known.find(name, tensor)) is not None:
            division.parts[name] = division.placed(plain, found)
        elif share is not None and _ROUNDED.fullmatch(name):
            part = division.based(replace(plain, in_steps=True), name, known.close(name, tensor, model))
            base = part.taken(name, division.overlay, original) if part.source else None
            _round(division, name, tensor, share, base)
            division.parts[name] = part
        else:
            division.parts[name], division.overlay[name] = plain, tensor
        progress("comparing tensors", done, len(model.files))
    return division


def _round(division: _Division, name: str, tensor: Tensor, share: float, base: Tensor | None) -> None:
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"tensor {name} has numbers that are not finite: heal the model again")
    planes_2NM, step_N1 = encode(tensor, share, base)
    division.overlay |= {name + CODES: planes_2NM, name + STEP: step_N1}
    after = decode(planes_2NM, step_N1, base).to(tensor.dtype)
    division.before += float(tensor.double().square().sum())
    division.changed += float((after.double() - tensor.double()).square().sum())


def _write_weights(directory: Path, division: _Division) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in division.overlay.items()}
    # Codes are noise with runs of zeros between them: what deflate gains by looking for repetitions is time lost.
    (directory / OVERLAY).write_bytes(_deflated(safetensors.torch.save(tensors), zlib.Z_RLE))
    told = {name: _told(part) for name, part in division.parts.items()}
    (directory / TENSORS).write_bytes(_deflated(json.dumps(told, indent=0).encode()))


def _told(part: Part) -> dict[str, Any]:
    """Without what a part is unless it is said otherwise."""
    usual = Part(shape=part.shape, dtype=part.dtype)
    special = {name: value for name, value in asdict(part).items() if value != getattr(usual, name)}
    return {"shape": part.shape, "dtype": part.dtype, **special}


def _write_rest(directory: Path, checkpoint: Path, said: Mapping[str, Any]) -> None:
    """All files of a checkpoint but its weights, and bundle.json."""
    for old in directory.iterdir():
        if old.name not in (TENSORS, OVERLAY):
            old.unlink()
    for path in sorted(checkpoint.iterdir()):
        if not path.is_file() or path.suffix == ".safetensors" or path.name in (INDEX, RECEIPT):
            continue
        if path.stat().st_size < _LARGE or path.name == CONFIG:
            shutil.copyfile(path, directory / path.name)
        else:
            (directory / (path.name + PACKED)).write_bytes(_deflated(path.read_bytes()))
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    text = json.dumps({"format": FORMAT, **said, "files": files}, indent=1) + "\n"
    (directory / BUNDLE).write_text(text, encoding="utf-8")


def _deflated(data: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """In gzip's format, the same for the same data."""
    coder = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 9, strategy)
    return coder.compress(data) + coder.flush()
