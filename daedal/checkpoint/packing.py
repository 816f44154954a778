"""Weights packed once and mapped ever after: in the user's cache, or in a checkpoint that was written packed.

A checkpoint is packed on the first load with a format, into `packed/` of the cache; later loads map the file. What was
packed is known again by its files' names, sizes and times and by config.json. An entry that is damaged or out of date
is made anew. Formats by slot are facts of `daedal.packed`, codes are `repacking`'s business, bytes `packed_files`'.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint import packed_files
from daedal.checkpoint.contents import Contents
from daedal.checkpoint.packed_files import FOLDER, INDEX_FILE, WEIGHTS_FILE, Entry
from daedal.checkpoint.repacking import Slab, slabs
from daedal.checkpoint.shards import Shards
from daedal.checkpoint.staging import disk_errors, locked, require_space, staged
from daedal.config import ModelConfig
from daedal.errors import CheckpointError, ConfigError
from daedal.model.packing import assign, check
from daedal.model.transformer import Transformer, empty
from daedal.ops.packed import Packed
from daedal.packed import WEIGHTS, Kept, kept, stays_plain
from daedal.places import cache_directory
from daedal.shapes import Slot, drafting, parameters

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """One entry, and what it is made of. kept: None for a plain tensor."""

    entry: Entry
    slot: Slot
    kept: Kept | None


Noted = Callable[[Planned, Slab | None], None]


def plan(config: ModelConfig, weights: str, *, drafts: bool, exact: Set[str] = frozenset()) -> list[Planned]:
    """Everything that a packed model consists of, in the order of the forward pass. drafts: drafting modules too.
    exact: slots that are to be in bfloat16.
    """
    found = []
    for slot in parameters(config) + (drafting(config) if drafts else []):
        if stays_plain(slot, config, weights):
            found.append(Planned(Entry(slot.name, _plain_kind(slot), slot.shape), slot, None))
        for one in kept(slot, config, weights, exact):
            found.append(Planned(Entry(one.name, one.format, one.shape), slot, one))
    return found


def write(
    directory: Path,
    planned: Sequence[Planned],
    contents: Contents,
    identity: dict[str, object],
    *,
    progress: Progress,
    noted: Noted = lambda planned, slab: None,
) -> None:
    """Packs a checkpoint's tensors into the files of `directory`. noted: told of each slab, None for a plain tensor."""
    sources = {one.entry.name: one for one in planned}

    def made(entry: Entry) -> Iterator[Tensor]:
        one = sources[entry.name]
        if one.kept is None:
            noted(one, None)
            yield contents.read(one.slot, getattr(torch, entry.kind))
            return
        for slab in slabs(contents, one.slot, one.kept):
            noted(one, slab)
            yield slab.packed.data

    packed_files.write(directory, [one.entry for one in planned], made, identity, progress)


def write_folder(
    planned: Sequence[Planned],
    contents: Contents,
    identity: Mapping[str, object],
    progress: Progress,
    noted: Noted,
    directory: Path,
) -> list[str]:
    """Writes the packed folder of a checkpoint that is packed itself; returns its files' names. identity: what `plan`
    was given, as "weights", "drafting" and "exact".
    """
    (directory / FOLDER).mkdir()
    write(directory / FOLDER, planned, contents, dict(identity), progress=progress, noted=noted)
    return [f"{FOLDER}/{WEIGHTS_FILE}", f"{FOLDER}/{INDEX_FILE}"]


def carried(directory: Path) -> str | None:
    """The format of a checkpoint that is packed itself; None for any other. CheckpointError where it is damaged."""
    if not (directory / FOLDER / INDEX_FILE).is_file():
        return None
    weights = packed_files.read_identity(directory / FOLDER).get("weights")
    if weights not in WEIGHTS:
        raise CheckpointError(f"{directory / FOLDER} holds weights in {weights!r}, which is no format: quantise again")
    return str(weights)


def load_packed(
    directory: Path, weights: str, *, dtype: torch.dtype | None, mtp: bool, progress: Progress | None
) -> Transformer:
    """The model of a checkpoint with its weights in a format, in bfloat16; with float32 the same numbers, expanded.

    progress: told of bytes while weights are packed. ConfigError for a format that does not exist, or is not what the
    checkpoint carries; CheckpointError for a damaged one; SourceError where the cache's disk refuses.
    """
    check(weights)
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise ConfigError(f"dtype is {dtype}: packed weights compute in bfloat16, or are expanded for torch.float32")
    config = ModelConfig.read(directory)
    if mtp and not config.num_nextn_predict_layers:
        message = "num_nextn_predict_layers is 0: the checkpoint has no drafting modules, load it without them"
        raise CheckpointError(f"{directory}: {message}")
    own = carried(directory)
    if own is None:
        held = _cached(directory, config, weights, progress or (lambda done, total: None))
    elif own == weights:
        held = _read(directory / FOLDER, config, weights)
    else:
        raise ConfigError(f"weights is {weights!r}, {directory} holds {own} alone: leave it out, or load the original")
    if mtp and not held.drafts:
        if own is None:
            # Says which of their tensors does not fit.
            Contents(Shards(directory), config, parameters(config) + drafting(config), drafting=True)
        raise CheckpointError(f"{directory} was packed without its drafting modules: load it without them")
    return _expanded(held, config, mtp=mtp) if dtype == torch.float32 else _filled(held, config, mtp=mtp)


@dataclass(frozen=True, eq=False)
class _Held:
    """Entries as mapped. drafts: drafting modules are among them."""

    planned: Sequence[Planned]
    values: Sequence[Tensor | Packed]
    drafts: bool

    def pairs(self, *, mtp: bool) -> Iterator[tuple[Planned, Tensor | Packed]]:
        for one, value in zip(self.planned, self.values, strict=True):
            if mtp or not one.slot.name.startswith("mtp."):
                yield one, value


def _filled(held: _Held, config: ModelConfig, *, mtp: bool) -> Transformer:
    model = empty(config, device="meta", dtype=torch.bfloat16, drafting=mtp)
    for one, value in held.pairs(mtp=mtp):
        assign(model, one.entry.name, value)
    return model.eval()


def _expanded(held: _Held, config: ModelConfig, *, mtp: bool) -> Transformer:
    """Exactly the same numbers, dense. A head that was tied is one of its own now."""
    model = empty(config.replace(tie_word_embeddings=False), device="meta", dtype=torch.float32, drafting=mtp)
    keys: Tensor | None = None
    for one, value in held.pairs(mtp=mtp):
        if isinstance(value, Tensor):
            assign(model, one.entry.name, value.float() if value.is_floating_point() else value, trained=True)
            continue
        assert one.kept is not None
        dense = value.dense()
        if one.kept.part == "keys":
            keys = dense
        elif one.kept.part == "values":
            assert keys is not None
            assign(model, one.slot.name, torch.cat((keys, dense), 1).flatten(0, 1), trained=True)
        elif one.kept.part == "whole":
            flat = dense.reshape(one.slot.shape)
            assign(model, one.kept.name, flat, trained=True)
    return model.eval()


def _cached(directory: Path, config: ModelConfig, weights: str, progress: Progress) -> _Held:
    """The entry of the cache, made or made anew if need be."""
    path, made_of = directory.resolve(), fingerprint(directory)
    key = hashlib.sha256(f"{path}\0{weights}\0{packed_files.VERSION}".encode()).hexdigest()[:16]
    cache = cache_directory()
    target = cache / FOLDER / f"{path.name}-{weights}-{key}"
    held = _fresh(target, config, weights, made_of)
    if held is not None:
        return held
    contents, drafts = _contents(directory, config)
    planned = plan(config, weights, drafts=drafts)
    _, need = packed_files.offsets([one.entry for one in planned])
    identity: dict[str, object] = {"checkpoint": str(path), "fingerprint": made_of, "weights": weights}
    with disk_errors(cache, need), locked(cache / "locks" / f"{target.name}.lock", waiting=lambda: None):
        held = _fresh(target, config, weights, made_of)
        if held is None:
            with staged(target) as partial, disk_errors(cache, need):
                require_space(partial, need)
                write(partial, planned, contents, {**identity, "drafting": drafts}, progress=progress)
            held = _read(target, config, weights)
    return held


def _contents(directory: Path, config: ModelConfig) -> tuple[Contents, bool]:
    """What there is to pack, and whether drafting modules are part of it: they are where they are whole and known."""
    shards = Shards(directory)
    if config.num_nextn_predict_layers and layouts.has_drafting(shards.files, config):
        try:
            return Contents(shards, config, parameters(config) + drafting(config), drafting=True), True
        except CheckpointError:
            pass  # who asks for drafting hears of it; the backbone may be sound
    return Contents(shards, config, parameters(config)), False


def _fresh(target: Path, config: ModelConfig, weights: str, made_of: str) -> _Held | None:
    """The entry of the cache, if it is whole and up to date."""
    try:
        if packed_files.read_identity(target).get("fingerprint") != made_of:
            return None
        return _read(target, config, weights)
    except CheckpointError:
        return None


def _read(directory: Path, config: ModelConfig, weights: str) -> _Held:
    identity = packed_files.read_identity(directory)
    drafts, exact = identity.get("drafting") is True, identity.get("exact")
    planned = plan(config, weights, drafts=drafts, exact=frozenset(exact if isinstance(exact, list) else ()))
    return _Held(planned, packed_files.read(directory, [one.entry for one in planned]), drafts)


def fingerprint(directory: Path) -> str:
    """Of a checkpoint: its configuration, and the names, sizes and times of its files."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors*")):
        held = path.stat()
        digest.update(f"\0{path.name}\0{held.st_size}\0{held.st_mtime_ns}".encode())
    return digest.hexdigest()


def _plain_kind(slot: Slot) -> str:
    if slot.role == "hash_table":
        return "int64"
    return "float32" if slot.wide else "bfloat16"
